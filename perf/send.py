"""``send``: messages in many small rooms, until they are acknowledged.

Rooms of 10; all members send, so each message is stored once and delivered 10 times. *Flood*: each member has one
message under way, always. *At 70 %*: paced at 70 % of what this server reached so. *Paced*: the same 200 messages per
second for every server. In chatcore an acknowledged message is on disk; the peers relay and keep nothing, and where
they do not acknowledge, the sender's own copy counts.
"""

from __future__ import annotations

import time

from . import bench
from .bench import Options, window
from .load.generator import Client, Generator
from .peers.base import Peer, World
from .processes import Running
from .results import Results, sample

SIZE = 10
ROOMS = 100
PACED_PER_S = 200.0


def main(argv: list[str]) -> dict[str, object]:
    """Run it; what ``--json`` writes."""
    p = bench.parser("send", __doc__)
    p.add_argument("--rooms", type=int)
    p.add_argument("--size", type=int, default=SIZE, help="members of each room")
    args = p.parse_args(argv)
    opts = bench.options("send", args)
    results = opts.results("send")
    rooms = args.rooms or (5 if opts.tiny else ROOMS)
    plans = [(peer, opts.workers) for peer in opts.peers]
    if opts.workers == 1 and not opts.tiny:
        plans += [(peer, 2) for peer in opts.peers if peer.name == "chatcore"]
    with bench.progress("send", opts.size.rounds * len(plans)) as step:
        for i in range(opts.size.rounds):
            for peer, workers in plans:
                step(f"round {i + 1}, {peer.name}")
                with bench.survive(results, peer):
                    run(peer, workers, rooms, args.size, opts, results)
    return results.json()


def run(peer: Peer, workers: int, rooms: int, size: int, opts: Options, results: Results) -> None:
    """One round of one server."""
    world = World([list(range(r * size, (r + 1) * size)) for r in range(rooms)], rooms * size)
    with Running(peer, workers, world) as server:
        clients = [
            Client(peer.join(user, [user // size]), (), peer.send(user, user // size), size)
            for user in range(world.users)
        ]
        with Generator(peer, server.port, clients) as generator:
            generator.connect()
            if (live := generator.stats()).counts["live"] < world.users:
                raise RuntimeError(f"{live.counts['live']} of {world.users} came in: {live.last_error}")
            saturation = 0.0
            for mode in ("flood", "at 70 %", f"paced {PACED_PER_S:.0f}/s"):
                if mode == "flood":
                    generator.flood(1)
                else:
                    generator.paced(0.7 * saturation if mode == "at 70 %" else PACED_PER_S)
                time.sleep(opts.size.warm_s)
                stats, used = window(server, generator, opts.size.seconds)
                acked = stats.counts["acked"]
                case = f"{rooms} rooms of {size}, {mode}" + (f", {workers} processes" if workers > 1 else "")
                figures = sample(stats, used, acked, latency="ack")
                figures["units_per_cpu_s"] = acked / max(used.cpu_ns, 1) * 1e9
                figures["delivery_p99_ms"] = stats.delivery.ms(0.99) or 0.0
                results.add(peer.name, case, "acknowledged message", figures)
                results.check_generator(peer.name, case, stats)
                saturation = saturation or max(1.0, acked / stats.seconds)
                counts = generator.drain().counts
                if counts["delivered"] != counts["expected"] or counts["acked"] != counts["sent"]:
                    results.note(
                        f"{case}, {peer.name}: of {counts['sent']} messages {counts['acked']} were acknowledged, of"
                        f" {counts['expected']} deliveries {counts['delivered']} arrived"
                    )
