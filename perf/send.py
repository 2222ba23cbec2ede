"""``send``: messages in many small rooms, until they are acknowledged.

Rooms of 10; all members send, so each message is stored once and delivered 10 times. *Flood*: each member has one
message under way, always. *At 70 %*: paced at 70 % of what this server reached so. *Paced*: the same 200 messages per
second for every server. In chatcore an acknowledged message is on disk; the peers relay and keep nothing, and where
they do not acknowledge, the sender's own copy counts.

chatcore is measured with two workers, too, and in 10,000 rooms instead of 100: of the same 1,000 members, each of whom
then sends in 100 rooms in turn. Paced at 10,000 messages per second, and in the flood, its windows are longer, so that
the store's index and checkpoints have their share in them.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from . import bench
from .bench import Options, window
from .load.generator import Client, Generator
from .peers.base import Peer, World
from .processes import Running
from .results import Results, sample

SIZE = 10
ROOMS = 100
MANY_ROOMS = 10_000
PACED_PER_S = 200.0
OFFERED_PER_S = 10_000.0
#: What the store does behind its commits comes once in some seconds.
LONG_S = 12.0
TINY_ROOMS, TINY_MANY, TINY_OFFERED_PER_S = 5, 20, 500.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One case of one server. ``groups`` of ``size`` members share the rooms."""

    peer: Peer
    workers: int
    rooms: int
    groups: int
    size: int
    offered_per_s: float

    @property
    def own(self) -> bool:
        """It is chatcore, which keeps what it acknowledges."""
        return self.peer.name == "chatcore"

    @property
    def name(self) -> str:
        """Without the mode; the number of processes is at its end."""
        return f"{self.rooms} rooms of {self.size}"


def main(argv: list[str]) -> dict[str, object]:
    """Run it; what ``--json`` writes."""
    p = bench.parser("send", __doc__)
    p.add_argument("--rooms", type=int)
    p.add_argument("--size", type=int, default=SIZE, help="members of each room")
    args = p.parse_args(argv)
    opts = bench.options("send", args)
    results = opts.results("send")
    rooms = args.rooms or (TINY_ROOMS if opts.tiny else ROOMS)
    offered = TINY_OFFERED_PER_S if opts.tiny else OFFERED_PER_S
    plans = [Plan(peer, opts.workers, rooms, rooms, args.size, offered) for peer in opts.peers]
    for plan in [plan for plan in plans if plan.own]:
        counts = (1, 2) if opts.workers == 1 and not opts.tiny else (opts.workers,)
        many = (rooms,) if args.rooms else (rooms, TINY_MANY if opts.tiny else MANY_ROOMS)
        plans += [
            Plan(plan.peer, workers, n, rooms, args.size, offered)
            for n in many
            for workers in counts
            if (workers, n) != (opts.workers, rooms)
        ]
    with bench.progress("send", opts.size.rounds * len(plans)) as step:
        for i in range(opts.size.rounds):
            for plan in plans:
                step(f"round {i + 1}, {plan.peer.name}, {plan.name}")
                with bench.survive(results, plan.peer):
                    run(plan, opts, results)
    return results.json()


def run(plan: Plan, opts: Options, results: Results) -> None:
    """One round of one server."""
    peer, size, groups = plan.peer, plan.size, plan.groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    world = World([members[r % groups] for r in range(plan.rooms)], groups * size)
    with Running(peer, plan.workers, world) as server:
        clients = []
        for user in range(world.users):
            rooms = list(range(user // size, plan.rooms, groups))
            random.Random(user).shuffle(rooms)
            clients.append(Client(peer.join(user, rooms), (), [peer.send(user, room) for room in rooms], size))
        with Generator(peer, server.port, clients) as generator:
            generator.connect()
            if (live := generator.stats()).counts["live"] < world.users:
                raise RuntimeError(f"{live.counts['live']} of {world.users} came in: {live.last_error}")
            long_s = LONG_S if plan.own and opts.size.name == "full" else opts.size.seconds
            rates = {f"paced {n:.0f}/s": n for n in ((PACED_PER_S, plan.offered_per_s) if plan.own else (PACED_PER_S,))}
            saturation = 0.0
            for mode in ("flood", "at 70 %", *rates):
                if mode == "flood":
                    generator.flood(1)
                else:
                    generator.paced(rates.get(mode) or 0.7 * saturation)
                time.sleep(opts.size.warm_s)
                long = mode == "flood" or rates.get(mode) == plan.offered_per_s
                stats, used = window(server, generator, long_s if long else opts.size.seconds)
                acked = stats.counts["acked"]
                case = f"{plan.name}, {mode}" + (f", {plan.workers} processes" if plan.workers > 1 else "")
                figures = sample(stats, used, acked, latency="ack")
                figures["units_per_cpu_s"] = acked / max(used.cpu_ns, 1) * 1e9
                figures["delivery_p99_ms"] = stats.delivery.ms(0.99) or 0.0
                if plan.own:
                    figures["write_bytes_per_unit"] = used.written / max(1, acked)
                results.add(peer.name, case, "acknowledged message", figures)
                results.check_generator(peer.name, case, stats)
                saturation = saturation or max(1.0, acked / stats.seconds)
                counts = generator.drain().counts
                if counts["delivered"] != counts["expected"] or counts["acked"] != counts["sent"]:
                    results.note(
                        f"{case}, {peer.name}: of {counts['sent']} messages {counts['acked']} were acknowledged, of"
                        f" {counts['expected']} deliveries {counts['delivered']} arrived"
                    )
