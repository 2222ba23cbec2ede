"""The shared page on which every worker shows how it is.

An anonymous shared mapping, made before the first fork. Each slot has two cells, since a draining worker and
its successor overlap. Every field is 8 bytes, aligned, and has one writer (the worker; before its fork the
supervisor), so a reader never sees half a value; values of different fields may be of different moments.
Nobody is asked for anything: a worker that is stuck can be seen, and seeing costs it nothing.
"""

from __future__ import annotations

import mmap
import time
from enum import IntEnum
from typing import Final

CELLS_PER_SLOT: Final = 2
#: Fields first, the text of the last error behind them; with room for more fields.
CELL_BYTES: Final = 1024
ERROR_OFFSET: Final = 768
ERROR_BYTES: Final = CELL_BYTES - ERROR_OFFSET


class State(IntEnum):
    """What a worker says of itself."""

    STARTING = 0
    READY = 1
    DRAINING = 2
    STOPPED = 3


class Health(IntEnum):
    """What a worker says of a part that it uses."""

    UNKNOWN = 0
    OK = 1
    DOWN = 2


class _Field:
    """One unsigned 64-bit number at a fixed place in the cell."""

    def __init__(self, index: int) -> None:
        assert index * 8 < ERROR_OFFSET
        self.index = index

    def __get__(self, cell: StatsCell, owner: type[StatsCell]) -> int:
        return cell._words[self.index]

    def __set__(self, cell: StatsCell, value: int) -> None:
        cell._words[self.index] = value


class StatsCell:
    """One worker's numbers; plain attributes that live in shared memory.

    ``cell.messages_in += 1`` is all that it takes, for the one worker that owns the cell. A value must lie in
    0..2^64-1 (ValueError). To add a field, take the next number; numbers are never used again.
    """

    __slots__ = ("_text", "_words")

    pid = _Field(0)
    nonce = _Field(1)
    state = _Field(2)  # State
    heartbeat_ns = _Field(3)  # CLOCK_MONOTONIC, written by the worker's own loop
    started_ns = _Field(4)  # CLOCK_MONOTONIC
    connections = _Field(5)  # sockets of clients now
    websockets = _Field(6)  # upgraded ones now
    sessions = _Field(7)  # authenticated ones now
    attached = _Field(8)  # conversations somebody here is attached to now
    messages_in = _Field(9)  # requests since the start
    entries_appended = _Field(10)  # since the start
    deliveries = _Field(11)  # frames queued to clients since the start
    store_health = _Field(12)  # Health
    bus_health = _Field(13)  # Health
    loop_lag_max_ns = _Field(14)  # longest time that the loop was late since the start

    def __init__(self, memory: memoryview) -> None:
        """`memory`: CELL_BYTES writable bytes, 8-byte aligned."""
        self._words = memory[:ERROR_OFFSET].cast("Q")
        self._text = memory[ERROR_OFFSET:CELL_BYTES]

    @classmethod
    def private(cls) -> StatsCell:
        """A cell that nobody else sees, for a worker without a supervisor (tests)."""
        return cls(memoryview(bytearray(CELL_BYTES)))

    def reset(self, nonce: int) -> None:
        """Make it a new worker's. Only while no process writes to it."""
        for index in range(len(self._words)):
            self._words[index] = 0
        self._text[:] = bytes(ERROR_BYTES)
        self.nonce = nonce
        self.started_ns = time.monotonic_ns()

    def beat(self) -> None:
        """Say that the loop ticks; called from the loop itself, a few times each second."""
        self.heartbeat_ns = time.monotonic_ns()

    def ready(self) -> None:
        """Say that clients can be served from now on."""
        self.beat()
        self.state = State.READY

    @property
    def error(self) -> str:
        """Why the worker failed, in one line; empty if it did not say."""
        return bytes(self._text).rstrip(b"\0").decode("utf-8", "replace")

    @error.setter
    def error(self, text: str) -> None:
        data = text.encode("utf-8", "replace")[:ERROR_BYTES]
        self._text[:] = data.ljust(ERROR_BYTES, b"\0")


class StatsPage:
    """All cells. The mapping is inherited by fork and dies with the last process that has it."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        # Anonymous and shared; pages that no worker ever touches take no memory.
        self._memory = mmap.mmap(-1, slots * CELLS_PER_SLOT * CELL_BYTES)

    def cell(self, slot: int, which: int) -> StatsCell:
        """The cell `which` (0 or 1) of `slot`. Raises IndexError for one that does not exist."""
        if not (0 <= slot < self.slots and 0 <= which < CELLS_PER_SLOT):
            raise IndexError(f"no cell {which} of slot {slot}")
        at = (slot * CELLS_PER_SLOT + which) * CELL_BYTES
        return StatsCell(memoryview(self._memory)[at : at + CELL_BYTES])
