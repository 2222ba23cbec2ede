"""Which conversations are behind their log, and which pages of history to ask for."""

from __future__ import annotations

from typing import Final

from .cursor import Cursor
from .events import Entry, Event

#: Pages asked for at the same time, over all conversations (a page is at most 256 KiB).
PAGES_MAX: Final = 4
#: When a page brought nothing although more must exist: ask again after this.
EMPTY_RETRY_S: Final = 1.0


class CatchUp:
    """The cursors of all attached conversations, and the pages that they need."""

    def __init__(self, have: dict[str, int]) -> None:
        self.cursors = {conv: Cursor(conv, seq) for conv, seq in have.items()}
        self._behind: dict[str, None] = {}
        self._paging: set[str] = set()
        self._not_before: dict[str, float] = {}

    @property
    def behind(self) -> bool:
        """Some conversation has entries that were not given out yet."""
        return bool(self._behind)

    def start(self, conv: str, have: int) -> Cursor:
        """The cursor of a conversation; a new one stands at ``have``."""
        cursor = self.cursors.get(conv)
        if cursor is None:
            cursor = self.cursors[conv] = Cursor(conv, have)
        return cursor

    def forget(self, conv: str) -> None:
        """The conversation is no longer the user's."""
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

    def take(self, now: float) -> list[tuple[str, int]]:
        """The pages to ask for now, as (conversation, after)."""
        out: list[tuple[str, int]] = []
        for conv in self._behind:
            if len(self._paging) >= PAGES_MAX:
                break
            if conv not in self._paging and self._not_before.get(conv, 0.0) <= now:
                self._paging.add(conv)
                out.append((conv, self.cursors[conv].have))
        return out

    def page(self, conv: str, entries: list[Entry], at: int, now: float) -> list[Event]:
        """A page came; what can be given out."""
        self._paging.discard(conv)
        cursor = self.cursors.get(conv)
        if cursor is None:
            return []
        before = cursor.have
        out = cursor.page(entries, at)
        if cursor.have == before:
            self._not_before[conv] = now + EMPTY_RETRY_S
        # Behind the others in line, so that one long absence does not hold up the rest.
        self._behind.pop(conv, None)
        self.note(cursor)
        return out

    def refused(self, conv: str, retry_at: float | None) -> list[Event]:
        """No page: again at ``retry_at``, or never (None), which leaves a :class:`~.events.Gap`."""
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
        """Pages asked for will not come; what is missing will be known anew."""
        for conv in self._behind:
            self.cursors[conv].disconnected()
        self._behind.clear()
        self._paging.clear()
        self._not_before.clear()

    def next_at(self, now: float) -> float | None:
        """When a page that waits now may be asked for again; None if none waits for time."""
        return min((at for at in self._not_before.values() if at > now), default=None)
