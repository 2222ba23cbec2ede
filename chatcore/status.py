"""What the server tells about itself: read from the stats page, so nobody is asked."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from . import __version__
from .slot import Slot, Worker
from .stats import Health


def report(slots: Sequence[Slot], target: int, url: str, stopping: bool) -> dict[str, Any]:
    """The answer to ``ctl status``; a slot that waits for its next worker has no pid."""
    now = time.monotonic_ns()
    workers = []
    for slot in slots:
        if slot.current is None:
            workers.append(_nobody(slot))
        workers += [_worker(slot, worker, now) for worker in slot.workers()]
    ready = [slot.current for slot in slots if slot.current is not None and slot.current.ready_ns]
    return {
        "version": __version__,
        "url": url,
        "state": "stopping" if stopping else "serving",
        "store": _health(worker.cell.store_health for worker in ready),
        "bus": _health(worker.cell.bus_health for worker in ready),
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
    }


def _nobody(slot: Slot) -> dict[str, Any]:
    return {
        "slot": slot.index,
        "pid": None,
        "state": "waiting",
        "connections": 0,
        "uptime_s": 0.0,
        "error": slot.error or None,
    }


def _health(of_workers: Iterable[int]) -> str:
    """ "down" if any worker says so, "ok" if all say so, else "unknown" (a part not checked yet)."""
    said = list(of_workers)
    if Health.DOWN in said:
        return "down"
    return "ok" if said and all(one == Health.OK for one in said) else "unknown"
