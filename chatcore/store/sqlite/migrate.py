"""A file of schema version 1 becomes one of this version, at the start of the server.

The new file is built beside the old one, in portions, each a transaction: a migration that was interrupted goes on
where it was. The old file stays as it is, and is the valid one, until the new file is whole and synced and takes its
name. In between the older program may use the folder: entries are only ever added, so copying goes on after the
newest that was copied; everything else is copied in the last transaction.

Nobody else can have the old file open meanwhile, not even to read it: an older server that went on writing to a file
without a name would lose what it acknowledges.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import apsw

from ...common.files import make_private

#: The version that can be migrated.
OLD_VERSION: Final = 1
#: Appended to the name of the file while it is built.
NEW_SUFFIX: Final = ".new"
# A portion takes about 0.1 s, and that much is lost by an interruption.
PORTION_ENTRIES: Final = 20_000
# Another connection that is just closing is waited for; one that stays is an error.
BUSY_TIMEOUT_MS: Final = 2000
# Within a long statement progress is told after so many steps of SQLite's machine, a few ms.
PROGRESS_STEPS: Final = 200_000
#: Files of the older program that have no use any more.
LEFT_OVER: Final = ("write.next", "write.lock")

#: Called with (done, total), in positions of the log, several times a second; ``done`` may stay where it is.
Progress = Callable[[int, int], None]

#: The tables that are copied as they are. All others but these and the log's are not the store's: they are copied
#: with their definitions.
_COPIED: Final = {
    "users": "id, name, name_key, password, created, disabled, seen",
    "tokens": "hash, user, created, expires",
    "revocations": "rev, token, user",
    "convs": "id, kind, title, title_key, a, b, created, members",
    "members": "conv, user, role, as_of, read, read_msgs, notify, rev",
    "blocks": "user, other",
}
_OURS: Final = ("meta", "entries", *_COPIED)

# The newest value of the change counter, which `members.rev` shared then.
_POSITION: Final = (
    "SELECT max((SELECT coalesce(max(id), 0) FROM old.entries), (SELECT coalesce(max(rev), 0) FROM old.members),"
    " (SELECT coalesce(max(rev), 0) FROM old.revocations))"
)
_END_OF_PORTION: Final = "SELECT max(id) FROM (SELECT id FROM old.entries WHERE id > ? ORDER BY id LIMIT ?)"
_NAME_CONVS_AND_SENDERS: Final = """
INSERT OR IGNORE INTO ids(id)
SELECT conv FROM old.entries WHERE id > ?1 AND id <= ?2 UNION SELECT sender FROM old.entries WHERE id > ?1 AND id <= ?2
"""
# CROSS JOIN: in the order of the log, whatever the planner thinks.
_COPY_ENTRIES: Final = """
INSERT INTO entries(id, conv, seq, t, sender, msgs, last_msg, cid, digest, ts, fields)
SELECT e.id, c.n, e.seq, e.t, s.n, e.msgs, e.last_msg, e.cid, unhex(e.digest), e.ts, e.fields
FROM old.entries e CROSS JOIN ids c ON c.id = e.conv CROSS JOIN ids s ON s.id = e.sender
WHERE e.id > ? AND e.id <= ? ORDER BY e.id
"""
_SAME_NEWEST: Final = """
SELECT 1 FROM main.entries n JOIN old.entries o ON o.id = n.id JOIN ids c ON c.n = n.conv JOIN ids s ON s.n = n.sender
WHERE n.id = (SELECT max(id) FROM main.entries)
  AND (c.id, n.seq, s.id, n.cid, n.digest, n.ts) = (o.conv, o.seq, o.sender, o.cid, unhex(o.digest), o.ts)
