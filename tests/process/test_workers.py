"""Workers that die, get stuck or lose their supervisor."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from chatcore.settings import Timeouts
from chatcore.supervisor.listeners import Listeners
from chatcore.supervisor.stats import StatsCell
from chatcore.supervisor.worker_pool import WorkerPool
from chatcore.supervisor.worker_slot import (
    BACKOFF_NS,
    BACKOFF_READY_MAX_NS,
    BACKOFF_START_MAX_NS,
    MS,
    WorkerProcess,
    WorkerSlot,
)

from .harness import Server, alive, eventually, held

MakeServer = Callable[..., Server]


def gone(pid: int) -> bool:
    return not alive(pid)


def test_a_killed_worker_is_replaced_and_its_queue_is_not_lost(server: MakeServer) -> None:
    one = server(workers=1).ready()
    pid = one.worker(0)["pid"]
    with one.connect() as hanging, one.connect() as waiting, one.connect() as second:
        hanging.sendall(b"hang\n")
        eventually(lambda: one.worker(0)["connections"] == 1)  # it is inside; the others wait in the queue
        waiting.sendall(b"first\n")
        second.sendall(b"second\n")
        os.kill(pid, signal.SIGKILL)
        answers = [one.read(waiting), one.read(second)]
    fresh = one.replaced(0, pid)
    assert [answer.line for answer in answers] == ["first", "second"]
    assert {(answer.slot, answer.pid, answer.nonce) for answer in answers} == {(0, fresh["pid"], fresh["nonce"])}
    assert not alive(pid)
    one.logged(rf"worker 0 \(process {pid}\) died: signal 9 \(SIGKILL\)")


def test_a_worker_that_just_ends_is_replaced(server: MakeServer) -> None:
    one = server(workers=1).ready()
    pid = one.worker(0)["pid"]
    with one.connect() as connection:
        connection.sendall(b"die\n")
        one.replaced(0, pid)
    one.logged("died: exit code 7")
    assert one.worker(0)["error"] == "exit code 7"


def test_a_stuck_worker_is_killed_and_replaced_while_the_others_serve(server: MakeServer) -> None:
    one = server("--set", "timeouts.stuck_worker_ms=2500", workers=2).ready()
    pids = {slot: one.worker(slot)["pid"] for slot in (0, 1)}
    with one.connect() as connection:
        connection.sendall(b"hang\n")
        fresh = eventually(
            lambda: next((w for w in one.workers() if w["pid"] not in pids.values() and w["state"] == "ready"), None)
        )
    other = 1 - fresh["slot"]
    assert one.worker(other)["pid"] == pids[other]
    assert not alive(pids[fresh["slot"]])
    one.logged(rf"worker {fresh['slot']} \(process {pids[fresh['slot']]}\) is killed: its loop has not ticked for 2500")


def test_a_stalled_worker_gets_no_new_connections(server: MakeServer) -> None:
    """With N workers, one in N clients that left it and reconnected was given to the stalled worker again."""
    one = server("--set", "timeouts.still_worker_ms=300", workers=3).ready()
    pid = one.worker(1)["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        one.logged("worker 1 is stalled: new connections go to the other workers")
        assert {one.ask().slot for _ in range(40)} == {0, 2}
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: one.ask().slot == 1)
    assert one.worker(1)["pid"] == pid


def test_when_all_workers_are_stalled_connections_wait(server: MakeServer) -> None:
    """No other worker could take them: they wait in the queue until their worker goes on."""
    one = server("--set", "timeouts.still_worker_ms=300", workers=2).ready()
    pids = [one.worker(slot)["pid"] for slot in (0, 1)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: all(worker["heartbeat_age_ms"] > 600 for worker in one.workers()))
        connections = [one.connect() for _ in range(8)]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    for connection in connections:
        with connection:
            connection.sendall(b"hello\n")
            assert one.read(connection).line == "hello"


def test_a_worker_stopped_by_a_signal_is_stuck(server: MakeServer) -> None:
    one = server("--set", "timeouts.stuck_worker_ms=500", workers=1).ready()
    pid = one.worker(0)["pid"]
    os.kill(pid, signal.SIGSTOP)
    one.replaced(0, pid)


def test_the_time_of_a_suspension_of_all_processes_does_not_count(server: MakeServer) -> None:
    """Ctrl-Z and fg: the whole process group stops, and every heartbeat is old when it continues."""
    one = server("--set", "timeouts.stuck_worker_ms=1500", workers=2).ready()
    before = [worker["pid"] for worker in one.workers()]
    os.killpg(one.pid, signal.SIGSTOP)
    stopped = Path(f"/proc/{one.pid}/stat")
    eventually(lambda: stopped.read_text().rpartition(")")[2].split()[0] == "T")
    # Time must pass here: the kernel accepts a connection, and no process answers it.
    with one.connect() as connection:
        connection.sendall(b"hello\n")
        connection.settimeout(3.0)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        os.killpg(one.pid, signal.SIGCONT)
        assert one.read(connection).line == "hello"
    one.logged("the supervisor was suspended")
    assert one.ask().line == "hello"
    assert [worker["pid"] for worker in one.workers()] == before


def test_early_exits_make_the_pause_longer_up_to_a_limit() -> None:
    with socket.socket() as listener:  # plays no part
        slot = WorkerSlot(0, listener)
    never_ready = WorkerProcess(1, 1, 0, StatsCell.private(), forked_ns=0)
    pauses = [slot.failed(never_ready, 1000 * MS, "it broke") for _ in range(12)]
    for number, pause in enumerate(pauses):
        most = min(BACKOFF_NS << number, BACKOFF_START_MAX_NS)
        assert most / 2 <= pause <= most
    served_briefly = WorkerProcess(1, 1, 0, StatsCell.private(), forked_ns=0, ready_ns=900 * MS)
    assert slot.failed(served_briefly, 1000 * MS, "it broke") <= BACKOFF_READY_MAX_NS
    served_long = WorkerProcess(1, 1, 0, StatsCell.private(), forked_ns=0, ready_ns=1)
    assert slot.failed(served_long, 10_000 * MS, "it broke") == 0
    assert slot.failures == 0


def test_while_no_worker_ticks_new_connections_go_where_they_went_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole machine was suspended for a moment; then a worker that was stalled before got new connections again."""
    steered: list[tuple[int, ...]] = []
    monkeypatch.setattr("chatcore.supervisor.worker_pool.steer", lambda listener, chosen: steered.append(tuple(chosen)))
    timeouts = Timeouts(still_worker_ms=300)
    pool = WorkerPool(Listeners("127.0.0.1", 0), 2)
    try:
        for slot in pool.slots:
            slot.current = WorkerProcess(os.getpid(), 1, 0, StatsCell.private(), forked_ns=0, ready_ns=1 * MS)

        def step(now_ms: int, *ticked: int) -> None:
            for index in ticked:
                worker = pool.slots[index].current
                assert worker is not None
                worker.cell.heartbeat_ns = now_ms * MS
            pool.step(now_ms * MS, 0, timeouts, reloading=False)

        step(100, 0, 1)
        step(500, 0)
        assert steered == [(0,)]
        step(2_000)
        assert steered == [(0,)]
        step(2_100, 0, 1)
        assert steered == [(0,), ()]
    finally:
        for slot in pool.slots:
            slot.listener.close()


