"""The background queue: the interface of every implementation, its values, and how a handler is run.

A message has a topic (which handler), a key (what must stay in order) and a payload. The promises:

- *At least once.* Every message is delivered to a handler until the handler returns, or is a dead letter after
  its last delivery. The message's ``id`` is the same in every delivery.
- *In order by key.* The messages of one key are handled one after the other, in the order in which they became
  ready, over all workers and hosts. A message that fails is tried again before the next of its key begins; other
  keys go on. A delayed message becomes ready when its delay is over, a retried dead letter when it is retried.
- *Fenced.* A worker that was stopped and resumes later begins nothing, and the outcomes of what it finishes are
  refused (:attr:`Job.fence`).
"""

from __future__ import annotations

import asyncio
import enum
import logging
import random
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

from ..common.clock import now_ms
from ..errors import BadRequest, TooLarge, Unavailable
from ..settings import QueueSettings

__all__ = [
    "DIED",
    "RENEWALS",
    "Clock",
    "Consumer",
    "DeadLetter",
    "Execution",
    "HandlerRegistry",
    "Job",
    "JobHandler",
    "Outcome",
    "Queue",
    "QueueFull",
    "QueueSettings",
    "TopicStats",
    "backoff_ms",
    "check_message",
    "check_topic",
    "new_id",
    "safe_until",
]

log = logging.getLogger("chatcore.queue")

# Topics are parts of key names and of commands; braces would change a Cluster's hash tag.
_TOPIC: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
KEY_BYTES_MAX: Final = 512
DEDUPE_BYTES_MAX: Final = 512
ERROR_CHARS_MAX: Final = 500
#: The longest delay: a year. What is further away belongs into a calendar.
DELAY_MS_MAX: Final = 31_536_000_000
#: The error of a dead letter whose last delivery ended with its worker.
DIED: Final = "the worker died, or lost its lease, while it handled it"
#: Renewals in the time of a lease: one may fail and the next still comes in time.
RENEWALS: Final = 3
#: The last sixth of a lease is left for cancelled handlers to end before another worker begins.
_LAST_PART: Final = 6
#: A handler that goes on after its cancellation is cancelled again after so long; its key waits until it ends.
CANCEL_AGAIN_S: Final = 30.0


# --- values --------------------------------------------------------------------------
class QueueFull(Unavailable):
    """The topic holds as many messages as it may; nothing was put."""

    def __init__(self, topic: str, length: int) -> None:
        super().__init__(f"the queue {topic} is full: {length} messages wait", retry_after_ms=5000)


@dataclass(frozen=True, slots=True)
class Job:
    """A message in one of its deliveries (``delivery`` counts from 1).

    ``fence`` grows with every lease on the key. A handler that writes where other workers may have written
    meanwhile can store it there and refuse a lower one.
    """

    id: str
    topic: str
    key: str
    payload: bytes
    delivery: int
    created_ms: int
    fence: int


