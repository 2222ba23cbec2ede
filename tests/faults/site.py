"""The site of a run: hosts, the services behind them, and the means to harm each.

``sqlite-local`` is one host of four workers, since a data folder belongs to one server; ``mongodb-redis`` is two
hosts of two workers with folders of their own, which share a MongoDB-wire server and a Redis, each host through
a proxy of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import tempfile
import time
from pathlib import Path

from ..server import QUICK
from ..services.mongodb import MongoServer
from ..services.redis import RedisServer
from .clock import Clock
from .host import Host
from .proxy import Proxy

BACKENDS = ("sqlite-local", "mongodb-redis")
#: Of the small disk that holds the data (a fault fills it); a run of the long lane needs some 250 MB.
DISK_MB = 768
#: Killed processes give up their files in a moment.
UNMOUNT_S = 5.0


class Disk:
    """A tmpfs at a folder, if this process may mount one; else the folder as it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m,mode=0700", "chatcore-faults", str(folder)]
        try:
            self.why = subprocess.run(command, capture_output=True, text=True, check=False).stderr.strip()
        except OSError as exc:
            self.why = str(exc)
        self.small = not self.why
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Leave no byte."""
        with self._ballast.open("wb", buffering=0) as file:
            chunk = bytes(1 << 20)
            while chunk:
                try:
                    file.write(chunk)
                except OSError:
                    chunk = chunk[: len(chunk) // 2]

    def empty(self) -> None:
        """Make room again."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it, as soon as the last killed process is gone."""
        deadline = time.monotonic() + UNMOUNT_S
        while self.small and os.path.ismount(self.folder):
            lazily = ["--lazy"] if time.monotonic() > deadline else []
            subprocess.run(["umount", *lazily, str(self.folder)], check=False, capture_output=True)
            time.sleep(0.05)


class Site:
    """``async with Site(...)``: everything runs inside, nothing is left after."""

    def __init__(self, backend: str, *, launcher: tuple[str, ...] = ("chatcore",)) -> None:
        self.backend = backend
        self.hosts: list[Host] = []
        self.proxies: list[Proxy] = []
        self.mongo: MongoServer | None = None
        self.redis: RedisServer | None = None
        self.database = ""
        self._launcher = launcher
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Site:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="chatcore-faults-")))
        self.folder = folder
        self.disk = Disk(folder / "disk")
        self._stack.callback(self.disk.close)
        self.clock = Clock(folder)
        self._stack.callback(self.clock.close)
        if self.backend == "sqlite-local":
            # A write-ahead log keeps the blocks that it has: with the default of 16 MiB no client would notice a
            # full disk in the seconds for which it lasts here, as the log goes round in them. With small portions
            # the index is written all the time, and what is in memory does not grow over the whole run.
            small = {"CHATCORE_STORE_CHECKPOINT_PAGES": "200", "CHATCORE_STORE_PORTION_ENTRIES": "2000"}
            self._host("a", 4, small)
        else:
            await self._services()
            for name, proxy in zip("ab", self.proxies, strict=True):
                assert self.mongo is not None
                names = {
                    "CHATCORE_STORE_MONGODB_URL": self.mongo.url,
                    "CHATCORE_STORE_MONGODB_DATABASE": self.database,
                    "CHATCORE_REDIS_URL": f"redis://127.0.0.1:{proxy.port}",
                }
                self._host(name, 2, names)
        await asyncio.gather(*(asyncio.to_thread(host.start) for host in self.hosts))

    def _host(self, name: str, workers: int, names: dict[str, str]) -> None:
        host = Host(
            self.disk.folder / name, workers=workers, settings={**QUICK, **names}, extra=self.clock.environment,
            launcher=self._launcher,
        )  # fmt: skip
        host.log_path = self.folder / f"{name}.log"  # not on the disk that gets full
        self.hosts.append(host)
        self._stack.callback(host.end)

    async def _services(self) -> None:
        self.mongo = MongoServer()
        self._stack.callback(self.mongo.close)
        await asyncio.to_thread(self.mongo.__enter__)
        self.database = self._stack.enter_context(self.mongo.fresh_database())
        self.redis = RedisServer(self.folder / "redis")
        self._stack.callback(self.redis.kill)
        await asyncio.to_thread(self.redis.start)
        for _ in "ab":
            proxy = await Proxy(("127.0.0.1", self.redis.port)).start()
            self.proxies.append(proxy)
            self._stack.push_async_callback(proxy.close)

    def addresses(self) -> list[tuple[str, int]]:
        """Where clients may connect: a list of hosts, as an app has it; not which of them are well."""
        return [host.address for host in self.hosts]
