"""A whole worker in this process: what it holds of clients that are gone, and whom it leaves in the lurch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

from chatcore.server.connections import DRAIN_BATCH
from chatcore.server.worker import Worker
from chatcore.settings import AccountSettings, ServerSettings, Settings
from chatcore.supervisor.stats import StatsCell
from chatcore.supervisor.worker_process import WorkerContext

from ..store.hosting import hosted
from .parts import PATIENCE_S, until

UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class Running:
    """A worker on a port of its own, with a store, until the block ends."""

    def __init__(self, data: Path) -> None:
        self._host = contextlib.ExitStack()
        self._data = data
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.address = self._listener.getsockname()
        self._parent = os.pipe()
        accounts = AccountSettings(password_hash_memory_kib=8192, password_hash_time=4)  # some ten milliseconds
        settings = Settings(server=ServerSettings(data=str(data)), accounts=accounts)
        stats = StatsCell.private()
        stats.reset(1)
        nonce = secrets.randbits(40)
        self.worker = Worker(WorkerContext(settings, "test", 0, nonce, self._listener, self._parent[0], stats, "0.0.0"))

    async def __aenter__(self) -> Running:
        self._host.enter_context(hosted(self._data))
        await self.worker.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if not self.worker.connections.draining:
            await self.worker.drain()
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._parent[0])
        for fd in self._parent:
            os.close(fd)
        self._host.close()


async def test_an_upgrade_whose_client_is_gone_leaves_no_session_behind(tmp_path: Path) -> None:
    """A stranger asked for something slow, for an upgrade behind it, and hung up: the upgrade came to nothing, but
    the session that had been made for it was kept for ever. 20 connections at a time, that filled the memory.
    """
    body = json.dumps({"name": "nobody", "password": "wrong horse"}).encode()
    slow = b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    async with Running(tmp_path) as running:
        worker = running.worker

        async def hang_up() -> bytes:
            reader, writer = await asyncio.open_connection(*running.address)
            writer.write(slow + UPGRADE)
            writer.write_eof()
            answer = await reader.read()
            writer.close()
            return answer

        async with asyncio.timeout(PATIENCE_S):
            answers = await asyncio.gather(*(hang_up() for _ in range(20)))
        assert not any(b" 101 " in answer for answer in answers)
        await until(lambda: worker.connections.reactor.connections() == 0, "the end of all connections")
        assert not worker.connections.reactor.sessions()
        assert worker.connections.reactor.websockets() == 0


class Client:
    """A session as the drain sees it."""

    def __init__(self, on_close: Callable[[], None]) -> None:
        self.busy = False
        self.closed = False
        self.answered = True
        self._on_close = on_close

    def close(self, code: int, reason: str = "") -> None:
        self.closed = True
        self.answered = not self.busy
        self._on_close()


async def test_a_drain_closes_nobody_who_asked_for_something_after_it_began(tmp_path: Path) -> None:
    """Who was idle was listed first and closed by the list, with pauses: whoever had sent something in one of the
    pauses was closed in the middle of it, long before the deadline.
    """
    async with Running(tmp_path) as running:
        loop = asyncio.get_running_loop()
        began = False

        def first_is_told() -> None:
            nonlocal began
            if not began:
                began = True
                loop.call_soon(all_ask)

        def all_ask() -> None:
            for client in clients:
                if not client.closed:
                    client.busy = True
                    loop.call_later(0.05, answer, client)

        def answer(client: Client) -> None:
            client.busy = False

        clients = [Client(first_is_told) for _ in range(3 * DRAIN_BATCH)]
        running.worker.connections.to_close.update(clients)  # type: ignore[arg-type]
        async with asyncio.timeout(PATIENCE_S):
            await running.worker.drain()
        assert all(client.closed for client in clients)
        left = sum(not client.answered for client in clients)
        assert not left, f"{left} of {len(clients)} were closed with a request outstanding"
