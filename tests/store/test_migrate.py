"""Folders of schema version 1 become ones of version 2, whatever happens on the way."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import apsw
import pytest

from chatcore.store.sqlite.migrate import CannotMigrate, migrate
from chatcore.store.sqlite.schema import DDL, SCHEMA_VERSION, BrokenStore, database_path, prepare

from .version1 import OldProgram, RefusedByOld, fill

#: Small, so that a small folder has several.
PORTION: Final = 10
UNCHANGED: Final = ("users", "tokens", "revocations", "convs", "members", "blocks", "queue_topics", "queue_messages")
OLD_ENTRIES: Final = """
SELECT id, conv, seq, t, sender, msgs, last_msg, cid, digest, ts, fields FROM entries ORDER BY id
"""
NEW_ENTRIES: Final = """
SELECT e.id, c.id, seq, t, s.id, msgs, last_msg, cid, lower(hex(digest)), ts, fields
FROM entries e LEFT JOIN ids c ON c.n = e.conv LEFT JOIN ids s ON s.n = e.sender ORDER BY e.id
"""

Rows = list[tuple[Any, ...]]


class Interrupted(Exception):
    pass


def rows(path: Path, sql: str) -> Rows:
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        return db.execute(sql).fetchall()
    finally:
        db.close()


def contents(data: Path, entries: str) -> dict[str, Rows]:
    """All that both versions hold, in the words of the old one."""
    path = database_path(data)
    found = {table: rows(path, f"SELECT * FROM {table} ORDER BY 1, 2") for table in UNCHANGED}
    own = "key NOT IN ('epoch', 'folded', 'trimmed')"
    return found | {"entries": rows(path, entries), "meta": rows(path, f"SELECT * FROM meta WHERE {own} ORDER BY key")}


def go(data: Path, progress: Callable[[int, int], None] | None = None) -> None:
    migrate(database_path(data), DDL, SCHEMA_VERSION, progress, portion=PORTION)


def same_as(data: Path, expected: dict[str, Rows]) -> None:
    """The folder is migrated and whole, and nothing is left beside the file."""
    prepare(data)
    assert contents(data, NEW_ENTRIES) == expected
    path = database_path(data)
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    assert rows(path, "PRAGMA user_version") == [(SCHEMA_VERSION,)]
    assert sorted(p.name for p in data.iterdir()) == ["chatcore.db"]


def test_everything_is_there_after_it(tmp_path: Path) -> None:
    fill(tmp_path)
    path = database_path(tmp_path)
    for name in ("write.next", "write.lock"):
        (tmp_path / name).touch()
    before = contents(tmp_path, OLD_ENTRIES)
    assert len(before["entries"]) > 6 * PORTION
    indexes = rows(path, "SELECT name, sql FROM sqlite_schema WHERE tbl_name LIKE 'queue%' ORDER BY name")
    told: list[tuple[int, int]] = []
    prepare(tmp_path, lambda done, total: told.append((done, total)))
    same_as(tmp_path, before)
    assert indexes == rows(path, "SELECT name, sql FROM sqlite_schema WHERE tbl_name LIKE 'queue%' ORDER BY name")
    assert {type(digest) for (digest,) in rows(path, "SELECT digest FROM entries")} == {bytes}
    assert path.stat().st_mode & 0o777 == 0o600
    newest = before["entries"][-1][0]
    assert told[0] == (0, newest) and told[-1] == (newest, newest)
    assert told == sorted(told)


def position(data: Path) -> tuple[int, int, Rows]:
    """The counter of the old program, that of this one, and the row of changes that keeps it."""
    path = database_path(data)
    (old,) = rows(
        path,
        "SELECT max((SELECT max(id) FROM entries), (SELECT max(rev) FROM members), (SELECT max(rev) FROM revocations))",
    )
    go(data)
    prepare(data)
    (folded,) = rows(path, "SELECT value FROM meta WHERE key = 'folded'")
    changes = rows(
        path,
        "SELECT r.id, c.id, u.id, read, msgs FROM row_changes r JOIN ids c ON c.n = conv JOIN ids u ON u.n = user",
    )
    return old[0], folded[0], changes


def test_the_counter_goes_on_after_a_change_of_a_member(tmp_path: Path) -> None:
    fill(tmp_path)
    with OldProgram(tmp_path) as old:
        # Somebody who never sent anything: no entry has brought the user's id.
        late = old.user("late")
        old.by_oneself("lobby-conv-id", late, "member")
    was, folded, changes = position(tmp_path)
    assert folded == was
    assert changes == [(was, "lobby-conv-id", late, None, None)]
    assert rows(database_path(tmp_path), "SELECT key, value FROM meta WHERE key IN ('epoch', 'trimmed')") == [
        ("epoch", 0),
        ("trimmed", 0),
    ]


@pytest.mark.parametrize("newest", ["entry", "revocation"])
def test_the_counter_goes_on_after_anything_else(tmp_path: Path, newest: str) -> None:
    fill(tmp_path)
    with OldProgram(tmp_path) as old:
        if newest == "entry":
            old.send("team-conv-id", "u-Ann", "the newest")
        else:
            old.revoke(None, "u-Eve")
    was, folded, changes = position(tmp_path)
    assert folded == was
    assert changes == []


def test_a_folder_without_a_message_is_migrated(tmp_path: Path) -> None:
    OldProgram(tmp_path).db.close()
    told: list[tuple[int, int]] = []
    prepare(tmp_path, lambda done, total: told.append((done, total)))
    assert set(told) == {(0, 0)}
    assert rows(database_path(tmp_path), "SELECT value FROM meta WHERE key = 'store_id'") == [("an-old-store",)]


def interrupt(at: int) -> Callable[[int, int], None]:
    """Raise when progress is told for the nth time."""
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        told += 1
        if told > at:
            raise Interrupted

    return progress


def tell_into(told: list[int]) -> Callable[[int, int], None]:
    return lambda done, total: told.append(done)


def test_interrupted_anywhere_it_goes_on(tmp_path: Path) -> None:
    """After each portion, and after the last transaction, before the file has its name."""
    (tmp_path / "0").mkdir()
    fill(tmp_path / "0")
    before = contents(tmp_path / "0", OLD_ENTRIES)
    for at in range(1, 100):
        data = tmp_path / str(at)
        shutil.copytree(tmp_path / "0", data)
        try:
            go(data, interrupt(at))
        except Interrupted:
            assert contents(data, OLD_ENTRIES) == before, "the old file is as it was"
        else:
            assert at > 8
            return
        told: list[int] = []
        go(data, tell_into(told))
        copied = min(at * PORTION, len(before["entries"]))
        assert told[0] == (before["entries"][copied - 1][0] if copied else 0), "what was copied is not copied again"
        same_as(data, before)
    raise AssertionError("it never came to its end")


def test_killed_anywhere_it_goes_on(tmp_path: Path) -> None:
    """In one and the same folder, again and again, a portion further each time."""
    fill(tmp_path)
    before = contents(tmp_path, OLD_ENTRIES)
    for _ in range(100):
        pid = os.fork()
        if not pid:
            told = 0

            def progress(done: int, total: int) -> None:
                nonlocal told
                told += 1
                if told == 3:
                    os.kill(os.getpid(), signal.SIGKILL)

            try:
                go(tmp_path, progress)
            finally:
                os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            break
        assert contents(tmp_path, OLD_ENTRIES) == before
    same_as(tmp_path, before)


def test_what_the_old_program_writes_in_between_counts(tmp_path: Path) -> None:
    """Between portions, and after the last transaction, too."""
    fill(tmp_path)
    for at in range(1, 13):
        with pytest.raises(Interrupted):
            go(tmp_path, interrupt(1 + at % 2))
        with OldProgram(tmp_path) as old:
            # It adds, changes and removes.
            user = old.user(f"in-between-{at}")
            old.change("team-conv-id", "u-Ann", user, "member")
            old.send("team-conv-id", user, f"in between {at}")
            old.change("team-conv-id", "u-Ann", user, "none")
            old.read("team-conv-id", "u-Ann", 5 + at)
            old.db.execute("DELETE FROM tokens WHERE hash = ?", (b"1",))
            old.db.execute("UPDATE queue_messages SET deliveries = deliveries + 1")
    before = contents(tmp_path, OLD_ENTRIES)
    told: list[int] = []
    go(tmp_path, tell_into(told))
    assert told[0] == before["entries"][-4][0], "all was copied but for what the last round added"
    same_as(tmp_path, before)


def test_a_new_file_of_another_state_is_not_believed(tmp_path: Path) -> None:
    """A backup was put back after a migration that was interrupted, and went another way since."""
    fill(tmp_path)
    shutil.copy(database_path(tmp_path), tmp_path / "backup")
    with OldProgram(tmp_path) as old:
        old.send("team-conv-id", "u-Ann", "lost with the backup that was put back")
    with pytest.raises(Interrupted):
        go(tmp_path, interrupt(9))
    os.replace(tmp_path / "backup", database_path(tmp_path))
    with OldProgram(tmp_path) as old:
        old.send("team-conv-id", "u-Bob", "something else")
        old.send("team-conv-id", "u-Bob", "and more")
    before = contents(tmp_path, OLD_ENTRIES)
    go(tmp_path)
    same_as(tmp_path, before)


@pytest.mark.parametrize("rest", [b"", b"no database at all" * 500])
def test_a_new_file_that_is_none_is_made_again(tmp_path: Path, rest: bytes) -> None:
    fill(tmp_path)
    before = contents(tmp_path, OLD_ENTRIES)
    (tmp_path / "chatcore.db.new").write_bytes(rest)
    prepare(tmp_path)
    same_as(tmp_path, before)


def test_what_a_killed_server_left_in_its_wal_file_counts(tmp_path: Path) -> None:
    fill(tmp_path)
    pid = os.fork()
    if not pid:
        try:
            old = OldProgram(tmp_path)
            old.send("team-conv-id", "u-Ann", "in the WAL file alone")
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / "chatcore.db-wal").stat().st_size > 0
    go(tmp_path)
    prepare(tmp_path)
    bodies = rows(database_path(tmp_path), "SELECT fields ->> 'body' FROM entries ORDER BY id DESC LIMIT 1")
    assert bodies == [("in the WAL file alone",)]
    assert not list(tmp_path.glob("*-wal")) and not list(tmp_path.glob("*-shm"))


def test_a_link_to_the_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "large-disk").mkdir()
    fill(tmp_path / "large-disk")
    before = contents(tmp_path / "large-disk", OLD_ENTRIES)
    (tmp_path / "data").mkdir()
    database_path(tmp_path / "data").symlink_to(tmp_path / "large-disk" / "chatcore.db")
    prepare(tmp_path / "data")
    assert database_path(tmp_path / "data").is_symlink()
    same_as(tmp_path / "large-disk", before)


def test_an_older_program_refuses_a_migrated_folder(tmp_path: Path) -> None:
    fill(tmp_path)
    prepare(tmp_path)
    with pytest.raises(RefusedByOld, match="has schema version 2; this program needs 1"):
        OldProgram(tmp_path)


def test_a_file_that_another_program_has_open_is_left_alone(tmp_path: Path) -> None:
    """An older server would go on writing to a file without a name."""
    fill(tmp_path)
    before = contents(tmp_path, OLD_ENTRIES)
    with OldProgram(tmp_path) as old:
        old.one("SELECT 1 FROM users")
        with pytest.raises(BrokenStore, match="another program has it open: an older server"):
            prepare(tmp_path)
        old.send("dm-conv-id", "u-Ann", "goes on")
    assert len(contents(tmp_path, OLD_ENTRIES)["entries"]) == len(before["entries"]) + 1


def test_a_disk_that_is_too_small_is_said_before_anything_is_changed(tmp_path: Path) -> None:
    fill(tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    size = database_path(tmp_path).stat().st_size
    with pytest.raises(CannotMigrate, match=r"needs 0 MB of free space in .*; there are 0 MB. Nothing was changed"):
        migrate(database_path(tmp_path), DDL, SCHEMA_VERSION, free=lambda folder: size - 1)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
    migrate(database_path(tmp_path), DDL, SCHEMA_VERSION, free=lambda folder: size)


def test_a_log_with_a_hole_is_refused_in_one_line(tmp_path: Path) -> None:
    fill(tmp_path)
    with OldProgram(tmp_path) as old:
        old.db.execute("DELETE FROM entries WHERE conv = 'dm-conv-id' AND seq = 5")
    before = contents(tmp_path, OLD_ENTRIES)
    with pytest.raises(BrokenStore, match=r"conversation dm-conv-id has \d+ entries from 1 to \d+$"):
        prepare(tmp_path)
    assert contents(tmp_path, OLD_ENTRIES) == before


def test_an_unknown_version_is_refused_as_it_is(tmp_path: Path) -> None:
    fill(tmp_path)
    with OldProgram(tmp_path) as old:
        old.db.execute("PRAGMA user_version = 7")
    with pytest.raises(BrokenStore, match="has schema version 7; this program needs 2"):
        prepare(tmp_path)


def test_a_large_log_takes_a_reasonable_time_and_tells_of_itself(tmp_path: Path) -> None:
    fill(tmp_path)
    entries = 200_000
    with OldProgram(tmp_path) as old, old.db:
        old.db.execute(
            "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?)"
            " INSERT INTO entries SELECT 1000 + i, 'conv-' || (i % 1000), i / 1000 + 1, 'msg', 'user-' || (i % 777),"
            " 'cid-' || i, printf('%016x', i), 1000, i / 1000 + 1, i / 1000 + 1, hex(randomblob(50)) FROM n",
            (entries,),
        )
    size = database_path(tmp_path).stat().st_size
    # Within a portion and within a statement: what was copied of it is gone, and nothing else.
    with pytest.raises(Interrupted):
        migrate(database_path(tmp_path), DDL, SCHEMA_VERSION, interrupt(5))
    told: list[int] = []
    start = time.process_time()
    migrate(database_path(tmp_path), DDL, SCHEMA_VERSION, tell_into(told))
    cost_us = (time.process_time() - start) / entries * 1e6
    assert rows(database_path(tmp_path), "SELECT count(*) FROM entries")[0][0] > entries
    assert database_path(tmp_path).stat().st_size < 0.75 * size
    assert cost_us < 50, "two or three, on an idle machine"
    assert len(told) > 2 * len(set(told)), "within a portion, and while the end is checked"
