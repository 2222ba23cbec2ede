"""Centrifuge, the Go library that Centrifugo is made of; JSON protocol (centrifugal.dev, "Client protocol")."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .base import BODY, REQUEST_ID, Peer, Send, Step, Wait
from .installed import CENTRIFUGE, SERVERS


class Centrifuge(Peer):
    """servers/centrifuge/main.go, as it comes: frames are merged when a client does not keep up."""

    name = "centrifuge"
    about = "Centrifuge (Go): JSON protocol, in memory, no history or presence, pooled buffers"
    benches = frozenset({"fanout", "send", "idle"})
    multi_process = True  # threads, in truth: workers are processors of one process
    path = "/connection/websocket"
    ack = '{"id":'
    error = '"error":{'
    ping = "{}"
    pong = "{}"

    write_delay = ""

    def missing(self) -> str | None:
        return CENTRIFUGE.missing()

    def versions(self) -> dict[str, str]:
        found = re.search(r"centrifuge v(\S+)", (SERVERS / "centrifuge" / "go.mod").read_text())
        assert found is not None
        versions = {"centrifuge": found[1]}
        if shutil.which("go") is not None:
            ran = subprocess.run(["go", "version", CENTRIFUGE.program], capture_output=True, text=True, check=False)
            versions["go"] = ran.stdout.strip().rpartition("go")[2]
        return versions

    def settings(self) -> dict[str, str]:
        return {
            "ClientQueueMaxSize": "64 MiB (1 MiB)",
            "WriteTimeout": "30 s (1 s)",
            "ClientChannelLimit": "1024 (128)",
            "PongTimeout": "none (10 s)",
        }

    def command(self, port: int, workers: int, data: Path) -> list[str]:
        command = [str(CENTRIFUGE.program), "-port", str(port), "-workers", str(workers)]
        return [*command, "-write-delay", self.write_delay] if self.write_delay else command

    def join(self, user: int, rooms: Sequence[int]) -> list[Step]:
        steps: list[Step] = [Send('{"id":1,"connect":{}}'), Wait('"connect":{')]
        for number, room in enumerate(rooms, 2):
            steps.append(Send(f'{{"id":{number},"subscribe":{{"channel":"{room}"}}}}'))
        if rooms:  # replies come in order, perhaps several in one frame
            steps.append(Wait(f'{{"id":{len(rooms) + 1},"subscribe":{{'))
        return steps

    def send(self, user: int, room: int) -> str:
        return f'{{"id":{REQUEST_ID},"publish":{{"channel":"{room}","data":"{BODY}"}}}}'


class CentrifugeBatched(Centrifuge):
    """With its write delay: fewer writes for a later delivery."""

    name = "centrifuge-batched"
    about = "the same, collecting messages of each client for 10 ms (WriteDelay, WriteWithTimer)"
    benches = frozenset({"fanout"})
    write_delay = "10ms"


PEERS = (Centrifuge(), CentrifugeBatched())
