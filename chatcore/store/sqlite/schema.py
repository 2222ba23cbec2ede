"""The SQLite file: its tables, how a connection to it is opened, and what is checked at start.

One counter orders all changes: ``entries.id``, ``members.rev`` and
``revocations.rev`` share it (see :func:`~.ops.Transaction.tick`). "What has changed
after position p" is then three index range scans.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final
from urllib.parse import quote

import apsw

APPLICATION_ID: Final = 0x63686174  # "chat"
SCHEMA_VERSION: Final = 1
FILE_NAME: Final = "chatcore.db"
#: Reads the newest value of the change counter.
POSITION: Final = (
    "SELECT max((SELECT coalesce(max(id), 0) FROM entries), (SELECT coalesce(max(rev), 0) FROM members),"
    " (SELECT coalesce(max(rev), 0) FROM revocations))"
)
LOCK_NAMES: Final = ("write.next", "write.lock")
# A reader never waits for a writer in WAL mode, and writers queue on the file lock;
# this is for the moments of opening and recovery.
BUSY_TIMEOUT_MS: Final = 5000

_DDL: Final = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
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
  id INTEGER PRIMARY KEY, conv TEXT NOT NULL, seq INTEGER NOT NULL, t TEXT NOT NULL, sender TEXT NOT NULL,
  cid TEXT NOT NULL, digest TEXT NOT NULL, ts INTEGER NOT NULL, msgs INTEGER NOT NULL, last_msg INTEGER NOT NULL,
  fields TEXT NOT NULL
);
CREATE UNIQUE INDEX entries_seq ON entries(conv, seq);
CREATE UNIQUE INDEX entries_cid ON entries(conv, sender, cid);
CREATE TABLE members(
  conv TEXT NOT NULL, user TEXT NOT NULL, role TEXT NOT NULL, as_of INTEGER NOT NULL, read INTEGER NOT NULL,
  read_msgs INTEGER NOT NULL, notify TEXT NOT NULL DEFAULT 'all', rev INTEGER NOT NULL, PRIMARY KEY(conv, user)
) WITHOUT ROWID;
CREATE INDEX members_user ON members(user, conv, role);
CREATE UNIQUE INDEX members_rev ON members(rev);
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
    checkpoints by itself: a checkpoint that races a commit of another process is
    kept out by doing it under the write lock.

    :raises apsw.Error: as SQLite says.
    """
    flags = apsw.SQLITE_OPEN_READWRITE | (apsw.SQLITE_OPEN_CREATE if write else 0)
    db = apsw.Connection(os.fspath(path), flags=flags)
    db.set_busy_timeout(BUSY_TIMEOUT_MS)
    db.wal_autocheckpoint(0)
    # A statement that changes many pages keeps what they were, to undo it: in memory, not in a file in /var/tmp.
    db.execute("PRAGMA synchronous = FULL; PRAGMA foreign_keys = OFF; PRAGMA temp_store = MEMORY")
    if not write:
        db.execute("PRAGMA query_only = ON")
    return db


def prepare(data: Path) -> None:
    """Make the database if there is none, and refuse one that is not ours or is damaged.

    Called once, before the workers are forked, by the process that holds the data directory.

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
        db = connect(path, write=True)
        try:
            if fresh or _is_empty(db):
                _create(db, path)
            _verify(db, path)
            if db.execute("PRAGMA journal_mode").fetchall() != [("wal",)]:
                db.execute("PRAGMA journal_mode = WAL")
        finally:
            db.close()
    except (apsw.Error, OSError) as exc:
        raise BrokenStore(f"the database {path} cannot be used: {exc}") from None
    for name in LOCK_NAMES:
        (data / name).touch(mode=0o600)


def _is_empty(db: apsw.Connection) -> bool:
    # As an earlier first start leaves it that was killed before it had made the tables.
    return db.pragma("application_id") == 0 and not db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()


def _create(db: apsw.Connection, path: Path) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    with db:
        db.execute(_DDL)
        db.execute(
            "INSERT INTO meta VALUES ('store_id', ?), ('secret', ?)",
            (secrets.token_urlsafe(9), secrets.token_bytes(32)),
        )
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}")
    path.chmod(0o600)


def _verify(db: apsw.Connection, path: Path) -> None:
    application = db.pragma("application_id")
    if application != APPLICATION_ID:
        raise BrokenStore(f"{path} is not a chatcore database")
    version = db.pragma("user_version")
    if version != SCHEMA_VERSION:
        raise BrokenStore(f"{path} has schema version {version}; this program needs {SCHEMA_VERSION}")
    # The whole file is not read (it may be large): the root page of every table and index is.
    for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
        db.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchall()
