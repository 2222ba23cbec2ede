"""A chatcore server in processes of its own, measured from the outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU time (seconds, user and kernel) and resident bytes of all workers together."""

    user_s: float
    kernel_s: float
    rss_bytes: int

    @property
    def cpu_s(self) -> float:
        """User and kernel together."""
        return self.user_s + self.kernel_s


class Server:
    """``with Server(workers=2) as server``: a server on a free port with its data in a temporary folder."""

    def __init__(self, *, workers: int, env: dict[str, str] | None = None) -> None:
        self._workers = workers
        self._env = env or {}
        self.url = ""

    def __enter__(self) -> Server:
        self._folder = tempfile.TemporaryDirectory(prefix="chatcore-perf-")
        self.data = Path(self._folder.name) / "data"
        self._log = open(Path(self._folder.name) / "log", "w+")
        command = [sys.executable, "-m", "chatcore", "serve", "--port", "0"]
        command += ["--workers", str(self._workers), "--data", str(self.data)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, text=True, env=os.environ | self._env
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            self._process.wait(START_TIMEOUT_S)
            self._log.seek(0)
            raise RuntimeError(f"the server did not start: {line}{self._log.read()}")
        self.url = found[0]
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def status(self) -> dict[str, Any]:
        """What ``chatcore ctl status --json`` says."""
        command = [sys.executable, "-m", "chatcore", "ctl", "status", "--json", "--data", str(self.data)]
        status: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return status

    def pids(self) -> list[int]:
        """The processes of the workers."""
        return [worker["pid"] for worker in self.status()["workers"]]

    def usage(self, pids: list[int]) -> Usage:
        """What these processes have used since they began."""
        tick = os.sysconf("SC_CLK_TCK")
        user = kernel = 0.0
        rss = 0
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            user += int(fields[11]) / tick
            kernel += int(fields[12]) / tick
            rss += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        return Usage(user, kernel, rss)
