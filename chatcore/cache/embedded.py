"""The cache of the embedded default, whose store is in the same process.

What is read by a key (tokens, profiles, roles, numbers of members) costs some 10 µs in SQLite, which
keeps its pages in memory itself. To remember it here as well would save nothing to speak of, and
cost a kilobyte for each session (measured: 2.4 KB with the roles of ten conversations). So only the
last entries of conversations are remembered; nothing is loaded when somebody logs in, since reading
it then costs as much as reading it when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..protocol import MEMBER_ROLES
from ..store.base import Entry
from .invalidations import Key
from .store import CachedStore
from .through import Through


class EmbeddedCache(CachedStore):
    """A :class:`CachedStore` that remembers the last entries of conversations alone: the rest goes through."""

    token = Through.token
    add_token = Through.add_token
    users = Through.users
    add_user = Through.add_user
    member_count = Through.member_count
    append = Through.append
    open = Through.open
    memberships = Through.memberships
    views = Through.views

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

    async def role(self, user: str, conv: str) -> str | None:
        role = await self.inner.role(user, conv)
        return role if role in MEMBER_ROLES else None
