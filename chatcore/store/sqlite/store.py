"""The embedded store, as a worker has it: a connection to the host's writer, and a reader of its own."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import apsw

from ...entries import NewEntry
from ..base import (
    Account,
    Appended,
    Changes,
    Entry,
    Known,
    Memberships,
    OnCommit,
    Opened,
    Opening,
    Page,
    Peer,
    Token,
    User,
    View,
)
from . import accounts, reads
from .client import WriterClient
from .ops import Append, OpenConversation
from .reader import Reader
from .requests import Request
from .schema import connect, database_path

T = TypeVar("T")


class SQLiteStore:
    """Implements :class:`~chatcore.store.base.Store`.

    Made inside the running loop, after the fork. ``start`` opens the file, which the writer has prepared.
    """

    name = "sqlite"
    global_positions = True

    def __init__(
        self,
        data: Path,
        on_commit: OnCommit,
        *,
        queue: int = 10_000,
        timeout_ms: int = 5000,
        max_conversations: int = 1000,
    ) -> None:
        self._data = data
        self._on_commit = on_commit
        self._queue = queue
        self._timeout_s = timeout_ms / 1000
        self._max_conversations = max_conversations
        self._store_id = ""
        self._reader: Reader
        self._writer: WriterClient
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def store_id(self) -> str:
        """Names this store: part of what clients keep, so that it is not used with another."""
        return self._store_id

    @property
    def healthy(self) -> bool:
        """Whether the last write and the last read worked."""
        return self._reader.healthy and self._writer.healthy

    async def start(self) -> None:
        """Connect to the writer, and start the reader.

        :raises Unavailable: there is no writer.
        """
        self._writer = WriterClient(self._data, self._on_commit, limit=self._queue)
        await self._writer.start(self._timeout_s)
        db = connect(database_path(self._data), write=False)
        try:
            row = db.execute("SELECT value FROM meta WHERE key = 'store_id'").fetchone()
        finally:
            db.close()
        assert row is not None
        self._store_id = row[0]
        self._reader = Reader(self._data, asyncio.get_running_loop())
        self._reader.start()
        self._sweeper = asyncio.create_task(self._sweep(), name="store-timeouts")

    async def close(self) -> None:
        """Wait for the answers of what was asked, then end the reader."""
        await self._writer.close(self._timeout_s)
        await self._reader.stop()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)

    async def _sweep(self) -> None:
        """A store that hangs must not make its callers hang: they get ``unavailable``."""
        while True:
            await asyncio.sleep(min(0.5, self._timeout_s / 2))
            self._writer.give_up(self._timeout_s)
            self._reader.give_up(self._timeout_s)
            # Find out whether it works again without waiting for a request.
            if not self._writer.healthy and self._writer.idle():
                self._writer.put(accounts.Ping()).add_done_callback(_retrieved)
            if not self._reader.healthy and self._reader.idle():
                self._reader.put(reads.position).add_done_callback(_retrieved)

    def write(self, request: Request) -> asyncio.Future[Any]:
        """One request of another part that keeps its tables here, in the next commit."""
        return self._writer.put(request)

    def read(self, query: Callable[[apsw.Connection], Any]) -> asyncio.Future[Any]:
        """One query of such a part."""
        return self._reader.read_db(query)

    async def _read(self, query: reads.Query[T]) -> T:
        result: T = await self._reader.put(query)
        return result

    # --- the log -----------------------------------------------------------
    def append(self, entry: NewEntry) -> asyncio.Future[Appended]:
        e = entry
        return self._writer.put(Append(e.conv, e.sender, e.cid, e.t, e.fields, e.digest, self._max_conversations))

    async def open(self, conv: Opening) -> Opened:
        opened: Opened = await self._writer.put(OpenConversation(conv, self._max_conversations))
        return opened

    async def heads(self, convs: Sequence[str]) -> dict[str, int]:
        return await self._read(reads.heads(convs))

    async def entries(self, conv: str, after: int, limit: int, max_bytes: int) -> list[Entry]:
        return await self._read(reads.entries(conv, after, limit, max_bytes))

    async def page(
        self, user: str, conv: str, before: int | None, after: int | None, limit: int, max_bytes: int
    ) -> Page:
        return await self._read(reads.page(user, conv, before, after, limit, max_bytes))

    async def position(self) -> int:
        return await self._read(reads.position)

    async def changes(self, after: int, known: Known | None = None, everything: bool = True) -> Changes:
        found = await self._read(reads.changes(after))
        if found is None:
            convs, users = ([], []) if known is None else (list(known.lasts()), known.users())
            found = await self._read(reads.everything(after, convs, users))
        return found

    # --- conversations -------------------------------------------------------
    async def memberships(self, user: str, since: int | None = None) -> Memberships:
        return await self._read(reads.memberships(user, since))

    async def views(self, user: str, convs: Sequence[str] | None = None) -> tuple[int, list[View]]:
        return await self._read(reads.views(user, convs))

    async def role(self, user: str, conv: str) -> str | None:
        return await self._read(reads.role(user, conv))

    async def member_count(self, conv: str) -> int:
        return await self._read(reads.member_count(conv))

    async def members(self, user: str, conv: str, after: str | None, limit: int) -> tuple[list[Peer], str | None]:
        return await self._read(reads.members(user, conv, after, limit))

    async def channels(
        self, user: str, prefix: str | None, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], str | None]:
        return await self._read(reads.channels(user, prefix, after, limit))

    async def set_read(self, user: str, conv: str, upto: int) -> bool:
        return bool(await self._writer.put(accounts.SetRead(user, conv, upto)))

    async def set_notify(self, user: str, conv: str, level: str) -> None:
        await self._writer.put(accounts.SetNotify(user, conv, level))

    async def block(self, user: str, other: str, on: bool) -> None:
        await self._writer.put(accounts.Block(user, other, on))

    async def acquainted(self, user: str, others: Sequence[str]) -> set[str]:
        return await self._read(reads.acquainted(user, others))

    async def dm_peer(self, user: str, conv: str) -> str | None:
        return await self._read(reads.dm_peer(user, conv))

    async def blockers(self, user: str, others: Sequence[str]) -> set[str]:
        return await self._read(reads.blockers(user, others))

    # --- accounts --------------------------------------------------------------
    async def add_user(self, name: str, password: str) -> User:
        user: User = await self._writer.put(accounts.AddUser(secrets.token_urlsafe(9), name, password))
        return user

    async def update_user(self, user: str, name: str | None, password: str | None, keep: bytes = b"") -> User:
        changed: User = await self._writer.put(accounts.UpdateUser(user, name, password, keep))
        return changed

    async def set_disabled(self, name: str, disabled: bool) -> None:
        await self._writer.put(accounts.SetDisabled(name, disabled))

    async def account(self, name: str) -> Account | None:
        return await self._read(reads.account(name))

    async def account_by_id(self, user: str) -> Account | None:
        return await self._read(reads.account(None, user))

    async def users(self, ids: Sequence[str]) -> list[User]:
        return await self._read(reads.users(ids))

    async def seen(self, ids: Sequence[str]) -> dict[str, int]:
        return await self._read(reads.seen(ids))

    async def mark_seen(self, users: Sequence[str]) -> None:
        await self._writer.put(accounts.MarkSeen(tuple(users)))

    async def add_token(self, token_hash: bytes, user: str, expires: int, password: str) -> None:
        await self._writer.put(accounts.AddToken(token_hash, user, expires, password))

    async def token(self, token_hash: bytes) -> Token | None:
        return await self._read(reads.token(token_hash))

    async def extend_token(self, token_hash: bytes, expires: int) -> bool:
        return bool(await self._writer.put(accounts.ExtendToken(token_hash, expires)))

    async def revoke_token(self, token_hash: bytes) -> None:
        await self._writer.put(accounts.RevokeToken(token_hash))


def _retrieved(future: asyncio.Future[Any]) -> None:
    future.exception()
