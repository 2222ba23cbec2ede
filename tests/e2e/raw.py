"""A WebSocket connection on a bare socket, for frames that no well-behaved library sends.

It reads only when a test asks it to, and sends whatever a test gives it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import struct
from typing import Any, NamedTuple

from ..server import PATIENCE_S
from .client import Closed

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class Frame(NamedTuple):
    opcode: int
    payload: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.payload)


def handshake(**headers: str | None) -> bytes:
    """An upgrade request; headers replace the usual ones (None: left out), `_` stands for `-`."""
    lines = {
        "Host": "chat.example",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
    }
    for name, value in headers.items():
        key = name.replace("_", "-")
        lines.pop(key, None)
        if value is not None:
            lines[key] = value
    return b"GET /ws HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()).encode() + b"\r\n"


def frame(opcode: int, payload: bytes, *, fin: bool = True, rsv: int = 0, masked: bool = True) -> bytes:
    """A frame as a client sends it."""
    head = bytes([(0x80 if fin else 0) | rsv << 4 | opcode])
    mask_bit = 0x80 if masked else 0
    if len(payload) < 126:
        head += bytes([mask_bit | len(payload)])
    elif len(payload) < 65536:
        head += struct.pack("!BH", mask_bit | 126, len(payload))
    else:
        head += struct.pack("!BQ", mask_bit | 127, len(payload))
    if not masked:
        return head + payload
    mask = os.urandom(4)
    return head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


class Raw:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = b""

    @classmethod
    async def open(cls, address: tuple[str, int], *, receive_buffer: int | None = None) -> Raw:
        """Connect; a small ``receive_buffer`` makes it feel soon when this end does not read."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(sock, address)
        return cls(sock)

    @property
    def port(self) -> int:
        return int(self.sock.getsockname()[1])

    def close(self) -> None:
        self.sock.close()

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def send_json(self, **message: Any) -> None:
        await self.send(frame(TEXT, json.dumps(message).encode()))

    async def _more(self) -> bool:
        async with asyncio.timeout(PATIENCE_S):
            data = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
        self._buffer += data
        return bool(data)

    async def _take(self, n: int) -> bytes:
        while len(self._buffer) < n:
            if not await self._more():
                raise EOFError(f"the connection ended; {self._buffer!r} was left")
        data, self._buffer = self._buffer[:n], self._buffer[n:]
        return data

    async def upgrade(self, **headers: str | None) -> bytes:
        """Ask for the upgrade; the head of the response."""
        await self.send(handshake(**headers))
        return await self.head()

    async def head(self) -> bytes:
        """The head of the response to an upgrade that was accepted."""
        while b"\r\n\r\n" not in self._buffer:
            if not await self._more():
                raise EOFError(f"no response but {self._buffer!r}")
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        return head

    async def frame(self) -> Frame:
        """The next frame (the server sends no fragments).

        :raises EOFError: the connection ended.
        """
        first, second = await self._take(2)
        assert first & 0x80, "a fragment"
        assert not second & 0x80, "a masked frame from a server"
        size = second & 0x7F
        if size == 126:
            (size,) = struct.unpack("!H", await self._take(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", await self._take(8))
        return Frame(first & 0x0F, await self._take(size))

    async def message(self, t: str) -> dict[str, Any]:
        """The next message of a type; others are passed over."""
        while True:
            opcode, payload = await self.frame()
            assert opcode != CLOSE, payload
            if opcode == TEXT and (message := json.loads(payload))["t"] == t:
                return message

    async def closing(self) -> Closed:
        """Read on to the close frame."""
        while True:
            opcode, payload = await self.frame()
            if opcode == CLOSE:
                return Closed(struct.unpack("!H", payload[:2])[0] if payload else 1005, payload[2:].decode())

    async def ended(self) -> None:
        """Read on to the end of the connection, whatever comes."""
        try:
            while await self._more():
                self._buffer = b""
        except ConnectionResetError:
            pass

    async def log_in(self, token: str, **fields: Any) -> None:
        """Log in and read up to `ready`."""
        await self.send_json(t="auth", id=1, v=1, token=token, **fields)
        await self.message("ready")
