"""Hosts that share nothing but one MongoDB-wire server and one Redis, which a test may kill and stop.

A host is a chatcore instance with a data and a run folder of its own, two workers each. All listen
on 127.0.0.1: no test here is about the network between client and server.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import ClientConnection

from ..e2e.client import Client, Message
from ..e2e.rest import Http
from ..e2e.traffic import Talker, Traffic
from ..e2e.world import User, World, new_cid
from ..server import PATIENCE_S, Backend, Server, eventually
from ..services.mongodb import MongoServer
from ..services.redis import RedisServer

WORKERS = 2
#: Promised after Redis is back: every client holds everything, and all parts are well.
CONVERGE_S = 10.0
#: Promised after a host died without a word: its users appear offline.
PRESENCE_S = 30.0


class Site:
    """The two services, and the hosts on them."""

    def __init__(self, directory: Path, *, settings: Mapping[str, object] | None = None, errors: str | None = None):
        """``settings`` of each host; ``errors`` in their logs that the test is about (a pattern)."""
        self.mongo = MongoServer()
        self.redis = RedisServer(directory / "redis")
        self._database = contextlib.ExitStack()
        self._backend = Backend("hosts", prepare=lambda data: self._names, stall=lambda data: contextlib.nullcontext())
        self._names: dict[str, str] = {}
        self.servers = [
            Server(directory / name, backend=self._backend, settings=settings, workers=WORKERS, errors=errors)
            for name in ("a", "b")
        ]

    def start(self, *, redis: bool = True) -> Site:
        """Start everything (``redis``: else it is away, and its port known)."""
        self.mongo.__enter__()
        database = self._database.enter_context(self.mongo.fresh_database())
        self.redis.start()
        if not redis:
            self.redis.kill(lose_data=True)
        self._names |= {
            "CHATCORE_STORE_MONGODB_URL": self.mongo.url,
            "CHATCORE_STORE_MONGODB_DATABASE": database,
            "CHATCORE_REDIS_URL": self.redis.url,
        }
        for server in self.servers:
            server.settings = {**server.settings, **self._names}
        with ThreadPoolExecutor() as pool:
            list(pool.map(Server.start, self.servers))
        return self

    def end(self) -> None:
        """Stop the hosts as an operator does and see that they had no errors; then the services."""
        try:
            with contextlib.suppress(RuntimeError):
                self.mongo.resume()
            if self.redis.process is not None:
                self.redis.thaw()
            with ThreadPoolExecutor() as pool:
                list(pool.map(Server.stop, self.servers))
        finally:
            for server in self.servers:
                server.kill()
            self._database.close()
            self.mongo.close()
            self.redis.kill()

    def freeze_store(self) -> None:
        """The store accepts connections (the kernel does) and answers nothing, from when this returns on."""
        self.mongo.pause()
        tasks = Path(f"/proc/{self.mongo.pid}/task")
        # A signal reaches one thread after the other; what still runs may still commit.
        eventually(lambda: all(_state(task) == "T" for task in tasks.iterdir()), "every thread has stopped")

    def need_own_store(self) -> None:
        """Skip the test if the store is not ours: the test stops or kills it."""
        if self.mongo.external:
            pytest.skip("the server of CHATCORE_TEST_MONGODB_URL may not be stopped")


def _state(task: Path) -> str:
    """Of a thread, as in proc(5)."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


class HostWorld(World):
    """A host's side of a test."""

    @staticmethod
    async def whole_log(client: Client, conv: str) -> list[Message]:
        """Every entry, by pages as long as they may be: each costs FerretDB a look at the whole collection."""
        entries: list[Message] = []
        while True:
            after = entries[-1]["s"] if entries else 0
            page = await client.request("history", c=conv, after=after, limit=100, raw=True)
            entries += page["entries"]
            if not page["more"]:
                assert [entry["s"] for entry in entries] == list(range(1, len(entries) + 1))
                return entries


