"""Queues to test: workers of one backend, each with its own connections as if it were a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import uvloop

from chatcore.common.redis_client import RedisClient, parse_url
from chatcore.errors import Unavailable
from chatcore.queue.base import Clock, Job, Queue, QueueSettings
from chatcore.queue.redis import RedisQueue
from chatcore.queue.sqlite import SQLiteQueue
from chatcore.queue.sqlite_ops import QUEUE_REQUESTS
from chatcore.settings import Settings
from chatcore.store.sqlite.schema import prepare
from chatcore.store.sqlite.store import SQLiteStore
from chatcore.store.sqlite.writer import STORE_REQUESTS
from tests.store.hosting import hosted

#: Nothing here takes a second on an idle machine; a busy one gets its time.
PATIENCE_S = 30.0

#: Quick tries; a lease that a busy machine does not lose by accident.
SETTINGS = replace(Settings.default().queue, retry_ms=4, retry_max_ms=20, lease_ms=10_000, poll_ms=20)


class Backend(Protocol):
    """Where the queues of some workers are kept."""

    #: "sqlite" or "redis".
    name: str

    def worker(self, settings: QueueSettings = SETTINGS, clock: Clock | None = None) -> Any:
        """A queue as a worker has it: an async context manager."""

    def where(self) -> list[str]:
        """As arguments of a process: the name, and where it is."""


class SQLiteBackend:
    """
    :param hosts: its writer and its indexer run in this process, as long as there are workers; otherwise they run in
        another one.
    """

    name = "sqlite"

    def __init__(self, data: Path, *, hosts: bool = True) -> None:
        self.data = data
        self._hosts = hosts
        self._workers = 0
        self._host = contextlib.ExitStack()
        if hosts:
            prepare(data)

    @asynccontextmanager
    async def worker(
        self, settings: QueueSettings = SETTINGS, clock: Clock | None = None
    ) -> AsyncIterator[SQLiteQueue]:
        if self._hosts and self._workers == 0:
            self._host.enter_context(hosted(self.data, STORE_REQUESTS + QUEUE_REQUESTS))
        self._workers += 1
        try:
            store = SQLiteStore(self.data, lambda entries: None)
            await store.start()
            queue = SQLiteQueue(store.write, store.read, settings, clock)
            try:
                await queue.start()
                yield queue
            finally:
                await queue.close(0)
                await store.close()
        finally:
            self._workers -= 1
            if self._workers == 0:
                self._host.close()

    def where(self) -> list[str]:
        return [self.name, str(self.data)]


class RedisBackend:
    name = "redis"

    def __init__(self, url: str, prefix: str | None = None) -> None:
        self.url = url
        self.prefix = prefix or f"test-{secrets.token_hex(4)}"

    @asynccontextmanager
    async def worker(self, settings: QueueSettings = SETTINGS, clock: Clock | None = None) -> AsyncIterator[RedisQueue]:
        client = RedisClient(parse_url(self.url), timeout_s=2.0)
        # A consumer that stops waits for the end of a blocking command.
        queue = RedisQueue(client, self.prefix, settings, block_s=0.1, clock=clock)
        try:
            await queue.start()
            yield queue
        finally:
            await queue.close(0)
            await client.close()

    def where(self) -> list[str]:
        return [self.name, self.url, self.prefix]


def backend(where: list[str]) -> Backend:
    """What :meth:`Backend.where` says, in another process."""
    return SQLiteBackend(Path(where[1]), hosts=False) if where[0] == "sqlite" else RedisBackend(where[1], where[2])


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    """On the loop that workers use."""

    async def main() -> Any:
        async with asyncio.timeout(PATIENCE_S * 2):
            return await work()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


async def until(holds: Callable[[], Any], what: str) -> None:
    """Look until something is true."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not (value := holds()) or (isinstance(value, Awaitable) and not await value):
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"it never came to hold: {what}") from None


class Log:
    """A handler that keeps what it was given, and whether two of one key were ever handled at once.

    ``slow_s`` is how long it handles one; ``fails`` decides whether a delivery fails.
    """

    def __init__(self, *, slow_s: float = 0.0, fails: Callable[[Job], bool] = lambda job: False) -> None:
        self.begun: list[Job] = []
        self.done: list[Job] = []
        self.overlaps: list[Job] = []
        self.most_at_once = 0
        self.slow_s = slow_s
        self.fails = fails
        self._active: dict[str, Job] = {}

    async def __call__(self, job: Job) -> None:
        if job.key in self._active:
            self.overlaps.append(job)
        self._active[job.key] = job
        self.begun.append(job)
        self.most_at_once = max(self.most_at_once, len(self._active))
        try:
            await asyncio.sleep(self.slow_s)
            if self.fails(job):
                raise ValueError(f"{job.payload.decode()} does not please")
            self.done.append(job)
        finally:
            del self._active[job.key]

    def payloads(self, key: str | None = None) -> list[bytes]:
        """Of what was done, in order; of one key."""
        return [job.payload for job in self.done if key is None or job.key == key]


async def depth(queue: Queue, topic: str = "t") -> int:
    """How many messages a topic holds; -1 if it cannot be said now."""
    with contextlib.suppress(Unavailable):
        return sum(one.depth for one in await queue.stats() if one.topic == topic)
    return -1


async def empty(queue: Queue, topic: str = "t") -> None:
    """Wait until all is done with."""

    async def is_empty() -> bool:
        return await depth(queue, topic) == 0

    await until(is_empty, f"the queue {topic} is empty")
