"""What the tests of the Redis bus share: a listener to wait on, buses, and a wire that can fail."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvloop

from chatcore.bus.redis import RedisBus

#: Nothing here takes a second on an idle machine; a busy one gets its time.
PATIENCE_S = 30.0


class Recorder:
    """A listener that keeps everything, and can be waited on. It answers announcements with a state."""

    bus: RedisBus

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
        self.bus.send_to(peer, channel, b"state at " + self.bus.name.encode())
        self._note()

    async def until(self, holds: Callable[[], Any], what: str = "") -> None:
        """Wait until something holds: looked at after every event, and now and then (for what is no event)."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not holds():
                    self._changed.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.02):
                            await self._changed.wait()
        except TimeoutError:
            raise AssertionError(
                f"never came to hold: {what}; resyncs {self.resyncs}, gone {self.gone}, last {self.messages[-5:]}"
            ) from None

    async def resynced(self, why: str) -> None:
        """Wait for a call for a resync, and forget it and those before it."""
        await self.until(lambda: why in self.resyncs, f"a resync because of {why!r}")
        del self.resyncs[: self.resyncs.index(why) + 1]


@contextlib.asynccontextmanager
async def buses(
    url: str,
    *names: str,
    prefix: str = "",
    queue_bytes: int = 4 << 20,
    confirm_ms: int = 2000,
    heartbeat_ms: int = 1000,
) -> AsyncIterator[list[tuple[RedisBus, Recorder]]]:
    """Buses that know each other, with a prefix of their own."""
    prefix = prefix or f"test-{uuid.uuid4().hex}"
    made: list[tuple[RedisBus, Recorder]] = []
    for name in names:
        recorder = Recorder()
        recorder.bus = RedisBus(
            url, name, prefix=prefix, queue_bytes=queue_bytes,
            confirm_timeout_ms=confirm_ms, heartbeat_ms=heartbeat_ms,
        )  # fmt: skip
        made.append((recorder.bus, recorder))
    try:
        for bus, recorder in made:
            await bus.start(recorder)
        yield made
    finally:
        for bus, _ in made:
            await bus.close()


async def connected(*made: tuple[RedisBus, Recorder]) -> None:
    """Wait until these are healthy and know each other."""
    names = {bus.name for bus, _ in made}
    for bus, recorder in made:
        await recorder.until(lambda bus=bus: bus.healthy, f"{bus.name} is healthy")  # type: ignore[misc]
        await recorder.until(lambda bus=bus: {*bus.peers, bus.name} >= names, "all peers")  # type: ignore[misc]


async def checked(work: Awaitable[None]) -> None:
    await work
    await asyncio.sleep(0)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks left behind: {left}"


def run(work: Awaitable[None], loop: str = "uvloop") -> None:
    """Run a test, and see that no task is left."""
    factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(checked(work))


class Wire:
    """A proxy in front of a server, on the loop of the test. It can go deaf in either direction,
    say something of its own to a client, and swallow replies together with their connection."""

    def __init__(self, port: int) -> None:
        self._to = port
        self.port = 0
        self.up = True  # client to server
        self.down = True  # server to client
        self.cut_before_reply_to = b""  # a command that reaches the server, and whose reply never comes back
        self.clients: list[asyncio.StreamWriter] = []
        self._open = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def mend(self) -> None:
        """Forward in both directions again."""
        self.up = self.down = True
        self._open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.clients.append(writer)
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._to)
        seen = bytearray()  # what this client sent
        pumps = [
            asyncio.create_task(self._pump(reader, server_writer, True, seen)),
            asyncio.create_task(self._pump(server_reader, writer, False, seen)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            server_writer.close()
            writer.close()
            self._tasks.discard(task)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: bool, seen: bytearray
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                while not (self.up if up else self.down):
                    self._open.clear()
                    await self._open.wait()
                if up:
                    seen += data
                elif self.cut_before_reply_to and self.cut_before_reply_to in seen:
                    return
                writer.write(data)
                await writer.drain()
