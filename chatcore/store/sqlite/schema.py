"""The SQLite file: its tables, how a connection to it is opened, and what is checked at start.

``entries`` in the order of commits is the log: a commit appends to it, and to nothing else that grows. What finds
an entry by its conversation is an index in a second file, which may lag (:mod:`.index`), and what is not in that yet
is in memory (:mod:`.tail`). Conversations and users have small integers in the log (``ids``).

One counter orders all changes: ``entries.id``, ``row_changes.id`` and ``revocations.rev`` share it (see
:meth:`~.transaction.Transaction.tick`). "What has changed after position p" is then three index range scans.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final
from urllib.parse import quote

import apsw

from ...common.files import make_private
from .migrate import OLD_VERSION, CannotMigrate, Progress, migrate

APPLICATION_ID: Final = 0x63686174  # "chat"
SCHEMA_VERSION: Final = 2
FILE_NAME: Final = "chatcore.db"
#: Reads the newest value of the change counter.
POSITION: Final = (
    "SELECT max((SELECT coalesce(max(id), 0) FROM entries), (SELECT coalesce(max(id), 0) FROM row_changes),"
    " (SELECT coalesce(max(rev), 0) FROM revocations))"
)
# A reader never waits for a writer in WAL mode; this is for the moments of opening and recovery.
BUSY_TIMEOUT_MS: Final = 5000

DDL: Final = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE ids(n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE);
CREATE TABLE users(
  id TEXT PRIMARY KEY, name TEXT NOT NULL, name_key TEXT NOT NULL UNIQUE, password TEXT NOT NULL,
  created INTEGER NOT NULL, disabled INTEGER NOT NULL DEFAULT 0, seen INTEGER
) WITHOUT ROWID;
CREATE TABLE tokens(
  hash BLOB PRIMARY KEY, user TEXT NOT NULL, created INTEGER NOT NULL, expires INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX tokens_user ON tokens(user);
CREATE INDEX tokens_expires ON tokens(expires);
CREATE TABLE revocations(rev INTEGER PRIMARY KEY, token BLOB, user TEXT);
CREATE TABLE convs(
  id TEXT PRIMARY KEY, kind TEXT NOT NULL, title TEXT, title_key TEXT, a TEXT, b TEXT,
  created INTEGER NOT NULL, members INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX convs_channels ON convs(title_key, id) WHERE kind = 'channel';
CREATE TABLE entries(
  id INTEGER PRIMARY KEY, conv INTEGER NOT NULL, seq INTEGER NOT NULL, t TEXT NOT NULL, sender INTEGER NOT NULL,
  msgs INTEGER NOT NULL, last_msg INTEGER NOT NULL, cid TEXT NOT NULL, digest BLOB NOT NULL, ts INTEGER NOT NULL,
  fields TEXT NOT NULL
);
CREATE TABLE row_changes(
  id INTEGER PRIMARY KEY, conv INTEGER NOT NULL, user INTEGER NOT NULL, read INTEGER, msgs INTEGER
);
CREATE TABLE members(
  conv TEXT NOT NULL, user TEXT NOT NULL, role TEXT NOT NULL, as_of INTEGER NOT NULL, read INTEGER NOT NULL,
  read_msgs INTEGER NOT NULL, notify TEXT NOT NULL DEFAULT 'all', rev INTEGER NOT NULL, PRIMARY KEY(conv, user)
) WITHOUT ROWID;
CREATE INDEX members_user ON members(user, conv, role);
CREATE TABLE blocks(user TEXT NOT NULL, other TEXT NOT NULL, PRIMARY KEY(user, other)) WITHOUT ROWID;
"""


class BrokenStore(Exception):
    """The database file cannot be used; the message is one line for the operator."""


def database_path(data: Path) -> Path:
    """Where the database of a data directory is."""
    return data / FILE_NAME


