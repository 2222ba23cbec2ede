"""The reader thread of a worker's SQLite store, and how the loop talks to it.

Work goes in through a bounded queue; results come back to the loop in one call per batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import apsw

from ...errors import ChatError, Internal, Unavailable
from .tail import Snapshot, StaleIndex

log = logging.getLogger("chatcore.store")

# Queries waiting at most: beyond it the reader is seconds behind, and more would only wait longer.
READ_QUEUE: Final = 10_000
# Queries that are answered together.
BATCH: Final = 64
# A query is broken off after this. While it looks at an old state of the database, deleted text stays in the
# write-ahead log; it has to be gone within a second.
QUERY_S: Final = 0.5
# Instructions of SQLite's machine between two looks at the clock: some 0.5 ms.
CLOCK_STEPS: Final = 10_000

Query = Callable[[Snapshot], Any]
_Waiting = tuple[Query, "asyncio.Future[Any]", float]


class Reader:
    """Runs queries one after the other, in a thread that owns a :class:`~.tail.Snapshot`.

    Made in the loop, after the fork.
    """

    def __init__(self, data: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._data = data
        self._loop = loop
        self._queue: deque[_Waiting] = deque()
        self._taken: Sequence[_Waiting] = ()
        self._wake = threading.Condition(threading.Lock())
        self._stopping = False
        self._until = 0.0
        #: False while the database does not answer.
        self.healthy = True
        self._thread = threading.Thread(target=self._guarded, name="store-reader", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, query: Query) -> asyncio.Future[Any]:
        """Queue a query; the future is resolved on the loop.

        A query may fail with ChatError. It is ``unavailable`` if the database does not answer, or not in time.
        """
        future: asyncio.Future[Any] = self._loop.create_future()
        with self._wake:
            full = self._stopping or len(self._queue) >= READ_QUEUE or not self._thread.is_alive()
            if not full:
                self._queue.append((query, future, time.monotonic()))
                self._wake.notify()
        if full:
            future.set_exception(Unavailable("the server is stopping" if self._stopping else "the store is busy"))
        return future

    def read_db(self, query: Callable[[apsw.Connection], Any]) -> asyncio.Future[Any]:
        """Queue a query on tables of another part, which have nothing to do with the log."""
        return self.put(lambda snapshot: query(snapshot.db))

    def give_up(self, older_than_s: float) -> None:
        """Answer ``unavailable`` to all that has waited longer."""
        limit = time.monotonic() - older_than_s
        for _, future, since in [*self._taken, *list(self._queue)]:
            if since > limit:
                break
            if not future.done():
                self.healthy = False
                future.set_exception(Unavailable("the store does not answer"))

    def idle(self) -> bool:
        """Nothing waits and nothing is being done."""
        return not self._queue and not self._taken

    async def stop(self) -> None:
        """Answer what is queued, then end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        while self._thread.is_alive():
            await asyncio.sleep(0.005)

    # --- in the thread --------------------------------------------------------------------
    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException:
            # No known failure ends here. One that does shows in health, and its callers are answered.
            log.critical("the reader has died", exc_info=True)
            self.healthy = False

    def _run(self) -> None:
        snapshot: Snapshot | None = None
        while batch := self._take():
            outcomes: list[Any] = []
            for query, future, _ in batch:
                if future.done():  # given up or cancelled
                    outcomes.append(None)
                    continue
                try:
                    if snapshot is None:
                        snapshot = self._open()
                    self._until = time.monotonic() + QUERY_S
                    outcomes.append(query(snapshot))
                    self.healthy = True
                except ChatError as exc:
                    outcomes.append(exc)
                except apsw.InterruptError:
                    log.error("a query was broken off after %.1f s", QUERY_S)
                    outcomes.append(Unavailable("the store does not answer in time"))
                except (apsw.Error, StaleIndex) as exc:
                    log.error("read failed: %s", exc)
                    self.healthy = False
                    outcomes.append(Unavailable("the store does not answer"))
                    _close(snapshot)
                    snapshot = None
                except Exception:
                    log.exception("a query failed")
                    outcomes.append(Internal("internal error"))
            with contextlib.suppress(RuntimeError):  # the loop is closed, and its callers with it
                self._loop.call_soon_threadsafe(_resolve, batch, outcomes)
            self._taken = ()
        _close(snapshot)

    def _take(self) -> list[_Waiting]:
        """Wait for work; an empty list means stop."""
        with self._wake:
            while not self._queue and not self._stopping:
                self._wake.wait()
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
        self._taken = batch
        return batch

    def _open(self) -> Snapshot:
        snapshot = Snapshot(self._data)
        snapshot.db.set_progress_handler(self._overdue, CLOCK_STEPS)
        return snapshot

    def _overdue(self) -> bool:
        return time.monotonic() > self._until


def _close(snapshot: Snapshot | None) -> None:
    if snapshot is not None:
        try:
            snapshot.close()
        except apsw.Error as exc:
            log.warning("closing the database: %s", exc)


def _resolve(batch: Sequence[_Waiting], outcomes: Sequence[Any]) -> None:
    for (_, future, _), outcome in zip(batch, outcomes, strict=True):
        if future.done():
            continue
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
