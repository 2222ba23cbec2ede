"""The writer's transactions: batches of requests, each committed as a whole.

What makes up for the missing unique index (docs/log.md, rules 1, 3 and 4): there is one writer, which holds the lock;
each transaction checks first that the writer's epoch and the newest entry are those that it left behind; what it knows
of the log changes only after COMMIT returned, and is read again after any error.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import apsw
import msgspec

from ...entries import MESSAGES
from ...errors import ChatError, Unavailable
from .folding import Folding
from .lock import IndexerLock
from .ops import Append, append_messages, refusal
from .requests import Reply, Request
from .schema import BUSY_TIMEOUT_MS, connect, database_path
from .tail import Snapshot, StaleIndex
from .transaction import LogState, Transaction

log = logging.getLogger("chatcore.writer")

# A transaction takes no further request after this: others wait.
BATCH_S: Final = 0.01
# Between looks at what the index covers, while there are commits.
LOOK_S: Final = 0.1
# How long a transaction waits for a foreign one (of an operator's shell) before the loop goes round.
BUSY_MS: Final = 200
# Pages that the writer itself moves at the end of a checkpoint: about a millisecond, and a sync.
FINAL_PAGES: Final = 256
# Between tries to empty the write-ahead log after text was overwritten, and how long each waits, with all commits, for
# readers on an older state: one may stand in the way for 500 ms.
ERASE_S: Final = 0.1
ERASE_WAIT_MS: Final = 20
# With so many times store.checkpoint_pages in the write-ahead log the writer moves them itself, if there is no indexer.
OVERDUE: Final = 16

#: The answer to what would make the tail grow while the index lags too much.
BEHIND: Final = refusal(Unavailable("the index of the store is behind"))


class Superseded(Exception):
    """Another writer has written: this one must end at once."""


class Busy(Exception):
    """Somebody else holds the lock of the database file: nothing was done, and it may be tried again."""


class Failed(Exception):
    """The outcome of a batch is unknown: it may be committed, and it may not."""


class Engine:
    """The transactions of the one writer of a data folder. The caller holds the folder's :class:`~.lock.WriterLock`.

    :param tail_entries: entries that the index lacks, at most; beyond, messages are refused.
    """

    def __init__(
        self,
        data: Path,
        *,
        tail_entries: int = 200_000,
        checkpoint_pages: int = 4_000,
    ) -> None:
        self._data = data
        self._path = database_path(data)
        self._tail_entries = tail_entries
        self._checkpoint_pages = checkpoint_pages
        self._db: apsw.Connection | None = None
        self._snapshot: Snapshot | None = None
        self._state: LogState
        self._epoch = 0
        self._folding: Folding
        self._look_at = 0.0
        #: Requests at the front of the batch that may be committed, although COMMIT failed.
        self._unknown = 0
        self._erase_at = 0.0
        #: The last transaction refused what would make the tail grow.
        self.full = False
        #: Overwritten text is still in the write-ahead log.
        self.erasing = False

    def open(self) -> None:
        """Take over: no other writer's transaction commits from now on.

        :raises apsw.Error, OSError: as SQLite says.
        """
        self._db = db = self._open_file()
        db.set_busy_timeout(BUSY_TIMEOUT_MS)
        db.execute("BEGIN IMMEDIATE")
        db.set_busy_timeout(BUSY_MS)
        db.execute("UPDATE meta SET value = value + 1 WHERE key = 'epoch'")
        db.execute("COMMIT")
        self._epoch = self._meta("epoch")
        # Only now: the writer before this one may have committed until then.
        self._read()

    def close(self) -> None:
        """Close the files."""
        if self._snapshot is not None:
            with contextlib.suppress(apsw.Error):
                self._snapshot.close()
            self._snapshot = None
        if self._db is not None:
            with contextlib.suppress(apsw.Error):
                self._db.close(True)
            self._db = None

    def _connect(self) -> apsw.Connection:
        """Open the files, and read what is committed."""
        if self._db is None:
            self._db = self._open_file()
            self._read()
        return self._db

    def _open_file(self) -> apsw.Connection:
        if not self._path.exists():
            raise OSError(errno.ENOENT, f"{self._path} is gone")
        db = connect(self._path, write=True)
        db.set_busy_timeout(BUSY_MS)
        db.execute("PRAGMA secure_delete = ON")
        return db

    def _read(self) -> None:
        self._snapshot = Snapshot(self._data)
        self._state = LogState(self._snapshot, bytes(self._meta("secret")))
        self._fold_anew()
        self.erasing = self.erasing or bool(self._meta("erasing"))

    def _fold_anew(self) -> None:
        self._folding = Folding(self._state, self._meta("folded"), self._meta("trimmed"))

    def _meta(self, key: str) -> Any:
        assert self._db is not None
        row: Any = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return 0 if row is None else row[0]

    @property
    def behind(self) -> int:
        """How many entries the index may lack."""
        return self._state.position - self._state.mark

    @property
    def due(self) -> bool:
        """There is work to do with the next transaction, or in one without requests."""
        return self._folding.due

    @property
    def pressed(self) -> bool:
        """The index lags so much that commits have to slow down, before messages are refused."""
        return self.behind > self._tail_entries * 3 // 4

    def commit(self, batch: Sequence[Request]) -> list[Reply]:
        """Do what there is time for, from the front, in one transaction; a reply for each that was done.

        :raises Superseded: another writer has written.
        :raises Busy: nothing was done.
        :raises Failed: twice an error; the outcome is unknown.
        """
        for attempt in range(2):
            again = self._unknown if attempt else 0
            try:
                replies = self._commit(batch, again)
            except Superseded:
                raise
            except Busy:
                if again:
                    break  # the next batch would be another one, and not know that it is the second time
                raise
            except (apsw.Error, OSError, StaleIndex) as exc:
                # Entries that were committed after all are found by their cids when the batch is tried again.
                log.error("write failed (attempt %d): %s", attempt + 1, exc)
                self.close()
                continue
            except Exception:
                log.exception("a write transaction failed")
                self.close()
                break
            repeated = [msgspec.structs.replace(r, announce=True) if r.dup else r for r in replies[:again]]
            return repeated + replies[again:]
        raise Failed("the store does not answer")

    def _commit(self, batch: Sequence[Request], again: int) -> list[Reply]:
        """:param again: so many at the front may be committed already: none of them is left for later."""
        self._unknown = again
        db = self._connect()
        until = time.monotonic() + BATCH_S
        full = self.full = self.behind > self._tail_entries
        try:
            db.execute("BEGIN IMMEDIATE")
        except apsw.BusyError as exc:
            raise Busy(str(exc)) from None
        try:
            self._check_alone(db)
            tx = Transaction(db, self._state)
            replies: list[Reply] = []
            at = 0
            while at < len(batch) and (at == 0 or at < again or time.monotonic() < until):
                if full and batch[at].grows:
                    replies.append(BEHIND)
                    at += 1
                    continue
                run: list[Append] = []
                while at < len(batch) and isinstance(e := batch[at], Append) and e.t in MESSAGES:
                    run.append(e)
                    at += 1
                if run:
                    replies += append_messages(tx, run)
                elif at < again and not batch[at].repeatable:
                    replies.append(refusal(Unavailable("the outcome is unknown")))
                    at += 1
                else:
                    replies.append(_apply(tx, batch[at]))
                    at += 1
            self._folding.step(db, at)
            if tx.erased:
                db.execute("INSERT OR REPLACE INTO meta VALUES ('erasing', 1)")
                self.erasing = True
            self._unknown = at
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            self._fold_anew()
            raise
        self._folding.committed()
        tx.keep()
        if time.monotonic() >= self._look_at:
            self.look()
        return replies

    def _check_alone(self, db: apsw.Connection) -> None:
        """Nobody but this writer has committed."""
        row = db.execute(
            "SELECT (SELECT value FROM meta WHERE key = 'epoch'), coalesce(max(id), 0) FROM entries"
        ).fetchone()
        assert row is not None
        if row[0] != self._epoch or row[1] != self._state.newest_id:
            raise Superseded(f"epoch {row[0]} and entry {row[1]}, not {self._epoch} and {self._state.newest_id}")

    # --- between commits ----------------------------------------------------------------------
    def look(self) -> None:
        """Look at what the index covers by now."""
        try:
            self._connect()
            self._look_at = time.monotonic() + LOOK_S
            self._state.follow()
        except (apsw.Error, OSError, StaleIndex) as exc:
            log.error("the store cannot be read: %s", exc)
            self.close()

    def checkpoint(self) -> None:
        """Move the last pages of the write-ahead log into the file, so that it begins anew with the next commit.

        The indexer moves most of them meanwhile; without it they are moved here once they are far too many. After text
        was overwritten all are moved, and the file is cut to nothing.
        """
        db = self._db
        if db is None:
            return
        try:
            if self.erasing and time.monotonic() >= self._erase_at:
                self._erase_at = time.monotonic() + ERASE_S
                # Readers that begin while it waits do not stand in the way, if all pages are moved: so it ends, however
                # many there are.
                db.set_busy_timeout(ERASE_WAIT_MS)
                try:
                    db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
                    self.erasing = False
                    db.execute("UPDATE meta SET value = 0 WHERE key = 'erasing'")
                finally:
                    db.set_busy_timeout(BUSY_MS)
                return
            # Polled here instead of by a hook: a callback in the middle of a commit waits for the interpreter.
            pages, moved = db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
            if pages < self._checkpoint_pages or pages == moved:
                return
            if pages - moved <= FINAL_PAGES or (pages >= self._checkpoint_pages * OVERDUE and self._without_indexer()):
                db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.BusyError:
            pass  # the indexer is at it, or a reader on an older state: again after the next turn
        except apsw.Error as exc:
            # The commit before it stands; the next write finds out whether the disk works.
            log.error("checkpoint failed: %s", exc)

    def _without_indexer(self) -> bool:
        """Nobody else moves pages: a reader may have kept them where they are for long, and the indexer will move them
        now without any commit having to wait."""
        lock = IndexerLock(self._data)
        try:
            return lock.acquire(0)
        finally:
            lock.release()


def _apply(tx: Transaction, request: Request) -> Reply:
    """One request; refused means that it changed nothing."""
    before = tx.changes()
    try:
        done = request.apply(tx)
    except ChatError as exc:
        if tx.changes() != before:
            # There is no savepoint for each request: they check first, then write.
            raise AssertionError(f"{type(request).__name__} was refused after it had changed something") from exc
        return refusal(exc)
    entries = tx.appended
    if isinstance(done, Reply):
        if not entries:
            return done
        tx.appended = []
        return msgspec.structs.replace(done, entries=entries)
    value = msgspec.msgpack.encode(done)
    if entries:
        tx.appended = []
        return Reply(value=value, entries=entries)
    return Reply(value=value)
