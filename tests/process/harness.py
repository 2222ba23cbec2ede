"""Starts servers with tiny real workers (`serve.py`), talks to them, and ends them."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

from chatcore.supervisor import control

ROOT = Path(__file__).parents[2]
PATIENCE_S = 20.0
T = TypeVar("T")
_numbers = itertools.count()


def eventually(condition: Callable[[], T | None], what: str = "", patience_s: float = PATIENCE_S) -> T:
    """The first true value of `condition`, asked again and again until the deadline."""
    deadline = time.monotonic() + patience_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {patience_s} s: {what or condition}")
        time.sleep(0.01)


@contextlib.contextmanager
def held(pid: int) -> Iterator[None]:
    """Hold a process as a debugger does."""
    libc = ctypes.CDLL(None, use_errno=True)
    seize, interrupt, detach = 0x4206, 0x4207, 17
    if libc.ptrace(seize, pid, None, None):
        pytest.skip(f"ptrace is not permitted here: {os.strerror(ctypes.get_errno())}")
    assert libc.ptrace(interrupt, pid, None, None) == 0
    os.waitpid(pid, 0)
    try:
        yield
    finally:
        assert libc.ptrace(detach, pid, None, None) == 0


def alive(pid: int) -> bool:
    """Whether the process runs; one that is dead but not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter: it went between the opening and the reading
        return False


class Answer(NamedTuple):
    slot: int
    pid: int
    nonce: int
    line: str


class Server:
    """`chatcore serve` on a free port of 127.0.0.1; `worker` is how its workers behave (see `tiny_worker`), and the
    writer and the indexer (see `tiny_store_process`), which it has if `store`."""

    def __init__(
        self,
        tmp_path: Path,
        *arguments: str,
        data: Path,
        workers: int | None = 2,
        port: int | None = 0,
        worker: dict[str, object] | None = None,
        store: bool = False,
        env: dict[str, str] | None = None,
    ) -> None:
        number = next(_numbers)
        self.data = data
        self.out = tmp_path / f"out-{number}"
        self.err = tmp_path / f"err-{number}"
        self._behaviour = tmp_path / f"worker-{number}.json"
        self.behave(**(worker or {}))
        options = ["--data", str(data)]
        if port is not None:
            options += ["--port", str(port)]
        if workers is not None:
            options += ["--workers", str(workers)]
        self.pids: set[int] = set()
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("serve.py")), "serve", *options, *arguments],
                cwd=tmp_path,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "CHATCORE_TEST_WORKER": str(self._behaviour),
                    "CHATCORE_TEST_STORE": "1" if store else "",
                    **(env or {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                process_group=0,
            )
        self.pid = self.process.pid

    def behave(self, **how: object) -> None:
        """Change the behaviour of the workers forked from now on."""
        fresh = self._behaviour.with_suffix(".new")
        fresh.write_text(json.dumps(how))
        fresh.rename(self._behaviour)

    # -- its output

    def printed(self) -> str:
        return self.out.read_text()

    def log(self) -> str:
        return self.err.read_text()

    def logged(self, pattern: str) -> None:
        """Wait for a line of the log that matches."""
        eventually(lambda: re.search(pattern, self.log()), f"{pattern!r} in the log:\n{self.log()}")

    def ready(self) -> Server:
        """Wait until it prints that it is ready."""

        def says_so() -> bool:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.log()}"
            return "is ready" in self.printed()

        eventually(says_so, "is ready")
        self.workers()
        return self

    @property
    def port(self) -> int:
        match = re.search(r"on http://127\.0\.0\.1:(\d+)", self.printed() or self.log())
        assert match
        return int(match[1])

    def call(self, cmd: str, **more: object) -> dict[str, Any]:
        return control.call(self.data, {"cmd": cmd, **more}, PATIENCE_S)

    def workers(self) -> list[dict[str, Any]]:
        status = self.call("status")
        workers: list[dict[str, Any]] = status["workers"]
        self.pids.update(process["pid"] for process in workers + status["store_processes"] if process["pid"])
        return workers

    def store(self, name: str) -> dict[str, Any]:
        """The status of the writer or the indexer."""
        found: dict[str, Any] = next(one for one in self.call("status")["store_processes"] if one["name"] == name)
        return found

    def store_replaced(self, name: str, pid: int) -> dict[str, Any]:
        """Wait until another process than `pid` is the ready writer or indexer."""

        def is_replaced() -> dict[str, Any] | None:
            found = self.store(name)
            return found if found["state"] == "ready" and found["pid"] != pid else None

        return eventually(is_replaced, f"{name} replaced; {self.log()}")

    def worker(self, slot: int) -> dict[str, Any]:
        """The serving worker of a slot; fails while there is none."""
        return next(worker for worker in self.workers() if worker["slot"] == slot and worker["state"] == "ready")

    def replaced(self, slot: int, pid: int) -> dict[str, Any]:
        """Wait until another process than `pid` serves the slot, and no other is left there."""

        def is_replaced() -> dict[str, Any] | None:
            ours = [worker for worker in self.workers() if worker["slot"] == slot]
            return ours[0] if len(ours) == 1 and ours[0]["state"] == "ready" and ours[0]["pid"] != pid else None

        return eventually(is_replaced, f"worker {slot} replaced; {self.log()}")

    # -- clients

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def ask(self, line: str = "hello") -> Answer:
        with self.connect() as connection:
            return self.ask_on(connection, line)

    @staticmethod
    def ask_on(connection: socket.socket, line: str = "hello") -> Answer:
        connection.sendall(line.encode() + b"\n")
        return Server.read(connection)

    @staticmethod
    def read(connection: socket.socket) -> Answer:
        with connection.makefile("r") as lines:
            slot, pid, nonce, line = lines.readline().split(maxsplit=3)
        return Answer(int(slot), int(pid), int(nonce), line.strip())

    # -- how it ends

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(PATIENCE_S)

    def end(self) -> None:
        """Leave nothing running, whatever the test did."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGQUIT)
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        with contextlib.suppress(ProcessLookupError):  # its group: workers that a dead supervisor left
            os.killpg(self.pid, signal.SIGKILL)
