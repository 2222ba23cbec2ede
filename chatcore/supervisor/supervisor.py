"""The parent of the workers: plain Python without an event loop or threads, and a client of no other service.

The supervisor holds the listeners and the lock on the data directory, forks the processes of the embedded store and the
workers, replaces those that die or get stuck, and carries out the requests of signals and the control socket: drain,
reload, scale. Each round of its loop (`_round`) checks the whole state and does what is due, so the order of events
does not matter. It reads the state of the workers from the stats page.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import secrets
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from .. import __version__
from ..config import ConfigError
from ..settings import MAX_WORKERS, Settings
from . import datadir
from .control import Caller, ControlServer, Json
from .listeners import Listeners
from .sdnotify import Notifier
from .stats import StatsPage, WorkerState
from .status import report
from .store_processes import END_NS, StoreProcesses
from .worker_pool import Reload, WorkerPool
from .worker_process import EXIT_START_ERROR, StartError, StoreMains, WorkerContext, WorkerMain, fork_process
from .worker_slot import MS, WorkerProcess, WorkerSlot, how_it_ended

log = logging.getLogger("chatcore.supervisor")

#: A drained worker has closed everything by its deadline; the process may take this much longer to exit.
KILL_GRACE_NS: Final = 1_000 * MS
#: Open files of a worker besides its clients: the store, the bus, libraries.
SPARE_FILES: Final = 512
#: Time between rounds: while a worker starts (getting ready sends no signal), and otherwise.
ROUND_BUSY_MS: Final = 10
ROUND_IDLE_MS: Final = 250
#: A round that is this late means that the supervisor itself was suspended (Ctrl-Z, a frozen machine).
SUSPENDED_NS: Final = 2_000 * MS
#: Interval at which systemd is told that the start takes longer, and how much time each such message asks for: enough
#: for the workers to start afterwards.
EXTEND_NS: Final = 5_000 * MS
EXTEND_BY_S: Final = 60

SIGNALS: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGCHLD,
)


class Supervisor:
    """Runs a server until it is asked to stop. There is one per process; `run` takes over the process's signals."""

    def __init__(
        self,
        settings: Settings,
        worker_main: WorkerMain,
        *,
        store_mains: StoreMains | None = None,
        reread: Callable[[], Settings] | None = None,
        announce: Callable[[str, Settings, int], None] = lambda url, settings, workers: None,
    ) -> None:
        """`store_mains` run beside the workers if the settings name the embedded store.
        `reread` returns fresh settings for a reload, or raises ConfigError.
        `announce(url, settings, workers)` is called once, when all workers are ready."""
        self.settings = settings
        self.data = Path(settings.server.data).absolute()
        self._worker_main = worker_main
        self._store_mains = None if settings.store.mongodb_url else store_mains
        self._reread = reread
        self._announce = announce
        self._reload: Reload | None = None
        self._reload_again: list[Caller] | None = None  # callers of a reload during a reload; None: there was none
        self._drain_callers: list[Caller] = []
        self._announced = False
        self._ever_ready = False
        self._stopping = False
        self._start_failure = ""  # why no worker, or not the writer, can start; the server ends then
        self._had_to_kill = False
        self._last_round_ns = 0
        self._ping_ns = 0
        self._extend_ns = 0

    # -- from start to stop

    def run(self) -> int:
        """Serve until stopped. Returns the exit code: 0 after a stop as requested, 1 if it had to kill a worker at the
        deadline. Raises StartError when the server cannot begin (then nothing was changed), or when no worker ever
        got ready."""
        self._notifier = Notifier(os.environ)
        self._host = socket.gethostname()
        self._page = StatsPage(MAX_WORKERS + 1)
        datadir.refuse_if_held(self.data)
        self._listeners = Listeners(self.settings.server.host, self.settings.server.port)
        self._pool = WorkerPool(self._listeners, self.settings.worker_count())
        lock_fd = datadir.lock(self.data)
        try:
            self._control = ControlServer(self.data, self._handle_request)
        except OSError as error:
            raise StartError(f"cannot create the control socket in {self.data}: {error.strerror}") from error
        self._parent_read, self._parent_write = os.pipe()
        self._store = StoreProcesses(
            self._store_mains, self.settings, self._host, self._page, self._parent_read, self._close_in_child
        )
        self._install_signal_handlers()
        self._raise_file_limit()
        # All objects so far live until the end. Frozen, the collector does not touch them, so that their pages stay
        # shared between the workers.
        gc.collect()
        gc.freeze()
        log.debug("starting %d workers on %s, data in %s", self._pool.target, self._listeners.url, self.data)
        try:
            self._loop()
        finally:
            self._shut_down(lock_fd)
        if self._start_failure:
            raise StartError(f"no worker could start: {self._start_failure}")
        log.info("stopped")
        return 1 if self._had_to_kill or self._store.had_to_kill else 0

    def _raise_file_limit(self) -> None:
        """Raise the limit of open files, which workers inherit, to what the system permits."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        needed = self.settings.limits.connections_per_worker + SPARE_FILES
        if hard != resource.RLIM_INFINITY and hard < needed:
            log.warning("a worker may open only %d files, but limits.connections_per_worker needs %d", hard, needed)

    def _install_signal_handlers(self) -> None:
        self._wake_read, wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(wake_write, False)
        self._wake_write = wake_write
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)

    def _shut_down(self, lock_fd: int) -> None:
        """Leave nothing behind, whatever ended the loop. Callers of drain are answered after the lock is released."""
        for process in (*self._workers(), *self._store.processes()):
            process.kill("the supervisor ends")
            os.waitpid(process.pid, 0)
        for slot in self._slots:
            slot.listener.close()
        signal.set_wakeup_fd(-1)
        self._control.close()
        os.close(lock_fd)
        for caller in self._drain_callers:
            caller.answer({"ok": True})
        self._notifier.close()

    def _loop(self) -> None:
        while True:
            self._round(time.monotonic_ns())
            if (self._stopping or self._start_failure) and not any(self._processes()):
                return
            poll = select.poll()
            for fd in (self._wake_read, *self._control.filenos()):
                poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll(self._poll_timeout_ms(time.monotonic_ns())):
                if fd == self._wake_read:
                    self._handle_signals()
                else:
                    self._control.readable(fd)
            self._control.sweep()

    def _poll_timeout_ms(self, now: int) -> int:
        """How long to wait for an event before the next round."""
        if self._reload or any(process.starting() for process in self._processes()):
            return ROUND_BUSY_MS
        due = [now + ROUND_IDLE_MS * MS]
        due += [slot.restart_ns for slot in self._slots if slot.restart_ns > now]
        due += [worker.kill_ns for worker in self._workers() if worker.kill_ns and not worker.kill_reason]
        due += self._store.due_ns(now, self.settings.timeouts)
        return max(0, min(ROUND_IDLE_MS, -((now - min(due)) // MS)))

    def _round(self, now: int) -> None:
        """Check everything, and do what is due."""
        late = now - self._last_round_ns - ROUND_IDLE_MS * MS if self._last_round_ns else 0
        if late > SUSPENDED_NS:
            log.warning("the supervisor was suspended for %d ms; the deadlines of all workers are extended", late // MS)
            for worker in self._workers():
                worker.excuse(now, late)
        self._last_round_ns = now
        self._store.step(now, self.settings.timeouts, late)
        self._start_failure = self._start_failure or self._store.failure
        for slot in self._slots:
            for worker in list(slot.workers()):
                code = worker.reap()
                if code is not None:
                    self._on_exit(slot, worker, code, now)
                else:
                    self._check_worker(slot, worker, now)
        if (self._stopping or self._start_failure) and not any(self._workers()):
            self._store.stop(now + END_NS)  # not before: workers that drain still write
        if self._start_failure:
            return
        if not self._stopping:
            self._pool.step(now, self._kill_at(now), self.settings.timeouts, reloading=self._reload is not None)
            if self._store.opened():
                self._fork_missing(now)
                if self._reload and self._reload.step(now, self._spawn, self._kill_at(now)):
                    self._reloaded(self._reload)
            self._announce_ready()
        self._notify_systemd(now)

    # -- workers

    @property
    def _slots(self) -> list[WorkerSlot]:
        return self._pool.slots

    def _workers(self) -> Iterator[WorkerProcess]:
        for slot in self._slots:
            yield from slot.workers()

    def _processes(self) -> Iterator[WorkerProcess]:
        yield from self._workers()
        yield from self._store.processes()

    def _spawn(self, slot: WorkerSlot, settings: Settings) -> WorkerProcess | None:
        """Fork a worker for `slot`; None if that is not possible now. Logs why the fork failed."""
        cell_index = slot.free_cell()
        if cell_index is None:
            return None
        cell = self._page.cell(slot.index, cell_index)
        nonce = secrets.randbelow(2**53 - 1) + 1
        cell.reset(nonce)
        context = WorkerContext(
            settings=settings,
            host=self._host,
            slot=slot.index,
            nonce=nonce,
            listener=slot.listener,
            parent_fd=self._parent_read,
            stats=cell,
            version=__version__,
        )
        try:
            pid = fork_process(
                f"worker {slot.index}",
                cell,
                partial(self._worker_main, context),
                lambda: self._close_in_child(slot),
            )
        except OSError as error:
            log.error("cannot fork worker %d: %s", slot.index, error.strerror)
            return None
        log.debug("worker %d is process %d", slot.index, pid)
        return WorkerProcess(pid, nonce, cell_index, cell, time.monotonic_ns())

    def _close_in_child(self, own: WorkerSlot | None = None) -> None:
        """Close what a child must not hold: with the write end of the pipe it would never see the supervisor die.
        Of the listeners it keeps its `own`."""
        os.close(self._parent_write)
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._control.close_in_child()
        self._notifier.close()
        for slot in self._slots:
            if slot is not own:
                slot.listener.close()

    def _kill_at(self, now: int) -> int:
        return now + self.settings.server.drain_timeout_ms * MS + KILL_GRACE_NS

    def _check_worker(self, slot: WorkerSlot, worker: WorkerProcess, now: int) -> None:
        """Notice that a living worker got ready, is stuck, or has reached its deadline."""
        if worker.starting() and worker.cell.state == WorkerState.READY:
            worker.ready_ns = now
            self._ever_ready = True
            log.info("worker %d (process %d) is ready", slot.index, worker.pid)
        reason = "" if worker.kill_reason else worker.overdue(now, self.settings.timeouts)
        if reason:
            log.error("worker %d (process %d) is killed: %s", slot.index, worker.pid, reason)
            self._had_to_kill = self._had_to_kill or self._stopping
            worker.kill(reason)

    def _on_exit(self, slot: WorkerSlot, worker: WorkerProcess, code: int, now: int) -> None:
        how = how_it_ended(code)
        error = worker.kill_reason or worker.cell.error or how
        asked = worker.kill_ns != 0
        was_successor = worker is slot.successor
        slot.remove(worker)
        if asked or slot.retire_ns:
            log.info("worker %d (process %d) has left: %s", slot.index, worker.pid, how)
            return
        if was_successor:
            log.error("the new worker %d (process %d) died: %s", slot.index, worker.pid, error)
            if self._reload:
                self._reload.failed(slot, error)
            return
        pause = slot.failed(worker, now, error)
        if self._start_failure:
            return
        if not self._ever_ready and (code == EXIT_START_ERROR or all(other.ever_failed for other in self._slots)):
            self._start_failure = error
            for other in self._workers():
                other.kill("no worker can start")
            return
        if not worker.ready_ns:
            # The slot is tried again, without a limit; a caller of scale should not have to wait for that.
            self._pool.fail(f"worker {slot.index} died before it was ready: {error}")
        log.error("worker %d (process %d) died: %s; restarting it in %d ms", slot.index, worker.pid, error, pause // MS)

    def _fork_missing(self, now: int) -> None:
        """Fork a worker for every slot that has none and whose pause is over."""
        for slot in self._slots:
            if slot.current is slot.successor is None and not slot.retire_ns and now >= slot.restart_ns:
                slot.current = self._spawn(slot, self.settings)
                if slot.current is None:
                    slot.restart_ns = now + ROUND_IDLE_MS * MS

    def _announce_ready(self) -> None:
        if not self._announced and self._pool.complete():
            self._announced = True
            self._announce(self._listeners.url, self.settings, len(self._slots))
            self._notifier.ready()

    def _notify_systemd(self, now: int) -> None:
        ready = sum(slot.is_ready() for slot in self._slots)
        state = "stopping" if self._stopping else "reloading" if self._reload else "serving"
        writer = "" if self._store.serving() else ", the writer is not ready"
        self._notifier.status(f"{state}: {ready} of {len(self._slots)} workers ready{writer}")
        if not self._store.opened() and now >= self._extend_ns:
            # The writer may have to migrate the data folder. It is killed if it gives no sign of life.
            self._notifier.extend_timeout(EXTEND_BY_S)
            self._extend_ns = now + EXTEND_NS
        if self._notifier.watchdog_s and now >= self._ping_ns:
            # The supervisor kills a stuck worker in time. When a worker stays stuck, or none serves, it sends no
            # ping, so that systemd steps in. The same when no writer ticks.
            limit_ms = self.settings.timeouts.stuck_worker_ms
            serving = [worker for worker in self._workers() if worker.ready_ns]
            ticking = all(now - worker.last_tick_ns() <= limit_ms * MS for worker in serving)
            if serving and ticking and self._store.fresh(now, limit_ms):
                self._notifier.watchdog()
            self._ping_ns = now + int(self._notifier.watchdog_s * 1e9)

    # -- requests from signals and the control socket

    def _handle_signals(self) -> None:
        for number in os.read(self._wake_read, 4096):
            if number == signal.SIGTERM or (number == signal.SIGINT and not self._stopping):
                self._stop()
            elif number in (signal.SIGINT, signal.SIGQUIT):
                self._stop()
                for worker in self._workers():
                    worker.kill("stopped at once")
                self._store.kill(time.monotonic_ns(), "stopped at once")
            elif number == signal.SIGHUP and not self._stopping:
                self._start_reload(())
            elif number == signal.SIGTTIN:
                self._pool.resize(self._pool.target + 1)
            elif number == signal.SIGTTOU:
                self._pool.resize(self._pool.target - 1)

    def _handle_request(self, request: Json, caller: Caller) -> None:
        match request.get("cmd"):
            case "status":
                url, stopping = self._listeners.url, self._stopping
                caller.answer({"ok": True, **report(self._slots, self._store, self._pool.target, url, stopping)})
            case "drain":
                if request.get("wait", True):
                    self._drain_callers.append(caller)
                else:
                    caller.answer({"ok": True})
                self._stop()
            case _ if self._stopping:
                caller.fail("the server is stopping")
            case "reload":
                self._start_reload((caller,))
            case "scale":
                workers = request.get("workers")
                if type(workers) is not int or not 1 <= workers <= MAX_WORKERS:
                    caller.fail(
                        f"workers = {workers!r} is not allowed: it must be a whole number from 1 to {MAX_WORKERS}"
                    )
                    return
                self._pool.resize(workers, caller)
            case other:
                caller.fail(f"unknown command {other!r}")

    def _stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        log.info("stopping; workers have %d ms to drain", self.settings.server.drain_timeout_ms)
        self._notifier.stopping()
        if self._reload:
            self._reload.fail("the server is stopping")
            self._reload = None
        for caller in self._reload_again or ():
            caller.fail("the server is stopping")
        self._pool.fail("the server is stopping")
        kill_ns = self._kill_at(time.monotonic_ns())
        for slot in self._slots:
            # The kernel refuses clients from now on, so that they try elsewhere or later instead of waiting.
            slot.listener.close()
            for worker in slot.workers():
                worker.drain(kill_ns)

    def _start_reload(self, callers: Sequence[Caller]) -> None:
        if self._reload:
            # The reload under way may have read the settings before they were changed, so another one follows it.
            self._reload_again = [*(self._reload_again or ()), *callers]
            return
        try:
            settings = self._reread() if self._reread else self.settings
        except ConfigError as error:
            log.error("reload refused, the settings stay as they were: %s", error)
            for caller in callers:
                caller.fail(str(error))
            return
        fixed = self.settings.server
        if (settings.server.host, settings.server.port, settings.server.data) != (fixed.host, fixed.port, fixed.data):
            log.warning("host, port and data stay as they are until the server is restarted")
            server = replace(settings.server, host=fixed.host, port=fixed.port, data=fixed.data)
            settings = replace(settings, server=server)
        if bool(settings.store.mongodb_url) != bool(self.settings.store.mongodb_url):
            log.warning("the kind of store stays as it is until the server is restarted")
            settings = replace(settings, store=self.settings.store, redis=self.settings.redis)
        log.info("reloading %d workers", len(self._slots))
        if self._announced:
            self._notifier.reloading()
        self._reload = Reload(settings, self._slots, callers)

    def _reloaded(self, reload: Reload) -> None:
        """Take over the result of a reload that is over, successful or not."""
        self._reload = None
        if reload.adopted:
            if reload.settings.worker_count() != self.settings.worker_count():
                self._pool.resize(reload.settings.worker_count())
            self.settings = reload.settings
        if reload.error:
            log.error("reload failed, the old workers stay: %s", reload.error)
        else:
            log.info("reloaded")
        reload.finish()
        if self._announced:
            self._notifier.ready()
        if self._reload_again is not None:
            again, self._reload_again = self._reload_again, None
            self._start_reload(again)
