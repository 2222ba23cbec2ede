"""Runs a whole worker (real sockets, real files) in this process, and one request through it.

The writer and the indexer of the store run in a process of their own, as they do in a server: the way is that through
the worker.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from chatcore.server.worker import Worker
from chatcore.settings import AccountSettings, ServerSettings, Settings
from chatcore.supervisor.stats import StatsCell
from chatcore.supervisor.worker_process import WorkerContext

from ..e2e.client import Client
from ..e2e.rest import http
from ..store.hosting import Apart
from .trace import Tracer, Walk

SCENARIOS: Final = ("send", "resume")
#: Runs of a scenario; the way that most of them took is its way. The others had a timer of the worker in between.
RUNS: Final = 9
#: Turns of the loop after the client has everything: what a task still does at its end.
TURNS: Final = 20


@asynccontextmanager
async def _worker(data: Path) -> AsyncIterator[tuple[Worker, tuple[str, int]]]:
    """A worker without a supervisor, and its address."""
    host = Apart(data)
    host.start()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    parent = os.pipe()
    accounts = AccountSettings(password_hash_memory_kib=8192, password_hash_time=1)
    stats = StatsCell.private()
    stats.reset(1)
    settings = Settings(server=ServerSettings(data=str(data)), accounts=accounts)
    address = listener.getsockname()
    worker = Worker(WorkerContext(settings, "walk", 0, secrets.randbits(40), listener, parent[0], stats, "0.0.0"))
    await worker.start()
    try:
        yield worker, address
    finally:
        await worker.drain()
        asyncio.get_running_loop().remove_reader(parent[0])
        for fd in parent:
            os.close(fd)
        host.stop()


class _Talk:
    """Two users, each with a client, in one group."""

    def __init__(self, address: tuple[str, int], tracer: Tracer) -> None:
        self._address = address
        self._tracer = tracer
        self._cids = 0
        self._sync: dict[str, str] = {}
        self._tokens: dict[str, str] = {}
        self._conv = ""
        self._head = 0

    async def _register(self, name: str) -> str:
        answer = await http(self._address, "POST", "/v1/users", body={"name": name, "password": "correct horse"})
        assert answer.status == 201, answer
        self._tokens[name] = answer.json["token"]
        return str(answer.json["user"]["id"])

    async def _log_in(self, client: Client, name: str, **fields: Any) -> None:
        await client.request("auth", v=1, token=self._tokens[name], **fields)
        self._sync[name] = (await client.expect(t="ready"))["sync"]

    async def begin(self) -> None:
        """Both are in the conversation and live, and everything that is made on first use is made."""
        await self._register("ann")
        bob = await self._register("bob")
        self.ann = await Client.open(self._address)
        await self._log_in(self.ann, "ann")
        self.bob = await Client.open(self._address)
        await self._log_in(self.bob, "bob")
        opened = await self.ann.request("open", cid="group", kind="group", title="walk", members=[bob])
        self._conv = opened["c"]
        await self.bob.expect(t="conv", c=self._conv)
        await self._send()

    async def _send(self) -> None:
        self._cids += 1
        sent = await self.ann.request("send", c=self._conv, cid=f"cid{self._cids}", body="hello")
        self._head = sent["s"]

    async def end(self) -> None:
        await self.ann.close()
        await self.bob.close()

    async def send(self) -> Walk:
        """From the request to its reply and to the entry that the other member is pushed."""
        self._tracer.begin()
        await self._send()
        await self.bob.reach(self._conv, self._head)
        return await self._walked()

    async def resume(self) -> Walk:
        """From `auth` with what the client holds to `ready`; it missed one entry of one conversation."""
        held = self._head
        # A `sync` of now: it covers all that happened before this client leaves.
        answer = await self.bob.request("ping")
        await self.bob.close()
        await self._send()
        self.bob = await Client.open(self._address)
        self._tracer.begin()
        await self._log_in(self.bob, "bob", sync=answer["sync"], have={self._conv: held})
        walk = await self._walked()
        assert self.bob.seqs(self._conv) == [self._head], self.bob.received
        return walk

    async def _walked(self) -> Walk:
        for _ in range(TURNS):
            await asyncio.sleep(0)
        return self._tracer.end()


async def walk_of(scenario: str, data: Path, runs: int = RUNS) -> Walk:
    """The way of a scenario through a worker with its data in a folder. Call it outside of a tracer's thread."""
    tracer = Tracer()
    with tracer.installed():
        async with _worker(data) as (_, address):
            talk = _Talk(address, tracer)
            await talk.begin()
            trace = getattr(talk, scenario)
            await trace()  # whatever is made on first use
            walks: list[Walk] = [await trace() for _ in range(runs)]
            await talk.end()
    ways = Counter(tuple(walk.modules) for walk in walks)
    [(usual, _)] = ways.most_common(1)
    return next(walk for walk in walks if tuple(walk.modules) == usual)
