"""The embedded queue: tables in the store's database, written by the store's writer.

The workers of one host share the work: each takes keys (see :mod:`.sqlite_ops`) under a lease, renews it while
handlers run, and loses it when it is silent for ``queue.lease_ms``. A worker finds its own messages at once, and
those of other workers by a query every ``queue.poll_ms``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import apsw

from ..common.tasks import Tasks
from ..errors import ChatError
from ..store.sqlite.requests import Request
from . import sqlite_ops as ops
from .base import (
    DIED,
    RENEWALS,
    Clock,
    DeadLetter,
    Execution,
    Job,
    JobHandler,
    Outcome,
    QueueFull,
    QueueSettings,
    TopicStats,
    backoff_ms,
    check_message,
    check_topic,
    new_id,
    safe_until,
)

log = logging.getLogger("chatcore.queue")

# The kernel's name for this boot: leases of another one are void.
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
# Checks, in the time of a lease, whether it has run out.
CHECKS: Final = 24
# Pause after the store did not answer.
PAUSE_S: Final = 0.5

StoreWrite = Callable[[Request], "asyncio.Future[Any]"]
StoreRead = Callable[[Callable[[apsw.Connection], Any]], "asyncio.Future[Any]"]


class SQLiteQueue:
    """Implements :class:`~.base.Queue`.

    :param write: gives a request to the store's writer, which commits it durably; its result.
    :param read: gives a query to the store's reader.
    """

    name = "sqlite"

    def __init__(self, write: StoreWrite, read: StoreRead, settings: QueueSettings, clock: Clock | None = None) -> None:
        self._write = write
        self._read = read
        self.settings = settings
        self.clock = clock or Clock()
        self.lease = ops.Lease(f"{os.getpid()}-{secrets.token_hex(8)}", BOOT_ID.read_text().strip())
        self._consumers: dict[str, SQLiteConsumer] = {}
        self._healthy = True

    @property
    def healthy(self) -> bool:
        """Whether the store answered last time."""
        return self._healthy

    async def start(self) -> None:
        """Make the tables where they are missing.

        :raises Unavailable: the store does not answer.
        """
        await self.write(ops.MakeQueueTables())

    async def probe(self) -> None:
        """See :meth:`.base.Queue.probe`. Other users of the store notice its failures, so this asks only after one."""
        if not self._healthy:
            await self.read(lambda connection: None)

    async def close(self, grace_s: float = 5.0) -> None:
        """Stop all consumers; the store must still be open."""
        await asyncio.gather(*(c.stop(grace_s) for c in list(self._consumers.values())))

    async def write(self, request: Request) -> Any:
        """Let the writer do one request; its result.

        :raises Unavailable: its outcome is unknown.
        """
        return await self._watched(self._write(request))

    async def read(self, query: Callable[[apsw.Connection], Any]) -> Any:
        """Run one query in the reader; its result.

        :raises Unavailable: the store does not answer.
        """
        return await self._watched(self._read(query))

    async def _watched(self, future: asyncio.Future[Any]) -> Any:
        try:
            result = await future
        except ChatError as exc:
            self._healthy = exc.code not in ("unavailable", "internal")
            raise
        self._healthy = True
        return result

    # -- putting

    async def put(
        self, topic: str, key: str, payload: bytes, *, delay_ms: int = 0, dedupe_id: str | None = None
    ) -> str:
        check_message(topic, key, payload, delay_ms, dedupe_id, self.settings.payload_bytes)
        put: str | int = await self.write(
            ops.QueuePut(new_id(), topic, key, payload, delay_ms, dedupe_id, self.settings, self.clock.wall_ms())
        )
        if isinstance(put, int):
            raise QueueFull(topic, put)
        self._wake(topic)
        return put

    def _wake(self, topic: str) -> None:
        if (consumer := self._consumers.get(topic)) is not None:
            consumer.wake()

    # -- handling

    def consume(self, topic: str, handler: JobHandler, *, concurrency: int | None = None) -> SQLiteConsumer:
        """See :meth:`.base.Queue.consume`.

        :raises ValueError: this queue has a consumer of the topic.
        """
        check_topic(topic)
        if topic in self._consumers:
            raise ValueError(f"topic {topic} has a consumer")
        consumer = SQLiteConsumer(self, topic, handler, concurrency or self.settings.concurrency)
        self._consumers[topic] = consumer
        return consumer

    def consumer_stopped(self, topic: str) -> None:
        """The consumer of a topic has stopped: the topic may have another one."""
        self._consumers.pop(topic, None)

    # -- statistics, and dead letters

    async def stats(self) -> list[TopicStats]:
        found: list[TopicStats] = await self.read(lambda db: ops.stats(db, self.clock.wall_ms()))
        return found

    async def dead(self, topic: str | None = None, limit: int = 1000) -> list[DeadLetter]:
        letters: list[DeadLetter] = await self.read(lambda db: ops.dead(db, topic, limit))
        return letters

    async def retry(self, id: str | None) -> int:
        count = await self._letters(ops.QueueRetry(id, self.clock.wall_ms()))
        for consumer in self._consumers.values():
            consumer.wake()
        return count

    async def drop(self, id: str | None) -> int:
        return await self._letters(ops.QueueDrop(id))

    async def _letters(self, request: Request) -> int:
        # Not more than there are now: a retried message may be dead again at once.
        left = sum(topic.dead for topic in await self.stats())
        total = 0
        while total < left and (count := int(await self.write(request))):
            total += count
        return total


class SQLiteConsumer:
    """Implements :class:`~.base.Consumer`: takes keys while fewer handlers run than may, and runs theirs."""

    def __init__(self, queue: SQLiteQueue, topic: str, handler: JobHandler, concurrency: int) -> None:
        self.topic = topic
        self._queue = queue
        self._handler = handler
        self._concurrency = concurrency
        self._wake = asyncio.Event()
        self._stopping = False
        #: What runs, and until when (ms of the monotonic clock) the lease on its key holds.
        self._running: dict[Execution, int] = {}
        self._deliveries = Tasks()
        self._loops = Tasks()
        self._taking = self._loops.spawn(self._take(), f"queue-take-{topic}")
        self._holding = self._loops.spawn(self._hold(), f"queue-hold-{topic}")

    def wake(self) -> None:
        """There may be a key to take."""
        self._wake.set()

    async def stop(self, grace_s: float = 5.0) -> None:
        """See :meth:`.base.Consumer.stop`."""
        if self._stopping:
            return
        self._stopping = True
        self.wake()
        # It may be in the middle of taking, and then its jobs have to be given back.
        await self._taking
        if self._deliveries:
            await asyncio.wait(set(self._deliveries), timeout=grace_s)
        for execution in list(self._running):
            execution.abandon()
        while self._deliveries:
            await asyncio.wait(set(self._deliveries))
        self._holding.cancel()
        await asyncio.gather(self._holding, return_exceptions=True)
        self._queue.consumer_stopped(self.topic)

    async def _take(self) -> None:
        queue, settings, clock = self._queue, self._queue.settings, self._queue.clock
        while not self._stopping:
            self._wake.clear()
            free = self._concurrency - len(self._deliveries)
            wait_s = settings.poll_ms / 1000
            try:
                if free > 0:
                    in_ms = await queue.read(
                        lambda db: ops.wait_ms(
                            db, self.topic, queue.lease, clock.wall_ms(), clock.mono_ms(), settings.retry_max_ms
                        )
                    )
                    if in_ms == 0 and await self._begin(free):
                        continue
                    wait_s = min(wait_s, (in_ms or settings.poll_ms) / 1000)
            except ChatError as exc:
                log.warning("%s: nothing can be taken: %s", self.topic, exc.message)
                wait_s = PAUSE_S
            except Exception:
                log.exception("%s: taking failed", self.topic)
                wait_s = PAUSE_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait_s)

    async def _begin(self, most: int) -> bool:
        """Take up to ``most`` keys and start their handlers; whether there were any."""
        queue, settings, clock = self._queue, self._queue.settings, self._queue.clock
        # A worker that stood still may find its own leases run out, whose handlers have to end first.
        busy = frozenset(execution.job.key for execution in self._running)
        now = clock.mono_ms()
        until = safe_until(now, settings.lease_ms)
        jobs: list[Job] = await queue.write(
            ops.QueueTake(self.topic, queue.lease, most, busy, settings, clock.wall_ms(), now)
        )
        for job in jobs:
            execution = Execution(self._handler, job, settings.handler_timeout_ms / 1000)
            self._running[execution] = until
            if self._stopping or clock.mono_ms() >= until:
                execution.abandon()
            self._deliveries.spawn(self._deliver(execution), f"queue-deliver-{self.topic}")
        return bool(jobs)

    async def _deliver(self, execution: Execution) -> None:
        outcome = await execution.run()
        try:
            # Until the outcome is known to be written: meanwhile the lease is held, so no other worker begins.
            while not await self._write_outcome(execution, outcome):
                await asyncio.sleep(PAUSE_S)
        finally:
            self._running.pop(execution, None)
            self.wake()

    async def _write_outcome(self, execution: Execution, outcome: Outcome) -> bool:
        """Write the outcome of a delivery. False: unknown whether it is written, try again."""
        queue, settings, clock, job = self._queue, self._queue.settings, self._queue.clock, execution.job
        taken = ops.Taken.of(job)
        request: Request
        if outcome is Outcome.DONE:
            request = ops.QueueDone(taken, queue.lease)
        elif outcome is Outcome.ABANDONED and self._stopping:
            request = ops.QueueGiveBack(taken, queue.lease)
        else:
            # A lease that ran out counts as a failure: the handler may be why it was not renewed.
            error = execution.error or DIED
            wait_ms = backoff_ms(settings, job.delivery) if job.delivery < settings.deliveries else None
            request = ops.QueueFailed(taken, queue.lease, error, wait_ms, settings, clock.wall_ms())
        try:
            if not await queue.write(request):
                log.info("%s %s: its lease was lost, delivery %d does not count", job.topic, job.id, job.delivery)
        except ChatError as exc:
            log.warning("%s %s: its outcome cannot be written: %s", job.topic, job.id, exc.message)
            # When the lease has run out, the next worker that takes the key begins the job again.
            return clock.mono_ms() >= self._running[execution]
        return True

    async def _hold(self) -> None:
        """Renew the leases of what runs; cancel handlers whose lease ran out."""
        lease_ms, clock = self._queue.settings.lease_ms, self._queue.clock
        renewing: asyncio.Task[None] | None = None
        last = clock.mono_ms()
        try:
            while True:
                await asyncio.sleep(lease_ms / 1000 / CHECKS)
                # First, without the store: one that hangs must not hide that a lease ran out.
                now = clock.mono_ms()
                for execution, until in list(self._running.items()):
                    if now >= until:
                        execution.abandon()
                if now - last >= lease_ms // RENEWALS and (renewing is None or renewing.done()):
                    last = now
                    renewing = self._loops.spawn(self._renew(), f"queue-renew-{self.topic}")
        finally:
            if renewing is not None:
                await asyncio.wait({renewing})

    async def _renew(self) -> None:
        queue, settings, clock = self._queue, self._queue.settings, self._queue.clock
        running = [e for e in self._running if not e.abandoned()]
        if not running:
            return
        now = clock.mono_ms()
        until = safe_until(now, settings.lease_ms)
        try:
            held: list[bool] = await queue.write(
                ops.QueueRenew([ops.Taken.of(e.job) for e in running], queue.lease, settings.lease_ms, now)
            )
        except ChatError as exc:
            log.warning("%s: leases cannot be renewed: %s", self.topic, exc.message)
            return
        for execution, still in zip(running, held, strict=True):
            if execution in self._running:
                if still:
                    self._running[execution] = until
                else:
                    execution.abandon()
