"""How far a client has come in one conversation's log.

Invariants: every entry up to ``have`` was given out, once and in order, and
nothing above; ``want`` is the newest seq known to exist that must be reached.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from .events import Entry, Event, Gap

#: Entries held back while a hole before them is filled. What does not fit is
#: not kept: it is only noted in ``want`` and paged later.
HELD_MAX: Final = 500


class Cursor:
    """The contiguous front of one conversation, and what is held back behind a hole."""

    __slots__ = ("_held", "conv", "have", "want")

    def __init__(self, conv: str, have: int) -> None:
        self.conv = conv
        self.have = have
        self.want = have
        self._held: dict[int, Entry] = {}

    @property
    def behind(self) -> bool:
        """There are entries that only a page of history can bring."""
        return self.want > self.have

    @property
    def held(self) -> int:
        """How many entries wait behind a hole."""
        return len(self._held)

    def push(self, entry: Entry, *, room: bool = True) -> list[Event]:
        """An entry came live; what can be given out now.

        Without ``room`` (the application is too slow) nothing is given out or
        kept: the entry stays to be paged.
        """
        if entry.seq <= self.have:
            return []
        self.want = max(self.want, entry.seq)
        if not room:
            return []
        if entry.seq > self.have + 1:
            if len(self._held) < HELD_MAX:
                self._held[entry.seq] = entry
            return []
        out: list[Event] = [entry]
        self.have = entry.seq
        self._release(out)
        return out

    def page(self, entries: Iterable[Entry], at: int) -> list[Event]:
        """A page of history after ``have`` came; what can be given out now.

        The log is dense. If a page has a hole all the same, or if it says to
        include everything up to ``at`` and ends earlier, the missing part is
        named by a :class:`Gap` instead of being passed over.
        """
        out: list[Event] = []
        for entry in entries:
            if entry.seq <= self.have:
                continue
            if entry.seq > self.have + 1:
                self.jump(entry.seq - 1, out)
            if entry.seq > self.have:
                out.append(entry)
                self.have = entry.seq
                self._release(out)
        if not out and self.behind and at >= self.want:
            self.jump(self.want, out)
        self.want = max(self.want, self.have)
        return out

    def jump(self, upto: int, out: list[Event]) -> None:
        """Give up on what is missing up to ``upto``: gaps and what is held go to ``out``."""
        for seq in sorted(self._held):
            if seq > upto:
                break
            if seq > self.have + 1:
                out.append(Gap(conv=self.conv, first=self.have + 1, last=seq - 1))
            out.append(self._held[seq])
            self.have = seq
        if self.have < upto:
            out.append(Gap(conv=self.conv, first=self.have + 1, last=upto))
            self.have = upto
        self._release(out)

    def reset(self, have: int) -> None:
        """Start again at ``have``; nothing is held."""
        self.have = self.want = have
        self._held.clear()

    def disconnected(self) -> None:
        """The server will send again what was held, or say that it cannot."""
        self.reset(self.have)

    def _release(self, out: list[Event]) -> None:
        """Give out what is held and now contiguous; forget what was given out meanwhile."""
        while self._held:
            entry = self._held.pop(self.have + 1, None)
            if entry is None:
                break
            out.append(entry)
            self.have = entry.seq
        if self._held and min(self._held) <= self.have:
            self._held = {s: e for s, e in self._held.items() if s > self.have}
        self.want = max(self.want, self.have)
