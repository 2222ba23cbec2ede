"""A store with a cache in front of it: the same interface over any store.

There are two compositions. :class:`CachedStore` caches the recent entries of conversations, and is all that the
embedded default needs; :class:`SharedCachedStore` caches what is read by a key, too. A call for anything else is
forwarded to the store. How a change reaches every copy is in ``invalidations.py``.

The cache decides nothing: the head of a log and the right to write to it are read from the store (docs/log.md,
rule 1).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..bus.base import Bus
from ..common.tasks import Tasks
from ..entries import ROLE_CHANGING, NewEntry, RoleChange
from ..errors import NotFound
from ..protocol import MEMBER_ROLES
from ..settings import CacheSettings
from ..store.base import (
    Appended,
    Changes,
    Entry,
    Known,
    Memberships,
    OnCommit,
    Opened,
    Opening,
    Page,
    Store,
    Token,
    User,
    View,
)
from .forwarding import ForwardingStore
from .invalidations import Invalidations
from .keyed import CacheContext, CachedAccounts, CachedMembers
from .l2 import L2, Commands
from .l2_format import ENTRIES, PROFILE, ROLE, TOKEN, role_key
from .prefetch import Activity, Prefetcher
from .recent import EntriesL1, RecentEntries, page_bounds, page_of


class CachedStore(ForwardingStore):
    """Caches recent entries alone. One per worker, made in its loop.

    In the embedded default the store is in the same process: what is read by a key (tokens, profiles, roles, numbers
    of members) costs some 10 µs in SQLite, which keeps its pages in memory itself. A copy of it here would save
    little and cost a kilobyte for each session (measured: 2.4 KB with the roles of ten conversations). Nor is
    anything loaded at a log-in: it costs as much then as when it is asked for.

    :meth:`start` starts the store, too; :meth:`listen` is called once there is a bus. The store must have been made
    with an ``on_commit`` that calls :meth:`on_commit` before the entries are published.

    :param l2: closed with this; None: level 1 alone.
    :param clock: monotonic, in seconds; ``wall`` Unix time in seconds, as tokens expire by it.
    :param chance: returns a number in [0, 1), for the jitter of lives.
    """

    def __init__(
        self,
        store: Store,
        settings: CacheSettings,
        l2: L2 | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        super().__init__(store)
        self._tasks = Tasks()
        self.l2 = l2
        spawn = self._tasks.spawn
        self._invalidations = Invalidations(l2, spawn=spawn, unheard_s=settings.unheard_ttl_ms / 1000)
        self._context = CacheContext(settings, l2, self._invalidations, spawn, clock, wall, chance)
        self.activity = Activity(l2, wall)
        entries_l1 = EntriesL1(
            settings.recent_conversations,
            settings.recent_entries,
            settings.recent_bytes,
            ttl_s=settings.recent_ttl_ms / 1000,
            clock=clock,
            chance=chance,
        )
        self.recent = RecentEntries(
            entries_l1,
            l2,
            store,
            spawn=spawn,
            max_life_s=self._invalidations.max_life_s,
            refresh=settings.refresh,
        )
        self._invalidations.register(ENTRIES, self.recent)
        self.prefetcher = Prefetcher(store, self.recent, self.activity, settings, spawn=spawn, clock=clock)

    # --- life --------------------------------------------------------------------
    async def start(self) -> None:
        """Start the store, and probe level 2."""
        await self.inner.start()
        if self.l2 is not None:
            await self.l2.start(f"{self.inner.store_id}:cache")

    async def listen(self, bus: Bus) -> None:
        """Listen to the other workers, and begin to warm. The worker passes what comes on the channel ``i:`` to
        :meth:`on_bus`."""
        await self._invalidations.listen(bus)
        if self.l2 is not None:
            self._tasks.spawn(self.activity.run(), "cache-activity")
        self._tasks.spawn(self.prefetcher.warm_up(), "cache-warm")

    async def close(self) -> None:
        """Close the store, which may commit its last entries, and send what is queued for level 2."""
        await self.inner.close()
        await self._tasks.close()
        if self.l2 is not None:
            await self.activity.send()
            await self.l2.close()

    def stats(self) -> dict[str, Any]:
        """Reads by kind and level, and the other counters, since the start."""
        l1, l2 = self.recent.l1, self.l2
        return {
            "kinds": {"last_entries": self.recent.counts.shown()},
            "l1": {"conversations": len(l1), "recent_bytes": l1.bytes},
            "l2": None if l2 is None else {"ready": l2.ready, "outages": l2.outages, "shed": l2.shed},
            "prefetch": {"warmed": self.prefetcher.warmed},
        }

    # --- events --------------------------------------------------------------------
    def on_bus(self, payload: bytes) -> None:
        """Another worker changed something.

        :raises ValueError: malformed; everything in level 1 is dropped.
        """
        self._invalidations.on_bus(payload)

    def on_resync_needed(self) -> None:
        """Messages of the bus may have been lost: drop everything in level 1."""
        self._invalidations.on_resync_needed()

    @property
    def on_commit(self) -> OnCommit:
        """To be called with the new entries that this worker has committed."""
        return self.recent.add_all

    def on_entry(self, e: Entry) -> None:
        """Another worker has committed a new entry."""
        self.recent.add(e)

    # --- the log -------------------------------------------------------------------
    async def role(self, user: str, conv: str) -> str | None:
        """A member's role; None for every other user (banned or not)."""
        role = await self.inner.role(user, conv)
        return role if role in MEMBER_ROLES else None

    async def page(
        self, user: str, conv: str, before: int | None, after: int | None, limit: int, max_bytes: int, hint: int = 0
    ) -> Page:
        """A page for a member. ``hint``: a seq that is known to be committed and up to which the caller has been
        notified, such as ``want`` of a live room; 0: the store is asked for the head.

        :raises NotFound: not a member.
        """
        if await self.role(user, conv) is None:
            raise NotFound("no such conversation")
        self.activity.note(conv)
        head = max(hint, self.recent.l1.top(conv)) if hint else (await self.inner.heads([conv]))[conv]
        first, last = page_bounds(before, after, limit, head)
        if first > last:
            return Page([], False, head)
        if self.recent.in_window(first, last, head):
            entries = await self.recent.read(conv, first, last, head)
            if entries is not None:
                return page_of(entries, before, after, max_bytes, head)
        return await self.inner.page(user, conv, before, after, limit, max_bytes)

    async def replay(self, conv: str, after: int, upto: int, limit: int, max_bytes: int) -> list[Entry]:
        """As :meth:`entries`, but may come from the cache: ``upto`` is known to be committed."""
        last = min(upto, after + limit)
        if self.recent.in_window(after + 1, last, upto):
            entries = await self.recent.read(conv, after + 1, last, upto)
            if entries is not None:
                return page_of(entries, None, after, max_bytes, upto).entries
        return await self.inner.entries(conv, after, limit, max_bytes)

    async def overwrite(self, e: Entry) -> None:
        """The body of an entry was replaced in the store: the old one is returned no more, by any worker."""
        self.recent.overwrite(e)
        l2_missed = False
        if self.l2 is not None:
            l2_missed = not await self.l2.overwrite(e)
            self.recent.drop(e.conv)
        self._invalidations.announce([(ENTRIES, e.conv)], l2_missed=l2_missed)


