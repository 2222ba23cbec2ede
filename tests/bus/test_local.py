"""The local bus in one process: counting, limits, malformed input, a listener that fails."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from chatcore.bus.base import MAX_PAYLOAD_BYTES
from chatcore.bus.local import SPARE_GROUPS, LocalBus
from chatcore.bus.local_link import (
    ASK,
    CONFIRM,
    HELLO,
    MSG,
    RESET,
    SUBSCRIBE,
    Inbound,
    LocalPeer,
    channel_frames,
    frame,
    hello_frame,
    message_frame,
)


class Recorder:
    """A listener that keeps everything, and can be waited on."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.resyncs: list[str] = []
        self.gone: list[str] = []
        self.subscribers: list[tuple[str, str]] = []
        self.fail = False
        self._changed = asyncio.Event()

    def _note(self) -> None:
        self._changed.set()
        if self.fail:
            raise RuntimeError("a bug in the listener")

    def on_bus(self, channel: str, payload: bytes) -> None:
        self.messages.append((channel, payload))
        self._note()

    def on_resync_needed(self, why: str) -> None:
        self.resyncs.append(why)
        self._note()

    def on_peer_gone(self, peer: str) -> None:
        self.gone.append(peer)
        self._note()

    def on_peer_subscribed(self, peer: str, channel: str) -> None:
        self.subscribers.append((peer, channel))
        self._note()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                self._changed.clear()
                await self._changed.wait()


@contextlib.asynccontextmanager
async def buses(run_dir: Path, *names: str, heartbeat_ms: int = 50) -> AsyncIterator[list[tuple[LocalBus, Recorder]]]:
    made = [
        (LocalBus(run_dir, n, queue_bytes=1 << 20, confirm_timeout_ms=2000, heartbeat_ms=heartbeat_ms), Recorder())
        for n in names
    ]
    try:
        for bus, recorder in made:
            await bus.start(recorder)
        yield made
    finally:
        for bus, _ in made:
            await bus.close()
        for name in names:
            assert not (run_dir / f"bus-{name}.sock").exists()


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Awaitable[None]], None]:
    async def checked(work: Awaitable[None]) -> None:
        await work
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"

    def run(work: Awaitable[None]) -> None:
        factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(checked(work))

    return run


Run = Callable[[Awaitable[None]], None]


def test_a_message_reaches_the_subscribers_and_not_its_publisher(tmp_path: Path, run: Run) -> None:
    async def main() -> None:
        async with buses(tmp_path, "a", "b", "c") as [(a, ra), (b, rb), (c, rc)]:
            await b.subscribe(["x", "y"])
            await a.subscribe(["x"])
            a.publish("x", b"1")
            a.publish("nobody", b"2")
            a.publish("y", b"")
            a.send_to("c", "x", b"not subscribed")
            a.send_to("b", "x", b"3")
            a.send_to("nobody", "x", b"4")
            await rb.until(lambda: len(rb.messages) == 3)
            assert rb.messages == [("x", b"1"), ("y", b""), ("x", b"3")]
            b.publish("x", b"5")
            await ra.until(lambda: bool(ra.messages))
            assert ra.messages == [("x", b"5")]
            assert not rc.messages
            assert c.healthy
            assert sorted(ra.subscribers) == [("b", "x"), ("b", "y")]

    run(main())


def test_subscriptions_are_counted(tmp_path: Path, run: Run) -> None:
    async def main() -> None:
        async with buses(tmp_path, "a", "b") as [(a, _), (b, rb)]:
            await b.subscribe(["x", "end"])
            await b.subscribe(["x"])
            b.unsubscribe(["x"])
            await b.subscribe(["flush"])
            a.publish("x", b"1")
            await rb.until(lambda: bool(rb.messages))
            b.unsubscribe(["x", "x", "never"])
            await b.subscribe(["flush2"])
            a.publish("x", b"2")
            a.publish("end", b"")
            await rb.until(lambda: ("end", b"") in rb.messages)
            assert rb.messages == [("x", b"1"), ("end", b"")]
            # Subscribed, unsubscribed and subscribed again within a tick is subscribed.
            first = asyncio.ensure_future(b.subscribe(["z"]))
            await asyncio.sleep(0)
            b.unsubscribe(["z"])
            await b.subscribe(["z"])
            await first
            a.publish("z", b"3")
            await rb.until(lambda: ("z", b"3") in rb.messages)

    run(main())


