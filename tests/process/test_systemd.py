"""The messages to systemd, over a real socket."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chatcore.supervisor.sdnotify import Notifier

from .harness import PATIENCE_S, Server, eventually, held

MakeServer = Callable[..., Server]


class Manager:
    """The service manager's end of the notify socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(PATIENCE_S)
        self.seen: list[str] = []

    def next(self) -> str:
        self.seen.append(self.socket.recv(4096).decode())
        return self.seen[-1]

    def until(self, start: str) -> str:
        """Read up to the first datagram that starts like this."""
        while not self.next().startswith(start):
            pass
        return self.seen[-1]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    one = Manager(str(tmp_path / "notify"))
    yield one
    one.socket.close()


def env(tmp_path: Path, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": str(tmp_path / "notify"), **more}


def test_the_life_of_a_service(server: MakeServer, manager: Manager, tmp_path: Path) -> None:
    go = tmp_path / "go"
    one = server(env=env(tmp_path), worker={"never_ready": str(go), "slot": 1})
    one.logged(r"worker 0 \(process \d+\) is ready")
    one.call("status")
    go.touch()
    manager.until("READY=1")
    assert any(line == "STATUS=serving: 1 of 2 workers ready" for line in manager.seen)
    manager.until("STATUS=serving: 2 of 2 workers ready")

    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    one.signal(signal.SIGHUP)
    reloading = manager.until("RELOADING=1").split("\n")
    assert reloading[1].startswith("MONOTONIC_USEC=")
    assert before <= int(reloading[1].partition("=")[2]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    manager.until("READY=1")

    one.signal(signal.SIGTERM)
    manager.until("STOPPING=1")
    assert one.ended() == 0


def test_a_reload_that_fails_ends_for_systemd_too(server: MakeServer, manager: Manager, tmp_path: Path) -> None:
    one = server(env=env(tmp_path)).ready()
    manager.until("READY=1")
    one.behave(exit=1)
    one.signal(signal.SIGHUP)
    manager.until("RELOADING=1")
    manager.until("READY=1")


def test_the_watchdog_is_fed_only_while_every_worker_ticks(
    server: MakeServer, manager: Manager, tmp_path: Path
) -> None:
    """The supervisor does not kill a worker that a debugger holds, but it stops feeding the watchdog."""
    one = server("--set", "timeouts.stuck_worker_ms=1000", workers=2, env=env(tmp_path, WATCHDOG_USEC="200000")).ready()
    manager.until("WATCHDOG=1")
    manager.until("WATCHDOG=1")
    pid = one.worker(0)["pid"]
    with held(pid):
        eventually(lambda: one.worker(0)["heartbeat_age_ms"] > 1200)
        manager.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                manager.next()
        manager.socket.settimeout(1.0)  # five periods
        with pytest.raises(TimeoutError):
            manager.until("WATCHDOG=1")
    manager.socket.settimeout(PATIENCE_S)
    manager.until("WATCHDOG=1")
    assert one.worker(0)["pid"] == pid


def test_another_process_watchdog_is_none_of_ours(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    assert Notifier(env(tmp_path, WATCHDOG_USEC="1000000", WATCHDOG_PID="1")).watchdog_s == 0
    assert Notifier(env(tmp_path, WATCHDOG_USEC="1000000", WATCHDOG_PID=str(os.getpid()))).watchdog_s == 0.5
    assert Notifier(env(tmp_path, WATCHDOG_USEC="1000000")).watchdog_s == 0.5
    assert Notifier(env(tmp_path, WATCHDOG_USEC="soon")).watchdog_s == 0
    assert Notifier({"WATCHDOG_USEC": "1000000"}).watchdog_s == 0
    manager.socket.close()


def test_without_systemd_nothing_happens_and_a_dead_one_does_no_harm(tmp_path: Path) -> None:
    Notifier({}).ready()
    Notifier(env(tmp_path)).ready()


def test_an_abstract_address() -> None:
    manager = Manager(f"\0chatcore-test-{os.getpid()}")
    one = Notifier({"NOTIFY_SOCKET": f"@chatcore-test-{os.getpid()}"})
    one.status("fine")
    one.status("fine")
    one.stopping()
    assert [manager.next(), manager.next()] == ["STATUS=fine", "STOPPING=1"]
    one.close()
    one.ready()
    manager.socket.close()
