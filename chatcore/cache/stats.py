"""What the cache did: counters by kind and level. Plain numbers, read by whoever shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(slots=True)
class Counts:
    """Reads of one kind: answered by level 1, by level 2, or by the store; and reads ahead of need."""

    l1: int = 0
    l2: int = 0
    missed: int = 0
    refreshed: int = 0

    @property
    def reads(self) -> int:
        """All of them."""
        return self.l1 + self.l2 + self.missed

    def add(self, shown: Mapping[str, Any]) -> None:
        """Count what another worker has shown, too."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + shown[field.name])

    def ratio(self) -> float:
        """The part that did not need the store (0 to 1; 1 if nothing was read)."""
        return (self.l1 + self.l2) / self.reads if self.reads else 1.0

    def shown(self) -> dict[str, Any]:
        """For JSON."""
        shown: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return shown | {"ratio": round(self.ratio(), 4)}
