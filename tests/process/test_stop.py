"""Every way to stop a server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from chatcore.supervisor import control

from .harness import Server, alive, eventually

MakeServer = Callable[..., Server]


def all_gone(one: Server) -> bool:
    return not any(alive(pid) for pid in one.pids) and not (one.data / "run" / "control.sock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_drains_and_ends_with_0(server: MakeServer, number: signal.Signals) -> None:
    one = server(worker={"drain_s": 0.3}).ready()
    one.signal(number)
    assert one.ended() == 0
    assert all_gone(one)
    assert one.log().count("has left: exit code 0") == 2


def test_ctrl_c_reaches_the_whole_group_and_is_still_a_drain(server: MakeServer) -> None:
    one = server(worker={"drain_s": 0.3}).ready()
    os.killpg(one.pid, signal.SIGINT)
    assert one.ended() == 0
    assert one.log().count("has left: exit code 0") == 2


def test_clients_that_come_during_the_drain_are_refused_at_once(server: MakeServer) -> None:
    one = server(worker={"drain_s": 30}).ready()
    port = one.port
    one.signal(signal.SIGTERM)
    eventually(lambda: {worker["state"] for worker in one.workers()} == {"draining"})

    def refused() -> bool:
        with socket.socket() as late:
            return late.connect_ex(("127.0.0.1", port)) != 0

    eventually(refused)
    assert one.process.poll() is None


def test_a_worker_that_does_not_drain_is_killed_at_the_deadline(server: MakeServer) -> None:
    one = server("--set", "server.drain_timeout_ms=200", worker={"ignore_term": True}).ready()
    one.signal(signal.SIGTERM)
    assert one.ended() == 1
    assert all_gone(one)
    assert one.log().count("is killed: it had not drained at the deadline") == 2


def test_a_second_interrupt_ends_it_at_once(server: MakeServer) -> None:
    one = server(worker={"ignore_term": True}).ready()
    one.signal(signal.SIGINT)
    one.logged("stopping")
    one.signal(signal.SIGINT)
    assert one.ended() == 0
    assert all_gone(one)


def test_quit_ends_it_at_once(server: MakeServer) -> None:
    one = server(worker={"ignore_term": True}).ready()
    one.signal(signal.SIGQUIT)
    assert one.ended() == 0
    assert all_gone(one)


def test_drain_answers_when_the_server_is_down(server: MakeServer) -> None:
    one = server(worker={"drain_s": 0.3}).ready()
    assert one.call("drain") == {"ok": True}
    assert all_gone(one)
    assert one.ended() == 0
    server().ready()  # the lock is free, too


def test_no_reload_while_it_stops(server: MakeServer) -> None:
    one = server(worker={"drain_s": 30}).ready()
    assert one.call("drain", wait=False) == {"ok": True}
    for cmd in ("reload", "scale"):
        with pytest.raises(control.ControlError, match="the server is stopping"):
            one.call(cmd, workers=3)
    one.signal(signal.SIGHUP)
    one.signal(signal.SIGTTIN)
    assert {worker["state"] for worker in one.workers()} == {"draining"}
    assert len(one.workers()) == 2


def test_the_supervisor_sleeps_while_workers_drain(server: MakeServer) -> None:
    one = server(worker={"slot": 1, "drain_s": 1.5}).ready()
    ticks = [0]

    def over() -> bool:
        with contextlib.suppress(OSError, IndexError):
            ticks.append(sum(map(int, Path(f"/proc/{one.pid}/stat").read_text().rpartition(")")[2].split()[11:13])))
        return one.process.poll() is not None

    over()
    one.signal(signal.SIGTERM)
    one.logged("worker 0 .* has left")
    eventually(over)
    assert (max(ticks) - ticks[1]) / os.sysconf("SC_CLK_TCK") < 0.5


def test_a_stop_while_starting_leaves_nothing(server: MakeServer) -> None:
    one = server(worker={"never_ready": "/nonexistent"}, env={"CHATCORE_DEBUG": "1"})
    one.logged("worker 1 is process")
    one.workers()
    one.signal(signal.SIGTERM)
    assert one.ended() == 0
    assert all_gone(one)
