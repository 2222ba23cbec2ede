"""A store with a memory: the same interface over any store, and what is asked again and again kept near.

Remembered are session tokens, profiles, roles, the last entries of conversations and, near enough, how many
are in them; everything else goes through. What is changed here is told, after it is durable and before it is
answered, first to level 2 and then to the other workers, so that nobody who hears of it can find the old value
there. What others change is heard on the bus; what the bus loses is seen in :meth:`CachedStore.changes`,
or ends by its time to live.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

from ..bus.base import Bus
from ..errors import ChatError, NotFound, Unavailable
from ..protocol import MEMBER_ROLES
from ..settings import Cache as CacheSettings
from ..store.base import (
    Appended,
    Changes,
    Entry,
    Known,
    Memberships,
    NewEntry,
    Opened,
    Opening,
    Page,
    Store,
    Token,
    User,
    View,
)
from . import codec, invalidations
from .activity import Activity
from .ahead import Ahead
from .codec import Session
from .history import History, page_of, wanted
from .invalidations import ALL, PROFILE, ROLE, TAIL, TOKEN, Key, role_key
from .l1 import L1
from .l2 import L2, Commands
from .lookup import Lookup
from .tails import Tails
from .through import Through

log = logging.getLogger("chatcore.cache")

T = TypeVar("T")

# The kind of numbers of members, which no worker tells another.
COUNT: Final = "n"
# Roles that one list of conversations brings; more would push out others'.
LEARNT: Final = 200


class CachedStore(Through):
    """Implements :class:`~chatcore.store.base.Store`. One per worker, made in its loop.

    :meth:`start` starts the store too; :meth:`listen` is to follow, when there is a bus. The store
    must have been made with an ``on_commit`` that calls :meth:`on_commit` before anybody is told.

    :param redis: commands for level 2, with short time-outs, closed with this; None: level 1 alone.
    :param clock: monotonic, in seconds; ``wall`` Unix time in seconds, as tokens expire by it.
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
        super().__init__(store)
        self._settings = settings
        self._clock = clock
        self._wall = wall
        self._bus: Bus | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.l2: L2 | None = None
        if redis is not None:
            lives = {
                TOKEN: settings.l2_session_ttl_ms,
                PROFILE: settings.l2_profile_ttl_ms,
                ROLE: settings.l2_role_ttl_ms,
                TAIL: settings.l2_tail_ttl_ms,
            }
            self.l2 = L2(redis, lives_ms=lives, negative_ms=settings.negative_ttl_ms, keep=settings.tail_entries)
        self.activity = Activity(self.l2, wall)

        def l1(ttl_ms: int) -> L1[Any]:
            negative_s = settings.negative_ttl_ms / 1000
            return L1(settings.l1_entries, ttl_s=ttl_ms / 1000, negative_ttl_s=negative_s, clock=clock, chance=chance)

        common: dict[str, Any] = {"spawn": self._spawn, "most_s": self._most_s, "refresh": settings.refresh}
        self.sessions: Lookup[Session] = Lookup(
            TOKEN, l1(settings.session_ttl_ms), self.l2, self._load_sessions, codec.pack_session, codec.unpack_session,
            clock=clock, **common,
        )  # fmt: skip
        self.profiles: Lookup[str] = Lookup(
            PROFILE, l1(settings.profile_ttl_ms), self.l2, self._load_profiles, codec.pack_text, codec.unpack_text,
            clock=clock, **common,
        )  # fmt: skip
        self.roles: Lookup[str] = Lookup(
            ROLE, l1(settings.role_ttl_ms), self.l2, self._load_roles, codec.pack_text, codec.unpack_text,
            clock=clock, **common,
        )  # fmt: skip
        # Here only: joining a channel is told to nobody, so it is a number of some seconds ago in any case.
        self.member_counts: Lookup[int] = Lookup(
            COUNT, l1(settings.count_ttl_ms), None, self._load_counts, lambda n: b"%d" % n, int, clock=clock, **common
        )
        self._lookups: dict[str, Lookup[Any]] = {TOKEN: self.sessions, PROFILE: self.profiles, ROLE: self.roles}
        tails = Tails(
            settings.tail_conversations,
            settings.tail_entries,
            settings.tail_bytes,
            ttl_s=settings.tail_ttl_ms / 1000,
            clock=clock,
            chance=chance,
        )
        self.history = History(tails, self.l2, store, **common)
        self.ahead = Ahead(store, self.history, self.activity, settings, spawn=self._spawn, clock=clock)

    # --- life --------------------------------------------------------------------
    async def start(self) -> None:
        """Start the store, and look for level 2."""
        await self.inner.start()
        if self.l2 is not None:
            await self.l2.start(f"{self.inner.store_id}:cache")

    async def listen(self, bus: Bus) -> None:
        """Listen to what other workers change, and begin to load what is likely to be asked for. The
        worker gives what comes on channel ``i:`` to :meth:`on_bus`, and every doubt to :meth:`on_doubt`."""
        self._bus = bus
        await bus.subscribe([invalidations.CHANNEL])
        if self.l2 is not None:
            self._spawn(self.activity.run(), "cache-activity")
        self._spawn(self.ahead.run(), "cache-warm")

    async def close(self) -> None:
        """Close the store, which may commit its last entries, and send what level 2 is to know."""
        await self.inner.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.l2 is not None:
            await self.activity.send()
            await self.l2.close()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("task %s failed", task.get_name(), exc_info=exc)

    def _most_s(self) -> float:
        """How long level 1 may keep something: while nobody can tell of changes, not for long."""
        if self._bus is None or self._bus.healthy:
            return math.inf
        return self._settings.unheard_ttl_ms / 1000

    def stats(self) -> dict[str, Any]:
        """Reads by kind and level, and what else was done, since the start."""
        kinds = {
            "sessions": self.sessions.counts,
            "profiles": self.profiles.counts,
            "roles": self.roles.counts,
            "member_counts": self.member_counts.counts,
            "last_entries": self.history.counts,
        }
        l2 = self.l2
        return {
            "kinds": {name: counts.shown() for name, counts in kinds.items()},
            "l1": {"tails": len(self.history.tails), "tail_bytes": self.history.tails.bytes},
            "l2": None if l2 is None else {"ready": l2.ready, "outages": l2.outages, "shed": l2.shed},
            "ahead": {
                "l2": self.history.ahead_l2,
                "store": self.history.ahead_store,
                "warmed": self.ahead.warmed,
                "prefetched": self.ahead.prefetched,
            },
        }

    # --- what changed ----------------------------------------------------------------
    def _forget(self, keys: Sequence[Key]) -> None:
        """Level 1, at once."""
        for kind, key in keys:
            if kind == TAIL:
                self.history.clear() if key == ALL else self.history.drop(key)
                continue
            lookup: Lookup[Any] = self._lookups[kind]
            lookup.clear() if key == ALL else lookup.drop(key)

    async def _changed(self, keys: Sequence[Key]) -> None:
        """These changed here. Level 2 before the others, so that none of them reads the old value there
        after it has heard; level 1 before and after, as it may have read it meanwhile."""
        self._forget(keys)
        owed = False
        if self.l2 is not None:
            owed = not await self.l2.delete(keys)
            self._forget(keys)
        if self._bus is not None:
            self._bus.publish(invalidations.CHANNEL, invalidations.pack(keys, owed=owed))

    async def _change(self, work: Awaitable[T], keys: Sequence[Key]) -> T:
        """Do it, and tell: also when nobody knows whether it was done."""
        try:
            result = await work
        except ChatError as exc:
            if isinstance(exc, Unavailable):
                await self._changed(keys)
            raise
        await self._changed(keys)
        return result

    def on_bus(self, payload: bytes) -> None:
        """Another worker changed something.

        :raises ValueError: malformed (everything is forgotten: who knows what it said).
        """
        try:
            keys, owed = invalidations.unpack(payload)
        except ValueError:
            self.on_doubt()
            raise
        self._forget(keys)
        if owed and self.l2 is not None:
            self._spawn(self._delete_owed(keys), "cache-owed")

    async def _delete_owed(self, keys: Sequence[Key]) -> None:
        """What another worker could not tell level 2."""
        assert self.l2 is not None
        await self.l2.delete(keys)
        self._forget(keys)

    def on_doubt(self) -> None:
        """Something may have been said that was not heard."""
        for lookup in self._lookups.values():
            lookup.clear()
        self.member_counts.clear()
        self.history.clear()

    def on_commit(self, entries: list[Entry]) -> None:
        """New entries of this worker are durable."""
        for e in entries:
            self.history.committed(e)
            self.activity.note(e.conv)
            if e.t == "member":
                self._member_seen(e)
        if self.l2 is not None:
            self.l2.add(entries)

    def heard(self, e: Entry) -> None:
        """An entry of another worker is durable."""
        self.history.committed(e)
        if e.t == "member":
            self._member_seen(e)

    def _member_seen(self, e: Entry) -> None:
        self.member_counts.drop(e.conv)
        # Whoever made it tells again when the row reflects it, which may be later.
        user = codec.member_of(e)
        if user is not None:
            self.roles.drop(role_key(user, e.conv))

    async def changes(self, after: int, known: Known | None = None, everything: bool = True) -> Changes:
        """The store's; what it names is read anew, whether or not the bus told of it."""
        changes = await self.inner.changes(after, known, everything)
        for user, conv in changes.rows:
            self.roles.doubt(role_key(user, conv))
        keys = [(TOKEN, token.hex()) for token in changes.revoked_tokens]
        if changes.revoked_users:
            keys = [(TOKEN, ALL)]
        if keys:
            self._forget(keys)
            if self.l2 is not None:
                await self.l2.delete(keys)
                self._forget(keys)
        return changes

    # --- sessions and profiles -----------------------------------------------------------
    async def _load_sessions(self, keys: Sequence[str]) -> dict[str, Session]:
        found: dict[str, Session] = {}
        for key in keys:
            ticket = self.profiles.l1.ticket()
            token = await self.inner.token(bytes.fromhex(key))
            if token is not None:
                self.profiles.learnt(token.user.id, token.user.name, ticket)
                found[key] = Session(token.user.id, token.expires, token.disabled)
        return found

    async def _load_profiles(self, keys: Sequence[str]) -> dict[str, str]:
        return {user.id: user.name for user in await self.inner.users(keys)}

    async def token(self, token_hash: bytes) -> Token | None:
        key = token_hash.hex()
        session = await self.sessions.get(key)
        if session is not None and session.expires <= self._wall() * 1000:
            # Tokens slide while they are used: its end is a thing to ask the store about.
            self.sessions.doubt(key)
            session = await self.sessions.get(key)
        if session is None:
            return None
        name = await self.profiles.get(session.user)
        if name is None:
            return None
        return Token(User(session.user, name), session.expires, session.disabled)

    async def add_token(self, token_hash: bytes, user: str, expires: int, password: str) -> None:
        key = token_hash.hex()
        record = await self.sessions.intend(key)
        ticket = self.sessions.l1.ticket()
        await self.inner.add_token(token_hash, user, expires, password)
        self.sessions.made(key, Session(user, expires, False), ticket, record)

    async def extend_token(self, token_hash: bytes, expires: int) -> bool:
        return await self._change(self.inner.extend_token(token_hash, expires), [(TOKEN, token_hash.hex())])

    async def revoke_token(self, token_hash: bytes) -> None:
        await self._change(self.inner.revoke_token(token_hash), [(TOKEN, token_hash.hex())])

    async def users(self, ids: Sequence[str]) -> list[User]:
        names = await self.profiles.get_many(ids)
        return [User(id, names[id]) for id in ids if id in names]

    async def add_user(self, name: str, password: str) -> User:
        ticket = self.profiles.l1.ticket()
        user = await self.inner.add_user(name, password)
        self.profiles.learnt(user.id, user.name, ticket)
        return user

    async def update_user(self, user: str, name: str | None, password: str | None, keep: bytes = b"") -> User:
        keys: list[Key] = [(PROFILE, user)]
        if password is not None:
            # Which tokens ended is known to the store alone; it happens rarely.
            keys.append((TOKEN, ALL))
        return await self._change(self.inner.update_user(user, name, password, keep), keys)

    async def set_disabled(self, name: str, disabled: bool) -> None:
        await self._change(self.inner.set_disabled(name, disabled), [(TOKEN, ALL)])

    # --- roles -------------------------------------------------------------------------------
    async def _load_roles(self, keys: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for key in keys:
            conv, _, user = key.partition(":")
            role = await self.inner.role(user, conv)
            if role in MEMBER_ROLES:
                found[key] = role
        return found

    async def role(self, user: str, conv: str) -> str | None:
        """A member's role; None for everybody else (banned or not)."""
        return await self.roles.get(role_key(user, conv))

    async def _load_counts(self, keys: Sequence[str]) -> dict[str, int]:
        return {conv: await self.inner.member_count(conv) for conv in keys}

    async def member_count(self, conv: str) -> int:
        """How many are in a conversation, or were within the last seconds."""
        return await self.member_counts.get(conv) or 0

    def append(self, entry: NewEntry) -> asyncio.Future[Appended]:
        future = self.inner.append(entry)
        if entry.t != "member" or entry.user is None:
            return future
        return self._spawn_member(future, (ROLE, role_key(entry.user, entry.conv)))

    def _spawn_member(self, future: asyncio.Future[Appended], key: Key) -> asyncio.Future[Appended]:
        async def after() -> Appended:
            # Not awaited itself: who is cancelled must not cancel an append.
            await asyncio.wait([future])
            return await self._change(future, [key])

        return asyncio.ensure_future(after())

    async def open(self, conv: Opening) -> Opened:
        opened = await self.inner.open(conv)
        if opened.created:
            await self._changed([(ROLE, role_key(user, opened.conv)) for user in (conv.creator, *conv.members)])
        return opened

    # --- the log ---------------------------------------------------------------------------
    async def page(
        self, user: str, conv: str, before: int | None, after: int | None, limit: int, max_bytes: int, hint: int = 0
    ) -> Page:
        """A page for a member. ``hint``: a seq that is known to be committed and up to which the caller
        has been told, such as ``want`` of a live room; 0: the store is asked for the head.

        :raises NotFound: not a member.
        """
        if await self.role(user, conv) is None:
            raise NotFound("no such conversation")
        self.activity.note(conv)
        head = max(hint, self.history.tails.top(conv)) if hint else (await self.inner.heads([conv]))[conv]
        first, last = wanted(before, after, limit, head)
        if first > last:
            return Page([], False, head)
        if self.history.in_tail(first, last, head):
            entries = await self.history.read(conv, first, last, head)
            if entries is not None:
                return page_of(entries, before, after, max_bytes, head)
        return await self.inner.page(user, conv, before, after, limit, max_bytes)

    async def replay(self, conv: str, after: int, upto: int, limit: int, max_bytes: int) -> list[Entry]:
        """Entries from ``after`` + 1 on, dense, as :meth:`entries`; ``upto`` is known to be committed, so
        they may be remembered ones."""
        last = min(upto, after + limit)
        if self.history.in_tail(after + 1, last, upto):
            entries = await self.history.read(conv, after + 1, last, upto)
            if entries is not None:
                return page_of(entries, None, after, max_bytes, upto).entries
        return await self.inner.entries(conv, after, limit, max_bytes)

    async def overwrite(self, e: Entry) -> None:
        """The body of an entry was replaced in the store: nobody is given the old one any more."""
        self.history.overwrite(e)
        owed = False
        if self.l2 is not None:
            owed = not await self.l2.overwrite(e)
            self.history.drop(e.conv)
        if self._bus is not None:
            self._bus.publish(invalidations.CHANNEL, invalidations.pack([(TAIL, e.conv)], owed=owed))

    # --- lists of conversations ----------------------------------------------------------------
    async def memberships(self, user: str, since: int | None = None) -> Memberships:
        """The store's. Who asks has just logged in: what is first in his views is loaded ahead."""
        self.ahead.arriving(user)
        return await self.inner.memberships(user, since)

    async def views(self, user: str, convs: Sequence[str] | None = None) -> tuple[int, list[View]]:
        """The store's; the roles and numbers of members in them are remembered."""
        ticket, counted = self.roles.l1.ticket(), self.member_counts.l1.ticket()
        position, views = await self.inner.views(user, convs)
        for view in views[:LEARNT]:
            self.roles.learnt(role_key(user, view.conv), view.role, ticket)
            self.member_counts.learnt(view.conv, view.members, counted)
        self.ahead.views(user, views)
        return position, views
