"""The surroundings of the cache in its tests: a store that counts and can be blocked, a bus in memory, a clock."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from chatcore.cache.forwarding import ForwardingStore
from chatcore.cache.store import SharedCachedStore
from chatcore.common.redis_client import RedisClient, parse_url
from chatcore.entries import MemberFields, MsgFields, NewEntry, new_entry
from chatcore.errors import Unavailable
from chatcore.settings import CacheSettings
from chatcore.store.base import Appended, Changes, Entry, Known, Opening, Page, Token, User, View
from chatcore.store.sqlite.store import SQLiteStore

from ..store.hosting import hosted

T = TypeVar("T")

# Only a test that fails waits so long.
PATIENCE_S = 10.0
# Values expire only when a test moves the clock; no background work unless a test switches it on.
SETTINGS = replace(CacheSettings(), refresh=False, warm_conversations=0, prefetch_conversations=0, l2_timeout_ms=5_000)

_cids = itertools.count()


async def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for something that cannot be awaited."""
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {PATIENCE_S} s: {what}"
        await asyncio.sleep(0.002)


async def within(work: Any, what: str) -> Any:
    """Await, but not for ever."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await work
    except TimeoutError:
        raise AssertionError(f"not within {PATIENCE_S} s: {what}") from None


class Clock:
    """Monotonic and Unix time that a test moves."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.unix = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        """Unix time in seconds."""
        return self.unix

    def move(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        self.unix += seconds


class Gate:
    """Blocks a read of the store that has its result and has not returned it."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()


class Slow(ForwardingStore):
    """A real store whose reads are counted, and can be blocked between the result and the caller."""

    def __init__(self, inner: SQLiteStore) -> None:
        super().__init__(inner)
        self.calls: Counter[str] = Counter()
        self.down = False
        self._gates: dict[str, list[Gate]] = {}

    def gate(self, name: str) -> Gate:
        """Block the next call of a method."""
        gate = Gate()
        self._gates.setdefault(name, []).append(gate)
        return gate

    async def _count(self, name: str, work: Coroutine[Any, Any, T]) -> T:
        self.calls[name] += 1
        if self.down:
            work.close()
            raise Unavailable("the store does not answer")
        result = await work
        if gates := self._gates.get(name):
            gate = gates.pop(0)
            gate.reached.set()
            await gate.open.wait()
        return result

    async def heads(self, convs: Sequence[str]) -> dict[str, int]:
        return await self._count("heads", self.inner.heads(convs))

    async def entries(self, conv: str, after: int, limit: int, max_bytes: int) -> list[Entry]:
        return await self._count("entries", self.inner.entries(conv, after, limit, max_bytes))

    async def page(
        self, user: str, conv: str, before: int | None, after: int | None, limit: int, max_bytes: int
    ) -> Page:
        return await self._count("page", self.inner.page(user, conv, before, after, limit, max_bytes))

    async def changes(self, after: int, known: Known | None = None, everything: bool = True) -> Changes:
        return await self._count("changes", self.inner.changes(after, known, everything))

    async def views(self, user: str, convs: Sequence[str] | None = None) -> tuple[int, list[View]]:
        return await self._count("views", self.inner.views(user, convs))

    async def role(self, user: str, conv: str) -> str | None:
        return await self._count("role", self.inner.role(user, conv))

    async def member_count(self, conv: str) -> int:
        return await self._count("member_count", self.inner.member_count(conv))

    async def users(self, ids: Sequence[str]) -> list[User]:
        return await self._count("users", self.inner.users(ids))

    async def token(self, token_hash: bytes) -> Token | None:
        return await self._count("token", self.inner.token(token_hash))


