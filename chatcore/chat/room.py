"""What the delivery works with: rooms, and the parts of others that it uses.

The protocols name exactly what is used, so that a model can stand in for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol

from ..store.base import Changes, Entry, Known, View

#: Shared by all rooms in which nobody is on the way: a room of their own would be most of what a room costs.
NOBODY: Final[frozenset[Any]] = frozenset()


class Subscriber(Protocol):
    """A session, as the delivery sees it."""

    @property
    def conn(self) -> int: ...
    @property
    def user_id(self) -> str: ...
    @property
    def closed(self) -> bool: ...
    @property
    def ready(self) -> bool:
        """Its list of conversations was read: what joins from now on must be told."""

    #: Attaches in tasks of their own that have not ended.
    joining: int

    def attach_lock(self) -> AbstractAsyncContextManager[None]:
        """One attach of a session after the other, so that none repeats what another pushed."""

    def wants(self, conv: str) -> bool:
        """Attached (True), or told only of changes (False)."""

    def push(self, payload: bytes) -> object: ...

    def push_view(self, view: View, after: int | None) -> None:
        """Push a ``conv``; ``after`` only when the conversation becomes attached."""

    async def drained(self) -> bool:
        """Wait until the outbox is below its low-water mark. False: it was closed for making no progress."""


class TopicLike(Protocol):
    """The part of ``_fast.Topic`` that is used here."""

    def __len__(self) -> int: ...
    def __contains__(self, conn: int) -> bool: ...
    def add(self, conn: int) -> bool: ...
    def discard(self, conn: int) -> bool: ...
    def fan_out(self, frame: Any, skip_owner: int = 0) -> int: ...
    def sessions(self) -> list[Any]: ...


class NoTopic:
    """Nobody's topic, shared by all rooms to which nobody is attached in this way."""

    def __len__(self) -> int:
        return 0

    def __contains__(self, conn: int) -> bool:
        return False

    def add(self, conn: int) -> bool:
        """Never: it is replaced by a real one first."""
        raise TypeError("nobody can be added to no topic")

    def discard(self, conn: int) -> bool:
        """Nobody is in it."""
        return False

    def fan_out(self, frame: Any, skip_owner: int = 0) -> int:
        """To nobody."""
        return 0

    def sessions(self) -> list[Any]:
        """Nobody's."""
        return []


NO_TOPIC: Final = NoTopic()
# Removals remembered of one room; rows are behind their entries for moments only.
LEFT_MAX: Final = 1000


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


class Directory(Protocol):
    """Who is connected to this worker."""

    def sessions_of(self, user: str) -> Iterable[Subscriber]: ...
    def owner_of(self, user: str) -> int: ...
    def refresh(self, user: str, conv: str) -> None:
        """The user's row of a conversation changed: bring the user's sessions up to date (own task)."""

    def connected(self) -> list[str]:
        """Users with a session here."""

    def tokens(self) -> list[bytes]:
        """The hashes of their tokens."""

    def revoked(self, tokens: list[bytes], users: list[str]) -> None: ...


class Room:
    """A conversation that somebody on this worker is attached to."""

    __slots__ = (
        "_left",
        "attaching",
        "conv",
        "dirty",
        "idle_sweeps",
        "last",
        "pins",
        "pump",
        "quiet",
        "ready",
        "recheck",
        "ring",
        "ring_bytes",
        "stale",
        "topic",
        "want",
    )

    def __init__(self, conv: str, ready: asyncio.Future[None]) -> None:
        self.conv = conv
        self.topic: TopicLike  # attached and live: exactly the entries up to `last` were queued
        self.quiet: TopicLike = NO_TOPIC  # members that want to be told of changes only
        self.last = -1  # -1: not known yet
        self.want = 0
        # Dense, ends with `last`; bounded by count and bytes. A list: an empty deque is 600 bytes larger.
        self.ring: list[Entry] = []
        self.ring_bytes = 0
        self.pump: asyncio.Task[None] | None = None
        self.recheck = False  # the pump is to ask the store even if want == last
        # On the way: behind `last`, or membership not read yet. Changed by `expect` and `arrived` only.
        self.attaching: AbstractSet[Subscriber] = NOBODY
        # Of those, who is to be told the row again: it changed after the attach had read it.
        self.stale: frozenset[Subscriber] = NOBODY
        # Who was removed by which entry: a row that reflects an earlier one is not believed.
        self._left: dict[str, int] | None = None
        self.pins = 0
        self.ready: asyncio.Future[None] | None = ready  # None: `last` is known
        self.idle_sweeps = 0
        self.dirty = False

    def expect(self, x: Subscriber) -> None:
        """A session begins to attach."""
        if isinstance(self.attaching, set):
            self.attaching.add(x)
        else:
            self.attaching = {x}

    def arrived(self, x: Subscriber) -> None:
        """It is through, or gives up."""
        if isinstance(self.attaching, set):
            self.attaching.discard(x)
            if not self.attaching:
                # Not kept empty: a set stays as large as it ever was.
                self.attaching = NOBODY

    def forget_stale(self, x: Subscriber) -> bool:
        """Whether the session was to be told its row again."""
        if x not in self.stale:
            return False
        self.stale = self.stale - {x} or NOBODY
        return True

    def outdated(self, user: str, view: View) -> bool:
        """Whether the user's row is older than the removal that was delivered here."""
        return self._left is not None and view.as_of < self._left.get(user, 0)

    def put_out(self, user: str, seq: int) -> None:
        """An entry that was delivered here removed the user."""
        if self._left is None or len(self._left) >= LEFT_MAX:
            self._left = {}
        self._left[user] = seq

    def let_in(self, user: str) -> None:
        """A later one brought the user in again."""
        if self._left is not None:
            self._left.pop(user, None)

    @property
    def unused(self) -> bool:
        """Nobody here needs it any more."""
        return not (self.pins or self.attaching or len(self.topic) or len(self.quiet))
