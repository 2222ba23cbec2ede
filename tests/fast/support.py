"""A smallest possible server around the reactor, and raw clients: what the tests here stand on."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

from chatcore._fast.reactor import TICK_MS, Reactor

# No test waits for time to pass; this is when one that waits for an event has failed.
PATIENCE_S = 20.0
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def on_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a coroutine as a test on uvloop."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            await asyncio.wait_for(test(*args, **kwargs), PATIENCE_S * 3)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(bounded())

    return run


def accept_response(key: bytes) -> bytes:
    """The 101 answer (RFC 6455 section 4.2.2)."""
    token = base64.b64encode(hashlib.sha1(key + GUID).digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + token + b"\r\n\r\n"
    )


class Session:
    """One upgraded connection as the handler sees it."""

    def __init__(self, conn: int) -> None:
        self.conn = conn
        self.messages: list[bytes] = []
        self.waits: list[int] = []
        self.writable = 0
        self.closed: list[int] = []


class Server:
    """A handler that upgrades whoever asks and records what happens. Set `message` to react."""

    def __init__(self, **settings: Any) -> None:
        self.auth_timeout_ms = settings.pop("auth_timeout_ms", 0)
        backlog = settings.pop("backlog", 1024)
        self.loop = asyncio.get_running_loop()
        self.sessions: list[Session] = []
        self.by_conn: dict[int, Session] = {}
        self.http: dict[int, bytes] = {}
        self.http_closed: list[int] = []
        self.message: Callable[[Session, bytes], None] = lambda session, data: None
        self.closed: Callable[[Session, int], None] = lambda session, code: None
        self.writable: Callable[[Session], None] = lambda session: None
        self.plain: Callable[[int, bytes], None] | None = None
        self.waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self.reactor = Reactor(self, self._call_soon, **settings)
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(backlog)
        self.listener.setblocking(False)
        self.port: int = self.listener.getsockname()[1]
        self.reactor.listen(self.listener.fileno())
        self.watched = self.reactor.fileno()
        self.loop.add_reader(self.watched, self._then_look, self.reactor.poll)
        self.ticker = self.loop.call_later(TICK_MS / 1000, self._tick)

    def _call_soon(self, callback: Callable[[], None]) -> None:
        self.loop.call_soon(self._then_look, callback)

    def _tick(self) -> None:
        self._then_look(self.reactor.tick)
        self.ticker = self.loop.call_later(TICK_MS / 1000, self._tick)

    def _then_look(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        finally:
            for condition, future in self.waiters:
                if not future.done() and condition():
                    future.set_result(None)

    async def until(self, condition: Callable[[], bool], what: str = "") -> None:
        """Wait for the reactor to get there (looked at after each of its calls)."""
        if condition():
            return
        entry = (condition, self.loop.create_future())
        self.waiters.append(entry)
        try:
            await asyncio.wait_for(entry[1], PATIENCE_S)
        except TimeoutError:
            raise AssertionError(f"waited in vain: {what}; {self.reactor.stats()}") from None
        finally:
            self.waiters.remove(entry)

    async def session(self, index: int = 0) -> Session:
        await self.until(lambda: len(self.sessions) > index, f"session {index}")
        return self.sessions[index]

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/"

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.ticker.cancel()
        if self.watched >= 0:
            self.loop.remove_reader(self.watched)
        self.reactor.shutdown()
        self.listener.close()

    # -- the handler

    def on_http(self, conn: int, data: bytes) -> None:
        self.http[conn] = self.http.get(conn, b"") + data
        if self.plain is not None:
            self.plain(conn, data)
            return
        head, end, leftover = self.http[conn].partition(b"\r\n\r\n")
        if not end:
            return
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"sec-websocket-key":
                session = Session(conn)
                self.sessions.append(session)
                self.by_conn[conn] = session
                response = accept_response(value.strip())
                self.reactor.upgrade(conn, session, response, leftover, self.auth_timeout_ms)

    def on_http_closed(self, conn: int) -> None:
        self.http_closed.append(conn)

    def on_message(self, session: Session, data: bytes, wait_ms: int) -> None:
        session.messages.append(data)
        session.waits.append(wait_ms)
        self.message(session, data)

    def on_writable(self, session: Session) -> None:
        session.writable += 1
        self.writable(session)

    def on_closed(self, session: Session, code: int) -> None:
        session.closed.append(code)
        self.closed(session, code)


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes | None = b"\x12\x34\x56\x78",
    length: int | None = None,
    form: int | None = None,
) -> bytes:
    """A client's frame, legal or not: `length` lies about the size, `form` (7, 16, 64) chooses
    how it is written."""
    size = len(payload) if length is None else length
    if form is None:
        form = 7 if size < 126 else 16 if size <= 0xFFFF else 64
    bit = 0x80 if mask is not None else 0
    out = bytes([(0x80 if fin else 0) | rsv << 4 | opcode])
    if form == 7:
        out += bytes([bit | size])
    elif form == 16:
        out += bytes([bit | 126]) + struct.pack("!H", size)
    else:
        out += bytes([bit | 127]) + struct.pack("!Q", size)
    if mask is None:
        return out + payload
    return out + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(payload))


def close_payload(code: int, reason: bytes = b"") -> bytes:
    return struct.pack("!H", code) + reason


class Raw:
    """A client that says exactly what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def tcp(cls, server: Server) -> Raw:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(reader, writer)

    @classmethod
    async def websocket(cls, server: Server, also: bytes = b"") -> Raw:
        """Upgraded; `also` goes out in the same segment as the request."""
        raw = await cls.tcp(server)
        key = base64.b64encode(os.urandom(16))
        raw.send(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + b"\r\n\r\n" + also
        )
        head = await asyncio.wait_for(raw.reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
        assert head == accept_response(key)
        return raw

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def frame(self) -> tuple[int, bytes]:
        """The server's next frame: (opcode, payload)."""
        return await asyncio.wait_for(self._frame(), PATIENCE_S)

    async def _frame(self) -> tuple[int, bytes]:
        head = await self.reader.readexactly(2)
        assert head[0] & 0xF0 == 0x80, "a server's frame is final and uses no extension"
        assert not head[1] & 0x80, "a server does not mask"
        size = head[1]
        if size == 126:
            (size,) = struct.unpack("!H", await self.reader.readexactly(2))
            assert size > 125
        elif size == 127:
            (size,) = struct.unpack("!Q", await self.reader.readexactly(8))
            assert size > 0xFFFF
        return head[0] & 0x0F, await self.reader.readexactly(size)

    async def close_code(self) -> int:
        """Skip to the close frame; 1005 if it has no code."""
        while True:
            opcode, payload = await self.frame()
            if opcode == 8:
                return struct.unpack("!H", payload[:2])[0] if payload else 1005

    async def end(self) -> bytes:
        """Everything up to the server's FIN."""
        return await asyncio.wait_for(self.reader.read(), PATIENCE_S)

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            pass
