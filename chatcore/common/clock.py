"""The wall clock, which only labels. Deadlines, limits and heartbeats use the monotonic clock of the loop."""

from __future__ import annotations

import time


def now_ms() -> int:
    """Unix time in ms; never used to decide between two writers, or to measure how long something took."""
    return time.time_ns() // 1_000_000