def test_a_cancelled_subscribe_subscribed_to_nothing(tmp_path: Path, run: Run) -> None:
    async def main() -> None:
        async with buses(tmp_path, "a", "b") as [(a, _), (b, rb)]:
            task = asyncio.ensure_future(b.subscribe(["x"]))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await b.subscribe(["y"])
            a.publish("x", b"1")
            a.publish("y", b"2")
            await rb.until(lambda: bool(rb.messages))
            assert rb.messages == [("y", b"2")]
            assert a.stats.sent == 1

    run(main())


def test_many_channels_at_once_and_a_late_peer(tmp_path: Path, run: Run) -> None:
    async def main() -> None:
        channels = [f"c:{i:0100d}" for i in range(20_000)]  # 2 MB of names: more than the queue holds
        async with buses(tmp_path, "a") as [(a, ra)]:
            await a.subscribe(channels)
            async with buses(tmp_path, "b") as [(b, rb)]:
                await ra.until(lambda: "the link to b is up" in ra.resyncs)
                for channel in (channels[0], channels[-1]):
                    b.publish(channel, b"1")
                await ra.until(lambda: len(ra.messages) == 2)
                assert len(rb.subscribers) == len(channels)
            await ra.until(lambda: ra.gone == ["b"])

    run(main())


def test_limits(tmp_path: Path, run: Run) -> None:
    async def main() -> None:
        async with buses(tmp_path, "a", "b") as [(a, ra), (b, rb)]:
            for wrong in ("", "x" * 201, "é" * 101):
                with pytest.raises(ValueError, match="channel of"):
                    await b.subscribe(["fine", wrong])
            assert not b.subscribed
            await b.subscribe(["x" * 200])
            a.publish("x" * 200, b"p" * MAX_PAYLOAD_BYTES)
            await rb.until(lambda: len(rb.messages) == 1)
            assert len(rb.messages[0][1]) == MAX_PAYLOAD_BYTES
            # Over the limit: it is dropped and counted, and the receiver is asked to resync.
            a.publish("x" * 200, b"p" * (MAX_PAYLOAD_BYTES + 1))
            assert a.stats.dropped == 1
            await rb.until(lambda: "a had to drop messages for this worker" in rb.resyncs)
            await ra.until(lambda: a.healthy)
            a.publish("x" * 200, b"after")
            await rb.until(lambda: len(rb.messages) == 2)

    run(main())


def test_a_run_folder_longer_than_a_socket_address(tmp_path: Path, run: Run) -> None:
    async def main() -> None:
        deep = tmp_path / ("d" * 90) / ("e" * 90)
        name = "h" * 63 + "-1-abcdef"
        async with buses(deep, name, "b") as [(a, ra), (b, rb)]:
            await b.subscribe(["x"])
            a.publish("x", b"1")
            await rb.until(lambda: bool(rb.messages))
            assert ra.resyncs

    run(main())
    for wrong in ("", "a/b", "x" * 73, "a b"):
        with pytest.raises(ValueError, match="bus name"):
            LocalBus(tmp_path, wrong, queue_bytes=1, confirm_timeout_ms=1, heartbeat_ms=1)


