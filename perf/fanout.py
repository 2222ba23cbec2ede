"""``fanout``: what one delivery costs in one room, from 10 members to 10,000.

Each case is one room; some of its members send. *Paced*: one message each 10 ms (200 ms in a room of 10,000), so
that there is nothing to merge. *Flood*: as many as the server takes, 64 messages under way. *At 70 %*: paced at 70 %
of what this server reached in the flood. Every member gets every message, in chatcore after it is on disk; the peers
relay and keep nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import bench
from .bench import Options, StepTold, window
from .load.generator import Client, Generator
from .peers.base import Peer, World
from .processes import Running
from .results import Results, sample

SENDERS = 16
WINDOW = 4  # messages that each of them has under way in a flood
PACED_PER_S = 100.0
PACED_PER_S_HUGE = 5.0
HUGE = 5000  # members from which on
MODES = ("paced", "flood")


@dataclass(frozen=True, slots=True)
class Group:
    """One room and what is measured in it; ``idle``: connections beside it that do nothing."""

    members: int
    bodies: tuple[int, ...] = (128,)
    modes: tuple[str, ...] = MODES
    idle: int = 0


def groups(opts: Options, peer: Peer) -> list[Group]:
    """The rooms that are measured with this server."""
    if opts.tiny:
        return [Group(10, (128, 1024)), Group(50, idle=20)]
    full = opts.size.name == "full"
    found = [Group(10), Group(100), Group(1000, (128, 1024), (*MODES, "at 70 %")), Group(10_000)]
    if not full:
        found = [Group(100), Group(1000, modes=(*MODES, "at 70 %"))]
    if peer.name == "chatcore" and full:
        found += [Group(1000, idle=5000), Group(1000, idle=15_000)]
    return found


def main(argv: list[str]) -> dict[str, object]:
    """Run it; what ``--json`` writes."""
    p = bench.parser("fanout", __doc__)
    p.add_argument("--members", type=int, help="only a room of this size")
    p.add_argument("--body", type=int, default=128, help="with --members: bytes of a message")
    args = p.parse_args(argv)
    opts = bench.options("fanout", args)
    results = opts.results("fanout")
    results.note("receivers are asleep between messages in paced cases; `asleep` says how much of the time")
    own = [Group(args.members, (args.body,))] if args.members else None
    plans = [(peer, opts.workers, own or groups(opts, peer)) for peer in opts.peers]
    # Two processes against one, each in a server of its own.
    if not args.members and opts.workers == 1:
        plans += [(peer, 2, [Group(50 if opts.tiny else 1000)]) for peer in opts.peers if peer.name == "chatcore"]
    with bench.progress("fanout", opts.size.rounds * sum(len(plan[2]) for plan in plans)) as step:
        for i in range(opts.size.rounds):

            def started(what: str, n: int = i) -> None:
                step(f"round {n + 1}, {what}")

            for peer, workers, wanted in plans:
                with bench.survive(results, peer):
                    run(peer, workers, wanted, opts, results, started)
    return results.json()


def run(peer: Peer, workers: int, wanted: Sequence[Group], opts: Options, results: Results, step: StepTold) -> None:
    """One round of one server."""
    first, rooms = 0, []
    for group in wanted:
        rooms.append(list(range(first, first + group.members)))
        first += group.members
    idle = max(group.idle for group in wanted)
    rooms += [[user] for user in range(first, first + idle)]  # a room for each, so that they hear nothing
    with Running(peer, workers, World(rooms, first + idle)) as server:
        beside = 0
        with Generator(peer, server.port, list(_idle(peer, first, idle, len(wanted))), net=30) as others:
            for i, group in enumerate(wanted):
                step(f"{peer.name}, {group.members} members")
                if group.idle > beside:
                    others.connect(beside, group.idle - beside)
                    beside = group.idle
                measure(peer, workers, server, group, i, rooms[i], opts, results)


def _idle(peer: Peer, first: int, n: int, room: int) -> Iterator[Client]:
    for i in range(n):
        yield Client(peer.join(first + i, [room + i]))


def measure(
    peer: Peer,
    workers: int,
    server: Running,
    group: Group,
    room: int,
    users: Sequence[int],
    opts: Options,
    results: Results,
) -> None:
    """All cases of one room."""
    clients = [
        Client(peer.join(user, [room]), (), peer.send(user, room) if i < SENDERS else None, group.members)
        for i, user in enumerate(users)
    ]
    with Generator(peer, server.port, clients) as generator:
        generator.connect()
        live = generator.stats()
        if live.counts["live"] < group.members:
            raise RuntimeError(f"{live.counts['live']} of {group.members} members came in: {live.last_error}")
        saturation = 0.0
        for body in group.bodies:
            generator.body(body)
            for mode in group.modes:
                case = name(group, body, mode, workers)
                if mode == "flood":
                    generator.flood(WINDOW)
                elif mode == "paced":
                    generator.paced(PACED_PER_S if group.members < HUGE else PACED_PER_S_HUGE)
                elif body == group.bodies[0] and saturation:
                    generator.paced(0.7 * saturation / group.members)
                else:
                    continue
                time.sleep(opts.size.warm_s)
                stats, used = window(server, generator, opts.size.seconds)
                delivered = stats.counts["delivered"]
                results.add(peer.name, case, "delivery", sample(stats, used, delivered))
                results.check_generator(peer.name, case, stats)
                if mode == "flood" and not saturation:
                    saturation = delivered / stats.seconds
                verify(peer, case, generator, results)


def verify(peer: Peer, case: str, generator: Generator, results: Results) -> None:
    """Every member has got every message."""
    counts = generator.drain().counts
    if counts["delivered"] != counts["expected"]:
        results.note(
            f"{case}, {peer.name}: {counts['delivered']} of {counts['expected']} deliveries arrived until then"
        )


def name(group: Group, body: int, mode: str, workers: int) -> str:
    """The case, in words."""
    text = f"{group.members} members, {body} B, {mode}"
    if mode == "paced":
        text += f" {1000 / (PACED_PER_S if group.members < HUGE else PACED_PER_S_HUGE):.0f} ms"
    if group.idle:
        text += f", {group.idle} idle beside"
    return text + (f", {workers} processes" if workers > 1 else "")
