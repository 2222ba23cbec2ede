"""One WebSocket connection, as thin as it can be: hundreds of clients share a machine with what they test.

It knows the protocol's transport and nothing of chat. Frames are masked with the key 0, as RFC 6455 allows:
the bytes are the same, and masking costs nothing.
"""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, cast

TEXT, CLOSE, PING, PONG = 0x81, 0x88, 0x89, 0x8A
#: A worker that does not accept, or accepts and says nothing, is given up after this.
DIAL_S = 1.0
#: The most that the kernel may keep for a client that is slow on purpose.
SLOW_BUFFER_BYTES = 8192


class Broken(Exception):
    """The server broke the framing or answered the upgrade with something else."""


class Wire(asyncio.Protocol):
    """``on_message`` is given each text message; ``ended`` is set at the end, and ``code``, ``reason`` tell how:
    1006 for an end without a close frame, with ``reset`` if the other side reset it."""

    def __init__(self, on_message: Callable[[bytes], None], address: tuple[str, int]) -> None:
        self.code = 1006
        self.reason = ""
        self.reset = False
        self.upgraded = False
        self.greeted = False  # the first message came
        self.ended = asyncio.Event()
        self.opened = asyncio.get_running_loop().create_future()
        self.error: Exception | None = None
        self._on_message = on_message
        self._address = address
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    # --- asyncio.Protocol ----------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        key = base64.b64encode(os.urandom(16)).decode()
        host, port = self._address
        self._transport.write(
            f"GET /ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        at = 0
        if not self.upgraded:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                self._buffer = buffer
                return
            if not buffer.startswith(b"HTTP/1.1 101"):
                self._fail(Broken(f"the upgrade was answered with {buffer[:100]!r}"))
                return
            self.upgraded = True
            at = end + 4
            if not self.opened.done():
                self.opened.set_result(None)
        size = len(buffer)
        while size - at >= 2:
            head, length = buffer[at], buffer[at + 1]
            start = at + 2
            if length == 126:
                if size < start + 2:
                    break
                length = buffer[start] << 8 | buffer[start + 1]
                start += 2
            elif length == 127:
                if size < start + 8:
                    break
                (length,) = struct.unpack_from("!Q", buffer, start)
                start += 8
            if size < start + length:
                break
            at = start + length
            self._frame(head, buffer[start:at])
        self._buffer = buffer[at:] if at < size else b""

    def eof_received(self) -> bool:
        return False  # the transport closes itself

    def connection_lost(self, exc: Exception | None) -> None:
        self.reset = isinstance(exc, ConnectionResetError)
        if not self.opened.done():
            self.opened.set_exception(exc or ConnectionError("closed before the upgrade"))
            self.opened.exception()
        self.ended.set()

    # --- frames --------------------------------------------------------------------
    def _frame(self, head: int, payload: bytes) -> None:
        if head == TEXT:
            self.greeted = True
            self._on_message(payload)
        elif head == PING:
            self._write(PONG, payload)
        elif head == CLOSE:
            if len(payload) >= 2:
                self.code = payload[0] << 8 | payload[1]
                self.reason = payload[2:].decode(errors="replace")
            self._write(CLOSE, payload[:2])
            if self._transport is not None:
                self._transport.close()
        elif head != PONG:
            self._fail(Broken(f"a frame that begins with {head:#x}"))

    def _fail(self, error: Exception) -> None:
        self.error = error
        self.abort()

    def _write(self, head: int, payload: bytes) -> None:
        size = len(payload)
        if size < 126:
            frame = struct.pack("!BB4x", head, 0x80 | size)
        elif size < 65536:
            frame = struct.pack("!BBH4x", head, 0x80 | 126, size)
        else:
            frame = struct.pack("!BBQ4x", head, 0x80 | 127, size)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame + payload)

    @property
    def port(self) -> int:
        """This end's."""
        return int(self._transport.get_extra_info("sockname")[1]) if self._transport is not None else 0

    def send(self, message: bytes) -> None:
        """Send a text message; what is sent to a connection that is over is lost, as it may be at any time."""
        self._write(TEXT, message)

    def close(self) -> None:
        """Say good-bye; the server answers."""
        self._write(CLOSE, struct.pack("!H", 1000))

    def abort(self) -> None:
        """Drop the connection without a word."""
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Read nothing until ``go_on``."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def go_on(self) -> None:
        """Read again."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


async def dial(
    address: tuple[str, int], on_message: Callable[[bytes], None], *, slow: bool = False, within_s: float = DIAL_S
) -> Wire:
    """Connect and upgrade.

    :raises OSError: refused, reset, or not in time (TimeoutError is one).
    :raises Broken: the answer is no upgrade.
    """
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if slow:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER_BYTES)
    wire: Wire | None = None
    try:
        async with asyncio.timeout(within_s):
            await loop.sock_connect(sock, address)
            made: Any = await loop.create_connection(lambda: Wire(on_message, address), sock=sock)
            wire = cast(Wire, made[1])
            await asyncio.shield(wire.opened)
    except BaseException:
        if wire is not None:
            wire.abort()
            if wire.error is not None:
                raise wire.error from None
        else:
            sock.close()
        raise
    return wire
