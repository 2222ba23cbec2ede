"""The index of the SQLite store: right at every boundary of a slice, whatever happens in between."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import apsw
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chatcore.store.sqlite.index import IDS_PER_ROW, RECORDS_PER_ROW, Index, attach, index_path, rows
from chatcore.store.sqlite.indexer import RESTART_FACTOR, IndexAlarm, Indexer, run

from .index_world import SMALL, Log, Reader, Row, check_idle, commits, contents, finish

#: Enough for four runs of level 0 and two levels of merges, in several conversations; 0: no entry.
CONVS = [1, 2, 1, 0, 3, 1, 1, 2, 4, 0, 1, 1, 1, 2, 3, 3, 0, 0, 1, 2, 2, 1, 1, 4, 1, 1, 1, 1, 2, 3, 4, 1, 1, 2]
DEADLINE_S = 30


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


class Counted(Indexer):
    """Ends the process, as a kill would, before the n-th statement on the index."""

    until = 0

    def _connect(self) -> apsw.Connection:
        db = super()._connect()
        db.exec_trace = self._statement
        return db

    def _statement(self, *_: Any) -> bool:
        self.until -= 1
        if self.until < 0:
            os._exit(1)
        return True


class Limited(Indexer):
    """On a disk that is full when the index has so many pages; 0: it is not."""

    pages = 0

    def _connect(self) -> apsw.Connection:
        db = super()._connect()
        if self.pages:
            rows(db, f"PRAGMA max_page_count = {self.pages}")
        return db


# --- what it says ------------------------------------------------------------
@settings(max_examples=20)
@given(
    script=commits,
    portion=st.integers(2, 12),
    fan_in=st.integers(2, 3),
    slice_rows=st.integers(1, 5),
    reopen=st.booleans(),
)
@example(script=[CONVS], portion=8, fan_in=2, slice_rows=1, reopen=False)
def test_every_answer_is_right_after_every_slice(
    script: list[list[int]], portion: int, fan_in: int, slice_rows: int, reopen: bool
) -> None:
    with TemporaryDirectory() as data:
        log = Log(Path(data))
        indexer = Indexer(log.data, portion=portion, fan_in=fan_in, slice_rows=slice_rows)
        indexer.open()
        kept = Reader(log)
        for convs in script:
            log.append(*convs)
            finish(log, indexer, kept)
            if reopen:
                indexer.close()
        kept.close()
        indexer.close()


@settings(max_examples=10)
@given(script=commits, steps=st.integers(0, 30))
def test_entries_come_while_a_slice_is_being_made(script: list[list[int]], steps: int) -> None:
    with TemporaryDirectory() as data:
        log = Log(Path(data))
        indexer = Indexer(log.data, **SMALL)
        for convs in script:
            log.append(*convs)
            for _ in range(steps):
                indexer.step()
                reader = Reader(log)
                reader.check()
                reader.close()
        finish(log, indexer)
        indexer.close()


def test_rows_of_long_conversations_are_full_and_cut(log: Log) -> None:
    """More entries than a row holds, in slices that end in the middle of a row."""
    log.append(*([1] * 300 + [2] * 5) * 2)
    indexer = Indexer(log.data, portion=150, fan_in=2, slice_rows=2)
    while indexer.step():
        pass
    reader = Reader(log)
    mark = reader.check()
    ids = [row.id for row in log.entries if row.conv == 1 and row.id <= mark]
    for first in range(1, len(ids) + 1, 7):
        for last in (first, first + 1, first + 95, first + 96, first + 250):
            assert reader.index.ids(1, first, last) == ids[first - 1 : last]
    reader.close()
    with apsw.Connection(str(index_path(log.data))) as db:
        assert rows(db, "SELECT max(length(ids)) FROM seqs") == [(8 * IDS_PER_ROW,)]
        assert rows(db, "SELECT max(length(records)) FROM cids") == [(16 * RECORDS_PER_ROW,)]
    indexer.close()


def test_a_run_is_not_made_before_its_marks_are_folded(log: Log) -> None:
    """The tail has what was read; it may drop an entry only when the members' rows have it."""
    log.append(*[1] * 8)
    log.append(*[1] * 30, folded=False)
    indexer = Indexer(log.data, **SMALL)
    finish(log, indexer)
    assert indexer.behind() == 30
    indexer.close()


