"""The writer and the indexer of a folder, as a host runs them, but without a supervisor."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatcore.store.sqlite.engine import Engine
from chatcore.store.sqlite.indexer import Indexer
from chatcore.store.sqlite.indexer import run as run_indexer
from chatcore.store.sqlite.lock import WriterLock
from chatcore.store.sqlite.schema import prepare
from chatcore.store.sqlite.verify import verify
from chatcore.store.sqlite.writer import STORE_REQUESTS, Writer

FORK = multiprocessing.get_context("fork")
# Only what fails ever waits so long.
PATIENCE_S = 10.0


@contextlib.contextmanager
def hosted(
    data: Path, requests: tuple[type[Any], ...] = STORE_REQUESTS, *, portion: int = 65_536, index: bool = True,
    batch: int = 500, **options: Any,
) -> Iterator[Engine]:  # fmt: skip
    """Run both until the end of the block; what they leave must be whole. ``options`` are those of :class:`Engine`."""
    lock = WriterLock(data)
    assert lock.acquire(PATIENCE_S)
    stop = threading.Event()
    failed: list[BaseException] = []

    def guarded(work: Any) -> None:
        try:
            work()
        except BaseException as exc:
            failed.append(exc)

    try:
        prepare(data)
        indexer = Indexer(data, portion=portion)
        indexer.open()
        engine = Engine(data, **options)
        engine.open()
        writer = Writer(engine, data, requests, batch=batch)
        writer.listen()
        threads = [threading.Thread(target=guarded, args=(lambda: writer.run(stop.is_set),), name="writer")]
        if index:
            work = lambda: run_indexer(indexer, beat=lambda: None, stopping=stop.is_set)  # noqa: E731
            threads.append(threading.Thread(target=guarded, args=(work,), name="indexer"))
        for thread in threads:
            thread.start()
        try:
            yield engine
        finally:
            stop.set()
            for thread in threads:
                thread.join(PATIENCE_S)
            engine.close()
            indexer.close()
    finally:
        lock.release()
    assert not failed, failed
    assert verify(data, lambda line: None) == []


class Apart:
    """The writer and the indexer of a folder in a process of their own, which may be killed and started again."""

    def __init__(self, data: Path, **options: Any) -> None:
        self._data = data
        self._options = options
        self._process: multiprocessing.process.BaseProcess | None = None

    def start(self) -> None:
        """Run them; returns when they serve."""
        ready, report = FORK.Pipe(duplex=False)

        def serve() -> None:
            with hosted(self._data, **self._options):
                report.send(None)
                signal.sigwait({signal.SIGTERM})

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            self._process = FORK.Process(target=serve)
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        assert ready.poll(PATIENCE_S), "the writer does not start"
        ready.recv()

    @property
    def pid(self) -> int:
        assert self._process is not None and self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever they do."""
        os.kill(self.pid, signal.SIGKILL)
        assert self._process is not None
        self._process.join(PATIENCE_S)

    def stop(self) -> None:
        """Let them end by themselves."""
        assert self._process is not None
        if self._process.is_alive():
            os.kill(self.pid, signal.SIGTERM)
            self._process.join(PATIENCE_S)


@contextlib.contextmanager
def hosted_apart(data: Path, **options: Any) -> Iterator[Apart]:
    """Run the writer and the indexer in a process of their own until the end of the block."""
    host = Apart(data, **options)
    host.start()
    try:
        yield host
    finally:
        host.stop()
