"""``idle``: the memory of connections that do nothing.

*Bare*: upgraded, not logged in. *Session*: logged in, live in 10 conversations of 20. What is counted is the growth
of the processes' resident memory from the first connections (which make the server set up what it needs) to all of
them; the kernel's part of a socket is in none of it.
"""

from __future__ import annotations

import time

from . import bench
from .bench import Options
from .load.generator import Client, Generator
from .peers.base import Peer, World
from .processes import Running
from .results import Results

CONVERSATIONS = 10
MEMBERS = 20
SETTLE_S = 1.0


def sessions_world(users: int, entries: int = 0) -> World:
    """Users in 10 conversations each: blocks of 20 users have the same 10."""
    blocks = -(-users // MEMBERS)
    rooms = [
        list(range(block * MEMBERS, min(users, (block + 1) * MEMBERS)))
        for block in range(blocks)
        for _ in range(CONVERSATIONS)
    ]
    return World(rooms, users, entries)


def rooms_of(user: int) -> list[int]:
    """The conversations of a user in that world."""
    block = user // MEMBERS
    return list(range(block * CONVERSATIONS, (block + 1) * CONVERSATIONS))


def main(argv: list[str]) -> dict[str, object]:
    """Run it; what ``--json`` writes."""
    p = bench.parser("idle", __doc__)
    p.add_argument("--connections", type=int)
    args = p.parse_args(argv)
    opts = bench.options("idle", args)
    results = opts.results("idle", ratio_of="rss_bytes_per_conn")
    n = args.connections or (200 if opts.tiny else 5000)
    with bench.progress("idle", opts.size.rounds * len(opts.peers)) as step:
        for _, peer in bench.rounds(opts, results, step):
            with bench.survive(results, peer):
                run(peer, n, opts, results)
    return results.json()


def run(peer: Peer, n: int, opts: Options, results: Results) -> None:
    """One round of one server: both kinds, each in a fresh one."""
    warm = n // 5
    for kind, case in ((False, f"{n} bare connections"), (True, f"{n} sessions in {CONVERSATIONS} conversations")):
        world = sessions_world(n + warm) if kind else World((), 0)
        with Running(peer, opts.workers, world) as server:
            clients = [Client(peer.join(i, rooms_of(i)) if kind else ()) for i in range(n + warm)]
            with Generator(peer, server.port, clients) as generator:
                generator.connect(0, warm)
                time.sleep(0 if opts.tiny else SETTLE_S)
                before = server.usage()
                generator.connect(warm, n)
                time.sleep(0 if opts.tiny else SETTLE_S)
                used = server.usage().since(before)
                stats = generator.stats()
                if stats.counts["live"] < n + warm:
                    raise RuntimeError(f"{stats.counts['live']} of {n + warm} came in: {stats.last_error}")
                figures = {
                    "rss_bytes_per_conn": used.rss_bytes / n,
                    "cpu_us_per_unit": used.cpu_ns / 1000 / n,
                    "errors": stats.counts["errors"] + stats.counts["failed"],
                }
                results.add(peer.name, case, "connection", figures)
