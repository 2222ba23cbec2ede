"""One slot: a listener, the worker that serves it, and while it is replaced the next or the last one."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ..settings import Timeouts
from .stats import CELLS_PER_SLOT, State, StatsCell

MS: Final = 1_000_000  # nanoseconds

#: A worker that dies within this after getting ready died young: its replacement waits longer and longer.
YOUNG_NS: Final = 3_000 * MS
#: The first pause; it doubles with each young death in a row.
BACKOFF_NS: Final = 100 * MS
#: Longest pause after workers that did get ready: the slot's queue is waiting, and they did serve.
BACKOFF_READY_MAX_NS: Final = 1_000 * MS
#: Longest pause after workers that never got ready; each try costs a start.
BACKOFF_START_MAX_NS: Final = 10_000 * MS


@dataclass(slots=True)
class Worker:
    """One process, as the supervisor sees it. Times are CLOCK_MONOTONIC nanoseconds, 0: not yet."""

    pid: int
    nonce: int
    which: int  # its cell in the slot's pair
    cell: StatsCell
    forked_ns: int
    ready_ns: int = 0
    kill_ns: int = 0  # asked to drain; killed at this time
    killed: str = ""  # why the supervisor killed it
    spared_ns: int = 0  # its heartbeat is judged from here, if that was earlier
    held_ns: int = 0  # when it was last seen held by a debugger

    def starting(self) -> bool:
        return self.ready_ns == 0 and self.kill_ns == 0

    def heard_ns(self) -> int:
        """When its loop last ticked, got ready, or was last spared."""
        return max(self.cell.heartbeat_ns, self.ready_ns, self.spared_ns)

    def state(self) -> str:
        """For people: what it says of itself, or draining as soon as it was asked."""
        if self.kill_ns:
            return "draining"
        return State(min(self.cell.state, State.STOPPED)).name.lower()

    def spare(self, now: int, ns: int) -> None:
        """The last `ns` do not count: the supervisor, and likely everything, stood still."""
        self.spared_ns = now
        self.forked_ns += ns
        if self.kill_ns:
            self.kill_ns += ns

    def send(self, number: signal.Signals) -> None:
        """Send a signal. The pid is ours until it is reaped, so it cannot be another process."""
        os.kill(self.pid, number)

    def drain(self, kill_ns: int) -> None:
        """Ask it to drain; it is killed at `kill_ns`. Asking again changes nothing."""
        if not self.kill_ns:
            self.kill_ns = kill_ns
            self.send(signal.SIGTERM)

    def kill(self, why: str) -> None:
        if not self.killed:
            self.killed = why
            self.send(signal.SIGKILL)

    def reap(self) -> int | None:
        """Its exit code (negative: a signal) once it is dead, None before."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def overdue(self, now: int, timeouts: Timeouts) -> str:
        """Why it has to be killed now; empty if it has not."""
        if self.kill_ns and now >= self.kill_ns:
            return "it had not drained at the deadline"
        if self.starting() and now - self.forked_ns > timeouts.worker_start_ms * MS:
            return f"it was not ready after {timeouts.worker_start_ms} ms"
        # A worker under a debugger or profiler stands still because it is told to: let go, it has time again to
        # tick. It is looked at well before the limit, as it may be let go at any moment. One that somebody
        # stopped with SIGSTOP is not spared: clients wait in its queue.
        limit_ns = timeouts.stuck_worker_ms * MS
        if self.ready_ns and now - self.heard_ns() > limit_ns // 2:
            if self.traced():
                self.held_ns = now
            elif now - max(self.heard_ns(), self.held_ns) > limit_ns:
                return f"its loop has not ticked for {timeouts.stuck_worker_ms} ms"
        return ""

    def traced(self) -> bool:
        """Whether a debugger or profiler holds it."""
        try:
            with open(f"/proc/{self.pid}/status", encoding="ascii", errors="replace") as status:
                return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in status)
        except OSError:
            return False


class Slot:
    """At most one worker serves (`current`); at most one more is on its way in (`coming`) or out (`leaving`)."""

    def __init__(self, index: int, listener: socket.socket) -> None:
        self.index = index
        self.listener = listener
        self.current: Worker | None = None
        self.coming: Worker | None = None
        self.leaving: Worker | None = None
        self.retire_ns = 0  # the slot is to go: its worker is told at this time
        self.failures = 0  # young deaths in a row
        self.ever_failed = False
        self.restart_ns = 0  # no new worker before this time
        self.error = ""  # why the last worker died

    def workers(self) -> Iterator[Worker]:
        for worker in (self.current, self.coming, self.leaving):
            if worker is not None:
                yield worker

    def free_cell(self) -> int | None:
        """A cell that no living worker writes to; None if both are taken."""
        taken = {worker.which for worker in self.workers()}
        return next((which for which in range(CELLS_PER_SLOT) if which not in taken), None)

    def stands_still(self, now: int, timeouts: Timeouts) -> bool:
        """Whether its worker, which got ready, does not tick: who is given to it waits for nothing."""
        worker = self.current
        return worker is not None and worker.ready_ns != 0 and now - worker.heard_ns() > timeouts.still_worker_ms * MS

    def is_ready(self) -> bool:
        return self.current is not None and self.current.ready_ns != 0

    def remove(self, worker: Worker) -> None:
        """Forget a worker that was reaped. If the serving one died, the coming one takes its place."""
        if worker is self.current:
            self.current, self.coming = self.coming, None
        elif worker is self.coming:
            self.coming = None
        else:
            self.leaving = None

    def promote(self, kill_ns: int) -> None:
        """The coming worker is ready: it serves, and the one before drains."""
        self.leaving, self.current, self.coming = self.current, self.coming, None
        if self.leaving is not None:
            self.leaving.drain(kill_ns)

    def failed(self, worker: Worker, now: int, error: str) -> int:
        """Note an unasked death; returns how long to wait before the next try, in ns."""
        self.error = error
        self.ever_failed = True
        if worker.ready_ns and now - worker.ready_ns >= YOUNG_NS:
            self.failures = 0
            pause = 0
        else:
            self.failures += 1
            most = BACKOFF_READY_MAX_NS if worker.ready_ns else BACKOFF_START_MAX_NS
            # Jitter, so that slots that die of the same cause do not start again in step.
            pause = int(min(BACKOFF_NS << min(self.failures - 1, 20), most) * random.uniform(0.5, 1.0))
        self.restart_ns = now + pause
        return pause


def how_it_ended(code: int) -> str:
    """An exit code as :meth:`Worker.reap` gives it, for people."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:  # a real-time signal has no name
        return f"signal {-code}"
