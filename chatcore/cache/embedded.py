"""The cache of the embedded default, whose store is in the same process.

What is read by a key (tokens, profiles, roles, numbers of members) costs some 10 µs in SQLite, which
keeps its pages in memory itself. To remember it here as well would save nothing to speak of, and
cost a kilobyte for each session (measured: 2.4 KB with the roles of ten conversations). So only the
last entries of conversations are remembered; nothing is loaded when somebody logs in, since reading
it then costs as much as reading it when it is asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ..protocol import MEMBER_ROLES
from ..store.base import Appended, Entry, Memberships, NewEntry, Opened, Opening, Token, User, View
from .invalidations import Key
from .store import CachedStore


class EmbeddedCache(CachedStore):
    """A :class:`CachedStore` that remembers the last entries of conversations alone."""

    def stats(self) -> dict[str, Any]:
        shown = super().stats()
        return {
            "kinds": {"last_entries": shown["kinds"]["last_entries"]},
            "l1": shown["l1"],
            "l2": None,
            "ahead": {"warmed": shown["ahead"]["warmed"]},
        }

    def on_commit(self, entries: list[Entry]) -> None:
        for e in entries:
            self.history.committed(e)

    def heard(self, e: Entry) -> None:
        self.history.committed(e)

    async def _changed(self, keys: Sequence[Key]) -> None:
        """Nobody remembers any of these."""

    async def token(self, token_hash: bytes) -> Token | None:
        return await self.inner.token(token_hash)

    async def add_token(self, token_hash: bytes, user: str, expires: int, password: str) -> None:
        await self.inner.add_token(token_hash, user, expires, password)

    async def users(self, ids: Sequence[str]) -> list[User]:
        return await self.inner.users(ids)

    async def add_user(self, name: str, password: str) -> User:
        return await self.inner.add_user(name, password)

    async def role(self, user: str, conv: str) -> str | None:
        role = await self.inner.role(user, conv)
        return role if role in MEMBER_ROLES else None

    async def member_count(self, conv: str) -> int:
        return await self.inner.member_count(conv)

    def append(self, entry: NewEntry) -> asyncio.Future[Appended]:
        return self.inner.append(entry)

    async def open(self, conv: Opening) -> Opened:
        return await self.inner.open(conv)

    async def memberships(self, user: str, since: int | None = None) -> Memberships:
        return await self.inner.memberships(user, since)

    async def views(self, user: str, convs: Sequence[str] | None = None) -> tuple[int, list[View]]:
        return await self.inner.views(user, convs)
