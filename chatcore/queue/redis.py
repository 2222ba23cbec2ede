"""The queue on Redis Streams, for all hosts that share one Redis (7.0 or later; alone, by Sentinel, or Cluster).

A topic is a fixed number of streams, its partitions; a key always goes to the same one. A partition belongs to one
consumer at a time, by a lease with a fencing number (see :mod:`.redis_scripts` for the data and
:mod:`.redis_consumer` for the work of the holder), and the consumers of a topic share its partitions evenly.

A put is as durable as Redis is: with ``appendonly yes`` and ``appendfsync always`` when it returns, with
``everysec`` up to a second later. Redis must not evict keys without expiry: ``maxmemory-policy noeviction``, or
one of ``volatile-*``. Messages that Redis lost stay lost; the queue goes on without them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from redis.exceptions import NoScriptError, ResponseError

from ..common.redis_client import RedisClient
from ..errors import Unavailable
from . import redis_scripts as scripts
from .base import (
    Clock,
    DeadLetter,
    JobHandler,
    QueueFull,
    QueueSettings,
    TopicStats,
    check_message,
    check_topic,
    new_id,
)
from .redis_consumer import RedisConsumer
from .redis_scripts import Script, TopicKeys

log = logging.getLogger("chatcore.queue")

# So many workers can share a topic. Not a setting, since all hosts must always agree on it: a key that changed its
# partition would lose its order. It can change only while the queue is empty.
PARTITIONS: Final = 16
# Longest wait for a message in one command; a consumer that stops waits for its end.
BLOCK_S: Final = 1.0
# Added to the time that a command blocks, for the time-out of its client.
BLOCKING_SPARE_S: Final = 2.0
# The users of a topic announce it this often, so that a Redis that has lost its data learns it again.
ANNOUNCE_S: Final = 30.0
#: The prefixes of all queues in a Redis, for the command line. Not below a prefix itself.
PREFIXES: Final = "chatcore:queues"
# Dead letters read at a time; they carry payloads.
PAGE: Final = 100


class RedisQueue:
    """Implements :class:`~.base.Queue`.

    :param client: for commands; its owner closes it after the queue.
    :param prefix: of all keys; holds the id of the store, and no braces.
    """

    name = "redis"

    def __init__(
        self,
        client: RedisClient,
        prefix: str,
        settings: QueueSettings,
        *,
        block_s: float = BLOCK_S,
        clock: Clock | None = None,
    ) -> None:
        self.client = client
        self.prefix = prefix
        self.settings = settings
        self.clock = clock or Clock()
        self.block_s = block_s
        self._keys: dict[str, TopicKeys] = {}
        self._consumers: dict[str, RedisConsumer] = {}
        self._announced: dict[str, float] = {}
        self._healthy = True

    @property
    def healthy(self) -> bool:
        """Whether Redis answered last time."""
        return self._healthy

    async def start(self) -> None:
        """Warn of a Redis that is not configured to keep a queue. If it is away, the consumers wait for it."""
        try:
            found = await self.client.run(_config)
            config = {_text(name): _text(value) for name, value in found.items()}
        except Unavailable as exc:
            log.warning("the queue's redis does not answer: %s", exc.message)
            return
        except ResponseError:
            return  # hosted servers hide their configuration
        if config.get("appendonly") == "no":
            log.warning("redis keeps no append-only file (appendonly no): a restart may lose what is in the queue")
        if config.get("maxmemory-policy", "").startswith("allkeys"):
            log.warning(
                "redis may evict the queue (maxmemory-policy %s): use noeviction or volatile-lru",
                config["maxmemory-policy"],
            )

    async def probe(self) -> None:
        """See :meth:`.base.Queue.probe`."""
        try:
            await self.client.call("PING")
        except Unavailable:
            self._healthy = False
            raise
        self._healthy = True

    async def close(self, grace_s: float = 5.0) -> None:
        """Stop all consumers."""
        await asyncio.gather(*(c.stop(grace_s) for c in list(self._consumers.values())))

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        """Run a script; its reply.

        :raises Unavailable: Redis does not answer, or cannot run it now; it may have run.
        :raises ResponseError: Redis refused it.
        """
        try:
            try:
                reply = await self.client.call("EVALSHA", script.sha, len(keys), *keys, *args)
            except NoScriptError:
                reply = await self.client.call("EVAL", script.text, len(keys), *keys, *args)
        except Unavailable:
            self._healthy = False
            raise
        self._healthy = True
        return reply

    def keys(self, topic: str) -> TopicKeys:
        """The names of a topic's keys."""
        if topic not in self._keys:
            self._keys[topic] = TopicKeys(self.prefix, topic, PARTITIONS)
        return self._keys[topic]

    # -- putting

    async def put(
        self, topic: str, key: str, payload: bytes, *, delay_ms: int = 0, dedupe_id: str | None = None
    ) -> str:
        settings = self.settings
        check_message(topic, key, payload, delay_ms, dedupe_id, settings.payload_bytes)
        await self.announce(topic)
        k = self.keys(topic)
        partition = k.partition(key)
        once = k.once(key, dedupe_id) if dedupe_id is not None else k.fence  # ignored
        keys = [once, k.delayed, k.later, k.counts, k.wakes[partition], k.streams[partition], *k.streams]
        dedupe_ms = settings.dedupe_ms if dedupe_id is not None else 0
        try:
            outcome, answer = await self.run(
                scripts.PUT, keys, [new_id(), key, payload, delay_ms, dedupe_ms, settings.max_length, partition]
            )
        except ResponseError as exc:
            log.error("putting into %s was refused: %s", topic, exc)
            raise Unavailable("the queue refuses it") from exc
        if outcome == 2:
            raise QueueFull(topic, answer)
        return _text(answer)

    async def announce(self, topic: str) -> None:
        """Let the command line find the topic, at most once in :data:`ANNOUNCE_S`.

        :raises Unavailable: Redis does not answer.
        """
        if time.monotonic() - self._announced.get(topic, -ANNOUNCE_S) < ANNOUNCE_S:
            return
        await self.client.call("SADD", PREFIXES, self.prefix)
        await self.client.call("SADD", f"{self.prefix}:queue:topics", topic)
        self._announced[topic] = time.monotonic()

    # -- handling

    def consume(self, topic: str, handler: JobHandler, *, concurrency: int | None = None) -> RedisConsumer:
        """See :meth:`.base.Queue.consume`.

        :raises ValueError: this queue has a consumer of the topic.
        """
        check_topic(topic)
        if topic in self._consumers:
            raise ValueError(f"topic {topic} has a consumer")
        # A connection of its own: a command that blocks would hold up the others.
        blocking = RedisClient(self.client.address, timeout_s=self.block_s + BLOCKING_SPARE_S, max_connections=1)
        consumer = RedisConsumer(self, topic, handler, concurrency or self.settings.concurrency, blocking)
        self._consumers[topic] = consumer
        return consumer

    def consumer_stopped(self, topic: str) -> None:
        """The consumer of a topic has stopped: the topic may have another one."""
        self._consumers.pop(topic, None)

    # -- statistics, and dead letters

    async def topics(self) -> list[str]:
        """All topics that were announced, by name."""
        members = await self.client.call("SMEMBERS", f"{self.prefix}:queue:topics")
        return sorted(_text(topic) for topic in members)

    async def stats(self) -> list[TopicStats]:
        found = []
        for topic in await self.topics():
            k = self.keys(topic)
            found.append(
                TopicStats(topic, *await self.run(scripts.STATS, [k.delayed, k.dead, k.counts, *k.streams], []))
            )
        return found

    async def dead(self, topic: str | None = None, limit: int = 1000) -> list[DeadLetter]:
        letters: list[DeadLetter] = []
        for one in await self.topics() if topic is None else [topic]:
            last = b"-"
            while len(letters) < limit and (page := await self._page(one, last, min(PAGE, limit - len(letters)))):
                letters.extend(letter for _, letter in page)
                last = b"(" + page[-1][0]
        return letters

    async def retry(self, id: str | None) -> int:
        async def again(k: TopicKeys, entry: bytes, letter: DeadLetter) -> int:
            n = k.partition(letter.key)
            return int(await self.run(scripts.RETRY, [k.dead, k.streams[n], k.wakes[n]], [entry]))

        return await self._letters(id, again)

    async def drop(self, id: str | None) -> int:
        async def forget(k: TopicKeys, entry: bytes, letter: DeadLetter) -> int:
            return int(await self.client.call("XDEL", k.dead, entry))

        return await self._letters(id, forget)

    async def _letters(self, id: str | None, do: Callable[[TopicKeys, bytes, DeadLetter], Any]) -> int:
        count = 0
        for topic in await self.topics():
            k = self.keys(topic)
            newest = await self.client.call("XREVRANGE", k.dead, "+", "-", "COUNT", 1)
            if not newest:
                continue
            last = b"-"
            # Up to the newest there is now: a retried message may be dead again at once.
            while page := await self._page(topic, last, PAGE, newest[0][0]):
                for entry, letter in page:
                    if id is None or letter.id == id:
                        count += await do(k, entry, letter)
                last = b"(" + page[-1][0]
        return count

    async def _page(self, topic: str, first: bytes, most: int, last: bytes = b"+") -> list[tuple[bytes, DeadLetter]]:
        entries = await self.client.call("XRANGE", self.keys(topic).dead, first, last, "COUNT", most)
        return [(entry, _letter(topic, fields)) for entry, fields in entries]


async def _config(raw: Any) -> dict[bytes, bytes]:
    """The settings that `start` checks; in a Cluster, of any node."""
    found: dict[bytes, bytes] = await raw.config_get("appendonly", "maxmemory-policy")
    return found


def _letter(topic: str, f: dict[bytes, bytes]) -> DeadLetter:
    return DeadLetter(
        _text(f[b"i"]), topic, _text(f[b"k"]), f[b"p"], int(f[b"n"]), _text(f[b"e"]), int(f[b"c"]), int(f[b"t"])
    )


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")
