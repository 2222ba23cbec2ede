"""A partition while a worker holds it: its lines, and the deliveries of what is first in each.

The holder knows of every entry that it fetched by its number, key and count of deliveries; payloads are read when
a delivery begins. So a key whose first message fails keeps its others waiting here, at some hundred bytes each
(``queue.max_length`` bounds them), and never those of other keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import ResponseError

from ..errors import ChatError
from . import redis_scripts as scripts
from .base import DIED, Job, backoff_ms
from .execution import Execution, Outcome
from .redis_scripts import GROUP, LOST

if TYPE_CHECKING:
    from .redis_consumer import RedisConsumer

log = logging.getLogger("chatcore.queue")

# Entries fetched at a time, when nothing that is known can begin.
FETCH: Final = 100
# What was cancelled at the end has this long to end and to be given back; else the lease runs out.
SETTLE_S: Final = 2.0
# Wait after Redis did not answer.
PAUSE_S: Final = 0.25
TROUBLE: Final = (ChatError, ResponseError)

#: (number in the stream, deliveries begun)
Waiting = tuple[bytes, int]


class Partition:
    """Works from when it is made until :meth:`lose` or, after :meth:`drain`, until it has come to rest.

    A key is in exactly one of these states: in ``_ready`` (its first message can begin), in ``running`` or
    being settled, or in ``_timers`` (its first message waits for its next try).
    """

    def __init__(self, consumer: RedisConsumer, n: int, lease: bytes, fence: int) -> None:
        self.n = n
        self.lease = lease
        self.fence = fence
        #: What runs, by key.
        self.running: dict[str, Execution] = {}
        self._consumer = consumer
        self._queue = consumer.queue
        self._stream = consumer.keys.streams[n]
        self._lease_key = consumer.keys.leases[n]
        self._last = b"0-0"
        self._more = True
        self._lines: dict[str, deque[Waiting]] = {}
        self._ready: deque[str] = deque()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self._lost = False
        self._wake = asyncio.Event()
        self._work = asyncio.create_task(self._run(), name=f"queue-partition-{consumer.topic}-{n}")

    # -- for the consumer

    def wake(self) -> None:
        """There may be a free place."""
        self._wake.set()

    def look(self) -> None:
        """There may be something new."""
        self._more = True
        self._wake.set()

    def drain(self) -> None:
        """Begin nothing more, and let go of it as soon as nothing runs."""
        self._draining = True
        self._wake.set()

    def resume(self) -> None:
        """Forget :meth:`drain`, if it has not come to that."""
        self._draining = False
        self._wake.set()

    async def end(self, grace_s: float) -> None:
        """After :meth:`drain`: wait until it has come to rest; after ``grace_s`` cancel what runs."""
        await asyncio.wait({self._work}, timeout=grace_s)
        for execution in list(self.running.values()):
            execution.abandon()
        _, working = await asyncio.wait({self._work}, timeout=SETTLE_S)
        if working:
            self._consumer.lost(self)

    def lose(self) -> Awaitable[None]:
        """It is somebody else's: cancel what runs, and write nothing. The awaitable is done when that has ended."""
        self._lost = True
        for timer in self._timers.values():
            timer.cancel()
        for execution in list(self.running.values()):
            execution.abandon()
        return self._ending()

    async def _ending(self) -> None:
        # It may wait for Redis, whose client is never cancelled in the middle of a command.
        self._work.cancel()
        await asyncio.gather(self._work, return_exceptions=True)
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    # -- its loop

    async def _run(self) -> None:
        while not self._lost:
            try:
                if self._draining:
                    if not self._tasks and await self._release():
                        return
                    await self._sleep()
                elif self._ready and self._consumer.free:
                    await self._begin()
                elif self._more and not self._ready:
                    await self._fetch()
                else:
                    await self._sleep()
            except TROUBLE as exc:
                if isinstance(exc, ResponseError):
                    # Such as NOGROUP, after somebody deleted the stream: it is set up anew when it is taken.
                    log.error("%s: partition %d: %s", self._consumer.topic, self.n, exc)
                    with contextlib.suppress(*TROUBLE):
                        await self._script(scripts.RELEASE, [])
                    self._consumer.lost(self)
                await asyncio.sleep(PAUSE_S)
            except Exception:
                log.exception("%s: partition %d", self._consumer.topic, self.n)
                await asyncio.sleep(PAUSE_S)

    async def _sleep(self) -> None:
        await self._wake.wait()
        self._wake.clear()

    async def _script(self, script: scripts.Script, args: list[bytes | str | int], *more: str) -> Any:
        """Run a fenced script; None if the partition is lost (which it then is for everybody here)."""
        reply = await self._queue.run(script, [self._lease_key, self._stream, *more], [self.lease, *args])
        if reply == LOST:
            self._consumer.lost(self)
            return None
        return reply

    async def _release(self) -> bool:
        """Give it up; whether that is done. What waits for its next try is tried by the next holder."""
        if not self._draining:
            return False
        self._lost = True
        for timer in self._timers.values():
            timer.cancel()
        with contextlib.suppress(*TROUBLE):  # then the lease runs out
            await self._queue.run(scripts.RELEASE, [self._lease_key], [self.lease])
        self._consumer.released(self)
        return True

    async def _fetch(self) -> None:
        # Before it is sent: what comes while the reply is under way is looked for again.
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
            line = self._lines.get(key)
            if line is not None:
                line.append((entry, deliveries))
            else:
                self._lines[key] = deque([(entry, deliveries)])
                self._schedule(key)

    def _schedule(self, key: str) -> None:
        """See to the first message of a line that has neither begun nor a timer."""
        _, deliveries = self._lines[key][0]
        if deliveries >= self._queue.options.deliveries:
            # Its holder did not live to say what came of the last.
            self._spawn(self._settle(key, deliveries, None, DIED))
        elif deliveries:
            self._again(key, deliveries)
        else:
            self._ready.append(key)
            self._wake.set()

    def _again(self, key: str, deliveries: int) -> None:
        def due() -> None:
            del self._timers[key]
            self._ready.append(key)
            self._wake.set()

        wait_s = backoff_ms(self._queue.options, deliveries) / 1000
        self._timers[key] = asyncio.get_running_loop().call_later(wait_s, due)

    def _next(self, key: str) -> None:
        """The first message of a line is out of it."""
        line = self._lines[key]
        line.popleft()
        if line:
            self._schedule(key)
        else:
            del self._lines[key]

    # -- deliveries

    async def _begin(self) -> None:
        """Begin as many deliveries as there are free places."""
        consumer = self._consumer
        keys = [self._ready.popleft() for _ in range(min(consumer.free, len(self._ready)))]
        consumer.free -= len(keys)
        unused = len(keys)
        args: list[bytes | str | int] = [GROUP]
        for key in keys:
            entry, deliveries = self._lines[key][0]
            args += [entry, deliveries + 1]
        try:
            reply = await self._script(scripts.BEGIN, args, consumer.keys.counts)
            if reply is None:
                return
            if not consumer.held():
                # The answer took so long that it may be somebody else's by now; the next renewal tells.
                self._ready.extendleft(reversed(keys))
                await asyncio.sleep(PAUSE_S)
                return
            for key, fields in zip(keys, reply, strict=True):
                if not fields:  # somebody deleted it
                    self._next(key)
                    continue
                entry, deliveries = self._lines[key][0]
                self._lines[key][0] = (entry, deliveries + 1)
                id, payload, created = fields
                job = Job(id.decode(), consumer.topic, key, payload, deliveries + 1, int(created), self.fence)
                timeout_s = self._queue.options.handler_timeout_ms / 1000
                self.running[key] = execution = Execution(consumer.handler, job, timeout_s)
                unused -= 1  # given back when it has ended
                self._spawn(self._deliver(execution))
        except TROUBLE:
            self._ready.extendleft(reversed(keys))
            raise
        finally:
            consumer.give_back(unused)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work, name=f"queue-deliver-{self._consumer.topic}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._wake.set()
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("%s: a delivery was not settled", self._consumer.topic, exc_info=exc)

    async def _deliver(self, execution: Execution) -> None:
        key = execution.job.key
        outcome = await execution.run()
        del self.running[key]
        self._consumer.give_back(1)
        if self._lost:
            log.info("%s %s: delivery %d does not count, its partition was lost", *_which(execution.job))
            return
        deliveries = execution.job.delivery
        if outcome is Outcome.FAILED and deliveries < self._queue.options.deliveries:
            self._again(key, deliveries)
            return
        await self._settle(key, deliveries, outcome, execution.error)

    async def _settle(self, key: str, deliveries: int, outcome: Outcome | None, error: str) -> None:
        """Write what came of a delivery, until it is known to be written or the partition is lost: only then the
        next of the key may begin."""
        entry, _ = self._lines[key][0]
        options, keys = self._queue.options, self._consumer.keys
        while not self._lost:
            try:
                if outcome is Outcome.DONE:
                    reply = await self._script(scripts.DONE, [GROUP, entry])
                elif outcome is Outcome.ABANDONED:
                    reply = await self._script(scripts.GIVE_BACK, [GROUP, entry, deliveries - 1])
                else:
                    reply = await self._script(
                        scripts.BURY, [GROUP, entry, deliveries, error, options.dead_max], keys.dead, keys.counts
                    )
            except TROUBLE as exc:
                log.warning("%s: an outcome cannot be written: %s", self._consumer.topic, exc)
                await asyncio.sleep(PAUSE_S)
                continue
            if reply is None:
                return
            if outcome is Outcome.ABANDONED:
                self._lines[key][0] = (entry, deliveries - 1)
                self._schedule(key)
            else:
                self._next(key)
            return


def _which(job: Job) -> tuple[str, str, int]:
    return job.topic, job.id, job.delivery
