"""``users``: how many people a server bears, step by step.

Users are in conversations of 20; each sends one message in 10 s, at random; 10 % lose their connection each minute
and come back at once (with a whole log-in). The response time is from the moment at which a message was due to its
acknowledgement: in chatcore it is on disk then. A step breaks if p80 is over 10 s or over 5 % of the messages are
answered with an error or not at all; that ends the ladder of this server.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from . import bench
from .bench import Options, StepTold
from .load.generator import Client, Generator, Stats
from .peers.base import Peer, World
from .processes import Running, Usage
from .results import Results, sample

LADDER = (150, 500, 1000, 2000, 3000, 5000, 10_000, 20_000, 30_000)
#: Up to how many users a server is started anew, with so many in its store: a database that looks through everything
#: is not asked to look through more than the step has.
WORLDS = (1000, 5000, 30_000)
ROOM = 20
INTERVAL_S = 10.0
CHURN_PER_S = 0.10 / 60
BROKEN_P80_MS = 10_000.0
BROKEN_ERRORS = 0.05
#: After a step: so long is an answer waited for, before it counts as an error.
PATIENCE_S = 12.0
#: The users of the next step have so long to get in, and 10 ms each.
CONNECT_S = 30.0
#: A response time that is good enough.
GOOD_P80_MS = 200.0


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps, and how long each is measured."""

    ladder: tuple[int, ...]
    seconds: float
    interval_s: float = INTERVAL_S


def plan(opts: Options, seconds: float | None) -> Plan:
    """The steps to run: each is one interval long, so that every user has sent once."""
    if opts.tiny:
        return Plan((40, 60), 0.5, 0.5)
    if opts.size.name == "quick":
        return Plan(LADDER[:7], seconds or 5.0)
    return Plan(LADDER, seconds or INTERVAL_S)


def main(argv: list[str]) -> dict[str, object]:
    """Run it; what ``--json`` writes."""
    p = bench.parser("users", __doc__)
    p.add_argument("--max-users", type=int)
    # Everything that the machine has, and one round: a ladder takes minutes.
    p.set_defaults(workers=len(os.sched_getaffinity(0)), rounds=1)
    args = p.parse_args(argv)
    opts = bench.options("users", args)
    wanted = plan(opts, args.seconds)
    if args.max_users:
        wanted = Plan(tuple(n for n in wanted.ladder if n <= args.max_users), wanted.seconds, wanted.interval_s)
    results = opts.results("users")
    with bench.progress("users", opts.size.rounds * len(opts.peers) * len(wanted.ladder)) as step:
        for _ in range(opts.size.rounds):
            for peer in opts.peers:
                with bench.survive(results, peer):
                    climb(peer, opts, wanted, results, step)
    good = good_enough(results)
    for name, (users, beyond) in good.items():
        results.note(f"{name}: p80 is {GOOD_P80_MS:.0f} ms at {'more than' if beyond else 'about'} {users:.0f} users")
    return {**results.json(), "good_users": {name: users for name, (users, _) in good.items()}}


def climb(peer: Peer, opts: Options, wanted: Plan, results: Results, step: StepTold) -> None:
    """One server's ladder."""
    below = 0
    for n in WORLDS:
        steps = [users for users in wanted.ladder if below < users <= n]
        if steps and not climb_in(peer, max(steps), steps, opts, wanted, results, step):
            return
        below = n


def climb_in(
    peer: Peer, n: int, steps: Sequence[int], opts: Options, wanted: Plan, results: Results, step: StepTold
) -> bool:
    """Some steps of it, with `n` users in its store; whether it can go on."""
    rooms = [list(range(first, min(n, first + ROOM))) for first in range(0, n, ROOM)]
    with Running(peer, opts.workers, World(rooms, n)) as server:
        clients = []
        for user in range(n):
            room = user // ROOM
            join = peer.join(user, [room])
            clients.append(Client(join, join, peer.send(user, room), len(rooms[room])))
        with Generator(peer, server.port, clients, processes=2 if n > 5000 else 1) as generator:
            generator.retry(1.0)
            live = 0
            for users in steps:
                step(f"{peer.name}, {users} users")
                generator.churn(0)
                try:
                    generator.connect(live, users - live, timeout_s=CONNECT_S + users / 100)
                except TimeoutError:
                    results.note(f"{peer.name} broke: {users} users did not get in")
                    never = dict.fromkeys(("p50_ms", "p80_ms", "p99_ms"), PATIENCE_S * 1000)
                    results.add(peer.name, f"{users} users", "message", never | {"errors": users - live})
                    return False
                live = users
                generator.churn(users * CHURN_PER_S)
                if measure(peer, server, generator, wanted, users, results):
                    results.note(f"{peer.name} broke at {users} users")
                    return False
    return True


def measure(peer: Peer, server: Running, generator: Generator, wanted: Plan, users: int, results: Results) -> bool:
    """One step; whether it broke."""
    generator.reset()
    before = server.usage()
    generator.random(wanted.interval_s)
    time.sleep(wanted.seconds)
    now = server.usage()
    used = now.since(before)
    sending = generator.stats()
    generator.idle()
    stats = answered(generator)
    case = f"{users} users"
    figures = sample(sending, used, sending.counts["acked"])
    for key, share in (("p50_ms", 0.5), ("p80_ms", 0.8), ("p99_ms", 0.99), ("p999_ms", 0.999)):
        value = stats.ack.ms(share)
        # A user who was never answered waited for longer than any other.
        due = stats.counts["sent"] - stats.counts["abandoned"]
        figures[key] = PATIENCE_S * 1000 if value is None or stats.ack.n < share * due else value
    figures["delivery_p99_ms"] = stats.delivery.ms(0.99) or 0.0
    lost = max(0, stats.counts["sent"] - stats.counts["acked"] - stats.counts["abandoned"])
    figures["errors"] = lost + stats.counts["closed"] + stats.counts["failed"]
    figures |= memory(now) | {"cpu_cores": used.cpu_ns / 1e9 / wanted.seconds}
    results.add(peer.name, case, "message", figures)
    results.check_generator(peer.name, case, sending)
    if figures["errors"]:
        results.note(f"{case}, {peer.name}: {figures['errors']:.0f} errors, such as: {stats.last_error or 'no answer'}")
    return figures["p80_ms"] >= BROKEN_P80_MS or figures["errors"] > BROKEN_ERRORS * stats.counts["sent"]


def memory(used: Usage) -> dict[str, float]:
    """The memory that all its processes hold."""
    return {"rss_mib": used.rss_bytes / 2**20}


def answered(generator: Generator) -> Stats:
    """The window's counts, when everything is answered or patience has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        stats = generator.stats()
        if stats.counts["acked"] + stats.counts["abandoned"] >= stats.counts["sent"] or time.monotonic() > deadline:
            return stats
        time.sleep(0.05)


def good_enough(results: Results) -> dict[str, tuple[float, bool]]:
    """For each server: up to how many users its p80 is good, between the steps of the ladder on a straight line (True:
    the ladder ended before)."""
    found: dict[str, tuple[float, bool]] = {}
    for peer in results.peers:
        users, before = 0.0, 0.0
        beyond = True
        for row in results.rows():
            if row["server"] != peer.name or not beyond:
                continue
            step, p80 = int(row["case"].split()[0]), row["p80_ms"]
            if p80 > GOOD_P80_MS:
                users += (step - users) * (GOOD_P80_MS - before) / (p80 - before)
                beyond = False
            else:
                users, before = float(step), p80
        found[peer.name] = (users, beyond)
    return found
