"""``history``: how long the newest page of a conversation takes, as its log grows.

Over the wire: 50 sessions ask for a page of 50 entries in turn, 200 times per second, of a server that remembers
newest pages in memory (L1) and of one that remembers nothing (the store); *older pages* are spread over the whole
log and always come from the store. In a worker: the same page without wire and session, from memory, from Redis (L2;
what memory had is over after 1 ms, as it is in the first look of a new worker) and from the store.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import uvloop

from chatcore.settings import CacheSettings

from . import bench
from .bench import Options, StepTold, window
from .cache import Clock, Worker, redis_server
from .load.build import BUILD
from .load.generator import Client, Generator
from .load.histogram import percentile_ms
from .peers.base import World
from .peers.chatcore import Chatcore
from .processes import Running
from .results import Results, Sample, sample
from .store_processes import OWN, copy, host

SIZES = (1_000, 10_000, 100_000, 1_000_000)
SESSIONS = 50
PER_S = 200.0
PAGE = 50
PAGE_BYTES = 256 * 1024
CALLS = 300
FLAT = ("newest page over the wire", "newest page in a worker")


class Seeded(Chatcore):
    """chatcore on a copy of data that was made before: a million messages take a while to write."""

    def __init__(self, origin: Chatcore, data: Path, *, remembers: bool) -> None:
        super().__init__()
        self.seeded_as(origin)
        self._data = data
        self._remembers = remembers

    def prepare(self, data: Path, world: World) -> None:
        copy(self._data, data)

    def env(self, workers: int) -> dict[str, str]:
        return super().env(workers) | {"CHATCORE_CACHE_ENABLED": str(self._remembers).lower()}


def main(argv: list[str]) -> dict[str, object]:
    """Run it; what ``--json`` writes."""
    args = bench.parser("history", __doc__).parse_args(argv)
    opts = bench.options("history", args)
    sizes = (100, 1000) if opts.tiny else SIZES[:3] if opts.size.name == "quick" else SIZES
    results = opts.results("history")
    origin = Chatcore()
    world = World([list(range(SESSIONS))] * len(sizes), SESSIONS, entries_of=sizes)
    BUILD.mkdir(parents=True, exist_ok=True)
    steps = 1 + opts.size.rounds * 3
    with (
        bench.progress("history", steps) as step,
        tempfile.TemporaryDirectory(prefix="history-", dir=BUILD) as folder,
    ):
        step(f"writing {sum(sizes):,} messages")
        data = Path(folder) / "seed"
        data.mkdir()
        origin.prepare(data, world)
        for i in range(opts.size.rounds):
            for remembers in (True, False):
                step(f"round {i + 1}, {'memory' if remembers else 'store'}")
                wire(Seeded(origin, data, remembers=remembers), remembers, sizes, world, opts, results)
            step(f"round {i + 1}, in a worker")
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(in_worker(Path(folder), origin, data, sizes, opts, results, step))
    for line in flatness(results, sizes):
        results.note(line)
    return results.json()


def wire(peer: Seeded, remembers: bool, sizes: Sequence[int], world: World, opts: Options, results: Results) -> None:
    """Pages as a client gets them."""
    with Running(peer, 1, world) as server:
        for room, size in enumerate(sizes):
            kinds: dict[str, list[int | None]] = {f"newest page over the wire, {size:,} entries": [None] * SESSIONS}
            if not remembers:
                first = SESSIONS + 1  # the entries of the members that came in
                spread = [first + size * (i + 1) // (SESSIONS + 1) for i in range(SESSIONS)]
                kinds[f"older pages over the wire, {size:,} entries"] = [*spread]
            for case, bounds in kinds.items():
                clients = [
                    Client(peer.join(i, range(len(sizes))), (), peer.history(i, room, before))
                    for i, before in enumerate(bounds)
                ]
                with Generator(peer, server.port, clients) as generator:
                    generator.connect()
                    generator.paced(PER_S)
                    time.sleep(opts.size.warm_s)
                    stats, used = window(server, generator, opts.size.seconds)
                    figures = sample(stats, used, stats.counts["acked"], latency="ack")
                    results.add("chatcore, L1" if remembers else "chatcore, store", case, "page", figures)
                    results.check_generator("chatcore", case, stats)


async def in_worker(
    folder: Path, origin: Chatcore, seed: Path, sizes: Sequence[int], opts: Options, results: Results, step: StepTold
) -> None:
    """Pages as the session in a worker gets them."""
    data = Path(tempfile.mkdtemp(dir=folder))
    copy(seed, data)
    calls = 20 if opts.tiny else CALLS
    on = replace(CacheSettings(), warm_conversations=0, prefetch_conversations=0, refresh=False)
    # Memory's part is over before the next call; Redis' is not.
    short = replace(on, recent_ttl_ms=1)
    try:
        with redis_server() as url, host(OWN, data):
            await level(data, "chatcore, L1", on, None, origin, sizes, calls, results)
            await level(data, "chatcore, L2", short, url, origin, sizes, calls, results)
            await level(data, "chatcore, store", None, None, origin, sizes, calls, results)
    except SystemExit as exc:
        results.note(f"L2 is left out: {exc}")
    shutil.rmtree(data)


async def level(
    data: Path,
    name: str,
    settings: CacheSettings | None,
    redis: str | None,
    origin: Chatcore,
    sizes: Sequence[int],
    calls: int,
    results: Results,
) -> None:
    """One level: the store itself, or the cache with these settings."""
    worker = Worker(data, name.replace(", ", "-"), settings or CacheSettings(), redis, Clock(1.0))
    await worker.start()
    try:
        _, views = await worker.store.views(origin.users[0])
        heads = {view.conv: view.head for view in views}
        await worker.attach(views)
        for room, size in enumerate(sizes):
            conv = origin.convs[room]
            took: list[float] = []
            for i in range(calls + 1):
                await asyncio.sleep(0.002)
                began = time.perf_counter_ns()
                if settings is None:
                    page = await worker.store.page(origin.users[0], conv, None, None, PAGE, PAGE_BYTES)
                else:
                    page = await worker.cache.page(origin.users[0], conv, None, None, PAGE, PAGE_BYTES, heads[conv])
                took += [time.perf_counter_ns() - began] if i else []
                assert page.entries[-1].seq == heads[conv]
            figures: Sample = {f"p{p}_ms": percentile_ms(took, p / 100) for p in (50, 80, 99)}
            results.add(name, f"newest page in a worker, {size:,} entries", "page", figures)
    finally:
        await worker.close()


def flatness(results: Results, sizes: Sequence[int]) -> list[str]:
    """By how much the newest page differs between the smallest and the largest log."""
    lines = []
    rows = results.rows()
    for kind in FLAT:
        for server in dict.fromkeys(row["server"] for row in rows):
            found = {
                size: row["p50_ms"]
                for row in rows
                for size in sizes
                if row["server"] == server and row["case"] == f"{kind}, {size:,} entries" and "p50_ms" in row
            }
            if len(found) > 1:
                change = found[sizes[-1]] / found[sizes[0]] - 1
                lines.append(f"{kind}, {server}: p50 {change:+.0%} from {sizes[0]:,} to {sizes[-1]:,} entries")
    return lines
