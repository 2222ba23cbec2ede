"""When to come back after a connection was lost (protocol.md, "Coming back")."""

from __future__ import annotations

import random
import re
from typing import Final

#: The first wait is random between 0 and this, then it doubles.
BASE_S: Final = 1.0
#: No wait is drawn from a larger range.
CAP_S: Final = 60.0
#: A connection that held this long after ``ready`` forgets earlier failures.
STABLE_S: Final = 60.0
#: A server cannot send its clients away for longer than this.
LEAST_MAX_S: Final = 600.0

_LEAST: Final = re.compile(r"^\w+ (\d{1,9})$")


def least_wait_s(reason: str) -> float:
    """The least wait that a close reason such as ``restart 1500`` (ms) asks for, in seconds."""
    found = _LEAST.match(reason)
    return min(int(found[1]) / 1000, LEAST_MAX_S) if found else 0.0


class Backoff:
    """Counts failed attempts; every wait is drawn from a range that doubles."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.attempt = 0
        self._ready_at: float | None = None

    def ready(self, now: float) -> None:
        """The connection is in step."""
        self._ready_at = now

    def lost(self, now: float, reason: str) -> float:
        """The connection is gone: how many seconds to wait.

        The least wait is added to the random one. The larger of both would
        bring everybody back in the same instant whenever the least is larger.
        """
        if self._ready_at is not None and now - self._ready_at >= STABLE_S:
            self.attempt = 0
        self._ready_at = None
        spread = min(CAP_S, BASE_S * 2.0 ** min(self.attempt, 16))
        self.attempt += 1
        return least_wait_s(reason) + self._rng.uniform(0, spread)
