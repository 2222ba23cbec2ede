"""The shared page on which every worker shows how it is.

An anonymous shared mapping, made before the first fork. Each slot has two cells, since a draining worker and
its successor overlap. Every field is 8 bytes, aligned, and has one writer (the worker; before its fork the
supervisor), so a reader never sees half a value; values of different fields may be of different moments.
Nobody is asked for anything: a worker that is stuck can be seen, and seeing costs it nothing.
"""

from __future__ import annotations

import json
import mmap
import struct
import time
import zlib
from enum import IntEnum
from typing import Any, Final

CELLS_PER_SLOT: Final = 2
#: Fields first, with room for more; behind them the text of the last error, then the figures of its parts.
ERROR_OFFSET: Final = 768
ERROR_BYTES: Final = 256
FIGURES_OFFSET: Final = ERROR_OFFSET + ERROR_BYTES
#: The figures as JSON, with their header: twice what a worker with MongoDB and Redis has to tell.
FIGURES_BYTES: Final = 4096
#: Two places for figures, filled in turn: whoever dies or stands still while it writes leaves the last ones.
FIGURES_PLACES: Final = 2
CELL_BYTES: Final = FIGURES_OFFSET + FIGURES_PLACES * FIGURES_BYTES
# Number, length of what follows, checksum of both.
_FIGURES_HEAD: Final = struct.Struct("<QII")


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
    NONE = 3  # this server has no such part


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

    __slots__ = ("_figures", "_text", "_words")

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
    cache_health = _Field(15)  # Health of its second level
    queue_health = _Field(16)  # Health

    def __init__(self, memory: memoryview) -> None:
        """`memory`: CELL_BYTES writable bytes, 8-byte aligned."""
        self._words = memory[:ERROR_OFFSET].cast("Q")
        self._text = memory[ERROR_OFFSET:FIGURES_OFFSET]
        self._figures = [memory[at : at + FIGURES_BYTES] for at in range(FIGURES_OFFSET, CELL_BYTES, FIGURES_BYTES)]

    @classmethod
    def private(cls) -> StatsCell:
        """A cell that nobody else sees, for a worker without a supervisor (tests)."""
        return cls(memoryview(bytearray(CELL_BYTES)))

    def reset(self, nonce: int) -> None:
        """Make it a new worker's. Only while no process writes to it."""
        for index in range(len(self._words)):
            self._words[index] = 0
        self._text[:] = bytes(ERROR_BYTES)
        for place in self._figures:
            place[: _FIGURES_HEAD.size] = bytes(_FIGURES_HEAD.size)
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

    @property
    def figures(self) -> dict[str, Any] | None:
        """What the worker told last of its parts; None if it told nothing."""
        told = [self._told(place) for place in self._figures]
        data = max(told)[1]
        return json.loads(data) if data else None

    @figures.setter
    def figures(self, figures: dict[str, Any]) -> None:
        """Any JSON object; ValueError if there is no room for it."""
        data = json.dumps(figures, separators=(",", ":")).encode()
        if len(data) > FIGURES_BYTES - _FIGURES_HEAD.size:
            raise ValueError(f"{len(data)} bytes of figures do not fit")
        numbers = [self._told(place)[0] for place in self._figures]
        place = self._figures[numbers.index(min(numbers))]
        place[_FIGURES_HEAD.size : _FIGURES_HEAD.size + len(data)] = data
        number = max(numbers) + 1
        place[: _FIGURES_HEAD.size] = _FIGURES_HEAD.pack(number, len(data), zlib.crc32(data, number & 0xFFFFFFFF))

    @staticmethod
    def _told(place: memoryview) -> tuple[int, bytes]:
        """What is there, after its number; 0 and nothing for what is empty or just being written."""
        number, length, checksum = _FIGURES_HEAD.unpack_from(place)
        data = bytes(place[_FIGURES_HEAD.size : _FIGURES_HEAD.size + length])
        return (number, data) if data and zlib.crc32(data, number & 0xFFFFFFFF) == checksum else (0, b"")


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
