"""A log with nothing but rows, an indexer on it, and a check of everything that can be asked of the index."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
from hypothesis import strategies as st

from chatcore._fast.runs import key_of
from chatcore.store.sqlite.index import Filters, Index, attach, cid_secret, rows
from chatcore.store.sqlite.indexer import Indexer
from chatcore.store.sqlite.schema import POSITION, connect, database_path, prepare

#: Small, so that short logs have many slices, runs and levels.
SMALL = {"portion": 8, "fan_in": 2, "slice_rows": 3}


@dataclass(frozen=True, slots=True)
class Row:
    """An entry, as far as the index knows it."""

    id: int
    conv: int
    seq: int
    sender: int
    cid: str


@dataclass
class Log:
    """The log in a data directory: written here, as the writer would."""

    data: Path
    entries: list[Row] = field(default_factory=list)
    counter: int = 0
    heads: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        prepare(self.data)
        with self.opened() as db:
            self.secret = cid_secret(rows(db, "SELECT value FROM meta WHERE key = 'secret'")[0][0])

    def restored(self, counter: int) -> None:
        """The file was replaced by one of an earlier time."""
        self.counter = counter
        self.entries = [row for row in self.entries if row.id <= counter]
        self.heads = {row.conv: row.seq for row in self.entries}

    @contextmanager
    def opened(self, write: bool = True) -> Iterator[apsw.Connection]:
        db = connect(database_path(self.data), write=write)
        try:
            yield db
        finally:
            db.close()

    def append(self, *convs: int, folded: bool = True) -> None:
        """Commit an entry for each conversation; 0 stands for a change of a row, which takes an id, too."""
        with self.opened() as db, db:
            for conv in convs:
                self.counter += 1
                if conv == 0:
                    rows(db, "INSERT INTO row_changes VALUES (?, 1, 1, NULL, NULL)", (self.counter,))
                else:
                    self.put(
                        db,
                        Row(self.counter, conv, self.heads.get(conv, 0) + 1, self.counter % 3, f"cid-{self.counter}"),
                    )
            if folded:
                rows(db, "UPDATE meta SET value = ? WHERE key = 'folded'", (self.counter,))

    def put(self, db: apsw.Connection, row: Row) -> None:
        """Insert an entry, also one that no writer would."""
        self.counter = row.id
        self.entries.append(row)
        self.heads[row.conv] = row.seq
        values = (row.id, row.conv, row.seq, "msg", row.sender, row.seq, row.seq, row.cid, b"12345678", 0, "{}")
        rows(db, "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    def key(self, row: Row) -> int:
        return key_of(self.secret, row.conv, row.sender, row.cid)


class Reader:
    """Looks at the log and its index from outside."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.db = connect(database_path(log.data), write=False)
        attach(self.db, log.data)
        self.index = Index(self.db)
        self.filters = Filters()

    def check(self) -> int:
        """Everything that the index answers is true of the log up to the mark, which is returned."""
        rows(self.db, "BEGIN")
        try:
            mark = self.index.refresh()
            self.filters.refresh(self.index)
            self._check(mark)
            return mark
        finally:
            rows(self.db, "COMMIT")

    def _check(self, mark: int) -> None:
        log = self.log
        assert mark <= rows(self.db, POSITION)[0][0]
        assert mark <= rows(self.db, "SELECT value FROM meta WHERE key = 'folded'")[0][0]
        indexed: dict[int, list[int]] = {row.conv: [] for row in log.entries}
        for row in log.entries:
            key = log.key(row)
            if row.id <= mark:
                indexed[row.conv].append(row.id)
                assert key in self.filters
                assert self.index.candidates(key, self.filters.runs(key)) == [row.id]
            else:
                assert self.index.candidates(key) == []
        for conv, ids in indexed.items():
            assert self.index.head(conv) == (ids[-1] if ids else 0)
            ends = sorted({1, len(ids) // 2 or 1, len(ids) or 1, len(ids) + 1, len(ids) + 200})
            for first, last in itertools.combinations_with_replacement(ends, 2):
                assert self.index.ids(conv, first, last) == ids[first - 1 : last]
        assert self.index.head(10**6) == 0
        assert self.index.ids(10**6, 1, 100) == []

    def close(self) -> None:
        self.db.close()


def finish(log: Log, indexer: Indexer, kept: Reader | None = None) -> None:
    """Step until there is nothing to do, and check after every step, as seen by a new reader and by ``kept``."""
    more = True
    while more:
        more = indexer.step()
        for reader in (Reader(log), kept):
            if reader is not None:
                reader.check()
                if reader is not kept:
                    reader.close()
    check_idle(log, **{name: getattr(indexer, f"_{name}") for name in ("portion", "fan_in")})


def check_idle(log: Log, portion: int, fan_in: int) -> None:
    """All is indexed and merged that could be, and nothing else is in the file."""
    reader = Reader(log)
    mark = reader.check()
    db = reader.db
    ready = min(rows(db, POSITION)[0][0], rows(db, "SELECT value FROM meta WHERE key = 'folded'")[0][0])
    assert mark <= ready < mark + portion
    runs = reader.index.runs
    assert rows(db, "SELECT count(*) FROM idx.runs") == [(len(runs),)], "runs that are building or dead"
    for table in ("seqs", "cids", "filters"):
        assert {run for (run,) in rows(db, f"SELECT DISTINCT run FROM idx.{table}")} == {run.run for run in runs}
    for level in {run.level for run in runs}:
        assert sum(run.level == level for run in runs) < fan_in
    for newer, older in itertools.pairwise(runs):
        assert older.high <= newer.low
        assert older.level >= newer.level
    assert sum(run.entries for run in runs) == sum(row.id <= mark for row in log.entries)
    reader.close()


def contents(log: Log) -> list[Any]:
    """All that the index says, whatever the numbers of its runs."""
    reader = Reader(log)
    mark = reader.check()
    found = [mark, rows(reader.db, "SELECT * FROM idx.heads ORDER BY conv")]
    found.append([run[1:] for run in reader.index.runs])
    reader.close()
    return found


#: Commits: which conversations get an entry (0: something else takes an id), in which order.
commits = st.lists(st.lists(st.integers(0, 4) | st.just(1), min_size=1, max_size=30), min_size=1, max_size=6)
