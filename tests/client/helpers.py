"""What the tests with a real server share."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from chatcore.client import Client, Event, Message

from ..server import PATIENCE_S

PASSWORD = "correct horse"
E = TypeVar("E", bound=Event)


def fresh(name: str = "user") -> str:
    """A name that nobody has yet."""
    return f"{name}-{secrets.token_hex(4)}"


async def login(url: str, name: str | None = None, **options: Any) -> Client:
    """A client of a user, who is new if there is none of that name."""
    return await Client.login(url, name or fresh(), PASSWORD, register=True, **options)


async def until(chat: Client, kind: type[E], test: Callable[[E], bool] = lambda event: True) -> E:
    """The next event of a kind that passes a test; those before it are passed over."""
    async with asyncio.timeout(PATIENCE_S):
        async for event in chat.events():
            if isinstance(event, kind) and test(event):
                return event
    raise AssertionError(f"the events ended without a {kind.__name__}")


async def bodies(chat: Client, conv: str, count: int) -> list[Message]:
    """The next messages of a conversation."""
    return [await until(chat, Message, lambda message: message.conv == conv) for _ in range(count)]


class Proxy:
    """Stands between a client and the server, and can cut the line or keep answers to itself."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._lines: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.mute = False
        self.refuse = False
        self.accepted = 0
        self.heard = asyncio.Event()

    def cut(self) -> None:
        """End all connections without a word."""
        for line in self._lines:
            line.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            writer.transport.abort()
            return
        self.accepted += 1
        away_reader, away_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        self._lines |= {writer, away_writer}
        try:
            await asyncio.gather(self._pump(reader, away_writer, False), self._pump(away_reader, writer, True))
        finally:
            self._lines -= {writer, away_writer}
            writer.transport.abort()
            away_writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if answers and self.mute:
                    self.heard.set()
                    continue
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@contextlib.asynccontextmanager
async def proxy_to(port: int) -> AsyncIterator[Proxy]:
    """A proxy to a server on this machine."""
    proxy = Proxy(port)
    listener = await asyncio.start_server(proxy._serve, "127.0.0.1", 0)
    proxy.port = listener.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        listener.close()
        proxy.cut()
