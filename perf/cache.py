"""``cache``: how many reads the two levels of the cache keep from the store, by kind.

Some workers, each a cached store over the same SQLite file with the real local bus between them, in
this one process, whose CPU is shown (the store's writer and indexer are others). Redis is a real one
(``--redis``, else one is started). A *visit* is what a client does: log in to any worker (session,
list, views), open some conversations (role, last 50 entries, names of the authors), write in some, now
and then be asked for its session again by HTTP. Users open the conversations that they are active in,
some more often than others; one open in ten is *cold*: of a conversation without active members. After
half of the visits one worker is replaced by a new one, whose memory is empty.

So that lives end within a short run, clocks run faster: with ``--speed 30`` a run of 20 s stands for ten
minutes (lives in Redis are shortened by the same factor). Hit ratios are of the whole run, the first
reads of everything included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import resource
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import uvloop

from chatcore.bus.local import LocalBus
from chatcore.cache.invalidations import CHANNEL
from chatcore.cache.lookup import ReadCounts
from chatcore.cache.store import SharedCachedStore
from chatcore.chat import events
from chatcore.common.redis_client import RedisClient, parse_url
from chatcore.entries import MsgFields, new_entry
from chatcore.settings import BusSettings, CacheSettings
from chatcore.store.base import Entry, Opening, View
from chatcore.store.sqlite.store import SQLiteStore

from .machine import machine, versions
from .store_processes import OWN, copy, host

KINDS = ("last_entries", "sessions", "profiles", "roles")
#: The hit ratio that each kind is to reach.
TARGET = 0.85
COLD = 0.10
DAY_MS = 86_400_000


class Clock:
    """Monotonic and Unix time, some times as fast as real."""

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._began = time.monotonic()
        self._unix = time.time()

    def __call__(self) -> float:
        return self._began + (time.monotonic() - self._began) * self._speed

    def wall(self) -> float:
        """Unix time in seconds."""
        return self._unix + self() - self._began


@dataclass
class Person:
    """A user: where he is active (most of all in the first), what else he is in, and his session."""

    id: str
    active: list[str] = field(default_factory=list)
    quiet: list[str] = field(default_factory=list)
    token: bytes = b""


@dataclass(frozen=True)
class Load:
    """How many of what."""

    people: int
    active: int
    quiet: int
    entries: int
    seconds: float
    visits_per_s: float
    speed: float


class Worker:
    """The parts of a worker that its cache has to do with."""

    def __init__(self, data: Path, name: str, settings: CacheSettings, redis: str | None, clock: Clock) -> None:
        self.store = SQLiteStore(data, self._on_commit)
        self.redis = None if redis is None else RedisClient(parse_url(redis), timeout_s=settings.l2_timeout_ms / 1000)
        self.cache = SharedCachedStore(self.store, settings, self.redis, clock=clock, wall=clock.wall)
        bus = BusSettings()
        self.bus = LocalBus(
            data / "run",
            name,
            queue_bytes=bus.queue_bytes,
            confirm_timeout_ms=bus.confirm_timeout_ms,
            heartbeat_ms=bus.heartbeat_ms,
        )
        self.heads: dict[str, int] = {}  # the heads of live rooms, as delivery knows them

    async def start(self) -> None:
        await self.cache.start()
        await self.bus.start(self)
        await self.cache.listen(self.bus)

    async def close(self) -> None:
        await self.cache.close()
        await self.bus.close()

    async def attach(self, views: list[View]) -> None:
        """Rooms become live: their entries are heard."""
        fresh = [view.conv for view in views if view.conv not in self.heads]
        await self.bus.subscribe([events.conv_channel(conv) for conv in fresh])
        for view in views:
            self._head(view.conv, view.head)

    def _head(self, conv: str, seq: int) -> None:
        self.heads[conv] = max(self.heads.get(conv, 0), seq)

    def _on_commit(self, entries: list[Entry]) -> None:
        self.cache.on_commit(entries)
        for e in entries:
            self._head(e.conv, e.seq)
            self.bus.publish(events.conv_channel(e.conv), events.pack_entry(e))

    def on_bus(self, channel: str, payload: bytes) -> None:
        if channel == CHANNEL:
            self.cache.on_bus(payload)
        elif payload[:1] == events.ENTRY:
            e = events.unpack_entry(channel[2:], payload)
            self.cache.on_entry(e)
            self._head(e.conv, e.seq)

    def on_resync_needed(self, why: str) -> None:
        self.cache.on_resync_needed()

    def on_peer_gone(self, peer: str) -> None: ...

    def on_peer_subscribed(self, peer: str, channel: str) -> None: ...


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """A Redis of this run's own, in memory only."""
    binary = shutil.which("redis-server")
    if binary is None:
        raise SystemExit("redis-server is missing: install it, or give --redis URL")
    with tempfile.TemporaryDirectory(prefix="chatcore-perf-") as folder:
        socket = f"{folder}/redis.sock"
        options = ["--port", "0", "--unixsocket", socket, "--dir", folder, "--save", "", "--logfile", f"{folder}/log"]
        process = subprocess.Popen([binary, *options])
        try:
            while not Path(socket).exists():
                if process.poll() is not None:
                    raise SystemExit("redis-server does not start")
                time.sleep(0.01)
            yield f"unix://{socket}"
        finally:
            process.terminate()
            process.wait()


