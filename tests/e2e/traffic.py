"""Clients that obey the protocol when the server goes away: come back, resume, repeat.

They keep what they were sent, so that a test can compare it with the log at the end.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import websockets
from websockets.asyncio.client import ClientConnection, connect

from ..server import PATIENCE_S, Server
from .client import Message, is_entry
from .world import User, World, new_cid


class Talker:
    """One user on one connection at a time: receives everything, and sends one message after the other."""

    def __init__(self, server: Server, user: User) -> None:
        self.server = server
        self.user = user
        self.record: dict[str, list[Message]] = {}  # the received entries, by conversation
        self.start: dict[str, int] = {}  # where it was attached at first: the record begins behind
        self.acked: dict[tuple[str, str], int] = {}  # (conversation, cid) -> seq
        self.closes: list[tuple[int, str]] = []  # 1006: without a close frame
        self.connects = 0
        self.sending = True
        self.convs: list[str] = []  # where to send to
        self.on_ack: Callable[[], None] = lambda: None
        self._sync: str | None = None
        self._ws: ClientConnection | None = None
        self._ready = asyncio.Event()
        self._replies: dict[int, asyncio.Future[Message]] = {}
        self._ids = 0
        self.moved = asyncio.Event()

    # --- receiving ----------------------------------------------------------------
    async def live(self) -> None:
        """Stay connected until cancelled."""
        while True:
            try:
                await self._one_connection()
            except (OSError, websockets.WebSocketException, EOFError):
                pass  # `closes` has it, if there was a connection at all
            await asyncio.sleep(random.uniform(0, 0.05))

    async def _one_connection(self) -> None:
        host, port = self.server.address
        async with connect(f"ws://{host}:{port}/ws", ping_interval=None, proxy=None, compression=None) as ws:
            self.connects += 1
            auth: Message = {"t": "auth", "id": 1, "v": 1, "token": self.user.token}
            if self._sync is not None:
                auth |= {"sync": self._sync, "have": {conv: self._held(conv) for conv in self.start}}
            await ws.send(json.dumps(auth))
            try:
                async for text in ws:
                    self._take(ws, json.loads(text), resumed=self._sync is not None)
            finally:
                self._ready.clear()
                self._ws = None
                for future in self._replies.values():
                    if not future.done():
                        future.set_exception(ConnectionError("closed"))
                        future.exception()
                self._replies.clear()
                if ws.close_code is not None:  # else it is this end that stops
                    self.closes.append((ws.close_code, ws.close_reason or ""))

    def _take(self, ws: ClientConnection, message: Message, resumed: bool) -> None:
        t = message["t"]
        if is_entry(message):
            held = self._held(message["c"])
            assert message["s"] == held + 1, f"{self.user.name}: {message} came where {held + 1} was due"
            self.record[message["c"]].append(message)
            self.moved.set()
        elif t == "conv" and "after" in message:
            self.start.setdefault(message["c"], message["after"])
            self.record.setdefault(message["c"], [])
            held = self._held(message["c"])
            assert message["after"] == held, f"{self.user.name} holds {held}: {message}"
        elif t == "ok" and message["id"] == 1:
            assert message["full"] is not resumed
        elif t in ("ok", "error"):
            future = self._replies.pop(message["id"], None)
            if future is not None and not future.done():
                future.set_result(message)
        elif t == "ready":
            self._sync = message["sync"]
            self._ws = ws
            self._ready.set()

    def _held(self, conv: str) -> int:
        """The last seq that it holds."""
        return self.start[conv] + len(self.record[conv])

    async def holds(self, heads: dict[str, int]) -> None:
        """Wait until everything up to these seqs was received."""
        async with asyncio.timeout(PATIENCE_S):
            while any(conv not in self.start or self._held(conv) < head for conv, head in heads.items()):
                self.moved.clear()
                await self.moved.wait()

    # --- sending ------------------------------------------------------------------
    async def talk(self) -> None:
        """Send until ``sending`` is over; each message until it is acknowledged."""
        number = 0
        while self.sending:
            conv = self.convs[number % len(self.convs)]
            cid = new_cid()
            reply = await self._send_until_ok({"c": conv, "cid": cid, "body": f"{self.user.name} {number}"})
            self.acked[conv, cid] = reply["s"]
            self.on_ack()
            number += 1
            await asyncio.sleep(self.server.backend.pace_s)

    async def _send_until_ok(self, message: Message) -> Message:
        while True:
            await self._ready.wait()
            ws = self._ws
            assert ws is not None
            self._ids += 1
            id = self._ids + 1
            future = self._replies[id] = asyncio.get_running_loop().create_future()
            try:
                await ws.send(json.dumps({"t": "send", "id": id, **message}))
                reply: Message = await future
            except (OSError, websockets.WebSocketException):
                await asyncio.sleep(0)  # let the reader find out
                continue
            if reply["t"] == "ok":
                return reply
            assert "retry_after_ms" in reply, f"{message} was refused: {reply}"
            await asyncio.sleep(reply["retry_after_ms"] / 1000)


class Traffic:
    """Many talkers in some conversations, until ``end`` proves that all of them were sent the same."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.talkers: list[Talker] = []
        self.convs: list[str] = []
        self.acks = 0
        self._acked = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._senders: list[asyncio.Task[None]] = []

    async def begin(self, talkers: int, conversations: int) -> None:
        """All talkers join every conversation, and send."""
        users = [await self.world.user(f"t{i}") for i in range(talkers)]
        self.talkers = [Talker(self.world.server, user) for user in users]
        self._tasks = [asyncio.create_task(talker.live()) for talker in self.talkers]
        owner = await self.world.connect(users[0])
        self.convs = [await self.world.group(owner, *users[1:], title=f"g{i}") for i in range(conversations)]
        await owner.close()
        for i, talker in enumerate(self.talkers):
            talker.convs = self.convs[i % conversations :] + self.convs[: i % conversations]
            talker.on_ack = self._ack
            self._senders.append(asyncio.create_task(talker.talk()))

    def _ack(self) -> None:
        self.acks += 1
        self._acked.set()

    async def flow(self, acks: int) -> None:
        """Wait until so many more messages were acknowledged."""
        goal = self.acks + acks
        async with asyncio.timeout(PATIENCE_S):
            while self.acks < goal:
                self._check()
                self._acked.clear()
                await asyncio.wait(
                    [asyncio.ensure_future(self._acked.wait()), *self._tasks, *self._senders],
                    return_when=asyncio.FIRST_COMPLETED,
                )

    def _check(self) -> None:
        for task in (*self._tasks, *self._senders):
            if task.done() and not task.cancelled():
                task.result()

    async def end(self) -> dict[str, list[Message]]:
        """Stop sending; see that all acknowledged messages are in the log, once, and all talkers hold it."""
        for talker in self.talkers:
            talker.sending = False
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*self._senders)
        reader = await self.world.connect(self.talkers[0].user)
        logs = {conv: await self.world.whole_log(reader, conv) for conv in self.convs}
        for talker in self.talkers:
            await talker.holds({conv: len(log) for conv, log in logs.items()})
            expected = {conv: log[talker.start[conv] :] for conv, log in logs.items()}
            assert talker.record == expected, f"{talker.user.name} was told something else than the log"
        acked = {key: seq for talker in self.talkers for key, seq in talker.acked.items()}
        stored = [(conv, e["cid"], e["s"]) for conv, log in logs.items() for e in log if e["t"] == "msg"]
        # Every message was repeated until it was acknowledged, so the log holds just these.
        assert sorted(stored) == sorted((conv, cid, seq) for (conv, cid), seq in acked.items())
        self._check()
        return logs

    async def aclose(self) -> None:
        """End all tasks."""
        for task in (*self._tasks, *self._senders):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._senders, return_exceptions=True)


async def with_traffic(server: Server, talkers: int, conversations: int, work: Callable[[Traffic], Any]) -> Traffic:
    """Run ``work`` in the middle of traffic, then prove that nothing was lost or sent twice."""
    world = World(server)
    traffic = Traffic(world)
    try:
        await traffic.begin(talkers, conversations)
        await traffic.flow(2 * talkers)
        await work(traffic)
        await traffic.flow(2 * talkers)
        await traffic.end()
    finally:
        await traffic.aclose()
        await world.aclose()
    return traffic
