"""The two threads of a worker's SQLite store, and how the loop talks to them.

The writer groups everything that waits into one commit (docs/log.md, "SQLite"); the
reader runs queries. Each owns its connection. Work goes in through a bounded
deque, results come back to the loop in one call per batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import apsw

from ...entries import MESSAGES, NewEntry
from ...errors import ChatError, Internal, Unavailable
from ..base import Entry, OnCommit
from . import ops
from .schema import BUSY_TIMEOUT_MS, LOCK_NAMES, connect, database_path

log = logging.getLogger("chatcore.store")

# Queries waiting at most: beyond it the reader is seconds behind, and more would only wait longer.
READ_QUEUE: Final = 10_000
# Try to start the log file over when it has grown to this many times the checkpoint size.
RESTART_FACTOR: Final = 4
# A transaction takes no further operation after this: the other workers wait for the lock.
BATCH_S: Final = 0.05
# How long a checkpoint waits for a reader that is on an old snapshot.
CHECKPOINT_BUSY_MS: Final = 50

Work = NewEntry | ops.Op
Future = asyncio.Future[Any]


class WriteLock:
    """Two file locks that make a queue.

    ``flock`` alone is not fair: a process that releases it and wants it again at
    once wins against a waiter that has yet to wake up. Here one waiter holds
    ``next`` while it waits for ``write``, and a process that wants the lock again
    must get ``next`` first, which it cannot before that waiter has had its turn.
    The kernel releases both when a process dies.

    One per thread: it owns its two descriptors (opened after the fork, since a
    descriptor that is inherited shares its locks).
    """

    def __init__(self, data: Path) -> None:
        self._next, self._write = (
            os.open(data / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for name in LOCK_NAMES
        )

    def __enter__(self) -> None:
        fcntl.flock(self._next, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._write, fcntl.LOCK_EX)
        finally:
            fcntl.flock(self._next, fcntl.LOCK_UN)

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        fcntl.flock(self._write, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close both descriptors."""
        os.close(self._next)
        os.close(self._write)


