"""A process with a Redis bus: takes commands and reports events as JSON lines.

``python -m tests.bus.redis_worker <url> <name> <options as JSON>``
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from typing import Any

import uvloop

from chatcore.bus.redis import RedisBus

from .harness import Worker


class RedisWorker(Worker):
    """Starts one, and waits for its events."""

    def __init__(self, url: str, name: str, **options: Any) -> None:
        self.name = name
        self.events = []
        self._passed = self._numbers = 0
        self._changed = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bus.redis_worker", url, name, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()


def report(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


class Listener:
    """Reports everything but messages, which it counts; it reports those that begin with ``!``."""

    seen = 0
    bus: RedisBus

    def on_bus(self, channel: str, payload: bytes) -> None:
        self.seen += 1
        if payload.startswith(b"!"):
            report("message", channel=channel, payload=payload[:64].decode(), seen=self.seen)

    def on_resync_needed(self, why: str) -> None:
        report("resync", why=why)

    def on_peer_gone(self, peer: str) -> None:
        report("gone", peer=peer)

    def on_peer_subscribed(self, peer: str, channel: str) -> None:
        report("subscriber", peer=peer, channel=channel)


async def act(bus: RedisBus, listener: Listener, command: dict[str, Any]) -> None:
    """Do what a command says; the reply repeats its number."""
    cpu = time.process_time()
    match command["do"]:
        case "subscribe":
            await bus.subscribe(command["channels"])
        case "publish":
            # `n` messages, `tick` in each tick, over `channels` channels.
            payload = b"x" * command["size"]
            for i in range(command["n"]):
                bus.publish(f"c{i % command['channels']}", payload)
                if i % command["tick"] == command["tick"] - 1:
                    await asyncio.sleep(command.get("pause_s", 0))
            bus.publish("c0", b"!" + command["mark"].encode())
            await asyncio.sleep(0)
    report(
        "did", number=command["number"], peers=bus.peers, healthy=bus.healthy, seen=listener.seen,
        cpu=time.process_time() - cpu, cpu_all=time.process_time(), dropped=bus.stats.dropped, sent=bus.stats.sent,
        sessions=bus.stats.sessions,
    )  # fmt: skip


async def main(url: str, name: str, options: str) -> None:
    listener = Listener()
    bus = listener.bus = RedisBus(
        url, name, **({"queue_bytes": 8 << 20, "confirm_timeout_ms": 2000, "heartbeat_ms": 100} | json.loads(options))
    )
    await bus.start(listener)
    report("started", peers=bus.peers)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks = set()
    while line := await reader.readline():
        task = asyncio.create_task(act(bus, listener, json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await bus.close()
    report("closed", tasks=len(asyncio.all_tasks()) - 1)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