def test_what_makes_a_worker_overdue() -> None:
    timeouts = Timeouts(stuck_worker_ms=15_000, worker_start_ms=30_000)
    starting = WorkerProcess(os.getpid(), 1, 0, StatsCell.private(), forked_ns=0)
    assert starting.overdue(30_000 * MS, timeouts) == ""
    assert "not ready" in starting.overdue(30_001 * MS, timeouts)
    starting.excuse(30_001 * MS, 10_000 * MS)
    assert starting.overdue(30_001 * MS, timeouts) == ""
    serving = WorkerProcess(os.getpid(), 1, 0, StatsCell.private(), forked_ns=0, ready_ns=1_000 * MS)
    assert serving.overdue(16_000 * MS, timeouts) == ""
    assert "not ticked" in serving.overdue(16_001 * MS, timeouts)
    serving.cell.heartbeat_ns = 5_000 * MS
    assert serving.overdue(16_001 * MS, timeouts) == ""
    assert serving.overdue(90_000 * MS, timeouts) != ""
    serving.excuse(90_000 * MS, 70_000 * MS)
    assert serving.overdue(90_000 * MS, timeouts) == ""
    serving.kill_ns = 10_000 * MS
    assert "deadline" in serving.overdue(10_000 * MS, timeouts)


def test_workers_outlive_their_supervisor_only_to_drain_and_hold_the_lock_until_then(
    server: MakeServer, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    one = server(workers=2, worker={"drain_until": str(go)}).ready()
    pids = [worker["pid"] for worker in one.workers()]
    one.process.kill()
    one.ended()
    early = server(data=one.data)
    assert early.ended() == 1
    assert re.search(r"in use by the last workers \(pid [\d, ]+\) of a server that died", early.log())
    go.touch()
    for pid in pids:
        eventually(partial(gone, pid), "the workers end")
    assert server(data=one.data).ready().ask().line == "hello"


@pytest.mark.parametrize("until", [800, 3_200])
def test_a_worker_released_by_a_debugger_has_time_to_tick(until: int) -> None:
    timeouts = Timeouts(stuck_worker_ms=1_000)
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            worker = WorkerProcess(process.pid, 1, 0, StatsCell.private(), forked_ns=0, ready_ns=1 * MS)
            with held(process.pid):
                for now in range(600, until + 200, 200):
                    assert worker.overdue(now * MS, timeouts) == ""
            assert worker.overdue((until + 400) * MS, timeouts) == ""
            assert worker.overdue((until + 1_000) * MS, timeouts) == ""
            assert "not ticked" in worker.overdue((until + 1_001) * MS, timeouts)
        finally:
            process.kill()
