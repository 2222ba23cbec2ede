"""The control socket and the commands that use it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from chatcore import __version__
from chatcore.supervisor import control

from .harness import ROOT, Server, eventually

MakeServer = Callable[..., Server]


def chatcore(*arguments: str, cwd: Path = ROOT, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "chatcore", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def raw(path: Path, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        connection.sendall(request)
        return connection.makefile("rb").readline()


def test_status_as_promised(server: MakeServer) -> None:
    one = server(workers=2).ready()
    done = chatcore("ctl", "status", "--json", "--data", str(one.data))
    status = json.loads(done.stdout)
    assert done.returncode == 0
    assert (status["version"], status["store"], status["bus"]) == (__version__, "ok", "ok")
    assert [worker["slot"] for worker in status["workers"]] == [0, 1]
    for worker in status["workers"]:
        assert worker["state"] == "ready"
        assert worker["connections"] == 0
        assert worker["pid"] in one.pids
        assert 0 <= worker["uptime_s"] < 60


def test_a_table_for_people(server: MakeServer) -> None:
    one = server(workers=2).ready()
    done = chatcore("ctl", "--data", str(one.data), "status")
    lines = done.stdout.splitlines()
    assert lines[0] == f"chatcore {__version__} serving on http://127.0.0.1:{one.port}"
    assert lines[1] == "store ok, bus ok, queue ok"
    assert lines[2].split()[:3] == ["SLOT", "PID", "STATE"]
    assert [line.split()[2] for line in lines[3:]] == ["ready", "ready"]


def metrics(l1: int, l2: int, missed: int, breaker: str = "closed") -> dict[str, Any]:
    """Some of the metrics of a worker with MongoDB and Redis."""
    roles = {"l1": l1, "l2": l2, "missed": missed, "refreshed": 0, "ratio": 0}
    return {
        "cache": {"kinds": {"roles": roles, "profiles": dict.fromkeys(roles, 0)}},
        "store": {
            "name": "mongodb",
            "pool": {"max": 25, "connections": 4, "busy": 1},
            "queue": {"waiting": 0, "waits": 3, "given_up": 2},
            "commands": {"find": 30, "insert": 10},
            "commands_failed": 1,
            "commands_ms": 80.0,
        },
        "breakers": {"cache": {"state": breaker, "failures": 5, "refused": 7, "opened": 1}},
    }


def test_status_shows_the_metrics_of_the_workers(server: MakeServer) -> None:
    one = server(workers=2, worker={"metrics": metrics(6, 2, 2)}).ready()
    status = one.call("status")
    assert [worker["metrics"] for worker in status["workers"]] == [metrics(6, 2, 2)] * 2
    assert (status["store"], status["cache"], status["queue"]) == ("ok", "none", "ok")
    assert status["reads"]["roles"] == {"l1": 12, "l2": 4, "missed": 4, "refreshed": 0, "ratio": 0.8}
    lines = chatcore("ctl", "status", "--data", str(one.data)).stdout.splitlines()
    assert lines[2:4] == [
        "reads from the cache: roles 80.0 % of 20",
        "store: 2 of 8 connections busy (at most 50), 80 commands of 2.0 ms, 2 failed; 0 wait for a connection,"
        " 4 gave up",
    ]
    assert lines[4].split()[0] == "SLOT"
    one.behave(metrics=metrics(0, 0, 0, "half_open"))
    chatcore("ctl", "reload", "--data", str(one.data))
    assert "not asked for now: cache (breaker half open)" in chatcore("ctl", "status", "--data", str(one.data)).stdout


def test_an_answer_longer_than_a_socket_takes_at_once(tmp_path: Path) -> None:
    answer = {"ok": True, "metrics": "x" * 3_000_000}
    server = control.ControlServer(tmp_path, lambda request, caller: caller.answer(answer))
    silent = socket.socket(socket.AF_UNIX)
    try:
        with ThreadPoolExecutor(1) as pool:
            silent.connect(str(control.socket_path(tmp_path)))
            silent.sendall(b"{}\n")
            asked = pool.submit(control.call, tmp_path, {"cmd": "status"}, 20.0)
            while not asked.done():
                for fd in server.filenos():
                    if select.select([fd], [], [], 0.01)[0]:
                        server.readable(fd)
                server.sweep()
            assert asked.result() == answer
    finally:
        silent.close()
        server.close()


def test_a_stuck_worker_can_be_seen(server: MakeServer) -> None:
    one = server(workers=1).ready()
    with one.connect() as connection:
        connection.sendall(b"hang\n")
        eventually(lambda: (now := one.worker(0))["heartbeat_age_ms"] > 400 and now["connections"] == 1)


def test_the_server_is_found_by_its_config_and_environment(server: MakeServer, tmp_path: Path) -> None:
    one = server().ready()
    file = tmp_path / "chatcore.toml"
    file.write_text(f"[server]\ndata = '{one.data}'\n")
    assert chatcore("ctl", "status", "--config", str(file)).returncode == 0
    assert chatcore("ctl", "status", CHATCORE_DATA=str(one.data)).returncode == 0
    assert chatcore("ctl", "status", "--data", "data", cwd=tmp_path).returncode == 0


def test_commands(server: MakeServer) -> None:
    one = server(workers=1).ready()
    data = ("--data", str(one.data))
    assert chatcore("ctl", "scale", "2", *data).stdout == "2 workers\n"
    assert chatcore("ctl", "reload", *data).stdout == "reloaded 2 workers\n"
    refused = chatcore("ctl", "scale", "0", *data)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "chatcore: workers = 0 is not allowed: it must be a whole number from 1 to 128\n"
    assert chatcore("ctl", "drain", *data).stdout == "stopped\n"
    assert one.ended() == 0


def test_drain_need_not_wait(server: MakeServer) -> None:
    one = server(worker={"drain_s": 30}).ready()
    assert chatcore("ctl", "drain", "--no-wait", "--data", str(one.data)).stdout == "draining\n"
    status = chatcore("ctl", "status", "--data", str(one.data)).stdout
    assert status.splitlines()[0].startswith(f"chatcore {__version__} stopping")
    assert one.process.poll() is None


def test_no_server_there_is_one_line(tmp_path: Path) -> None:
    for data in (tmp_path, tmp_path / "none"):
        done = chatcore("ctl", "status", "--data", str(data))
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"chatcore: no server runs on data directory {data}\n"
    assert not (tmp_path / "none").exists()


def test_the_socket_of_a_dead_server_is_no_server_and_does_not_stop_a_new_one(server: MakeServer) -> None:
    one = server().ready()
    one.process.kill()
    one.ended()
    assert control.socket_path(one.data).exists()
    with pytest.raises(control.ControlError, match="no server runs"):
        one.call("status")
    eventually(lambda: not [pid for pid in one.pids if Path(f"/proc/{pid}").exists()])
    server().ready()


def test_only_the_owner_may_ask(server: MakeServer) -> None:
    one = server().ready()
    path = control.socket_path(one.data)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(one.data.stat().st_mode) == 0o700


def test_a_path_longer_than_an_address_may_be(server: MakeServer, tmp_path: Path) -> None:
    one = server(data=tmp_path / ("d" * 90) / ("e" * 90)).ready()
    assert len(str(control.socket_path(one.data))) > 108
    assert one.call("status")["ok"]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"\n", "a request is one JSON object on a line"),
        (b"[]\n", "a request is one JSON object on a line"),
        (b"\xff\xfe\n", "a request is one JSON object on a line"),
        (b"{}\n", "unknown command None"),
        (b'{"cmd":"eat"}\n', "unknown command 'eat'"),
        (b'{"cmd":["status"]}\n', "unknown command ['status']"),
    ],
)
def test_a_malformed_request_is_refused(server: MakeServer, request_: bytes, expected: str) -> None:
    one = server(workers=1).ready()
    assert json.loads(raw(control.socket_path(one.data), request_)) == {"ok": False, "error": expected}
    assert one.call("status")["ok"]


def test_silent_and_endless_callers_do_no_harm(server: MakeServer) -> None:
    one = server(workers=1).ready()
    path = control.socket_path(one.data)
    silent = [socket.socket(socket.AF_UNIX) for _ in range(10)]
    for connection in silent:
        connection.connect(str(path))
    assert one.call("status")["ok"]
    with socket.socket(socket.AF_UNIX) as endless:
        endless.settimeout(20)
        endless.connect(str(path))
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for _ in range(1000):
                endless.sendall(b"x" * 4096)
            pytest.fail("4 MB without an end of line were taken")
    for connection in silent:
        connection.close()
    assert one.call("status")["ok"]


def test_mistakes_in_commands_are_one_line() -> None:
    for arguments in (("eat",), ("serve", "--prot", "1"), ("ctl",), ("ctl", "scale", "two"), ("user", "add"), ()):
        done = chatcore(*arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "--help" in done.stderr
    assert chatcore("serve", "--set", "history").stderr == "chatcore: --set history is not of the form NAME=VALUE\n"


def test_a_missing_password_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    done = chatcore("user", "add", "alice", "--data", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].endswith("no password was given; --password-stdin reads it from a pipe")
    assert "Traceback" not in done.stderr


def test_version_and_config() -> None:
    assert chatcore("--version").stdout == f"chatcore {__version__}\n"
    assert "port = 9\n" in chatcore("config", CHATCORE_PORT="9").stdout
    assert json.loads(chatcore("config", "--json", "--set", "limits.history=7").stdout)["limits.history"]["value"] == 7
