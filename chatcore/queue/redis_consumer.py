"""The work of one worker for one topic on Redis: it holds its share of the partitions and runs their handlers.

There are three loops: one renews the leases and learns which partitions this consumer holds, one waits for new
messages, and one for each partition (:class:`Partition`) fetches entries and begins deliveries.

A lease counts from when its renewal was *sent*, by the worker's own monotonic clock, and for less time than Redis
grants. So a worker that cannot reach Redis, or stood still, ends its handlers before another one begins theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from redis.exceptions import ResponseError

from ..common.redis_client import RedisClient
from ..common.tasks import Tasks
from ..errors import ChatError
from . import redis_scripts as scripts
from .base import (
    DIED,
    RENEWALS,
    Clock,
    Execution,
    Job,
    JobHandler,
    Outcome,
    QueueSettings,
    backoff_ms,
    safe_until,
)
from .redis_scripts import GROUP, LOST, Script, TopicKeys

log = logging.getLogger("chatcore.queue")

# Entries fetched at a time, when no known message can begin.
FETCH: Final = 100
# Cancelled handlers have this long to end when the consumer stops; else their messages wait for the lease to run out.
CANCEL_S: Final = 2.0
# Pause after Redis did not answer; its client's breaker lets few commands through anyway.
PAUSE_S: Final = 0.25
#: What a script raises when Redis is away, or refuses it.
REDIS_ERRORS: Final = (ChatError, ResponseError)

#: An entry that this consumer has fetched: (number in the stream, deliveries begun)
Fetched = tuple[bytes, int]


class ScriptRunner(Protocol):
    """Runs a script with keys and arguments (see :meth:`.redis.RedisQueue.run`)."""

    async def __call__(self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any: ...


class ConsumerQueue(Protocol):
    """What a consumer needs of its queue."""

    settings: QueueSettings
    clock: Clock
    #: Longest wait for a message in one command, in seconds.
    block_s: float

    def keys(self, topic: str) -> TopicKeys: ...
    async def run(self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any: ...

    async def announce(self, topic: str) -> None:
        """Let the command line find the topic."""

    def consumer_stopped(self, topic: str) -> None: ...


class Permits:
    """How many handlers may begin now, over all partitions of a consumer.

    :param on_free: called when permits were given back.
    """

    def __init__(self, free: int, on_free: Callable[[], None]) -> None:
        self.free = free
        self._on_free = on_free

    def take(self, most: int) -> int:
        """Take up to ``most``; how many there were."""
        taken = min(self.free, most)
        self.free -= taken
        return taken

    def give_back(self, permits: int) -> None:
        """Handlers have ended: others may begin."""
        self.free += permits
        self._on_free()


@dataclass(frozen=True, slots=True)
class TopicWork:
    """What the partitions of a consumer share."""

    topic: str
    keys: TopicKeys
    handler: JobHandler
    settings: QueueSettings
    run: ScriptRunner
    permits: Permits


class PartitionOwner(Protocol):
    """What a partition asks of its consumer, and reports to it."""

    def held(self) -> bool:
        """Whether the leases are certain to hold; a partition asks right before a handler begins."""

    def lost(self, partition: Partition) -> None:
        """The lease is lost, or not certain any more: end what the partition does."""

    def released(self, partition: Partition) -> None:
        """The partition has come to rest and was given up."""


class Partition:
    """A partition while this consumer holds it: its messages by key, and the deliveries of the first of each.

    It knows every entry that it fetched by number, key and count of deliveries, and reads the payload when a
    delivery begins. So a key whose first message fails keeps its others waiting here, at some hundred bytes each
    (``queue.max_length`` bounds them), and never those of other keys.

    It works from when it is made until :meth:`lose` or, after :meth:`drain`, until it has come to rest.
    A key is in exactly one of these states: in ``_ready`` (its first message can begin), in ``running`` or with
    its outcome being written, or in ``_timers`` (its first message waits for its next try).
    """

    def __init__(self, owner: PartitionOwner, work: TopicWork, n: int, lease: bytes, fence: int) -> None:
        self.n = n
        self.lease = lease
        self.fence = fence
        #: What runs, by key.
        self.running: dict[str, Execution] = {}
        self._owner = owner
        self._work = work
        self._stream = work.keys.streams[n]
        self._lease_key = work.keys.leases[n]
        self._last = b"0-0"
        self._more = True
        self._waiting: dict[str, deque[Fetched]] = {}  # by key, in order
        self._ready: deque[str] = deque()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._deliveries = Tasks()
        self._draining = False
        self._lost = False
        self._wake = asyncio.Event()
        self._loop = asyncio.create_task(self._run(), name=f"queue-partition-{work.topic}-{n}")

    # -- for the consumer

    def wake(self) -> None:
        """A permit may be free."""
        self._wake.set()

    def check(self) -> None:
        """There may be new messages."""
        self._more = True
        self._wake.set()

    def drain(self) -> None:
        """Begin nothing more, and release the partition as soon as nothing runs."""
        self._draining = True
        self._wake.set()

    def resume(self) -> None:
        """Revoke :meth:`drain`, unless the partition is released already."""
        self._draining = False
        self._wake.set()

    async def end(self, grace_s: float) -> None:
        """After :meth:`drain`: wait until it has come to rest; after ``grace_s`` cancel what runs."""
        await asyncio.wait({self._loop}, timeout=grace_s)
        self._abandon_all()
        _, working = await asyncio.wait({self._loop}, timeout=CANCEL_S)
        if working:
            self._owner.lost(self)

    def lose(self) -> Coroutine[Any, Any, None]:
        """The lease is lost: cancel what runs, at once, and write nothing. The coroutine waits for its end."""
        self._lost = True
        self._cancel_timers()
        self._abandon_all()
        return self._wait_ended()

    async def _wait_ended(self) -> None:
        # The loop may wait for Redis, whose client is never cancelled in the middle of a command.
        self._loop.cancel()
        await asyncio.gather(self._loop, return_exceptions=True)
        while self._deliveries:
            await asyncio.wait(set(self._deliveries))

    def _abandon_all(self) -> None:
        for execution in list(self.running.values()):
            execution.abandon()

    def _cancel_timers(self) -> None:
        for timer in self._timers.values():
            timer.cancel()

    # -- its loop

    async def _run(self) -> None:
        while not self._lost:
            try:
                if self._draining:
                    if not self._deliveries and await self._release():
                        return
                    await self._sleep()
                elif self._ready and self._work.permits.free:
                    await self._begin()
                elif self._more and not self._ready:
                    await self._fetch()
                else:
                    await self._sleep()
            except REDIS_ERRORS as exc:
                if isinstance(exc, ResponseError):
                    # Such as NOGROUP, after the stream was deleted: taking the partition again creates it.
                    log.error("%s: partition %d: %s", self._work.topic, self.n, exc)
                    with contextlib.suppress(*REDIS_ERRORS):
                        await self._script(scripts.RELEASE, [])
                    self._owner.lost(self)
                await asyncio.sleep(PAUSE_S)
            except Exception:
                log.exception("%s: partition %d", self._work.topic, self.n)
                await asyncio.sleep(PAUSE_S)

    async def _sleep(self) -> None:
        await self._wake.wait()
        self._wake.clear()

    async def _script(self, script: Script, args: list[bytes | str | int], *more: str) -> Any:
        """Run a fenced script; None if the lease is lost (the owner then knows)."""
        reply = await self._work.run(script, [self._lease_key, self._stream, *more], [self.lease, *args])
        if reply == LOST:
            self._owner.lost(self)
            return None
        return reply

    async def _release(self) -> bool:
        """Give the partition up; whether that is done. Its next holder tries what waits for its next try."""
        if not self._draining:
            return False
        self._lost = True
        self._cancel_timers()
        with contextlib.suppress(*REDIS_ERRORS):  # then the lease runs out
            await self._work.run(scripts.RELEASE, [self._lease_key], [self.lease])
        self._owner.released(self)
        return True

    async def _fetch(self) -> None:
        # Before it is sent: a message that comes while the reply is under way causes another fetch.
        self._more = False
        try:
            reply = await self._script(scripts.FETCH, [GROUP, self._last, FETCH])
        except BaseException:
            self._more = True
            raise
        if reply is None:
            return
        more, *found = reply
        self._more = self._more or bool(more)
        for entry, raw_key, deliveries in found:
            self._last = entry
            key = raw_key.decode()
            waiting = self._waiting.get(key)
            if waiting is not None:
                waiting.append((entry, deliveries))
            else:
                self._waiting[key] = deque([(entry, deliveries)])
                self._schedule(key)

    def _schedule(self, key: str) -> None:
        """Decide about the first message of a key, which has neither begun nor a timer."""
        _, deliveries = self._waiting[key][0]
        if deliveries >= self._work.settings.deliveries:
            # Its holder died before it wrote the outcome of the last.
            self._spawn(self._write_outcome(key, deliveries, None, DIED))
        elif deliveries:
            self._retry_later(key, deliveries)
        else:
            self._ready.append(key)
            self._wake.set()

    def _retry_later(self, key: str, deliveries: int) -> None:
        def due() -> None:
            del self._timers[key]
            self._ready.append(key)
            self._wake.set()

        wait_s = backoff_ms(self._work.settings, deliveries) / 1000
        self._timers[key] = asyncio.get_running_loop().call_later(wait_s, due)

    def _next(self, key: str) -> None:
        """The first message of a key is done with: go on with the next."""
        waiting = self._waiting[key]
        waiting.popleft()
        if waiting:
            self._schedule(key)
        else:
            del self._waiting[key]

    # -- deliveries

    async def _begin(self) -> None:
        """Begin as many deliveries as there are permits."""
        work = self._work
        unused = work.permits.take(len(self._ready))
        keys = [self._ready.popleft() for _ in range(unused)]
        args: list[bytes | str | int] = [GROUP]
        for key in keys:
            entry, deliveries = self._waiting[key][0]
            args += [entry, deliveries + 1]
        try:
            reply = await self._script(scripts.BEGIN, args, work.keys.counts)
            if reply is None:
                return
            if not self._owner.held():
                # The reply took so long that the lease may have run out; the next renewal decides.
                self._ready.extendleft(reversed(keys))
                await asyncio.sleep(PAUSE_S)
                return
            for key, fields in zip(keys, reply, strict=True):
                if not fields:  # it was deleted by hand
                    self._next(key)
                    continue
                entry, deliveries = self._waiting[key][0]
                self._waiting[key][0] = (entry, deliveries + 1)
                id, payload, created = fields
                job = Job(id.decode(), work.topic, key, payload, deliveries + 1, int(created), self.fence)
                timeout_s = work.settings.handler_timeout_ms / 1000
                self.running[key] = execution = Execution(work.handler, job, timeout_s)
                unused -= 1  # given back when it has ended
                self._spawn(self._deliver(execution))
        except REDIS_ERRORS:
            self._ready.extendleft(reversed(keys))
            raise
        finally:
            work.permits.give_back(unused)

    def _spawn(self, delivery: Coroutine[Any, Any, None]) -> None:
        task = self._deliveries.spawn(delivery, f"queue-deliver-{self._work.topic}")
        task.add_done_callback(lambda _: self._wake.set())

    async def _deliver(self, execution: Execution) -> None:
        job = execution.job
        outcome = await execution.run()
        del self.running[job.key]
        self._work.permits.give_back(1)
        if self._lost:
            log.info("%s %s: delivery %d does not count, its partition was lost", job.topic, job.id, job.delivery)
            return
        if outcome is Outcome.FAILED and job.delivery < self._work.settings.deliveries:
            self._retry_later(job.key, job.delivery)
            return
        await self._write_outcome(job.key, job.delivery, outcome, execution.error)

    async def _write_outcome(self, key: str, deliveries: int, outcome: Outcome | None, error: str) -> None:
        """Write the outcome of a delivery (None: its worker died), until it is known to be written or the partition
        is lost: only then the next of the key may begin."""
        entry, _ = self._waiting[key][0]
        settings, keys = self._work.settings, self._work.keys
        while not self._lost:
            try:
                if outcome is Outcome.DONE:
                    reply = await self._script(scripts.DONE, [GROUP, entry])
                elif outcome is Outcome.ABANDONED:
                    reply = await self._script(scripts.GIVE_BACK, [GROUP, entry, deliveries - 1])
                else:
                    args: list[bytes | str | int] = [GROUP, entry, deliveries, error, settings.dead_max]
                    reply = await self._script(scripts.DEAD_LETTER, args, keys.dead, keys.counts)
            except REDIS_ERRORS as exc:
                log.warning("%s: an outcome cannot be written: %s", self._work.topic, exc)
                await asyncio.sleep(PAUSE_S)
                continue
            if reply is None:
                return
            if outcome is Outcome.ABANDONED:
                self._waiting[key][0] = (entry, deliveries - 1)
                self._schedule(key)
            else:
                self._next(key)
            return


class RedisConsumer:
    """Implements :class:`~.base.Consumer`.

    :param concurrency: handlers that run at the same time.
    :param blocking: a client of one connection, for commands that block; the consumer closes it.
    """

    def __init__(
        self, queue: ConsumerQueue, topic: str, handler: JobHandler, concurrency: int, blocking: RedisClient
    ) -> None:
        self.topic = topic
        self.id = secrets.token_hex(8)
        self.stopping = False
        #: The partitions that this consumer holds, by number.
        self.partitions: dict[int, Partition] = {}
        self._queue = queue
        self._keys = queue.keys(topic)
        self._blocking = blocking
        self._work = TopicWork(
            topic, self._keys, handler, queue.settings, queue.run, Permits(concurrency, self._wake_all)
        )  # fmt: skip
        self._held_until = 0  # ms of the monotonic clock
        self._stopped = False
        self._renew_now = asyncio.Event()
        self._partitions_changed = asyncio.Event()
        self._expiry: asyncio.TimerHandle | None = None
        self._away = False
        self._ending: set[int] = set()  # partitions that were lost, until all that they did has ended
        self._tasks = Tasks()
        self._loops = [
            self._tasks.spawn(self._hold(), f"queue-hold-{topic}"),
            self._tasks.spawn(self._listen(), f"queue-listen-{topic}"),
        ]

    def held(self) -> bool:
        return self._queue.clock.mono_ms() < self._held_until

    def _wake_all(self) -> None:
        # In random order: a low number gives no advantage.
        for partition in random.sample(list(self.partitions.values()), len(self.partitions)):
            partition.wake()

    async def stop(self, grace_s: float = 5.0) -> None:
        """See :meth:`.base.Consumer.stop`."""
        if self.stopping:
            return
        self.stopping = True
        partitions = list(self.partitions.values())
        for partition in partitions:
            partition.drain()
        # The loop that still runs renews the leases meanwhile.
        await asyncio.gather(*(partition.end(grace_s) for partition in partitions))
        self._stopped = True
        self._renew_now.set()
        self._partitions_changed.set()
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._lose_all()
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        if self._expiry is not None:
            self._expiry.cancel()
        with contextlib.suppress(*REDIS_ERRORS):  # then the leases run out
            await self._queue.run(scripts.LEAVE, [self._keys.consumers, *self._keys.leases], [self.id])
        await self._blocking.close()
        self._queue.consumer_stopped(self.topic)

    # -- holding

    async def _hold(self) -> None:
        lease_ms = self._queue.settings.lease_ms
        while not self._stopped:
            self._renew_now.clear()
            # First, without asking Redis: a worker that stood still may have lost its leases, and must not go on.
            self._expire()
            wait_s = lease_ms / 1000 / RENEWALS
            try:
                await self._renew()
                self._log_availability(None)
            except REDIS_ERRORS as exc:
                self._log_availability(exc)
                wait_s = min(wait_s, PAUSE_S)
            except Exception:
                log.exception("%s: renewing leases failed", self.topic)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._renew_now.wait(), wait_s * random.uniform(0.8, 1.0))

    async def _renew(self) -> None:
        keys, settings, clock = self._keys, self._queue.settings, self._queue.clock
        sent = clock.mono_ms()
        share, *held = await self._queue.run(
            scripts.HOLD,
            [keys.consumers, keys.fence, *keys.leases, *keys.streams],
            [
                self.id,
                settings.lease_ms,
                keys.partitions,
                scripts.GROUP,
                random.randrange(keys.partitions),
                int(self.stopping),
            ],
        )
        self._held_until = safe_until(sent, settings.lease_ms)
        self._expire_at(self._held_until)
        leases = {int(n): (bytes(lease), int(fence)) for n, lease, fence in held}
        for n, partition in list(self.partitions.items()):
            if n not in leases or leases[n][0] != partition.lease:
                self.lost(partition)
        for n, (lease, fence) in leases.items():
            # A partition that was lost can be held again before all that it did has ended.
            if n not in self.partitions and n not in self._ending and not self.stopping:
                self.partitions[n] = Partition(self, self._work, n, lease, fence)
                self._partitions_changed.set()
        if not self.stopping:
            self._give_up_surplus(share)
            await self._queue.announce(self.topic)
        for partition in self.partitions.values():
            partition.check()  # in case that a wake-up was lost

    def _give_up_surplus(self, share: int) -> None:
        """Other consumers have come: drain what is above this one's share, the idlest first. A partition that does
        not come to rest until the next renewal goes on, so that a long handler holds up its own key only."""
        for partition in self.partitions.values():
            partition.resume()
        idlest = sorted(self.partitions.values(), key=lambda p: (len(p.running), random.random()))
        for partition in idlest[: max(0, len(idlest) - share)]:
            partition.drain()

    def released(self, partition: Partition) -> None:
        if self.partitions.get(partition.n) is partition:
            del self.partitions[partition.n]

    def lost(self, partition: Partition) -> None:
        n = partition.n
        if self.partitions.get(n) is partition:
            del self.partitions[n]
            self._ending.add(n)
            self._tasks.spawn(self._end(n, partition.lose()), f"queue-end-{self.topic}-{n}")

    async def _end(self, n: int, ended: Coroutine[Any, Any, None]) -> None:
        try:
            await ended
        finally:
            self._ending.discard(n)
            self._renew_now.set()  # this consumer may still hold it

    def _lose_all(self) -> None:
        for partition in list(self.partitions.values()):
            self.lost(partition)

    def _expire_at(self, until: int) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        delay_s = max(0, until - self._queue.clock.mono_ms()) / 1000
        self._expiry = asyncio.get_running_loop().call_later(delay_s, self._expire)

    def _expire(self) -> None:
        if self.partitions and not self.held():
            log.warning("%s: no lease could be renewed in time; what runs is cancelled", self.topic)
            self._lose_all()

    def _log_availability(self, exc: Exception | None) -> None:
        """One line when Redis goes away and one when it is back."""
        if exc is not None and not self._away:
            log.warning("%s: nothing can be handled: %s", self.topic, exc)
        elif exc is None and self._away:
            log.info("%s: handling goes on", self.topic)
        self._away = exc is not None

    # -- waking up

    async def _listen(self) -> None:
        while not self._stopped:
            try:
                await self._wait_for_messages()
            except REDIS_ERRORS:
                for partition in self.partitions.values():
                    partition.check()  # a wake-up may be lost with its reply
                await asyncio.sleep(PAUSE_S)
            except Exception:
                log.exception("%s: waiting for messages failed", self.topic)
                await asyncio.sleep(PAUSE_S)

    async def _wait_for_messages(self) -> None:
        keys = self._keys
        if not self.partitions:
            self._partitions_changed.clear()
            await self._partitions_changed.wait()
            return
        due_ms: int = await self._queue.run(
            scripts.DUE,
            [keys.delayed, keys.later, *keys.wakes, *keys.streams],
            [keys.partitions, scripts.DUE_BATCH],
        )
        # 0 would be "for ever".
        block_s = self._queue.block_s
        wait_s = block_s if due_ms < 0 else min(block_s, max(due_ms, 1) / 1000)
        wakes = {keys.wakes[n].encode(): n for n in self.partitions}
        reply: Any = await self._blocking.call("BLPOP", *wakes, wait_s)
        if reply is not None and (partition := self.partitions.get(wakes[reply[0]])) is not None:
            partition.check()
