"""``storm``: all sessions are cut at the same time, and come back at the same time.

Each is in 10 conversations of 20 and resumes with what it has: nothing is missing, or one message in each
conversation, which another member sent meanwhile. The time of a session is from the moment at which all come back
until it is live; CPU is the server's from then until the last is live (closing the old ones is counted apart).
Servers that know no resuming are simply joined again.
"""

from __future__ import annotations

import time

from . import bench
from .bench import Options
from .idle import CONVERSATIONS, MEMBERS, rooms_of, sessions_world
from .load.generator import Client, Generator
from .peers.base import Peer
from .processes import Running
from .results import Results, sample

ENTRIES = 20  # messages in each conversation from the start
AWAY_S = 3.0  # so that the server is done with the old connections
RETRY_S = 0.5


def main(argv: list[str]) -> dict[str, object]:
    """Run it; what ``--json`` writes."""
    p = bench.parser("storm", __doc__)
    p.add_argument("--sessions", type=int)
    args = p.parse_args(argv)
    opts = bench.options("storm", args)
    results = opts.results("storm")
    n = args.sessions or (100 if opts.tiny else 2000 if opts.size.name == "quick" else 5000)
    with bench.progress("storm", opts.size.rounds * len(opts.peers)) as step:
        for _, peer in bench.rounds(opts, results, step):
            with bench.survive(results, peer):
                run(peer, n, opts, results)
    return results.json()


def run(peer: Peer, n: int, opts: Options, results: Results) -> None:
    """One round of one server."""
    world = sessions_world(n, ENTRIES)
    away_s = 0.2 if opts.tiny else AWAY_S
    with Running(peer, opts.workers, world) as server:
        clients = [Client(peer.join(i, rooms_of(i)), peer.resume(i, rooms_of(i), ENTRIES)) for i in range(n)]
        # The writers while the others are away: another session of the first of each block, one for each conversation.
        writers = [
            Client(
                peer.join(room // CONVERSATIONS * MEMBERS, [room]), (), peer.send(room // CONVERSATIONS * MEMBERS, room)
            )
            for room in range(len(world.rooms))
        ]
        with Generator(peer, server.port, clients) as generator:
            generator.connect()
            if (live := generator.stats()).counts["live"] < n:
                raise RuntimeError(f"{live.counts['live']} of {n} came in: {live.last_error}")
            generator.retry(RETRY_S)
            for missed in (0, 1):
                before = server.usage()
                generator.cut()
                time.sleep(away_s)
                cut = server.usage().since(before)
                if missed:
                    with Generator(peer, server.port, writers, net=30) as others:
                        others.connect()
                        others.once()
                        others.drain()
                    time.sleep(away_s)
                generator.reset()
                before = server.usage()
                began = time.monotonic()
                generator.connect(resume=True, handshakes=0)
                seconds = time.monotonic() - began
                time.sleep(0.1)
                used = server.usage().since(before)
                stats = generator.stats()
                what = "nothing missed" if not missed else f"{CONVERSATIONS * missed} messages missed"
                figures = sample(stats, used, n, latency="join")
                figures |= {
                    "units_per_s": n / seconds,
                    "seconds": seconds,
                    "cut_cpu_us_per_unit": cut.cpu_ns / 1000 / n,
                }
                results.add(peer.name, f"{n} sessions, {what}", "resumed session", figures)
                if stats.counts["live"] < n or stats.counts["replayed"] < n * CONVERSATIONS * missed:
                    results.note(
                        f"{peer.name}, {what}: {stats.counts['live']} of {n} live,"
                        f" {stats.counts['replayed']} missed messages sent; {stats.last_error}"
                    )
