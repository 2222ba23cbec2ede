"""The goals of chatcore, and whether it reaches them: computed from the results of all benches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: The results of the benches, by name.
Measured = Mapping[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Goal:
    """One line: what, the limit, what was measured (None: not measured), and whether more is better."""

    what: str
    limit: float
    found: float | None
    unit: str = " times"
    at_least: bool = False

    @property
    def reached(self) -> bool:
        """Whether it is."""
        if self.found is None:
            return False
        return self.found >= self.limit if self.at_least else self.found <= self.limit


class Figures:
    """Access to the rows of one bench."""

    def __init__(self, measured: Measured, bench: str) -> None:
        self.rows: list[dict[str, Any]] = measured.get(bench, {}).get("rows", [])

    def get(self, server: str, case: str, metric: str) -> float | None:
        """One figure, of the first case that begins so."""
        for row in self.rows:
            if row["server"] == server and row["case"].startswith(case) and metric in row:
                value: float = row[metric]
                return value
        return None

    def best(self, case: str, metric: str, choose: Callable[[list[float]], float] = min) -> float | None:
        """The best figure of a peer."""
        found = [
            row[metric]
            for row in self.rows
            if row["case"] == case and metric in row and row["server"] not in ("chatcore", "floor")
        ]
        return choose(found) if found else None


def over(a: float | None, b: float | None) -> float | None:
    """a / b, where both are known."""
    return None if a is None or not b else a / b


def spread(values: list[float | None]) -> float | None:
    """By how much the largest is above the smallest (0: all the same)."""
    known = [value for value in values if value is not None]
    return max(known) / min(known) - 1 if len(known) > 1 else None


def goals(measured: Measured) -> list[Goal]:
    """All of them, in the order of the benches."""
    return [
        *_fanout(measured),
        *_idle_and_send(measured),
        *_sessions(measured),
        *_history(measured),
        *_store(measured),
        *_stored_sends(measured),
    ]


def _fanout(measured: Measured) -> list[Goal]:
    f = Figures(measured, "fanout")
    cpu = "cpu_us_per_unit"
    paced, flood = "1000 members, 128 B, paced 10 ms", "1000 members, 128 B, flood"
    part = "1000 members, 128 B, at 70 %"
    rooms = [f"{n} members, 128 B, flood" for n in (10, 100, 1000, 10_000)]
    beside = [flood, *(f"{flood}, {n} idle beside" for n in (5000, 15_000))]
    own = "chatcore"
    return [
        Goal("flood, CPU per delivery, to the best peer", 0.25, over(f.get(own, flood, cpu), f.best(flood, cpu))),
        Goal(
            "flood, deliveries per second, to the best peer",
            4.0,
            over(f.get(own, flood, "units_per_s"), f.best(flood, "units_per_s", max)),
            at_least=True,
        ),
        Goal("paced, CPU per delivery, to the best peer", 0.8, over(f.get(own, paced, cpu), f.best(paced, cpu))),
        Goal("paced, CPU per delivery, to the floor", 1.1, over(f.get(own, paced, cpu), f.get("floor", paced, cpu))),
        Goal("p99 at 70 %, to the best peer", 1.0, over(f.get(own, part, "p99_ms"), f.best(part, "p99_ms"))),
        Goal("10 to 10,000 members, CPU differs by", 0.15, spread([f.get(own, case, cpu) for case in rooms]), ""),
        Goal("0 to 15,000 idle beside, CPU differs by", 0.15, spread([f.get(own, case, cpu) for case in beside]), ""),
        *(
            Goal(
                f"two workers to one, {kind}, CPU per delivery",
                1.1,
                over(f.get(own, f"{case}, 2 processes", cpu), f.get(own, case, cpu)),
            )
            for kind, case in (("paced", paced), ("flood", flood))
        ),
    ]


def _idle_and_send(measured: Measured) -> list[Goal]:
    idle, send = Figures(measured, "idle"), Figures(measured, "send")
    case = next((row["case"] for row in send.rows if row["case"].endswith("flood")), "")
    per_cpu = "units_per_cpu_s"
    memory = {kind: _ending(idle, kind, "rss_bytes_per_conn") for kind in ("bare connections", "conversations")}
    return [
        Goal("memory of a bare connection", 512, memory["bare connections"], " B"),
        Goal("memory of a session in 10 conversations", 1536, memory["conversations"], " B"),
        Goal(
            "durable sends per CPU second, to the best relay that keeps nothing",
            1.0,
            over(send.get("chatcore", case, per_cpu), send.best(case, per_cpu, max)),
            at_least=True,
        ),
    ]


def _ending(f: Figures, end: str, metric: str) -> float | None:
    cases = [row["case"] for row in f.rows if row["case"].endswith(end)]
    return f.get("chatcore", cases[0], metric) if cases else None


def _sessions(measured: Measured) -> list[Goal]:
    storm, users = Figures(measured, "storm"), Figures(measured, "users")
    good = measured.get("users", {}).get("good_users", {})
    return [
        Goal("CPU of a resumed session", 150, _ending(storm, "nothing missed", "cpu_us_per_unit"), " µs"),
        Goal("p99 with 30,000 users", 200, users.get("chatcore", "30000 users", "p99_ms"), " ms"),
        Goal(
            "users at a p80 of 200 ms, to the Node.js app",
            20.0,
            over(good.get("chatcore"), good.get("socketio-app")),
            at_least=True,
        ),
    ]


def _history(measured: Measured) -> list[Goal]:
    f = Figures(measured, "history")
    found = []
    for level in ("L1", "store"):
        values = [
            f.get(f"chatcore, {level}", f"newest page in a worker, {n:,} entries", "p50_ms")
            for n in (1_000, 10_000, 100_000, 1_000_000)
        ]
        found.append(Goal(f"newest page from {level}, 10^3 to 10^6 entries, p50 differs by", 0.2, spread(values), ""))
    return found


def _store(measured: Measured) -> list[Goal]:
    """The store alone; where an older version was measured beside it, to that."""
    f = Figures(measured, "store")
    own = "chatcore"
    older = next((row["server"] for row in f.rows if row["server"] != own), "")
    small, large, huge = "10,000 entries", "1,000,000 entries", "10,000,000 entries"
    cpu, written, per_s = "cpu_us_per_unit", "write_bytes_per_unit", "units_per_s"
    flood, lonely = "batches of 64", "one message at a time"
    reads = ("newest page", "page in the middle", "resume after 100 missed")

    def beside(case: str, metric: str, was: str = "") -> float | None:
        return over(f.get(own, case, metric), f.get(older, was or case, metric))

    return [
        *(
            Goal(f"store, {flood}, {n}, bytes written per message", limit, f.get(own, f"{flood}, {n}", written), " B")
            for n, limit in ((large, 2000), (huge, 2500))
        ),
        *(
            Goal(f"store, {flood}, {n}, CPU of writer and indexer", 20, f.get(own, f"{flood}, {n}", cpu), " µs")
            for n in (large, huge)
        ),
        *(
            Goal(f"store, batches of {n}, {large}", limit, f.get(own, f"batches of {n}, {large}", per_s), "/s", True)
            for n, limit in ((64, 30_000), (500, 50_000))
        ),
        *(
            Goal(f"store, {lonely}, {name}, to the older version", 1.0, beside(f"{lonely}, {small}", metric))
            for name, metric in (("p50", "p50_ms"), ("CPU", cpu))
        ),
        *(
            Goal(
                f"store, {kind}, p99 with {n}, to the older version with {small}",
                limit,
                beside(f"{kind}, {n}", "p99_ms", f"{kind}, {small}"),
            )
            for n, limit in ((small, 1.2), (huge, 1.5))
            for kind in reads
        ),
        Goal(
            f"store, size of the files with {large}, to the older version",
            0.75,
            beside(f"size, {large}", "file_bytes_per_unit"),
        ),
    ]


def _stored_sends(measured: Measured) -> list[Goal]:
    """What storing costs the whole server."""
    f = Figures(measured, "send")
    own, cpu, offered, two = "chatcore", "cpu_us_per_unit", "paced 10000/s", ", 2 processes"
    few, many = "100 rooms of 10, ", "10000 rooms of 10, "
    return [
        Goal(
            "10,000 rooms to 100, flood, CPU per durable send",
            1.2,
            over(f.get(own, f"{many}flood", cpu), f.get(own, f"{few}flood", cpu)),
        ),
        *(
            Goal(
                f"two workers to one, {mode}, CPU per durable send",
                1.1,
                over(f.get(own, f"{few}{mode}{two}", cpu), f.get(own, f"{few}{mode}", cpu)),
            )
            for mode in ("flood", offered)
        ),
        Goal(
            "two workers to one, 10,000/s offered, durable sends per second",
            0.99,  # both reach what is offered, within its jitter
            over(f.get(own, f"{few}{offered}{two}", "units_per_s"), f.get(own, f"{few}{offered}", "units_per_s")),
            at_least=True,
        ),
        *(
            Goal(
                f"p99 of `ok` at 10,000/s, {rooms} rooms, {workers}",
                15,
                f.get(own, f"{case}{offered}{end}", "p99_ms"),
                " ms",
            )
            for rooms, case in (("100", few), ("10,000", many))
            for workers, end in (("one worker", ""), ("two workers", two))
        ),
        Goal(
            "10,000 rooms, two workers, flood, bytes written per durable send",
            3000,
            f.get(own, f"{many}flood{two}", "write_bytes_per_unit"),
            " B",
        ),
    ]