class Pair:
    """The two hosts' sides of a test. All clients are known to both, so that a test that opens a conversation
    waits until those on the other host have its `conv`, too."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.a, self.b = (HostWorld(server) for server in site.servers)
        self.b.clients = self.a.clients

    @property
    def servers(self) -> list[Server]:
        return self.site.servers

    async def both(self, user: User, **auth: Any) -> tuple[Client, Client]:
        """Two clients of one user, one on each host."""
        return await self.a.connect(user, **auth), await self.b.connect(user, **auth)

    async def aclose(self) -> None:
        await self.a.aclose()


# --- how a host says that it is ------------------------------------------------------


async def readyz(server: Server) -> dict[int, tuple[int, dict[str, str]]]:
    """The answer of each worker: the status and its parts, by slot."""
    told: dict[int, tuple[int, dict[str, str]]] = {}
    for _ in range(200):
        http = await Http.open(server.address)
        try:
            response = await http.request("GET", "/readyz")
            slot = server.slot_of(http.writer.get_extra_info("sockname")[1])
        except (OSError, asyncio.IncompleteReadError):
            continue
        finally:
            await http.aclose()
        if slot is not None:
            told[slot] = response.status, response.json["parts"]
        if len(told) == server.workers:
            return told
    raise AssertionError(f"not every worker of {server.data.name} answers: {told}")


async def says(servers: list[Server], within_s: float = PATIENCE_S, **parts: str) -> float:
    """Wait until every worker says so in readyz, and every host in its status; after how many seconds."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    # Without the bus the others are heard through the store; without the store there is nothing to serve.
    code = 503 if parts.get("store") == "down" else 200
    while True:
        status = [{name: server.ask("status")[name] for name in parts} for server in servers]
        if all(one == parts for one in status):
            told = [one for server in servers for one in (await readyz(server)).values()]
            if all(status == code and parts.items() <= now.items() for status, now in told):
                return loop.time() - began
        else:
            told = []
        assert loop.time() - began < within_s, f"not within {within_s} s: {parts}; status {status}, readyz {told}"
        await asyncio.sleep(0.05)


# --- traffic -------------------------------------------------------------------------


class Roamer(Talker):
    """A talker that comes back on the next host each time, and pauses between its messages."""

    def __init__(self, servers: list[Server], user: User, pause_s: float) -> None:
        super().__init__(servers[0], user)
        self.servers = servers
        self.pause_s = pause_s
        self.ack_times: list[float] = []
        self.refusals: list[str] = []

    async def live(self) -> None:
        for turn in range(1, 1_000_000):
            with contextlib.suppress(OSError, EOFError, websockets.WebSocketException):
                await self._one_connection()
            self.server = self.servers[turn % len(self.servers)]
            await asyncio.sleep(random.uniform(0, 0.05))

    def _take(self, ws: ClientConnection, message: Message, resumed: bool) -> None:
        if message["t"] == "error":
            assert "retry_after_ms" in message, f"{self.user.name}: {message}"
            self.refusals.append(message["code"])
            if message["id"] == 1:
                raise ConnectionError(f"not logged in: {message}")
        super()._take(ws, message, resumed)

    async def talk(self) -> None:
        loop = asyncio.get_running_loop()
        number = 0
        while self.sending:
            conv = self.convs[number % len(self.convs)]
            cid = new_cid()
            reply = await self._send_until_ok({"c": conv, "cid": cid, "body": f"{self.user.name} {number}"})
            self.acked[conv, cid] = reply["s"]
            self.ack_times.append(loop.time())
            self.on_ack()
            number += 1
            await asyncio.sleep(random.uniform(0.5, 1.5) * self.pause_s)