def test_the_socket_of_a_dead_worker_is_removed(tmp_path: Path, run: Run) -> None:
    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "bus-dead.sock"))
        (tmp_path / "something-else.sock").touch()
        async with buses(tmp_path, "a") as [(a, _)]:
            assert not (tmp_path / "bus-dead.sock").exists()
            assert (tmp_path / "something-else.sock").exists()
            assert a.healthy
            assert a.peers == []
            (tmp_path / "something-else.sock").unlink()

    run(main())


def test_a_failing_listener_ends_no_link(tmp_path: Path, run: Run) -> None:
    async def main() -> None:
        async with buses(tmp_path, "a", "b") as [(a, ra), (b, rb)]:
            rb.fail = True
            await b.subscribe(["x"])
            await a.subscribe(["x"])
            for i in range(3):
                a.publish("x", b"%d" % i)
            await rb.until(lambda: len(rb.messages) == 3)
            assert not ra.gone
            assert not rb.gone

    run(main())


@pytest.mark.parametrize("turns", range(4))
def test_a_worker_that_closes_while_a_new_link_comes_up(tmp_path: Path, run: Run, turns: int) -> None:
    """As in a reload, where the old worker goes when its successor has come; the fault campaign found it."""

    async def main() -> None:
        mishaps: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: mishaps.append(context))
        async with buses(tmp_path, "a") as [(a, _)]:
            b = LocalBus(tmp_path, "b", queue_bytes=1 << 20, confirm_timeout_ms=2000, heartbeat_ms=50)
            starting = asyncio.create_task(b.start(Recorder()))
            while (peer := a._peers.get("b")) is None or peer.transport is None:
                await asyncio.sleep(0)
            for _ in range(turns):
                await asyncio.sleep(0)
            a.send_to("b", "x", b"1")
            await a.close()
            await starting
            await b.close()
        assert not mishaps

    run(main())


MALFORMED = {
    "garbage": b"GET / HTTP/1.1\r\n\r\n" * 4,
    "wrong magic": frame(HELLO, b"chatcore-bus/9 x"),
    "no hello": message_frame(b"x", b"1"),
    "bad name": frame(HELLO, b"chatcore-bus/1 ../x"),
    "name not ascii": frame(HELLO, b"chatcore-bus/1 \xff"),
    "own name": hello_frame("a"),
    "no worker of that name": hello_frame("ghost"),
    "too long": struct.pack("<IBB", 1 << 31, HELLO, 0),
}
# From a peer that may say hello (its socket exists):
MALFORMED_AFTER_HELLO = {
    "unknown type": frame(77),
    "second hello": hello_frame("b"),
    "channel list cut": frame(SUBSCRIBE, b"\x05ab"),
    "empty channel": frame(SUBSCRIBE, b"\x00"),
    "channel not UTF-8": frame(SUBSCRIBE, b"\x01\xff"),
    "short id": frame(ASK, b"123"),
    "confirmation without an ASK": frame(CONFIRM, struct.pack("<Q", 1 << 60)),
    "channel longer than its frame": struct.pack("<IBB", 2, MSG, 3) + b"ab",
    "frame too long": struct.pack("<IBB", MAX_PAYLOAD_BYTES + 201, MSG, 3),
}


@pytest.mark.parametrize("kind", [*MALFORMED, *MALFORMED_AFTER_HELLO])
def test_malformed_input_closes_that_link_and_nothing_else(tmp_path: Path, run: Run, kind: str) -> None:
    async def main() -> None:
        # With so rare a heartbeat no worker scans the folder meanwhile, and takes this one for a peer.
        async with buses(tmp_path, "a", "b", heartbeat_ms=60_000) as [(a, ra), (b, rb)]:
            await b.subscribe(["x"])
            data = MALFORMED.get(kind) or hello_frame("fake") + frame(RESET) + MALFORMED_AFTER_HELLO[kind]
            accepted: list[asyncio.StreamWriter] = []
            fake = await asyncio.start_unix_server(
                lambda reader, writer: accepted.append(writer), tmp_path / "bus-fake.sock"
            )
            reader, writer = await asyncio.open_unix_connection(tmp_path / "bus-a.sock")
            writer.write(data)
            async with asyncio.timeout(20):
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
            (tmp_path / "bus-fake.sock").unlink()
            fake.close()
            for w in [*accepted, writer]:
                w.close()
            assert a.stats.malformed == 1
            a.publish("x", b"still there")
            await rb.until(lambda: bool(rb.messages))
            assert "b" not in ra.gone
            assert "a" not in rb.gone
            await ra.until(lambda: "fake" not in a.peers)
            await rb.until(lambda: "fake" not in b.peers)

    run(main())


