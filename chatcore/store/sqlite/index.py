"""The index of the log: where the entries of a conversation are, and which entry may have a cid.

It is a file of its own beside the log (``index.db``), which one process writes (:mod:`.indexer`) and which can be made
anew from the log at any time. It lags: it covers the log up to its *mark*, a value of the change counter, and what is
behind that is in memory (:mod:`.tail`). It holds no text.

The index is made of *runs*. A run covers a range of the change counter, and has the entries of that range in two
orders: by conversation and seq (``seqs``), and by a keyed hash of the cid (``cids``, with a Bloom filter). Runs never
change; several of one level are merged into one of the next level, which replaces them in one transaction. So an entry
is written once for each level, in order, however large the file is, and a look-up asks few runs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import apsw

from ..._fast.runs import Filter, any_has, find_ids
from ...common.files import make_private
from .schema import BUSY_TIMEOUT_MS

log = logging.getLogger("chatcore.store")

FILE_NAME: Final = "index.db"
#: Of the tables. An index of another format is made anew.
FORMAT: Final = 1
#: Ids in a row of ``seqs``, and records in a row of ``cids``, at most: no row needs an overflow page.
IDS_PER_ROW: Final = 96
RECORDS_PER_ROW: Final = 60
ID_BYTES: Final = 8
RECORD_BYTES: Final = 16
#: States of a run: being written, in use, to be deleted.
BUILDING: Final = 0
LIVE: Final = 1
DEAD: Final = 2

#: What SQLite says of a damaged file.
DAMAGED: Final = (apsw.CorruptError, apsw.NotADBError)

# `generation` changes with each change of the live runs. Its high half is drawn when the file is made: runs of a file
# that was made anew are never taken for those that had the same numbers.
DDL: Final = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE runs(
  run INTEGER PRIMARY KEY AUTOINCREMENT, level INTEGER NOT NULL, low INTEGER NOT NULL, high INTEGER NOT NULL,
  entries INTEGER NOT NULL, state INTEGER NOT NULL
);
CREATE TABLE seqs(
  run INTEGER NOT NULL, conv INTEGER NOT NULL, first INTEGER NOT NULL, ids BLOB NOT NULL, PRIMARY KEY(run, conv, first)
) WITHOUT ROWID;
CREATE TABLE cids(
  run INTEGER NOT NULL, first INTEGER NOT NULL, records BLOB NOT NULL, PRIMARY KEY(run, first)
) WITHOUT ROWID;
CREATE TABLE heads(conv INTEGER PRIMARY KEY, id INTEGER NOT NULL, seq INTEGER NOT NULL);
CREATE TABLE filters(run INTEGER NOT NULL, part INTEGER NOT NULL, bits BLOB NOT NULL, PRIMARY KEY(run, part));
"""
_STATE: Final = (
    "SELECT (SELECT value FROM idx.meta WHERE key = 'mark'), (SELECT value FROM idx.meta WHERE key = 'generation')"
)
# Newest run first, without a sorter: the caller stops when it has enough. A row with `first` begins at most so far
# before it.
_IDS: Final = f"""
WITH live(run) AS (VALUES {{runs}})
SELECT s.run, s.first, s.ids FROM live CROSS JOIN idx.seqs s
WHERE s.run = live.run AND s.conv = ?1 AND s.first BETWEEN ?2 - {IDS_PER_ROW - 1} AND ?3
"""
_RECORDS: Final = "SELECT first, records FROM idx.cids WHERE run = ? AND first <= ? ORDER BY first DESC"


class Run(NamedTuple):
    """A live run: it has the entries with an id in (low, high]."""

    run: int
    level: int
    low: int
    high: int
    entries: int


def live_runs(db: apsw.Connection, table: str) -> list[Run]:
    """The live runs, oldest first."""
    sql = f"SELECT run, level, low, high, entries FROM {table} WHERE state = ? ORDER BY low"
    return [Run(*row) for row in rows(db, sql, (LIVE,))]


def index_path(data: Path) -> Path:
    """Where the index of a data directory is."""
    return data / FILE_NAME