def test_changes_without_entries_move_the_mark(log: Log) -> None:
    log.append(*[0] * 40)
    indexer = Indexer(log.data, **SMALL)
    finish(log, indexer)
    assert indexer.behind() == 0
    indexer.close()


def test_a_backlog_never_leaves_many_runs(log: Log) -> None:
    """What is built from nothing is merged on the way: look-ups stay cheap."""
    log.append(*[1, 2] * 50)
    indexer = Indexer(log.data, **SMALL)
    indexer.open()
    reader = Reader(log)
    while indexer.step():
        reader.check()
        levels = [run.level for run in reader.index.runs]
        assert all(levels.count(level) <= 2 * SMALL["fan_in"] for level in levels)
    reader.close()
    indexer.close()


def test_the_writer_never_waits_for_the_indexer(log: Log) -> None:
    """BEGIN IMMEDIATE locks each attached file that can be written: the index is attached for reading only."""
    indexer = Indexer(log.data)
    indexer.open()
    other = apsw.Connection(str(index_path(log.data)))
    rows(other, "BEGIN IMMEDIATE")
    rows(other, "UPDATE meta SET value = 1 WHERE key = 'portion'")
    with log.opened() as writer:
        attach(writer, log.data)
        writer.set_busy_timeout(0)
        rows(writer, "BEGIN IMMEDIATE")
        assert Index(writer).refresh() == 0
        rows(writer, "UPDATE main.meta SET value = 2 WHERE key = 'epoch'")
        with pytest.raises(apsw.ReadOnlyError):
            rows(writer, "DELETE FROM idx.heads")
        rows(writer, "COMMIT")
    other.close()
    indexer.close()


