"""The shared stats page: the parent reads what a worker writes."""

from __future__ import annotations

import os
import signal
import time

import pytest

from chatcore.supervisor.stats import (
    CELL_BYTES,
    CELLS_PER_SLOT,
    ERROR_BYTES,
    METRICS_BYTES,
    METRICS_OFFSET,
    PartHealth,
    StatsCell,
    StatsPage,
    WorkerState,
    _Field,
)

from .harness import eventually

FIELDS = [name for name, value in vars(StatsCell).items() if isinstance(value, _Field)]


def test_what_a_child_writes_its_parent_reads() -> None:
    page = StatsPage(4)
    cell = page.cell(2, 1)
    cell.reset(nonce=77)
    pid = os.fork()
    if pid == 0:
        cell.pid = os.getpid()
        cell.messages_in += 5
        cell.store_health = PartHealth.OK
        cell.error = "it broke"
        cell.metrics = {"cache": {"l1": 7}}
        cell.ready()
        signal.pause()
    try:
        eventually(lambda: cell.state == WorkerState.READY)
        assert (cell.pid, cell.nonce, cell.messages_in, cell.store_health) == (pid, 77, 5, PartHealth.OK)
        assert cell.error == "it broke"
        assert cell.metrics == {"cache": {"l1": 7}}
        assert abs(time.monotonic_ns() - cell.heartbeat_ns) < 20e9
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert cell.messages_in == 5  # still to be read after its death


def test_cells_and_fields_do_not_overlap() -> None:
    page = StatsPage(3)
    cells = [page.cell(slot, index) for slot in range(3) for index in range(CELLS_PER_SLOT)]
    for at, cell in enumerate(cells):
        for number, name in enumerate(FIELDS):
            setattr(cell, name, at * 1000 + number)
        cell.error = f"error {at}"
        for turn in range(3):
            cell.metrics = {"at": at, "turn": turn, "": "x" * (METRICS_BYTES - 100)}
    for at, cell in enumerate(cells):
        assert [getattr(cell, name) for name in FIELDS] == [at * 1000 + number for number in range(len(FIELDS))]
        assert cell.error == f"error {at}"
        metrics = cell.metrics
        assert metrics is not None
        assert (metrics["at"], metrics["turn"]) == (at, 2)


def test_a_new_worker_finds_nothing_of_the_last_one() -> None:
    cell = StatsCell.private()
    for name in FIELDS:
        setattr(cell, name, 2**64 - 1)
    cell.error = "x" * 1000
    cell.metrics = {"old": 1}
    cell.metrics = {"old": 2}
    cell.reset(nonce=5)
    assert {name: getattr(cell, name) for name in FIELDS if name not in ("nonce", "started_ns")} == dict.fromkeys(
        [name for name in FIELDS if name not in ("nonce", "started_ns")], 0
    )
    assert cell.nonce == 5
    assert cell.error == ""
    assert cell.metrics is None


def test_only_what_fits() -> None:
    cell = StatsCell.private()
    for value in (-1, 2**64):
        with pytest.raises(ValueError, match=r"out of bounds|invalid value"):
            cell.connections = value
    cell.error = "é" * CELL_BYTES
    assert cell.error.rstrip("\ufffd") == "é" * (ERROR_BYTES // 2)
    cell.metrics = {"fits": True}
    with pytest.raises(ValueError, match="do not fit"):
        cell.metrics = {"": "x" * METRICS_BYTES}
    assert cell.metrics == {"fits": True}
    page = StatsPage(2)
    for slot, index in ((2, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(IndexError):
            page.cell(slot, index)


def test_a_worker_that_ends_while_it_writes_leaves_the_metrics_before() -> None:
    memory = memoryview(bytearray(CELL_BYTES))
    cell = StatsCell(memory)
    for number in range(1, 5):
        cell.metrics = {"number": number}
        before = bytes(memory)
        cell.metrics = {"number": number + 1}
        after = bytes(memory)
        changed = [at for at in range(METRICS_OFFSET, CELL_BYTES) if before[at] != after[at]]
        for so_far in changed:  # written up to here, in no order that is promised
            for left in (after[:so_far] + before[so_far:], before[:so_far] + after[so_far:]):
                memory[:] = left
                assert cell.metrics in ({"number": number}, {"number": number + 1})
        memory[:] = before
