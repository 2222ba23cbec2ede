"""Relays in C: uWebSockets, and the floor."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from .installed import FLOOR, NOT_SET_UP, package, uwebsockets, uwebsockets_library
from .relay import Relay


class UWebSockets(Relay):
    """servers/uwebsockets.c."""

    name = "uwebsockets"
    about = "uWebSockets' own publish and subscribe, called from C, no compression"

    def missing(self) -> str | None:
        if uwebsockets_library() is None:
            return NOT_SET_UP
        try:
            ctypes.CDLL("libuv.so.1")
        except OSError:
            return "libuv is missing: apt install libuv1"
        return uwebsockets().missing()

    def versions(self) -> dict[str, str]:
        return {"uWebSockets of socketify": package("socketify") or "not installed"}

    def settings(self) -> dict[str, str]:
        return {"maxBackpressure": "64 MiB (64 KiB)"}

    def command(self, port: int, workers: int, data: Path) -> list[str]:
        return [str(uwebsockets().program), "--port", str(port)]


class Floor(Relay):
    """servers/floor.c."""

    name = "floor"
    about = "a C loop over epoll: one send() of a prebuilt frame per delivery and nothing else"
    benches = frozenset({"fanout"})
    floor = True

    def missing(self) -> str | None:
        return FLOOR.missing()

    def versions(self) -> dict[str, str]:
        ran = subprocess.run(["cc", "-dumpfullversion"], capture_output=True, text=True, check=False)
        return {"cc": ran.stdout.strip() or "unknown"}

    def command(self, port: int, workers: int, data: Path) -> list[str]:
        return [str(FLOOR.program), "--port", str(port)]


PEERS = (UWebSockets(), Floor())
