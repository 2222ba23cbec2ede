"""Values of one kind through both levels: this worker's memory, Redis, the store.

What is promised: a value that is returned was true at some moment since the caller asked, or it is
one that nobody has said to be old and that has not outlived its time. Who changes something calls
:meth:`Lookup.drop` after the change; from then on nothing older is kept or handed to anybody who asks
later, not even by a read that is under way.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar

from lru import LRU

from ..errors import ChatError, Unavailable
from .l1 import L1
from .l2 import L2, Record
from .stats import Counts

log = logging.getLogger("chatcore.cache")

V = TypeVar("V")
Spawn = Callable[[Coroutine[Any, Any, None], str], object]

# A value that changes while it is read is read again so often; then the last one is given away, and not kept.
TRIES: Final = 3
# Keys of which level 2 may have missed a change.
SUSPECTS: Final = 4096


class Lookup(Generic[V]):
    """One kind. Single flight: however many ask for a key at once, the store is asked once.

    :param load: asks the store; what does not exist is left out. Raises ChatError.
    :param most_s: the longest that level 1 may keep something now, in seconds.
    :param spawn: starts a task that its owner ends.
    """

    def __init__(
        self,
        kind: str,
        l1: L1[V],
        l2: L2 | None,
        load: Callable[[Sequence[str]], Awaitable[Mapping[str, V]]],
        pack: Callable[[V], bytes],
        unpack: Callable[[bytes], V],
        *,
        spawn: Spawn,
        clock: Callable[[], float],
        most_s: Callable[[], float] = lambda: math.inf,
        refresh: bool = True,
    ) -> None:
        self.kind = kind
        self.l1 = l1
        self.counts = Counts()
        self._l2 = l2
        self._load = load
        self._pack = pack
        self._unpack = unpack
        self._spawn = spawn
        self._clock = clock
        self._most_s = most_s
        self._refresh = refresh
        self._flights: dict[str, asyncio.Future[V | None]] = {}
        self._suspects: Any = LRU(SUSPECTS)

    # --- reading -------------------------------------------------------------------
    async def get(self, key: str) -> V | None:
        """The value; None: there is no such thing.

        :raises ChatError: the store was needed and failed.
        """
        found = self._near(key)
        return found[0] if found is not None else (await self._far([key])).get(key)

    async def get_many(self, keys: Iterable[str]) -> dict[str, V]:
        """The values that exist.

        :raises ChatError: the store was needed and failed.
        """
        values: dict[str, V | None] = {}
        missing: list[str] = []
        for key in dict.fromkeys(keys):
            found = self._near(key)
            if found is None:
                missing.append(key)
            else:
                values[key] = found[0]
        if missing:
            values |= await self._far(missing)
        return {key: value for key, value in values.items() if value is not None}

    def _near(self, key: str) -> tuple[V | None] | None:
        slot = self.l1.get(key)
        if slot is None:
            return None
        self.counts.l1 += 1
        if self._refresh and slot.refresh_due(self._clock()):
            self._spawn(self._read_ahead(key), "cache-refresh")
        return (slot.value,)

    async def _far(self, keys: Sequence[str]) -> dict[str, V | None]:
        loop = asyncio.get_running_loop()
        waiting: dict[str, asyncio.Future[V | None]] = {}
        fresh: dict[str, asyncio.Future[V | None]] = {}
        for key in keys:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = fresh[key] = loop.create_future()
            else:
                self.counts.l1 += 1  # it costs nothing more than what is under way
            waiting[key] = flight
        if fresh:
            # A task of its own: who is cancelled must not take down those who wait for the same.
            self._spawn(self._fly(fresh), "cache-read")
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
                    future.exception()  # nobody may be waiting any longer

    async def _fill(self, keys: list[str], ahead: bool = False) -> dict[str, V | None]:
        """Read through. ``ahead``: what the levels hold is about to end, only the store is believed."""
        values: dict[str, V | None] = {}
        records: dict[str, Record] = {}
        left = keys
        if self._l2 is not None and self._l2.ready:
            ticket = self.l1.ticket()
            records = await self._l2.look(self.kind, keys)
            left = []
            for key in keys:
                record = records.get(key)
                if ahead or record is None or not self._believe(key, record, ticket, values):
                    left.append(key)
            self.counts.l2 += len(values)
        if ahead:
            self.counts.refreshed += len(left)
        else:
            self.counts.missed += len(left)
        for _ in range(TRIES):
            if not left:
                break
            ticket = self.l1.ticket()
            loaded = await self._load(left)
            changed: list[str] = []
            for key in left:
                value = values[key] = loaded.get(key)
                if self.l1.put(key, value, ticket, self._most_s()):
                    self._write(key, value, records.get(key))
                else:
                    changed.append(key)
            left = changed
        return values

    def _believe(self, key: str, record: Record, ticket: int, values: dict[str, V | None]) -> bool:
        """Take what level 2 has, if it has something that may be used."""
        if not record.known or key in self._suspects:
            return False
        try:
            value = None if record.value is None else self._unpack(record.value)
        except ValueError as exc:
            log.warning("a record of kind %s in redis is malformed: %s", self.kind, exc)
            return False
        if not self.l1.put(key, value, ticket, self._most_s()):
            return False  # something was said of it meanwhile
        values[key] = value
        return True

    def _write(self, key: str, value: V | None, record: Record | None) -> None:
        self._suspects.pop(key, None)
        if self._l2 is not None and record is not None:
            self._l2.fill(self.kind, key, record, None if value is None else self._pack(value))

    async def _read_ahead(self, key: str) -> None:
        try:
            await self._fill([key], ahead=True)
        except ChatError as exc:
            log.debug("refreshing %s %s: %s", self.kind, key, exc)

    # --- what others know ---------------------------------------------------------------
    async def intend(self, key: str) -> Record | None:
        """To be awaited before something is made that is to be kept at once (:meth:`made`)."""
        if self._l2 is None or not self._l2.ready:
            return None
        return (await self._l2.look(self.kind, [key])).get(key)

    def made(self, key: str, value: V, ticket: int, record: Record | None) -> None:
        """Keep a value that was just written to the store; ``ticket`` and ``record`` are from before."""
        if self.l1.put(key, value, ticket, self._most_s()):
            self._write(key, value, record)

    def learnt(self, key: str, value: V | None, ticket: int) -> None:
        """Keep a value that another query of the store showed, here only."""
        self.l1.put(key, value, ticket, self._most_s())

    def drop(self, key: str) -> None:
        """It changed: nothing older may be kept, or given to whoever asks from now on."""
        self.l1.drop(key)
        self._flights.pop(key, None)

    def doubt(self, key: str) -> None:
        """It may have changed, and whoever did it may not have told level 2."""
        self._suspects[key] = True
        self.drop(key)

    def clear(self) -> None:
        """Anything may have changed."""
        self.l1.clear()
        self._flights.clear()
