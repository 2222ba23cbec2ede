"""The recent entries of conversations, read through both levels, and pages of history made of them.

The cache knows which entries exist, never that no more exist: they come from commits of this worker, from the bus
(which loses and reorders), from level 2 and from the store. So a caller brings the head, or a seq that it knows to be
committed, and gets all entries up to it; nothing here says which entry is the newest.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from lru import LRU

from ..errors import ChatError, Unavailable
from ..store.base import Entry, Page
from .l2 import JITTER, L2, L2Entries
from .lookup import REFRESH_HITS, REFRESH_PART, TRIES, Generations, ReadCounts, Spawn

log = logging.getLogger("chatcore.cache")

#: What an entry costs beside the bytes of its JSON: the object, its strings, its place in the window.
ENTRY_OVERHEAD_BYTES: Final = 400
#: A window is read whole, whatever its size: each of its entries is bounded.
WINDOW_BYTES: Final = 4 * 1024 * 1024
#: Conversations that are read from level 2 in one pipeline when they are prefetched.
PREFETCH_BATCH: Final = 50


def cost(e: Entry) -> int:
    """Bytes that an entry takes in level 1."""
    return len(e.wire) + ENTRY_OVERHEAD_BYTES


class EntryWindow:
    """Entries of one conversation by seq: some of ``top`` - keep + 1 … ``top``."""

    __slots__ = ("entries", "expires", "hits", "refresh_from", "size", "top")

    def __init__(self, expires: float, refresh_from: float) -> None:
        self.entries: dict[int, Entry] = {}
        self.top = 0
        self.size = 0
        self.expires = expires
        self.refresh_from = refresh_from
        self.hits = 0


class EntriesL1:
    """Level 1: windows of entries in this worker's memory, bounded by their number and by their bytes together.

    A window may have gaps. A reader names the seqs that it wants and gets all of them or nothing.

    :param keep: entries of each window.
    :param clock: monotonic, in seconds.
    :param chance: returns a number in [0, 1), for the jitter.
    """

    def __init__(
        self,
        conversations: int,
        keep: int,
        max_bytes: int,
        *,
        ttl_s: float,
        clock: Callable[[], float],
        chance: Callable[[], float],
    ) -> None:
        self.keep = keep
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._chance = chance
        self._windows: Any = LRU(conversations, callback=self._evicted)
        self._generations = Generations()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._windows)

    def _evicted(self, conv: str, window: EntryWindow) -> None:
        self.bytes -= window.size

    def _get(self, conv: str) -> EntryWindow | None:
        window: EntryWindow | None = self._windows.get(conv)
        if window is not None and window.expires <= self._clock():
            self._remove(conv)
            return None
        return window

    def _make(self, conv: str, max_life_s: float) -> EntryWindow:
        now = self._clock()
        life = min(self._ttl_s, max_life_s) * (1 - JITTER * self._chance())
        window = EntryWindow(now + life, now + life * (1 - REFRESH_PART))
        self._windows[conv] = window
        return window

    def _remove(self, conv: str) -> None:
        window: EntryWindow | None = self._windows.pop(conv, None)
        if window is not None:
            self.bytes -= window.size

    def _insert(self, window: EntryWindow, e: Entry) -> None:
        if e.seq in window.entries or e.seq <= window.top - self.keep:
            return
        window.entries[e.seq] = e
        size = cost(e)
        if e.seq > window.top:
            if len(window.entries) > 1:
                # The window moves by one; or by more if there is a gap, at most by its whole length.
                gone = range(window.top - self.keep + 1, e.seq - self.keep + 1)
                if len(gone) > self.keep:
                    gone = range(window.top - self.keep + 1, window.top + 1)
                for seq in gone:
                    old = window.entries.pop(seq, None)
                    if old is not None:
                        size -= cost(old)
            window.top = e.seq
        window.size += size
        self.bytes += size

    def _trim(self) -> None:
        while self.bytes > self._max_bytes and len(self._windows):
            _, window = self._windows.popitem()  # the least recently used one
            self.bytes -= window.size

    # --- writing -----------------------------------------------------------------
    def ticket(self) -> int:
        """Take a ticket for :meth:`merge`, before entries are read."""
        return self._generations.ticket()

    def add(self, e: Entry, max_life_s: Callable[[], float] = lambda: math.inf) -> None:
        """Add an entry that was just committed, here or elsewhere, so it cannot have been overwritten yet.

        ``max_life_s`` is called for a new window only: it costs more than all the rest of this, which is done for
        each entry.
        """
        self._insert(self._get(e.conv) or self._make(e.conv, max_life_s()), e)
        self._trim()

    def merge(self, conv: str, entries: Iterable[Entry], ticket: int, max_life_s: float = math.inf) -> bool:
        """Add entries that were read. False, and none is kept: the window was dropped after the ticket was taken."""
        if not self._generations.valid(conv, ticket):
            return False
        window: EntryWindow | None = None
        for e in entries:
            window = window or self._get(conv) or self._make(conv, max_life_s)
            self._insert(window, e)
        self._trim()
        return True

    def replace(self, conv: str, entries: Iterable[Entry], ticket: int, max_life_s: float = math.inf) -> bool:
        """As :meth:`merge`, but in a new window with a new life. Entries newer than these are kept, too."""
        if not self._generations.valid(conv, ticket):
            return False
        before = self._get(conv)
        read = {e.seq: e for e in entries}
        newest = max(read, default=0)
        newer = [e for e in before.entries.values() if e.seq > newest] if before is not None else []
        self._remove(conv)
        return self.merge(conv, [*read.values(), *newer], ticket, max_life_s)

    def overwrite(self, e: Entry) -> None:
        """Replace the body of an entry, and refuse entries that are being read: they may have the old one."""
        self._generations.drop(e.conv)
        window = self._get(e.conv)
        old = window.entries.pop(e.seq, None) if window is not None else None
        if window is not None and old is not None:
            window.size -= cost(old)
            self.bytes -= cost(old)
            self._insert(window, e)

    def drop(self, conv: str) -> None:
        """Forget a conversation, and refuse entries of it that are being read."""
        self._generations.drop(conv)
        self._remove(conv)

    def clear(self) -> None:
        """Forget all conversations, and refuse entries that are being read."""
        self._generations.clear()
        self._windows.clear()
        self.bytes = 0

    # --- reading -------------------------------------------------------------------
    def top(self, conv: str) -> int:
        """The highest seq known here (0: none). It is committed, but others may follow."""
        window = self._get(conv)
        return window.top if window is not None else 0

    def dense(self, conv: str, first: int, last: int) -> list[Entry] | None:
        """Entries ``first`` … ``last``, ascending; None if one is missing."""
        window = self._get(conv)
        if window is None or last > window.top or first <= window.top - self.keep:
            return None
        entries = window.entries
        found: list[Entry] = []
        for seq in range(first, last + 1):
            e = entries.get(seq)
            if e is None:
                return None
            found.append(e)
        window.hits += 1
        return found

    def held(self, conv: str) -> dict[int, Entry]:
        """All entries that are here, by seq. Not to be changed."""
        window = self._get(conv)
        return window.entries if window is not None else {}

    def covers(self, conv: str, first: int, last: int) -> bool:
        """Whether :meth:`dense` has these; it does not count as a hit."""
        held = self.held(conv)
        return all(seq in held for seq in range(first, last + 1))

    def refresh_due(self, conv: str) -> bool:
        """True once, when a window with many hits nears its end."""
        window = self._get(conv)
        if window is None or window.hits < REFRESH_HITS or self._clock() < window.refresh_from:
            return False
        window.refresh_from = math.inf
        return True


# --- pages -------------------------------------------------------------------------
def fitting(entries: Iterable[Entry], max_bytes: int) -> list[Entry]:
    """As many entries as fit, one at least (each with a byte between it and the next)."""
    taken: list[Entry] = []
    size = 0
    for e in entries:
        size += len(e.wire) + 1
        if taken and size > max_bytes:
            break
        taken.append(e)
    return taken


def page_bounds(before: int | None, after: int | None, limit: int, head: int) -> tuple[int, int]:
    """The first and the last seq of a page (an empty one if the first is higher)."""
    last = head if before is None else min(before - 1, head)
    if after is not None:
        return after + 1, min(last, after + limit)
    return max(1, last - limit + 1), last


def page_of(entries: Sequence[Entry], before: int | None, after: int | None, max_bytes: int, head: int) -> Page:
    """A page of the entries within :func:`page_bounds`, as the store would have made it."""
    if after is not None:
        taken = fitting(entries, max_bytes)
        last = head if before is None else min(before - 1, head)
        return Page(taken, bool(taken) and taken[-1].seq < last, head)
    taken = fitting(reversed(entries), max_bytes)[::-1]
    return Page(taken, bool(taken) and taken[0].seq > 1, head)


# --- both levels -------------------------------------------------------------------
class EntryReader(Protocol):
    """The part of the store that is used here."""

    async def entries(self, conv: str, after: int, limit: int, max_bytes: int) -> list[Entry]: ...


@dataclass(frozen=True, slots=True)
class _Flight:
    """A read that is under way, of the window up to a seq."""

    upto: int
    entries: asyncio.Future[dict[int, Entry]]


class RecentEntries:
    """One per worker. Single flight: concurrent callers that miss the same conversation share one read of the store.

    :param max_life_s: how long level 1 may keep now what it is given, in seconds.
    """

    def __init__(
        self,
        l1: EntriesL1,
        l2: L2 | None,
        source: EntryReader,
        *,
        spawn: Spawn,
        max_life_s: Callable[[], float] = lambda: math.inf,
        refresh: bool = True,
    ) -> None:
        self.l1 = l1
        self.counts = ReadCounts()
        #: Windows that were prefetched from level 2, and from the store.
        self.prefetched_l2 = 0
        self.prefetched_store = 0
        self._l2 = l2
        self._source = source
        self._spawn = spawn
        self._max_life_s = max_life_s
        self._refresh = refresh
        self._flights: dict[str, _Flight] = {}

    # --- reading -----------------------------------------------------------------
    def in_window(self, first: int, last: int, head: int) -> bool:
        """Whether these are among the recent entries up to a head, and at least one."""
        return head - self.l1.keep < first <= last <= head

    async def read(self, conv: str, first: int, last: int, head: int) -> list[Entry] | None:
        """All entries ``first`` … ``last`` of the window that ends with ``head``, which is committed. None: the store
        did not return all of them (its read lags).

        :raises ChatError: the store was needed and failed.
        """
        found = self.l1.dense(conv, first, last)
        if found is not None:
            self.counts.l1 += 1
            if self._refresh and self.l1.refresh_due(conv):
                self._spawn(self._refresh_window(conv, head), "cache-refresh")
            return found
        entries = await self._read_through(conv, head)
        try:
            return [entries[seq] for seq in range(first, last + 1)]
        except KeyError:
            return None

    async def _read_through(self, conv: str, head: int) -> dict[int, Entry]:
        flight = self._flights.get(conv)
        if flight is not None and flight.upto >= head:
            self.counts.l1 += 1  # it shares a read, so it costs nothing more
        else:
            flight = self._flights[conv] = _Flight(head, asyncio.get_running_loop().create_future())
            self._spawn(self._fly(conv, flight), "cache-read")
        if not flight.entries.done():
            await asyncio.wait([flight.entries])
        return flight.entries.result()

    async def _fly(self, conv: str, flight: _Flight) -> None:
        failure: ChatError = Unavailable("the worker is stopping")
        entries: dict[int, Entry] | None = None
        try:
            entries = await self._fill(conv, flight.upto)
        except ChatError as exc:
            failure = exc
        finally:
            if self._flights.get(conv) is flight:
                del self._flights[conv]
            if entries is not None:
                flight.entries.set_result(entries)
            else:
                flight.entries.set_exception(failure)
                flight.entries.exception()  # every caller may have been cancelled

    async def _fill(self, conv: str, head: int) -> dict[int, Entry]:
        in_l2: L2Entries | None = None
        if self._l2 is not None and self._l2.ready:
            ticket = self.l1.ticket()
            in_l2 = (await self._l2.read_entries([conv])).get(conv)
            if in_l2 is not None and (entries := self._complete(conv, head, in_l2, ticket)) is not None:
                self.counts.l2 += 1
                return entries
        self.counts.missed += 1
        return await self._load(conv, head, in_l2)

    def _complete(self, conv: str, head: int, in_l2: L2Entries, ticket: int) -> dict[int, Entry] | None:
        """What both levels have together, if it is the whole window."""
        if not self.l1.merge(conv, in_l2.entries, ticket, self._max_life_s()):
            return None  # an entry was overwritten meanwhile
        entries = {e.seq: e for e in in_l2.entries} | self.l1.held(conv)
        first = max(1, head - self.l1.keep + 1)
        return entries if all(seq in entries for seq in range(first, head + 1)) else None

    async def _load(self, conv: str, head: int, in_l2: L2Entries | None, renew: bool = False) -> dict[int, Entry]:
        """Read the window from the store and fill both levels. ``renew``: it begins a new life in level 1."""
        entries: list[Entry] = []
        for _ in range(TRIES):
            ticket = self.l1.ticket()
            after = max(0, head - self.l1.keep)
            entries = await self._source.entries(conv, after, head - after, WINDOW_BYTES)
            keep = self.l1.replace if renew else self.l1.merge
            if keep(conv, entries, ticket, self._max_life_s()):
                if self._l2 is not None and in_l2 is not None:
                    self._l2.fill_entries(conv, in_l2, entries)
                break
        return {e.seq: e for e in entries}

    async def _refresh_window(self, conv: str, head: int) -> None:
        try:
            await self._load(conv, head, None, renew=True)
            self.counts.refreshed += 1
        except ChatError as exc:
            log.debug("refreshing the recent entries of %s: %s", conv, exc)

    async def prefetch(self, heads: Sequence[tuple[str, int]], go_on: Callable[[], bool] = lambda: True) -> int:
        """Load the windows of conversations that end with these heads, one read of the store at a time, while
        ``go_on()``. Returns how many were loaded.

        :raises ChatError: the store failed.
        """
        loaded = 0
        for at in range(0, len(heads), PREFETCH_BATCH):
            some = [(conv, head) for conv, head in heads[at : at + PREFETCH_BATCH] if not self._has(conv, head)]
            if not some or not go_on():
                continue
            cached: dict[str, L2Entries] = {}
            ticket = self.l1.ticket()
            if self._l2 is not None and self._l2.ready:
                cached = await self._l2.read_entries([conv for conv, _ in some])
            for conv, head in some:
                in_l2 = cached.get(conv)
                if in_l2 is not None and self._complete(conv, head, in_l2, ticket) is not None:
                    self.prefetched_l2 += 1
                    loaded += 1
                elif go_on() and not self._has(conv, head):
                    await self._load(conv, head, in_l2)
                    self.prefetched_store += 1
                    loaded += 1
        return loaded

    def _has(self, conv: str, head: int) -> bool:
        return head <= 0 or self.l1.covers(conv, max(1, head - self.l1.keep + 1), head)

    # --- changes -----------------------------------------------------------------
    def add(self, e: Entry) -> None:
        """Keep an entry that was just committed, here or elsewhere."""
        self.l1.add(e, self._max_life_s)

    def add_all(self, entries: Iterable[Entry]) -> None:
        """Keep entries that were just committed."""
        for e in entries:
            self.l1.add(e, self._max_life_s)

    def overwrite(self, e: Entry) -> None:
        """Replace the body of an entry."""
        self.l1.overwrite(e)
        self._flights.pop(e.conv, None)

    def drop(self, conv: str) -> None:
        """Entries of a conversation were overwritten elsewhere."""
        self.l1.drop(conv)
        self._flights.pop(conv, None)

    def clear(self) -> None:
        """Any entry may have been overwritten."""
        self.l1.clear()
        self._flights.clear()
