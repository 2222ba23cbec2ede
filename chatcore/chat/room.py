"""What delivery works with: rooms, and the parts of others that it uses.

The protocols name exactly what is used, so that a model can stand in for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol

from ..store.base import Changes, Entry, Known, View

#: Shared by all rooms to which no session is being attached: a set of their own would be most of what a room costs.
NO_SESSIONS: Final[frozenset[Any]] = frozenset()
# Removals remembered of one room; rows lag behind their entries for moments only.
REMOVALS_MAX: Final = 1000


class Subscriber(Protocol):
    """A session, as the chat services see it. It alone writes into its own state."""

    @property
    def conn(self) -> int:
        """The number of its connection in the reactor."""

    @property
    def user_id(self) -> str: ...
    @property
    def token_hash(self) -> bytes: ...
    @property
    def expires(self) -> float:
        """When its token ends, by the loop's clock."""

    @property
    def closed(self) -> bool: ...
    @property
    def away(self) -> bool:
        """The user is not looking: appears offline, is notified."""

    @property
    def ready(self) -> bool:
        """Its list of conversations was read: from now on it must be sent what joins the list."""

    def wants(self, conv: str) -> bool:
        """Attached (True), or sent changes of the ``conv`` only (False)."""

    def push(self, payload: bytes) -> object: ...

    def push_view(self, view: View, after: int | None) -> None:
        """Push a ``conv``; ``after`` only when the conversation becomes attached."""

    async def drained(self) -> bool:
        """Wait until the outbox is below its low-water mark. False: the session was closed for making no progress."""

    def attach_lock(self) -> AbstractAsyncContextManager[None]:
        """Attaches of one session run one after the other, so that none repeats what another pushed."""

    def hold_sync(self) -> None:
        """Keep the session's ``sync`` where it is until :meth:`release_sync`: a push that it would cover is still due.
        Calls nest."""

    def release_sync(self) -> None: ...

    def defer_refresh(self, conv: str) -> None:
        """A row changed before the session was ``ready``: it asks for a refresh as soon as it is."""

    def blocks_changed(self) -> None:
        """A user blocked the session's user, or allows it again."""

    def extend(self, expires: float) -> None:
        """Its token was found to be valid for longer."""

    def close(self, code: int, reason: str = "") -> None: ...

    def revoke(self) -> None:
        """Close it: its token is no longer valid."""


class TopicLike(Protocol):
    """The part of ``_fast.Topic`` that is used here."""

    def __len__(self) -> int: ...
    def __contains__(self, conn: int) -> bool: ...
    def add(self, conn: int) -> bool: ...
    def discard(self, conn: int) -> bool: ...
    def fan_out(self, frame: Any, skip_owner: int = 0) -> int: ...
    def sessions(self) -> list[Any]: ...


class EmptyTopic:
    """A topic without subscribers, shared by all rooms that have none of the kind."""

    def __len__(self) -> int:
        return 0

    def __contains__(self, conn: int) -> bool:
        return False

    def add(self, conn: int) -> bool:
        """Never: a room replaces it by a real topic first."""
        raise TypeError("the shared empty topic takes no subscribers")

    def discard(self, conn: int) -> bool:
        """False: there is no such subscriber."""
        return False

    def fan_out(self, frame: Any, skip_owner: int = 0) -> int:
        """Deliver to 0 subscribers."""
        return 0

    def sessions(self) -> list[Any]:
        """An empty list."""
        return []


EMPTY_TOPIC: Final = EmptyTopic()


class Reads(Protocol):
    """The part of the store that is used here."""

    async def heads(self, convs: Sequence[str]) -> dict[str, int]: ...
    async def entries(self, conv: str, after: int, limit: int, max_bytes: int) -> list[Entry]: ...
    async def position(self) -> int: ...
    async def changes(self, after: int, known: Known | None = None, everything: bool = True) -> Changes: ...
    async def views(self, user: str, convs: Sequence[str] | None = None) -> tuple[int, list[View]]: ...


class Subscriptions(Protocol):
    """The part of the bus that is used here."""

    @property
    def healthy(self) -> bool: ...
    async def subscribe(self, channels: list[str]) -> None: ...
    def unsubscribe(self, channels: list[str]) -> None: ...


