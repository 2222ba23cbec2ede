"""Read marks come into the rows of members a portion of the log at a time, long after they were set.

A mark is a row that the writer appends, or follows from a message: sending moves the sender's mark. Until it is in the
row of the member, a reader takes it from the tail (:mod:`.tail`). So a portion goes into the index, and leaves the
tail, only when its marks are in the rows (``meta.folded``). Marks only move forward: to bring one in twice is harmless.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import apsw

from .transaction import LogState, Portion, in_bulk

# Marks brought into rows in one step: about a millisecond.
FOLD_ROWS: Final = 256
# Rows of row_changes deleted in one step, and how many of the newest changes are always kept: a worker that looks at
# the changes each second is never so far behind.
TRIM_ROWS: Final = 2_000
KEEP_CHANGES: Final = 1_000_000

# The mark of a message changes no `rev`: the entry itself is pushed.
_FOLD: Final = """
WITH v(conv, user, seq, msgs, rev) AS (VALUES {values})
UPDATE members SET read = max(members.read, v.seq), rev = max(members.rev, v.rev),
  read_msgs = iif(v.seq > members.read, v.msgs, members.read_msgs) FROM v
WHERE members.conv = v.conv AND members.user = v.user AND (members.read < v.seq OR members.rev < v.rev)
"""


class Folding:
    """Brings marks into rows, inside the writer's transactions: a little with each."""

    def __init__(self, state: LogState, folded: int, trimmed: int) -> None:
        """:param folded, trimmed: as in the table ``meta``."""
        self._state = state
        self._folded = folded
        self._trimmed = trimmed
        self._steps: Iterator[list[tuple[Any, ...]]] | None = None
        self._to = 0
        self._after = (folded, trimmed)

    @property
    def due(self) -> bool:
        """There are marks to bring into rows, or old changes to delete."""
        return self._steps is not None or self._complete() > 0 or self._to_trim() > 0

    def _complete(self) -> int:
        """The end of the oldest portion that is complete and whose marks are not in the rows (0: there is none).

        It may have no marks, and nothing but changes of rows: they take values of the counter, too.
        """
        mark, size = self._state.mark, self._state.snapshot.portion
        high = mark + (max(self._folded - mark, 0) // size + 1) * size
        return high if high <= self._state.position else 0

    def _to_trim(self) -> int:
        # Readers look up the marks that are not indexed, however long the index has stood still.
        upto = min(self._folded, self._state.mark, self._state.position - KEEP_CHANGES)
        # Not one by one: that would be a commit more for each.
        return upto if upto >= self._trimmed + TRIM_ROWS else 0

    def step(self, db: apsw.Connection, requests: int) -> None:
        """Do some of it within the open transaction.

        :param requests: how many the transaction has: marks are brought in faster than they come.
        """
        self._after = (self._folded, self._trimmed)
        if self._steps is None and (high := self._complete()):
            self._steps = _marks_of([p for p in self._state.portions if self._folded < p.high <= high])
            self._to = high
        if self._steps is not None:
            for _ in range(1 + requests * 2 // FOLD_ROWS):
                rows = next(self._steps, None)
                if rows is None:
                    self._steps = None
                    _set(db, "folded", self._to)
                    self._after = (self._to, self._trimmed)
                    return
                in_bulk(db, _FOLD, rows)
        elif upto := self._to_trim():
            oldest = "SELECT id FROM row_changes WHERE id <= ? ORDER BY id LIMIT 1 OFFSET ?"
            more: Any = db.execute(oldest, (upto, TRIM_ROWS)).fetchone()
            trimmed = upto if more is None else more[0] - 1
            _set(db, "trimmed", trimmed)
            db.execute("DELETE FROM row_changes WHERE id <= ?", (trimmed,))
            self._after = (self._folded, trimmed)

    def committed(self) -> None:
        """The transaction of the last step is committed. If it is not, this object must not be used again."""
        self._folded, self._trimmed = self._after


def _marks_of(portions: Sequence[Portion]) -> Iterator[list[tuple[Any, ...]]]:
    """The read marks of portions, in the order of the rows that they go to, so that those of one page come together:
    (conversation, user, seq, msgs, rev). Each step is short."""
    rows: list[tuple[Any, ...]] = []
    for portion in portions:
        for conv in sorted(portion.marks):
            rows += [(conv, user, *mark) for user, mark in portion.marks[conv].items()]
            while len(rows) >= FOLD_ROWS:
                yield rows[:FOLD_ROWS]
                del rows[:FOLD_ROWS]
        yield rows  # no two rows of one member in one step
        rows = []


def _set(db: apsw.Connection, key: str, value: int) -> None:
    db.execute("UPDATE meta SET value = ? WHERE key = ?", (value, key))
