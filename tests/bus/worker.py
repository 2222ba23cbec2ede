"""A process with a local bus: takes commands and reports events as JSON lines.

``python -m tests.bus.worker <run_dir> <name> <loop> <options as JSON>``
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import uvloop

from chatcore.bus.local import LocalBus


def report(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


class Listener:
    """Reports everything; with ``summary_only`` it counts messages and reports those that begin with ``!``."""

    bus: LocalBus
    summary_only = False
    seen = 0

    def on_bus(self, channel: str, payload: bytes) -> None:
        self.seen += 1
        if payload.startswith(b"publish:"):
            self.bus.publish(payload[8:].decode(), b"as asked")
        if not self.summary_only or payload.startswith(b"!"):
            report("message", channel=channel, payload=payload[:64].decode(), size=len(payload), seen=self.seen)

    def on_resync_needed(self, why: str) -> None:
        report("resync", why=why)

    def on_peer_gone(self, peer: str) -> None:
        report("gone", peer=peer)

    def on_peer_subscribed(self, peer: str, channel: str) -> None:
        report("subscriber", peer=peer, channel=channel)
        if channel == "state":
            self.bus.send_to(peer, channel, b"state of " + self.bus.name.encode())


async def act(bus: LocalBus, listener: Listener, command: dict[str, Any]) -> None:
    """Do what a command says; the reply repeats its number."""
    match command["do"]:
        case "subscribe":
            await bus.subscribe(command["channels"])
        case "unsubscribe":
            bus.unsubscribe(command["channels"])
        case "publish":
            # `n` messages in bursts of a tick; each begins with its number.
            for i in range(command["n"]):
                bus.publish(command["channel"], f"{command['mark']}{i:09d} ".encode().ljust(command["size"], b"x"))
                if i % 100 == 99:
                    await asyncio.sleep(0)
        case "send_to":
            bus.send_to(command["peer"], command["channel"], command["payload"].encode())
        case "summary_only":
            listener.summary_only = command["on"]
        case "look":
            pass
    s = bus.stats
    report(
        "did", number=command["number"], peers=bus.peers, healthy=bus.healthy, seen=listener.seen,
        dropped=s.dropped, sent=s.sent, malformed=s.malformed,
    )  # fmt: skip


async def main(run_dir: str, name: str, options: str) -> None:
    listener = Listener()
    bus = listener.bus = LocalBus(Path(run_dir), name, **json.loads(options))
    await bus.start(listener)
    report("started", peers=bus.peers)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks = set()
    while line := await reader.readline():
        task = asyncio.create_task(act(bus, listener, json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await bus.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    report("closed", tasks=len(others))


if __name__ == "__main__":
    factory = uvloop.new_event_loop if sys.argv[3] == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main(sys.argv[1], sys.argv[2], sys.argv[4]))
