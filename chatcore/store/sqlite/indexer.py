"""The indexer: the process that makes the index follow the log, and moves pages out of the log's WAL.

All work is cut into slices, each of them one transaction on the index that writes a bounded number of rows:

- A *portion* of the log, the next values of the change counter, becomes a run of level 0.
- When a level has some runs (``fan_in``), they are merged into one of the next level.
- The runs that were merged are deleted.

What is being made is invisible until it is whole. One transaction makes a run live and, with it, moves the mark or
retires what was merged. Whatever happens before that leaves an unfinished run, which the next start deletes.

The log is believed to be dense (docs/log.md, "Dense, once"). Where it is not, or says other than the index, something
is broken that no retry repairs: the indexer raises :class:`IndexAlarm` and indexes no more.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import logging
import struct
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import apsw

from ..._fast.runs import Filter, Portion, sort_records
from ...common.backoff import Backoff
from . import schema
from .index import (
    BUILDING,
    DAMAGED,
    DEAD,
    ID_BYTES,
    IDS_PER_ROW,
    LIVE,
    RECORD_BYTES,
    RECORDS_PER_ROW,
    Run,
    cid_secret,
    connect,
    live_runs,
    make,
    meta,
    rows,
    transaction,
)

log = logging.getLogger("chatcore.store")

#: Without work, the loop looks for some so often.
POLL_S: Final = 0.1
#: So few pages of the log's WAL are left to the writer, which moves a little more.
FEW_PAGES: Final = 128
#: Pauses after a failure of the disk.
RETRY_FIRST_S: Final = 0.1
RETRY_MOST_S: Final = 5.0
#: When the WAL of the index has grown to so many times what is moved at once, as somebody always reads, the indexer
#: waits for the readers, and not long.
RESTART_FACTOR: Final = 8
RESTART_BUSY_MS: Final = 50
#: Work that adds a run to a level waits while the level has so many times `fan_in`: merging goes first then.
MOST_FAN_IN: Final = 2
#: Keys of the cids are signed and have 64 bits.
KEY_MIN: Final = -(2**63)
KEY_MAX: Final = 2**63 - 1


class Table(NamedTuple):
    """A table of the runs: the columns of its key after ``run``, that of its data, and the bytes of an entry there."""

    name: str
    key: str
    data: str
    entry_bytes: int


SEQS: Final = Table("seqs", "conv, first", "ids", ID_BYTES)
CIDS: Final = Table("cids", "first", "records", RECORD_BYTES)
FILTERS: Final = Table("filters", "part", "bits", 1)

_ENTRIES: Final = "SELECT id, conv, seq, sender, cid FROM entries WHERE id > ? AND id <= ?"
_HEAD: Final = """
INSERT INTO heads(conv, id, seq) VALUES (?1, ?2, ?3)
ON CONFLICT(conv) DO UPDATE SET id = excluded.id, seq = excluded.seq WHERE seq = ?4 - 1
"""
# The row before `low` may reach beyond it.
_RECORDS: Final = """
SELECT records FROM cids WHERE run = ?1 AND first <= ?3
AND first >= coalesce((SELECT max(first) FROM cids WHERE run = ?1 AND first < ?2), ?2)
"""

Place = tuple[int, int, bytes]
#: The last entry of a conversation in a portion, and the first: (conv, id, seq, first seq).
Head = tuple[int, int, int, int]
Work = Iterator[None]


class IndexAlarm(Exception):
    """The log, or what the index says of it, cannot be: an entry is missing, or a seq was given twice."""


def digest_at(log: apsw.Connection, mark: int) -> bytes:
    """What the newest entry up to the mark is, to tell whether it is still the same log; empty: there is none."""
    found = rows(log, "SELECT id, conv, seq, cid, digest FROM entries WHERE id <= ? ORDER BY id DESC LIMIT 1", (mark,))
    if not found:
        return b""
    ((id, conv, seq, cid, digest),) = found
    text = cid.encode()
    return hashlib.blake2b(struct.pack("<qqqq", id, conv, seq, len(text)) + text + digest, digest_size=16).digest()


class Indexer:
    """The writing side of the index of one data directory.

    :param portion: of the change counter; a run of level 0 covers so much.
    :param fan_in: so many runs of one level are merged into one of the next.
    :param slice_rows: rows that one step reads of the log, or writes to the index, at most.
    :param checkpoint_pages: pages in the WAL of the log that are to be moved at once.
    :param index_checkpoint_pages: the same for the WAL of the index. Its file is synced then, so it is not much.
    :param filter_part_bytes: a filter is written in such parts, for a blob is read and written as a whole.

    After any error it is closed. The next :meth:`step` opens it again and begins anew what was not finished.
    """

    def __init__(
        self,
        data: Path,
        *,
        portion: int = 65_536,
        fan_in: int = 4,
        slice_rows: int = 2_000,
        checkpoint_pages: int = 4_000,
        index_checkpoint_pages: int = 1_000,
        filter_part_bytes: int = 1024 * 1024,
    ) -> None:
        self._data = data
        self._portion = portion
        self._fan_in = fan_in
        self._slice_rows = slice_rows
        self._checkpoint_pages = checkpoint_pages
        self._index_checkpoint_pages = index_checkpoint_pages
        self._filter_part_bytes = filter_part_bytes
        #: Pages in the WAL of the index at which the readers are waited for.
        self._restart_pages = index_checkpoint_pages * RESTART_FACTOR
        #: The log and the index, while they are open.
        self._files: list[apsw.Connection] = []
        self._secret = b""
        self._mark = 0
        self._live: list[Run] = []  # oldest first
        self._dead: list[int] = []
        #: Work that has begun, by the level of the run that it makes.
        self._making: dict[int, Work] = {}
        self._deleting: Work | None = None
        #: Why there will be no more indexing; None: all is well.
        self.alarm: str | None = None
        #: The last failure was a damaged file: look whether it is the index.
        self._damaged = False

    # --- opening ---------------------------------------------------------
    def open(self) -> None:
        """Open both files. An index that is missing, damaged, or not of this log becomes an empty one.

        :raises apsw.Error: as SQLite says; also when there is no log.
        """
        self.close()
        try:
            self._files.append(schema.connect(schema.database_path(self._data), write=False))
            known = dict(rows(self._log, "SELECT key, value FROM meta"))
            self._secret = cid_secret(known["secret"])
            self._files.append(self._connect())
            if not self._is_of(known["store_id"]):
                make(self._db, known["store_id"])
            # Commits are not synced: a power failure costs some runs, which are made again. (It needs a sound file.)
            rows(self._db, "PRAGMA synchronous = NORMAL; PRAGMA temp_store = MEMORY")
            with transaction(self._db):
                self._changed("REPLACE INTO meta VALUES ('portion', ?)", (self._portion,))
                self._changed("UPDATE runs SET state = ? WHERE state = ?", (DEAD, BUILDING))
            self._look()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> apsw.Connection:
        return connect(self._data)

    def _is_of(self, store_id: str) -> bool:
        """The index has been made from this log, in the state that it has now."""
        found = meta(self._db, check=self._damaged)
        if not found:
            return False
        if found["store_id"] != store_id:
            log.warning("the index is of another store: it is made anew")
            return False
        mark = found["mark"]
        if self._position() < mark or digest_at(self._log, mark) != found["digest"]:
            log.warning("the log is not the one that was indexed (restored from a backup?): the index is made anew")
            return False
        return True

    def _look(self) -> None:
        """Learn which runs there are."""
        self._mark = rows(self._db, "SELECT value FROM meta WHERE key = 'mark'")[0][0]
        self._live = live_runs(self._db, "runs")
        self._dead = [run for (run,) in rows(self._db, "SELECT run FROM runs WHERE state = ?", (DEAD,))]

    def close(self) -> None:
        """Close both files. Work that is not finished is lost."""
        self._making.clear()
        self._deleting = None
        for db in self._files:
            try:
                db.close(True)
            except apsw.Error as exc:
                log.warning("closing a file of the store: %s", exc)
        self._files = []

    @property
    def _log(self) -> apsw.Connection:
        return self._files[0]

    @property
    def _db(self) -> apsw.Connection:
        return self._files[1]

    # --- what to do next -------------------------------------------------
    def behind(self) -> int:
        """How far the mark is behind the change counter: at least as many entries as are not indexed."""
        return self._position() - self._mark

    def _position(self) -> int:
        return int(rows(self._log, schema.POSITION)[0][0])

    def step(self) -> bool:
        """Do one slice of work, or nothing; False: there is nothing to do now.

        :raises apsw.Error: as SQLite says. Nothing that was not finished is to be seen.
        :raises IndexAlarm: once; there will be no more indexing.
        """
        try:
            if not self._files:
                self.open()
                return True
            if self._checkpoint_log():
                return True
            if self.alarm is not None or (work := self._work()) is None:
                return False
            next(work, None)
            self._checkpoint_index()
            return True
        except (IndexAlarm, apsw.ConstraintError) as exc:  # the latter: something is there already
            self.close()
            self.alarm = str(exc)
            raise IndexAlarm(self.alarm) from exc
        except BaseException as exc:
            self.close()
            self._damaged = isinstance(exc, DAMAGED)
            raise

    def _work(self) -> Work | None:
        """What is most urgent.

        New runs come before merges, and small merges before large ones: what is not indexed is in the memory of each
        process. But a level that has too many runs gets no more, for each costs every look-up.
        """
        most = self._fan_in * MOST_FAN_IN
        if len(self._dead) < most:
            runs = [0] * (2 + max((run.level for run in self._live), default=-1))
            for run in self._live:
                runs[run.level] += 1
            for level in range(len(runs)):
                if runs[level] < most and (work := self._making.get(level) or self._begin(level, runs)):
                    self._making[level] = work
                    return work
        if self._deleting is None and self._dead:
            self._deleting = self._delete(self._dead[0])
        return self._deleting

    def _begin(self, level: int, runs: list[int]) -> Work | None:
        """Begin to make a run of a level, if it is time."""
        if level > 0:
            return self._merge(level) if runs[level - 1] >= self._fan_in else None
        until = self._mark + self._portion
        # Marks that were read or sent are in the tail until they are folded: the index may not pass them.
        ready = f"SELECT min(({schema.POSITION}), (SELECT value FROM meta WHERE key = 'folded'))"
        return self._index(until) if rows(self._log, ready)[0][0] >= until else None

    # --- making runs -----------------------------------------------------
    def _index(self, high: int) -> Work:
        """Make a run of the log from the mark up to `high`, and move the mark."""
        low = self._mark
        portion = Portion(self._secret)
        for at in range(low, high, self._slice_rows):
            portion.add(self._read(at, min(at + self._slice_rows, high)))
            yield
        heads: dict[int, Head] = {}
        run = Run(0, 0, low, high, len(portion))
        if run.entries:
            run = yield from self._fill(run, self._places(portion, heads), self._cut(portion))
        count = "SELECT count(*) FROM entries WHERE id > ? AND id <= ?"
        ((entries,),) = rows(self._log, count, (low, high))
        if entries != run.entries:
            raise IndexAlarm(f"the log has {entries} entries after {low} up to {high}, the index {run.entries}")
        with transaction(self._db):
            before = self._db.total_changes()
            self._db.executemany(_HEAD, heads.values())
            if self._db.total_changes() - before != len(heads):
                self._report(heads)
            self._set_mark(low, high)
            self._publish(run)
        self._finished(0)

    def _set_mark(self, low: int, high: int) -> None:
        """Move the mark, inside the transaction that makes the run live."""
        mark = "UPDATE meta SET value = ? WHERE key = 'mark' AND value = ?"
        if self._changed(mark, (high, low)) != 1:
            raise IndexAlarm(f"the mark is not at {low}: another process writes the index, too")
        self._changed("UPDATE meta SET value = ? WHERE key = 'digest'", (digest_at(self._log, high),))

    def _publish(self, run: Run, parts: Iterable[Run] = ()) -> None:
        """Make a run live and retire what was merged into it, inside a transaction."""
        states = [(DEAD, part.run, LIVE) for part in parts]
        if run.entries:
            states.append((LIVE, run.run, BUILDING))
        for state in states:
            if self._changed("UPDATE runs SET state = ? WHERE run = ? AND state = ?", state) != 1:
                raise IndexAlarm(f"run {state[1]} is not there: another process writes the index, too")
        self._changed("UPDATE meta SET value = value + 1 WHERE key = 'generation'", ())

    def _changed(self, sql: str, args: tuple[Any, ...]) -> int:
        """Run a statement; how many rows it changed."""
        rows(self._db, sql, args)
        return self._db.changes()

    def _finished(self, level: int) -> None:
        del self._making[level]
        self._look()

    def _read(self, low: int, high: int) -> Iterable[Any]:
        """The entries with an id in (low, high]."""
        return self._log.execute(_ENTRIES, (low, high))

    @staticmethod
    def _places(portion: Portion, heads: dict[int, Head]) -> Iterator[Place]:
        """The ids by conversation and seq; notes the last entry of each conversation, and its first seq here."""
        try:
            for place in portion.places(IDS_PER_ROW):
                conv, first, ids = place
                last = first + len(ids) // ID_BYTES - 1
                id = int.from_bytes(ids[-ID_BYTES:], "little", signed=True)
                heads[conv] = (conv, id, last, heads[conv][3] if conv in heads else first)
                yield place
        except ValueError as exc:
            raise IndexAlarm(str(exc)) from None

    def _cut(self, portion: Portion) -> Iterator[bytes]:
        """The records of the cids, by slices."""
        records = portion.records()
        size = self._slice_rows * RECORDS_PER_ROW * RECORD_BYTES
        for at in range(0, len(records), size):
            yield records[at : at + size]

    def _report(self, heads: dict[int, Head]) -> None:
        """Raise the alarm for a conversation that does not go on where the index ended."""
        for conv, id, _, first in heads.values():
            ((head, seq),) = rows(self._db, "SELECT id, seq FROM heads WHERE conv = ?", (conv,))
            if head != id:
                raise IndexAlarm(f"conversation {conv} goes on with seq {first} after {seq} (id {head})")
        raise IndexAlarm("the heads of conversations were not written")

    def _merge(self, level: int) -> Work:
        """Make a run of the oldest runs of the level below, and retire these."""
        parts = [run for run in self._live if run.level == level - 1][: self._fan_in]
        entries = sum(run.entries for run in parts)
        whole = Run(0, level, parts[0].low, parts[-1].high, entries)
        run = yield from self._fill(whole, self._merged_places(parts), self._merged_cids(parts, entries))
        with transaction(self._db):
            self._publish(run, parts)
        self._finished(level)

    def _merged_places(self, parts: list[Run]) -> Iterator[Place]:
        at = expected = (KEY_MIN, KEY_MIN)
        sql = "SELECT conv, first, ids FROM seqs WHERE run = ? AND (conv, first) > (?, ?) ORDER BY conv, first"
        while True:
            # No cursor stays open while the caller writes.
            sources = [self._db.execute(sql, (part.run, *at)) for part in parts]
            found: list[Place] = list(itertools.islice(heapq.merge(*sources), self._slice_rows))
            del sources
            if not found:
                return
            at = found[-1][:2]
            for conv, group in itertools.groupby(found, key=lambda row: row[0]):
                places = list(group)
                for _, first, ids in places:
                    if expected[0] == conv and expected[1] != first:
                        raise IndexAlarm(f"conversation {conv} has seq {first} after {expected[1] - 1} in the index")
                    expected = (conv, first + len(ids) // ID_BYTES)
                ids = b"".join(place[2] for place in places)
                for i in range(0, len(ids), IDS_PER_ROW * ID_BYTES):
                    yield conv, places[0][1] + i // ID_BYTES, ids[i : i + IDS_PER_ROW * ID_BYTES]

    def _merged_cids(self, parts: list[Run], entries: int) -> Iterator[bytes]:
        # The keys are hashes: equal ranges of them have about as many.
        ranges = entries // (self._slice_rows * RECORDS_PER_ROW) + 1
        width = (KEY_MAX - KEY_MIN) // ranges + 1
        for low in range(KEY_MIN, KEY_MAX + 1, width):
            high = min(low + width - 1, KEY_MAX)
            found = (row[0] for part in parts for row in self._db.execute(_RECORDS, (part.run, low, high)))
            yield sort_records(b"".join(found), low, high)

    def _fill(self, run: Run, places: Iterator[Place], cids: Iterator[bytes]) -> Generator[None, None, Run]:
        """Write a run that is invisible yet, and count what is in the file then; returns it with its number."""
        with transaction(self._db):
            ((number,),) = rows(
                self._db,
                "INSERT INTO runs(level, low, high, entries, state) VALUES (?, ?, ?, ?, ?) RETURNING run",
                (*run[1:], BUILDING),
            )
        while some := [(number, *place) for place in itertools.islice(places, self._slice_rows)]:
            with transaction(self._db):
                self._db.executemany("INSERT INTO seqs(run, conv, first, ids) VALUES (?, ?, ?, ?)", some)
            yield
        keys = Filter(run.entries)
        for records in cids:
            size = RECORDS_PER_ROW * RECORD_BYTES
            pieces = (records[at : at + size] for at in range(0, len(records), size))
            with transaction(self._db):
                self._db.executemany(
                    "INSERT INTO cids(run, first, records) VALUES (?, ?, ?)",
                    ((number, int.from_bytes(piece[:8], "little", signed=True), piece) for piece in pieces),
                )
            keys.add_records(records)
            yield
        bits = keys.dump()
        for part, at in enumerate(range(0, len(bits), self._filter_part_bytes)):
            row = (number, part, bits[at : at + self._filter_part_bytes])
            with transaction(self._db):
                self._changed("INSERT INTO filters(run, part, bits) VALUES (?, ?, ?)", row)
            yield
        for table in (SEQS, CIDS):
            found = yield from self._count(number, table)
            if found != run.entries:
                raise IndexAlarm(f"run {number} has {found} entries in {table.name}, of {run.entries}")
        return run._replace(run=number)

    def _count(self, number: int, table: Table) -> Generator[None, None, int]:
        """The entries of a run in one of its tables."""
        entries = 0
        at: tuple[int, ...] = (KEY_MIN,) * len(table.key.split(","))
        sql = (
            f"SELECT {table.key}, length({table.data}) FROM {table.name}"
            f" WHERE run = ? AND ({table.key}) > ({', '.join('?' * len(at))}) ORDER BY {table.key} LIMIT ?"
        )
        while found := rows(self._db, sql, (number, *at, self._slice_rows)):
            entries += sum(row[-1] for row in found) // table.entry_bytes
            at = found[-1][:-1]
            yield
        return entries

    # --- deleting and moving ---------------------------------------------
    def _delete(self, number: int) -> Work:
        """Delete a dead run."""
        for table, most in ((SEQS, self._slice_rows), (CIDS, self._slice_rows), (FILTERS, 1)):
            which = f"FROM {table.name} WHERE run = ?"
            next_after = f"SELECT {table.key} {which} ORDER BY {table.key} LIMIT 1 OFFSET ?"
            rest: list[Any] = [()]
            while rest:
                rest = rows(self._db, next_after, (number, most))
                with transaction(self._db):
                    if rest:
                        until = f"({table.key}) < ({', '.join('?' * len(rest[0]))})"
                        self._changed(f"DELETE {which} AND {until}", (number, *rest[0]))
                    else:
                        self._changed(f"DELETE {which}", (number,))
                yield
        with transaction(self._db):
            self._changed("DELETE FROM runs WHERE run = ?", (number,))
        self._dead.remove(number)
        self._deleting = None

    def move_pages(self) -> None:
        """Checkpoint the log although the index cannot be used, so that the writer need not."""
        with contextlib.suppress(apsw.Error, OSError):
            db = schema.connect(schema.database_path(self._data), write=False)
            try:
                pages, _ = db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
                if pages >= self._checkpoint_pages:
                    db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            finally:
                db.close()

    def _checkpoint_log(self) -> bool:
        """Move pages from the WAL of the log into its file, if there are enough; False: none were moved.

        Commits go on meanwhile, so some pages stay. They are fewer with each time, until the writer moves the last.
        """
        pages, moved = self._log.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
        if pages < self._checkpoint_pages or pages - moved <= min(FEW_PAGES, pages // 8):
            return False
        try:
            _, now_moved = self._log.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.BusyError:
            return False  # the writer does
        return now_moved > moved

    def _checkpoint_index(self) -> None:
        """The same for the index, where nobody else writes: its WAL begins again from the front each time."""
        pages, moved = self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
        if pages - moved < self._index_checkpoint_pages:
            return
        restart = pages >= self._restart_pages
        try:
            if restart:
                self._restart_pages = pages + self._index_checkpoint_pages
                self._db.set_busy_timeout(RESTART_BUSY_MS)
                self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
                self._restart_pages = self._index_checkpoint_pages * RESTART_FACTOR
            else:
                self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.BusyError:
            pass  # a reader is on an old snapshot: next time
        finally:
            self._db.set_busy_timeout(schema.BUSY_TIMEOUT_MS)


def run(indexer: Indexer, *, beat: Callable[[], None], stopping: Callable[[], bool]) -> None:
    """Index until the process is to stop.

    A failure of the disk is logged, and tried again after a pause. After an alarm there is no more indexing, and the
    rest (the checkpoints of the log) goes on.

    :param beat: called before each slice, and some times a second without any.
    :param stopping: asked as often.
    """
    pauses = Backoff(RETRY_FIRST_S, RETRY_MOST_S)
    resume_at = 0.0
    try:
        while not stopping():
            beat()
            worked = False
            if time.monotonic() >= resume_at:
                try:
                    worked = indexer.step()
                    pauses.reset()
                except IndexAlarm as exc:
                    log.critical("the index or the log is broken, and there is no more indexing: %s", exc)
                except (apsw.Error, OSError) as exc:
                    pause = pauses.next()
                    log.error("indexing failed, next try in %.1f s: %s", pause, exc)
                    resume_at = time.monotonic() + pause
                    indexer.move_pages()
            if not worked:
                time.sleep(POLL_S)
    finally:
        indexer.close()