class _Thread:
    """A named thread with a bounded queue of (work, future)."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self._loop = loop
        self._limit = limit
        self._queue: deque[tuple[Any, Future, float]] = deque()
        self._wake = threading.Condition(threading.Lock())
        self._stopping = False
        self._taken: Sequence[tuple[Any, Future, float]] = ()
        #: False while the database does not answer.
        self.healthy = True
        self._thread = threading.Thread(target=self._guarded, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, work: Any) -> Future:
        """Queue work; the future is resolved on the loop."""
        future: Future = self._loop.create_future()
        with self._wake:
            full = self._stopping or len(self._queue) >= self._limit or not self._thread.is_alive()
            if not full:
                self._queue.append((work, future, time.monotonic()))
                self._wake.notify()
        if full:
            future.set_exception(Unavailable("the store is busy" if not self._stopping else "the server is stopping"))
        return future

    async def stop(self) -> None:
        """Finish what is queued, then end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        while self._thread.is_alive():
            await asyncio.sleep(0.005)

    def give_up(self, older_than_s: float) -> None:
        """Answer ``unavailable`` to all that has waited longer; the work itself may still be done."""
        limit = time.monotonic() - older_than_s
        for _, future, since in [*self._taken, *list(self._queue)]:
            if since > limit:
                break
            if not future.done():
                self.healthy = False
                future.set_exception(Unavailable("the store does not answer"))

    def _take(self, most: int) -> list[tuple[Any, Future, float]]:
        """Wait for work; an empty list means stop."""
        with self._wake:
            while not self._queue and not self._stopping:
                self._wake.wait()
            batch = [self._queue.popleft() for _ in range(min(most, len(self._queue)))]
        self._taken = batch
        return batch

    def _answer(self, call: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its callers with it
            self._loop.call_soon_threadsafe(call, *args)

    def idle(self) -> bool:
        """Nothing waits and nothing is being done."""
        return not self._queue and not self._taken

    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException:
            # No known failure ends here. One that does shows in health, and its callers are answered.
            log.critical("%s has died", self._thread.name, exc_info=True)
            self.healthy = False

    def _run(self) -> None:
        raise NotImplementedError


def _resolve(batch: Sequence[tuple[Any, Future, float]], outcomes: Sequence[Any]) -> None:
    for (_, future, _), outcome in zip(batch, outcomes, strict=True):
        if future.done():
            continue
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


class Reader(_Thread):
    """Runs queries one after the other on a read-only connection."""

    def __init__(self, data: Path, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__("store-reader", loop, READ_QUEUE)
        self._path = database_path(data)

    def _run(self) -> None:
        db: apsw.Connection | None = None
        while batch := self._take(64):
            outcomes: list[Any] = []
            for query, future, _ in batch:
                if future.done():  # given up or cancelled
                    outcomes.append(None)
                    continue
                try:
                    if db is None:
                        db = connect(self._path, write=False)
                    outcomes.append(query(db))
                    self.healthy = True
                except ChatError as exc:
                    outcomes.append(exc)
                except apsw.Error as exc:
                    log.error("read failed: %s", exc)
                    self.healthy = False
                    outcomes.append(Unavailable("the store does not answer"))
                    _close(db)
                    db = None
                except Exception:
                    log.exception("a query failed")
                    outcomes.append(Internal("internal error"))
            self._answer(_resolve, batch, outcomes)
            self._taken = ()
        _close(db)


def _close(db: apsw.Connection | None) -> None:
    if db is not None:
        try:
            db.close(True)
        except apsw.Error as exc:
            log.warning("closing the database: %s", exc)


class Writer(_Thread):
    """Commits batches: all that waits, of any conversations, in one transaction."""

    def __init__(
        self,
        data: Path,
        loop: asyncio.AbstractEventLoop,
        secret: bytes,
        on_commit: OnCommit,
        *,
        queue: int,
        batch: int,
        checkpoint_pages: int,
        max_conversations: int,
    ) -> None:
        super().__init__("store-writer", loop, queue)
        self._path = database_path(data)
        self._data = data
        self._secret = secret
        self._on_commit = on_commit
        self._batch = batch
        self._checkpoint_pages = checkpoint_pages
        self._max_conversations = max_conversations

    def _run(self) -> None:
        lock: WriteLock | None = None
        db: apsw.Connection | None = None
        try:
            while batch := self._take(self._batch):
                outcomes: list[Any] | None = None
                entries: list[Entry] = []
                for attempt in range(2):
                    try:
                        if lock is None:
                            lock = WriteLock(self._data)
                        with lock:
                            if db is None:
                                db = self._connect()
                            outcomes, entries = self._commit(db, [work for work, _, _ in batch])
                            self._checkpoint(db)
                        self.healthy = True
                        break
                    except (apsw.Error, OSError) as exc:
                        # The outcome is unknown: entries that were committed after all are found by
                        # their cids when the same batch is tried again on a new connection.
                        log.error("write failed (attempt %d): %s", attempt + 1, exc)
                        self.healthy = False
                        _close(db)
                        db = None
                    except Exception:
                        log.exception("a write transaction failed")
                        _close(db)
                        db = None
                        break
                if outcomes is None:
                    # The work behind it fails with it: no entry overtakes one that failed (docs/log.md).
                    batch += self._take_all()
                    outcomes = [Unavailable("the store does not answer") for _ in batch]
                elif len(outcomes) < len(batch):
                    self._put_back(batch[len(outcomes) :])
                    del batch[len(outcomes) :]
                self._answer(self._finish, batch, outcomes, entries)
                self._taken = ()
        finally:
            _close(db)
            if lock is not None:
                lock.close()

    def _take_all(self) -> list[tuple[Any, Future, float]]:
        with self._wake:
            rest = list(self._queue)
            self._queue.clear()
        return rest

    def _put_back(self, rest: Sequence[tuple[Any, Future, float]]) -> None:
        with self._wake:
            self._queue.extendleft(reversed(rest))

    def _connect(self) -> apsw.Connection:
        if not self._path.exists():
            raise OSError(f"{self._path} is gone")
        return connect(self._path, write=True)

    def _commit(self, db: apsw.Connection, batch: list[Work]) -> tuple[list[Any], list[Entry]]:
        """Do what there is time for, from the front, in one transaction; an outcome for each that was done."""
        until = time.monotonic() + BATCH_S
        db.execute("BEGIN IMMEDIATE")
        try:
            tx = ops.Transaction(db, self._secret, self._max_conversations)
            outcomes: list[Any] = []
            at = 0
            while at < len(batch) and (at == 0 or time.monotonic() < until):
                run: list[NewEntry] = []
                while at < len(batch) and isinstance(work := batch[at], NewEntry) and work.t in MESSAGES:
                    run.append(work)
                    at += 1
                if run:
                    outcomes.extend(ops.append_messages(tx, run))
                    continue
                work = batch[at]
                outcomes.append(self._one(tx, ops.append_one(work) if isinstance(work, NewEntry) else work))
                at += 1
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return outcomes, tx.appended

    def _one(self, tx: ops.Transaction, op: ops.Op) -> Any:
        """One operation in a savepoint of its own: refused means that it changed nothing."""
        mark = len(tx.appended)
        tx.db.execute("SAVEPOINT op")
        try:
            outcome = op(tx)
        except ChatError as exc:
            tx.db.execute("ROLLBACK TO op")
            tx.rewind()
            del tx.appended[mark:]
            outcome = exc
        tx.db.execute("RELEASE op")
        return outcome

    def _checkpoint(self, db: apsw.Connection) -> None:
        """Move committed pages into the database file, under the write lock, so that it races no commit."""
        try:
            # Polled here instead of by a hook: a callback in the middle of a commit waits for the interpreter.
            pages, moved = db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
            if max(pages - moved, pages / RESTART_FACTOR) < self._checkpoint_pages:
                return
            restart = pages >= self._checkpoint_pages * RESTART_FACTOR
            db.set_busy_timeout(CHECKPOINT_BUSY_MS)
            db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART if restart else apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.BusyError:
            pass  # a reader is on an old snapshot: next time
        except apsw.Error as exc:
            # The commit before it stands; the next write finds out whether the disk works.
            log.error("checkpoint failed: %s", exc)
        finally:
            db.set_busy_timeout(BUSY_TIMEOUT_MS)

    def _finish(self, batch: Sequence[tuple[Any, Future, float]], outcomes: list[Any], entries: list[Entry]) -> None:
        """On the loop: announce the new entries, and answer.

        A caller that waits for its answer goes on in the loop's next turn, after the announcement here,
        and before the clients are written to: the sender's own entry and its ``ok`` leave together.
        """
        _resolve(batch, outcomes)
        try:
            if entries:
                self._on_commit(entries)
        except Exception:
            # They are durable, and the next look at the store finds them: the callers are answered.
            log.exception("announcing %d new entries failed", len(entries))
