"""The newest part of the log, which is not in the index yet, and the snapshots from which queries are answered.

A reader has two files: the log with everything that is committed, and the index (:mod:`.index`), which says where the
entries of a conversation are, but lags. :class:`Tail` is what the index lacks. It follows the log by id, inside the
very transaction from which a query is answered, so that log, index and tail never disagree: :class:`Snapshot`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import apsw
import orjson
from lru import LRU

from .index import Index, attach
from .schema import connect, database_path

#: Ids of a generation, where the index does not say how far its mark rises in one step.
PORTION: Final = 65_536
#: With so many ids above the mark, the index is not the one that the indexer writes: the writer takes no more messages
#: at a quarter of it.
TAIL_LIMIT: Final = 800_000
#: Rows of each kind that one statement of the follower reads: some 0.5 ms.
FOLLOW_ROWS: Final = 1000
#: Entries that one statement reads, of those that a query asks for: it may have enough before it has all.
ROWS: Final = 64
#: Conversations of an indexed generation that are freed at each opening of a snapshot: some 0.1 ms. To free them all
#: at once takes up to 50 ms, in which no other thread of the process runs.
FREED: Final = 500
#: Small integers of conversations and users that a snapshot remembers: some 20 MB at most.
REMEMBERED: Final = 100_000

_NEWEST: Final = (
    "SELECT (SELECT max(id) FROM entries), (SELECT max(id) FROM row_changes), (SELECT max(rev) FROM revocations)"
)
# Where there may be many rows they come in one, as lists of columns: a thread gives up the interpreter's lock at every
# step of a statement, and beside a busy loop it waits for the lock again.
_NEW_ENTRIES: Final = """
SELECT json_group_array(id), json_group_array(conv), json_group_array(sender), json_group_array(seq) FROM (
  SELECT id, conv, iif(last_msg = seq, sender, 0) AS sender, seq FROM entries WHERE id > ? ORDER BY id LIMIT ?
)
"""
_NEW_MARKS: Final = """
SELECT json_group_array(id), json_group_array(conv), json_group_array(user) FROM (
  SELECT id, conv, user FROM row_changes WHERE id > ? AND read IS NOT NULL ORDER BY id LIMIT ?
)
"""
_ROWS: Final = """
SELECT json_group_array(e.conv), json_group_array(e.seq), json_group_array(e.t), json_group_array(u.id),
  json_group_array(e.ts), json_group_array(e.cid), json_group_array(e.msgs), json_group_array(e.last_msg),
  json_group_array(e.fields)
