"""How far the client has come in each log, and which pages of history fill the holes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from .events import Entry, Event, Gap

#: Entries held back while a hole before them is filled. An entry that does not fit
#: is dropped: only its seq is noted, and a page brings it later.
HELD_MAX: Final = 500
#: Pages asked for at the same time, over all conversations (a page is at most 256 KiB).
PAGES_MAX: Final = 4
#: When a page brought nothing although more must exist: ask again after this.
EMPTY_RETRY_S: Final = 1.0


class Cursor:
    """The contiguous front of one conversation's log, and the entries held back behind a hole.

    Invariants: every entry up to ``have`` was given out, once and in order, and
    none above; ``want`` is the newest seq known to exist that must be reached.
    """

    __slots__ = ("_held", "conv", "have", "want")

    def __init__(self, conv: str, have: int) -> None:
        self.conv = conv
        self.have = have
        self.want = have
        self._held: dict[int, Entry] = {}

    @property
    def behind(self) -> bool:
        """Whether there are entries that only a page of history can bring."""
        return self.want > self.have

    @property
    def held(self) -> int:
        """How many entries wait behind a hole."""
        return len(self._held)

    def push(self, entry: Entry, *, accept: bool = True) -> list[Event]:
        """Take in a live entry; return what can be given out now.

        Without ``accept`` (the application is too slow) nothing is given out or
        held: a page brings the entry later.
        """
        if entry.seq <= self.have:
            return []
        self.want = max(self.want, entry.seq)
        if not accept:
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
        """Take in a page of history after ``have``; return what can be given out now.

        The log is dense. If a page has a hole all the same, or if it claims to
        include everything up to ``at`` and ends earlier, a :class:`Gap` names the
        missing part.
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
        """Give up on the missing entries up to ``upto``: append gaps and held entries to ``out``."""
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
        """Start again at ``have``, with no entries held."""
        self.have = self.want = have
        self._held.clear()

    def disconnected(self) -> None:
        """Drop the held entries: the server sends them again, or says that it cannot."""
        self.reset(self.have)

    def _release(self, out: list[Event]) -> None:
        """Give out held entries that are contiguous now; drop those given out meanwhile."""
        while self._held:
            entry = self._held.pop(self.have + 1, None)
            if entry is None:
                break
            out.append(entry)
            self.have = entry.seq
        if self._held and min(self._held) <= self.have:
            self._held = {s: e for s, e in self._held.items() if s > self.have}
        self.want = max(self.want, self.have)


class CatchUp:
    """The cursors of all attached conversations, and the pages that they need.

    :param have: per conversation, the seq at which its cursor starts.
    """

    def __init__(self, have: dict[str, int]) -> None:
        self.cursors = {conv: Cursor(conv, seq) for conv, seq in have.items()}
        self._behind: dict[str, None] = {}
        self._paging: set[str] = set()
        self._not_before: dict[str, float] = {}

    @property
    def behind(self) -> bool:
        """Whether some conversation has entries that were not given out yet."""
        return bool(self._behind)

    def start(self, conv: str, have: int) -> Cursor:
        """Return the cursor of a conversation; a new one starts at ``have``."""
        cursor = self.cursors.get(conv)
        if cursor is None:
            cursor = self.cursors[conv] = Cursor(conv, have)
        return cursor

    def forget(self, conv: str) -> None:
        """Drop the cursor: the user is no longer in the conversation."""
        self.cursors.pop(conv, None)
        self._behind.pop(conv, None)
        self._not_before.pop(conv, None)

    def note(self, cursor: Cursor) -> None:
        """To be called whenever a cursor moved or learned of more."""
        if cursor.behind:
            self._behind[cursor.conv] = None
        else:
            self._behind.pop(cursor.conv, None)
            self._not_before.pop(cursor.conv, None)

    def take(self, now: float, free: int) -> list[tuple[str, int]]:
        """The pages to ask for now, at most ``free``, as (conversation, after)."""
        out: list[tuple[str, int]] = []
        for conv in self._behind:
            if len(self._paging) >= PAGES_MAX or len(out) >= free:
                break
            if conv not in self._paging and self._not_before.get(conv, 0.0) <= now:
                self._paging.add(conv)
                out.append((conv, self.cursors[conv].have))
        return out

    def page(self, conv: str, entries: list[Entry], at: int, now: float) -> list[Event]:
        """Take in a page; return what can be given out now."""
        self._paging.discard(conv)
        cursor = self.cursors.get(conv)
        if cursor is None:
            return []
        before = cursor.have
        out = cursor.page(entries, at)
        if cursor.have == before:
            self._not_before[conv] = now + EMPTY_RETRY_S
        # To the end of the line, so that one long absence does not hold up the rest.
        self._behind.pop(conv, None)
        self.note(cursor)
        return out

    def refused(self, conv: str, retry_at: float | None) -> list[Event]:
        """A page was refused: ask again at ``retry_at``, or never (None), which leaves a :class:`~.events.Gap`."""
        self._paging.discard(conv)
        cursor = self.cursors.get(conv)
        out: list[Event] = []
        if cursor is None:
            return out
        if retry_at is not None:
            self._not_before[conv] = retry_at
        else:
            cursor.jump(cursor.want, out)
            self.note(cursor)
        return out

    def disconnected(self) -> None:
        """Drop the pages asked for: the next connection says anew what is missing."""
        for conv in self._behind:
            self.cursors[conv].disconnected()
        self._behind.clear()
        self._paging.clear()
        self._not_before.clear()

    def next_at(self, now: float) -> float | None:
        """When a page that waits now may be asked for again; None if none waits for a time."""
        return min((at for at in self._not_before.values() if at > now), default=None)
