"""The shared page on which every worker publishes its state, its counters and the metrics of its parts.

An anonymous shared mapping, made before the first fork. Each worker slot has two cells, since a draining worker and
its successor overlap; one pair more is for the writer and the indexer of the embedded store. Every field is 8 bytes,
aligned, and has one writer (the worker; before its fork the supervisor), so a reader never sees half a value; values
of different fields may be from different moments. Reading needs no answer from a worker: the supervisor sees a stuck
worker, too, and reading costs the worker nothing.
"""

from __future__ import annotations

import json
import mmap
import struct
import time
import zlib
from enum import IntEnum
from typing import Any, Final

from ..common.text import cut

CELLS_PER_SLOT: Final = 2
#: The fields come first, with room for more; then the text of the last error, then the metrics of the worker's parts.
ERROR_OFFSET: Final = 768
ERROR_BYTES: Final = 256
METRICS_OFFSET: Final = ERROR_OFFSET + ERROR_BYTES
#: The metrics as JSON, with their header: twice what a worker with MongoDB and Redis has.
METRICS_BYTES: Final = 4096
#: The metrics are double-buffered: a worker that dies or stops in the middle of a write leaves the previous ones.
METRICS_BUFFERS: Final = 2
CELL_BYTES: Final = METRICS_OFFSET + METRICS_BUFFERS * METRICS_BYTES
# Number of the write, length of the JSON that follows, checksum of both.
_METRICS_HEAD: Final = struct.Struct("<QII")


class WorkerState(IntEnum):
    """The state of a worker, as it declares it."""

    STARTING = 0
    READY = 1
    DRAINING = 2
    STOPPED = 3


class PartHealth(IntEnum):
    """The health of a part that a worker uses, as the worker sees it."""

    UNKNOWN = 0
    OK = 1
    DOWN = 2
    NONE = 3  # this server has no such part


class _Field:
    """One unsigned 64-bit number at a fixed offset in the cell."""

    def __init__(self, index: int) -> None:
        assert index * 8 < ERROR_OFFSET
        self.index = index

    def __get__(self, cell: StatsCell, owner: type[StatsCell]) -> int:
        return cell._words[self.index]

    def __set__(self, cell: StatsCell, value: int) -> None:
        cell._words[self.index] = value


class StatsCell:
    """One worker's fields: attributes that live in shared memory.

    The worker that owns the cell writes ``cell.messages_in += 1``, and that is all. A value must be in 0..2^64-1
    (ValueError). A new field takes the next number; a number is never used again.
    """

    __slots__ = ("_metrics", "_text", "_words")

    pid = _Field(0)
    nonce = _Field(1)
    state = _Field(2)  # WorkerState
    heartbeat_ns = _Field(3)  # CLOCK_MONOTONIC, written by the worker's own loop
    started_ns = _Field(4)  # CLOCK_MONOTONIC
    connections = _Field(5)  # client sockets open now
    websockets = _Field(6)  # of these, upgraded to WebSocket
    sessions = _Field(7)  # of these, authenticated
    attached = _Field(8)  # conversations with a session attached in this worker now
    messages_in = _Field(9)  # requests since the start
    entries_appended = _Field(10)  # since the start
    deliveries = _Field(11)  # frames queued to clients since the start
    store_health = _Field(12)  # PartHealth
    bus_health = _Field(13)  # PartHealth
    loop_lag_max_ns = _Field(14)  # longest delay of a tick since the start
    cache_health = _Field(15)  # PartHealth of the second level of the cache
    queue_health = _Field(16)  # PartHealth

    def __init__(self, memory: memoryview) -> None:
        """`memory`: CELL_BYTES writable bytes, 8-byte aligned."""
        self._words = memory[:ERROR_OFFSET].cast("Q")
        self._text = memory[ERROR_OFFSET:METRICS_OFFSET]
        self._metrics = [memory[at : at + METRICS_BYTES] for at in range(METRICS_OFFSET, CELL_BYTES, METRICS_BYTES)]

    @classmethod
    def private(cls) -> StatsCell:
        """A cell in private memory, for a worker without a supervisor (tests)."""
        return cls(memoryview(bytearray(CELL_BYTES)))

    def reset(self, nonce: int) -> None:
        """Clear the cell for a new worker. Only allowed while no process writes to it."""
        for index in range(len(self._words)):
            self._words[index] = 0
        self._text[:] = bytes(ERROR_BYTES)
        for buffer in self._metrics:
            buffer[: _METRICS_HEAD.size] = bytes(_METRICS_HEAD.size)
        self.nonce = nonce
        self.started_ns = time.monotonic_ns()

    def beat(self) -> None:
        """Record a heartbeat; the worker's own loop calls this a few times each second."""
        self.heartbeat_ns = time.monotonic_ns()

    def ready(self) -> None:
        """Declare that the worker serves clients from now on."""
        self.beat()
        self.state = WorkerState.READY

    @property
    def error(self) -> str:
        """Why the worker failed, in one line; empty if it recorded no reason."""
        return bytes(self._text).rstrip(b"\0").decode("utf-8", "replace")

    @error.setter
    def error(self, text: str) -> None:
        self._text[:] = cut(text, ERROR_BYTES).ljust(ERROR_BYTES, b"\0")

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The metrics that the worker published last, by part; None if it published none."""
        data = max(self._read_metrics(buffer) for buffer in self._metrics)[1]
        return json.loads(data) if data else None

    @metrics.setter
    def metrics(self, metrics: dict[str, Any]) -> None:
        """Publish a JSON object. Raises ValueError if it is too large."""
        data = json.dumps(metrics, separators=(",", ":")).encode()
        if len(data) > METRICS_BYTES - _METRICS_HEAD.size:
            raise ValueError(f"{len(data)} bytes of metrics do not fit")
        numbers = [self._read_metrics(buffer)[0] for buffer in self._metrics]
        buffer = self._metrics[numbers.index(min(numbers))]
        buffer[_METRICS_HEAD.size : _METRICS_HEAD.size + len(data)] = data
        number = max(numbers) + 1
        buffer[: _METRICS_HEAD.size] = _METRICS_HEAD.pack(number, len(data), zlib.crc32(data, number & 0xFFFFFFFF))

    @staticmethod
    def _read_metrics(buffer: memoryview) -> tuple[int, bytes]:
        """The number and the JSON of a buffer; 0 and nothing if it is empty or half written."""
        number, length, checksum = _METRICS_HEAD.unpack_from(buffer)
        data = bytes(buffer[_METRICS_HEAD.size : _METRICS_HEAD.size + length])
        return (number, data) if data and zlib.crc32(data, number & 0xFFFFFFFF) == checksum else (0, b"")


class StatsPage:
    """All cells. The mapping is inherited by fork and dies with the last process that has it."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        # Anonymous and shared; memory that no worker touches is never allocated.
        self._memory = mmap.mmap(-1, slots * CELLS_PER_SLOT * CELL_BYTES)

    def cell(self, slot: int, index: int) -> StatsCell:
        """Cell `index` (0 or 1) of worker slot `slot`. Raises IndexError if there is none."""
        if not (0 <= slot < self.slots and 0 <= index < CELLS_PER_SLOT):
            raise IndexError(f"no cell {index} of worker slot {slot}")
        at = (slot * CELLS_PER_SLOT + index) * CELL_BYTES
        return StatsCell(memoryview(self._memory)[at : at + CELL_BYTES])