# --- the writer's filters ----------------------------------------------------
def test_a_large_filter_is_loaded_by_parts(log: Log) -> None:
    """Until it is log, the filters of the merged runs stand for it: no commit waits for all of it."""
    indexer = Indexer(log.data, portion=100, fan_in=4, slice_rows=50, filter_part_bytes=64)
    log.append(*[1, 2] * 150)
    finish(log, indexer)
    late, reader = Reader(log), Reader(log)
    for _ in range(3 * 3):
        reader.check()
    assert held(reader) == [1, 1, 1]
    log.append(*[1] * 100)
    while len(rows(reader.db, "SELECT 1 FROM idx.runs WHERE state = 1")) < 4:
        indexer.step()
    for _ in range(3):
        reader.check()
    finish(log, indexer)
    for who, before in ((reader, 4), (late, 0)):
        seen = []
        for _ in range(400 * 14 // 8 // 64 + 2):
            who.check()
            seen += held(who)
        assert seen[0] == before
        assert seen[-1] == 1
        assert 4 < seen.count(before) < len(seen)
        who.close()
    indexer.close()


def held(reader: Reader) -> list[int]:
    """How many filters stand for each run."""
    return [len(known) for known in reader.filters._known.values()]


# --- what ends in the middle -------------------------------------------------
def test_a_kill_before_any_statement_changes_nothing_in_the_end(log: Log) -> None:
    filled(log, CONVS[:18])  # two runs, which are merged
    expected = contents(log)
    killed = 0
    for at in range(10_000):
        for path in log.data.glob("index.db*"):
            path.unlink()
        child = os.fork()
        if child == 0:
            counted = Counted(log.data, **SMALL)
            counted.until = at
            while counted.step():
                pass
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        killed += 1
        again = Indexer(log.data, **SMALL)
        again.open()
        reader = Reader(log)
        reader.check()
        while again.step():
            pass
        assert contents(log) == expected
        check_idle(log, SMALL["portion"], SMALL["fan_in"])
        reader.close()
        again.close()
    assert killed > 50


def test_a_full_disk_stops_nothing_but_the_index(log: Log) -> None:
    indexer = Limited(log.data, portion=100, fan_in=2, slice_rows=20)
    log.append(*CONVS * 20)
    for _ in range(12):
        indexer.step()
    for more in range(5):  # pages: it is full at another place each time
        log.append(*CONVS * 60)
        with apsw.Connection(str(index_path(log.data))) as db:
            indexer.pages = db.pragma("page_count") + more
        indexer.close()
        with pytest.raises(apsw.FullError):
            while indexer.step():
                pass
        reader = Reader(log)
        assert reader.check() < log.counter - 100
        reader.close()
    indexer.pages = 0
    indexer.close()
    while indexer.step():
        pass
    check_idle(log, portion=100, fan_in=2)
    indexer.close()


def test_the_loop_goes_on_when_the_disk_has_room_again(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    log.append(*CONVS * 20)
    indexer = Limited(log.data, portion=100, fan_in=2, slice_rows=20)
    indexer.open()
    indexer.close()
    indexer.pages = 1
    beats = 0
    deadline = time.monotonic() + DEADLINE_S

    def beat() -> None:
        nonlocal beats
        beats += 1

    def stopping() -> bool:
        if len(caplog.records) >= 2:
            indexer.pages = 0
        reader = Reader(log)
        done = reader.check() + 100 > log.counter
        reader.close()
        return done or time.monotonic() > deadline

    run(indexer, beat=beat, stopping=stopping)
    assert time.monotonic() < deadline
    assert beats > 20
    assert "next try in" in caplog.text
    finish(log, indexer)
    indexer.close()


# --- whether it is of this log -----------------------------------------------
def filled(log: Log, convs: list[int]) -> None:
    log.append(*convs)
    indexer = Indexer(log.data, **SMALL)
    finish(log, indexer)
    indexer.close()


def backup(log: Log, to: Path) -> None:
    with log.opened() as db:
        db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    shutil.copytree(log.data, to)


@pytest.mark.parametrize("convs", [[], [2] * 3, [2] * 60, [0] * 60])
def test_a_log_that_was_restored_gets_a_new_index(tmp_path: Path, convs: list[int]) -> None:
    """Also when it has gone on since then, beyond where the index is."""
    log = Log(tmp_path)
    filled(log, CONVS)
    backup(log, tmp_path / "backup")
    counter = log.counter
    filled(log, CONVS)
    shutil.copy(tmp_path / "backup" / "chatcore.db", tmp_path / "chatcore.db")
    log.restored(counter)
    kept = Reader(log)  # as of a worker that was there before
    if convs:
        log.append(*convs)
    indexer = Indexer(log.data, **SMALL)
    indexer.open()
    finish(log, indexer, kept)
    kept.close()
    indexer.close()


def test_a_log_that_lost_only_changes_of_rows_gets_a_new_index(tmp_path: Path) -> None:
    """The newest entry is the same, but ids up to the mark will be given again."""
    log = Log(tmp_path)
    filled(log, [1] * 12)
    backup(log, tmp_path / "backup")
    filled(log, [0] * 20)
    shutil.copy(tmp_path / "backup" / "chatcore.db", tmp_path / "chatcore.db")
    log.restored(12)
    indexer = Indexer(log.data, **SMALL)
    indexer.open()
    log.append(*[1] * 30)
    finish(log, indexer)
    indexer.close()


def test_the_index_of_another_store_is_made_anew(tmp_path: Path) -> None:
    logs = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        logs.append(Log(tmp_path / name))
        filled(logs[-1], CONVS)
    one, other = logs
    shutil.copy(index_path(other.data), index_path(one.data))
    indexer = Indexer(one.data, **SMALL)
    indexer.open()
    assert indexer.behind() == one.counter
    finish(one, indexer)
    indexer.close()


def test_an_index_that_is_of_this_log_is_kept(log: Log) -> None:
    filled(log, CONVS)
    indexer = Indexer(log.data, **SMALL)
    indexer.open()
    assert indexer.behind() < SMALL["portion"]
    indexer.close()


@pytest.mark.parametrize("at", [0, 4096])
def test_a_damaged_index_is_made_anew_in_its_file(log: Log, at: int) -> None:
    filled(log, CONVS)
    path = index_path(log.data)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\xff" * (path.stat().st_size - at))
    inode = path.stat().st_ino
    indexer = Indexer(log.data, **SMALL)
    log.append(*CONVS)
    for _ in range(2):
        try:
            indexer.step()
        except (apsw.CorruptError, apsw.NotADBError):
            continue
    finish(log, indexer)
    assert path.stat().st_ino == inode
    indexer.close()


def test_damage_that_is_met_later_ends_in_a_new_index(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    """The first pages are good, so it is opened; a merge then meets the rest. Who has it open goes on with the new."""
    log.append(*CONVS * 8)
    indexer = Indexer(log.data, portion=64, fan_in=8, slice_rows=50)
    finish(log, indexer)
    indexer.close()
    with apsw.Connection(str(index_path(log.data))) as db:
        ((root,),) = rows(db, "SELECT rootpage FROM sqlite_schema WHERE name = 'cids'")
    kept = Reader(log)
    kept.check()
    with open(index_path(log.data), "r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(b"\xff" * 4096)
    indexer = Indexer(log.data, portion=64, fan_in=2, slice_rows=50)
    with pytest.raises(apsw.CorruptError):
        while indexer.step():
            pass
    finish(log, indexer, kept)
    kept.close()
    indexer.close()


# --- alarms ------------------------------------------------------------------
@pytest.mark.parametrize("seq", [3, 4, 6, 7])
@pytest.mark.parametrize("later", [False, True])
def test_a_log_that_is_not_dense_raises_the_alarm_and_is_never_indexed(log: Log, seq: int, later: bool) -> None:
    """A seq that is there already with another id, or that leaves a hole; in one portion or in two."""
    log.append(*[1] * 4, *[2] * 4 * later)
    before = list(log.entries)
    counter = log.counter
    with log.opened() as db:
        log.put(db, Row(counter + 1, 1, seq, 1, "other"))
        if seq == 6:  # the same, but something that is right comes first
            log.put(db, Row(counter + 2, 3, 1, 1, "another"))
    log.append(*[0] * 20)
    indexer = Indexer(log.data, **SMALL)
    with pytest.raises(IndexAlarm, match=f"conversation 1 .*seq {seq}"):
        while indexer.step():
            pass
    assert indexer.alarm is not None
    log.entries = before
    while indexer.step():
        pass
    reader = Reader(log)
    assert reader.check() == (8 if later else 0)
    reader.close()
    indexer.close()


def test_after_an_alarm_the_loop_goes_on_without_indexing(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    log.append(*[1] * 4)
    with log.opened() as db:
        log.put(db, Row(5, 1, 4, 1, "other"))
    log.append(*[0] * 40)
    indexer = Indexer(log.data, **SMALL)
    turns = iter(range(8 + 5))
    run(indexer, beat=lambda: None, stopping=lambda: indexer.alarm is not None and next(turns, None) is None)
    assert [record.levelno for record in caplog.records if record.levelno >= logging.ERROR] == [logging.CRITICAL]


def test_a_second_indexer_is_an_alarm(log: Log) -> None:
    log.append(*CONVS)
    one, other = Indexer(log.data, **SMALL), Indexer(log.data, **SMALL)
    one.open()
    one.step()
    finish(log, other)
    with pytest.raises(IndexAlarm):
        while one.step():
            pass
    other.open()  # deletes what the first one left
    finish(log, other)
    one.close()
    other.close()


# --- checkpoints -------------------------------------------------------------
def test_pages_of_the_log_are_moved_when_there_are_enough(log: Log) -> None:
    indexer = Indexer(log.data, checkpoint_pages=20)
    indexer.open()
    with log.opened() as writer:

        def waiting() -> int:
            pages, moved = writer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
            return pages - moved

        while waiting() < 20:
            assert not indexer.step()
            log.append(*[1] * 20)
        assert indexer.step()
        assert waiting() == 0
        assert not indexer.step()
        # A reader on an old snapshot keeps the pages after it where they are; the indexer does not turn on the spot.
        with log.opened(write=False) as reader:
            rows(reader, "BEGIN")
            rows(reader, "SELECT count(*) FROM entries")
            while waiting() < 20:
                log.append(*[1] * 20)
            while indexer.step():
                pass
            assert waiting() >= 20
            rows(reader, "COMMIT")
        assert indexer.step()
        assert waiting() == 0
    indexer.close()


def test_the_own_wal_does_not_grow(log: Log) -> None:
    """Also when somebody always reads."""
    indexer = Indexer(log.data, **SMALL, index_checkpoint_pages=20)
    indexer.open()
    done = threading.Event()

    def read() -> None:
        reader = Reader(log)
        while not done.is_set():
            rows(reader.db, "BEGIN")
            reader.index.refresh()
            done.wait(0.001)
            rows(reader.db, "COMMIT")
        reader.close()

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            log.append(*CONVS)
            while indexer.step():
                pass
        pages = Path(f"{index_path(log.data)}-wal").stat().st_size // 4096
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert pages < 20 * RESTART_FACTOR * 3
    reader = Reader(log)
    reader.check()
    reader.close()
    indexer.close()
