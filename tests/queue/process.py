"""A worker in a process of its own, to be killed and stopped::

    python -m tests.queue.process hang|stop|die LEASE_MS DELIVERIES sqlite DATA
    python -m tests.queue.process hang|stop|die LEASE_MS DELIVERIES redis URL PREFIX

It handles the topic t, and prints a line for each handler that begins and each line of its log.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from chatcore.queue.base import Job

from .harness import SETTINGS, Backend, backend, run


class Process:
    """Of the side that tests: starts it, reads its lines, ends it."""

    def __init__(self, mode: str, where: Backend, *, lease_ms: int, deliveries: int = 5) -> None:
        command = [sys.executable, "-m", __name__, mode, str(lease_ms), str(deliveries), *where.where()]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, cwd=Path(__file__).parents[2]
        )
        self.lines: list[str] = []

    async def line(self, text: str) -> None:
        """Read up to a line that contains the text.

        :raises AssertionError: it ended without.
        """
        assert self._process.stdout is not None
        while not self.lines or text not in self.lines[-1]:
            line = await asyncio.to_thread(self._process.stdout.readline)
            assert line, f"no line with {text!r}, but {self.lines}"
            self.lines.append(line.decode().rstrip())

    async def stands_still(self) -> None:
        """Wait until the kernel says that it is stopped."""
        while Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(") ")[2][0] != "T":
            await asyncio.sleep(0.005)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Without a word."""
        self._process.kill()
        self._process.wait()

    async def end(self) -> int:
        """Wait for its end; its exit code."""
        return await asyncio.to_thread(self._process.wait)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()


def main(mode: str, lease_ms: str, deliveries: str, *where: str) -> None:
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="log %(message)s")
    stopped = False

    async def handler(job: Job) -> None:
        nonlocal stopped
        print(f"begun {job.payload.decode()} delivery {job.delivery}", flush=True)
        if mode == "hang":
            await asyncio.sleep(3600)
        elif mode == "die":
            os._exit(9)
        elif mode == "stop" and not stopped:
            stopped = True
            os.kill(os.getpid(), signal.SIGSTOP)
            print("woken", flush=True)

    async def work() -> None:
        settings = replace(SETTINGS, lease_ms=int(lease_ms), deliveries=int(deliveries))
        async with backend(list(where)).worker(settings) as queue:
            queue.consume("t", handler)
            print("ready", flush=True)
            await asyncio.sleep(3600)

    run(work)


if __name__ == "__main__":
    main(*sys.argv[1:])
