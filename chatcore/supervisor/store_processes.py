"""The two processes of the embedded store, the writer and the indexer: forked first, ended last, replaced at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from .. import __version__
from ..settings import Settings, Timeouts
from .stats import CELLS_PER_SLOT, StatsCell, StatsPage, WorkerState
from .worker_process import StoreMains, StoreProcessContext, StoreProcessMain, fork_process
from .worker_slot import BACKOFF_READY_MAX_NS, MS, Restarts, WorkerProcess, how_it_ended

log = logging.getLogger("chatcore.store_processes")

#: A process that was asked to end commits what it was given and closes its files; then it is killed.
END_NS: Final = 10_000 * MS
#: A round that is this late means that the machine is so busy, or was suspended for so long, that the age of a
#: heartbeat says little about the process.
LATE_NS: Final = 250 * MS
#: The pause after a fork that failed.
FORK_RETRY_NS: Final = 250 * MS


class StoreProcess(WorkerProcess):
    """The writer or the indexer, as the supervisor sees it."""

    def last_tick_ns(self) -> int:
        """When its loop last ticked (it ticks while it starts, too), it was forked, or it was last excused."""
        return max(WorkerProcess.last_tick_ns(self), self.forked_ns)

    def overdue(self, now: int, timeouts: Timeouts) -> str:
        """The reason to kill it now; empty if there is none."""
        if self.kill_ns:
            return "it had not ended at the deadline" if now >= self.kill_ns else ""
        if not self.starting():
            return self.stuck(now, self.limit_ms(timeouts))
        if now - self.last_tick_ns() > timeouts.worker_start_ms * MS:
            return f"it was not ready, and gave no sign of life, for {timeouts.worker_start_ms} ms"
        return ""

    def limit_ms(self, timeouts: Timeouts) -> int:
        """How old its heartbeat may get."""
        return timeouts.stuck_worker_ms


class WriterProcess(StoreProcess):
    """The writer: while it stands still nobody's write is committed, so it is not waited for."""

    def overdue(self, now: int, timeouts: Timeouts) -> str:
        """The reason to kill it now; even one that is held is waited for no longer than for a worker."""
        if self.ready_ns and not self.kill_ns and now - self.last_tick_ns() > timeouts.stuck_worker_ms * MS:
            return f"its loop has not ticked for {timeouts.stuck_worker_ms} ms"
        return StoreProcess.overdue(self, now, timeouts)

    def limit_ms(self, timeouts: Timeouts) -> int:
        return min(timeouts.stuck_writer_ms, timeouts.stuck_worker_ms)

    def held(self) -> bool:
        """Whether a debugger holds it, or it waits for the disk; a new writer would have to wait for that, too."""
        status = self.kernel_status()
        return status.get("TracerPid", "0") != "0" or status.get("State") == "D"


class StoreSlot(Restarts):
    """The place of one of the two: its process, and its cell of the stats page."""

    free_failures = 1  # writes wait, so the first replacement is forked at once
    start_pause_max_ns = BACKOFF_READY_MAX_NS  # likewise

    def __init__(self, name: str, main: StoreProcessMain, kind: type[StoreProcess], cell: StatsCell) -> None:
        super().__init__()
        self.name = name
        self.main = main
        self.kind = kind
        self.cell = cell
        self.process: StoreProcess | None = None
        self.forks = 0
        self.ever_ready = False
        self.last_tick_ns = 0  # of its process, or of the one that died

    def report(self, now: int) -> dict[str, Any]:
        """What ``ctl status`` shows of it."""
        process = self.process
        return {
            "name": self.name,
            "pid": process.pid if process else None,
            "state": process.state() if process else "waiting",
            "uptime_s": round((now - process.cell.started_ns) / 1e9, 1) if process else 0.0,
            "heartbeat_age_ms": max(0, now - process.last_tick_ns()) // MS if process else None,
            "restarts": max(0, self.forks - 1),
            "error": self.error or None,
            "metrics": process.cell.metrics if process else None,
        }