class SharedCachedStore(CachedStore):
    """Caches tokens, profiles, roles and numbers of members as well, and prefetches at log-ins: for a store that is
    reached over the network.

    :param redis: commands for level 2, with short time-outs, closed with this; None: level 1 alone.
    """

    def __init__(
        self,
        store: Store,
        settings: CacheSettings,
        redis: Commands | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        l2: L2 | None = None
        if redis is not None:
            lives_ms = {
                TOKEN: settings.l2_session_ttl_ms,
                PROFILE: settings.l2_profile_ttl_ms,
                ROLE: settings.l2_role_ttl_ms,
                ENTRIES: settings.l2_recent_ttl_ms,
            }
            l2 = L2(redis, lives_ms=lives_ms, negative_ms=settings.negative_ttl_ms, keep=settings.recent_entries)
        super().__init__(store, settings, l2, clock=clock, wall=wall, chance=chance)
        self.cached_accounts = CachedAccounts(store, self._context)
        self.cached_members = CachedMembers(store, self._context)

    def stats(self) -> dict[str, Any]:
        shown = super().stats()
        kinds = {
            "sessions": self.cached_accounts.tokens.counts,
            "profiles": self.cached_accounts.profiles.counts,
            "roles": self.cached_members.roles.counts,
            "member_counts": self.cached_members.counts.counts,
        }
        return shown | {
            "kinds": {name: counts.shown() for name, counts in kinds.items()} | shown["kinds"],
            "prefetch": {
                "l2": self.recent.prefetched_l2,
                "store": self.recent.prefetched_store,
                "warmed": self.prefetcher.warmed,
                "prefetched": self.prefetcher.prefetched,
            },
        }

    # --- events --------------------------------------------------------------------
    @property
    def on_commit(self) -> OnCommit:
        return self._on_commit

    def _on_commit(self, entries: list[Entry]) -> None:
        for e in entries:
            self.recent.add(e)
            self.activity.note(e.conv)
            if e.t in ROLE_CHANGING:
                self.cached_members.on_role_change(e)
        if self.l2 is not None:
            self.l2.add_committed(entries)

    def on_entry(self, e: Entry) -> None:
        self.recent.add(e)
        if e.t in ROLE_CHANGING:
            self.cached_members.on_role_change(e)

    async def changes(self, after: int, known: Known | None = None, everything: bool = True) -> Changes:
        """The store's; what it names is read anew, whether or not the bus announced it."""
        changes = await self.inner.changes(after, known, everything)
        for user, conv in changes.rows:
            self.cached_members.roles.suspect(role_key(user, conv))
        await self.cached_accounts.drop_revoked(changes.revoked_tokens, changes.revoked_users)
        return changes

    # --- accounts ------------------------------------------------------------------
    async def token(self, token_hash: bytes) -> Token | None:
        return await self.cached_accounts.token(token_hash)

    async def add_token(self, token_hash: bytes, user: str, expires: int, password: str) -> None:
        await self.cached_accounts.add_token(token_hash, user, expires, password)

    async def extend_token(self, token_hash: bytes, expires: int) -> bool:
        return await self.cached_accounts.extend_token(token_hash, expires)

    async def revoke_token(self, token_hash: bytes) -> None:
        await self.cached_accounts.revoke_token(token_hash)

    async def users(self, ids: Sequence[str]) -> list[User]:
        return await self.cached_accounts.users(ids)

    async def add_user(self, name: str, password: str) -> User:
        return await self.cached_accounts.add_user(name, password)

    async def update_user(self, user: str, name: str | None, password: str | None, keep: bytes = b"") -> User:
        return await self.cached_accounts.update_user(user, name, password, keep)

    async def set_disabled(self, name: str, disabled: bool) -> None:
        await self.cached_accounts.set_disabled(name, disabled)

    # --- members -------------------------------------------------------------------
    async def role(self, user: str, conv: str) -> str | None:
        return await self.cached_members.roles.get(role_key(user, conv))

    async def member_count(self, conv: str) -> int:
        """How many are in a conversation, or were within the last seconds."""
        return await self.cached_members.counts.get(conv) or 0

    def append(self, entry: NewEntry) -> asyncio.Future[Appended]:
        future = self.inner.append(entry)
        change = entry.change
        if not isinstance(change, RoleChange):
            return future
        return self.cached_members.appended(change.user, entry.conv, future)

    async def open(self, conv: Opening) -> Opened:
        return await self.cached_members.open(conv)

    async def memberships(self, user: str, since: int | None = None) -> Memberships:
        """The store's. It is read at a log-in, so the first of the user's views are prefetched."""
        self.prefetcher.on_login(user)
        return await self.inner.memberships(user, since)

    async def views(self, user: str, convs: Sequence[str] | None = None) -> tuple[int, list[View]]:
        """The store's; the roles and numbers of members in them are kept."""
        position, views = await self.cached_members.views(user, convs)
        self.prefetcher.on_views(user, views)
        return position, views
