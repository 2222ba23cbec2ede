"""The last entries of conversations, in this worker's memory.

A tail is a handful of entries by seq, not a promise that none is missing: they come from commits
here, from the bus (which loses and reorders), from level 2 and from the store. So whoever reads
names the seqs wanted and gets all of them or nothing; and nothing here says what is newest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from lru import LRU

from ..store.base import Entry
from .l1 import JITTER, REFRESH_HITS, REFRESH_PART, Generations

# What an entry costs beside the bytes of its JSON: the object, its strings, its place in the tail.
ENTRY_OVERHEAD_BYTES = 400


class Tail:
    """Entries of one conversation by seq: some of ``top`` - keep + 1 … ``top``."""

    __slots__ = ("entries", "expires", "hits", "size", "soft", "top")

    def __init__(self, expires: float, soft: float) -> None:
        self.entries: dict[int, Entry] = {}
        self.top = 0
        self.size = 0
        self.expires = expires
        self.soft = soft
        self.hits = 0


def cost(e: Entry) -> int:
    """Bytes that an entry takes here."""
    return len(e.wire) + ENTRY_OVERHEAD_BYTES


class Tails:
    """Tails by conversation, bounded by their count and by their bytes together.

    :param keep: entries of each.
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
        self._tails: Any = LRU(conversations, callback=self._evicted)
        self._generations = Generations()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._tails)

    def _evicted(self, conv: str, tail: Tail) -> None:
        self.bytes -= tail.size

    def _get(self, conv: str) -> Tail | None:
        tail: Tail | None = self._tails.get(conv)
        if tail is not None and tail.expires <= self._clock():
            self._remove(conv)
            return None
        return tail

    def _make(self, conv: str, most_s: float) -> Tail:
        now = self._clock()
        life = min(self._ttl_s, most_s) * (1 - JITTER * self._chance())
        tail = Tail(now + life, now + life * (1 - REFRESH_PART))
        self._tails[conv] = tail
        return tail

    def _remove(self, conv: str) -> None:
        tail: Tail | None = self._tails.pop(conv, None)
        if tail is not None:
            self.bytes -= tail.size

    def _insert(self, tail: Tail, e: Entry) -> None:
        if e.seq in tail.entries or e.seq <= tail.top - self.keep:
            return
        tail.entries[e.seq] = e
        size = cost(e)
        if e.seq > tail.top:
            if len(tail.entries) > 1:
                # One goes for one that comes, or all if there is a gap as long as the tail.
                gone = range(tail.top - self.keep + 1, e.seq - self.keep + 1)
                if len(gone) > self.keep:
                    gone = range(tail.top - self.keep + 1, tail.top + 1)
                for seq in gone:
                    old = tail.entries.pop(seq, None)
                    if old is not None:
                        size -= cost(old)
            tail.top = e.seq
        tail.size += size
        self.bytes += size

    def _trim(self) -> None:
        while self.bytes > self._max_bytes and len(self._tails):
            _, tail = self._tails.popitem()  # the least recently used
            self.bytes -= tail.size

    # --- what comes in -----------------------------------------------------------
    def ticket(self) -> int:
        """To be taken before entries are read, and given to :meth:`merge`."""
        return self._generations.ticket()

    def add(self, e: Entry, most_s: Callable[[], float] = lambda: math.inf) -> None:
        """An entry that was just committed, here or elsewhere: nobody can have overwritten it yet. (``most_s``
        is asked only for a new tail: this is once for each entry, and it costs more than the rest.)"""
        self._insert(self._get(e.conv) or self._make(e.conv, most_s()), e)
        self._trim()

    def merge(self, conv: str, entries: Iterable[Entry], ticket: int, most_s: float = math.inf) -> bool:
        """Entries that were read. False, and none is kept: the tail was dropped after the ticket was taken."""
        if not self._generations.good(conv, ticket):
            return False
        tail: Tail | None = None
        for e in entries:
            tail = tail or self._get(conv) or self._make(conv, most_s)
            self._insert(tail, e)
        self._trim()
        return True

    def replace(self, conv: str, entries: Iterable[Entry], ticket: int, most_s: float = math.inf) -> bool:
        """As :meth:`merge`, in the place of what was there, with a new life (what came in since stays)."""
        if not self._generations.good(conv, ticket):
            return False
        before = self._get(conv)
        read = {e.seq: e for e in entries}
        newest = max(read, default=0)
        newer = [e for e in before.entries.values() if e.seq > newest] if before is not None else []
        self._remove(conv)
        return self.merge(conv, [*read.values(), *newer], ticket, most_s)

    def overwrite(self, e: Entry) -> None:
        """The body of an entry was replaced; what is being read may still have the old one."""
        self._generations.drop(e.conv)
        tail = self._get(e.conv)
        old = tail.entries.pop(e.seq, None) if tail is not None else None
        if tail is not None and old is not None:
            tail.size -= cost(old)
            self.bytes -= cost(old)
            self._insert(tail, e)

    def drop(self, conv: str) -> None:
        """Forget a tail, and refuse what is being read of it."""
        self._generations.drop(conv)
        self._remove(conv)

    def clear(self) -> None:
        """Forget everything, and refuse what is being read."""
        self._generations.clear()
        self._tails.clear()
        self.bytes = 0

    # --- what is asked --------------------------------------------------------------
    def top(self, conv: str) -> int:
        """The highest seq known of here (0: none): committed, but others may follow."""
        tail = self._get(conv)
        return tail.top if tail is not None else 0

    def dense(self, conv: str, first: int, last: int) -> list[Entry] | None:
        """Entries ``first`` … ``last``, all of them, ascending; None if one is missing."""
        tail = self._get(conv)
        if tail is None or last > tail.top or first <= tail.top - self.keep:
            return None
        entries = tail.entries
        found: list[Entry] = []
        for seq in range(first, last + 1):
            e = entries.get(seq)
            if e is None:
                return None
            found.append(e)
        tail.hits += 1
        return found

    def held(self, conv: str) -> dict[int, Entry]:
        """All entries that are here, by seq. Not to be changed."""
        tail = self._get(conv)
        return tail.entries if tail is not None else {}

    def covers(self, conv: str, first: int, last: int) -> bool:
        """Whether :meth:`dense` has these; it does not count as a use."""
        held = self.held(conv)
        return all(seq in held for seq in range(first, last + 1))

    def refresh_due(self, conv: str) -> bool:
        """True once, when a tail that is used much nears its end."""
        tail = self._get(conv)
        if tail is None or tail.hits < REFRESH_HITS or self._clock() < tail.soft:
            return False
        tail.soft = math.inf
        return True