class Room:
    """A conversation to which at least one session on this worker is attached."""

    __slots__ = (
        "_removals",
        "attaching",
        "backfill",
        "conv",
        "idle_sweeps",
        "last",
        "newest",
        "pins",
        "ready",
        "recent",
        "recent_bytes",
        "recheck",
        "stale",
        "summaries",
        "topic",
    )

    def __init__(self, conv: str, ready: asyncio.Future[None]) -> None:
        self.conv = conv
        self.topic: TopicLike  # attached and live: exactly the entries up to `last` were queued to each subscriber
        self.summaries: TopicLike = EMPTY_TOPIC  # members that are sent changes of their `conv` only
        self.last = -1  # the last entry that was delivered here; -1: not known yet
        self.newest = 0  # the newest entry that this worker has heard of
        # Dense, ends with `last`; bounded by count and bytes. A list: an empty deque is 600 bytes larger.
        self.recent: list[Entry] = []
        self.recent_bytes = 0
        self.backfill: asyncio.Task[None] | None = None
        self.recheck = False  # the backfill is to ask the store even if newest == last
        # Behind `last`, or membership not read yet. Changed by `expect` and `arrived` only.
        self.attaching: AbstractSet[Subscriber] = NO_SESSIONS
        # Those of them that must be sent the row again: it changed after the attach had read it.
        self.stale: frozenset[Subscriber] = NO_SESSIONS
        # User -> the entry that removed this user: a row that reflects an earlier one is not believed.
        self._removals: dict[str, int] | None = None
        self.pins = 0
        self.ready: asyncio.Future[None] | None = ready  # None: `last` is known
        self.idle_sweeps = 0

    def expect(self, x: Subscriber) -> None:
        """A session begins to attach."""
        if isinstance(self.attaching, set):
            self.attaching.add(x)
        else:
            self.attaching = {x}

    def arrived(self, x: Subscriber) -> None:
        """The session is live, or gave up."""
        if isinstance(self.attaching, set):
            self.attaching.discard(x)
            if not self.attaching:
                # Not kept empty: a set stays as large as it ever was.
                self.attaching = NO_SESSIONS

    def mark_stale(self, x: Subscriber) -> None:
        """The row of a session that is attaching changed: the session may yet be sent an older view of it."""
        self.stale |= {x}

    def clear_stale(self, x: Subscriber) -> bool:
        """Whether the session must be sent its row again."""
        if x not in self.stale:
            return False
        self.stale = self.stale - {x} or NO_SESSIONS
        return True

    def outdated(self, user: str, view: View) -> bool:
        """Whether the user's row is older than the removal that was delivered here."""
        return self._removals is not None and view.as_of < self._removals.get(user, 0)

    def removed(self, user: str, seq: int) -> None:
        """An entry that was delivered here removed the user."""
        if self._removals is None or len(self._removals) >= REMOVALS_MAX:
            self._removals = {}
        self._removals[user] = seq

    def readmitted(self, user: str) -> None:
        """A later entry made the user a member again."""
        if self._removals is not None:
            self._removals.pop(user, None)

    @property
    def unused(self) -> bool:
        """No session on this worker needs it any more."""
        return not (self.pins or self.attaching or len(self.topic) or len(self.summaries))


class Connected(Protocol):
    """One user with at least one session on this worker."""

    @property
    def sessions(self) -> Iterable[Subscriber]: ...
    def knows_view(self, conv: str, view: tuple[int, int]) -> bool: ...
    def learned_view(self, conv: str, view: tuple[int, int] | None) -> None: ...


class Sessions(Protocol):
    """The part of :class:`~.directory.Directory` that is used here: who is connected to this worker."""

    def get(self, user: str) -> Connected | None: ...
    def sessions_of(self, user: str) -> Iterable[Subscriber]: ...
    def owner_of(self, user: str) -> int: ...
    def connected(self) -> list[str]: ...
    def tokens(self) -> list[bytes]: ...
    def revoked(self, tokens: list[bytes], users: list[str]) -> None: ...
