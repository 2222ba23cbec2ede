"""``echo``: the bare framing layer, without any chat: what it sends back at once.

With ``--port N`` it only serves, for conformance suites; without, round trips of 128 B are measured: over 200 busy
connections of 2,000, each with one message under way, and 1,000 messages per second in all.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import uvloop

from . import bench
from .bench import Options, window
from .load.generator import Client, Generator
from .machine import commit
from .peers.base import BODY, Peer, Step
from .processes import Running
from .results import Results, sample

CONNECTIONS = 2000
BUSY = 200
PACED_PER_S = 1000.0


class EchoLayer(Peer):
    name = "chatcore"
    about = "reactor and frames alone, as an echo server"
    benches = frozenset({"echo"})

    def missing(self) -> str | None:
        return None

    def versions(self) -> dict[str, str]:
        return {"commit": commit(), "uvloop": version("uvloop")}

    def command(self, port: int, workers: int, data: Path) -> list[str]:
        return [sys.executable, "-m", "perf", "echo", "--port", str(port)]

    def join(self, user: int, rooms: Sequence[int]) -> list[Step]:
        return []

    def send(self, user: int, room: int) -> str:
        return BODY


def serve(port: int) -> None:
    """Answer every message in kind, until SIGTERM or SIGINT."""
    from tests.fast.echo import main as echo

    uvloop.run(echo(port))


def main(argv: list[str]) -> dict[str, object]:
    """Run it; what ``--json`` writes."""
    p = bench.parser("echo", __doc__)
    p.add_argument("--port", type=int, help="serve here, measure nothing")
    args = p.parse_args(argv)
    if args.port is not None:
        serve(args.port)
        sys.exit(0)
    asked = bench.options("echo", args)
    opts = Options(asked.size, (EchoLayer(), *asked.peers), 1, asked.missing)
    results = opts.results("echo")
    with bench.progress("echo", opts.size.rounds * len(opts.peers)) as step:
        for _, peer in bench.rounds(opts, results, step):
            with bench.survive(results, peer):
                run(peer, opts, results)
    return results.json()


def run(peer: Peer, opts: Options, results: Results) -> None:
    """One round of one server."""
    connections, busy = (40, 10) if opts.tiny else (CONNECTIONS, BUSY)
    with Running(peer) as server:
        clients = [Client((), (), peer.send(i, 0) if i < busy else None, 1) for i in range(connections)]
        with Generator(peer, server.port, clients) as generator:
            generator.connect()
            for mode in ("one under way in each", f"paced {PACED_PER_S:.0f}/s"):
                if mode.startswith("paced"):
                    generator.paced(PACED_PER_S)
                else:
                    generator.flood(1)
                time.sleep(opts.size.warm_s)
                stats, used = window(server, generator, opts.size.seconds)
                case = f"{busy} of {connections} connections, {mode}"
                results.add(peer.name, case, "round trip", sample(stats, used, stats.counts["acked"], latency="ack"))
                results.check_generator(peer.name, case, stats)
                counts = generator.drain().counts
                if counts["acked"] != counts["sent"]:
                    results.note(f"{case}, {peer.name}: {counts['acked']} of {counts['sent']} came back")
