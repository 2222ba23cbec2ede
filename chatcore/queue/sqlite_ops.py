"""The embedded queue's tables, and what a transaction does to them.

``queue_keys`` has a row for each key of a topic that has messages. The first message of a key is the one that may
be handled. ``at`` says when: 0 now, otherwise the wall clock's ms of its next try, NULL while a worker has taken
the key. That worker holds a lease: until a moment of the monotonic clock, which all processes of a host share, in
this boot of the machine (after another boot no worker of this one runs).

All functions but the queries run inside a write transaction, so they read the newest state; they raise ChatError
only. :func:`put` can be part of any transaction, such as one that appends an entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import apsw

from ..store.sqlite.ops import Transaction
from .base import DIED, DeadLetter, Job, QueueFull, QueueSettings, TopicStats

# Delayed messages made ready, and dedupe ids deleted, in one transaction: the writer has others to serve.
DUE_BATCH: Final = 100
FORGET_BATCH: Final = 10
# Dead letters retried or dropped in one transaction.
LETTERS_BATCH: Final = 200

_DDL: Final = """
CREATE TABLE IF NOT EXISTS queue_topics(
  topic TEXT PRIMARY KEY, depth INTEGER NOT NULL DEFAULT 0, delayed INTEGER NOT NULL DEFAULT 0,
  retries INTEGER NOT NULL DEFAULT 0, dead INTEGER NOT NULL DEFAULT 0, dead_lost INTEGER NOT NULL DEFAULT 0,
  fence INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS queue_messages(
  place INTEGER PRIMARY KEY, id TEXT NOT NULL, topic TEXT NOT NULL, key TEXT NOT NULL, payload BLOB NOT NULL,
  created INTEGER NOT NULL, since INTEGER NOT NULL, deliveries INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS queue_messages_key ON queue_messages(topic, key, place);
CREATE INDEX IF NOT EXISTS queue_messages_topic ON queue_messages(topic, place);
CREATE TABLE IF NOT EXISTS queue_keys(
  topic TEXT NOT NULL, key TEXT NOT NULL, place INTEGER NOT NULL, at INTEGER, owner TEXT, boot TEXT,
  until INTEGER, fence INTEGER NOT NULL DEFAULT 0, PRIMARY KEY(topic, key)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS queue_keys_at ON queue_keys(topic, at, place);
CREATE INDEX IF NOT EXISTS queue_keys_taken ON queue_keys(topic) WHERE owner IS NOT NULL;
CREATE TABLE IF NOT EXISTS queue_delayed(
  n INTEGER PRIMARY KEY, id TEXT NOT NULL, topic TEXT NOT NULL, key TEXT NOT NULL, payload BLOB NOT NULL,
  created INTEGER NOT NULL, due INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS queue_delayed_due ON queue_delayed(topic, due);
CREATE TABLE IF NOT EXISTS queue_dead(
  n INTEGER PRIMARY KEY, id TEXT NOT NULL, topic TEXT NOT NULL, key TEXT NOT NULL, payload BLOB NOT NULL,
  created INTEGER NOT NULL, failed INTEGER NOT NULL, deliveries INTEGER NOT NULL, error TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS queue_dead_topic ON queue_dead(topic, n);
CREATE INDEX IF NOT EXISTS queue_dead_id ON queue_dead(id);
CREATE TABLE IF NOT EXISTS queue_dedupe(
  topic TEXT NOT NULL, key TEXT NOT NULL, dedupe_id TEXT NOT NULL, id TEXT NOT NULL, expires INTEGER NOT NULL,
  PRIMARY KEY(topic, key, dedupe_id)
);
CREATE INDEX IF NOT EXISTS queue_dedupe_expires ON queue_dedupe(expires);
"""


@dataclass(frozen=True, slots=True)
class PutRequest:
    """A message to put; ``id`` is the one it gets if it is new."""

    id: str
    topic: str
    key: str
    payload: bytes
    delay_ms: int = 0
    dedupe_id: str | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The holder of a lease: ``owner`` is one queue of one process in one ``boot`` of the machine."""

    owner: str
    boot: str


def make_tables(tx: Transaction) -> None:
    """Create the tables that are missing. They are no part of the store's schema version: an older program
    ignores them."""
    tx.db.execute(_DDL)


def has_tables(db: apsw.Connection) -> bool:
    """Whether :func:`make_tables` was ever called."""
    return bool(db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'queue_topics'").fetchall())


# -- putting


def put(tx: Transaction, m: PutRequest, settings: QueueSettings, now_ms: int) -> str:
    """Put a message that was checked (:func:`~.base.check_message`); returns its id, or that of its first put.

    :raises QueueFull: nothing was changed. If it is not caught, the rest of the operation is rolled back, too.
    """
    if m.dedupe_id is not None:
        tx.db.execute(
            "DELETE FROM queue_dedupe WHERE rowid IN"
            " (SELECT rowid FROM queue_dedupe WHERE expires <= ? ORDER BY expires LIMIT ?)",
            (now_ms, FORGET_BATCH),
        )
        row = tx.one(
            "SELECT id FROM queue_dedupe WHERE topic = ? AND key = ? AND dedupe_id = ? AND expires > ?",
            (m.topic, m.key, m.dedupe_id, now_ms),
        )
        if row is not None:
            return str(row[0])
    row = tx.one("SELECT depth FROM queue_topics WHERE topic = ?", (m.topic,))
    if row is not None and row[0] >= settings.max_length:
        raise QueueFull(m.topic, row[0])
    if m.dedupe_id is not None:
        tx.db.execute(
            "INSERT OR REPLACE INTO queue_dedupe VALUES (?, ?, ?, ?, ?)",
            (m.topic, m.key, m.dedupe_id, m.id, now_ms + settings.dedupe_ms),
        )
    _count(tx, m.topic, depth=1, delayed=1 if m.delay_ms else 0)
    if m.delay_ms:
        tx.db.execute(
            "INSERT INTO queue_delayed(id, topic, key, payload, created, due) VALUES (?, ?, ?, ?, ?, ?)",
            (m.id, m.topic, m.key, m.payload, now_ms, now_ms + m.delay_ms),
        )
    else:
        _make_ready(tx, m.id, m.topic, m.key, m.payload, now_ms, now_ms)
    return m.id


def _make_ready(tx: Transaction, id: str, topic: str, key: str, payload: bytes, created: int, now_ms: int) -> None:
    tx.db.execute(
        "INSERT INTO queue_messages(id, topic, key, payload, created, since) VALUES (?, ?, ?, ?, ?, ?)",
        (id, topic, key, payload, created, now_ms),
    )
    tx.db.execute(
        "INSERT OR IGNORE INTO queue_keys(topic, key, place, at) VALUES (?, ?, ?, 0)",
        (topic, key, tx.db.last_insert_rowid()),
    )


def _count(tx: Transaction, topic: str, **changes: int) -> None:
    tx.db.execute("INSERT OR IGNORE INTO queue_topics(topic) VALUES (?)", (topic,))
    sets = ", ".join(f"{column} = {column} + ?" for column in changes)
    tx.db.execute(f"UPDATE queue_topics SET {sets} WHERE topic = ?", (*changes.values(), topic))


# -- taking


def wait_ms(db: apsw.Connection, topic: str, lease: Lease, wall_ms: int, mono_ms: int, retry_max_ms: int) -> int | None:
    """A query: ms until there is a key to take (0: now; None: not known)."""
    if not has_tables(db):
        return None
    rows: list[Any] = db.execute(
        "SELECT min(at) FROM queue_keys WHERE topic = ? AND at IS NOT NULL"
        " UNION ALL SELECT min(due) FROM queue_delayed WHERE topic = ?"
        " UNION ALL SELECT 0 FROM queue_keys WHERE topic = ? AND owner IS NOT NULL AND (boot <> ? OR until <= ?)",
        (topic, topic, topic, lease.boot, mono_ms),
    ).fetchall()
    waits = [max(0, at - wall_ms) for (at,) in rows if at is not None]
    if not waits:
        return None
    # As in `_update_ready`: a wall clock that was set back delays no message.
    return 0 if rows[0][0] is not None and rows[0][0] > wall_ms + retry_max_ms else min(waits)


def take(
    tx: Transaction,
    topic: str,
    lease: Lease,
    most: int,
    busy: frozenset[str],
    settings: QueueSettings,
    wall_ms: int,
    mono_ms: int,
) -> list[Job]:
    """Take up to ``most`` keys, except the ``busy`` ones, and begin a delivery of the first message of each."""
    _update_ready(tx, topic, lease, settings, wall_ms, mono_ms)
    jobs: list[Job] = []
    ready: list[Any] = tx.db.execute(
        "SELECT key FROM queue_keys WHERE topic = ? AND at = 0 ORDER BY place LIMIT ?", (topic, most + len(busy))
    ).fetchall()
    for key in [key for (key,) in ready if key not in busy][:most]:
        while (first := _first(tx, topic, key)) is not None and first[4] >= settings.deliveries:
            _move_to_dead(tx, topic, key, first[0], DIED, settings, wall_ms)
        if first is None:
            _next(tx, topic, key)
            continue
        place, id, payload, created, deliveries = first
        tx.db.execute("UPDATE queue_messages SET deliveries = deliveries + 1 WHERE place = ?", (place,))
        _count(tx, topic, fence=1, retries=1 if deliveries else 0)
        row = tx.one("SELECT fence FROM queue_topics WHERE topic = ?", (topic,))
        assert row is not None
        tx.db.execute(
            "UPDATE queue_keys SET at = NULL, place = ?, owner = ?, boot = ?, until = ?, fence = ?"
            " WHERE topic = ? AND key = ?",
            (place, lease.owner, lease.boot, mono_ms + settings.lease_ms, row[0], topic, key),
        )
        jobs.append(Job(id, topic, key, payload, deliveries + 1, created, row[0]))
    return jobs


def _update_ready(
    tx: Transaction, topic: str, lease: Lease, settings: QueueSettings, wall_ms: int, mono_ms: int
) -> None:
    """Mark what has become ready: tries that are due, keys whose lease ran out, delays that are over."""
    tx.db.execute(
        "UPDATE queue_keys SET at = 0 WHERE topic = ? AND ((at > 0 AND at <= ?) OR at > ?)",
        (topic, wall_ms, wall_ms + settings.retry_max_ms),
    )
    tx.db.execute(
        "UPDATE queue_keys SET at = 0, owner = NULL"
        " WHERE topic = ? AND owner IS NOT NULL AND (boot <> ? OR until <= ?)",
        (topic, lease.boot, mono_ms),
    )
    due: list[Any] = tx.db.execute(
        "SELECT n, id, key, payload, created FROM queue_delayed WHERE topic = ? AND due <= ? ORDER BY due, n LIMIT ?",
        (topic, wall_ms, DUE_BATCH),
    ).fetchall()
    for n, id, key, payload, created in due:
        tx.db.execute("DELETE FROM queue_delayed WHERE n = ?", (n,))
        _make_ready(tx, id, topic, key, payload, created, wall_ms)
    if due:
        _count(tx, topic, delayed=-len(due))


def _first(tx: Transaction, topic: str, key: str) -> tuple[Any, ...] | None:
    return tx.one(
        "SELECT place, id, payload, created, deliveries FROM queue_messages WHERE topic = ? AND key = ?"
        " ORDER BY place LIMIT 1",
        (topic, key),
    )


def _next(tx: Transaction, topic: str, key: str) -> None:
    """Release a key: its next message is ready at once; without one the key is deleted."""
    first = _first(tx, topic, key)
    if first is None:
        tx.db.execute("DELETE FROM queue_keys WHERE topic = ? AND key = ?", (topic, key))
    else:
        tx.db.execute(
            "UPDATE queue_keys SET at = 0, place = ?, owner = NULL WHERE topic = ? AND key = ?", (first[0], topic, key)
        )


# -- leases and outcomes. Each returns whether the lease was still held: a stale fence changes nothing.


def _held(tx: Transaction, job: Job, lease: Lease) -> int | None:
    """The place of the job's message, if the lease under which it was taken still holds."""
    row = tx.one(
        "SELECT place FROM queue_keys WHERE topic = ? AND key = ? AND owner = ? AND fence = ?",
        (job.topic, job.key, lease.owner, job.fence),
    )
    return None if row is None else int(row[0])


def renew(tx: Transaction, jobs: list[Job], lease: Lease, lease_ms: int, mono_ms: int) -> list[bool]:
    """Hold the keys for another ``lease_ms``."""
    held = []
    for job in jobs:
        held.append(_held(tx, job, lease) is not None)
        if held[-1]:
            tx.db.execute(
                "UPDATE queue_keys SET until = ? WHERE topic = ? AND key = ?", (mono_ms + lease_ms, job.topic, job.key)
            )
    return held


def done(tx: Transaction, job: Job, lease: Lease) -> bool:
    """The message is done: delete it."""
    if (place := _held(tx, job, lease)) is None:
        return False
    tx.db.execute("DELETE FROM queue_messages WHERE place = ?", (place,))
    _count(tx, job.topic, depth=-1)
    _next(tx, job.topic, job.key)
    return True


def failed(
    tx: Transaction, job: Job, lease: Lease, error: str, wait_ms: int, settings: QueueSettings, wall_ms: int
) -> bool:
    """The delivery failed: try again after ``wait_ms``, or make a dead letter if it was the last."""
    if (place := _held(tx, job, lease)) is None:
        return False
    if job.delivery >= settings.deliveries:
        _move_to_dead(tx, job.topic, job.key, place, error, settings, wall_ms)
        _next(tx, job.topic, job.key)
    else:
        tx.db.execute(
            "UPDATE queue_keys SET at = ?, owner = NULL WHERE topic = ? AND key = ?",
            (wall_ms + wait_ms, job.topic, job.key),
        )
    return True


def give_back(tx: Transaction, job: Job, lease: Lease) -> bool:
    """The delivery does not count: another worker may begin it at once."""
    if (place := _held(tx, job, lease)) is None:
        return False
    tx.db.execute("UPDATE queue_messages SET deliveries = deliveries - 1 WHERE place = ?", (place,))
    _next(tx, job.topic, job.key)
    return True


def _move_to_dead(
    tx: Transaction, topic: str, key: str, place: int, error: str, settings: QueueSettings, wall_ms: int
) -> None:
    tx.db.execute(
        "INSERT INTO queue_dead(id, topic, key, payload, created, failed, deliveries, error)"
        " SELECT id, topic, key, payload, created, ?, deliveries, ? FROM queue_messages WHERE place = ?",
        (wall_ms, error, place),
    )
    tx.db.execute("DELETE FROM queue_messages WHERE place = ?", (place,))
    _count(tx, topic, depth=-1, dead=1)
    row = tx.one("SELECT dead FROM queue_topics WHERE topic = ?", (topic,))
    assert row is not None
    if (excess := row[0] - settings.dead_max) > 0:
        tx.db.execute(
            "DELETE FROM queue_dead WHERE n IN (SELECT n FROM queue_dead WHERE topic = ? ORDER BY n LIMIT ?)",
            (topic, excess),
        )
        _count(tx, topic, dead=-excess, dead_lost=excess)


# -- statistics, and dead letters


def stats(db: apsw.Connection, wall_ms: int) -> list[TopicStats]:
    """A query: all topics, by name."""
    if not has_tables(db):
        return []
    rows: list[Any] = db.execute(
        "SELECT topic, depth, delayed, retries, dead, dead_lost,"
        " (SELECT since FROM queue_messages m WHERE m.topic = t.topic ORDER BY place LIMIT 1)"
        " FROM queue_topics t ORDER BY topic"
    ).fetchall()
    return [
        TopicStats(topic, depth, delayed, 0 if since is None else max(0, wall_ms - since), retries, dead, lost)
        for topic, depth, delayed, retries, dead, lost, since in rows
    ]


def dead(db: apsw.Connection, topic: str | None, limit: int) -> list[DeadLetter]:
    """A query: dead letters, oldest first within a topic."""
    if not has_tables(db):
        return []
    where, args = ("", ()) if topic is None else ("WHERE topic = ?", (topic,))
    rows: list[Any] = db.execute(
        "SELECT id, topic, key, payload, deliveries, error, created, failed FROM queue_dead"
        f" {where} ORDER BY topic, n LIMIT ?",
        (*args, limit),
    ).fetchall()
    return [DeadLetter(*row) for row in rows]


def retry(tx: Transaction, id: str | None, now_ms: int) -> int:
    """Make dead letters (None: up to :data:`LETTERS_BATCH` of all) ready again, as new; how many."""
    letters = _letters(tx, id)
    for n, mid, topic, key, payload, created in letters:
        tx.db.execute("DELETE FROM queue_dead WHERE n = ?", (n,))
        _make_ready(tx, mid, topic, key, payload, created, now_ms)
        _count(tx, topic, depth=1, dead=-1)
    return len(letters)


def drop(tx: Transaction, id: str | None) -> int:
    """Delete dead letters (None: up to :data:`LETTERS_BATCH` of all); how many."""
    letters = _letters(tx, id)
    for n, _, topic, *_ in letters:
        tx.db.execute("DELETE FROM queue_dead WHERE n = ?", (n,))
        _count(tx, topic, dead=-1)
    return len(letters)


def _letters(tx: Transaction, id: str | None) -> list[Any]:
    where, args = ("", ()) if id is None else ("WHERE id = ?", (id,))
    letters: list[Any] = tx.db.execute(
        f"SELECT n, id, topic, key, payload, created FROM queue_dead {where} ORDER BY n LIMIT ?",
        (*args, LETTERS_BATCH),
    ).fetchall()
    return letters
