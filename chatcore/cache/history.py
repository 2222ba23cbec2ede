"""The last entries of conversations through both levels, and pages made of them.

A cache knows which entries there are, never that there are no more: whoever asks brings the head, or
a seq that is known to be committed, and gets all entries up to it or is sent to the store.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from ..errors import ChatError, Unavailable
from ..store.base import Entry, Page
from .l2 import L2, TailRecord
from .lookup import TRIES, Spawn
from .stats import Counts
from .tails import Tails

log = logging.getLogger("chatcore.cache")

# A tail is read whole, whatever its size: its entries are bounded each.
TAIL_BYTES: Final = 4 * 1024 * 1024
# Tails that are asked of level 2 in one go, ahead of need.
AHEAD_AT_ONCE: Final = 50


class Source(Protocol):
    """The part of the store that is used here."""

    async def entries(self, conv: str, after: int, limit: int, max_bytes: int) -> list[Entry]: ...


@dataclass(frozen=True, slots=True)
class _Flight:
    upto: int
    entries: asyncio.Future[dict[int, Entry]]


def cut(entries: Iterable[Entry], max_bytes: int) -> list[Entry]:
    """As many as fit, one at least (each with a byte between it and the next)."""
    taken: list[Entry] = []
    size = 0
    for e in entries:
        size += len(e.wire) + 1
        if taken and size > max_bytes:
            break
        taken.append(e)
    return taken


def wanted(before: int | None, after: int | None, limit: int, head: int) -> tuple[int, int]:
    """The first and the last seq of a page (none if the first is higher)."""
    last = head if before is None else min(before - 1, head)
    if after is not None:
        return after + 1, min(last, after + limit)
    return max(1, last - limit + 1), last


def page_of(entries: Sequence[Entry], before: int | None, after: int | None, max_bytes: int, head: int) -> Page:
    """A page of the entries that :func:`wanted` named, as the store would have made it."""
    if after is not None:
        taken = cut(entries, max_bytes)
        last = head if before is None else min(before - 1, head)
        return Page(taken, bool(taken) and taken[-1].seq < last, head)
    taken = cut(reversed(entries), max_bytes)[::-1]
    return Page(taken, bool(taken) and taken[0].seq > 1, head)


class History:
    """One per worker. Single flight by conversation."""

    def __init__(
        self,
        tails: Tails,
        l2: L2 | None,
        source: Source,
        *,
        spawn: Spawn,
        most_s: Callable[[], float] = lambda: math.inf,
        refresh: bool = True,
    ) -> None:
        self.tails = tails
        self.counts = Counts()
        #: Tails read ahead of need, from level 2 and from the store.
        self.ahead_l2 = 0
        self.ahead_store = 0
        self._l2 = l2
        self._source = source
        self._spawn = spawn
        self._most_s = most_s
        self._refresh = refresh
        self._flights: dict[str, _Flight] = {}

    # --- reading -----------------------------------------------------------------
    def in_tail(self, first: int, last: int, head: int) -> bool:
        """Whether these are among the last entries up to a head, and some."""
        return head - self.tails.keep < first <= last <= head

    async def read(self, conv: str, first: int, last: int, head: int) -> list[Entry] | None:
        """Entries ``first`` … ``last`` of the tail that ends with ``head``, which is committed; all of
        them. None: the store has not got them all (a read that lags).

        :raises ChatError: the store was needed and failed.
        """
        found = self.tails.dense(conv, first, last)
        if found is not None:
            self.counts.l1 += 1
            if self._refresh and self.tails.refresh_due(conv):
                self._spawn(self._read_ahead(conv, head), "cache-refresh")
            return found
        entries = await self._fly(conv, head)
        try:
            return [entries[seq] for seq in range(first, last + 1)]
        except KeyError:
            return None

    async def _fly(self, conv: str, head: int) -> dict[int, Entry]:
        flight = self._flights.get(conv)
        if flight is not None and flight.upto >= head:
            self.counts.l1 += 1  # it costs nothing more than what is under way
        else:
            flight = self._flights[conv] = _Flight(head, asyncio.get_running_loop().create_future())
            self._spawn(self._run(conv, flight), "cache-read")
        if not flight.entries.done():
            await asyncio.wait([flight.entries])
        return flight.entries.result()

    async def _run(self, conv: str, flight: _Flight) -> None:
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
                flight.entries.exception()  # nobody may be waiting any longer

    async def _fill(self, conv: str, head: int) -> dict[int, Entry]:
        record: TailRecord | None = None
        if self._l2 is not None and self._l2.ready:
            ticket = self.tails.ticket()
            record = (await self._l2.tails([conv])).get(conv)
            if record is not None and (entries := self._complete(conv, head, record, ticket)) is not None:
                self.counts.l2 += 1
                return entries
        self.counts.missed += 1
        return await self._load(conv, head, record)

    def _complete(self, conv: str, head: int, record: TailRecord, ticket: int) -> dict[int, Entry] | None:
        """What level 2 and this worker have together, if it is all that belongs to the tail."""
        if not self.tails.merge(conv, record.entries, ticket, self._most_s()):
            return None  # something was overwritten meanwhile
        entries = {e.seq: e for e in record.entries} | self.tails.held(conv)
        first = max(1, head - self.tails.keep + 1)
        return entries if all(seq in entries for seq in range(first, head + 1)) else None

    async def _load(self, conv: str, head: int, record: TailRecord | None, renew: bool = False) -> dict[int, Entry]:
        entries: list[Entry] = []
        for _ in range(TRIES):
            ticket = self.tails.ticket()
            after = max(0, head - self.tails.keep)
            entries = await self._source.entries(conv, after, head - after, TAIL_BYTES)
            keep = self.tails.replace if renew else self.tails.merge
            if keep(conv, entries, ticket, self._most_s()):
                if self._l2 is not None and record is not None:
                    self._l2.grow(conv, record, entries)
                break
        return {e.seq: e for e in entries}

    # --- ahead of need ----------------------------------------------------------------
    async def _read_ahead(self, conv: str, head: int) -> None:
        try:
            await self._load(conv, head, None, renew=True)
            self.counts.refreshed += 1
        except ChatError as exc:
            log.debug("refreshing the tail of %s: %s", conv, exc)

    async def load_ahead(self, heads: Sequence[tuple[str, int]], go_on: Callable[[], bool] = lambda: True) -> int:
        """Load the tails of conversations with these heads, one read of the store at a time, while ``go_on()``;
        how many were loaded.

        :raises ChatError: the store failed.
        """
        loaded = 0
        for at in range(0, len(heads), AHEAD_AT_ONCE):
            some = [(conv, head) for conv, head in heads[at : at + AHEAD_AT_ONCE] if not self._has(conv, head)]
            if not some or not go_on():
                continue
            records: dict[str, TailRecord] = {}
            ticket = self.tails.ticket()
            if self._l2 is not None and self._l2.ready:
                records = await self._l2.tails([conv for conv, _ in some])
            for conv, head in some:
                record = records.get(conv)
                if record is not None and self._complete(conv, head, record, ticket) is not None:
                    self.ahead_l2 += 1
                    loaded += 1
                elif go_on() and not self._has(conv, head):
                    await self._load(conv, head, record)
                    self.ahead_store += 1
                    loaded += 1
        return loaded

    def _has(self, conv: str, head: int) -> bool:
        return head <= 0 or self.tails.covers(conv, max(1, head - self.tails.keep + 1), head)

    # --- what others know ----------------------------------------------------------------
    def committed(self, e: Entry) -> None:
        """An entry was committed, here or elsewhere."""
        self.tails.add(e, self._most_s)

    def overwrite(self, e: Entry) -> None:
        """An entry has another body."""
        self.tails.overwrite(e)
        self._flights.pop(e.conv, None)

    def drop(self, conv: str) -> None:
        """Entries were overwritten elsewhere: what was read until now is old."""
        self.tails.drop(conv)
        self._flights.pop(conv, None)

    def clear(self) -> None:
        """Anything may have been overwritten."""
        self.tails.clear()
        self._flights.clear()
