"""A store that forwards every call to another one: the base of a store that answers some calls itself."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any

from ..entries import NewEntry
from ..store.base import (
    Account,
    Appended,
    Changes,
    Entry,
    Known,
    Memberships,
    Opened,
    Opening,
    Page,
    Peer,
    Store,
    Token,
    User,
    View,
)


class ForwardingStore:
    """Implements :class:`~chatcore.store.base.Store` by forwarding to ``inner``."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.name = inner.name
        self.global_positions = inner.global_positions
        # A method that no subclass overrides is the inner store's own: the way of a message has a call less.
        for name, method in vars(ForwardingStore).items():
            if inspect.isfunction(method) and name[0] != "_" and getattr(type(self), name) is method:
                setattr(self, name, getattr(inner, name))

    @property
    def store_id(self) -> str:
        return self.inner.store_id

    @property
    def healthy(self) -> bool:
        return self.inner.healthy

    async def start(self) -> None:
        await self.inner.start()

    async def close(self) -> None:
        await self.inner.close()

    # --- the log -----------------------------------------------------------
    def append(self, entry: NewEntry) -> asyncio.Future[Appended]:
        return self.inner.append(entry)

    async def open(self, conv: Opening) -> Opened:
        return await self.inner.open(conv)

    async def heads(self, convs: Sequence[str]) -> dict[str, int]:
        return await self.inner.heads(convs)

    async def entries(self, conv: str, after: int, limit: int, max_bytes: int) -> list[Entry]:
        return await self.inner.entries(conv, after, limit, max_bytes)

    async def page(
        self, user: str, conv: str, before: int | None, after: int | None, limit: int, max_bytes: int
    ) -> Page:
        return await self.inner.page(user, conv, before, after, limit, max_bytes)

    async def changes(self, after: int, known: Known | None = None, everything: bool = True) -> Changes:
        return await self.inner.changes(after, known, everything)

    async def position(self) -> int:
        return await self.inner.position()

    # --- conversations -----------------------------------------------------
    async def memberships(self, user: str, since: int | None = None) -> Memberships:
        return await self.inner.memberships(user, since)

    async def views(self, user: str, convs: Sequence[str] | None = None) -> tuple[int, list[View]]:
        return await self.inner.views(user, convs)

    async def role(self, user: str, conv: str) -> str | None:
        return await self.inner.role(user, conv)

    async def member_count(self, conv: str) -> int:
        return await self.inner.member_count(conv)

    async def members(self, user: str, conv: str, after: str | None, limit: int) -> tuple[list[Peer], str | None]:
        return await self.inner.members(user, conv, after, limit)

    async def channels(
        self, user: str, prefix: str | None, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], str | None]:
        return await self.inner.channels(user, prefix, after, limit)

    async def set_read(self, user: str, conv: str, upto: int) -> bool:
        return await self.inner.set_read(user, conv, upto)

    async def set_notify(self, user: str, conv: str, level: str) -> None:
        await self.inner.set_notify(user, conv, level)

    async def block(self, user: str, other: str, on: bool) -> None:
        await self.inner.block(user, other, on)

    async def acquainted(self, user: str, others: Sequence[str]) -> set[str]:
        return await self.inner.acquainted(user, others)

    async def dm_peer(self, user: str, conv: str) -> str | None:
        return await self.inner.dm_peer(user, conv)

    async def blockers(self, user: str, others: Sequence[str]) -> set[str]:
        return await self.inner.blockers(user, others)

    # --- accounts ----------------------------------------------------------
    async def add_user(self, name: str, password: str) -> User:
        return await self.inner.add_user(name, password)

    async def update_user(self, user: str, name: str | None, password: str | None, keep: bytes = b"") -> User:
        return await self.inner.update_user(user, name, password, keep)

    async def set_disabled(self, name: str, disabled: bool) -> None:
        await self.inner.set_disabled(name, disabled)

    async def users(self, ids: Sequence[str]) -> list[User]:
        return await self.inner.users(ids)

    async def add_token(self, token_hash: bytes, user: str, expires: int, password: str) -> None:
        await self.inner.add_token(token_hash, user, expires, password)

    async def token(self, token_hash: bytes) -> Token | None:
        return await self.inner.token(token_hash)

    async def extend_token(self, token_hash: bytes, expires: int) -> bool:
        return await self.inner.extend_token(token_hash, expires)

    async def revoke_token(self, token_hash: bytes) -> None:
        await self.inner.revoke_token(token_hash)

    async def account(self, name: str) -> Account | None:
        return await self.inner.account(name)

    async def account_by_id(self, user: str) -> Account | None:
        return await self.inner.account_by_id(user)

    async def seen(self, ids: Sequence[str]) -> dict[str, int]:
        return await self.inner.seen(ids)

    async def mark_seen(self, users: Sequence[str]) -> None:
        await self.inner.mark_seen(users)