async def seed(data: Path, load: Load, chance: random.Random) -> list[Person]:
    """People and conversations, straight into the store."""
    store = SQLiteStore(data, lambda entries: None)
    await store.start()
    users = await asyncio.gather(*(store.add_user(f"user{i}", "hash") for i in range(load.people)))
    people = [Person(user.id) for user in users]
    convs: list[tuple[str, Person]] = []
    for i in range(load.active + load.quiet):
        members = chance.sample(people, 8)
        opening = Opening(members[0].id, f"c{i}", "group", f"t{i}", tuple(m.id for m in members[1:]), b"12345678")
        conv = (await store.open(opening)).conv
        for member in members:
            (member.active if i < load.active else member.quiet).append(conv)
        convs.append((conv, members[0]))
    for conv, owner in convs:
        await asyncio.gather(
            *(store.append(new_entry(conv, owner.id, f"seed{i}", MsgFields("x" * 80))) for i in range(load.entries))
        )
    await store.close()
    return people


class Run:
    """One case: the same visits, drawn from the same seed."""

    def __init__(self, workers: list[Worker], people: list[Person], load: Load, clock: Clock) -> None:
        self.workers = workers
        self.people = [replace(p, token=b"") for p in people]
        self.load = load
        self.clock = clock
        self.chance = random.Random(1)
        self.opens = 0
        self.visits = 0
        self.cold = 0
        self.took: list[float] = []

    async def visit(self, w: Worker) -> None:
        """One client comes, looks around, writes, and goes."""
        chance = self.chance
        person = chance.choice(self.people)
        self.visits += 1
        if not person.token or chance.random() < 0.1:
            token = secrets.token_bytes(32)  # unlike those of the cases before
            await w.cache.add_token(token, person.id, int(self.clock.wall() * 1000) + DAY_MS, "hash")
            person.token = token
            w = chance.choice(self.workers)  # the connection after the log-in comes anywhere
        await w.cache.token(person.token)
        convs = (await w.cache.memberships(person.id)).revs
        _, views = await w.cache.views(person.id, list(convs))
        await w.attach(views)
        active = person.active or person.quiet
        for _ in range(6):
            await asyncio.sleep(chance.uniform(0, 10) / self.load.speed)
            is_cold = chance.random() < COLD and bool(person.quiet)
            # The first of his conversations he opens most: about 1/rank.
            conv = chance.choice(person.quiet) if is_cold else active[int(len(active) ** chance.random()) - 1]
            self.opens += 1
            self.cold += is_cold
            began = time.perf_counter()
            hint = w.heads[conv]
            page = await w.cache.page(person.id, conv, None, None, 50, 256 * 1024, hint)
            senders = {orjson.loads(e.wire)["from"] for e in page.entries}
            await w.cache.users(sorted(senders))
            self.took.append(time.perf_counter() - began)
            assert page.entries[-1].seq >= hint
            if not is_cold and chance.random() < 0.3:
                cid = f"{chance.getrandbits(96):x}"
                await w.cache.append(new_entry(conv, person.id, cid, MsgFields("x" * 80)))
            if chance.random() < 0.1:
                await chance.choice(self.workers).cache.token(person.token)


