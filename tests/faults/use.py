"""The resources that the processes of the servers use: memory, open files, tasks."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from .launch import TASKS_FILE
from .site import Site

LOOKS, LOOK_S = 5, 0.15
TOLD_S = 5.0


@dataclass(frozen=True)
class Use:
    """Of all hosts together; memory in KiB, without what processes share."""

    memory_kib: int
    files: int
    threads: int
    tasks: int

    def __str__(self) -> str:
        return f"{self.memory_kib / 1024:.1f} MiB, {self.files} files, {self.threads} threads, {self.tasks} tasks"


async def measure(site: Site) -> Use:
    """Now."""
    memory = files = threads = tasks = 0
    for host in site.hosts:
        workers = await asyncio.to_thread(host.workers_now)
        store = await asyncio.to_thread(host.store_now)
        for pid in (host.process.pid, *workers.values(), *store.values()):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            memory += sum(map(int, re.findall(r"^Private_\w+:\s+(\d+) kB", rollup, re.MULTILINE)))
            files += len(os.listdir(f"/proc/{pid}/fd"))
            threads += len(os.listdir(f"/proc/{pid}/task"))
        for pid in workers.values():
            tasks += await _tasks(host.data / "run", pid)
    return Use(memory, files, threads, tasks)


async def _tasks(folder: Path, pid: int) -> int:
    """How many asyncio tasks a worker has, as it writes on request (`launch.py`): the least of some looks, since what
    is on its way at the moment of one look (a round of queries each second, slow here) has tasks that end."""
    path = folder / TASKS_FILE.format(pid)
    counts: list[int] = []
    for _ in range(LOOKS):
        path.unlink(missing_ok=True)
        os.kill(pid, signal.SIGUSR2)
        async with asyncio.timeout(TOLD_S):
            while not path.exists() or not path.read_text():
                await asyncio.sleep(0.01)
        counts.append(int(path.read_text()))
        await asyncio.sleep(LOOK_S)
    return min(counts)
