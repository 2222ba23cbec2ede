"""Values by key, read through three levels: this worker's memory (level 1), Redis (level 2), the store.

A value that :meth:`Lookup.get` returns was current at some moment since the call, or it was not invalidated and has
not outlived its time to live. A caller that changes a value calls :meth:`Lookup.drop` after the change; from then on
no older value is kept, or returned to a later caller, not even by a read that began before the change.

That needs care because of the *fill race*: a reader reads a value from the store, a writer changes the value and
invalidates it, and only then does the reader fill the cache with what it has read. So a reader takes a ticket before
it reads, and a fill is refused if the key was dropped since.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Generic, TypeVar

from lru import LRU

from ..errors import ChatError, Unavailable
from .l2 import JITTER, L2, L2Value

log = logging.getLogger("chatcore.cache")

V = TypeVar("V")
#: Starts a task that its owner awaits or cancels: :meth:`chatcore.common.tasks.Tasks.spawn`.
Spawn = Callable[[Coroutine[Any, Any, None], str], object]

#: Drops that are remembered one by one. A ticket older than all of them is refused, whatever its key: a read that
#: lasts longer than this many drops is not worth keeping.
DROPS: Final = 8192
#: A value is refreshed in the background in the last part of its life, if it was hit so often since it was read.
REFRESH_PART: Final = 0.2
REFRESH_HITS: Final = 3
#: Values that do not exist have an LRU of their own, of this part of the size: a client that asks for keys that never
#: existed cannot evict values in use.
ABSENT_PART: Final = 8
#: A value that changes while it is read is read again so often; the last one is returned, and not kept.
TRIES: Final = 3
#: Keys for which level 2 may have missed an invalidation.
SUSPECTS: Final = 4096


class Generations:
    """Which tickets are valid: for each key, those taken after its last drop."""

    def __init__(self) -> None:
        self._now = 0
        self._floor = 0
        self._dropped: Any = LRU(DROPS, callback=self._forgotten)

    def _forgotten(self, key: str, at: int) -> None:
        self._floor = max(self._floor, at)

    def ticket(self) -> int:
        """Take a ticket, before the value is read."""
        return self._now

    def drop(self, key: str) -> None:
        """Invalidate the tickets of one key."""
        self._now += 1
        self._dropped[key] = self._now

    def clear(self) -> None:
        """Invalidate all tickets."""
        self._now += 1
        self._floor = self._now
        self._dropped.clear()

    def valid(self, key: str, ticket: int) -> bool:
        """Whether the key was not dropped after the ticket was taken."""
        at: int = self._dropped.get(key, 0)
        return ticket >= at and ticket >= self._floor


class CacheLine(Generic[V]):
    """A value (None: it is known not to exist), when it expires, and how often it was hit."""

    __slots__ = ("expires", "hits", "refresh_from", "value")

    def __init__(self, value: V | None, expires: float, refresh_from: float) -> None:
        self.value = value
        self.expires = expires
        self.refresh_from = refresh_from
        self.hits = 0

    def refresh_due(self, now: float) -> bool:
        """True once, when a value with many hits nears its end."""
        if self.value is None or now < self.refresh_from or self.hits < REFRESH_HITS:
            return False
        self.refresh_from = math.inf
        return True


class ValuesL1(Generic[V]):
    """Level 1: the values of one kind in this worker's memory, by key.

    :param size: values kept; the least recently used one is evicted.
    :param clock: monotonic, in seconds.
    :param chance: returns a number in [0, 1), for the jitter.
    """

    def __init__(
        self,
        size: int,
        *,
        ttl_s: float,
        negative_ttl_s: float,
        clock: Callable[[], float],
        chance: Callable[[], float],
    ) -> None:
        self._present: Any = LRU(size)
        self._absent: Any = LRU(max(16, size // ABSENT_PART))
        self._ttl_s = ttl_s
        self._negative_ttl_s = negative_ttl_s
        self._clock = clock
        self._chance = chance
        self._generations = Generations()

    def __len__(self) -> int:
        return len(self._present) + len(self._absent)

    def ticket(self) -> int:
        """Take a ticket for :meth:`put`, before the value is read."""
        return self._generations.ticket()

    def get(self, key: str) -> CacheLine[V] | None:
        """The line of a key; None: it has none, or it has expired."""
        line: CacheLine[V] | None = self._present.get(key)
        if line is None:
            line = self._absent.get(key)
        if line is None:
            return None
        if line.expires <= self._clock():
            self._present.pop(key, None)
            self._absent.pop(key, None)
            return None
        line.hits += 1
        return line

    def put(self, key: str, value: V | None, ticket: int, max_life_s: float = math.inf) -> bool:
        """Keep a value (None: it does not exist), for at most ``max_life_s``.

        False, and it is not kept: the key was dropped after the ticket was taken.
        """
        if not self._generations.valid(key, ticket):
            return False
        life = min(self._ttl_s if value is not None else self._negative_ttl_s, max_life_s)
        life *= 1 - JITTER * self._chance()
        now = self._clock()
        lines, others = (self._present, self._absent) if value is not None else (self._absent, self._present)
        others.pop(key, None)
        lines[key] = CacheLine(value, now + life, now + life * (1 - REFRESH_PART))
        return True

    def drop(self, key: str) -> None:
        """Forget a key, and refuse to keep a value of it that is being read."""
        self._generations.drop(key)
        self._present.pop(key, None)
        self._absent.pop(key, None)

    def clear(self) -> None:
        """Forget all keys, and refuse to keep any value that is being read."""
        self._generations.clear()
        self._present.clear()
        self._absent.clear()


@dataclass(slots=True)
class ReadCounts:
    """Reads of one kind: answered by level 1, by level 2, or by the store; and values refreshed before they expired."""

    l1: int = 0
    l2: int = 0
    missed: int = 0
    refreshed: int = 0

    @property
    def reads(self) -> int:
        """All reads; a refresh is none, since no caller waits for it."""
        return self.l1 + self.l2 + self.missed

    def ratio(self) -> float:
        """The part of the reads that did not need the store (0 to 1; 1 without any read)."""
        return (self.l1 + self.l2) / self.reads if self.reads else 1.0

    def shown(self) -> dict[str, Any]:
        """The counters and the ratio, for JSON."""
        return {**asdict(self), "ratio": round(self.ratio(), 4)}


class Lookup(Generic[V]):
    """One kind of value. Single flight: concurrent callers that miss the same key share one read of the store.

    :param load: reads the store; keys that do not exist are left out. Raises ChatError.
    :param pack: encodes a value for level 2; ``unpack`` is its inverse and raises ValueError.
    :param max_life_s: how long level 1 may keep now what it is given, in seconds.
    """

    def __init__(
        self,
        kind: str,
        l1: ValuesL1[V],
        l2: L2 | None,
        load: Callable[[Sequence[str]], Awaitable[Mapping[str, V]]],
        pack: Callable[[V], bytes],
        unpack: Callable[[bytes], V],
        *,
        spawn: Spawn,
        clock: Callable[[], float],
        max_life_s: Callable[[], float] = lambda: math.inf,
        refresh: bool = True,
    ) -> None:
        self.kind = kind
        self.l1 = l1
        self.counts = ReadCounts()
        self._l2 = l2
        self._load = load
        self._pack = pack
        self._unpack = unpack
        self._spawn = spawn
        self._clock = clock
        self._max_life_s = max_life_s
        self._refresh = refresh
        self._flights: dict[str, asyncio.Future[V | None]] = {}
        self._suspects: Any = LRU(SUSPECTS)

    # --- reading -------------------------------------------------------------------
    async def get(self, key: str) -> V | None:
        """The value; None: it does not exist.

        :raises ChatError: the store was needed and failed.
        """
        found = self._from_l1(key)
        return found[0] if found is not None else (await self._read_through([key])).get(key)

    async def get_many(self, keys: Iterable[str]) -> dict[str, V]:
        """The values that exist.

        :raises ChatError: the store was needed and failed.
        """
        values: dict[str, V | None] = {}
        missing: list[str] = []
        for key in dict.fromkeys(keys):
            found = self._from_l1(key)
            if found is None:
                missing.append(key)
            else:
                values[key] = found[0]
        if missing:
            values |= await self._read_through(missing)
        return {key: value for key, value in values.items() if value is not None}

    def _from_l1(self, key: str) -> tuple[V | None] | None:
        line = self.l1.get(key)
        if line is None:
            return None
        self.counts.l1 += 1
        if self._refresh and line.refresh_due(self._clock()):
            self._spawn(self._refresh_value(key), "cache-refresh")
        return (line.value,)

    async def _read_through(self, keys: Sequence[str]) -> dict[str, V | None]:
        loop = asyncio.get_running_loop()
        waiting: dict[str, asyncio.Future[V | None]] = {}
        started: dict[str, asyncio.Future[V | None]] = {}
        for key in keys:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = started[key] = loop.create_future()
            else:
                self.counts.l1 += 1  # it shares a read, so it costs nothing more
            waiting[key] = flight
        if started:
            # In a task of its own: the callers share it, so it must outlive one that is cancelled.
            self._spawn(self._fly(started), "cache-read")
        for future in waiting.values():
            if not future.done():
                await asyncio.wait([future])
        return {key: future.result() for key, future in waiting.items()}

    async def _fly(self, flights: dict[str, asyncio.Future[V | None]]) -> None:
        failure: ChatError = Unavailable("the worker is stopping")
        values: dict[str, V | None] = {}
        try:
            values = await self._fill(list(flights))
        except ChatError as exc:
            failure = exc
        finally:
            for key, future in flights.items():
                if self._flights.get(key) is future:
                    del self._flights[key]
                if key in values:
                    future.set_result(values[key])
                else:
                    future.set_exception(failure)
                    future.exception()  # every caller may have been cancelled

    async def _fill(self, keys: list[str], refresh: bool = False) -> dict[str, V | None]:
        """Read values and fill both levels. ``refresh``: take them from the store alone, as those of both levels
        are about to expire."""
        values: dict[str, V | None] = {}
        cached: dict[str, L2Value] = {}
        left = keys
        if self._l2 is not None and self._l2.ready:
            ticket = self.l1.ticket()
            cached = await self._l2.read_values(self.kind, keys)
            left = []
            for key in keys:
                in_l2 = cached.get(key)
                if refresh or in_l2 is None or not self._accept(key, in_l2, ticket, values):
                    left.append(key)
            self.counts.l2 += len(values)
        if not refresh:
            self.counts.missed += len(left)
        for _ in range(TRIES):
            if not left:
                break
            ticket = self.l1.ticket()
            loaded = await self._load(left)
            changed: list[str] = []
            for key in left:
                value = values[key] = loaded.get(key)
                if self.l1.put(key, value, ticket, self._max_life_s()):
                    self._fill_l2(key, value, cached.get(key))
                else:
                    changed.append(key)
            left = changed
        return values

    def _accept(self, key: str, in_l2: L2Value, ticket: int, values: dict[str, V | None]) -> bool:
        """Take the value from level 2 into level 1 and ``values``, if it has one that may be used."""
        if not in_l2.known or key in self._suspects:
            return False
        try:
            value = None if in_l2.data is None else self._unpack(in_l2.data)
        except ValueError as exc:
            log.warning("ignored a malformed value of kind %s in Redis: %s", self.kind, exc)
            return False
        if not self.l1.put(key, value, ticket, self._max_life_s()):
            return False  # the key was dropped meanwhile
        values[key] = value
        return True

    def _fill_l2(self, key: str, value: V | None, in_l2: L2Value | None) -> None:
        self._suspects.pop(key, None)
        if self._l2 is not None and in_l2 is not None:
            self._l2.fill(self.kind, key, in_l2, None if value is None else self._pack(value))

    async def _refresh_value(self, key: str) -> None:
        try:
            await self._fill([key], refresh=True)
            self.counts.refreshed += 1
        except ChatError as exc:
            log.debug("refreshing %s %s: %s", self.kind, key, exc)

    # --- values that were not read here ---------------------------------------------
    async def prepare_write(self, key: str) -> L2Value | None:
        """The right to fill level 2; to be taken before a value is created that :meth:`put_written` is to keep."""
        if self._l2 is None or not self._l2.ready:
            return None
        return (await self._l2.read_values(self.kind, [key])).get(key)

    def put_written(self, key: str, value: V, ticket: int, in_l2: L2Value | None) -> None:
        """Keep a value that was just written to the store; ``ticket`` and ``in_l2`` were taken before the write."""
        if self.l1.put(key, value, ticket, self._max_life_s()):
            self._fill_l2(key, value, in_l2)

    def put_seen(self, key: str, value: V | None, ticket: int) -> None:
        """Keep, in level 1 only, a value that another query of the store returned."""
        self.l1.put(key, value, ticket, self._max_life_s())

    def drop(self, key: str) -> None:
        """The value changed: keep no older one, and return none to a caller that asks from now on."""
        self.l1.drop(key)
        self._flights.pop(key, None)

    def suspect(self, key: str) -> None:
        """The value may have changed without an invalidation: ask the store, whatever level 2 has."""
        self._suspects[key] = True
        self.drop(key)

    def clear(self) -> None:
        """Any value may have changed."""
        self.l1.clear()
        self._flights.clear()
