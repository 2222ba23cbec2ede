"""The set of worker slots, and how it changes while the server runs: scaling and the rolling reload.

Both lose no connection: a slot that is removed gets no new connections before its listener is closed, and a reload
lets the old worker of a slot drain only when the new one is ready.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from ..settings import MAX_WORKERS, Settings, Timeouts
from .control import Caller
from .listeners import Listeners, steer
from .worker_process import StartError
from .worker_slot import MS, WorkerProcess, WorkerSlot

log = logging.getLogger("chatcore.worker_pool")

#: A slot that is to be removed keeps its worker for this long after new connections were steered away, so that
#: handshakes under way (SYN received, not accepted yet) end on its listener.
RETIRE_SETTLE_NS: Final = 1_000 * MS


class WorkerPool:
    """Adds and removes worker slots, always the highest ones, until there are `target` of them.

    Owns the list of slots. The kernel numbers the listeners of a SO_REUSEPORT group in the order of opening, and
    `steer` relies on a slot's index being that number, so slots are only ever added and removed at the end.
    """

    def __init__(self, listeners: Listeners, workers: int) -> None:
        """Open the listeners of the first `workers` slots. Raises StartError."""
        self.target = workers
        self.slots = [WorkerSlot(index, listeners.open()) for index in range(workers)]
        self._listeners = listeners
        self._callers: list[Caller] = []
        self._chosen: tuple[int, ...] = ()  # the only slots that get new connections; empty: all slots do

    def resize(self, workers: int, caller: Caller | None = None) -> None:
        """Set the target to `workers`, limited to 1..MAX_WORKERS; `caller` is answered when all of them serve."""
        self.target = max(1, min(MAX_WORKERS, workers))
        if caller:
            self._callers.append(caller)
        log.info("changing the number of workers to %d", self.target)

    def complete(self) -> bool:
        """Whether there are as many slots as wanted and the worker of each is ready."""
        return len(self.slots) == self.target and all(slot.is_ready() and not slot.retire_ns for slot in self.slots)

    def step(self, now: int, kill_ns: int, timeouts: Timeouts, *, reloading: bool) -> None:
        """Do what is due at `now`. Workers of removed slots drain and are killed at `kill_ns`."""
        if not reloading:
            self._retire(now)
        for slot in self.slots:
            if slot.retire_ns and now >= slot.retire_ns:
                for worker in slot.workers():
                    worker.drain(kill_ns)
        while self.slots[-1].retire_ns and now >= self.slots[-1].retire_ns and not any(self.slots[-1].workers()):
            self.slots.pop().listener.close()
        self._steer(now, timeouts)
        if not reloading and not self.slots[-1].retire_ns and len(self.slots) < self.target:
            self._grow()
        if self._callers and self.complete():
            for caller in self._callers:
                caller.answer({"ok": True, "workers": self.target})
            self._callers.clear()

    def fail(self, error: str) -> None:
        """Answer all waiting callers with an error. The target stays, and the pool keeps trying to reach it."""
        for caller in self._callers:
            caller.fail(error)
        self._callers.clear()

    def _retire(self, now: int) -> None:
        # Steer new connections away first, then drain the workers, and close the listeners last.
        for slot in self.slots[self.target :]:
            if not slot.retire_ns:
                slot.retire_ns = now + RETIRE_SETTLE_NS

    def _steer(self, now: int, timeouts: Timeouts) -> None:
        """Steer new connections to the slots that stay and whose workers tick."""
        staying = [slot for slot in self.slots if not slot.retire_ns]
        ticking = [slot for slot in staying if not slot.is_stalled(now, timeouts)]
        if not ticking:  # probably the whole machine was suspended, which says nothing about a single worker
            ticking = [slot for slot in staying if slot.index in self._chosen] or staying
        chosen = () if len(ticking) == len(self.slots) else tuple(slot.index for slot in ticking)
        if chosen == self._chosen:
            return
        steer(self.slots[0].listener, chosen)
        for slot in staying:
            if slot not in ticking and (not self._chosen or slot.index in self._chosen):
                log.warning("worker %d is stalled: new connections go to the other workers", slot.index)
        self._chosen = chosen

    def _grow(self) -> None:
        try:
            while len(self.slots) < self.target:
                self.slots.append(WorkerSlot(len(self.slots), self._listeners.open()))
        except StartError as error:
            log.error("no worker can be added: %s", error)
            self.target = len(self.slots)
            self.fail(str(error))


class Reload:
    """One rolling reload: slot after slot, a new worker starts and gets ready, and only then the old one drains.

    If a new worker fails, the old worker of its slot stays and the reload ends there.
    """

    def __init__(self, settings: Settings, slots: Sequence[WorkerSlot], callers: Sequence[Caller]) -> None:
        """`settings`: what the new workers run with; `callers` are answered when the reload is over."""
        self.settings = settings
        self.callers = list(callers)
        self.adopted = False  # a worker with the new settings got ready
        self.error = ""
        self._pending = list(slots)
        self._total = len(slots)
        self._new: WorkerProcess | None = None  # the replacement for the first pending slot's worker

    def step(self, now: int, spawn: Callable[[WorkerSlot, Settings], WorkerProcess | None], kill_ns: int) -> bool:
        """Do what can be done now; True when the reload is over. `spawn` forks a worker for a slot, or fails with
        None; old workers are killed at `kill_ns`."""
        while self._pending and not self.error:
            slot = self._pending[0]
            if slot.retire_ns:
                self._pending.pop(0)
            elif self._new is not None and self._new in (slot.successor, slot.current):
                if not self._new.ready_ns:
                    return False
                if slot.successor is self._new:
                    slot.promote(kill_ns)
                self.adopted = True
                self._pending.pop(0)
            elif slot.predecessor is not None or (slot.current is not None and slot.current.starting()):
                # Wait until the predecessor has drained (the stats page has no cell for a third worker), or until
                # the starting worker is ready or dead.
                return False
            else:
                # An empty slot gets a new worker, too: the new settings may be what its dying workers need.
                self._new = slot.successor = spawn(slot, self.settings)
                if self._new is None:
                    self.error = f"the new worker {slot.index} could not be forked"
        return True

    def failed(self, slot: WorkerSlot, error: str) -> None:
        """Note that the new worker of `slot` died before it was ready."""
        self.error = f"the new worker {slot.index} failed: {error}"

    def fail(self, error: str) -> None:
        """End the reload for another reason, and answer its callers with `error`."""
        self.error = error
        self.finish()

    def finish(self) -> None:
        """Answer the callers."""
        for caller in self.callers:
            if self.error:
                caller.fail(self.error)
            else:
                caller.answer({"ok": True, "workers": self._total})
        self.callers.clear()
