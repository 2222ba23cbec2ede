"""``send``: durable messages in many small rooms; what a send and a delivery take.

Clients are the ``websockets`` library on uvloop in this one process; each room has
its members on all workers. Times are of the monotonic clock, from just before the
sender's write to the receipt, so they include the client's own work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import orjson
import uvloop
from websockets.asyncio.client import ClientConnection, connect

from .machine import machine, versions
from .server import Server, Usage

SETTLE_S = 2.0


def post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """One HTTP request."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), method="POST")
    with urllib.request.urlopen(request) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


class Member:
    """One client: sends when told, records how long what took."""

    def __init__(self, ws: ClientConnection, bench: Bench) -> None:
        self.ws = ws
        self.bench = bench
        self.room = ""
        self.ready = asyncio.Event()
        self.opened: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.sent: dict[int, int] = {}
        self.next_id = 10

    async def read(self) -> None:
        """Take what comes until the connection ends."""
        async for data in self.ws:
            now = time.perf_counter_ns()
            message = orjson.loads(data)
            match message["t"]:
                case "msg":
                    self.bench.delivered.append(now - int(message["body"].partition(" ")[0]))
                case "ok" if (at := self.sent.pop(message["id"], None)) is not None:
                    self.bench.acked.append(now - at)
                case "ok" if message["id"] == 2:
                    self.opened.set_result(message["c"])
                case "ready":
                    self.ready.set()
                case "error":
                    self.bench.errors += 1

    async def send(self) -> None:
        """One message of about 128 bytes."""
        id = self.next_id
        self.next_id += 1
        now = time.perf_counter_ns()
        self.sent[id] = now
        body = f"{now} ".ljust(80, "x")
        cid = f"{id}-{random.getrandbits(96):x}"
        await self.ws.send(orjson.dumps({"t": "send", "id": id, "c": self.room, "cid": cid, "body": body}).decode())


class Bench:
    """What was measured, in ns."""

    def __init__(self) -> None:
        self.acked: list[int] = []
        self.delivered: list[int] = []
        self.errors = 0


@asynccontextmanager
async def members(url: str, bench: Bench, rooms: int, size: int) -> AsyncIterator[list[Member]]:
    """``rooms`` groups of ``size`` clients each, logged in and live."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        everybody: list[Member] = []
        readers = []
        ws_url = url.replace("http", "ws", 1) + "/ws"
        for room in range(rooms):
            logins = [
                await loop.run_in_executor(
                    None, post, url, "/v1/users", {"name": f"user-{room}-{i}", "password": "correct horse"}
                )
                for i in range(size)
            ]
            group = []
            for login in logins:
                ws = await stack.enter_async_context(connect(ws_url, compression=None, ping_interval=None))
                member = Member(ws, bench)
                readers.append(tasks.create_task(member.read()))
                await ws.send(json.dumps({"t": "auth", "id": 1, "token": login["token"]}))
                await member.ready.wait()
                group.append(member)
            ids = [login["user"]["id"] for login in logins[1:]]
            await group[0].ws.send(
                json.dumps({"t": "open", "id": 2, "kind": "group", "title": f"room {room}", "members": ids, "cid": "x"})
            )
            conv = await group[0].opened
            for member in group:
                member.room = conv
            everybody.extend(group)
        yield everybody
        for reader in readers:
            reader.cancel()


async def measure(server: Server, rooms: int, size: int, rate: float, seconds: float) -> dict[str, Any]:
    """One run: ``rate`` messages per second in all, evenly spread over the members."""
    bench = Bench()
    pids = server.pids()
    async with members(server.url, bench, rooms, size) as everybody:
        await asyncio.sleep(SETTLE_S)
        before = server.usage(pids)
        start = time.perf_counter()
        count = int(rate * seconds)
        for i in range(count):
            pause = start + i / rate - time.perf_counter()
            if pause > 0:
                await asyncio.sleep(pause)
            await everybody[random.randrange(len(everybody))].send()
        deadline = time.perf_counter() + 10
        while len(bench.delivered) < count * size and time.perf_counter() < deadline:
            await asyncio.sleep(0.05)
        wall = time.perf_counter() - start
        after = server.usage(pids)
    return row(bench, before, after, count, size, wall)


def row(bench: Bench, before: Usage, after: Usage, count: int, size: int, wall: float) -> dict[str, Any]:
    """The figures of a run."""

    def ms(values: list[int], share: float) -> float:
        ordered = sorted(values)
        return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))] / 1e6, 2) if ordered else -1.0

    return {
        "server": "chatcore",
        "sent": count,
        "acked": len(bench.acked),
        "delivered": len(bench.delivered),
        "expected": count * size,
        "errors": bench.errors,
        "units_per_s": round(count / wall, 1),
        "cpu_us_per_unit": round((after.cpu_s - before.cpu_s) / count * 1e6, 1),
        "ok_p50_ms": ms(bench.acked, 0.5),
        "ok_p99_ms": ms(bench.acked, 0.99),
        "delivery_p50_ms": ms(bench.delivered, 0.5),
        "delivery_p99_ms": ms(bench.delivered, 0.99),
        "rss_bytes": after.rss_bytes,
    }


def main(argv: list[str]) -> dict[str, Any]:
    """Run it; returns what ``--json`` writes."""
    parser = argparse.ArgumentParser(prog="perf send", description=__doc__)
    parser.add_argument("--rooms", type=int, default=20)
    parser.add_argument("--size", type=int, default=10, help="members of each room")
    parser.add_argument("--rate", type=float, default=200.0, help="messages per second, in all")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    with Server(workers=args.workers) as server, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(measure(server, args.rooms, args.size, args.rate, args.seconds))
    case = f"{args.rooms} rooms of {args.size}, {args.rate:g} msg/s, {args.workers} workers"
    return {
        "bench": "send",
        "machine": machine(),
        "versions": versions("chatcore", "uvloop", "websockets"),
        "rows": [{"case": case, "unit": "message", **result}],
    }