class Hub:
    """The bus of some workers: what is published reaches the others at once, unless it is ``lossy``."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.lossy = False
        self.healthy = True
        self.published: list[tuple[str, bytes]] = []

    def resync(self) -> None:
        """Every worker may have missed messages."""
        for worker in self.workers:
            worker.cache.on_resync_needed()


class Line:
    """One worker's end of a hub."""

    def __init__(self, hub: Hub, worker: Worker) -> None:
        self._hub = hub
        self._worker = worker
        self.name = f"worker-{len(hub.workers)}"
        self.subscribed: list[str] = []

    @property
    def healthy(self) -> bool:
        return self._hub.healthy

    async def start(self, listener: object) -> None: ...

    async def close(self) -> None: ...

    async def subscribe(self, channels: list[str]) -> None:
        self.subscribed += channels

    def unsubscribe(self, channels: list[str]) -> None: ...

    def publish(self, channel: str, payload: bytes) -> None:
        self._hub.published.append((channel, payload))
        for worker in self._hub.workers:
            if worker is not self._worker and not self._hub.lossy:
                assert channel == "i:"
                worker.cache.on_bus(payload)

    def send_to(self, peer: str, channel: str, payload: bytes) -> None: ...


class Worker:
    """A cache over a store of its own, which shares its file with those of the other workers."""

    def __init__(self, data: Path, hub: Hub, clock: Clock, settings: CacheSettings, redis: str | None) -> None:
        self.hub = hub
        self.deaf = False  # receives no entries of other workers
        self.sqlite = SQLiteStore(data, self._on_commit)
        self.slow = Slow(self.sqlite)
        self.redis = None
        if redis is not None:
            self.redis = RedisClient(parse_url(redis), timeout_s=settings.l2_timeout_ms / 1000)
        self.cache = SharedCachedStore(
            self.slow, settings, self.redis, clock=clock, wall=clock.wall, chance=lambda: 0.0
        )
        hub.workers.append(self)
        self.line = Line(hub, self)

    def _on_commit(self, entries: list[Entry]) -> None:
        self.cache.on_commit(entries)
        for other in self.hub.workers:
            if other is not self and not self.hub.lossy and not other.deaf:
                for e in entries:
                    other.cache.on_entry(e)

    @property
    def calls(self) -> Counter[str]:
        """Reads of the store."""
        return self.slow.calls

    async def user(self, name: str) -> User:
        return await self.cache.add_user(name, "hash")

    async def conversation(self, creator: User, *others: User, kind: str = "group") -> str:
        """A conversation of these; its first entries are its members and its title."""
        opening = Opening(creator.id, f"open-{next(_cids)}", kind, "t", tuple(u.id for u in others), b"12345678")
        return (await self.cache.open(opening)).conv

    async def send(self, conv: str, sender: User, body: str = "hello") -> Appended:
        return await self.cache.append(message(conv, sender, body))

    async def fill(self, conv: str, sender: User, count: int) -> int:
        """Some messages; the last seq."""
        done = await asyncio.gather(*(self.send(conv, sender, f"m{i}") for i in range(count)))
        return max(d.seq for d in done)

    async def change(self, conv: str, actor: User, user: User, role: str) -> Appended:
        entry = new_entry(conv, actor.id, f"cid-{next(_cids)}", MemberFields(user.id, role))
        return await self.cache.append(entry)

    async def last(self, conv: str, user: User, limit: int = 50, hint: int = 0) -> Page:
        """The newest page."""
        return await self.cache.page(user.id, conv, None, None, limit, 10**6, hint)


def message(conv: str, sender: User, body: str = "hello") -> NewEntry:
    """A message to append."""
    return new_entry(conv, sender.id, f"cid-{next(_cids)}", MsgFields(body))


def seqs(page: Page) -> list[int]:
    """Of its entries."""
    return [e.seq for e in page.entries]


@contextlib.asynccontextmanager
async def workers(
    data: Path,
    count: int = 1,
    *,
    redis: str | None = None,
    settings: CacheSettings = SETTINGS,
    clock: Clock | None = None,
) -> AsyncIterator[list[Worker]]:
    """Some workers on one database, with one bus; all reads of the store counted from 0."""
    hub = Hub()
    clock = clock or Clock()
    made = [Worker(data, hub, clock, settings, redis) for _ in range(count)]
    host = contextlib.ExitStack()
    host.enter_context(hosted(data))
    try:
        for w in made:
            await w.cache.start()
            await w.cache.listen(w.line)
            await within(w.cache.prefetcher.warm.wait(), "the end of warming")
            w.calls.clear()
        yield made
    finally:
        for w in made:
            await w.cache.close()
        host.close()
