"""One worker slot: a listener, the worker that serves it, and during a replacement the worker after or before it."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from ..settings import Timeouts
from .stats import CELLS_PER_SLOT, StatsCell, WorkerState

MS: Final = 1_000_000  # nanoseconds

#: A worker that dies sooner than this after it got ready counts as an early exit: each one in a row makes the pause
#: before the next start longer.
EARLY_EXIT_NS: Final = 3_000 * MS
#: The pause after the first early exit; it doubles with each further one in a row.
BACKOFF_NS: Final = 100 * MS
#: Longest pause after workers that did get ready: they served for a moment, and clients wait in the slot's queue.
BACKOFF_READY_MAX_NS: Final = 1_000 * MS
#: Longest pause after workers that never got ready; each try costs a whole start.
BACKOFF_START_MAX_NS: Final = 10_000 * MS


@dataclass(slots=True)
class WorkerProcess:
    """One worker process, as the supervisor sees it. Times are CLOCK_MONOTONIC nanoseconds; 0 means not yet."""

    pid: int
    nonce: int
    cell_index: int  # which cell of the slot's pair it writes to
    cell: StatsCell
    forked_ns: int
    ready_ns: int = 0
    kill_ns: int = 0  # set when it is asked to drain: the time at which it is killed
    kill_reason: str = ""  # why the supervisor killed it
    excused_ns: int = 0  # the age of its heartbeat counts from here if the heartbeat is older
    held_ns: int = 0  # when it was last seen held by what excuses it, such as a debugger

    def starting(self) -> bool:
        return self.ready_ns == 0 and self.kill_ns == 0

    def last_tick_ns(self) -> int:
        """When its loop last ticked, it got ready, or it was last excused."""
        return max(self.cell.heartbeat_ns, self.ready_ns, self.excused_ns)

    def state(self) -> str:
        """The state to display: the one in its cell, but "draining" as soon as it was asked to drain."""
        if self.kill_ns:
            return "draining"
        return WorkerState(min(self.cell.state, WorkerState.STOPPED)).name.lower()

    def excuse(self, now: int, ns: int) -> None:
        """Extend its deadlines by `ns`: the supervisor, and probably the whole machine, did not run for that long."""
        self.excused_ns = now
        self.forked_ns += ns
        if self.kill_ns:
            self.kill_ns += ns

    def send(self, number: signal.Signals) -> None:
        """Send a signal. The pid stays reserved until the worker is reaped, so it cannot name another process."""
        os.kill(self.pid, number)

    def drain(self, kill_ns: int) -> None:
        """Ask it to drain, and kill it at `kill_ns`. Asking again changes nothing."""
        if not self.kill_ns:
            self.kill_ns = kill_ns
            self.send(signal.SIGTERM)

    def kill(self, reason: str) -> None:
        if not self.kill_reason:
            self.kill_reason = reason
            self.send(signal.SIGKILL)

    def reap(self) -> int | None:
        """Its exit code (negative: the signal that killed it) once it is dead, None before."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def overdue(self, now: int, timeouts: Timeouts) -> str:
        """The reason to kill it now; empty if there is none."""
        if self.kill_ns and now >= self.kill_ns:
            return "it had not drained at the deadline"
        if self.starting() and now - self.forked_ns > timeouts.worker_start_ms * MS:
            return f"it was not ready after {timeouts.worker_start_ms} ms"
        return self.stuck(now, timeouts.stuck_worker_ms)

    def stuck(self, now: int, limit_ms: int) -> str:
        """The reason to kill it if it got ready, has not ticked for `limit_ms`, and has no excuse."""
        # A debugger or profiler stops a worker on purpose: once released, the worker gets the whole limit again to
        # tick. The check starts at half the limit, since the debugger may release the worker at any moment. A worker
        # stopped by SIGSTOP is not excused: clients wait in its queue.
        limit_ns = limit_ms * MS
        if self.ready_ns and now - self.last_tick_ns() > limit_ns // 2:
            if self.held():
                self.held_ns = now
            elif now - max(self.last_tick_ns(), self.held_ns) > limit_ns:
                return f"its loop has not ticked for {limit_ms} ms"
        return ""

    def held(self) -> bool:
        """Whether a debugger or profiler holds it."""
        return self.kernel_status().get("TracerPid", "0") != "0"

    def kernel_status(self) -> dict[str, str]:
        """The first word of each line of /proc/PID/status, by its title; empty if that cannot be read."""
        try:
            with open(f"/proc/{self.pid}/status", encoding="ascii", errors="replace") as status:
                lines = [line.split() for line in status]
        except OSError:
            return {}
        return {line[0].rstrip(":"): line[1] for line in lines if len(line) > 1}


