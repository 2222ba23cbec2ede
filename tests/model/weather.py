"""What goes wrong and how long things take: drawn from one seed, within the bounds of a climate."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Climate:
    """Probabilities per operation. hypothesis chooses them; 0 everywhere is a perfect store."""

    lost_request: float = 0.0
    lost_reply: float = 0.0
    late: float = 0.0
    cut: float = 0.0
    slow_documents: float = 0.0
    lagging_majority: float = 0.0
    failed_read: float = 0.0
    stale_read: float = 0.0
    overtaking_reads: float = 0.0
    bus_lost: float = 0.0
    bus_repeated: float = 0.0
    bus_late: float = 0.0


CALM = Climate()


@dataclass(frozen=True)
class Command:
    """What happens to one insert: seconds, and whether it arrives, and how far it gets."""

    delay: float
    arrives: bool
    cut_after: int | None
    document_delay: float
    reply: bool


class Weather:
    """Draws for the model; :meth:`calm` ends all trouble that has not begun."""

    def __init__(self, seed: int, climate: Climate) -> None:
        self.random = random.Random(seed)
        self.climate = climate

    def calm(self) -> None:
        self.climate = CALM

    def happens(self, probability: float) -> bool:
        return probability > 0 and self.random.random() < probability

    def latency(self) -> float:
        """One way through the network: mostly 1 ms, sometimes much more."""
        return self.random.choice((0.0005, 0.001, 0.001, 0.002, 0.005, 0.02))

    def lag(self) -> float:
        """From the primary's own write to a majority."""
        if self.happens(self.climate.lagging_majority):
            return self.random.choice((0.2, 0.9, 2.0, 8.0))
        return self.random.choice((0.0005, 0.001, 0.003))

    def command(self, documents: int) -> Command:
        c = self.climate
        late = self.happens(c.late)
        return Command(
            delay=self.random.choice((0.3, 1.05, 1.5, 5.0, 20.0)) if late else self.latency(),
            arrives=not self.happens(c.lost_request),
            cut_after=self.random.randrange(documents + 1) if self.happens(c.cut) else None,
            document_delay=self.random.choice((0.002, 0.01, 0.3)) if self.happens(c.slow_documents) else 0.0,
            reply=not self.happens(c.lost_reply),
        )

    def read_fails(self) -> bool:
        return self.happens(self.climate.failed_read)

    def reads_stale(self) -> bool:
        return self.happens(self.climate.stale_read)
