"""Which conversations are active, so that a worker that starts can load them before it is asked.

The score of a conversation is what was read and written in it, worth half as much with each stretch
of time that has passed. Stretches are sorted sets of their own in Redis that expire by themselves;
the workers of all hosts add to them in batches.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from lru import LRU

from .l2 import L2

# A conversation that was busy two hours ago is worth a sixteenth of one that is busy now.
STRETCH_S: Final = 1800
STRETCHES: Final = 4
# Conversations kept for each stretch, in Redis; more than any worker warms.
KEPT: Final = 20_000
# Conversations counted between two batches, and the time between them.
COUNTED: Final = 2_000
BATCH_S: Final = 5.0


class Activity:
    """One per worker.

    :param wall: Unix time in seconds: it only names the stretch.
    """

    def __init__(self, l2: L2 | None, wall: Callable[[], float] = time.time) -> None:
        self._l2 = l2
        self._wall = wall
        self._counts: Any = LRU(COUNTED)

    def note(self, conv: str) -> None:
        """Somebody wrote or read in it."""
        self._counts[conv] = self._counts.get(conv, 0) + 1

    def _stretches(self) -> list[str]:
        now = int(self._wall() // STRETCH_S)
        return [str(now - i) for i in range(STRETCHES)]

    async def run(self) -> None:
        """Send batches until cancelled."""
        while True:
            await asyncio.sleep(BATCH_S)
            await self.send()

    async def send(self) -> None:
        """Send what was counted (lost if level 2 is away: a score need not be exact)."""
        counts = dict(self._counts.items())
        self._counts.clear()
        if self._l2 is not None and counts:
            await self._l2.score(self._stretches()[0], counts, KEPT, STRETCHES * STRETCH_S * 1000)

    async def hottest(self, most: int) -> list[str]:
        """The most active conversations, the most active first."""
        if self._l2 is None or most <= 0:
            return []
        scores: dict[str, float] = {}
        for i, stretch in enumerate(await self._l2.scores(self._stretches(), 2 * most)):
            for conv, score in stretch.items():
                scores[conv] = scores.get(conv, 0.0) + score / 2**i
        return sorted(scores, key=lambda conv: scores[conv], reverse=True)[:most]
