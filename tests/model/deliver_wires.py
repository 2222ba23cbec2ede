"""A model of the bus, which loses, repeats and reorders, and of the sockets, as slow as their clients read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from .weather import Weather


class ModelBus:
    """All buses of the model: what one publishes the others may get, some time, perhaps twice."""

    def __init__(self, weather: Weather) -> None:
        self.weather = weather
        self.ends: list[BusEnd] = []
        self.cut = False  # nothing gets through, and nobody is told

    def end(self, on_bus: Callable[[str, bytes], None], on_resync_needed: Callable[[str], None]) -> BusEnd:
        end = BusEnd(self, on_bus, on_resync_needed)
        self.ends.append(end)
        return end


class BusEnd:
    """One worker's bus."""

    healthy = True  # as far as it knows

    def __init__(
        self, bus: ModelBus, on_bus: Callable[[str, bytes], None], on_resync_needed: Callable[[str], None]
    ) -> None:
        self.bus = bus
        self.on_bus = on_bus
        self.on_resync_needed = on_resync_needed
        self.own: dict[str, int] = {}  # counted
        self.known: set[str] = set()  # what the others know of it

    async def subscribe(self, channels: list[str]) -> None:
        for channel in channels:
            self.own[channel] = self.own.get(channel, 0) + 1
        await asyncio.sleep(self.bus.weather.latency())
        self.known.update(channels)
        await asyncio.sleep(self.bus.weather.latency())

    def unsubscribe(self, channels: list[str]) -> None:
        for channel in channels:
            count = self.own.get(channel, 0) - 1
            assert count >= 0, f"{channel} was given back more often than it was taken"
            if count:
                self.own[channel] = count
            else:
                del self.own[channel]
                self.known.discard(channel)

    def publish(self, channel: str, payload: bytes) -> None:
        weather, climate = self.bus.weather, self.bus.weather.climate
        loop = asyncio.get_running_loop()
        for other in self.bus.ends:
            if other is self or channel not in other.known or self.bus.cut:
                continue
            if weather.happens(climate.bus_lost):
                if weather.happens(0.5):
                    loop.call_later(weather.latency(), other.on_resync_needed, "lost")
                continue
            for _ in range(2 if weather.happens(climate.bus_repeated) else 1):
                late = weather.random.choice((0.005, 0.05, 2.0)) if weather.happens(climate.bus_late) else 0.0
                loop.call_later(weather.latency() + late, other._receive, channel, payload)

    def send_to(self, peer: str, channel: str, payload: bytes) -> None: ...

    def _receive(self, channel: str, payload: bytes) -> None:
        if channel in self.own:
            self.on_bus(channel, payload)


class Socket:
    """One connection, on the server: what is queued leaves as fast as the client reads."""

    def __init__(self, conn: int, session: Any, received: Callable[[bytes], None]) -> None:
        self.conn = conn
        self.session = session
        self.received = received
        self.outbox: list[bytes] = []
        self.open = True
        self.owner = 0
        self.wanted = False  # on_writable is to be called
        self.reading_from = 0.0  # the client reads nothing before
        self.arrives = 0.0  # when the client's last message arrives


class ModelReactor:
    """The client sockets of one worker."""

    LOW_WATER_BYTES = 600

    def __init__(self, weather: Weather, pushed: Callable[[Any, bytes], None]) -> None:
        self.weather = weather
        self.pushed = pushed
        self.sockets: dict[int, Socket] = {}
        self.topics: list[ModelTopic] = []
        self._conns = 0

    def accept(self, make_session: Callable[[int], Any], received: Callable[[bytes], None]) -> Socket:
        self._conns += 1
        socket = Socket(self._conns, make_session(self._conns), received)
        self.sockets[self._conns] = socket
        return socket

    def send(self, conn: int, payload: bytes) -> bool:
        socket = self.sockets.get(conn)
        if socket is None:
            return False
        self.pushed(socket.session, payload)
        socket.outbox.append(payload)
        if len(socket.outbox) == 1:
            self._drain_later(socket)
        return True

    def _drain_later(self, socket: Socket) -> None:
        loop = asyncio.get_running_loop()
        wait = max(self.weather.latency(), socket.reading_from - loop.time())
        loop.call_later(wait, self._drain, socket)

    def _drain(self, socket: Socket) -> None:
        if not socket.open:
            return
        if socket.reading_from > asyncio.get_running_loop().time():
            self._drain_later(socket)
            return
        outbox, socket.outbox = socket.outbox, []
        for payload in outbox:
            if socket.open:
                socket.received(payload)
        if socket.open and socket.wanted:
            socket.wanted = False
            socket.session.on_writable()

    def reads_on(self, socket: Socket) -> None:
        """A slow client is slow no longer."""
        socket.reading_from = 0.0
        self._drain(socket)

    def queued(self, conn: int) -> int:
        socket = self.sockets.get(conn)
        return sum(map(len, socket.outbox)) if socket is not None else 0

    def notify_writable(self, conn: int) -> bool:
        socket = self.sockets.get(conn)
        if socket is None or self.queued(conn) <= self.LOW_WATER_BYTES:
            return True
        socket.wanted = True
        return False

    def authenticated(self, conn: int, owner: int, ping_ms: int) -> None:
        self.sockets[conn].owner = owner

    def close(self, conn: int, code: int, reason: bytes) -> None:
        socket = self.sockets.get(conn)
        if socket is not None:
            asyncio.get_running_loop().call_soon(self.lost, socket)

    def lost(self, socket: Socket) -> None:
        """The connection is over, whoever ended it."""
        if not socket.open:
            return
        socket.open = False
        del self.sockets[socket.conn]
        for topic in self.topics:
            topic.conns.pop(socket.conn, None)
        socket.session.on_closed()


class ModelTopic:
    """Like ``_fast.Topic``: who ends leaves by itself, who has ended does not come in."""

    def __init__(self, reactor: ModelReactor) -> None:
        self.reactor = reactor
        self.conns: dict[int, None] = {}
        reactor.topics.append(self)

    def __len__(self) -> int:
        return len(self.conns)

    def __contains__(self, conn: int) -> bool:
        return conn in self.conns

    def add(self, conn: int) -> bool:
        if conn in self.conns or conn not in self.reactor.sockets:
            return False
        self.conns[conn] = None
        return True

    def discard(self, conn: int) -> bool:
        return self.conns.pop(conn, self) is None

    def fan_out(self, frame: bytes, skip_owner: int = 0) -> int:
        told = 0
        for conn in list(self.conns):
            socket = self.reactor.sockets[conn]
            if not skip_owner or socket.owner != skip_owner:
                self.reactor.send(conn, frame)
                told += 1
        return told

    def sessions(self) -> list[Any]:
        return [self.reactor.sockets[conn].session for conn in self.conns]