#: A message is done when its handler returns; any exception means "try again later". The handler may be cancelled (it
#: takes too long, the lease was lost, the server stops) and is then called again: what it does must allow for that.
JobHandler = Callable[[Job], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that is not tried any more, as it was put, with the last error. Times in Unix ms."""

    id: str
    topic: str
    key: str
    payload: bytes
    deliveries: int
    error: str
    created_ms: int
    failed_ms: int


@dataclass(frozen=True, slots=True)
class TopicStats:
    """The state of a topic.

    ``depth``: messages that are not done, ``delayed`` ones included; ``oldest_ms``: how long the oldest ready
    message has been ready (0: none); ``retries``: deliveries after the first of a message, ever; ``dead``: dead
    letters kept; ``dead_lost``: dead letters dropped, ever, because there were too many.
    """

    topic: str
    depth: int
    delayed: int
    oldest_ms: int
    retries: int
    dead: int
    dead_lost: int


@dataclass(frozen=True, slots=True)
class Clock:
    """Both clocks, in ms. Tests have their own."""

    wall_ms: Callable[[], int] = now_ms
    mono_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000


# --- the interface ---------------------------------------------------------------------
class Consumer(Protocol):
    """A handler at work on a topic."""

    async def stop(self, grace_s: float = 5.0) -> None:
        """Begin nothing more. After ``grace_s`` cancel the handlers that still run, and give their messages back
        as if not begun."""


class Queue(Protocol):
    """One per worker, made after the fork in the running loop."""

    #: What `ctl status` may call it: "sqlite", "redis".
    name: str

    @property
    def healthy(self) -> bool:
        """Whether the storage below answered last time."""

    async def start(self) -> None: ...

    async def probe(self) -> None:
        """Ask the storage below, for the health of a queue without traffic.

        :raises Unavailable: it does not answer.
        """

    async def close(self, grace_s: float = 5.0) -> None:
        """Stop all consumers (see :meth:`Consumer.stop`)."""

    async def put(
        self, topic: str, key: str, payload: bytes, *, delay_ms: int = 0, dedupe_id: str | None = None
    ) -> str:
        """Put a message; durable when it returns. Returns its id.

        Another put of the same topic, key and ``dedupe_id`` within ``queue.dedupe_ms`` stores nothing and
        returns the first one's id.

        :raises BadRequest: topic, key, delay or dedupe_id are not usable.
        :raises TooLarge: the payload is over ``queue.payload_bytes``.
        :raises QueueFull: nothing was put.
        :raises Unavailable: unknown whether it was put; repeat it with the same ``dedupe_id``.
        """

    def consume(self, topic: str, handler: JobHandler, *, concurrency: int | None = None) -> Consumer:
        """Handle a topic in this worker, up to ``concurrency`` keys at once (default: ``queue.concurrency``)."""

    async def stats(self) -> list[TopicStats]:
        """All topics that were ever used, by name."""

    async def dead(self, topic: str | None = None, limit: int = 1000) -> list[DeadLetter]:
        """Dead letters (of one topic), oldest first within a topic."""

    async def retry(self, id: str | None) -> int:
        """Make a dead letter (None: all) ready again, as new; returns how many. ``max_length`` does not count."""

    async def drop(self, id: str | None) -> int:
        """Delete a dead letter (None: all); returns how many."""


class HandlerRegistry:
    """Which handler takes which topic, one per worker. Services register their handlers when the worker is made;
    ``start`` sets them to work when it is ready."""

    def __init__(self) -> None:
        self._handlers: dict[str, tuple[JobHandler, int | None]] = {}

    def register(self, topic: str, handler: JobHandler, *, concurrency: int | None = None) -> None:
        """Let a handler take a topic.

        :raises BadRequest: it is no name of a topic.
        :raises ValueError: the topic has a handler.
        """
        check_topic(topic)
        if topic in self._handlers:
            raise ValueError(f"topic {topic} has a handler")
        self._handlers[topic] = (handler, concurrency)

    def topics(self) -> list[str]:
        """All topics that have a handler."""
        return sorted(self._handlers)

    def start(self, queue: Queue) -> list[Consumer]:
        """Let every handler work on the queue; ``Queue.close`` ends them."""
        return [
            queue.consume(topic, handler, concurrency=concurrency)
            for topic, (handler, concurrency) in self._handlers.items()
        ]


# --- what the implementations share ------------------------------------------------------
def new_id() -> str:
    """An id for a message."""
    return secrets.token_hex(8)


def check_topic(topic: str) -> None:
    """:raises BadRequest: it is no name of a topic."""
    if _TOPIC.fullmatch(topic) is None:
        raise BadRequest(f"topic {topic!r}: up to 64 of a-z 0-9 _ . -, the first a letter or digit")


def check_message(
    topic: str, key: str, payload: bytes, delay_ms: int, dedupe_id: str | None, payload_bytes_max: int
) -> None:
    """Check the arguments of a put.

    :raises BadRequest: topic, key, delay or dedupe_id.
    :raises TooLarge: the payload.
    """
    check_topic(topic)
    try:
        if not 0 < len(key.encode()) <= KEY_BYTES_MAX:
            raise BadRequest(f"key: 1 to {KEY_BYTES_MAX} bytes")
        if dedupe_id is not None and not 0 < len(dedupe_id.encode()) <= DEDUPE_BYTES_MAX:
            raise BadRequest(f"dedupe_id: 1 to {DEDUPE_BYTES_MAX} bytes")
    except UnicodeEncodeError:
        raise BadRequest("key and dedupe_id must be Unicode text") from None
    if not 0 <= delay_ms <= DELAY_MS_MAX:
        raise BadRequest(f"delay_ms: 0 to {DELAY_MS_MAX}")
    if len(payload) > payload_bytes_max:
        raise TooLarge(f"payload: at most {payload_bytes_max} bytes")


def backoff_ms(settings: QueueSettings, delivery: int) -> int:
    """The pause after the failure of a delivery (counted from 1): doubled each time up to the maximum, less a
    random part of up to a half, so that messages that failed together do not come back together.

    Not :class:`~chatcore.common.backoff.Backoff`: the count is kept with the message, over workers and restarts.
    """
    full = min(settings.retry_ms << min(delivery - 1, 30), settings.retry_max_ms)
    return full - random.randint(0, full // 2)


def safe_until(since_ms: int, lease_ms: int) -> int:
    """Up to when a holder may rely on a lease that it asked for at ``since_ms`` (both of the monotonic clock): less
    than the lease, so that its handlers end before another worker begins theirs."""
    return since_ms + lease_ms - lease_ms // _LAST_PART


class Outcome(enum.Enum):
    """How a delivery ended."""

    DONE = "done"
    FAILED = "failed"
    #: Cancelled by the consumer, not by the handler's fault.
    ABANDONED = "abandoned"


class Execution:
    """Runs a handler for one job, with a time limit. ``error`` says in one line why it failed."""

    def __init__(self, handler: JobHandler, job: Job, timeout_s: float) -> None:
        self.job = job
        self.error = ""
        self._handler = handler
        self._timeout_s = timeout_s
        self._abandoned = False
        self._task: asyncio.Task[None] | None = None

    def abandon(self) -> None:
        """Cancel it, once: the lease on its key is lost, or the server stops."""
        if self._abandoned:
            return  # it may be cleaning up
        self._abandoned = True
        if self._task is not None:
            self._task.cancel()

    def abandoned(self) -> bool:
        """Whether :meth:`abandon` was called."""
        return self._abandoned

    async def run(self) -> Outcome:
        """Run it to its end; never raises, and returns only when the handler no longer runs."""
        if self.abandoned():
            return Outcome.ABANDONED
        job = self.job
        self._task = task = asyncio.create_task(self._call(), name=f"queue-{job.topic}-{job.id}")
        _, running = await asyncio.wait({task}, timeout=self._timeout_s)
        late = bool(running)
        while running:
            # Not only once: a handler may swallow a cancellation.
            task.cancel()
            _, running = await asyncio.wait({task}, timeout=CANCEL_AGAIN_S)
            if running:
                log.error("%s %s: the handler was cancelled and goes on; its key waits", job.topic, job.id)
        exc = None if task.cancelled() else task.exception()
        if not task.cancelled() and exc is None:
            return Outcome.DONE
        if self.abandoned():
            return Outcome.ABANDONED
        if late:
            self.error = f"took longer than {self._timeout_s:g} s"
        elif exc is None:
            self.error = "cancelled itself"
        else:
            # Any text that can be stored: a message may quote a file's name, in which bytes are lone surrogates.
            self.error = f"{type(exc).__name__}: {exc}"[:ERROR_CHARS_MAX].encode(errors="replace").decode()
        log.warning(
            "%s %s of key %s failed in delivery %d: %s",
            job.topic,
            job.id,
            job.key,
            job.delivery,
            self.error,
            exc_info=exc,
        )
        return Outcome.FAILED

    async def _call(self) -> None:
        await self._handler(self.job)
