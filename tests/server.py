"""Runs a real chatcore server for tests: starts it, asks it how it is, and ends it.

Nothing here imports chatcore: a server is a process with a port, a data
directory, a control socket and a log.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import apsw

from .services import production

ROOT = Path(__file__).parents[1]
# Longer than anything takes on a machine that is busy with something else; tests wait for events,
# so only what fails ever waits so long.
PATIENCE_S = 20.0

# Settings of every server of the tests. Hashing passwords is not what most tests are about, and
# a test is faster than a typist.
QUICK: Mapping[str, str] = {
    "CHATCORE_ACCOUNTS_PASSWORD_HASH_MEMORY_KIB": "8",
    "CHATCORE_ACCOUNTS_PASSWORD_HASH_TIME": "1",
    "CHATCORE_RATES_MESSAGES_PER_S": "10000",
    "CHATCORE_RATES_MESSAGES_BURST": "10000",
}

T = TypeVar("T")


@contextlib.contextmanager
def _hold_write_lock(data: Path) -> Iterator[None]:
    """Keep the writer from writing to the embedded store: it looks like a disk that hangs."""
    db = apsw.Connection(str(data / "chatcore.db"), flags=apsw.SQLITE_OPEN_READWRITE)
    db.set_busy_timeout(int(PATIENCE_S * 1000))
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        db.execute("ROLLBACK")
        db.close()


@dataclass(frozen=True)
class Backend:
    """Where a server keeps its data and how its workers hear of each other, as settings in the environment.

    ``prepare`` is given the data directory of a new server, so that a backend that is shared between
    servers can give each its own names in it. ``stall`` makes writes to the store of a data directory
    hang until it is left. ``file``: the database in the data directory, if it is there at all.
    """

    name: str
    prepare: Callable[[Path], Mapping[str, str]]
    stall: Callable[[Path], AbstractContextManager[None]]
    file: str | None = None
    # Removes what earlier tests left, where what a query costs grows with what is there.
    empty: Callable[[Path], None] = lambda data: None
    # Between two messages of one talker in tests of traffic: what is written there, must be read again and again.
    pace_s: float = 0.0


#: The backends of the end-to-end tests, each of which runs on all; `conftest.py` of e2e makes a parameter of it.
BACKENDS = (
    Backend("sqlite-local", prepare=lambda data: {}, stall=_hold_write_lock, file="chatcore.db"),
    Backend("mongodb-redis", prepare=production.prepare, stall=production.stall, empty=production.empty, pace_s=0.5),
)


def environment(settings: Mapping[str, object] | None = None) -> dict[str, str]:
    """The environment of a command: no settings of this machine's, then the given ones.

    A setting is named as in the TOML file (``limits.backlog``) or as the whole variable.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("CHATCORE_")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    for name, value in (settings or {}).items():
        variable = name if name.startswith("CHATCORE_") else "CHATCORE_" + name.replace(".", "_").upper()
        env[variable] = str(value)
    return env


def command(
    *arguments: object,
    settings: Mapping[str, object] | None = None,
    stdin: str = "",
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``chatcore ARGUMENTS`` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "chatcore", *map(str, arguments)],
        env=environment(settings),
        input=stdin,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def eventually(condition: Callable[[], T], what: str = "", patience_s: float = PATIENCE_S) -> T:
    """The first true value of ``condition``, asked again and again (for things that raise no event)."""
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {patience_s} s: {what or condition}"
        time.sleep(0.01)
    return value


def _socket_inode(port: int, peer_port: int) -> int:
    """The inode of the socket of 127.0.0.1:port that is connected to 127.0.0.1:peer_port (0: no process has it).

    Asked by netlink (sock_diag(7)), for just this one: /proc/net/tcp lists thousands after some hundred
    tests, and is read only where the kernel knows no sock_diag (which looks as if there were no such socket).
    """
    loopback = socket.inet_aton("127.0.0.1")
    any_cookie = b"\xff" * 8
    one = struct.pack("!HH16s16s", port, peer_port, loopback, loopback) + struct.pack("=I", 0) + any_cookie
    query = struct.pack("=BBBBI", socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + one
    by_family, request = 20, 1
    header = struct.pack("=IHHII", 16 + len(query), by_family, request, 1, 0)
    inet_diag = 4
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, inet_diag) as netlink:
        netlink.send(header + query)
        reply = netlink.recv(8192)
    _, kind = struct.unpack_from("=IH", reply)
    # Without such a connection the kernel finds the socket that listens on the port.
    if kind != by_family:
        return _socket_inode_in_proc(port, peer_port)
    if struct.unpack_from("!HH", reply, 16 + 4) != (port, peer_port):
        return 0
    # struct inet_diag_msg: four bytes, the id of the socket, four numbers, the inode.
    return int(struct.unpack_from("=I", reply, 16 + 4 + 48 + 16)[0])


def _socket_inode_in_proc(port: int, peer_port: int) -> int:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if [int(address.rpartition(":")[2], 16) for address in fields[1:3]] == [port, peer_port]:
            return int(fields[9])
    return 0


