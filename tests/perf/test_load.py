"""The load generator against a server of another make (the ``websockets`` library) that counts by itself."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pytest
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from perf.load.generator import Client, Generator, Stats
from perf.load.histogram import Histogram, percentile_ms
from perf.peers.base import BODY, CID, REQUEST_ID, Peer, Send, Step, Wait

DELAY_S = 0.03
#: What a busy machine may add.
SLACK_MS = 400.0
PATIENCE_S = 10.0


class Plain(Peer):
    """``join``, then ``m ID CID BODY``; answered with ``ok ID``, delivered as ``d CID BODY`` to everybody."""

    name = "plain"
    path = "/chat?x=1"
    headers = MappingProxyType({"X-Who": "perf"})
    subprotocol = "plain.v1"
    ack: str | None = "ok "
    error = "error"
    ping = "2"
    pong = "3"

    def missing(self) -> str | None:
        return None

    def versions(self) -> dict[str, str]:
        return {}

    def command(self, port: int, workers: int, data: Path) -> list[str]:
        return []

    def join(self, user: int, rooms: Sequence[int]) -> list[Step]:
        return [Send(f"join {user}"), Wait("joined", 2, capture='"sync":"')]

    def resume(self, user: int, rooms: Sequence[int], have: int) -> list[Step]:
        return [Send(f"resume {user} @CAPTURED@"), Wait("joined")]

    def send(self, user: int, room: int) -> str:
        return f"m {REQUEST_ID} {CID} {BODY}"


class NoAck(Plain):
    ack = None


@dataclass
class Counting:
    """The server: what it has got and sent. ``delay_s``: before each delivery and answer."""

    loop: asyncio.AbstractEventLoop
    delay_s: float = 0.0
    batch: bool = False
    refuse: int = 0
    acks: bool = True
    port: int = 0
    got: list[str] = field(default_factory=list)
    delivered: int = 0
    pongs: int = 0
    members: set[ServerConnection] = field(default_factory=set)
    peers: set[str] = field(default_factory=set)

    async def handle(self, ws: ServerConnection) -> None:
        assert ws.request is not None
        assert ws.request.path == "/chat?x=1"
        assert ws.request.headers["X-Who"] == "perf"
        assert ws.subprotocol == "plain.v1"
        self.peers.add(ws.remote_address[0])
        await ws.send("2")
        with contextlib.suppress(ConnectionClosed):
            await self.read(ws)
        self.members.discard(ws)

    async def read(self, ws: ServerConnection) -> None:
        async for text in ws:
            assert isinstance(text, str)
            if text == "3":
                self.pongs += 1
            elif text.startswith(("join", "resume")):
                self.got.append(text)
                self.members.add(ws)
                await ws.send("joined")
                if text.startswith("join"):
                    await ws.send(f'joined {{"sync":"s{text.split()[1]}"}}')
            else:
                await self.message(ws, text)

    def abort_all(self) -> None:
        for ws in self.members:
            ws.transport.abort()

    async def message(self, ws: ServerConnection, text: str) -> None:
        _, id, cid, body = text.split()
        self.got.append(text)
        if self.refuse:
            self.refuse -= 1
            await ws.send("error no")
            return
        await asyncio.sleep(self.delay_s)
        for member in list(self.members):
            lines = [f"d {cid} {body}"]
            if self.acks and member is ws:
                lines.append(f"ok {id} done")
            self.delivered += 1
            if self.batch:
                await member.send("\n".join(lines))
            else:
                for line in lines:
                    await member.send(line)


@pytest.fixture
def server() -> Iterator[Counting]:
    """It runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    counting = Counting(loop)
    ready = threading.Event()
    servers: list[Server] = []

    async def start() -> None:
        servers.append(
            await serve(counting.handle, "127.0.0.1", 0, subprotocols=["plain.v1"], compression=None)  # type: ignore[list-item]
        )
        counting.port = next(iter(servers[0].sockets)).getsockname()[1]
        ready.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(PATIENCE_S)
    yield counting

    async def stop() -> None:
        servers[0].close()
        await servers[0].wait_closed()

    asyncio.run_coroutine_threadsafe(stop(), loop).result(PATIENCE_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def clients(peer: Peer, n: int, senders: int) -> list[Client]:
    """All in one room."""
    return [
        Client(peer.join(i, [0]), peer.resume(i, [0], 0), peer.send(i, 0) if i < senders else None, n) for i in range(n)
    ]


def agree(server: Counting, totals: Stats) -> int:
    """The server has seen what the generator says; the number of messages."""
    messages = [text for text in server.got if text.startswith("m ")]
    assert totals.counts["sent"] == len(messages)
    assert totals.counts["delivered"] == server.delivered
    assert totals.delivery.n == server.delivered
    assert len({text.split()[2] for text in messages}) == len(messages), "a cid came twice"
    return len(messages)


def spent(begin: Callable[[], None], enough: Callable[[], bool], end: Callable[[], None]) -> float:
    """Let something go on until it is enough; how long it did, in seconds."""
    began = time.monotonic()
    begin()
    while not enough() and time.monotonic() < began + PATIENCE_S:
        time.sleep(0.01)
    end()
    return time.monotonic() - began


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("batch", [False, True])
def test_paced(server: Counting, processes: int, batch: bool) -> None:
    server.batch = batch
    server.delay_s = DELAY_S
    with Generator(Plain(), server.port, clients(Plain(), 7, 3), body=128, processes=processes) as generator:
        generator.connect()
        took = spent(lambda: generator.paced(100), lambda: generator.stats().counts["sent"] > 100, generator.idle)
        totals = generator.drain()
    sent = agree(server, totals)
    assert 100 < sent <= 125 * took + 2 * processes
    assert took < 2.5, "40 per second, at least"
    assert totals.counts["acked"] == sent
    assert totals.counts["expected"] == totals.counts["delivered"] == 7 * sent
    assert totals.counts["errors"] == totals.counts["closed"] == totals.counts["failed"] == 0
    assert {len(text.split()[3]) for text in server.got if text.startswith("m ")} == {128}
    for histogram in (totals.ack, totals.delivery):
        middle = histogram.ms(0.5)
        assert middle is not None
        assert DELAY_S * 1000 * 0.99 <= middle < DELAY_S * 1000 + SLACK_MS
    assert server.pongs == 7
    assert len(server.peers) == 7, "every client has an address of its own"


def test_own_delivery_is_the_answer(server: Counting) -> None:
    server.acks = False
    with Generator(NoAck(), server.port, clients(NoAck(), 3, 3), body=1024) as generator:
        generator.connect()
        generator.flood(2)
        time.sleep(0.3)
        totals = generator.drain()
    assert agree(server, totals) == totals.counts["acked"] > 6
    assert {len(text.split()[3]) for text in server.got if text.startswith("m ")} == {1024}


def test_templates_take_turns(server: Counting) -> None:
    templates = [f"{kind} {REQUEST_ID} {CID} {BODY}" for kind in ("ma", "mb", "mc")]
    one = Client(Plain().join(0, [0]), (), templates, 1)
    with Generator(Plain(), server.port, [one]) as generator:
        generator.connect()
        spent(lambda: generator.flood(1), lambda: generator.stats().counts["acked"] >= 7, generator.idle)
        totals = generator.drain()
    kinds = [text.split()[0] for text in server.got if text.startswith("m")]
    assert len(kinds) == totals.counts["acked"] >= 7
    assert kinds == [("ma", "mb", "mc")[i % 3] for i in range(len(kinds))]


def test_flood_keeps_the_window(server: Counting) -> None:
    """With a delay of d, w messages under way and one sender, there are w / d messages per second."""
    server.delay_s = 0.1
    with Generator(Plain(), server.port, clients(Plain(), 1, 1)) as generator:
        generator.connect()
        took = spent(lambda: generator.flood(1), lambda: generator.stats().counts["acked"] >= 15, generator.idle)
        assert 15 <= agree(server, generator.drain()) <= took / 0.095 + 1
    assert took < 2.7, "5.5 per second, at least"


def test_random_sends_at_the_mean(server: Counting) -> None:
    with Generator(Plain(), server.port, clients(Plain(), 20, 20)) as generator:
        generator.connect()
        took = spent(lambda: generator.random(0.2), lambda: generator.stats().counts["sent"] > 200, generator.idle)
        totals = generator.drain()
    assert 200 < agree(server, totals) <= 140 * took
    assert took < 3.5, "57 per second, at least"


def test_refusals_are_errors(server: Counting) -> None:
    server.refuse = 3
    with Generator(Plain(), server.port, clients(Plain(), 2, 1)) as generator:
        generator.connect()
        for _ in range(5):
            generator.once()
        deadline = time.monotonic() + PATIENCE_S
        while (stats := generator.stats()).counts["acked"] < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert (stats.counts["sent"], stats.counts["acked"], stats.counts["errors"]) == (5, 2, 3)
    assert stats.last_error == "error no"


def test_cut_and_resume(server: Counting) -> None:
    with Generator(Plain(), server.port, clients(Plain(), 5, 0), processes=2) as generator:
        generator.connect()
        generator.cut(0, 3)
        assert generator.stats().counts["live"] == 2
        generator.connect(resume=True, handshakes=0)
        stats = generator.stats()
    assert stats.counts["live"] == 5
    assert stats.counts["closed"] == 0
    assert sorted(text for text in server.got if text.startswith("resume")) == [f"resume {i} s{i}" for i in range(3)]


def test_churn_and_retry(server: Counting) -> None:
    def resumed() -> int:
        return sum(text.startswith("resume") for text in server.got)

    with Generator(Plain(), server.port, clients(Plain(), 6, 0)) as generator:
        generator.connect()
        took = spent(lambda: generator.churn(50), lambda: resumed() > 50, lambda: generator.churn(0))
        deadline = time.monotonic() + PATIENCE_S
        while (stats := generator.stats()).counts["live"] < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert stats.counts["live"] == 6
    assert 50 < resumed() <= 50 * took + 2
    assert took < 2.5, "20 per second, at least"


def test_failures_are_counted(server: Counting) -> None:
    with Generator(Plain(), server.port, clients(Plain(), 2, 0)) as generator:
        generator.connect()
        server.loop.call_soon_threadsafe(server.abort_all)
        deadline = time.monotonic() + PATIENCE_S
        while (stats := generator.stats()).counts["closed"] < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (stats.counts["closed"], stats.counts["live"]) == (2, 0)
    with Generator(Plain(), 1, clients(Plain(), 3, 0)) as nobody:  # nobody listens there
        nobody.connect()
        assert nobody.stats().counts["failed"] == 3
        assert "refused" in nobody.stats().last_error


def test_percentiles() -> None:
    histogram = Histogram()
    exact = [float(i * 1000) for i in range(1, 10_001)]  # 1 µs to 10 ms
    assert percentile_ms(exact, 0.5) == pytest.approx(5.0, rel=0.001)
    # As `hist_index` counts them.
    for value in map(int, exact):
        shift = max(0, value.bit_length() - 8)
        index = value if value < 128 else (shift + 1) * 128 + (value >> shift) - 128
        histogram.add({"n": 1, "max": value, "counts": [index, 1]})
    for share in (0.5, 0.8, 0.99, 0.999):
        assert histogram.ms(share) == pytest.approx(share * 10, rel=0.01)
    assert histogram.ms(1.0) == 10.0
