"""The results of a bench: samples of interleaved rounds, made into rows with medians, ranges and ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from .load.generator import Stats
from .machine import machine
from .peers.base import Peer
from .processes import Usage

#: Metrics in the order of tables: key, heading, decimals.
METRICS: tuple[tuple[str, str, int], ...] = (
    ("units_per_s", "per s", 0),
    ("cpu_us_per_unit", "CPU µs", 2),
    ("cpu_user_us_per_unit", "user", 2),
    ("cpu_kernel_us_per_unit", "kernel", 2),
    ("services_cpu_us_per_unit", "its services", 2),
    ("indexer_us_per_unit", "of the indexer", 2),
    ("workers_us_per_unit", "workers", 2),
    ("follow_us_per_unit", "following", 2),
    ("write_bytes_per_unit", "bytes written", 0),
    ("file_bytes_per_unit", "file bytes", 0),
    ("units_per_cpu_s", "per CPU s", 0),
    ("p50_ms", "p50 ms", 2),
    ("p80_ms", "p80 ms", 2),
    ("p99_ms", "p99 ms", 2),
    ("p999_ms", "p99.9 ms", 2),
    ("max_ms", "max ms", 1),
    ("cut_cpu_us_per_unit", "of the cut", 2),
    ("delivery_p99_ms", "delivered p99", 2),
    ("seconds", "s", 2),
    ("cpu_cores", "cores", 2),
    ("rss_mib", "RSS MiB", 0),
    ("rss_bytes_per_conn", "bytes/conn", 0),
    ("errors", "errors", 0),
    ("asleep", "asleep", 2),
)
RATIO_OF = "cpu_us_per_unit"

Sample = dict[str, float]


def sample(stats: Stats, used: Usage, units: int, *, latency: str = "delivery") -> Sample:
    """The figures of one window in which ``units`` were done."""
    cpu_us = used.cpu_ns / 1000 / max(1, units)
    histogram = getattr(stats, latency)
    found: dict[str, float | None] = {
        "units_per_s": units / stats.seconds,
        "cpu_us_per_unit": cpu_us,
        "cpu_user_us_per_unit": cpu_us * (1 - used.kernel_share),
        "cpu_kernel_us_per_unit": cpu_us * used.kernel_share,
        "p50_ms": histogram.ms(0.5),
        "p80_ms": histogram.ms(0.8),
        "p99_ms": histogram.ms(0.99),
        "p999_ms": histogram.ms(0.999),
        "errors": stats.counts["errors"] + stats.counts["closed"] + stats.counts["failed"],
        "asleep": stats.asleep,
    }
    if used.services_cpu_ns:
        found["services_cpu_us_per_unit"] = used.services_cpu_ns / 1000 / max(1, units)
    return {key: value for key, value in found.items() if value is not None}


class Results:
    """Samples by server and case, in the order in which they first came."""

    def __init__(self, bench: str, peers: Sequence[Peer], *, ratio_of: str = RATIO_OF) -> None:
        self.bench = bench
        self.peers = peers
        self.ratio_of = ratio_of
        self.notes: list[str] = []
        self._limits: dict[tuple[str, str], list[str]] = {}
        self._samples: dict[tuple[str, str], list[Sample]] = {}
        self._units: dict[str, str] = {}

    def add(self, server: str, case: str, unit: str, figures: Mapping[str, float]) -> None:
        """One round's figures."""
        self._units[case] = unit
        self._samples.setdefault((server, case), []).append(dict(figures))

    def note(self, text: str) -> None:
        """Something to be read with the figures (once)."""
        if text not in self.notes:
            self.notes.append(text)

    def check_generator(self, server: str, case: str, stats: Stats) -> None:
        """Note it if the load generator was the limit."""
        if (why := stats.limit()) is not None:
            self._limits.setdefault((server, case), []).append(why)

    def best(self, case: str) -> float | None:
        """The least that a peer (other than chatcore and the floor) needed."""
        others = {peer.name for peer in self.peers if peer.name != "chatcore" and not peer.floor}
        figures = [
            median(s[self.ratio_of] for s in samples)
            for (server, c), samples in self._samples.items()
            if c == case and server in others and all(self.ratio_of in s for s in samples)
        ]
        return min(figures) if figures else None

    def rows(self) -> list[dict[str, Any]]:
        """One row for each server and case, by case."""
        cases = list(self._units)
        ordered = sorted(self._samples.items(), key=lambda item: cases.index(item[0][1]))
        return [self._row(server, case, samples) for (server, case), samples in ordered]

    def _row(self, server: str, case: str, samples: list[Sample]) -> dict[str, Any]:
        row: dict[str, Any] = {"server": server, "case": case, "unit": self._units[case], "rounds": len(samples)}
        ranges: dict[str, list[float]] = {}
        for key, _, decimals in METRICS:
            values = [s[key] for s in samples if key in s]
            if values:
                row[key] = round(median(values), decimals + 2)
                ranges[key] = [round(min(values), decimals + 2), round(max(values), decimals + 2)]
        best = self.best(case)
        if best and self.ratio_of in row:
            row["ratio_to_best_peer"] = round(row[self.ratio_of] / best, 3)
        row["range"] = ranges
        return row

    def _limited(self) -> list[str]:
        return [
            f"{case}, {server}: {whys[-1]}, in {len(whys)} of {len(self._samples.get((server, case), whys))} rounds"
            for (server, case), whys in self._limits.items()
        ]

    def json(self) -> dict[str, Any]:
        """The object that ``--json`` writes."""
        settings = {peer.name: peer.settings() for peer in self.peers if peer.settings()}
        return {
            "bench": self.bench,
            "machine": machine(),
            "versions": {peer.name: peer.versions() for peer in self.peers},
            "about": {peer.name: peer.about for peer in self.peers},
            "settings": settings,
            "notes": self.notes + self._limited(),
            "rows": self.rows(),
        }