def connect(path: Path, *, write: bool) -> apsw.Connection:
    """Open a connection for one thread.

    A writing one commits durably (WAL, ``synchronous=FULL``: promise 1) and never
    checkpoints by itself: :mod:`.writer` and :mod:`.indexer` say when.

    :raises apsw.Error: as SQLite says.
    """
    # URI: the index is attached for reading only (see .index).
    flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_URI | (apsw.SQLITE_OPEN_CREATE if write else 0)
    db = apsw.Connection(os.fspath(path), flags=flags)
    db.set_busy_timeout(BUSY_TIMEOUT_MS)
    db.wal_autocheckpoint(0)
    # A statement that changes many pages keeps what they were, to undo it: in memory, not in a file in /var/tmp.
    db.execute("PRAGMA synchronous = FULL; PRAGMA foreign_keys = OFF; PRAGMA temp_store = MEMORY")
    if not write:
        db.execute("PRAGMA query_only = ON")
    return db


def prepare(data: Path, progress: Progress | None = None) -> None:
    """Make the database if there is none, migrate an older one, and refuse one that is not ours or is damaged.

    Called by the process that holds the write lock, before anything else opens the file.

    :param progress: told how far a migration is, several times a second (:data:`~.migrate.Progress`).
    :raises BrokenStore: with one line that names the file and what is wrong.
    """
    path = database_path(data)
    fresh = not path.exists() or path.stat().st_size == 0
    wal = path.with_name(path.name + "-wal")
    try:
        if not fresh and not wal.exists():
            # No process has it open: look at it first in the one way that leaves no files beside it,
            # so that a file that is not ours stays as it is.
            unchanged = f"file:{quote(os.fspath(path.absolute()))}?immutable=1"
            db = apsw.Connection(unchanged, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
            try:
                if not _is_empty(db):
                    _verify(db, path)
            finally:
                db.close()
        make_private(path)
        db = connect(path, write=True)
        try:
            if fresh or _is_empty(db):
                _create(db, path)
            version = _verify(db, path)
            if version == SCHEMA_VERSION and db.execute("PRAGMA journal_mode").fetchall() != [("wal",)]:
                db.execute("PRAGMA journal_mode = WAL")
        finally:
            db.close()
        if version == OLD_VERSION:
            migrate(path, DDL, SCHEMA_VERSION, progress)
            prepare(data)
    except CannotMigrate as exc:
        raise BrokenStore(str(exc)) from None
    except (apsw.Error, OSError) as exc:
        raise BrokenStore(f"the database {path} cannot be used: {exc}") from None


def _is_empty(db: apsw.Connection) -> bool:
    # As an earlier first start leaves it that was killed before it had made the tables.
    return db.pragma("application_id") == 0 and not db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()


def _create(db: apsw.Connection, path: Path) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    with db:
        db.execute(DDL)
        db.execute(
            "INSERT INTO meta VALUES ('store_id', ?), ('secret', ?), ('epoch', 0), ('folded', 0), ('trimmed', 0)",
            (secrets.token_urlsafe(9), secrets.token_bytes(32)),
        )
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}")
    path.chmod(0o600)


def check_version(db: apsw.Connection, path: Path) -> None:
    """For a program that only reads.

    :raises BrokenStore: it is no database of ours, or of another version.
    """
    version = _verify(db, path)
    if version != SCHEMA_VERSION:
        raise BrokenStore(f"{path} has schema version {version}; a start of the server makes it {SCHEMA_VERSION}")


def _verify(db: apsw.Connection, path: Path) -> int:
    """The version, which is this one or one that can be migrated."""
    application = db.pragma("application_id")
    if application != APPLICATION_ID:
        raise BrokenStore(f"{path} is not a chatcore database")
    version: int = db.pragma("user_version")
    if version not in (OLD_VERSION, SCHEMA_VERSION):
        raise BrokenStore(f"{path} has schema version {version}; this program needs {SCHEMA_VERSION}")
    # The whole file is not read (it may be large): the root page of every table and index is.
    for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
        db.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchall()
    return version