def cid_secret(secret: bytes) -> bytes:
    """The key of :func:`~chatcore._fast.runs.key_of` for a store."""
    return hashlib.blake2b(secret, digest_size=16, person=b"cid-index").digest()


def rows(db: apsw.Connection, sql: str, args: Sequence[Any] = ()) -> list[Any]:
    """Run a statement to its end; its rows."""
    return db.execute(sql, args).fetchall()


@contextmanager
def transaction(db: apsw.Connection) -> Iterator[None]:
    """A write transaction around a block: all of it is committed, or nothing."""
    rows(db, "BEGIN IMMEDIATE")
    try:
        yield
        rows(db, "COMMIT")
    except BaseException:
        if db.in_transaction:  # a full disk has ended it already
            rows(db, "ROLLBACK")
        raise


def connect(data: Path) -> apsw.Connection:
    """Open the index for its only writer; the file is made if it is missing, without tables.

    :raises apsw.Error: as SQLite says.
    """
    make_private(index_path(data))
    db = apsw.Connection(os.fspath(index_path(data)))
    db.set_busy_timeout(BUSY_TIMEOUT_MS)
    db.wal_autocheckpoint(0)
    return db


def meta(db: apsw.Connection, *, check: bool) -> dict[str, Any]:
    """What the index (opened by :func:`connect`) says of itself; nothing if it is of another format, or damaged.

    :param check: look at the whole file for damage, instead of at its first pages.
    :raises apsw.Error: as SQLite says.
    """
    try:
        found = dict(rows(db, "SELECT key, value FROM meta"))
        if found["format"] == FORMAT and not (check and rows(db, "PRAGMA quick_check(1)") != [("ok",)]):
            return found
    except KeyError:
        pass
    except (apsw.SQLError, *DAMAGED) as exc:
        log.info("there is no index that can be used: %s", exc)
    return {}


def make(db: apsw.Connection, store_id: str) -> None:
    """Make the index empty, whatever is in the file.

    This is done in the file, not by another one: processes that have it open go on with what is new.

    :raises apsw.Error: as SQLite says.
    """
    db.config(apsw.SQLITE_DBCONFIG_RESET_DATABASE, 1)
    rows(db, "VACUUM")
    db.config(apsw.SQLITE_DBCONFIG_RESET_DATABASE, 0)
    Path(db.filename).chmod(0o600)  # the files beside it get the same
    rows(db, "PRAGMA journal_mode = WAL")
    with transaction(db):
        rows(db, DDL)
        rows(
            db,
            "INSERT INTO meta VALUES ('format', ?), ('store_id', ?), ('mark', 0), ('digest', x''), ('generation', ?)",
            (FORMAT, store_id, secrets.randbits(30) << 32),
        )


def attach(db: apsw.Connection, data: Path) -> None:
    """Attach the index as ``idx`` to a connection to the log, for reading only.

    As it is read-only, ``BEGIN IMMEDIATE`` on the connection takes no lock on it: the writer never waits for the
    indexer.

    :raises apsw.Error: as SQLite says; also when there is no index yet.
    """
    rows(db, "ATTACH ? AS idx", (f"file:{quote(os.fspath(index_path(data).absolute()))}?mode=ro",))


