"""HTTP over a plain socket: what is sent is exactly what a test says."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from ..server import PATIENCE_S


@dataclass(frozen=True)
class Response:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Http:
    """One connection, for as many requests as it lives."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, address: tuple[str, int]) -> Http:
        return cls(*await asyncio.open_connection(*address))

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    async def response(self, *, head: bool = False) -> Response:
        """Read one response (``head``: to HEAD, so without its body).

        :raises asyncio.IncompleteReadError: the connection ended.
        """
        async with asyncio.timeout(PATIENCE_S):
            start, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {}
            for line in filter(None, lines):
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            version, status = start.split()[:2]
            assert version == "HTTP/1.1"
            length = 0 if head else int(headers.get("content-length", 0))
            return Response(int(status), headers, await self.reader.readexactly(length))

    async def request(
        self,
        method: str,
        path: str,
        *,
        token: str | None = None,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Response:
        """Ask and wait for the response. ``body`` is sent as JSON, bytes as they are."""
        await self.send(encode(method, path, token=token, body=body, headers=headers))
        return await self.response(head=method == "HEAD")

    async def ended(self) -> bytes:
        """Read to the end of the connection; what came."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read()

    async def aclose(self) -> None:
        self.writer.close()


def encode(
    method: str, path: str, *, token: str | None = None, body: Any = None, headers: dict[str, str] | None = None
) -> bytes:
    """The bytes of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: chat.example"]
    content = b""
    if body is not None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines.append(f"Content-Length: {len(content)}")
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


async def http(address: tuple[str, int], method: str, path: str, **options: Any) -> Response:
    """One request on a connection of its own."""
    connection = await Http.open(address)
    try:
        return await connection.request(method, path, **options)
    finally:
        await connection.aclose()
