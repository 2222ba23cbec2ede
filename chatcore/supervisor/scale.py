"""How many slots there are to be, and how they come and go without losing a connection."""

from __future__ import annotations

import logging
from typing import Final

from ..settings import MAX_WORKERS, Timeouts
from .control import Caller
from .listeners import Listeners, steer
from .worker_process import StartError
from .worker_slot import MS, Slot

log = logging.getLogger("chatcore.scale")

#: While a slot retires the handshakes under way (SYN seen, not accepted yet) still end on its listener.
RETIRE_SETTLE_NS: Final = 1_000 * MS


class Scale:
    """Opens and retires slots, always the highest, until there are as many as wanted.

    Owns the list of slots: a slot's place in it is the kernel's number for its listener in the group, which
    `steer` relies on, so slots are only ever added and removed at the end.
    """

    def __init__(self, listeners: Listeners, workers: int) -> None:
        """Open the listeners of the first `workers` slots. Raises StartError."""
        self.target = workers
        self.slots = [Slot(index, listeners.open()) for index in range(workers)]
        self._listeners = listeners
        self._callers: list[Caller] = []
        self._chosen: tuple[int, ...] = ()  # slots that alone get new connections; none: all do

    def to(self, workers: int, caller: Caller | None = None) -> None:
        """Want so many from now on; `caller` is answered when they serve. Within 1..MAX_WORKERS it is."""
        self.target = max(1, min(MAX_WORKERS, workers))
        if caller:
            self._callers.append(caller)
        log.info("the number of workers is to be %d", self.target)

    def reached(self) -> bool:
        """Whether there are as many as wanted, and all serve."""
        return len(self.slots) == self.target and all(slot.is_ready() and not slot.retire_ns for slot in self.slots)

    def step(self, now: int, kill_ns: int, timeouts: Timeouts, *, reloading: bool) -> None:
        """Do what can be done now; workers that have to go are killed at `kill_ns`."""
        if not reloading:
            self._retire(now)
        for slot in self.slots:
            if slot.retire_ns and now >= slot.retire_ns:
                for worker in slot.workers():
                    worker.drain(kill_ns)
        while self.slots[-1].retire_ns and now >= self.slots[-1].retire_ns and not any(self.slots[-1].workers()):
            self.slots.pop().listener.close()
        self._steer(now, timeouts)
        if not reloading and not self._retiring() and len(self.slots) < self.target:
            self._grow()
        if self._callers and self.reached():
            for caller in self._callers:
                caller.answer({"ok": True, "workers": self.target})
            self._callers.clear()

    def fail(self, error: str) -> None:
        """Tell whoever waits that it does not go well. What is wanted stays, and is tried again."""
        for caller in self._callers:
            caller.fail(error)
        self._callers.clear()

    def _retiring(self) -> bool:
        return bool(self.slots[-1].retire_ns)

    def _retire(self, now: int) -> None:
        leaving = [slot for slot in self.slots[self.target :] if not slot.retire_ns]
        if leaving:
            # First nothing new comes to their listeners, then they drain, last the listeners are closed.
            for slot in leaving:
                slot.retire_ns = now + RETIRE_SETTLE_NS

    def _steer(self, now: int, timeouts: Timeouts) -> None:
        """New connections are for slots that stay and whose workers tick."""
        staying = [slot for slot in self.slots if not slot.retire_ns]
        ticking = [slot for slot in staying if not slot.stands_still(now, timeouts)]
        if not ticking:  # likely the whole machine stood still: that says nothing of any of them
            ticking = [slot for slot in staying if slot.index in self._chosen] or staying
        chosen = () if len(ticking) == len(self.slots) else tuple(slot.index for slot in ticking)
        if chosen == self._chosen:
            return
        steer(self.slots[0].listener, chosen)
        for slot in staying:
            if slot not in ticking and (not self._chosen or slot.index in self._chosen):
                log.warning("worker %d stands still: new connections go to the others", slot.index)
        self._chosen = chosen

    def _grow(self) -> None:
        try:
            while len(self.slots) < self.target:
                self.slots.append(Slot(len(self.slots), self._listeners.open()))
        except StartError as error:
            log.error("no worker can be added: %s", error)
            self.target = len(self.slots)
            self.fail(str(error))
