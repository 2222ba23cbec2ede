"""The main functions of the embedded store's two processes, the writer and the indexer.

The supervisor forks both (:mod:`chatcore.supervisor.worker_process` has their contract). Neither has an event loop.
"""

from __future__ import annotations

import gc
import logging
import time
from pathlib import Path
from typing import Final

from ..queue.sqlite_ops import QUEUE_REQUESTS
from ..store.sqlite.catch_up import catch_up
from ..store.sqlite.engine import Engine
from ..store.sqlite.indexer import Indexer
from ..store.sqlite.indexer import run as run_indexer
from ..store.sqlite.lock import IndexerLock, WriterLock
from ..store.sqlite.schema import BrokenStore, prepare
from ..store.sqlite.writer import STORE_REQUESTS, Writer
from ..supervisor.worker_process import StartError, StoreMains, StoreProcessContext
from .lifeline import Lifeline

log = logging.getLogger("chatcore.store")

# The process before this one is dead, so its locks are free; a command may hold the writer's for a moment.
LOCK_WAIT_S: Final = 5.0
# The writer makes no cycles but with exceptions, and remembers hundreds of thousands of small objects, all of which a
# full collection looks at.
GC_THRESHOLDS: Final = (100_000, 20, 100)
# Between two lines that say how far long work is.
PROGRESS_S: Final = 2.0


def writer_main(context: StoreProcessContext) -> int:
    """Run the writer until it is asked to end; returns its exit code.

    :raises StartError: the store cannot be used, in one line.
    """
    settings = context.settings
    data = Path(settings.server.data)
    life = Lifeline(context)
    gc.set_threshold(*GC_THRESHOLDS)
    lock = WriterLock(data)
    if not lock.acquire(LOCK_WAIT_S):
        raise StartError(f"the store in {data} is in use by another process: {lock.path} is locked")
    try:
        prepare(data, _Progress("migrating the store", life))
        catch_up(
            data,
            portion=settings.store.portion_entries,
            most=settings.store.tail_entries,
            progress=_Progress("rebuilding the index of the store", life),
        )
        engine = Engine(
            data,
            tail_entries=settings.store.tail_entries,
            checkpoint_pages=settings.store.checkpoint_pages,
        )
        engine.open()
    except BrokenStore as exc:
        raise StartError(str(exc)) from None
    writer = Writer(engine, data, STORE_REQUESTS + QUEUE_REQUESTS, batch=settings.store.batch_entries, beat=life.beat)
    writer.listen(life.fds)
    life.ready()
    writer.run(Ending(life, writer, settings.server.drain_timeout_ms / 1000).due)
    engine.close()
    lock.release()
    return 0


class Ending:
    """When the writer ends: at once if it is asked to, but if the supervisor died only after its workers."""

    def __init__(self, life: Lifeline, writer: Writer, drain_s: float) -> None:
        self._life = life
        self._writer = writer
        self._drain_s = drain_s
        self._until = 0.0

    def due(self) -> bool:
        """Whether to end now."""
        if self._life.asked():
            return True
        if not self._life.orphaned():
            return False
        now = time.monotonic()
        self._until = self._until or now + self._drain_s
        return not self._writer.connections or now >= self._until


class _Progress:
    """Says in the log how far long work is, and beats meanwhile."""

    def __init__(self, what: str, life: Lifeline) -> None:
        self._what = what
        self._life = life
        self._said_at = 0.0

    def __call__(self, done: int, total: int) -> None:
        self._life.beat()
        if self._life.stopping():
            log.info("%s: stopped; the next start goes on from here", self._what)
            raise SystemExit(0)
        now = time.monotonic()
        if now - self._said_at >= PROGRESS_S:
            self._said_at = now
            log.info("%s: %d %%", self._what, 100 * done // max(1, total))


def indexer_main(context: StoreProcessContext) -> int:
    """Run the indexer until it is asked to end; returns its exit code."""
    settings = context.settings
    data = Path(settings.server.data)
    life = Lifeline(context)
    lock = IndexerLock(data)
    if not lock.acquire(LOCK_WAIT_S):
        raise StartError(f"the index of the store in {data} is in use by another process: {lock.path} is locked")
    indexer = Indexer(data, portion=settings.store.portion_entries, checkpoint_pages=settings.store.checkpoint_pages)
    try:
        indexer.open()
        life.ready()
        run_indexer(indexer, beat=life.beat, stopping=life.stopping)
    finally:
        indexer.close()
    lock.release()
    return 0


STORE_MAINS: Final = StoreMains(writer=writer_main, indexer=indexer_main)
