"""What a worker does for one topic on Redis: hold its share of the partitions, and see to what is in them.

Three loops: one renews the leases and learns which partitions are ours, one is woken when there is something
new in them, and one for each partition fetches entries and begins deliveries.

A lease counts from when its renewal was *sent*, by our own monotonic clock, and less than Redis gives it. So a
worker that cannot reach Redis, or stood still, ends its handlers before somebody else can begin theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import ResponseError

from ..common.redis_client import RedisClient
from ..errors import ChatError
from . import redis_scripts as scripts
from .base import Handler
from .redis_partition import Partition

if TYPE_CHECKING:
    from .redis import RedisQueue

log = logging.getLogger("chatcore.queue")

# Leases are renewed when a third has passed. When five sixths have passed without, handlers are cancelled: the last
# sixth is for them to end before somebody else begins.
RENEWALS: Final = 3
LAST_PART: Final = 6
# Wait after Redis did not answer; its client's breaker lets few through anyway.
PAUSE_S: Final = 0.25
TROUBLE: Final = (ChatError, ResponseError)


class RedisConsumer:
    """Implements :class:`~.base.Consumer`."""

    def __init__(
        self, queue: RedisQueue, topic: str, handler: Handler, concurrency: int, blocking: RedisClient
    ) -> None:
        self.queue = queue
        self.topic = topic
        self.handler = handler
        self.keys = queue.keys(topic)
        #: Places for handlers that are free; see :meth:`give_back`.
        self.free = concurrency
        self.id = secrets.token_hex(8)
        self.stopping = False
        self.parts: dict[int, Partition] = {}
        #: ms of the monotonic clock up to which what is held is held for certain.
        self.until = 0
        self._blocking = blocking
        self._block_s = queue.block_s
        self._stopped = False
        self._soon = asyncio.Event()
        self._changed = asyncio.Event()
        self._expiry: asyncio.TimerHandle | None = None
        self._away = False
        #: Partitions that are no longer held, until what they did has ended.
        self._ending: dict[int, asyncio.Future[None]] = {}
        self._loops = [
            asyncio.create_task(self._hold(), name=f"queue-hold-{topic}"),
            asyncio.create_task(self._listen(), name=f"queue-listen-{topic}"),
        ]

    def give_back(self, places: int) -> None:
        """Handlers have ended: others may begin, of any partition, none before the others by its number."""
        self.free += places
        for part in random.sample(list(self.parts.values()), len(self.parts)):
            part.wake()

    def held(self) -> bool:
        """Whether what is held is held for certain: to be asked right before a handler begins."""
        return self.queue.clock.mono_ms() < self.until

    async def stop(self, grace_s: float = 5.0) -> None:
        """See :meth:`.base.Consumer.stop`."""
        if self.stopping:
            return
        self.stopping = True
        for part in self.parts.values():
            part.drain()
        parts = list(self.parts.values())
        # Leases are renewed meanwhile, by the loop that still runs.
        await asyncio.gather(*(part.end(grace_s) for part in parts))
        self._stopped = True
        self._soon.set()
        self._changed.set()
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._lose_all()
        if self._ending:
            await asyncio.wait(self._ending.values())
        if self._expiry is not None:
            self._expiry.cancel()
        with contextlib.suppress(*TROUBLE):  # then the leases run out
            await self.queue.run(scripts.LEAVE, [self.keys.consumers, *self.keys.leases], [self.id])
        await self._blocking.close()
        self.queue.forget(self)

    # -- holding

    async def _hold(self) -> None:
        lease_ms = self.queue.options.lease_ms
        while not self._stopped:
            self._soon.clear()
            # First, without asking: who stood still may have lost what it holds, and must not go on meanwhile.
            self._expire()
            wait_s = lease_ms / 1000 / RENEWALS
            try:
                await self._renew()
                self._told(None)
            except TROUBLE as exc:
                self._told(exc)
                wait_s = min(wait_s, PAUSE_S)
            except Exception:
                log.exception("%s: renewing leases failed", self.topic)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._soon.wait(), wait_s * random.uniform(0.8, 1.0))

    async def _renew(self) -> None:
        keys, options, clock = self.keys, self.queue.options, self.queue.clock
        sent = clock.mono_ms()
        share, *held = await self.queue.run(
            scripts.HOLD,
            [keys.consumers, keys.fence, *keys.leases, *keys.streams],
            [
                self.id,
                options.lease_ms,
                keys.partitions,
                scripts.GROUP,
                random.randrange(keys.partitions),
                int(self.stopping),
            ],
        )
        self.until = sent + options.lease_ms - options.lease_ms // LAST_PART
        self._expire_at(self.until)
        leases = {int(n): (bytes(lease), int(fence)) for n, lease, fence in held}
        for n, part in list(self.parts.items()):
            if n not in leases or leases[n][0] != part.lease:
                self.lost(part)
        for n, (lease, fence) in leases.items():
            # One that was lost can be ours again before all that it did has ended.
            if n not in self.parts and n not in self._ending and not self.stopping:
                self.parts[n] = Partition(self, n, lease, fence)
                self._changed.set()
        if not self.stopping:
            self._give_up_surplus(share)
            await self.queue.announce(self.topic)
        for part in self.parts.values():
            part.look()  # in case that a wake-up was lost

    def _give_up_surplus(self, share: int) -> None:
        """Others have come: let go of what is above our share, the idlest first. One that does not come to rest
        until the next renewal goes on, so that a long handler holds up its own key only."""
        for part in self.parts.values():
            part.resume()
        idlest = sorted(self.parts.values(), key=lambda part: (len(part.running), random.random()))
        for part in idlest[: max(0, len(idlest) - share)]:
            part.drain()

    def released(self, part: Partition) -> None:
        """A partition has come to rest and was given up."""
        if self.parts.get(part.n) is part:
            del self.parts[part.n]

    def lost(self, part: Partition) -> None:
        """The partition is somebody else's, or will be when its lease has run out: end what it does."""
        if self.parts.get(part.n) is part:
            del self.parts[part.n]
            self._ending[part.n] = ending = asyncio.ensure_future(part.lose())
            ending.add_done_callback(lambda _: self._ended(part.n))

    def _ended(self, n: int) -> None:
        del self._ending[n]
        self._soon.set()  # it may still be ours

    def _lose_all(self) -> None:
        for part in list(self.parts.values()):
            self.lost(part)

    def _expire_at(self, until: int) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        delay_s = max(0, until - self.queue.clock.mono_ms()) / 1000
        self._expiry = asyncio.get_running_loop().call_later(delay_s, self._expire)

    def _expire(self) -> None:
        if self.parts and not self.held():
            log.warning("%s: no lease could be renewed in time; what runs is cancelled", self.topic)
            self._lose_all()

    def _told(self, exc: Exception | None) -> None:
        """One line when it goes wrong and one when it is well again."""
        if exc is not None and not self._away:
            log.warning("%s: nothing can be handled: %s", self.topic, exc)
        elif exc is None and self._away:
            log.info("%s: handling goes on", self.topic)
        self._away = exc is not None

    # -- waking up

    async def _listen(self) -> None:
        while not self._stopped:
            try:
                await self._wait_for_news()
            except TROUBLE:
                for part in self.parts.values():
                    part.look()  # a wake-up may be lost with its reply
                await asyncio.sleep(PAUSE_S)
            except Exception:
                log.exception("%s: waiting for messages failed", self.topic)
                await asyncio.sleep(PAUSE_S)

    async def _wait_for_news(self) -> None:
        keys = self.keys
        if not self.parts:
            self._changed.clear()
            await self._changed.wait()
            return
        due_ms: int = await self.queue.run(
            scripts.DUE,
            [keys.delayed, keys.later, *keys.wakes, *keys.streams],
            [keys.partitions, scripts.DUE_BATCH],
        )
        # 0 would be "for ever".
        wait_s = self._block_s if due_ms < 0 else min(self._block_s, max(due_ms, 1) / 1000)
        wakes = {keys.wakes[n].encode(): n for n in self.parts}
        reply: Any = await self._blocking.call("BLPOP", *wakes, wait_s)
        if reply is not None and (part := self.parts.get(wakes[reply[0]])) is not None:
            part.look()
