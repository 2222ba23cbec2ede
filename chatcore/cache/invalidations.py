"""Invalidations: how a change reaches every copy of a value, in this worker, in level 2 and in the other workers.

A change is announced after it is durable and before it is answered, first to level 2 and then to the other workers,
so that a worker that has received the announcement cannot find the old value in level 2 any more. The bus may lose an
announcement (docs/log.md, rule 8): the store names the change when it is next asked what changed, or the value
expires.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, Final, Protocol, TypeVar

import orjson

from ..bus.base import Bus
from ..errors import ChatError, Unavailable
from .l2 import L2
from .l2_format import ALL, KINDS, Key
from .lookup import Spawn

T = TypeVar("T")

#: The channel of the bus for announcements; all workers subscribe to it.
CHANNEL: Final = "i:"
#: An announcement of more keys names all values of their kinds instead: it must fit into one message of the bus.
MAX_KEYS: Final = 2000


def pack(keys: Iterable[Key], *, l2_missed: bool) -> bytes:
    """An announcement. ``l2_missed``: the sender could not delete the keys from level 2, so its receivers should."""
    listed = sorted(set(keys))
    if len(listed) > MAX_KEYS:
        listed = sorted({(kind, ALL) for kind, _ in listed})
    return orjson.dumps({"k": listed, "owed": l2_missed} if l2_missed else {"k": listed})


def unpack(payload: bytes) -> tuple[list[Key], bool]:
    """The inverse of :func:`pack`.

    :raises ValueError: not an announcement.
    """
    message: Any = orjson.loads(payload)
    try:
        keys = [(str(kind), str(key)) for kind, key in message["k"]]
        l2_missed = bool(message.get("owed", False))
    except (AttributeError, KeyError, TypeError) as exc:
        raise ValueError(f"not an invalidation: {exc!r}") from None
    if any(kind not in KINDS for kind, _ in keys):
        raise ValueError("an invalidation of an unknown kind")
    return keys, l2_missed


class Invalidated(Protocol):
    """The values of one kind in this worker."""

    def drop(self, key: str) -> None:
        """Forget one, and refuse to keep what is being read of it."""

    def clear(self) -> None:
        """Forget all, and refuse to keep what is being read."""


class Invalidations:
    """One per worker. Kinds that were not registered are not cached in this worker.

    :param l2: None: level 1 alone.
    :param unheard_s: how long level 1 keeps a value while the bus brings no announcements, in seconds.
    """

    def __init__(self, l2: L2 | None, *, spawn: Spawn, unheard_s: float) -> None:
        self._l2 = l2
        self._spawn = spawn
        self._unheard_s = unheard_s
        self._bus: Bus | None = None
        self._kinds: dict[str, Invalidated] = {}

    def register(self, kind: str, values: Invalidated) -> None:
        """Drop ``values`` when keys of this kind are invalidated."""
        self._kinds[kind] = values

    async def listen(self, bus: Bus) -> None:
        """Subscribe to the announcements of other workers."""
        self._bus = bus
        await bus.subscribe([CHANNEL])

    def max_life_s(self) -> float:
        """How long level 1 may keep what is put there now, in seconds: briefly while the bus is down."""
        if self._bus is None or self._bus.healthy:
            return math.inf
        return self._unheard_s

    # --- changes made by this worker -----------------------------------------------
    async def invalidate(self, keys: Sequence[Key]) -> None:
        """These values changed: drop them everywhere."""
        l2_missed = not await self.drop(keys)
        self.announce(keys, l2_missed=l2_missed)

    async def around(self, change: Awaitable[T], keys: Sequence[Key]) -> T:
        """Await a change of these values and invalidate them, also if it is unknown whether it was made.

        :raises ChatError: as the change.
        """
        try:
            result = await change
        except ChatError as exc:
            if isinstance(exc, Unavailable):
                await self.invalidate(keys)
            raise
        await self.invalidate(keys)
        return result

    def announce(self, keys: Sequence[Key], *, l2_missed: bool) -> None:
        """Tell the other workers that these changed."""
        if self._bus is not None:
            self._bus.publish(CHANNEL, pack(keys, l2_missed=l2_missed))

    async def drop(self, keys: Sequence[Key]) -> bool:
        """Drop values here and in level 2. False: level 2 was out of use.

        Level 1 is dropped before and after, since meanwhile it may have read the old value from level 2.
        """
        self._drop_here(keys)
        if self._l2 is None:
            return True
        deleted = await self._l2.delete(keys)
        self._drop_here(keys)
        return deleted

    # --- changes made by others ----------------------------------------------------
    def on_bus(self, payload: bytes) -> None:
        """An announcement of another worker.

        :raises ValueError: malformed; all values are dropped, as any may have changed.
        """
        try:
            keys, l2_missed = unpack(payload)
        except ValueError:
            self.on_resync_needed()
            raise
        self._drop_here(keys)
        if l2_missed and self._l2 is not None:
            self._spawn(self._drop_missed(keys), "cache-drop-missed")

    def on_resync_needed(self) -> None:
        """Announcements may have been lost: drop all values here."""
        for values in self._kinds.values():
            values.clear()

    async def _drop_missed(self, keys: Sequence[Key]) -> None:
        await self.drop(keys)

    def _drop_here(self, keys: Sequence[Key]) -> None:
        for kind, key in keys:
            values = self._kinds.get(kind)
            if values is None:
                continue
            if key == ALL:
                values.clear()
            else:
                values.drop(key)
