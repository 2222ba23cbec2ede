"""What the server tells about itself: read from the stats page, so nobody is asked."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

from .. import __version__
from .stats import Health
from .worker_slot import Slot, Worker

#: Whose health is told, in this order.
PARTS: Final = ("store", "bus", "cache", "queue")
#: What a worker's cache counts for each kind of read: reads answered by level 1, by level 2, by the store, and values
#: read again ahead of need.
CACHE_COUNTERS: Final = ("l1", "l2", "missed", "refreshed")


def report(slots: Sequence[Slot], target: int, url: str, stopping: bool) -> dict[str, Any]:
    """The answer to ``ctl status``; a slot that waits for its next worker has no pid."""
    now = time.monotonic_ns()
    workers = []
    for slot in slots:
        if slot.current is None:
            workers.append(_nobody(slot))
        workers += [_worker(slot, worker, now) for worker in slot.workers()]
    ready = [slot.current for slot in slots if slot.current is not None and slot.current.ready_ns]
    told = [worker["figures"] for worker in workers if worker.get("figures")]
    return {
        "version": __version__,
        "url": url,
        "state": "stopping" if stopping else "serving",
        "store": _health(worker.cell.store_health for worker in ready),
        "bus": _health(worker.cell.bus_health for worker in ready),
        "cache": _health(worker.cell.cache_health for worker in ready),
        "queue": _health(worker.cell.queue_health for worker in ready),
        "reads": _reads(told),
        "target": target,
        "workers": workers,
    }


def _worker(slot: Slot, worker: Worker, now: int) -> dict[str, Any]:
    cell = worker.cell
    return {
        "slot": slot.index,
        "pid": worker.pid,
        "state": worker.state(),
        "connections": cell.connections,
        "uptime_s": round((now - cell.started_ns) / 1e9, 1),
        "nonce": worker.nonce,
        "heartbeat_age_ms": (now - worker.heard_ns()) // 1_000_000 if worker.ready_ns else None,
        "loop_lag_max_ms": round(cell.loop_lag_max_ns / 1e6, 1),
        "websockets": cell.websockets,
        "sessions": cell.sessions,
        "attached": cell.attached,
        "messages_in": cell.messages_in,
        "entries_appended": cell.entries_appended,
        "deliveries": cell.deliveries,
        "error": slot.error or None,
        "figures": cell.figures,
    }


def _nobody(slot: Slot) -> dict[str, Any]:
    return {
        "slot": slot.index,
        "pid": None,
        "state": "waiting",
        "connections": 0,
        "uptime_s": 0.0,
        "error": slot.error or None,
        "figures": None,
    }


def _health(of_workers: Iterable[int]) -> str:
    """ "down" if any worker says so, "ok" if all say so, "none" if none has it, else "unknown" (not checked yet)."""
    said = list(of_workers)
    if Health.DOWN in said:
        return "down"
    for same in (Health.OK, Health.NONE):
        if said and all(one == same for one in said):
            return same.name.lower()
    return "unknown"


def _reads(told: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Reads that the cache answered, by kind, of all workers together: by level 1, level 2, or not at all."""
    kinds: dict[str, dict[str, Any]] = {}
    for figures in told:
        for kind, counters in figures.get("cache", {}).get("kinds", {}).items():
            total = kinds.setdefault(kind, dict.fromkeys(CACHE_COUNTERS, 0))
            for name in CACHE_COUNTERS:
                total[name] += counters[name]
    for total in kinds.values():
        hits = total["l1"] + total["l2"]
        total["ratio"] = round(hits / (hits + total["missed"]), 4) if hits + total["missed"] else 1.0
    return kinds


def summary(status: dict[str, Any]) -> list[str]:
    """What :func:`report` says, in lines for people, but for the workers."""
    parts = [f"{part} {status[part]}" for part in PARTS if status[part] != "none"]
    lines = [f"chatcore {status['version']} {status['state']} on {status['url']}", ", ".join(parts)]
    figures = [worker["figures"] for worker in status["workers"] if worker["figures"]]
    read = [
        f"{kind.replace('_', ' ')} {100 * counts['ratio']:.1f} % of {counts['l1'] + counts['l2'] + counts['missed']}"
        for kind, counts in status["reads"].items()
        if counts["l1"] + counts["l2"] + counts["missed"]
    ]
    if read:
        lines.append("reads from the cache: " + ", ".join(read))
    pools = [one["store"] for one in figures if "pool" in one.get("store", {})]
    if pools:
        busy, made, most = (sum(one["pool"][what] for one in pools) for what in ("busy", "connections", "max"))
        commands = sum(sum(one["commands"].values()) for one in pools)
        each_ms = sum(one["commands_ms"] for one in pools) / max(1, commands)
        lines.append(
            f"store: {busy} of {made} connections busy (at most {most}), {commands} commands of {each_ms:.1f} ms,"
            f" {sum(one['commands_failed'] for one in pools)} failed; {sum(one['queue']['waiting'] for one in pools)}"
            f" wait for a connection, {sum(one['queue']['given_up'] for one in pools)} gave up"
        )
    opened: dict[str, str] = {}
    for one in figures:
        for part, breaker in one.get("breakers", {}).items():
            if breaker["state"] != "closed":
                opened[part] = breaker["state"].replace("_", " ")
    if opened:
        lines.append("not asked for now: " + ", ".join(f"{part} (breaker {state})" for part, state in opened.items()))
    return lines
