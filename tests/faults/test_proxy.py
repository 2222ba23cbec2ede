"""The proxy harms the direction that it is to harm, and not the other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from .proxy import How, Proxy

PATIENCE_S = 10.0
#: Bytes that do not come within this do not come.
NOTHING_S = 0.3
LATE_S = 0.3


@contextlib.asynccontextmanager
async def line() -> AsyncIterator[tuple[Proxy, asyncio.StreamReader, asyncio.StreamWriter]]:
    """An echo behind a proxy, and a connection to it."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(100):
                writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = await Proxy(server.sockets[0].getsockname()[:2]).start()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield proxy, reader, writer
    finally:
        writer.close()
        await proxy.close()
        server.close()


async def told(reader: asyncio.StreamReader, within_s: float = PATIENCE_S) -> bytes | None:
    """The bytes that come; None: none."""
    try:
        async with asyncio.timeout(within_s):
            return await reader.read(100)
    except TimeoutError:
        return None


async def test_it_carries() -> None:
    async with line() as (_, reader, writer):
        writer.write(b"one")
        assert await told(reader) == b"one"


@pytest.mark.parametrize("up", [True, False])
async def test_bytes_vanish_one_way_and_the_connection_stays_until_it_is_healed(up: bool) -> None:
    async with line() as (proxy, reader, writer):
        proxy.block(up=How.NEVER if up else How.WELL, down=How.WELL if up else How.NEVER)
        writer.write(b"one")
        assert await told(reader, NOTHING_S) is None
        proxy.heal()
        # A connection that lost bytes cannot go on: it ends, one way or the other.
        with contextlib.suppress(ConnectionError):
            assert await told(reader) == b""
        again, there = await asyncio.open_connection("127.0.0.1", proxy.port)
        there.write(b"two")
        assert await told(again) == b"two"
        there.close()


async def test_bytes_come_late() -> None:
    async with line() as (proxy, reader, writer):
        proxy.block(down=How.LATE, delay_s=LATE_S)
        loop = asyncio.get_running_loop()
        began = loop.time()
        writer.write(b"one")
        assert await told(reader) == b"one"
        assert loop.time() - began >= LATE_S


async def test_one_side_is_shut_down() -> None:
    async with line() as (proxy, reader, writer):
        writer.write(b"one")
        assert await told(reader) == b"one"
        proxy.block(down=How.ENDED)
        assert await told(reader) == b""
        assert not writer.is_closing()