"""
# The old unique index on (conv, seq) answers it, in its order.
_NOT_DENSE: Final = """
SELECT conv, count(*), min(seq), max(seq) FROM old.entries GROUP BY conv HAVING min(seq) <> 1 OR max(seq) <> count(*)
"""


class CannotMigrate(Exception):
    """The old file stays as it is; the message is one line for the operator."""


def free_bytes(folder: Path) -> int:
    """What this user may still write into the file system of a folder."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def migrate(
    path: Path,
    ddl: str,
    version: int,
    progress: Progress | None = None,
    *,
    portion: int = PORTION_ENTRIES,
    free: Callable[[Path], int] = free_bytes,
) -> None:
    """Put a file of the new version in the place of one of version 1.

    :param ddl: makes the tables of the new version.
    :raises CannotMigrate: nothing was changed.
    :raises apsw.Error, OSError: it was interrupted, and can be called again.
    """
    folder = path.parent
    path = path.resolve()  # the new file takes the place of the file, not of a link to it
    new = path.with_name(path.name + NEW_SUFFIX)
    _check_space(path, new, free)
    db = _open(path, new, version)
    try:
        _Migration(db, path, version, progress or _say_nothing).run(ddl, portion)
        # Nobody has the old file open, and it needs no other file any more: none of its log can meet the new file.
        if db.execute("PRAGMA old.journal_mode = DELETE").fetchall() != [("delete",)]:
            raise CannotMigrate(f"the log of {path} cannot be written back")
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        _take_owner_and_mode(path, new)
        os.rename(new, path)
        _sync_folder(path.parent)
    finally:
        db.close(True)
    new.with_name(new.name + "-journal").unlink(missing_ok=True)
    for name in LEFT_OVER:
        (folder / name).unlink(missing_ok=True)


def _say_nothing(done: int, total: int) -> None: ...


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_space(path: Path, new: Path, free: Callable[[Path], int]) -> None:
    """The new file is smaller than the old one, whose WAL file may still have to be written back."""
    needed = _size(path) + _size(path.with_name(path.name + "-wal")) - _size(new)
    there = free(path.parent)
    if there < needed:
        raise CannotMigrate(
            f"{path} has to be migrated, which needs {needed / 1e6:.0f} MB of free space in {path.parent};"
            f" there are {there / 1e6:.0f} MB. Nothing was changed"
        )


