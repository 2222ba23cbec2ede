"""Durations as the load generator counts them (``histogram.h``): merged over processes, asked for percentiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

SUB_BITS = 7
SUB = 1 << SUB_BITS


class Histogram:
    """Counts of durations in buckets that are 0.8 % wide or less."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.n = 0
        self.max_ns = 0

    def add(self, printed: dict[str, Any]) -> None:
        """Add what a process has printed."""
        flat = printed["counts"]
        for index, count in zip(flat[::2], flat[1::2], strict=True):
            self.counts[index] += count
        self.n += printed["n"]
        self.max_ns = max(self.max_ns, printed["max"])

    def ms(self, share: float) -> float | None:
        """A percentile in ms (0.5: the median); None if there is nothing."""
        if not self.n:
            return None
        if share >= 1:
            return self.max_ns / 1e6
        left = max(1, round(self.n * share))
        for index in sorted(self.counts):
            left -= self.counts[index]
            if left <= 0:
                return min(middle_ns(index), self.max_ns) / 1e6
        return self.max_ns / 1e6


def percentile_ms(took_ns: Sequence[float], share: float) -> float:
    """The same of durations that were kept one by one."""
    ordered = sorted(took_ns)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] / 1e6


def middle_ns(index: int) -> float:
    """The duration in the middle of a bucket."""
    if index < 2 * SUB:
        return float(index)
    shift = index // SUB - 1
    low = (SUB + index % SUB) << shift
    return low + (1 << shift) / 2
