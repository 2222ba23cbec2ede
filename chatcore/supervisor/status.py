"""The answer to ``chatcore ctl status``: read from the stats page, without asking a worker."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

from .. import __version__
from .stats import PartHealth
from .store_processes import StoreProcesses
from .worker_slot import WorkerProcess, WorkerSlot

#: The parts whose health is shown, in this order.
PARTS: Final = ("store", "bus", "cache", "queue")
#: What a worker's cache counts for each kind of read: reads answered by level 1, by level 2, by the store, and values
#: read again ahead of need.
CACHE_COUNTERS: Final = ("l1", "l2", "missed", "refreshed")


def report(slots: Sequence[WorkerSlot], store: StoreProcesses, target: int, url: str, stopping: bool) -> dict[str, Any]:
    """The answer to ``ctl status``, for JSON. A slot without a worker is listed with pid None."""
    now = time.monotonic_ns()
    workers = []
    for slot in slots:
        if slot.current is None:
            workers.append(_vacant(slot))
        workers += [_worker(slot, worker, now) for worker in slot.workers()]
    ready = [slot.current for slot in slots if slot.current is not None and slot.current.ready_ns]
    return {
        "version": __version__,
        "url": url,
        "state": "stopping" if stopping else "serving",
        "store": _health(worker.cell.store_health for worker in ready),
        "bus": _health(worker.cell.bus_health for worker in ready),
        "cache": _health(worker.cell.cache_health for worker in ready),
        "queue": _health(worker.cell.queue_health for worker in ready),
        "reads": _cache_reads(worker["metrics"] for worker in workers if worker["metrics"]),
        "target": target,
        "workers": workers,
        "store_processes": store.report(now),
    }


def _worker(slot: WorkerSlot, worker: WorkerProcess, now: int) -> dict[str, Any]:
    cell = worker.cell
    return {
        "slot": slot.index,
        "pid": worker.pid,
        "state": worker.state(),
        "connections": cell.connections,
        "uptime_s": round((now - cell.started_ns) / 1e9, 1),
        "nonce": worker.nonce,
        "heartbeat_age_ms": (now - worker.last_tick_ns()) // 1_000_000 if worker.ready_ns else None,
        "loop_lag_max_ms": round(cell.loop_lag_max_ns / 1e6, 1),
        "websockets": cell.websockets,
        "sessions": cell.sessions,
        "attached": cell.attached,
        "messages_in": cell.messages_in,
        "entries_appended": cell.entries_appended,
        "deliveries": cell.deliveries,
        "error": slot.error or None,
        "metrics": cell.metrics,
    }


def _vacant(slot: WorkerSlot) -> dict[str, Any]:
    return {
        "slot": slot.index,
        "pid": None,
        "state": "waiting",
        "connections": 0,
        "uptime_s": 0.0,
        "error": slot.error or None,
        "metrics": None,
    }


def _health(of_workers: Iterable[int]) -> str:
    """ "down" if one worker reports it, "ok" if all do, "none" if no worker has the part, else "unknown" (not
    checked yet)."""
    reported = list(of_workers)
    if PartHealth.DOWN in reported:
        return "down"
    for same in (PartHealth.OK, PartHealth.NONE):
        if reported and all(one == same for one in reported):
            return same.name.lower()
    return "unknown"


def _cache_reads(metrics: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The cache counters of all workers added up, by kind of read, with the ratio that did not need the store."""
    kinds: dict[str, dict[str, Any]] = {}
    for one in metrics:
        for kind, counters in one.get("cache", {}).get("kinds", {}).items():
            total = kinds.setdefault(kind, dict.fromkeys(CACHE_COUNTERS, 0))
            for name in CACHE_COUNTERS:
                total[name] += counters[name]
    for total in kinds.values():
        hits = total["l1"] + total["l2"]
        total["ratio"] = round(hits / (hits + total["missed"]), 4) if hits + total["missed"] else 1.0
    return kinds


def summary(status: dict[str, Any]) -> list[str]:
    """The lines above the table of workers that ``ctl status`` prints for an answer of :func:`report`."""
    parts = [f"{part} {status[part]}" for part in PARTS if status[part] != "none"]
    lines = [f"chatcore {status['version']} {status['state']} on {status['url']}", ", ".join(parts)]
    for process in status["store_processes"]:
        shown = f"{process['name']} {process['state']}"
        if process["pid"]:
            shown += f", process {process['pid']}, heartbeat {process['heartbeat_age_ms']} ms ago"
        shown += f", {process['restarts']} restarts"
        lines.append(shown + (f", the last one after: {process['error']}" if process["error"] else ""))
    metrics = [worker["metrics"] for worker in status["workers"] if worker["metrics"]]
    hit_ratios = [
        f"{kind.replace('_', ' ')} {100 * counts['ratio']:.1f} % of {counts['l1'] + counts['l2'] + counts['missed']}"
        for kind, counts in status["reads"].items()
        if counts["l1"] + counts["l2"] + counts["missed"]
    ]
    if hit_ratios:
        lines.append("reads from the cache: " + ", ".join(hit_ratios))
    pools = [one["store"] for one in metrics if "pool" in one.get("store", {})]
    if pools:
        busy, open_now, limit = (sum(one["pool"][what] for one in pools) for what in ("busy", "connections", "max"))
        commands = sum(sum(one["commands"].values()) for one in pools)
        each_ms = sum(one["commands_ms"] for one in pools) / max(1, commands)
        lines.append(
            f"store: {busy} of {open_now} connections busy (at most {limit}), {commands} commands of {each_ms:.1f} ms,"
            f" {sum(one['commands_failed'] for one in pools)} failed; {sum(one['queue']['waiting'] for one in pools)}"
            f" wait for a connection, {sum(one['queue']['given_up'] for one in pools)} gave up"
        )
    opened: dict[str, str] = {}
    for one in metrics:
        for part, breaker in one.get("breakers", {}).items():
            if breaker["state"] != "closed":
                opened[part] = breaker["state"].replace("_", " ")
    if opened:
        lines.append("not asked for now: " + ", ".join(f"{part} (breaker {state})" for part, state in opened.items()))
    return lines