class Restarts:
    """When the next process is forked after one died. For the process of a slot."""

    #: So many early exits in a row cost no pause.
    free_failures: ClassVar[int] = 0
    #: Longest pause after processes that never got ready.
    start_pause_max_ns: ClassVar[int] = BACKOFF_START_MAX_NS

    def __init__(self) -> None:
        self.failures = 0  # early exits in a row
        self.ever_failed = False
        self.restart_ns = 0  # no new process is forked before this time
        self.error = ""  # why the last process died

    def failed(self, process: WorkerProcess, now: int, error: str) -> int:
        """Note that a process died unasked; returns how long to wait before the next start, in ns."""
        self.error = error
        self.ever_failed = True
        pause = 0
        if process.ready_ns and now - process.ready_ns >= EARLY_EXIT_NS:
            self.failures = 0
        else:
            self.failures += 1
            doublings = self.failures - self.free_failures - 1
            if doublings >= 0:
                longest = BACKOFF_READY_MAX_NS if process.ready_ns else self.start_pause_max_ns
                # Jitter, so that processes that die of the same cause do not start again in step.
                pause = int(min(BACKOFF_NS << min(doublings, 20), longest) * random.uniform(0.5, 1.0))
        self.restart_ns = now + pause
        return pause


class WorkerSlot(Restarts):
    """A listener and its workers: `current` serves; during a replacement `successor` starts, or `predecessor` drains.

    There is never a successor and a predecessor at the same time, so two cells of the stats page are enough.
    """

    def __init__(self, index: int, listener: socket.socket) -> None:
        super().__init__()
        self.index = index
        self.listener = listener
        self.current: WorkerProcess | None = None
        self.successor: WorkerProcess | None = None
        self.predecessor: WorkerProcess | None = None
        self.retire_ns = 0  # set when the slot is to be removed: its worker starts to drain at this time

    def workers(self) -> Iterator[WorkerProcess]:
        for worker in (self.current, self.successor, self.predecessor):
            if worker is not None:
                yield worker

    def free_cell(self) -> int | None:
        """The index of a cell that no living worker writes to; None if both are taken."""
        taken = {worker.cell_index for worker in self.workers()}
        return next((index for index in range(CELLS_PER_SLOT) if index not in taken), None)

    def is_stalled(self, now: int, timeouts: Timeouts) -> bool:
        """Whether the worker got ready but does not tick, so that a new connection would wait for its answer."""
        worker = self.current
        return (
            worker is not None and worker.ready_ns != 0 and now - worker.last_tick_ns() > timeouts.still_worker_ms * MS
        )

    def is_ready(self) -> bool:
        return self.current is not None and self.current.ready_ns != 0

    def remove(self, worker: WorkerProcess) -> None:
        """Forget a worker that was reaped. The successor takes over if it was the serving one."""
        if worker is self.current:
            self.current, self.successor = self.successor, None
        elif worker is self.successor:
            self.successor = None
        else:
            self.predecessor = None

    def promote(self, kill_ns: int) -> None:
        """Let the successor, which is ready, serve, and drain the worker before it."""
        self.predecessor, self.current, self.successor = self.current, self.successor, None
        if self.predecessor is not None:
            self.predecessor.drain(kill_ns)


def how_it_ended(code: int) -> str:
    """An exit code, as :meth:`WorkerProcess.reap` returns it, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:  # a real-time signal has no name
        return f"signal {-code}"
