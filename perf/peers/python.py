"""Relays in Python."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from .installed import NOT_SET_UP, ROOT, package
from .relay import Relay


class PythonRelay(Relay):
    """``servers/NAME_relay.py``."""

    packages: tuple[str, ...] = ()

    def missing(self) -> str | None:
        return None if all(map(package, self.packages)) else NOT_SET_UP

    def versions(self) -> dict[str, str]:
        found = {name: package(name) or "not installed" for name in self.packages}
        return {"python": platform.python_version()} | found

    def command(self, port: int, workers: int, data: Path) -> list[str]:
        return [sys.executable, "-m", f"perf.peers.servers.{self.name}_relay", "--port", str(port)]

    def env(self, workers: int) -> dict[str, str]:
        return {"PYTHONPATH": str(ROOT)}


class Websockets(PythonRelay):
    """servers/websockets_relay.py."""

    name = "websockets"
    about = "websockets.broadcast on uvloop, no compression"
    packages = ("websockets", "uvloop")


class Picows(PythonRelay):
    """servers/picows_relay.py."""

    name = "picows"
    about = "picows on uvloop with aiofastnet, one shared buffer per broadcast"
    packages = ("picows", "aiofastnet", "uvloop")


PEERS = (Websockets(), Picows())
