"""A server under test: its processes, and what they use, seen from the outside."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .load.build import BUILD
from .peers.base import Peer, World

START_S = 60.0
STOP_S = 30.0
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Usage:
    """The resources that some processes have used since they began, and hold now.

    ``cpu_ns`` is exact; ``user_s`` and ``kernel_s`` are counted in ticks and only good for their ratio. ``written`` is
    in bytes that went or will go to a disk.
    """

    cpu_ns: int
    user_s: float
    kernel_s: float
    rss_bytes: int
    services_cpu_ns: int = 0
    written: int = 0

    def since(self, before: Usage) -> Usage:
        """The usage between; memory is the growth."""
        return Usage(
            self.cpu_ns - before.cpu_ns,
            self.user_s - before.user_s,
            self.kernel_s - before.kernel_s,
            self.rss_bytes - before.rss_bytes,
            self.services_cpu_ns - before.services_cpu_ns,
            self.written - before.written,
        )

    @property
    def kernel_share(self) -> float:
        """How much of the CPU time was the kernel's."""
        return self.kernel_s / (self.user_s + self.kernel_s) if self.user_s + self.kernel_s else 0.0


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in children.read_text().split()]
    return found


def _cpu_ns(pid: int) -> int:
    """Time on a processor, of all threads."""
    total = 0
    for schedstat in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += int(schedstat.read_text().split()[0])
    return total


def _written(pid: int) -> int:
    """Bytes, of all threads, also of those that have ended."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        key, _, value = line.partition(": ")
        if key == "write_bytes":
            return int(value)
    return 0


def usage(pids: list[int], services: list[int]) -> Usage:
    """The usage of these processes. What services write is added to what the others do."""
    cpu = rss = written = 0
    user = kernel = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            cpu += _cpu_ns(pid)
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            user += int(fields[11]) / TICK
            kernel += int(fields[12]) / TICK
            rss += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    for pid in (*pids, *services):
        with contextlib.suppress(OSError):  # ended, or of another user
            written += _written(pid)
    return Usage(cpu, user, kernel, rss, sum(_cpu_ns(pid) for pid in services), written)


class Running:
    """``with Running(peer, workers, world) as server``: a server that accepts connections, in a folder of its own.

    The folder is in the build folder of this repository: on a disk, as a server's data is.
    """

    def __init__(self, peer: Peer, workers: int = 1, world: World | None = None) -> None:
        self.peer = peer
        self.workers = workers
        self.world = world or World((), 0)
        self.port = 0

    def __enter__(self) -> Running:
        BUILD.mkdir(parents=True, exist_ok=True)
        self._stack = contextlib.ExitStack()
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"{self.peer.name}-", dir=BUILD))
            self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
            data = folder / "data"
            data.mkdir()
            self._services = self._stack.enter_context(self.peer.services(data))
            self.peer.prepare(data, self.world)
            self.port = _free_port()
            self._log = self._stack.enter_context((folder / "log").open("w+"))
            self._process = subprocess.Popen(
                self.peer.command(self.port, self.workers, data),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(self._services.env) | self.peer.env(self.workers),
                start_new_session=True,
            )
            self._stack.callback(self._stop)
            self._wait()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def usage(self) -> Usage:
        """The usage of its process tree."""
        return usage(tree(self._process.pid), list(self._services.pids))

    def log(self) -> str:
        """The end of what it has said."""
        self._log.flush()
        return Path(self._log.name).read_text(errors="replace")[-2000:]

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.peer.name} ended with {self._process.returncode}: {self.log()}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise RuntimeError(f"{self.peer.name} does not accept connections: {self.log()}")

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        # Whatever is left of it: its session is of this run alone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
