"""Level 2: what the workers of all hosts cache together, in Redis.

The rules that it rests on:

* It never fails its caller and delays it for one time-out at most. The first command without an answer takes level 2
  out of use, and a task of its own finds out when it can be used again; until then all values are unknown.
* A deletion that failed stays pending. It is repeated, or all values of its kind are made unknown, before anything is
  read again (:meth:`L2._recover`).
* A reader writes a value only over what it saw before it asked the store (``l2_format.py``).
* Writes are queued, and the queue is bounded; beyond the bound they are shed. A missing value, or a gap between
  entries, costs a read of the store and nothing else.
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

from ..common.backoff import Backoff
from ..common.tasks import Tasks
from ..errors import Unavailable
from ..store.base import Entry
from . import l2_format as fmt
from .l2_format import ALL, ENTRIES, KINDS, Key

log = logging.getLogger("chatcore.cache")

Args = Sequence[str | bytes | int | float]

#: Lives, here and in level 1, are shortened by up to this part at random, so that values filled together do not
#: expire together.
JITTER: Final = 0.2
#: How long a reader may take to fill in what it has read; longer than the store may take to answer.
LEASE_MS: Final = 10_000
#: Pending deletions that are kept one by one; beyond, all values of their kinds are made unknown.
MAX_PENDING_DELETIONS: Final = 10_000
#: Writes that may wait, and commands that leave together.
QUEUE: Final = 5_000
BATCH: Final = 200
#: How often a server that answers is asked for the epochs, for workers that only write.
PROBE_S: Final = 1.0

_STATES: Final = {b"V", b"N", b"L"}


class Commands(Protocol):
    """The part of :class:`~chatcore.common.redis_client.RedisClient` that is used here."""

    async def pipeline(self, commands: Sequence[Args]) -> list[Any]: ...
    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class L2Value:
    """What is under a key. ``known``: ``data`` is the value (None: it does not exist). Otherwise only ``seen``
    counts, the right to fill it in (b"": none, another reader has it)."""

    known: bool
    data: bytes | None
    seen: bytes
    epoch: bytes


@dataclass(frozen=True, slots=True)
class L2Entries:
    """The entries that are there (in any order, maybe with gaps), and the right to add to them."""

    entries: list[Entry]
    seen: bytes
    epoch: bytes


class L2:
    """One per worker.

    :param client: sends commands without repeating them, with short time-outs; :meth:`close` closes it.
    :param lives_ms: how long the values of each kind live.
    :param negative_ms: how long it is known that a value does not exist.
    :param keep: recent entries kept of a conversation.
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
        # Seeded by the kernel, so that it differs from every other worker's; it need not be secret.
        self._generator = random.Random(os.urandom(16))
        #: Whether it is in use: it answers, and no deletion is pending.
        self.ready = False
        self.outages = 0
        self.shed = 0
        self._pending_deletions: dict[Key, None] = {}
        self._epochs = {kind: self._random() for kind in KINDS}
        self._queue: deque[Args] = deque()
        self._added: dict[str, list[Entry]] = {}
        self._n_added = 0
        self._wake = asyncio.Event()
        self._recovered = asyncio.Event()
        self._tasks = Tasks()
        self._sender: asyncio.Task[None] | None = None

    # --- life --------------------------------------------------------------------
    async def start(self, prefix: str) -> None:
        """Probe Redis once, then go on in the background. All keys begin with ``prefix``."""
        self.prefix = prefix
        await self._probe()
        self._tasks.spawn(self._watch(), "cache-l2-watch")

    async def close(self) -> None:
        """Send what is queued, then close the client, too."""
        await self.flush()
        await self._tasks.close()
        self.ready = False
        await self._client.close()

    async def until_ready(self) -> None:
        """Return when it is in use (again)."""
        while not self.ready:
            self._recovered.clear()
            await self._recovered.wait()

    async def _watch(self) -> None:
        backoff = Backoff()
        while True:
            if self.ready:
                backoff.reset()
                try:
                    async with asyncio.timeout(PROBE_S):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                self._wake.clear()
                if self.ready:
                    await self._probe()
            else:
                await asyncio.sleep(backoff.next())
                await self._probe()

    async def _probe(self) -> None:
        try:
            await self._recover()
        except (Unavailable, RedisError) as exc:
            if self.ready or not self.outages:
                self._on_outage(exc)

    async def _recover(self) -> None:
        """Make sure that no outdated value can be read; from then on level 2 is in use."""
        for kind, epoch in zip(
            KINDS, await self._client.pipeline([self._epoch_command(k) for k in KINDS]), strict=True
        ):
            if isinstance(epoch, Exception):
                raise epoch
            self._epochs[kind] = epoch
        while self._pending_deletions:
            some = list(self._pending_deletions)[:BATCH]
            for reply in await self._client.pipeline([args for key in some for args in self._deletion(key)]):
                if isinstance(reply, Exception):
                    raise reply
            for key in some:
                self._pending_deletions.pop(key, None)
        if not self.ready:
            self.ready = True
            self._recovered.set()
            log.info("the Redis cache is in use")

    def _on_outage(self, exc: Exception) -> None:
        """Redis did not answer: send it nothing but probes until it does."""
        self.outages += 1
        self.ready = False
        self._shed_queue()
        self._wake.set()
        log.warning("the Redis cache is out of use: %s", exc)

    def _shed_queue(self) -> None:
        self.shed += len(self._queue) + self._n_added
        self._queue.clear()
        self._added.clear()
        self._n_added = 0

    async def run(self, commands: Sequence[Args]) -> list[Any] | None:
        """The replies, with an exception for a command that was refused; None: level 2 is out of use."""
        if not self.ready:
            return None
        try:
            return await self._client.pipeline(commands)
        except (Unavailable, RedisError) as exc:
            if self.ready:
                self._on_outage(exc)
            return None

    def key(self, kind: str, key: str) -> str:
        """The name in Redis of a key of a kind."""
        return f"{self.prefix}:{kind}:{key}"

    def _random(self) -> bytes:
        return self._generator.randbytes(fmt.GENERATION_BYTES)

    def _entry_keys(self, conv: str) -> tuple[str, str]:
        """The keys of the entries and of their generation, both in one hash slot."""
        return f"{self.prefix}:e:{{{conv}}}", f"{self.prefix}:g:{{{conv}}}"

    def _life(self, ms: int) -> int:
        return max(1, int(ms * (1 - JITTER * random.random())))

    # --- values by key --------------------------------------------------------------
    def _epoch_command(self, kind: str) -> Args:
        return ("EVAL", fmt.EPOCH, 1, self.key("epoch", kind), self._random())

    async def read_values(self, kind: str, keys: Sequence[str]) -> dict[str, L2Value]:
        """What is under these keys (empty: level 2 is out of use). A caller that gets the right to fill in a
        value reads the store now, then calls :meth:`fill`."""
        lease = self._random()
        epoch = self._epochs[kind]
        commands: list[Args] = [self._epoch_command(kind)]
        commands += [
            ("EVAL", fmt.READ_OR_LEASE, 1, self.key(kind, key), b"%b%bL" % (lease, epoch), LEASE_MS) for key in keys
        ]
        replies = await self.run(commands)
        if replies is None or not isinstance(replies[0], bytes):
            return {}
        epoch = self._epochs[kind] = replies[0]
        return {
            key: self._parse(raw, lease, epoch)
            for key, raw in zip(keys, replies[1:], strict=True)
            if not isinstance(raw, Exception)
        }

    @staticmethod
    def _parse(raw: bytes | None, lease: bytes, epoch: bytes) -> L2Value:
        if raw is None:
            return L2Value(False, None, lease, epoch)
        n = fmt.GENERATION_BYTES
        seen, of, state = raw[:n], raw[n : 2 * n], raw[2 * n : fmt.HEAD_BYTES]
        if state not in _STATES or (state == b"L" and of == epoch):
            return L2Value(False, None, b"", epoch)
        if of != epoch:
            return L2Value(False, None, seen, epoch)
        return L2Value(True, raw[fmt.HEAD_BYTES :] if state == b"V" else None, seen, epoch)

    def fill(self, kind: str, key: str, before: L2Value, data: bytes | None) -> None:
        """Queue a value that the store returned (None: it does not exist). It is written unless the key was
        deleted or filled since ``before`` was read."""
        if not before.seen:
            return
        state = b"N" if data is None else b"V"
        life = self._life(self._negative_ms if data is None else self._lives_ms[kind])
        value = b"%b%b%b%b" % (self._random(), before.epoch, state, data or b"")
        self._send(("EVAL", fmt.FILL, 1, self.key(kind, key), before.seen, value, life))

    async def delete(self, keys: Iterable[Key]) -> bool:
        """Make these unknown. False: level 2 is out of use, and the deletions are pending."""
        wanted = dict.fromkeys(keys)
        replies = await self.run([args for key in wanted for args in self._deletion(key)])
        if replies is not None and not any(isinstance(reply, Exception) for reply in replies):
            return True
        self._pending_deletions.update(wanted)
        if len(self._pending_deletions) > MAX_PENDING_DELETIONS:
            self._pending_deletions = dict.fromkeys((kind, ALL) for kind, _ in self._pending_deletions)
        if self.ready:  # Redis answered, and refused
            self._on_outage(Unavailable("Redis refuses deletions"))
        return False

    def _deletion(self, key: Key) -> list[Args]:
        kind, name = key
        if name == ALL:
            return [("DEL", self.key("epoch", kind))]
        if kind == ENTRIES:
            entries_key, generation = self._entry_keys(name)
            renewed = self._epochs[ENTRIES] + self._random()
            return [("SET", generation, renewed, "PX", self._lives_ms[ENTRIES]), ("DEL", entries_key)]
        return [("DEL", self.key(kind, name))]

    # --- recent entries ----------------------------------------------------------------
    async def read_entries(self, convs: Sequence[str]) -> dict[str, L2Entries]:
        """The recent entries of each that are there (empty: level 2 is out of use)."""
        commands: list[Args] = [self._epoch_command(ENTRIES)]
        for conv in convs:
            entries_key, generation = self._entry_keys(conv)
            commands += [("GET", generation), ("ZRANGE", entries_key, 0, -1)]
        replies = await self.run(commands)
        if replies is None or any(isinstance(reply, Exception) for reply in replies):
            return {}
        epoch = self._epochs[ENTRIES] = replies[0]
        found: dict[str, L2Entries] = {}
        for i, conv in enumerate(convs):
            seen, packed = replies[1 + 2 * i] or b"", replies[2 + 2 * i]
            entries: list[Entry] = []
            if seen[: fmt.GENERATION_BYTES] == epoch:
                try:
                    entries = [fmt.unpack_entry(conv, raw) for raw in packed]
                except ValueError as exc:
                    log.warning("ignored malformed entries in Redis: %s", exc)
            found[conv] = L2Entries(entries, seen, epoch)
        return found

    def fill_entries(self, conv: str, before: L2Entries, entries: Sequence[Entry]) -> None:
        """Queue entries that the store returned. They are written unless one was overwritten, or all were
        deleted, since ``before`` was read."""
        if not entries:
            return
        known = before.seen[: fmt.GENERATION_BYTES] == before.epoch
        to_be = before.seen if known else before.epoch + self._random()
        newest = entries[-self._keep :]
        self._send(
            ("EVAL", fmt.FILL_ENTRIES, 2, *self._entry_keys(conv), before.seen, to_be, *self._entry_args(newest))
        )

    def add_committed(self, entries: Iterable[Entry]) -> None:
        """Queue entries that this worker has just committed, or shed them."""
        for e in entries:
            if not self.ready or self._n_added >= QUEUE:
                self.shed += 1
                continue
            self._added.setdefault(e.conv, []).append(e)
            self._n_added += 1
        self._send_soon()

    async def overwrite(self, e: Entry) -> bool:
        """Replace an entry. False: level 2 is out of use, and the deletion of the recent entries is pending."""
        generation = self._epochs[ENTRIES] + self._random()
        command = ("EVAL", fmt.OVERWRITE, 2, *self._entry_keys(e.conv), generation, *self._entry_args([e]))
        replies = await self.run([command])
        if replies is not None and not isinstance(replies[0], Exception):
            return True
        return await self.delete([(ENTRIES, e.conv)])

    def _entry_args(self, entries: Iterable[Entry]) -> list[str | bytes | int | float]:
        args: list[str | bytes | int | float] = [self._lives_ms[ENTRIES], self._keep]
        for e in entries:
            args += [e.seq, fmt.pack_entry(e)]
        return args

    # --- queued writes ----------------------------------------------------------------
    def _send(self, command: Args) -> None:
        if not self.ready or len(self._queue) >= QUEUE:
            self.shed += 1
            return
        self._queue.append(command)
        self._send_soon()

    def _send_soon(self) -> None:
        if self._sender is None and (self._queue or self._added):
            self._sender = self._tasks.spawn(self._send_all(), "cache-l2-send")

    async def _send_all(self) -> None:
        """One pipeline after the other: what is queued meanwhile forms the next one."""
        try:
            while self._queue or self._added:
                commands: list[Args] = []
                while self._added and len(commands) < BATCH:
                    conv = next(iter(self._added))
                    entries = self._added.pop(conv)
                    self._n_added -= len(entries)
                    generation = self._epochs[ENTRIES] + self._random()
                    newest = entries[-self._keep :]
                    commands.append(
                        ("EVAL", fmt.ADD_COMMITTED, 2, *self._entry_keys(conv), generation, *self._entry_args(newest))
                    )
                while self._queue and len(commands) < BATCH:
                    commands.append(self._queue.popleft())
                if await self.run(commands) is None:
                    self.shed += len(commands)
                    self._shed_queue()
        finally:
            self._sender = None

    async def flush(self) -> None:
        """Return when every queued write was sent, or shed."""
        while self._sender is not None:
            await asyncio.wait([self._sender])