async def measure(
    data: Path, people: list[Person], load: Load, settings: CacheSettings, redis: str | None
) -> dict[str, Any]:
    """One case."""
    clock = Clock(load.speed)
    settings = replace(
        settings,
        l2_session_ttl_ms=int(settings.l2_session_ttl_ms / load.speed),
        l2_profile_ttl_ms=int(settings.l2_profile_ttl_ms / load.speed),
        l2_role_ttl_ms=int(settings.l2_role_ttl_ms / load.speed),
        l2_recent_ttl_ms=int(settings.l2_recent_ttl_ms / load.speed),
    )
    if redis is not None:
        client = RedisClient(parse_url(redis))
        await client.call("FLUSHDB")
        await client.close()
    workers: list[Worker] = []
    gone: list[Worker] = []
    async with alive(workers):
        for i in range(2):
            workers.append(Worker(data, f"w{i}", settings, redis, clock))
            await workers[-1].start()
        run = Run(workers, people, load, clock)
        used = resource.getrusage(resource.RUSAGE_SELF)
        tasks: set[asyncio.Task[None]] = set()
        began = time.perf_counter()
        count = int(load.seconds * load.visits_per_s)
        for i in range(count):
            await asyncio.sleep(max(0.0, began + i / load.visits_per_s - time.perf_counter()))
            if i == count // 2:
                # The visits that are under way at the old worker end there.
                old, new = workers[1], Worker(data, "w2", settings, redis, clock)
                await old.cache.activity.send()
                await workers[0].cache.activity.send()
                await new.start()
                workers[1] = new
                gone.append(old)
            task = asyncio.create_task(run.visit(run.chance.choice(workers)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        after = resource.getrusage(resource.RUSAGE_SELF)
        workers += gone
        cpu_s = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        return row(run, workers, workers[1], cpu_s)


@contextlib.asynccontextmanager
async def alive(workers: list[Worker]) -> AsyncIterator[None]:
    """Workers that are closed in the end."""
    try:
        yield
    finally:
        for w in workers:
            await w.close()


def counts(workers: list[Worker], kind: str) -> ReadCounts:
    """The reads of some workers together."""
    total = ReadCounts()
    for w in workers:
        shown = w.cache.stats()["kinds"][kind]
        total.l1 += shown["l1"]
        total.l2 += shown["l2"]
        total.missed += shown["missed"]
        total.refreshed += shown["refreshed"]
    return total


def row(run: Run, workers: list[Worker], new: Worker, cpu_s: float) -> dict[str, Any]:
    """The figures of a case."""
    took = sorted(run.took)
    result: dict[str, Any] = {"visits": run.visits, "opens": run.opens, "cold": f"{run.cold / run.opens:.1%}"}
    for kind in KINDS:
        c = counts(workers, kind)
        levels = f"L1 {c.l1 / c.reads:6.1%}  L2 {c.l2 / c.reads:6.1%}" if c.reads else ""
        result[kind] = f"{c.ratio():6.1%} = {levels}  of {c.reads} reads, {c.refreshed} refreshed"
        result[f"{kind}_ratio"] = round(c.ratio(), 4)
    first = counts([new], "last_entries")
    result["new_worker"] = f"{first.ratio():6.1%} of its last_entries, L1 {first.l1 / max(1, first.reads):6.1%}"
    ahead = [w.cache.stats()["prefetch"] for w in workers]
    result["loaded_ahead"] = ", ".join(
        f"{sum(a[what] for a in ahead)} {text}"
        for what, text in (("warmed", "at starts"), ("prefetched", "at log-ins"), ("store", "of these from the store"))
    )
    reads = sum(c.missed + c.refreshed for c in (counts(workers, kind) for kind in KINDS)) + sum(
        a["store"] for a in ahead
    )
    result["store_reads_per_open"] = round(reads / run.opens, 3)  # of these kinds, ahead of need or not
    if new.cache.l2 is not None:  # it is asked of both levels together
        result["target"] = "met" if all(result[f"{kind}_ratio"] > TARGET for kind in KINDS) else "MISSED"
    result["open_p50_ms"] = round(took[len(took) // 2] * 1000, 3)
    result["open_p99_ms"] = round(took[int(len(took) * 0.99)] * 1000, 3)
    result["cpu_us_per_open"] = round(cpu_s / run.opens * 1e6, 1)
    return result


def main(argv: list[str]) -> dict[str, Any]:
    """Run it; returns what ``--json`` writes."""
    parser = argparse.ArgumentParser(prog="perf cache", description=__doc__)
    parser.add_argument("--people", type=int, default=400)
    parser.add_argument("--active", type=int, default=200, help="conversations with active members")
    parser.add_argument("--quiet", type=int, default=600, help="conversations without")
    parser.add_argument("--entries", type=int, default=60, help="messages in each at the start")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each case")
    parser.add_argument("--rate", type=float, default=50.0, help="visits per second")
    parser.add_argument("--speed", type=float, default=30.0, help="of the clocks")
    parser.add_argument("--tiny", action="store_true", help="once and smallest, to see that it works")
    parser.add_argument("--redis", help="URL of a Redis whose database may be emptied")
    args = parser.parse_args(argv)
    load = Load(args.people, args.active, args.quiet, args.entries, args.seconds, args.rate, args.speed)
    if args.tiny:
        load = Load(people=20, active=10, quiet=20, entries=5, seconds=1.0, visits_per_s=20, speed=120)
    on = CacheSettings()
    off = replace(on, warm_conversations=0, prefetch_conversations=0)
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chatcore-perf-")))
        seeded = folder / "seeded"
        seeded.mkdir()
        redis = args.redis or stack.enter_context(redis_server())
        runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        with host(OWN, seeded):
            people = runner.run(seed(seeded, load, random.Random(0)))
        for i, (case, settings, url) in enumerate(
            (
                ("two levels, warming and prefetch", on, redis),
                ("two levels, neither", off, redis),
                ("level 1 alone, warming and prefetch", on, None),
                ("level 1 alone, neither", off, None),
            )
        ):
            data = folder / f"case{i}"
            copy(seeded, data)
            with host(OWN, data):
                result = runner.run(measure(data, people, load, settings, url))
            rows.append({"case": case, "unit": "open", **result})
    return {"bench": "cache", "machine": machine(), "versions": versions("chatcore", "redis", "lru-dict"), "rows": rows}
