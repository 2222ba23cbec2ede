"""Level 1: what this worker remembers by itself, for a short while. One object per kind of value.

Two questions are answered here: how long a value may be used (time to live, jittered, on a monotonic
clock), and whether a value that was just read may be kept at all. The second is the *fill race*: a
value is read from the store, somebody changes it and says so, and only then the reader comes to keep
what it has read. So a reader takes a ticket before it asks, and :meth:`L1.put` refuses what was
dropped since.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from lru import LRU

V = TypeVar("V")

# Lives are shortened by up to this part at random: what was filled together does not expire together.
JITTER: Final = 0.2
# Drops that are remembered one by one. An older ticket than the oldest of them is refused, whatever
# its key: a read that lasts longer than this many drops is not worth keeping.
DROPS: Final = 8192
# In the last part of its life a value that was used so often since it was read is read again, in the background.
REFRESH_PART: Final = 0.2
REFRESH_HITS: Final = 3
# Values that do not exist have a room of their own, of this part of the whole: somebody who asks for
# things that never existed cannot push out what is used.
ABSENT_PART: Final = 8


class Generations:
    """Which tickets are still good: for each key, those taken after its last drop."""

    def __init__(self) -> None:
        self._now = 0
        self._floor = 0
        self._dropped: Any = LRU(DROPS, callback=self._forgotten)

    def _forgotten(self, key: str, at: int) -> None:
        self._floor = max(self._floor, at)

    def ticket(self) -> int:
        """To be taken before the value is asked for."""
        return self._now

    def drop(self, key: str) -> None:
        """Whatever was read of this key until now is old."""
        self._now += 1
        self._dropped[key] = self._now

    def clear(self) -> None:
        """Whatever was read until now is old."""
        self._now += 1
        self._floor = self._now
        self._dropped.clear()

    def good(self, key: str, ticket: int) -> bool:
        """Whether nothing was said of the key since the ticket was taken."""
        at: int = self._dropped.get(key, 0)
        return ticket >= at and ticket >= self._floor


class Slot(Generic[V]):
    """A value (None: it is known not to exist), until when, and how often it was used."""

    __slots__ = ("expires", "hits", "soft", "value")

    def __init__(self, value: V | None, expires: float, soft: float) -> None:
        self.value = value
        self.expires = expires
        self.soft = soft
        self.hits = 0

    def refresh_due(self, now: float) -> bool:
        """True once, when a value that is used much nears its end."""
        if self.value is None or now < self.soft or self.hits < REFRESH_HITS:
            return False
        self.soft = math.inf
        return True


class L1(Generic[V]):
    """Values of one kind, by key.

    :param entries: most values kept; the least recently used goes first.
    :param clock: monotonic, in seconds.
    :param chance: returns a number in [0, 1), for the jitter.
    """

    def __init__(
        self,
        entries: int,
        *,
        ttl_s: float,
        negative_ttl_s: float,
        clock: Callable[[], float],
        chance: Callable[[], float],
    ) -> None:
        self._held: Any = LRU(entries)
        self._absent: Any = LRU(max(16, entries // ABSENT_PART))
        self._ttl_s = ttl_s
        self._negative_ttl_s = negative_ttl_s
        self._clock = clock
        self._chance = chance
        self._generations = Generations()

    def __len__(self) -> int:
        return len(self._held) + len(self._absent)

    def ticket(self) -> int:
        """To be taken before the value is asked for, and given to :meth:`put`."""
        return self._generations.ticket()

    def get(self, key: str) -> Slot[V] | None:
        """What is known of a key; None: nothing, or no longer."""
        slot: Slot[V] | None = self._held.get(key)
        if slot is None:
            slot = self._absent.get(key)
        if slot is None:
            return None
        if slot.expires <= self._clock():
            self._held.pop(key, None)
            self._absent.pop(key, None)
            return None
        slot.hits += 1
        return slot

    def put(self, key: str, value: V | None, ticket: int, most_s: float = math.inf) -> bool:
        """Keep a value (None: it does not exist), for at most ``most_s``.

        False, and nothing is kept: the key was dropped after the ticket was taken.
        """
        if not self._generations.good(key, ticket):
            return False
        life = min(self._ttl_s if value is not None else self._negative_ttl_s, most_s)
        life *= 1 - JITTER * self._chance()
        now = self._clock()
        room, other = (self._held, self._absent) if value is not None else (self._absent, self._held)
        other.pop(key, None)
        room[key] = Slot(value, now + life, now + life * (1 - REFRESH_PART))
        return True

    def drop(self, key: str) -> None:
        """Forget a key, and refuse what is being read of it."""
        self._generations.drop(key)
        self._held.pop(key, None)
        self._absent.pop(key, None)

    def clear(self) -> None:
        """Forget everything, and refuse what is being read."""
        self._generations.clear()
        self._held.clear()
        self._absent.clear()
