"""The embedded queue's tables, the requests that change them, and the queries.

``queue_keys`` has a row for each key of a topic that has messages. The first message of a key is the one that may
be handled. ``at`` says when: 0 now, otherwise the wall clock's ms of its next try, NULL while a worker has taken
the key. That worker holds a lease: until a moment of the monotonic clock, which all processes of a host share, in
this boot of the machine (after another boot no worker of this one runs).

A request is applied inside a write transaction of the store's writer, so it reads the newest state. It carries the
times of its sender, who decides by the same ones how long its leases hold. None of them refuses anything: what cannot
be done is a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import apsw

from ..store.sqlite.requests import Request
from .base import DIED, DeadLetter, Job, QueueSettings, TopicStats

if TYPE_CHECKING:
    from ..store.sqlite.transaction import Transaction

# Delayed messages made ready, and dedupe ids deleted, by one request: the writer has others to serve.
DUE_BATCH: Final = 100
FORGET_BATCH: Final = 10
# Dead letters retried or dropped by one request.
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
class Lease:
    """The holder of a lease: ``owner`` is one queue of one process in one ``boot`` of the machine."""

    owner: str
    boot: str


@dataclass(frozen=True, slots=True)
class Taken:
    """A key that was taken: what of a :class:`~.base.Job` says under which lease."""

    topic: str
    key: str
    fence: int

    @staticmethod
    def of(job: Job) -> Taken:
        """The key that was taken for a job."""
        return Taken(job.topic, job.key, job.fence)


class MakeQueueTables(Request, frozen=True, gc=False):
    """Create the tables that are missing. They are no part of the store's schema version: an older program ignores
    them."""

    # Repeatable: tables that are there stay as they are.

    def apply(self, tx: Transaction) -> None:
        tx.db.execute(_DDL)


def has_tables(db: apsw.Connection) -> bool:
    """Whether :class:`MakeQueueTables` was ever applied."""
    return bool(db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'queue_topics'").fetchall())


# -- putting


class QueuePut(Request, frozen=True, gc=False):
    """Put a message that was checked (:func:`~.base.check_message`).

    ``id`` is the one that it gets if it is new. The result is its id, or that of its first put; or a number: so many
    messages wait, which is as many as may, and nothing was put.
    """

    id: str
    topic: str
    key: str
    payload: bytes
    delay_ms: int
    dedupe_id: str | None
    settings: QueueSettings
    wall_ms: int

    result = str | int
    # A first try that was committed is known by nothing but a dedupe id, and one for each put would cost two more
    # pages. The caller repeats it with the same dedupe id, as after every unknown outcome.
    repeatable = False

    def apply(self, tx: Transaction) -> str | int:
        if self.dedupe_id is not None:
            tx.db.execute(
                "DELETE FROM queue_dedupe WHERE rowid IN"
                " (SELECT rowid FROM queue_dedupe WHERE expires <= ? ORDER BY expires LIMIT ?)",
                (self.wall_ms, FORGET_BATCH),
            )
            row = tx.one(
                "SELECT id FROM queue_dedupe WHERE topic = ? AND key = ? AND dedupe_id = ? AND expires > ?",
                (self.topic, self.key, self.dedupe_id, self.wall_ms),
            )
            if row is not None:
                return str(row[0])
        row = tx.one("SELECT depth FROM queue_topics WHERE topic = ?", (self.topic,))
        if row is not None and row[0] >= self.settings.max_length:
            return int(row[0])
        if self.dedupe_id is not None:
            tx.db.execute(
                "INSERT OR REPLACE INTO queue_dedupe VALUES (?, ?, ?, ?, ?)",
                (self.topic, self.key, self.dedupe_id, self.id, self.wall_ms + self.settings.dedupe_ms),
            )
        _count(tx, self.topic, depth=1, delayed=1 if self.delay_ms else 0)
        if self.delay_ms:
            tx.db.execute(
                "INSERT INTO queue_delayed(id, topic, key, payload, created, due) VALUES (?, ?, ?, ?, ?, ?)",
                (self.id, self.topic, self.key, self.payload, self.wall_ms, self.wall_ms + self.delay_ms),
            )
        else:
            _make_ready(tx, self.id, self.topic, self.key, self.payload, self.wall_ms, self.wall_ms)
        return self.id


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


class QueueTake(Request, frozen=True, gc=False):
    """Take up to ``most`` keys, except the ``busy`` ones, and begin a delivery of the first message of each.

    The result is the jobs.
    """

    topic: str
    lease: Lease
    most: int
    busy: frozenset[str]
    settings: QueueSettings
    wall_ms: int
    mono_ms: int

    result = list[Job]
    # What a first try took is held already, so another would take the next keys. The leases run out, and the messages
    # are delivered again.
    repeatable = False

    def apply(self, tx: Transaction) -> list[Job]:
        topic, settings = self.topic, self.settings
        _update_ready(tx, topic, self.lease, settings, self.wall_ms, self.mono_ms)
        jobs: list[Job] = []
        ready: list[Any] = tx.db.execute(
            "SELECT key FROM queue_keys WHERE topic = ? AND at = 0 ORDER BY place LIMIT ?",
            (topic, self.most + len(self.busy)),
        ).fetchall()
        for key in [key for (key,) in ready if key not in self.busy][: self.most]:
            while (first := _first(tx, topic, key)) is not None and first[4] >= settings.deliveries:
                _move_to_dead(tx, topic, key, first[0], DIED, settings, self.wall_ms)
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
                (place, self.lease.owner, self.lease.boot, self.mono_ms + settings.lease_ms, row[0], topic, key),
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


# -- leases and outcomes. The result is whether the lease was still held: a stale fence changes nothing. All are
# repeatable: a renewal that is repeated in its place changes nothing more, and an outcome has ended the lease, so that
# it finds nothing to do again. It is then told that the lease was lost, which callers only log.


def _held(tx: Transaction, taken: Taken, lease: Lease) -> int | None:
    """The place of the message for which a key was taken, if that lease still holds."""
    row = tx.one(
        "SELECT place FROM queue_keys WHERE topic = ? AND key = ? AND owner = ? AND fence = ?",
        (taken.topic, taken.key, lease.owner, taken.fence),
    )
    return None if row is None else int(row[0])


class QueueRenew(Request, frozen=True, gc=False):
    """Hold the keys for another ``lease_ms``; the result is for each whether it was still held."""

    taken: list[Taken]
    lease: Lease
    lease_ms: int
    mono_ms: int

    result = list[bool]

    def apply(self, tx: Transaction) -> list[bool]:
        held = [_held(tx, taken, self.lease) is not None for taken in self.taken]
        for taken, still in zip(self.taken, held, strict=True):
            if still:
                tx.db.execute(
                    "UPDATE queue_keys SET until = ? WHERE topic = ? AND key = ?",
                    (self.mono_ms + self.lease_ms, taken.topic, taken.key),
                )
        return held


class _Outcome(Request, frozen=True, gc=False):
    """What came of a delivery. False: the lease under which it was begun is lost, and nothing was changed."""

    taken: Taken
    lease: Lease

    result = bool

    def apply(self, tx: Transaction) -> bool:
        if (place := _held(tx, self.taken, self.lease)) is None:
            return False
        self.settle(tx, place)
        return True

    def settle(self, tx: Transaction, place: int) -> None:
        """Do it; ``place`` is that of the message."""
        raise NotImplementedError


class QueueDone(_Outcome, frozen=True, gc=False):
    """The message is done: delete it."""

    def settle(self, tx: Transaction, place: int) -> None:
        tx.db.execute("DELETE FROM queue_messages WHERE place = ?", (place,))
        _count(tx, self.taken.topic, depth=-1)
        _next(tx, self.taken.topic, self.taken.key)


class QueueFailed(_Outcome, frozen=True, gc=False):
    """The delivery failed: try again after ``wait_ms``; None: it was the last, make a dead letter."""

    error: str
    wait_ms: int | None
    settings: QueueSettings
    wall_ms: int

    def settle(self, tx: Transaction, place: int) -> None:
        topic, key = self.taken.topic, self.taken.key
        if self.wait_ms is None:
            _move_to_dead(tx, topic, key, place, self.error, self.settings, self.wall_ms)
            _next(tx, topic, key)
        else:
            tx.db.execute(
                "UPDATE queue_keys SET at = ?, owner = NULL WHERE topic = ? AND key = ?",
                (self.wall_ms + self.wait_ms, topic, key),
            )


class QueueGiveBack(_Outcome, frozen=True, gc=False):
    """The delivery does not count: another worker may begin it at once."""

    def settle(self, tx: Transaction, place: int) -> None:
        tx.db.execute("UPDATE queue_messages SET deliveries = deliveries - 1 WHERE place = ?", (place,))
        _next(tx, self.taken.topic, self.taken.key)


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


class QueueRetry(Request, frozen=True, gc=False):
    """Make dead letters (None: up to :data:`LETTERS_BATCH` of all) ready again, as new; the result is how many."""

    id: str | None
    wall_ms: int

    result = int
    # The count of a second try would say that there was nothing, or leave out what the first has done.
    repeatable = False

    def apply(self, tx: Transaction) -> int:
        letters = _letters(tx, self.id)
        for n, id, topic, key, payload, created in letters:
            tx.db.execute("DELETE FROM queue_dead WHERE n = ?", (n,))
            _make_ready(tx, id, topic, key, payload, created, self.wall_ms)
            _count(tx, topic, depth=1, dead=-1)
        return len(letters)


class QueueDrop(Request, frozen=True, gc=False):
    """Delete dead letters (None: up to :data:`LETTERS_BATCH` of all); the result is how many."""

    id: str | None

    result = int
    repeatable = False  # as above

    def apply(self, tx: Transaction) -> int:
        letters = _letters(tx, self.id)
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


#: All requests of the queue, for the store's writer.
QUEUE_REQUESTS: Final[tuple[type[Request], ...]] = (
    MakeQueueTables,
    QueuePut,
    QueueTake,
    QueueRenew,
    QueueDone,
    QueueFailed,
    QueueGiveBack,
    QueueRetry,
    QueueDrop,
)
