"""Level 2: what the workers of all hosts remember together, in Redis.

The rules that it rests on:

* It never fails its caller and never makes him wait for long: away means that nothing is known. The
  first command without an answer ends its use, and a task of its own finds out when to begin again.
* What could not be deleted is owed. It is deleted, or made unknown with all of its kind, before
  anything is read again (:meth:`L2._settle`).
* A value is written only over what its reader saw before it asked the store (``scripts.py``).
* Writes are queued and bounded; what does not fit is not written. A record that is missing costs a
  read of the store, a tail with a hole as well.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from redis.exceptions import RedisError

from ..errors import Unavailable
from ..store.base import Entry
from . import codec, scripts
from .invalidations import ALL, KINDS, TAIL, Key
from .l1 import JITTER

log = logging.getLogger("chatcore.cache")

Args = Sequence[str | bytes | int | float]

# How long a reader may take to write what it has read; longer than the store may take to answer.
LEASE_MS: Final = 10_000
# Deletions that are owed one by one; beyond, all of their kinds are made unknown.
OWED: Final = 10_000
# Writes that wait, and those that leave together.
QUEUE: Final = 5_000
AT_ONCE: Final = 200
# How often a server that answers is asked for the epochs (for those who only write), and one that does not
# whether it is back.
LOOK_S: Final = 1.0
PAUSE_S: Final = 0.1
PAUSE_MAX_S: Final = 2.0

_STATES: Final = {b"V", b"N", b"L"}


class Commands(Protocol):
    """The part of :class:`~chatcore.common.redis_client.RedisClient` that is used here."""

    async def pipeline(self, commands: Sequence[Args]) -> list[Any]: ...
    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Record:
    """What is there under a key. Not ``known``: nothing, and ``seen`` is the right to write it (b"": there
    is none, another reader has it)."""

    known: bool
    value: bytes | None
    seen: bytes
    epoch: bytes


@dataclass(frozen=True, slots=True)
class TailRecord:
    """The entries that are there (in no order, maybe with holes), and the right to add to them."""

    entries: list[Entry]
    seen: bytes
    epoch: bytes


class L2:
    """One per worker.

    :param client: commands without repetition, with short time-outs; it is closed with this.
    :param lives_ms: how long the records of each kind live.
    :param keep: entries of a tail.
    """

    def __init__(
        self,
        client: Commands,
        *,
        lives_ms: Mapping[str, int],
        negative_ms: int,
        keep: int,
    ) -> None:
        self._client = client
        self.prefix = ""
        self._lives_ms = lives_ms
        self._negative_ms = negative_ms
        self._keep = keep
        # Of the kernel once: unlike any other worker's, and not secret.
        self._generator = random.Random(os.urandom(16))
        #: Whether it is used now: it answers, and nothing is owed.
        self.ready = False
        self.outages = 0
        self.shed = 0
        self._owed: dict[Key, None] = {}
        self._epochs = {kind: self._random() for kind in KINDS}
        self._queue: deque[Args] = deque()
        self._added: dict[str, list[Entry]] = {}
        self._n_added = 0
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._sender: asyncio.Task[None] | None = None

    # --- life --------------------------------------------------------------------
    async def start(self, prefix: str) -> None:
        """Look whether it is there, once, and go on looking. All keys begin with ``prefix``."""
        self.prefix = prefix
        await self._try()
        self._watcher = asyncio.create_task(self._watch(), name="cache-l2-watch")

    async def close(self) -> None:
        """Send what is queued, and end; the client, too."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._sender is not None:
            await asyncio.wait([self._sender])
        self.ready = False
        await self._client.close()

    async def until_ready(self) -> None:
        """Return when it is used (again)."""
        while not self.ready:
            self._settled.clear()
            await self._settled.wait()

    async def _watch(self) -> None:
        pause = PAUSE_S
        while True:
            if self.ready:
                pause = PAUSE_S
                try:
                    async with asyncio.timeout(LOOK_S):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                self._wake.clear()
                if self.ready:
                    await self._try()
            else:
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                pause = min(PAUSE_MAX_S, 2 * pause)
                await self._try()

    async def _try(self) -> None:
        try:
            await self._settle()
        except (Unavailable, RedisError) as exc:
            if self.ready or not self.outages:
                self._lost(exc)

    async def _settle(self) -> None:
        """Make sure that nothing old can be read; from then on it is used."""
        for kind, epoch in zip(
            KINDS, await self._client.pipeline([self._epoch_commands(k) for k in KINDS]), strict=True
        ):
            if isinstance(epoch, Exception):
                raise epoch
            self._epochs[kind] = epoch
        while self._owed:
            some = list(self._owed)[:AT_ONCE]
            for reply in await self._client.pipeline([args for key in some for args in self._deletion(key)]):
                if isinstance(reply, Exception):
                    raise reply
            for key in some:
                self._owed.pop(key, None)
        if not self.ready:
            self.ready = True
            self._settled.set()
            log.info("the cache in redis is used")

    def _lost(self, exc: Exception) -> None:
        """It did not answer: nobody asks it until it does."""
        self.outages += 1
        self.ready = False
        self._drop_queue()
        self._wake.set()
        log.warning("the cache in redis is not used: %s", exc)

    def _drop_queue(self) -> None:
        self.shed += len(self._queue) + self._n_added
        self._queue.clear()
        self._added.clear()
        self._n_added = 0

    async def _run(self, commands: Sequence[Args]) -> list[Any] | None:
        """Replies (a refused one's as its exception); None: it is away."""
        if not self.ready:
            return None
        try:
            return await self._client.pipeline(commands)
        except (Unavailable, RedisError) as exc:
            if self.ready:
                self._lost(exc)
            return None

    def _random(self) -> bytes:
        return self._generator.randbytes(scripts.GENERATION_BYTES)

    def _key(self, kind: str, key: str) -> str:
        return f"{self.prefix}:{kind}:{key}"

    def _tail_keys(self, conv: str) -> tuple[str, str]:
        """Both of one slot."""
        return f"{self.prefix}:e:{{{conv}}}", f"{self.prefix}:g:{{{conv}}}"

    def _life(self, ms: int) -> int:
        return max(1, int(ms * (1 - JITTER * random.random())))

    # --- records -------------------------------------------------------------------
    def _epoch_commands(self, kind: str) -> Args:
        return ("EVAL", scripts.EPOCH, 1, self._key("epoch", kind), self._random())

    async def look(self, kind: str, keys: Sequence[str]) -> dict[str, Record]:
        """What is there under these keys (empty: it is away). Who gets a right is to read the store
        now, and then to call :meth:`fill`."""
        lease = self._random()
        epoch = self._epochs[kind]
        commands: list[Args] = [self._epoch_commands(kind)]
        commands += [
            ("EVAL", scripts.LOOK, 1, self._key(kind, key), b"%b%bL" % (lease, epoch), LEASE_MS) for key in keys
        ]
        replies = await self._run(commands)
        if replies is None or not isinstance(replies[0], bytes):
            return {}
        epoch = self._epochs[kind] = replies[0]
        return {
            key: self._record(raw, lease, epoch)
            for key, raw in zip(keys, replies[1:], strict=True)
            if not isinstance(raw, Exception)
        }

    @staticmethod
    def _record(raw: bytes | None, lease: bytes, epoch: bytes) -> Record:
        if raw is None:
            return Record(False, None, lease, epoch)
        n = scripts.GENERATION_BYTES
        seen, of, state = raw[:n], raw[n : 2 * n], raw[2 * n : scripts.HEAD_BYTES]
        if state not in _STATES or (state == b"L" and of == epoch):
            return Record(False, None, b"", epoch)
        if of != epoch:
            return Record(False, None, seen, epoch)
        return Record(True, raw[scripts.HEAD_BYTES :] if state == b"V" else None, seen, epoch)

    def fill(self, kind: str, key: str, record: Record, value: bytes | None) -> None:
        """Write what the store said (None: there is no such thing), soon, if nothing was said since
        ``record`` was looked at."""
        if not record.seen:
            return
        state = b"N" if value is None else b"V"
        life = self._life(self._negative_ms if value is None else self._lives_ms[kind])
        data = b"%b%b%b%b" % (self._random(), record.epoch, state, value or b"")
        self._send(("EVAL", scripts.FILL, 1, self._key(kind, key), record.seen, data, life))

    async def delete(self, keys: Iterable[Key]) -> bool:
        """Make these unknown. False: it is away, and they are owed."""
        wanted = dict.fromkeys(keys)
        replies = await self._run([args for key in wanted for args in self._deletion(key)])
        if replies is not None and not any(isinstance(reply, Exception) for reply in replies):
            return True
        self._owed.update(wanted)
        if len(self._owed) > OWED:
            self._owed = dict.fromkeys((kind, ALL) for kind, _ in self._owed)
        if self.ready:  # it refused
            self._lost(Unavailable("redis refuses deletions"))
        return False

    def _deletion(self, key: Key) -> list[Args]:
        kind, name = key
        if name == ALL:
            return [("DEL", self._key("epoch", kind))]
        if kind == TAIL:
            tail, generation = self._tail_keys(name)
            return [("SET", generation, self._epochs[TAIL] + self._random(), "PX", self._lives_ms[TAIL]), ("DEL", tail)]
        return [("DEL", self._key(kind, name))]

    # --- tails ---------------------------------------------------------------------
    async def tails(self, convs: Sequence[str]) -> dict[str, TailRecord]:
        """The last entries that are there, of each (empty: it is away)."""
        commands: list[Args] = [self._epoch_commands(TAIL)]
        for conv in convs:
            tail, generation = self._tail_keys(conv)
            commands += [("GET", generation), ("ZRANGE", tail, 0, -1)]
        replies = await self._run(commands)
        if replies is None or any(isinstance(reply, Exception) for reply in replies):
            return {}
        epoch = self._epochs[TAIL] = replies[0]
        found: dict[str, TailRecord] = {}
        for i, conv in enumerate(convs):
            seen, packed = replies[1 + 2 * i] or b"", replies[2 + 2 * i]
            entries: list[Entry] = []
            if seen[: scripts.GENERATION_BYTES] == epoch:
                try:
                    entries = [codec.unpack_entry(conv, raw) for raw in packed]
                except ValueError as exc:
                    log.warning("a tail in redis is malformed: %s", exc)
            found[conv] = TailRecord(entries, seen, epoch)
        return found

    def grow(self, conv: str, record: TailRecord, entries: Sequence[Entry]) -> None:
        """Write entries that the store gave, soon, if nothing was overwritten since ``record`` was looked at."""
        if not entries:
            return
        known = record.seen[: scripts.GENERATION_BYTES] == record.epoch
        to_be = record.seen if known else record.epoch + self._random()
        newest = entries[-self._keep :]
        self._send(("EVAL", scripts.GROW, 2, *self._tail_keys(conv), record.seen, to_be, *self._tail_args(newest)))

    def add(self, entries: Iterable[Entry]) -> None:
        """Entries that were just committed here: written soon, or not at all."""
        for e in entries:
            if not self.ready or self._n_added >= QUEUE:
                self.shed += 1
                continue
            self._added.setdefault(e.conv, []).append(e)
            self._n_added += 1
        self._send_soon()

    async def overwrite(self, e: Entry) -> bool:
        """Another body for an entry. False: it is away, and the deletion of its tail is owed."""
        generation = self._epochs[TAIL] + self._random()
        command = ("EVAL", scripts.OVERWRITE, 2, *self._tail_keys(e.conv), generation, *self._tail_args([e]))
        replies = await self._run([command])
        if replies is not None and not isinstance(replies[0], Exception):
            return True
        return await self.delete([(TAIL, e.conv)])

    def _tail_args(self, entries: Iterable[Entry]) -> list[str | bytes | int | float]:
        args: list[str | bytes | int | float] = [self._lives_ms[TAIL], self._keep]
        for e in entries:
            args += [e.seq, codec.pack_entry(e)]
        return args

    # --- what leaves soon -------------------------------------------------------------
    def _send(self, command: Args) -> None:
        if not self.ready or len(self._queue) >= QUEUE:
            self.shed += 1
            return
        self._queue.append(command)
        self._send_soon()

    def _send_soon(self) -> None:
        if self._sender is None and (self._queue or self._added):
            self._sender = asyncio.create_task(self._send_all(), name="cache-l2-send")

    async def _send_all(self) -> None:
        """One pipeline after the other: what comes meanwhile forms the next."""
        try:
            while self._queue or self._added:
                commands: list[Args] = []
                while self._added and len(commands) < AT_ONCE:
                    conv = next(iter(self._added))
                    entries = self._added.pop(conv)
                    self._n_added -= len(entries)
                    generation = self._epochs[TAIL] + self._random()
                    newest = entries[-self._keep :]
                    commands.append(
                        ("EVAL", scripts.ADD, 2, *self._tail_keys(conv), generation, *self._tail_args(newest))
                    )
                while self._queue and len(commands) < AT_ONCE:
                    commands.append(self._queue.popleft())
                if await self._run(commands) is None:
                    self.shed += len(commands)
                    self._drop_queue()
        finally:
            self._sender = None

    async def sent(self) -> None:
        """Return when what was queued has left, or was dropped."""
        while self._sender is not None:
            await asyncio.wait([self._sender])

    # --- which conversations are active ---------------------------------------------------
    async def score(self, bucket: str, counts: Mapping[str, int], keep: int, life_ms: int) -> None:
        """Add to the scores of conversations in a bucket of time, which lives so long and keeps so many."""
        key = self._key("hot", bucket)
        commands: list[Args] = [("ZINCRBY", key, n, conv) for conv, n in counts.items()]
        commands += [("ZREMRANGEBYRANK", key, 0, -1 - keep), ("PEXPIRE", key, life_ms)]
        await self._run(commands)

    async def scores(self, buckets: Sequence[str], most: int) -> list[dict[str, float]]:
        """The highest scores in each bucket (empty: it is away)."""
        replies = await self._run(
            [("ZREVRANGE", self._key("hot", bucket), 0, most - 1, "WITHSCORES") for bucket in buckets]
        )
        found: list[dict[str, float]] = []
        for reply in replies or ():
            if isinstance(reply, Exception):
                continue
            flat = [x for pair in reply for x in pair] if reply and not isinstance(reply[0], bytes) else reply
            found.append({flat[i].decode(): float(flat[i + 1]) for i in range(0, len(flat), 2)})
        return found
