"""Relays in JavaScript, on Node.js and on Bun, and what they share."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .base import BODY, Peer, Send, Step, Wait
from .installed import NODE, SERVERS, node_package
from .relay import Relay


class NodePeer(Peer):
    """A program on Node.js with these packages of npm."""

    packages: tuple[str, ...] = ()

    def missing(self) -> str | None:
        if shutil.which("node") is None:
            return "Node.js is missing: apt install nodejs npm"
        return NODE.missing()

    def versions(self) -> dict[str, str]:
        ran = subprocess.run(["node", "--version"], capture_output=True, text=True, check=False)
        found = {"node": ran.stdout.strip().removeprefix("v")}
        for name in self.packages:
            found[name] = json.loads((node_package(name) / "package.json").read_text())["version"]
        return found

    def env(self, workers: int) -> dict[str, str]:
        return {"NODE_PATH": str(node_package("")), "NODE_ENV": "production"}


class Ws(NodePeer, Relay):
    """servers/ws.js."""

    name = "ws"
    about = "ws on Node.js: its broadcast, bufferutil, no compression"
    packages = ("ws", "bufferutil")

    def command(self, port: int, workers: int, data: Path) -> list[str]:
        return ["node", str(SERVERS / "ws.js"), "--port", str(port)]


class Bun(Relay):
    """servers/bun.js."""

    name = "bun"
    about = "Bun: its native topics (uWebSockets), no compression"

    @property
    def _program(self) -> Path:
        return node_package("@oven/bun-linux-x64") / "bin" / "bun"

    def missing(self) -> str | None:
        return None if self._program.exists() else NODE.missing() or "not for this kind of processor"

    def versions(self) -> dict[str, str]:
        ran = subprocess.run([self._program, "--version"], capture_output=True, text=True, check=False)
        return {"bun": ran.stdout.strip()}

    def settings(self) -> dict[str, str]:
        return {"backpressureLimit": "64 MiB (16 MiB)"}

    def command(self, port: int, workers: int, data: Path) -> list[str]:
        return [str(self._program), str(SERVERS / "bun.js"), "--port", str(port)]


class SocketIO(NodePeer):
    """servers/socketio.js. Engine.IO's packets (socket.io/docs/v4/engine-io-protocol): 0 open, 2 ping, 3 pong, 4
    message; Socket.IO's in them: 0 connect, 2 event, 3 acknowledgement."""

    name = "socketio"
    about = "Socket.IO on Node.js: rooms in memory, WebSocket only, bufferutil, no compression"
    benches = frozenset({"fanout", "send", "idle"})
    packages = ("socket.io", "bufferutil")
    path = "/socket.io/?EIO=4&transport=websocket"
    ping = "2"
    pong = "3"

    def command(self, port: int, workers: int, data: Path) -> list[str]:
        return ["node", str(SERVERS / "socketio.js"), "--port", str(port)]

    def join(self, user: int, rooms: Sequence[int]) -> list[Step]:
        connect: list[Step] = [Wait('0{"sid"'), Send("40"), Wait('40{"sid"')]
        if not rooms:
            return connect
        names = json.dumps(list(map(str, rooms)), separators=(",", ":"))
        return [*connect, Send(f'420["join",{names}]'), Wait("430[")]

    def send(self, user: int, room: int) -> str:
        return f'42["send","{room}","{BODY}"]'


PEERS = (Ws(), Bun(), SocketIO())