def _open(path: Path, new: Path, version: int) -> apsw.Connection:
    """The new file (``main``) and the old one (``old``), both for this connection alone."""
    for _ in range(2):
        make_private(new)
        db = apsw.Connection(os.fspath(new), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            db.set_busy_timeout(BUSY_TIMEOUT_MS)
            # Before ATTACH, so that it holds for both files.
            db.execute("PRAGMA locking_mode = EXCLUSIVE; PRAGMA synchronous = FULL; PRAGMA temp_store = MEMORY")
            db.execute("ATTACH ? AS old", (os.fspath(path),))
            db.execute("BEGIN EXCLUSIVE; COMMIT")
            if not db.execute("SELECT 1 FROM main.sqlite_schema").fetchall() or _continues(db, version):
                return db
        except apsw.BusyError:
            db.close(True)
            raise CannotMigrate(
                f"{path} has to be migrated, but another program has it open: an older server, a command or a backup"
            ) from None
        except (apsw.NotADBError, apsw.CorruptError):
            pass  # which of the two files it is shows in the second round
        except BaseException:
            db.close(True)
            raise
        db.close(True)
        for name in (new.name, new.name + "-journal"):
            (new.parent / name).unlink(missing_ok=True)
    raise CannotMigrate(f"the database {path} is damaged")


def _continues(db: apsw.Connection, version: int) -> bool:
    """Whether the new file is the beginning of this one: not of another store, and not of another state of it."""
    if db.pragma("user_version", schema="main") != version:
        return False
    same = "SELECT 1 FROM main.meta n JOIN old.meta o USING (key) WHERE key = 'store_id' AND n.value = o.value"
    if not db.execute(same).fetchall():
        return False
    empty = not db.execute("SELECT 1 FROM main.entries LIMIT 1").fetchall()
    return empty or bool(db.execute(_SAME_NEWEST).fetchall())


def _take_owner_and_mode(path: Path, new: Path) -> None:
    """As the old file has them: root may have started the program that migrates."""
    shutil.copymode(path, new)
    owner = path.stat()
    with contextlib.suppress(PermissionError):
        os.chown(new, owner.st_uid, owner.st_gid)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _Migration:
    """Fills the new file, in transactions of its own."""

    def __init__(self, db: apsw.Connection, path: Path, version: int, progress: Progress) -> None:
        self._db = db
        self._path = path
        self._version = version
        self._progress = progress
        self._total = self._number("SELECT coalesce(max(id), 0) FROM old.entries")
        self._done = 0

    def run(self, ddl: str, portion: int) -> None:
        self._db.set_progress_handler(self._tell, PROGRESS_STEPS)
        try:
            self._check_old()
            self._begin(ddl)
            self._tell()
            while (end := self._end_of_portion(portion)) is not None:
                with self._db:
                    self._db.execute(_NAME_CONVS_AND_SENDERS, (self._done, end))
                    self._db.execute(_COPY_ENTRIES, (self._done, end))
                self._done = end
                self._tell()
            with self._db:
                self._copy_the_rest()
                self._check_new()
                self._db.execute(f"PRAGMA application_id = {self._number('PRAGMA old.application_id')}")
            self._tell()
        finally:
            self._db.set_progress_handler(None)

    def _tell(self) -> bool:
        self._progress(self._done, self._total)
        return False

    def _end_of_portion(self, entries: int) -> int | None:
        (row,) = self._db.execute(_END_OF_PORTION, (self._done, entries)).fetchall()
        end: int | None = row[0]  # type: ignore[assignment]  # by the schema
        return end

    def _number(self, sql: str) -> int:
        row = self._db.execute(sql).fetchone()
        assert row is not None
        return int(row[0])

    def _check_old(self) -> None:
        """A log with holes has no place in the new version, which finds entries by counting."""
        wrong = self._db.execute(_NOT_DENSE).fetchone()
        if wrong is not None:
            conv, entries, first, last = wrong
            raise CannotMigrate(
                f"{self._path} cannot be migrated: conversation {conv} has {entries} entries from {first} to {last}"
            )

    def _begin(self, ddl: str) -> None:
        """Make the tables if there are none, and find where to go on."""
        if not self._number("SELECT count(*) FROM main.sqlite_schema"):
            with self._db:
                self._db.execute(ddl)
                self._db.execute("INSERT INTO main.meta SELECT key, value FROM old.meta WHERE key = 'store_id'")
                # It is no store (application_id) before it is whole.
                self._db.execute(f"PRAGMA main.user_version = {self._version}")
        self._done = self._number("SELECT coalesce(max(id), 0) FROM main.entries")

    def _copy_the_rest(self) -> None:
        """All but the log. An earlier attempt may have done this, and the older program changed rows since."""
        execute = self._db.execute
        position = self._number(_POSITION)
        execute("DELETE FROM main.meta")
        execute("INSERT INTO main.meta SELECT key, value FROM old.meta")
        # Read marks are in `members`, all of them.
        execute("INSERT INTO main.meta VALUES ('epoch', 0), ('folded', ?), ('trimmed', 0)", (position,))
        for table, columns in _COPIED.items():
            execute(f"DELETE FROM main.{table}")
            execute(f"INSERT INTO main.{table}({columns}) SELECT {columns} FROM old.{table}")
        execute("DELETE FROM main.row_changes")
        newest = execute("SELECT conv, user FROM old.members WHERE rev = ?", (position,)).fetchall()
        for conv, user in newest:
            # The counter must not go back, and rows of members no longer count in it.
            execute("INSERT OR IGNORE INTO ids(id) VALUES (?), (?)", (conv, user))
            execute(
                "INSERT INTO row_changes(id, conv, user)"
                " VALUES (?, (SELECT n FROM ids WHERE id = ?), (SELECT n FROM ids WHERE id = ?))",
                (position, conv, user),
            )
        self._copy_foreign()

    def _copy_foreign(self) -> None:
        """The tables of other parts, such as the queue, with their indexes."""
        marks = ", ".join("?" * len(_OURS))
        found = f"FROM old.sqlite_schema WHERE tbl_name NOT IN ({marks}) AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
        rows: list[Any] = self._db.execute(f"SELECT type, name, sql {found} ORDER BY type <> 'table'", _OURS).fetchall()
        for kind, name, sql in rows:
            if kind == "table":
                self._db.execute(f'DROP TABLE IF EXISTS main."{name}"')
            self._db.execute(sql)
            if kind == "table":
                self._db.execute(f'INSERT INTO main."{name}" SELECT * FROM old."{name}"')

    def _check_new(self) -> None:
        for table in ("entries", *_COPIED):
            # Not count(*), which is one long step: progress could not be told in it.
            was, is_ = (self._number(f"SELECT coalesce(sum(1), 0) FROM {of}.{table}") for of in ("old", "main"))
            if was != is_:
                raise CannotMigrate(f"{self._path} cannot be migrated: {was} rows of {table} became {is_}")
        found = self._db.execute("PRAGMA main.quick_check(1)").fetchall()
        if found != [("ok",)]:
            raise CannotMigrate(f"{self._path} cannot be migrated: the new file is damaged: {found[0][0]}")
