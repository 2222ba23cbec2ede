"""An open store on a fresh folder, and short ways to fill it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvloop

from chatcore.entries import MemberFields, MsgFields, NewEntry, new_entry
from chatcore.store.base import Entry, Opening, Store, User
from chatcore.store.mongo.client import MongoSettings
from chatcore.store.mongo.store import MongoStore
from chatcore.store.sqlite.schema import prepare
from chatcore.store.sqlite.store import SQLiteStore

_cids = itertools.count()


def message(conv: str, sender: User, body: str = "hello", cid: str | None = None) -> NewEntry:
    """A message to append; without a cid, one of its own."""
    return new_entry(conv, sender.id, cid or f"cid-{next(_cids)}", MsgFields(body))


def change(conv: str, actor: User, user: User, role: str) -> NewEntry:
    """A ``member`` entry to append."""
    return new_entry(conv, actor.id, f"cid-{next(_cids)}", MemberFields(user.id, role))


@dataclass(frozen=True, slots=True)
class Database:
    """A database of MongoDB's protocol, for :func:`run`."""

    url: str
    name: str

    def settings(self, **changes: Any) -> MongoSettings:
        return replace(MongoSettings(self.url, self.name), **changes)


Place = Path | Database


class Opened:
    """A store in use: the entries that it announced, and what is in it."""

    def __init__(self, store: Store, announced: list[Entry]) -> None:
        self.store = store
        self.announced = announced

    async def user(self, name: str) -> User:
        return await self.store.add_user(name, "hash")

    async def conversation(self, creator: User, *others: User, kind: str = "group", title: str | None = "t") -> str:
        opening = Opening(creator.id, f"open-{next(_cids)}", kind, title, tuple(u.id for u in others), b"12345678")
        return (await self.store.open(opening)).conv

    async def log(self, conv: str) -> list[Entry]:
        """All entries."""
        found: list[Entry] = []
        while more := await self.store.entries(conv, len(found), 1000, 10**9):
            found.extend(more)
        return found


def run(data: Place, work: Callable[[Opened], Awaitable[Any]], **options: Any) -> Any:
    """Open a store on the folder or database, do the work on the loop that workers use, and close it."""

    async def main() -> Any:
        announced: list[Entry] = []
        store: Store
        if isinstance(data, Database):
            store = MongoStore(data.settings(), announced.extend, lambda conv: None, **options)
        else:
            store = SQLiteStore(data, announced.extend, **options)
        await store.start()
        try:
            return await work(Opened(store, announced))
        finally:
            await store.close()

    if isinstance(data, Path):
        prepare(data)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())