class Index:
    """Look-ups in the attached index, for one thread.

    All happens inside the caller's transaction, which begins with :meth:`refresh`.
    """

    def __init__(self, db: apsw.Connection) -> None:
        self.db = db
        self.generation = -1
        #: The live runs, newest first.
        self.runs: list[Run] = []
        self._ids = ""

    def refresh(self) -> int:
        """Begin: see the state of the index as of this transaction; returns the mark."""
        ((mark, generation),) = rows(self.db, _STATE)
        if generation != self.generation:
            self.runs = live_runs(self.db, "idx.runs")
            self.runs.reverse()
            self._ids = _IDS.format(runs=", ".join(f"({run.run})" for run in self.runs))
            self.generation = generation
        return int(mark)

    def head(self, conv: int) -> int:
        """The id of the newest indexed entry of a conversation; 0: there is none."""
        found = rows(self.db, "SELECT id FROM idx.heads WHERE conv = ?", (conv,))
        return int(found[0][0]) if found else 0

    def ids(self, conv: int, first: int, last: int) -> list[int]:
        """The ids of the entries with the seqs first to last, ascending, as far as they are indexed."""
        if not self.runs:
            return []
        places: list[tuple[int, bytes]] = []
        newest = 0
        for run, at, ids in self.db.execute(self._ids, (conv, first, last)):
            if run != newest:
                if places and places[-1][0] <= first:
                    break
                newest = run
            places.append((at, ids))
        places.sort()
        found: list[int] = []
        for at, ids in places:
            skip = first + len(found) - at
            if skip < 0:
                break
            found += memoryview(ids).cast("q")[skip : last + 1 - at].tolist()
        return found

    def candidates(self, key: int, runs: Iterable[int] | None = None) -> list[int]:
        """The ids of the entries whose cid has this key; nearly always none or one.

        :param runs: look in these runs only (:meth:`Filters.runs` says which may have it).
        """
        found: list[int] = []
        for run in [run.run for run in self.runs] if runs is None else runs:
            for first, records in self.db.execute(_RECORDS, (run, key)):
                found += find_ids(records, key)
                if first < key:
                    break
        return found


class Filters:
    """The filters of all live runs, in the memory of the writer."""

    def __init__(self) -> None:
        #: Of the index when these were its runs.
        self.generation = -1
        #: What together knows the keys of each live run: its own filter, or until that is loaded those of the runs
        #: that were merged into it. Empty: it is not known which keys it has.
        self._known: dict[Run, list[Filter]] = {}
        #: Runs whose own filter is being loaded, with the parts and the bytes that it has so far.
        self._loading: dict[Run, tuple[Filter, int, int]] = {}
        #: All of them; and whether a run has none yet.
        self._all: list[Filter] = []
        self._unknown = False

    def refresh(self, index: Index) -> None:
        """Follow the live runs, after :meth:`Index.refresh`.

        Never long: a filter may be large, so each call loads one part of one of them.
        """
        if index.generation != self.generation:
            old = self._known if index.generation >> 32 == self.generation >> 32 else {}
            self._known = {run: old.get(run) or self._merged(old, run) for run in index.runs}
            self._loading = {
                run: self._loading.get(run, (Filter(run.entries), 0, 0))
                for run in index.runs
                if run not in old or run in self._loading
            }
            self.generation = index.generation
        if self._loading:
            run, (own, part, at) = next(iter(self._loading.items()))
            found = rows(index.db, "SELECT bits FROM idx.filters WHERE run = ? AND part = ?", (run.run, part))
            for (bits,) in found:
                own.put(at, bits)
                at += len(bits)
            if found and at < own.size:
                self._loading[run] = (own, part + 1, at)
            else:
                del self._loading[run]
                if at == own.size:
                    self._known[run] = [own]
                else:
                    log.error("run %d of the index lacks a part of its filter: keys are looked for in it", run.run)
        self._all = [keys for filters in self._known.values() for keys in filters]
        self._unknown = not all(self._known.values())

    @staticmethod
    def _merged(old: dict[Run, list[Filter]], run: Run) -> list[Filter]:
        """What stands for the filter of a run that was merged from some of the old ones; empty: there is nothing."""
        parts = [part for part in old if run.low <= part.low and part.high <= run.high]
        if sum(part.entries for part in parts) != run.entries or not all(old[part] for part in parts):
            return []
        return [keys for part in parts for keys in old[part]]

    def runs(self, key: int) -> list[int]:
        """The runs that may have the key, for :meth:`Index.candidates`."""
        found: list[int] = []
        for run, filters in self._known.items():
            for keys in filters:
                if key in keys:
                    found.append(run.run)
                    break
            else:
                if not filters:
                    found.append(run.run)
        return found

    @property
    def loading(self) -> bool:
        """Some filters are not in use yet, so that their runs may have any key."""
        return bool(self._loading)

    def __contains__(self, key: int) -> bool:
        """False: no indexed entry has this key."""
        return self._unknown or any_has(self._all, key)