def test_a_peer_that_reconnects_replaces_its_old_connection(tmp_path: Path, run: Run) -> None:
    """Its old link has not ended (it hangs), and it says hello again."""

    async def main() -> None:
        async with buses(tmp_path, "a") as [(a, ra)]:
            server = await asyncio.start_unix_server(lambda reader, writer: None, tmp_path / "bus-fake.sock")
            _, first = await asyncio.open_unix_connection(tmp_path / "bus-a.sock")
            first.write(hello_frame("fake") + b"".join(channel_frames(SUBSCRIBE, [b"x"])))
            await ra.until(lambda: ra.subscribers == [("fake", "x")])
            _, second = await asyncio.open_unix_connection(tmp_path / "bus-a.sock")
            second.write(hello_frame("fake"))
            await ra.until(lambda: ra.gone == ["fake"])
            assert a.peers == ["fake"]
            a.publish("x", b"1")
            assert a.stats.sent == 0
            (tmp_path / "bus-fake.sock").unlink()
            server.close()
            first.close()
            second.close()
            await ra.until(lambda: ra.gone == ["fake", "fake"])

    run(main())


def test_frames_are_found_wherever_the_bytes_are_cut(tmp_path: Path) -> None:
    async def main() -> None:
        async with buses(tmp_path, "a") as [(a, ra)]:
            await a.subscribe(["x", "long"])
            stream = b"".join(
                message_frame(channel, payload)
                for channel, payload in [(b"x", b""), (b"long", b"1" * 300), (b"gone", b"2"), (b"x", b"3" * 7)]
            )
            want = [("x", b""), ("long", b"1" * 300), ("x", b"3" * 7)]
            for size in range(1, len(stream) + 1):
                inbound = Inbound(a)
                inbound.peer = Stub()  # type: ignore[assignment]
                inbound.transport = Stub()  # type: ignore[assignment]
                ra.messages.clear()
                for at in range(0, len(stream), size):
                    inbound.data_received(stream[at : at + size])
                assert ra.messages == want, f"cut every {size} bytes"

    asyncio.run(main())


class Stub:
    """A peer that is heard, and a transport that is open."""

    silent = False
    heard = 0.0

    def is_closing(self) -> bool:
        return False


def test_orders_of_peers_that_no_channel_has_any_more_are_dropped(tmp_path: Path, run: Run) -> None:
    """With many workers nearly every channel has an order of its own, which was kept until a worker left."""

    async def main() -> None:
        bus = LocalBus(tmp_path, "a", queue_bytes=1 << 20, confirm_timeout_ms=2000, heartbeat_ms=50)
        bus.loop = asyncio.get_running_loop()
        bus._listener = Recorder()
        peers = [LocalPeer(bus, f"p{i}") for i in range(8)]
        bus.peer_subscribes(peers[0], ["kept"])
        kept = bus._routes["kept"]
        orders = itertools.islice(itertools.permutations(peers), 2000)
        for order in orders:
            for peer in order:
                bus.peer_subscribes(peer, ["x"])
            for peer in order:
                bus.peer_unsubscribes(peer, ["x"])
        assert len(bus._groups) <= 2 * len(bus._routes) + SPARE_GROUPS
        assert bus._routes == {"kept": kept}

    run(main())