class Server:
    """``chatcore serve`` on a free port of 127.0.0.1. Its log goes to ``<data>.log``."""

    def __init__(
        self,
        data: Path,
        *,
        backend: Backend = BACKENDS[0],
        settings: Mapping[str, object] | None = None,
        config: Path | None = None,
        workers: int = 2,
        port: int = 0,
        quick: bool = True,
        errors: str | None = None,
        launcher: tuple[str, ...] = ("chatcore",),
        extra: Mapping[str, str] | None = None,
    ) -> None:
        """``errors``: which errors in its log are what the test is about (a pattern). ``launcher``: the module to
        run, with arguments before ``serve``. ``extra``: more of its environment."""
        self.data = data
        self.backend = backend
        self.settings = {**(QUICK if quick else {}), **backend.prepare(data), **(settings or {})}
        self.config = config
        self.workers = workers
        self.errors = errors
        self.launcher = launcher
        self.extra = dict(extra or {})
        self.port = port
        self.log_path = data.with_name(data.name + ".log")
        self.process: subprocess.Popen[bytes]
        self.ended = True

    # --- life -------------------------------------------------------------------
    def start(self) -> Server:
        """Start it and wait until it says where it listens."""
        options = ["--data", str(self.data), "--workers", str(self.workers), "--port", str(self.port)]
        if self.config is not None:
            options += ["--config", str(self.config)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.launcher, "serve", *options],
                cwd=self.data.parent,
                env={**environment(self.settings), **self.extra},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                process_group=0,
            )
        self.ended = False
        try:
            self.port = self._read_port()
        except BaseException:
            self.kill()
            raise
        return self

    def _read_port(self) -> int:
        """The port, from the line that says that the server is ready."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENCE_S
        said = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"stop" not in said:  # its last line
                ready = selector.select(deadline - time.monotonic())
                chunk = os.read(self.process.stdout.fileno(), 65536) if ready else b""
                if not chunk:
                    raise AssertionError(f"the server did not get ready: {said!r}\n{self.log()}")
                said += chunk
        match = re.search(rb"is ready: .* on http://127\.0\.0\.1:(\d+)", said)
        assert match, f"no address in {said!r}"
        return int(match[1])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the supervisor."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end; the exit code."""
        code = self.process.wait(PATIENCE_S)
        self._close()
        return code

    def stop(self) -> None:
        """End it as an operator does, and see that it ends well."""
        if self.ended:
            return
        self.signal(signal.SIGTERM)
        try:
            code = self.wait()
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server did not stop within {PATIENCE_S} s\n{self.log()}") from None
        assert code == 0, f"the server ended with {code}\n{self.log()}"
        self.check_log()

    def kill(self) -> None:
        """Leave nothing running, whatever happened (its process group: workers too)."""
        if self.ended:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._close()

    def _close(self) -> None:
        self.ended = True
        if self.process.stdout is not None:
            self.process.stdout.close()

    # --- what it says -------------------------------------------------------------
    def log(self) -> str:
        """Its log until now."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def check_log(self) -> None:
        """A server that was used as it is meant to has no errors to tell of."""
        bad = [line for line in self.log().splitlines() if " ERROR " in line or "Traceback" in line]
        if self.errors is not None:
            bad = [line for line in bad if not re.search(self.errors, line)]
        assert not bad, "the server's log has errors:\n" + self.log()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return "127.0.0.1", self.port

    def ctl(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """``chatcore ctl`` for this server."""
        return command("ctl", *arguments, "--data", self.data)

    def ask(self, cmd: str, **fields: object) -> dict[str, Any]:
        """The same without the cost of a process: one line to the control socket, one line back."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(PATIENCE_S)
            # Paths of temporary directories may be longer than an address can be.
            directory = os.open(self.data / "run", os.O_PATH | os.O_DIRECTORY)
            try:
                connection.connect(f"/proc/self/fd/{directory}/control.sock")
            finally:
                os.close(directory)
            connection.sendall(json.dumps({"cmd": cmd, **fields}).encode() + b"\n")
            with connection.makefile("rb") as lines:
                answer: dict[str, Any] = json.loads(lines.readline())
        assert answer.get("ok"), answer
        return answer

    def pids(self) -> dict[int, int]:
        """Process ids of the serving workers, by slot."""
        workers = self.ask("status")["workers"]
        return {w["slot"]: w["pid"] for w in workers if w["state"] == "ready"}

    def store_pids(self) -> dict[str, int]:
        """Process ids of the embedded store's writer and indexer, by name; those that are ready."""
        processes = self.ask("status")["store_processes"]
        return {p["name"]: p["pid"] for p in processes if p["state"] == "ready"}

    def slot_of(self, client_port: int) -> int | None:
        """Which worker has the connection that comes from a port of this machine (None: no serving one).

        The kernel spreads connections by a hash that a test cannot foresee, and the status page is a tick
        old; /proc shows at once which process holds the server's end of a connection.
        """
        inode = _socket_inode(self.port, client_port)
        if not inode:
            return None
        for slot, pid in self.pids().items():
            try:
                descriptors = os.listdir(f"/proc/{pid}/fd")
            except OSError:  # the worker is gone
                continue
            for fd in descriptors:
                try:
                    if os.readlink(f"/proc/{pid}/fd/{fd}") == f"socket:[{inode}]":
                        return slot
                except OSError:
                    continue
        return None