class StoreProcesses:
    """Forks the two processes, replaces them, and ends them. A server that stores elsewhere has none."""

    def __init__(
        self,
        mains: StoreMains | None,
        settings: Settings,
        host: str,
        page: StatsPage,
        parent_fd: int,
        in_child: Callable[[], None],
    ) -> None:
        """`settings` are theirs for ever. Their cells are the last pair of `page`. `in_child` closes what only the
        supervisor may hold."""
        self._settings = settings
        self._host = host
        self._parent_fd = parent_fd
        self._in_child = in_child
        self._slots: list[StoreSlot] = []
        if mains is not None:
            cells = [page.cell(page.slots - 1, index) for index in range(CELLS_PER_SLOT)]
            self._slots = [
                StoreSlot("writer", mains.writer, WriterProcess, cells[0]),
                StoreSlot("indexer", mains.indexer, StoreProcess, cells[1]),
            ]
        self._ending = False
        self.failure = ""  # why the writer cannot start; the server ends then
        self.had_to_kill = False

    def opened(self) -> bool:
        """Whether the writer was ever ready, so that the others may be forked."""
        return all(slot.ever_ready for slot in self._slots[:1])

    def serving(self) -> bool:
        """Whether the writer is ready."""
        return all(slot.process is not None and slot.process.ready_ns for slot in self._slots[:1])

    def fresh(self, now: int, limit_ms: int) -> bool:
        """Whether the writer, or one that died, ticked in the last `limit_ms`."""
        return all(now - slot.last_tick_ns <= limit_ms * MS for slot in self._slots[:1])

    def processes(self) -> Iterator[StoreProcess]:
        for slot in self._slots:
            if slot.process is not None:
                yield slot.process

    def report(self, now: int) -> list[dict[str, Any]]:
        """What ``ctl status`` shows of each."""
        return [slot.report(now) for slot in self._slots]

    def due_ns(self, now: int, timeouts: Timeouts) -> Iterator[int]:
        """The times after `now` at which a process has to be forked or killed, if nothing happens before."""
        for slot in self._slots:
            process = slot.process
            if process is None:
                due = slot.restart_ns
            elif process.kill_ns:
                due = process.kill_ns
            else:
                due = process.last_tick_ns() + process.limit_ms(timeouts) * MS
            if due > now:
                yield due

    def step(self, now: int, timeouts: Timeouts, late_ns: int) -> None:
        """Do what is due at `now`; this round is `late_ns` late."""
        for slot in self._slots:
            process = slot.process
            if process is not None:
                if late_ns > LATE_NS:
                    process.excuse(now, late_ns)
                slot.last_tick_ns = process.last_tick_ns()
                code = process.reap()
                if code is None:
                    self._check(slot, process, now, timeouts)
                else:
                    self._on_exit(slot, process, code, now)
            may_start = slot is self._slots[0] or self.opened()
            if slot.process is None and may_start and not self._ending and now >= slot.restart_ns:
                self._fork(slot, now)

    def stop(self, kill_ns: int) -> None:
        """Ask both to end, and kill them at `kill_ns`. Asking again changes nothing."""
        self._ending = True
        for process in self.processes():
            process.drain(kill_ns)

    def kill(self, now: int, reason: str) -> None:
        """End both at once."""
        self.stop(now)
        for process in self.processes():
            process.kill(reason)

    def _fork(self, slot: StoreSlot, now: int) -> None:
        slot.forks += 1
        slot.cell.reset(slot.forks)
        context = StoreProcessContext(
            settings=self._settings,
            host=self._host,
            name=slot.name,
            parent_fd=self._parent_fd,
            stats=slot.cell,
            version=__version__,
        )
        try:
            pid = fork_process(f"the {slot.name}", slot.cell, partial(slot.main, context), self._in_child)
        except OSError as error:
            log.error("cannot fork the %s: %s", slot.name, error.strerror)
            slot.forks -= 1
            slot.restart_ns = now + FORK_RETRY_NS
            return
        log.debug("the %s is process %d", slot.name, pid)
        slot.process = slot.kind(pid, slot.forks, 0, slot.cell, time.monotonic_ns())

    def _check(self, slot: StoreSlot, process: StoreProcess, now: int, timeouts: Timeouts) -> None:
        """Notice that a living process got ready, is stuck, or has reached its deadline."""
        if process.starting() and process.cell.state == WorkerState.READY:
            process.ready_ns = now
            slot.ever_ready = True
            log.info("the %s (process %d) is ready", slot.name, process.pid)
        reason = "" if process.kill_reason else process.overdue(now, timeouts)
        if reason:
            log.error("the %s (process %d) is killed: %s", slot.name, process.pid, reason)
            self.had_to_kill = self.had_to_kill or self._ending
            process.kill(reason)

    def _on_exit(self, slot: StoreSlot, process: StoreProcess, code: int, now: int) -> None:
        how = how_it_ended(code)
        slot.process = None
        if process.kill_ns:
            log.info("the %s (process %d) has left: %s", slot.name, process.pid, how)
            return
        error = process.kill_reason or process.cell.error or how
        pause = slot.failed(process, now, error)
        if not self.opened():
            self.failure = error
            self._ending = True
            return
        log.error("the %s (process %d) died: %s; restarting it in %d ms", slot.name, process.pid, error, pause // MS)