FROM carray(?) a CROSS JOIN entries e ON e.id = a.value CROSS JOIN ids u ON u.n = e.sender
"""
_HEADS: Final = """
SELECT json_group_array(h.conv), json_group_array(h.id) FROM carray(?) a CROSS JOIN idx.heads h ON h.conv = a.value
"""
_HEAD_SEQS: Final = """
SELECT json_group_array(e.conv), json_group_array(e.seq)
FROM carray(?) a CROSS JOIN idx.heads h ON h.conv = a.value CROSS JOIN entries e ON e.id = h.id
"""
_NUMBERS: Final = """
SELECT json_group_array(i.id), json_group_array(i.n) FROM carray(?) a CROSS JOIN ids i ON i.id = a.value
"""
# The marks that messages leave, and those that users set.
_SENT: Final = """
SELECT json_group_array(e.id), json_group_array(e.seq), json_group_array(e.msgs)
FROM carray(?) a CROSS JOIN entries e ON e.id = a.value
"""
_READ: Final = """
SELECT json_group_array(r.id), json_group_array(r.read), json_group_array(r.msgs)
FROM carray(?) a CROSS JOIN row_changes r ON r.id = a.value
"""

#: A read mark: seq, number of messages up to it, and the change counter of the newest that the user set (or 0).
Mark = tuple[int, int, int]
#: Of an entry: number of the conversation, seq, t, sender, ts, cid, msgs, last_msg, fields.
Row = tuple[int, int, str, str, int, str, int, int, str]


class StaleIndex(Exception):
    """The index does not belong to the log: both have to be opened anew."""


class Rows:
    """Rows of one kind in a generation, by conversation."""

    __slots__ = ("_newest", "by_conv")

    def __init__(self) -> None:
        #: A flat list for each, which is the cheapest to make and to extend: the seq of the first row, then the id of
        #: each row and its user (0: nobody), in the order of ids. The seqs of entries are dense.
        self.by_conv: dict[int, list[int]] = {}
        #: The newest id of each user, and for how long a list it was made. On demand: most conversations are indexed
        #: before anybody asks for the marks in them.
        self._newest: dict[int, tuple[int, dict[int, int]]] = {}

    def add(self, ids: Iterable[int], convs: Iterable[int], users: Iterable[int], seqs: Iterable[int]) -> None:
        """Add rows with ids that are higher than all before."""
        by_conv = self.by_conv
        get = by_conv.get
        for id, conv, user, seq in zip(ids, convs, users, seqs):  # noqa: B905 (seqs may be endless)
            rows = get(conv)
            if rows is None:
                by_conv[conv] = [seq, id, user]
            else:
                rows.append(id)
                rows.append(user)

    def newest(self, conv: int) -> dict[int, int]:
        """The newest id of each user in a conversation."""
        rows = self.by_conv.get(conv)
        if rows is None:
            return {}
        seen, newest = self._newest.get(conv, (1, {}))
        if seen < len(rows):
            newest.update(zip(rows[seen + 1 :: 2], rows[seen::2], strict=True))
            self._newest[conv] = (len(rows), newest)
        return newest


class Generation:
    """A part of the tail that the index will cover in one step: the ids up to ``high``, from the end of the part
    before it."""

    __slots__ = ("entries", "high", "marks")

    def __init__(self, high: int) -> None:
        self.high = high
        #: All entries, with the senders of the messages.
        self.entries = Rows()
        #: The read marks that users set.
        self.marks = Rows()


class Tail:
    """The log above the index's mark.

    Ids rise in the order of commits, so whatever is new has a higher id. Of two marks of a user in a conversation the
    one with the higher id is the higher one, for marks only move forward.

    :param portion: how far the mark rises in one step. Generations are as large, so that they are dropped as a whole.
    """

    def __init__(self, portion: int) -> None:
        self.portion = portion
        self._indexed: list[dict[int, list[int]]] = []
        self._begin(0)

    def _begin(self, mark: int) -> None:
        """Know nothing but the mark."""
        #: The index covers the log up to here.
        self.mark = mark
        #: In order and without gaps from the mark on, as far as there are rows.
        self.generations: list[Generation] = []
        #: The id of the newest entry of the log.
        self.newest = 0
        #: The newest value of the change counter.
        self.position = 0
        # What was read: entries and marks up to these ids.
        self._entries_to = self._marks_to = mark

    def follow(self, db: apsw.Connection, mark: int) -> bool:
        """Drop what is indexed and read what is new, in a read transaction; False: the log went back.

        If this fails or is interrupted, the next call goes on where it was.

        :param mark: of the index, in a snapshot that is not newer than the transaction's of the log.
        :raises StaleIndex: the mark is too far behind.
        """
        if mark != self.mark:
            self._drop(mark)
        self._free()
        row: Any = db.execute(_NEWEST).fetchall()[0]
        newest, newest_change, newest_revocation = [id or 0 for id in row]
        forward = newest >= self.newest
        if not forward:
            # The file was put back to an earlier state.
            self._begin(mark)
        if newest - mark > TAIL_LIMIT:
            raise StaleIndex(f"the newest entry is {newest}, and the index ends at {mark}")
        self.newest = newest
        self.position = max(newest, newest_change, newest_revocation)
        while self._entries_to < newest:
            ids, convs, users, seqs = _columns(db, _NEW_ENTRIES, (self._entries_to, FOLLOW_ROWS))
            for generation, a, b in self._parts(ids):
                generation.entries.add(ids[a:b], convs[a:b], users[a:b], seqs[a:b])
            self._entries_to = ids[-1]
        while self._marks_to < newest_change:
            ids, convs, users = _columns(db, _NEW_MARKS, (self._marks_to, FOLLOW_ROWS))
            for generation, a, b in self._parts(ids):
                generation.marks.add(ids[a:b], convs[a:b], users[a:b], repeat(0))
            # The changes of rows behind the last mark are none.
            self._marks_to = ids[-1] if len(ids) == FOLLOW_ROWS else newest_change
        return forward

    def _parts(self, ids: Sequence[int]) -> Iterator[tuple[Generation, int, int]]:
        """The generations of some ids, and which of the ids belong to each."""
        a = 0
        while a < len(ids):
            generations = self.generations
            while not generations or generations[-1].high < ids[a]:
                generations.append(Generation((generations[-1].high if generations else self.mark) + self.portion))
            generation = generations[(ids[a] - self.mark - 1) // self.portion]
            b = bisect_right(ids, generation.high, a)
            yield generation, a, b
            a = b

    def _drop(self, mark: int) -> None:
        """The index covers more, or it was made anew."""
        generations = self.generations
        covered = sum(generation.high <= mark for generation in generations)
        low = generations[covered - 1].high if covered else self.mark
        if mark < self.mark or (low != mark and covered < len(generations)):
            newest = self.newest
            self._begin(mark)
            self.newest = newest
            return
        for generation in generations[:covered]:
            self._indexed += (generation.entries.by_conv, generation.marks.by_conv)
        del generations[:covered]
        self.mark = mark
        self._entries_to = max(self._entries_to, mark)
        self._marks_to = max(self._marks_to, mark)

    def _free(self) -> None:
        for _ in range(FREED):
            if not self._indexed:
                break
            if self._indexed[-1]:
                self._indexed[-1].popitem()
            else:
                self._indexed.pop()

    def entries(self, conv: int) -> list[list[int]]:
        """The entries of a conversation, by generation, each as in :class:`Rows`."""
        return [rows for generation in self.generations if (rows := generation.entries.by_conv.get(conv)) is not None]

    def head(self, conv: int) -> tuple[int, int]:
        """The id and the seq of the newest entry of a conversation; 0: there is none here."""
        for generation in reversed(self.generations):
            rows = generation.entries.by_conv.get(conv)
            if rows is not None:
                return rows[-2], rows[0] + len(rows) // 2 - 1
        return 0, 0

    def newest_of(self, conv: int, user: int) -> tuple[int, int]:
        """The ids of the newest message that a user sent into a conversation, and of the newest mark that the user
        set there; 0: there is none here."""
        sent = read = 0
        if not user:
            return 0, 0  # who never did anything
        for generation in reversed(self.generations):
            sent = sent or generation.entries.newest(conv).get(user, 0)
            read = read or generation.marks.newest(conv).get(user, 0)
        return sent, read


def _columns(db: apsw.Connection, sql: str, args: Sequence[Any]) -> list[list[Any]]:
    """Of a statement whose one row has an array in JSON for each column."""
    row: Any = db.execute(sql, args).fetchall()[0]
    return [orjson.loads(column) for column in row]


class Snapshot:
    """The log and its index, opened for reading by one thread; ``with snapshot:`` holds one state of both.

    Inside, everything here may be asked. ``db`` may be asked at any time for tables that have nothing to do with the
    log. The transaction must be short: while it is open, deleted text cannot leave the write-ahead log.

    :raises apsw.Error: as SQLite says. After that, and after :class:`StaleIndex`, close it and open a new one.
    """

    def __init__(self, data: Path) -> None:
        self.db = connect(database_path(data), write=False)
        try:
            attach(self.db, data)
            portion: list[Any] = self.all("SELECT value FROM idx.meta WHERE key = 'portion'")
        except BaseException:
            self.db.close(True)
            raise
        self.index = Index(self.db)
        self.tail = Tail(portion[0][0] if portion else PORTION)
        self._numbers: LRU[str, int] = LRU(REMEMBERED)

    def close(self) -> None:
        """Close both files."""
        self.db.close(True)

    def all(self, sql: str, args: Sequence[Any] = ()) -> list[Any]:
        """The rows of a statement; the schema has their types."""
        return self.db.execute(sql, args).fetchall()

    def columns(self, sql: str, args: Sequence[Any]) -> list[list[Any]]:
        """The columns of a statement that has one row, with an array in JSON for each of them."""
        return _columns(self.db, sql, args)

    def table(self, sql: str, args: Sequence[Any]) -> list[Any]:
        """The same, as rows."""
        return list(zip(*self.columns(sql, args), strict=True))

    def __enter__(self) -> Snapshot:
        self.db.execute("BEGIN")
        try:
            # The index's state first: the log's is not older then, and holds all that is indexed.
            if not self.tail.follow(self.db, self.index.refresh()):
                self._numbers.clear()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        if self.db.in_transaction:
            self.db.execute("COMMIT")

    @property
    def portion(self) -> int:
        """How far the mark of the index rises in one step."""
        return self.tail.portion

    @property
    def mark(self) -> int:
        """The index covers the log up to this id."""
        return self.tail.mark

    @property
    def newest(self) -> int:
        """The id of the newest entry (0: there is none)."""
        return self.tail.newest

    @property
    def position(self) -> int:
        """The newest value of the change counter."""
        return self.tail.position

    def numbers(self, ids: Sequence[str]) -> dict[str, int]:
        """The small integers of conversations and users; those without are left out: the log has nothing of them."""
        known = self._numbers
        found: dict[str, int] = {}
        unknown: list[str] = []
        for id in ids:
            n = known.get(id)
            if n is None:
                unknown.append(id)
            else:
                found[id] = n
        if unknown:
            read = dict(self.table(_NUMBERS, (apsw.carray(tuple(unknown)),)))
            known.update(read)
            found |= read
        return found

    def number(self, id: str) -> int:
        """The small integer of a conversation or a user; 0: it has none."""
        return self.numbers((id,)).get(id, 0)

    def head(self, conv: int) -> int:
        """The id of the newest entry of a conversation; 0: there is none."""
        self._check()
        return self.tail.head(conv)[0] or self.index.head(conv)

    def heads(self, convs: Sequence[int]) -> list[int]:
        """:meth:`head` of each."""
        self._check()
        found = [self.tail.head(conv)[0] for conv in convs]
        indexed = array("q", [conv for conv, id in zip(convs, found, strict=True) if not id])
        if indexed:
            ids = dict(self.table(_HEADS, (apsw.carray(indexed),)))
            found = [id or ids.get(conv, 0) for conv, id in zip(convs, found, strict=True)]
        return found

    def head_seqs(self, convs: Sequence[int]) -> dict[int, int]:
        """The seq of the newest entry of each; those without any are left out."""
        self._check()
        found: dict[int, int] = {}
        indexed = array("q")
        for conv in convs:
            id, seq = self.tail.head(conv)
            if id:
                found[conv] = seq
            else:
                indexed.append(conv)
        if indexed:
            found.update(self.table(_HEAD_SEQS, (apsw.carray(indexed),)))
        return found

    def ids(self, conv: int, first: int, last: int) -> list[int]:
        """The ids of the entries with the seqs ``first`` (at least 1) to ``last``, dense from ``first`` on, as far as
        there are."""
        self._check()
        tail = self.tail.entries(conv)
        if not tail:
            return self.index.ids(conv, first, last)
        found: list[int] = []
        indexed = min(last, tail[0][0] - 1)
        if first <= indexed:
            found = self.index.ids(conv, first, indexed)
            if len(found) != indexed - first + 1:
                raise StaleIndex(f"conversation {conv} lacks entries between {first} and {indexed}")
        for part in tail:
            if part[0] <= last:
                found += part[1 + 2 * max(0, first - part[0]) : 2 * (last - part[0] + 1) : 2]
        return found

    def rows(self, conv: int, first: int, last: int, *, newest_first: bool = False) -> Iterator[Row]:
        """The entries with the seqs ``first`` (at least 1) to ``last``, as far as there are; to be taken inside the
        snapshot."""
        ids = self.ids(conv, first, last)
        seqs = range(first, first + len(ids))
        if newest_first:
            ids.reverse()
            seqs = seqs[::-1]
        for seq, row in zip(seqs, self.rows_of(ids), strict=True):
            # The index may lag, but it must not lie: nobody is shown an entry of another conversation.
            if row[0] != conv or row[1] != seq:
                raise StaleIndex(f"the index has another entry for {seq} of conversation {conv}")
            yield row

    def rows_of(self, ids: Sequence[int]) -> Iterator[Row]:
        """The entries with these ids, one for each; to be taken inside the snapshot."""
        for at in range(0, len(ids), ROWS):
            some = array("q", ids[at : at + ROWS])
            columns = self.columns(_ROWS, (apsw.carray(some),))
            if len(columns[0]) != len(some):
                raise StaleIndex("the index has entries that the log has not")
            yield from zip(*columns, strict=True)

    def rows_at(self, seqs: Mapping[int, int]) -> dict[int, Row]:
        """By conversation, its entry with a seq. There must be one."""
        ids = [id for conv, seq in seqs.items() for id in self.ids(conv, seq, seq)]
        found = {row[0]: row for row in self.rows_of(ids)}
        if {conv: row[1] for conv, row in found.items()} != seqs:
            raise StaleIndex(f"the index has other entries for {seqs}")
        return found

    def marks(self, pairs: Sequence[tuple[int, int]]) -> list[Mark]:
        """What the tail says of the read mark of each (conversation, user); the row of the member may say more."""
        self._check()
        newest = [self.tail.newest_of(conv, user) for conv, user in pairs]
        # The higher id is the higher mark. Both tables share the counter.
        seqs = {0: (0, 0)}
        for sql, ids in (
            (_SENT, [sent for sent, read in newest if sent > read]),
            (_READ, [read for sent, read in newest if sent < read]),
        ):
            if ids:
                found, seq, msgs = self.columns(sql, (apsw.carray(array("q", ids)),))
                seqs.update(zip(found, zip(seq, msgs, strict=True), strict=True))
        return [(*seqs[max(sent, read)], read) for sent, read in newest]

    def _check(self) -> None:
        assert self.db.in_transaction, "outside a snapshot the index may have changed"
