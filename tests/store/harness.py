"""An open store on a fresh folder, and short ways to fill it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvloop

from chatcore.entries import MemberFields, MsgFields, NewEntry, new_entry
from chatcore.store.base import Entry, Opening, Store, User
from chatcore.store.mongo.client import MongoSettings
from chatcore.store.mongo.store import MongoStore
from chatcore.store.sqlite.schema import connect, database_path
from chatcore.store.sqlite.store import SQLiteStore

from .hosting import hosted

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


@contextlib.contextmanager
def stalled(data: Path) -> Iterator[None]:
    """The writer of the folder waits meanwhile, as for a disk that does not answer (for up to five seconds)."""
    db = connect(database_path(data), write=True)
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        db.execute("ROLLBACK")
        db.close()


def run(
    data: Place,
    work: Callable[[Opened], Awaitable[Any]],
    *,
    host: bool = True,
    hosting: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Open a store on the folder or database, do the work on the loop that workers use, and close it.

    :param host: run the writer and the indexer of the folder meanwhile; False: they run already.
    :param hosting: options for :func:`hosted`.
    """

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

    hosting_it = hosted(data, **(hosting or {})) if host and isinstance(data, Path) else contextlib.nullcontext()
    with hosting_it, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())
