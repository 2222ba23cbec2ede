"""Which other workers there are, as far as their heartbeats tell, and who still owes an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from .redis_frames import Control

#: What a peer's heartbeat can tell, besides that it is there.
NEW: Final = "is there"
LOST: Final = "lost messages"


@dataclass(slots=True)
class Peer:
    """One worker that was heard. Times are the loop's."""

    name: str
    losses: int
    interval_s: float
    heard: float


class Peers:
    """The table of one worker; it does no I/O.

    :param silent_after: intervals of its own after which a peer counts as gone.
    """

    def __init__(self, silent_after: int) -> None:
        self._silent_after = silent_after
        self._peers: dict[str, Peer] = {}
        self._owed: dict[int, tuple[set[str], Callable[[], None]]] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._peers)

    @property
    def names(self) -> list[str]:
        """Those that are up."""
        return list(self._peers)

    def hear(self, control: Control, now: float) -> str:
        """A worker tells of itself. What is new about it: :data:`NEW`, :data:`LOST`, or ""."""
        peer = self._peers.get(control.name)
        if peer is None:
            self._peers[control.name] = Peer(control.name, control.losses, control.interval_ms / 1000, now)
            return NEW
        peer.heard = now
        if peer.losses == control.losses:
            return ""
        peer.losses = control.losses
        # It may have lost an answer.
        self._settle_all(control.name)
        return LOST

    def silent(self, now: float) -> list[str]:
        """Who was not heard for too long."""
        return [p.name for p in self._peers.values() if now - p.heard > self._silent_after * p.interval_s]

    def forget(self, name: str) -> bool:
        """A peer is gone; whether it was known."""
        known = self._peers.pop(name, None) is not None
        if known:
            self._settle_all(name)
        return known

    # --- answers that are owed ------------------------------------------------------
    def number(self) -> int:
        """A number for the next question."""
        self._number = (self._number + 1) & 0xFFFFFFFF
        return self._number

    def owe(self, number: int, names: Iterable[str], on_done: Callable[[], None]) -> None:
        """These peers owe an answer; ``on_done`` when all have given it or are gone (at once if nobody does)."""
        owing = set(names)
        if owing:
            self._owed[number] = (owing, on_done)
        else:
            on_done()

    def answered(self, name: str, number: int) -> None:
        """A peer has answered."""
        if (owed := self._owed.get(number)) is not None:
            owed[0].discard(name)
            if not owed[0]:
                del self._owed[number]
                owed[1]()

    def excuse(self, number: int) -> list[str]:
        """Wait no longer for this one; who did not answer."""
        owed = self._owed.pop(number, None)
        return sorted(owed[0]) if owed is not None else []

    def _settle_all(self, name: str) -> None:
        for number in list(self._owed):
            self.answered(name, number)
