"""A rolling reload: slot after slot a new worker starts, gets ready, and only then the old one drains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..settings import Settings
from .control import Caller
from .worker_slot import Slot, Worker


class Reload:
    """One reload under way. If a new worker fails, its old one stays and the reload ends there."""

    def __init__(self, settings: Settings, slots: Sequence[Slot], callers: Sequence[Caller]) -> None:
        self.settings = settings
        self.callers = list(callers)
        self.adopted = False  # the new settings have shown that they work
        self.error = ""
        self._todo = list(slots)
        self._all = len(slots)
        self._new: Worker | None = None  # the one that is to replace the slot's worker

    def step(self, now: int, spawn: Callable[[Slot, Settings], Worker | None], kill_ns: int) -> bool:
        """Do what can be done now; True when the reload is over. `spawn` forks a worker for a slot."""
        while self._todo and not self.error:
            slot = self._todo[0]
            if slot.retire_ns:
                self._todo.pop(0)
            elif self._new is not None and self._new in (slot.coming, slot.current):
                if not self._new.ready_ns:
                    return False
                if slot.coming is self._new:
                    slot.promote(kill_ns)
                self.adopted = True
                self._todo.pop(0)
            elif slot.leaving is not None or (slot.current is not None and slot.current.starting()):
                # The last one still drains (a third has no place on the stats page); or see first what comes
                # of the one that starts.
                return False
            else:
                # With nobody serving, too: the new settings may be what helps a slot whose workers die.
                self._new = slot.coming = spawn(slot, self.settings)
                if self._new is None:
                    self.error = f"no process for the new worker {slot.index}"
        return True

    def failed(self, slot: Slot, error: str) -> None:
        """The new worker of `slot` died before it served."""
        self.error = f"the new worker {slot.index} failed: {error}"

    def fail(self, error: str) -> None:
        """End it for another reason, and say so to whoever asked."""
        self.error = error
        self.finish()

    def finish(self) -> None:
        for caller in self.callers:
            if self.error:
                caller.fail(self.error)
            else:
                caller.answer({"ok": True, "workers": self._all})
        self.callers.clear()