class HostTraffic(Traffic):
    """Roamers on both hosts, in the same conversations."""

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair.a)
        self.pair = pair

    async def begin(self, talkers: int, conversations: int, pause_s: float = 0.0) -> None:
        """Half of them begin on each host."""
        users = await asyncio.gather(*(self.world.user(f"t{i}") for i in range(talkers)))
        servers = self.pair.servers
        self.roamers = [Roamer([*servers[i % 2 :], *servers[: i % 2]], user, pause_s) for i, user in enumerate(users)]
        self.talkers = [*self.roamers]
        self._tasks = [asyncio.create_task(talker.live()) for talker in self.talkers]
        owner = await self.world.connect(users[0])
        self.convs = [await self.world.group(owner, *users[1:], title=f"g{i}") for i in range(conversations)]
        await owner.close()
        for i, talker in enumerate(self.talkers):
            talker.convs = self.convs[i % conversations :] + self.convs[: i % conversations]
            talker.on_ack = self._ack
            self._senders.append(asyncio.create_task(talker.talk()))
        await self.flow(talkers)

    async def hush(self) -> None:
        """No more sends: those under way are acknowledged."""
        for talker in self.talkers:
            talker.sending = False
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*self._senders)

    async def converge(self) -> float:
        """Wait until all talkers hold all acknowledged messages; after how many seconds."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        heads = dict.fromkeys(self.convs, 0)
        for talker in self.talkers:
            for (conv, _), seq in talker.acked.items():
                heads[conv] = max(heads[conv], seq)
        await asyncio.gather(*(talker.holds(heads) for talker in self.talkers))
        return loop.time() - began

    def longest_gap(self, since: float, until: float) -> float:
        """The longest time between two acknowledgements to any talkers, in this time."""
        times = sorted(t for roamer in self.roamers for t in roamer.ack_times if since <= t <= until)
        return max(b - a for a, b in zip([since, *times], [*times, until], strict=True))

    def longest_wait(self, since: float, until: float) -> float:
        """The longest time between two acknowledgements to one and the same, in this time."""
        gaps: list[float] = []
        for roamer in self.roamers:
            times = [t for t in roamer.ack_times if since <= t <= until]
            gaps += (b - a for a, b in zip([since, *times], [*times, until], strict=True))
        return max(gaps)


class Reader:
    """Asks for the newest page of a conversation again and again; notes how long each took."""

    def __init__(self, client: Client, conv: str) -> None:
        self.took: list[float] = []
        self._client = client
        self._conv = conv
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await self._client.request("history", c=self._conv, limit=20)
            self.took.append(loop.time() - began)
            await asyncio.sleep(0.2)

    async def end(self) -> float:
        """Stop; the longest that it had to wait."""
        if self._task.done() and not self._task.cancelled():
            self._task.result()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        return max(self.took)


async def crosses(one: Client, other: Client, conv: str) -> None:
    """See that what only the bus carries gets from one to the other: read marks, at most once each."""
    for _ in range(20):
        # One's own messages move one's mark by themselves: so it is the other's that is read.
        sent = await World.send(other, conv, "read this")
        await one.reach(conv, sent["s"])
        await one.request("read", c=conv, upto=sent["s"])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await other.expect(t="read", c=conv, user=one.user, upto=sent["s"])
                return
    raise AssertionError(f"no read mark of {one.user} came through")


async def settled(watcher: Client, user: str, state: str) -> None:
    """Wait until this is the last state of the user that the watcher was sent."""
    await watcher.until(lambda: last_told(watcher, user) == state, f"{user} is {state}")


def last_told(watcher: Client, user: str) -> str:
    """The last state that it was sent, by a push or in the answer to `watch`."""
    told = ""
    for message in watcher.received:
        for one in message.get("states", [message] if message["t"] == "presence" else []):
            if one["user"] == user:
                told = one["state"]
    return told


async def run(pair: Pair, talkers: int, conversations: int, pause_s: float, work: Callable[[HostTraffic], Any]) -> None:
    """Run ``work`` in the middle of traffic, then prove that nothing was lost or sent twice."""
    traffic = HostTraffic(pair)
    try:
        await traffic.begin(talkers, conversations, pause_s)
        await work(traffic)
        await traffic.end()
    finally:
        await traffic.aclose()
