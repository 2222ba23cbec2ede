"""A host of the campaign: a chatcore server that may be killed, stopped and started again on the same port and data."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..server import BACKENDS, Backend, Server

#: A supervisor that died leaves workers that drain; systemd, which restarts it, tries so often, for so long.
AGAIN_S = 0.25
RESTART_S = 40.0
#: A line of the log that begins one, and is no part of a traceback.
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT")


class Host(Server):
    """``launcher``: the module to run, with arguments before ``serve`` (the planted faults have one of their own)."""

    def __init__(
        self,
        data: Path,
        *,
        workers: int,
        settings: Mapping[str, object],
        extra: Mapping[str, str],
        backend: Backend = BACKENDS[0],
        launcher: tuple[str, ...] = ("chatcore",),
    ) -> None:
        super().__init__(data, workers=workers, settings=settings, backend=backend, launcher=launcher, extra=extra)
        self.away = False  # clients are not even to try
        self._once: set[int] = set()  # every process that it ever had

    def start(self) -> Host:
        """Start it; wait until it says that it is ready."""
        super().start()
        self._once |= {self.process.pid, *self.pids().values(), *self.store_pids().values()}
        return self

    def restart(self) -> None:
        """Start it again, as often as it takes: the last workers of a dead supervisor still hold the data."""
        deadline = time.monotonic() + RESTART_S
        while True:
            try:
                self.start()
                return
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(AGAIN_S)

    def kill_supervisor(self) -> None:
        """SIGKILL it alone; its workers see it, drain and end."""
        self._once |= {*self.pids().values(), *self.store_now().values()}
        self.process.kill()
        self.process.wait()
        self._close()

    def status(self) -> dict[str, Any]:
        """The status that it reports."""
        return self.ask("status")

    def workers_now(self) -> dict[int, int]:
        """Pids of serving workers by slot; empty if the supervisor does not answer."""
        try:
            pids = self.pids()
        except (OSError, AssertionError, ValueError):
            return {}
        self._once |= set(pids.values())
        return pids

    def store_now(self) -> dict[str, int]:
        """Pids of the store's processes that are ready, by name; empty if the supervisor does not answer."""
        try:
            pids = self.store_pids()
        except (OSError, AssertionError, ValueError):
            return {}
        self._once |= set(pids.values())
        return pids

    def processes(self) -> list[int]:
        """The supervisor, its workers, and the processes of the store."""
        return [self.process.pid, *self.workers_now().values(), *self.store_now().values()]

    def end(self) -> None:
        """Leave nothing running, orphans included."""
        with contextlib.suppress(Exception):
            self.workers_now()
            self.store_now()
        self.kill()
        for pid in self._once:
            with contextlib.suppress(OSError):
                if str(self.data).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    def mishaps(self, allowed: str) -> list[str]:
        """Errors in its log that no fault explains, each with its traceback."""
        bad: list[str] = []
        inside = False
        for line in self.log().splitlines():
            if LOG_LINE.match(line):
                inside = re.search(r" (ERROR|CRITICAL) ", line) is not None
                if inside:
                    bad.append(line)
            elif inside:
                bad[-1] += "\n" + line
            elif line.startswith("Traceback"):
                inside = True
                bad.append(line)
        return [text for text in bad if not re.search(allowed, text.splitlines()[0])]
