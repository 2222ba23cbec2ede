"""How long to wait before the next try."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

#: The first pause: the connection to a restarted server is back sooner than a user notices.
FIRST_S: Final = 0.1
#: The longest pause: bounds how long a part that is back goes unnoticed.
MOST_S: Final = 2.0


class Backoff:
    """Pauses that double from the first to the longest, each drawn from its upper half.

    The jitter keeps clients that failed in the same instant from all coming back in the same instant.

    :param first_s: the longest that the first pause can be, in seconds.
    :param most_s: no pause is longer, in seconds.
    :param chance: gives a number in [0, 1).
    """

    __slots__ = ("_chance", "_first_s", "_most_s", "_next_s")

    def __init__(
        self, first_s: float = FIRST_S, most_s: float = MOST_S, chance: Callable[[], float] = random.random
    ) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._chance = chance
        self._next_s = first_s

    def next(self) -> float:
        """The pause before the next try, in seconds."""
        pause = self._next_s
        self._next_s = min(self._most_s, pause * 2)
        return pause * (1 - self._chance() / 2)

    def reset(self) -> None:
        """The last try succeeded: begin with the shortest pause again."""
        self._next_s = self._first_s
