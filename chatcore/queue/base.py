"""The background queue: what every implementation offers, and the values that go in and out.

A message has a topic (which handler), a key (what must stay in order) and a payload. What is promised:

- *At least once.* A message that was put is handled until a handler returns, or is a dead letter after its
  last delivery. A handler is told the message's ``id``, which is the same in every delivery.
- *In order by key.* The messages of one key are handled one after the other, in the order in which they
  came into line, over all workers and hosts. One that fails is tried again before the next of its key is
  begun; other keys go on. A delayed message comes into line when its delay is over, a retried dead letter
  when it is retried.
- *Fenced.* Who was stopped and wakes up later begins nothing, and what it finishes does not count
  (:attr:`Job.fence`).
"""

from __future__ import annotations

import random
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

from ..errors import BadRequest, TooLarge, Unavailable
from ..settings import Queue as Options

__all__ = [
    "DIED",
    "Clock",
    "Consumer",
    "DeadLetter",
    "Handler",
    "Job",
    "Options",
    "Queue",
    "QueueFull",
    "TopicStats",
    "backoff_ms",
    "check_message",
    "check_topic",
    "new_id",
]

# Topics are parts of key names and of commands; braces would change a Cluster's hash tag.
_TOPIC: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
KEY_BYTES_MAX: Final = 512
DEDUPE_BYTES_MAX: Final = 512
ERROR_CHARS_MAX: Final = 500
#: The longest delay: a year. What is further away belongs into a calendar.
DELAY_MS_MAX: Final = 31_536_000_000
#: The error of a dead letter whose last delivery ended with its worker.
DIED: Final = "the worker died, or lost its lease, while it handled it"


class QueueFull(Unavailable):
    """The topic holds as many messages as it may; nothing was put."""

    def __init__(self, topic: str, length: int) -> None:
        super().__init__(f"the queue {topic} is full: {length} messages wait", retry_after_ms=5000)


@dataclass(frozen=True, slots=True)
class Job:
    """A message in one of its deliveries (``delivery`` counts from 1).

    ``fence`` is higher the later the right to handle the key was given. A handler that writes where
    others may have written meanwhile can keep it there and refuse a lower one.
    """

    id: str
    topic: str
    key: str
    payload: bytes
    delivery: int
    created_ms: int
    fence: int


#: Returns when the message is done with; whatever it raises means "again later". It may be cancelled (it takes too
#: long, the right to its key was lost, the server stops) and is then called again: what it does must bear that.
Handler = Callable[[Job], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that is not tried any more, as it was put, and why. Times in Unix ms."""

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
    """How a topic is.

    ``depth``: messages not done with, ``delayed`` ones included; ``oldest_ms``: how long the first of those in
    line has been there (0: none); ``retries``: deliveries after the first of a message, ever; ``dead``: dead
    letters kept; ``dead_lost``: dead letters dropped, ever, because there were too many.
    """

    topic: str
    depth: int
    delayed: int
    oldest_ms: int
    retries: int
    dead: int
    dead_lost: int


class Consumer(Protocol):
    """A handler at work."""

    async def stop(self, grace_s: float = 5.0) -> None:
        """Begin nothing more; cancel what still runs after ``grace_s`` and give it back, as if not begun."""


class Queue(Protocol):
    """One per worker, made after the fork in the running loop."""

    #: What `ctl status` may call it: "sqlite", "redis".
    name: str

    @property
    def healthy(self) -> bool:
        """Whether what it stands on answered last time."""

    async def start(self) -> None: ...

    async def probe(self) -> None:
        """Find out whether what it stands on is there, though nobody uses it.

        :raises Unavailable: it is not.
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

    def consume(self, topic: str, handler: Handler, *, concurrency: int | None = None) -> Consumer:
        """Handle a topic in this worker, up to ``concurrency`` keys at once (default: ``queue.concurrency``)."""

    async def stats(self) -> list[TopicStats]:
        """All topics that were ever used, by name."""

    async def dead(self, topic: str | None = None, limit: int = 1000) -> list[DeadLetter]:
        """Dead letters (of one topic), oldest first within a topic."""

    async def retry(self, id: str | None) -> int:
        """Put a dead letter (None: all) back into line, as new; returns how many. ``max_length`` does not count."""

    async def drop(self, id: str | None) -> int:
        """Forget a dead letter (None: all); returns how many."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Both clocks, in ms. Tests have their own."""

    wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    mono_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000


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
    """Refuse what no implementation takes.

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


def backoff_ms(options: Options, delivery: int) -> int:
    """How long to wait after the failure of a delivery (counted from 1): doubled each time up to the
    maximum, of which a random half is taken off, so that what failed together does not come back together."""
    full = min(options.retry_ms << min(delivery - 1, 30), options.retry_max_ms)
    return full - random.randint(0, full // 2)
