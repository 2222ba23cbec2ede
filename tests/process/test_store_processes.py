"""The writer and the indexer of the embedded store: forked first, replaced at once, ended last."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from chatcore.settings import Timeouts
from chatcore.supervisor.stats import StatsCell
from chatcore.supervisor.store_processes import StoreProcess, StoreSlot, WriterProcess
from chatcore.supervisor.worker_slot import BACKOFF_NS, BACKOFF_READY_MAX_NS, MS

from .harness import Server, alive, eventually, held
from .test_control import chatcore
from .test_systemd import Manager

MakeServer = Callable[..., Server]
DEBUG = {"CHATCORE_DEBUG": "1"}  # logs every fork
TIMEOUTS = Timeouts(stuck_writer_ms=1_000, stuck_worker_ms=15_000, worker_start_ms=30_000)


def worker_pids(one: Server) -> list[int]:
    return [worker["pid"] for worker in one.workers()]


def test_the_writer_is_ready_before_any_other_process_is_forked(server: MakeServer, tmp_path: Path) -> None:
    go = tmp_path / "go"
    one = server(store=True, worker={"writer": {"never_ready": str(go)}}, env=DEBUG)
    one.logged("the writer is process")
    # Time must pass here: many rounds of the supervisor.
    eventually(lambda: one.store("writer")["uptime_s"] > 0.5)
    assert one.store("writer")["state"] == "starting"
    assert (one.store("indexer")["pid"], one.store("indexer")["state"]) == (None, "waiting")
    assert worker_pids(one) == [None, None]
    assert one.log().count(" is process ") == 1
    go.touch()
    one.ready()
    order = re.findall(r"(the writer|the indexer|worker \d) (?:is process|\(process \d+\) is ready)", one.log())
    assert order[:2] == ["the writer", "the writer"]
    assert one.ask().line == "hello"
    eventually(lambda: one.store("indexer")["state"] == "ready")


def test_a_writer_that_shows_life_may_take_its_time_to_start(server: MakeServer, tmp_path: Path) -> None:
    """It may have to migrate the data folder."""
    go = tmp_path / "go"
    one = server(
        "--set",
        "timeouts.worker_start_ms=500",
        store=True,
        worker={"writer": {"never_ready": str(go)}},
        env=DEBUG,
    )
    one.logged("the writer is process")
    writer = eventually(lambda: found if (found := one.store("writer"))["uptime_s"] > 1.2 else None)
    assert writer["state"] == "starting"
    assert writer["heartbeat_age_ms"] < 500
    go.touch()
    one.ready()
    assert one.store("writer")["pid"] == writer["pid"]


def test_a_writer_that_starts_and_shows_no_life_is_killed(server: MakeServer) -> None:
    one = server(
        "--set",
        "timeouts.worker_start_ms=300",
        store=True,
        worker={"writer": {"never_ready": "/nonexistent", "silent": True}},
    )
    assert one.ended() == 1
    assert one.log().splitlines()[-1] == (
        "chatcore: no worker could start: it was not ready, and gave no sign of life, for 300 ms"
    )


@pytest.mark.parametrize(
    ("how", "reason"),
    [({"start_error": "the database is broken"}, "the database is broken"), ({"exit": 9}, "exit code 9")],
)
def test_the_server_ends_when_its_writer_cannot_start(server: MakeServer, how: dict[str, object], reason: str) -> None:
    one = server(store=True, worker={"writer": how})
    assert one.ended() == 1
    assert one.log() == f"chatcore: no worker could start: {reason}\n"
    assert one.printed() == ""


def test_the_store_ends_in_order_when_no_worker_can_start(server: MakeServer) -> None:
    one = server(store=True, worker={"start_error": "no"})
    assert one.ended() == 1
    assert re.search(r"the writer \(process \d+\) has left", one.log())
    assert one.log().splitlines()[-1] == "chatcore: no worker could start: no"


@pytest.mark.parametrize("name", ["writer", "indexer"])
def test_one_that_is_killed_is_replaced_and_the_workers_stay(server: MakeServer, name: str) -> None:
    one = server(store=True).ready()
    workers = worker_pids(one)
    pid = one.store_replaced(name, 0)["pid"]
    os.kill(pid, signal.SIGKILL)
    fresh = one.store_replaced(name, pid)
    assert (fresh["restarts"], fresh["error"]) == (1, "signal 9 (SIGKILL)")
    assert not alive(pid)
    one.logged(rf"the {name} \(process {pid}\) died: signal 9 \(SIGKILL\); restarting it in 0 ms")
    assert worker_pids(one) == workers


def test_a_writer_that_cannot_start_again_is_tried_until_it_can(server: MakeServer) -> None:
    one = server(store=True).ready()
    pid = one.store("writer")["pid"]
    one.behave(writer={"start_error": "disk full"})
    os.kill(pid, signal.SIGKILL)
    one.logged(r"(?s)(the writer \(process \d+\) died: disk full; restarting.*){3}")
    one.behave()
    one.store_replaced("writer", pid)
    assert one.ask().line == "hello"


def test_a_writer_that_stands_still_is_killed_and_replaced(server: MakeServer) -> None:
    one = server("--set", "timeouts.stuck_writer_ms=700", store=True).ready()
    workers, indexer = worker_pids(one), one.store_replaced("indexer", 0)["pid"]
    pid = one.store("writer")["pid"]
    os.kill(pid, signal.SIGSTOP)
    one.store_replaced("writer", pid)
    assert not alive(pid)
    one.logged(rf"the writer \(process {pid}\) is killed: its loop has not ticked for 700 ms")
    assert worker_pids(one) == workers
    assert one.store("indexer")["pid"] == indexer


def test_a_writer_held_by_a_debugger_is_spared(server: MakeServer) -> None:
    one = server("--set", "timeouts.stuck_writer_ms=300", store=True, workers=1).ready()
    pid = one.store("writer")["pid"]
    with held(pid):
        eventually(lambda: one.store("writer")["heartbeat_age_ms"] > 900)
    eventually(lambda: one.store("writer")["heartbeat_age_ms"] < 200)
    assert one.store("writer")["pid"] == pid


@contextmanager
def waiting_uninterruptibly() -> Iterator[int]:
    """A process in state D, as one that waits for the disk is: the kernel holds who calls vfork until its child
    ends."""
    code = "import ctypes; libc = ctypes.CDLL(None); libc.vfork(); libc.pause()"
    with subprocess.Popen([sys.executable, "-c", code], process_group=0) as process:
        status = Path(f"/proc/{process.pid}/status")
        try:
            eventually(lambda: "State:\tD" in status.read_text())
            yield process.pid
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_writer_that_waits_for_the_disk_is_excused_for_as_long_as_a_worker() -> None:
    with waiting_uninterruptibly() as pid:
        writer = WriterProcess(pid, 1, 0, StatsCell.private(), forked_ns=0, ready_ns=1 * MS)
        for now in range(600, 15_000, 200):
            assert writer.overdue(now * MS, TIMEOUTS) == ""
        assert "not ticked for 15000" in writer.overdue(15_002 * MS, TIMEOUTS)


def test_a_writer_that_the_disk_released_has_time_to_tick() -> None:
    with waiting_uninterruptibly() as pid:
        writer = WriterProcess(pid, 1, 0, StatsCell.private(), forked_ns=0, ready_ns=1 * MS)
        for now in range(600, 3_200, 200):
            assert writer.overdue(now * MS, TIMEOUTS) == ""
    assert writer.overdue(4_000 * MS, TIMEOUTS) == ""
    assert "not ticked for 1000" in writer.overdue(4_001 * MS, TIMEOUTS)


def test_what_makes_one_overdue() -> None:
    for kind, limit_ms in ((WriterProcess, 1_000), (StoreProcess, 15_000)):
        process = kind(os.getpid(), 1, 0, StatsCell.private(), forked_ns=1 * MS)
        assert process.overdue(30_001 * MS, TIMEOUTS) == ""
        assert "no sign of life" in process.overdue(30_002 * MS, TIMEOUTS)
        process.cell.heartbeat_ns = 20_000 * MS
        assert process.overdue(50_000 * MS, TIMEOUTS) == ""
        assert "no sign of life" in process.overdue(50_001 * MS, TIMEOUTS)
        process.ready_ns = process.cell.heartbeat_ns = 60_000 * MS
        assert process.overdue((60_000 + limit_ms) * MS, TIMEOUTS) == ""
        assert "not ticked" in process.overdue((60_001 + limit_ms) * MS, TIMEOUTS)
        process.excuse((60_001 + limit_ms) * MS, 1_000 * MS)
        assert process.overdue((60_001 + limit_ms) * MS, TIMEOUTS) == ""
        process.kill_ns = 200_000 * MS
        assert process.overdue(199_999 * MS, TIMEOUTS) == ""
        assert "deadline" in process.overdue(200_000 * MS, TIMEOUTS)


def test_one_early_exit_costs_no_pause_and_more_in_a_row_do() -> None:
    slot = StoreSlot("writer", lambda context: 0, WriterProcess, StatsCell.private())
    early = WriterProcess(1, 1, 0, StatsCell.private(), forked_ns=0, ready_ns=900 * MS)
    assert slot.failed(early, 1000 * MS, "it broke") == 0
    for number in range(12):
        most = min(BACKOFF_NS << number, BACKOFF_READY_MAX_NS)
        assert most / 2 <= slot.failed(early, 1000 * MS, "it broke") <= most
    assert slot.failed(early, 10_000 * MS, "it broke") == 0
    assert slot.failures == 0


def test_a_suspension_of_all_processes_does_not_count(server: MakeServer) -> None:
    one = server("--set", "timeouts.stuck_writer_ms=400", store=True, workers=1).ready()
    pids = [one.store_replaced(name, 0)["pid"] for name in ("writer", "indexer")]
    stopped = Path(f"/proc/{one.pid}/stat")
    os.killpg(one.pid, signal.SIGSTOP)
    eventually(lambda: stopped.read_text().rpartition(")")[2].split()[0] == "T")
    with one.connect() as connection:  # time must pass: nobody answers
        connection.sendall(b"hello\n")
        connection.settimeout(1.0)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        os.killpg(one.pid, signal.SIGCONT)
        assert one.read(connection).line == "hello"
    # More rounds of the supervisor.
    eventually(lambda: one.store("writer")["heartbeat_age_ms"] < 200)
    assert [one.store(name)["pid"] for name in ("writer", "indexer")] == pids
    assert one.store("writer")["restarts"] == 0


@pytest.mark.parametrize("how", ["term", "interrupt", "drain"])
def test_they_end_when_the_last_worker_has_left(server: MakeServer, tmp_path: Path, how: str) -> None:
    go = tmp_path / "go"
    one = server(store=True, worker={"drain_until": str(go)}).ready()
    one.store_replaced("indexer", 0)
    if how == "term":
        one.signal(signal.SIGTERM)
    elif how == "interrupt":
        os.killpg(one.pid, signal.SIGINT)  # a terminal sends it to all processes
    else:
        one.call("drain", wait=False)
    eventually(lambda: {worker["state"] for worker in one.workers()} == {"draining"})
    pid = one.store("writer")["pid"]
    assert one.store("writer")["state"] == "ready"
    # Workers that drain still write, so a writer that dies now is replaced, too.
    os.kill(pid, signal.SIGKILL)
    one.store_replaced("writer", pid)
    go.touch()
    assert one.ended() == 0
    left = re.findall(r"(worker|the writer|the indexer)[^(\n]*\(process \d+\) has left: exit code 0", one.log())
    assert left[:2] == ["worker", "worker"]
    assert sorted(left[2:]) == ["the indexer", "the writer"]
    assert not any(alive(pid) for pid in one.pids)


def test_quit_ends_all_at_once(server: MakeServer) -> None:
    one = server(store=True, worker={"ignore_term": True, "writer": {"ignore_term": True}}).ready()
    one.signal(signal.SIGQUIT)
    assert one.ended() == 0
    assert not any(alive(pid) for pid in one.pids)


def test_a_stop_while_the_writer_starts_leaves_nothing(server: MakeServer) -> None:
    one = server(store=True, worker={"writer": {"never_ready": "/nonexistent"}}, env=DEBUG)
    one.logged("the writer is process")
    one.workers()
    one.signal(signal.SIGTERM)
    assert one.ended() == 0
    assert not any(alive(pid) for pid in one.pids)


def test_they_see_the_supervisor_die(server: MakeServer) -> None:
    one = server(store=True).ready()
    one.store_replaced("indexer", 0)
    one.workers()
    assert len(one.pids) == 4
    one.process.kill()
    one.ended()
    for pid in one.pids:
        eventually(partial(lambda pid: not alive(pid), pid))


def test_reload_and_scale_leave_them_alone(server: MakeServer) -> None:
    one = server(store=True).ready()
    before = [one.store_replaced(name, 0)["pid"] for name in ("writer", "indexer")]
    workers = set(worker_pids(one))
    one.call("reload")
    one.call("scale", workers=3)
    assert not workers & set(worker_pids(one)[:2])
    assert [one.store(name)["pid"] for name in ("writer", "indexer")] == before


def test_they_hold_no_listener_and_no_pipe_of_the_supervisor(server: MakeServer) -> None:
    one = server(store=True).ready()
    pid = one.store("writer")["pid"]
    os.kill(pid, signal.SIGKILL)  # the first one was forked before any worker
    for name, before in (("writer", pid), ("indexer", 0)):
        fds = Path(f"/proc/{one.store_replaced(name, before)['pid']}/fd")
        links = [os.readlink(fd) for fd in fds.iterdir()]
        assert not any(link.startswith("socket:") for link in links)
        # Its own pipe for SIGTERM, and the one end that shows the supervisor's death.
        assert len({link for link in links if link.startswith("pipe:")}) == 2


def test_with_mongodb_there_are_none(server: MakeServer) -> None:
    mongo = ("--set", "store.mongodb_url=mongodb://127.0.0.1:1", "--set", "redis.url=redis://127.0.0.1:1")
    one = server(*mongo, store=True).ready()
    assert one.call("status")["store_processes"] == []
    assert one.ask().line == "hello"


def test_a_reload_does_not_change_the_kind_of_store(server: MakeServer, tmp_path: Path) -> None:
    """The workers of the embedded store need its writer, and no others do."""
    config = tmp_path / "chatcore.toml"
    config.write_text("")
    one = server("--config", str(config), store=True).ready()
    config.write_text("[store]\nmongodb_url = 'mongodb://127.0.0.1:1'\n[redis]\nurl = 'redis://127.0.0.1:1'\n")
    one.call("reload")
    one.logged("the kind of store stays as it is until the server is restarted")
    assert one.store("writer")["state"] == "ready"


def test_status_shows_both(server: MakeServer) -> None:
    one = server(store=True).ready()
    one.store_replaced("indexer", 0)
    pid = one.store("writer")["pid"]
    os.kill(pid, signal.SIGKILL)
    fresh = one.store_replaced("writer", pid)
    assert 0 <= fresh["heartbeat_age_ms"] < 5_000
    lines = chatcore("ctl", "status", "--data", str(one.data)).stdout.splitlines()
    assert re.fullmatch(
        rf"writer ready, process {fresh['pid']}, heartbeat \d+ ms ago, 1 restarts,"
        r" the last one after: signal 9 \(SIGKILL\)",
        lines[2],
    )
    assert re.fullmatch(r"indexer ready, process \d+, heartbeat \d+ ms ago, 0 restarts", lines[3])
    assert lines[4].split()[0] == "SLOT"


def test_systemd_waits_for_the_writer_and_its_watchdog_needs_one(server: MakeServer, tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    go = tmp_path / "go"
    try:
        one = server(
            "--set",
            "timeouts.stuck_worker_ms=1000",
            store=True,
            worker={"writer": {"never_ready": str(go)}},
            env={"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"},
        )
        manager.until("STATUS=serving: 0 of 2 workers ready, the writer is not ready")
        manager.until("EXTEND_TIMEOUT_USEC=")
        go.touch()
        manager.until("STATUS=serving: 2 of 2 workers ready")
        manager.until("WATCHDOG=1")
        # It cannot start again, and gives no sign of life.
        one.behave(writer={"never_ready": "/nonexistent", "silent": True})
        os.kill(one.store("writer")["pid"], signal.SIGKILL)
        eventually(lambda: (one.store("writer")["heartbeat_age_ms"] or 0) > 1_200)
        manager.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                manager.next()
        manager.socket.settimeout(1.0)  # ten intervals
        with pytest.raises(TimeoutError):
            manager.until("WATCHDOG=1")
    finally:
        manager.socket.close()
