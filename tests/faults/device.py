"""One client: it connects, resumes, keeps what it is sent, and comes back whatever happens, as docs/protocol.md says.

Where it differs from what the protocol advises, it is because a run packs the faults of a year into minutes:
the wait before coming back is at most ``BACKOFF_MOST_S`` and starts again after ``GOOD_S`` of a good connection
(not a minute each), so that what is measured is the server's doing and not the clients' patience; and on a
loopback a ping that is not answered within ``PONG_S`` (not 5 s) means that the server is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import orjson

from .record import Broken, Message, Record
from .wire import Broken as BrokenWire
from .wire import Wire, dial

ENTRIES = frozenset({"msg", "member", "meta", "edit", "del", "react"})
GOOD_S = 1.0
PONG_S = 1.0
#: A client that hears nothing asks whether the server is there; sooner if it waits for an answer.
PING_S = 5.0
ASK_S = 1.0
#: From the upgrade to the answer of `auth`; FerretDB reads every document there is for each login.
AUTH_S = 20.0
BACKOFF_MOST_S = 4.0
#: In place of a close code: the client wanted it.
BY_ITSELF = -1
PAGE = 100
LOOK = 20


@dataclass
class Life:
    """When a client was connected, for the figures: all in the loop's seconds."""

    #: (lost or noticed to be silent, ready again, close code), in order.
    gaps: list[tuple[float, float, int]] = field(default_factory=list)
    lost_at: float | None = None
    lost_code: int = 0
    closes: dict[int, int] = field(default_factory=dict)
    #: Connections that the other side reset before it had said a word, with the time.
    resets: list[float] = field(default_factory=list)
    connects: int = 0


Addresses = Callable[[], list[tuple[str, int]]]


class Device:
    """``live`` runs it until it is cancelled; it dials one of ``addresses`` at random (by ``chance``)."""

    def __init__(
        self, name: str, user: str, token: str, addresses: Addresses, broken: Broken, chance: random.Random,
        *, slow: bool = False,
    ) -> None:  # fmt: skip
        self.name = name
        self.user = user
        self.record = Record(name, broken)
        self.broken = broken
        self.life = Life()
        self.chance = chance
        self.ready = asyncio.Event()
        self.moved: Callable[[], None] = lambda: None  # called for every entry
        self.away = False  # the state that it wants
        self.detached = False  # the state of this connection
        self.slow = slow
        self.wire: Wire | None = None
        self.only_address: tuple[str, int] | None = None
        self._token = token
        self._addresses = addresses
        self._sync: str | None = None
        self._replies: dict[int, Callable[[Message | None], None]] = {}
        self._ids = 1
        self._ready_at = 0.0
        self._heard = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    # --- life ----------------------------------------------------------------------
    async def live(self) -> None:
        """Be connected, always again."""
        tries = 0
        try:
            while True:
                ended_ready, good_s, asked_s = await self._connection()
                tries = 0 if ended_ready and good_s >= GOOD_S else tries
                wait_s = self.chance.uniform(0, min(BACKOFF_MOST_S, 2.0**tries)) + asked_s
                tries += 1
                await asyncio.sleep(wait_s)
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self.wire is not None:
                self.wire.abort()

    async def _connection(self) -> tuple[bool, float, float]:
        """One connection; whether it got ready, how long it was good, and the wait that its close asks for."""
        addresses = self._addresses()
        address = self.only_address or self.chance.choice(addresses)
        try:
            wire = await dial(address, self._take, slow=self.slow)
        except (OSError, BrokenWire) as exc:
            if isinstance(exc, ConnectionResetError):
                self.life.resets.append(self._loop.time())
            if isinstance(exc, BrokenWire):
                self.broken.add("upgrade", f"{self.name}: {exc}")
            self._down(1006)
            return False, 0.0, 0.0
        self.life.connects += 1
        self.wire = wire
        self.record.note(f"connected from port {wire.port}")
        self._heard = self._loop.time()
        watch = self._spawn(self._watch(wire))
        try:
            self._log_in(wire)
            await wire.ended.wait()
        finally:
            watch.cancel()
            self.wire = None
            began = self._ready_at if self.ready.is_set() else None
            self.ready.clear()
            self._down(wire.code)
            replies, self._replies = self._replies, {}
            for on_reply in replies.values():
                on_reply(None)
        if wire.error is not None:
            self.broken.add("framing", f"{self.name}: {wire.error}")
        if wire.reset and not wire.greeted:
            self.life.resets.append(self._loop.time())
        if 4100 <= wire.code < 4200 and wire.code != 4104:
            self.broken.add("refused", f"{self.name}: closed with {wire.code} {wire.reason}")
        self.record.note(f"closed {wire.code} {wire.reason}")
        self.life.closes[wire.code] = self.life.closes.get(wire.code, 0) + 1
        asked = re.fullmatch(r"\w+ (\d+)", wire.reason)
        good_s = 0.0 if began is None else self._loop.time() - began
        return began is not None, good_s, int(asked[1]) / 1000 if asked else 0.0

    def _down(self, code: int, since: float | None = None) -> None:
        if self.life.lost_at is None:
            self.life.lost_at, self.life.lost_code = since or self._loop.time(), code

    def _up(self) -> None:
        self._ready_at = self._loop.time()
        if self.life.lost_at is not None:
            self.life.gaps.append((self.life.lost_at, self._ready_at, self.life.lost_code))
            self.life.lost_at = None
        self.ready.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            self.broken.add("client", f"{self.name}: {exc!r}")

    def _log_in(self, wire: Wire) -> None:
        auth: Message = {"t": "auth", "id": 1, "v": 1, "token": self._token, "ping_ms": 60_000}
        if self._sync is not None:
            auth |= {"sync": self._sync, "have": self.record.have()}
        self.detached = self.away
        if self.away:
            auth["only"] = []
        wire.send(orjson.dumps(auth))

    async def _watch(self, wire: Wire) -> None:
        """Ask whether the server is there when nothing was heard; drop the connection if not."""
        login_until = self._loop.time() + AUTH_S
        while True:
            await asyncio.sleep(0.25)
            now = self._loop.time()
            if self.slow:
                continue  # it does not read, so it cannot know
            if not self.ready.is_set():
                silent_s = AUTH_S if wire.greeted else PONG_S
                if now - self._heard > silent_s or now > login_until + AUTH_S:
                    wire.abort()
                    return
                continue
            if now - self._heard < (ASK_S if len(self._replies) else PING_S):
                continue
            asked = self._loop.time()
            self.ask({"t": "ping"}, self._on_pong)
            while self._heard < asked and self._loop.time() < asked + PONG_S:
                await asyncio.sleep(0.05)
            if self._heard < asked:
                self._down(1006, asked)
                wire.abort()
                return

    # --- what comes ----------------------------------------------------------------
    def _take(self, data: bytes) -> None:
        self._heard = self._loop.time()
        message: Message = orjson.loads(data)
        t = message["t"]
        if t in ENTRIES:
            if not self.record.pushed(message) and self.wire is not None:
                self.wire.abort()
            self.moved()
        elif t in ("ok", "error"):
            self._take_reply(message)
        elif t == "conv":
            if "after" in message and self.record.attached(message["c"], message["after"]):
                self._spawn(self._fill(message["c"]))
            elif message["role"] == "none":
                self.broken.add("refused", f"{self.name} was told to be out of {message['c']}")
        elif t == "ready":
            self._sync = message["sync"]
            self._up()

    def _take_reply(self, message: Message) -> None:
        if message.get("id") == 1:
            if message["t"] == "error":
                if "retry_after_ms" not in message:
                    self.broken.add("refused", f"{self.name}: auth was answered with {message}")
                self._spawn(self._log_in_later(message.get("retry_after_ms", 1000) / 1000))
            elif message.get("full") is not (self._sync is None):
                self.broken.add("refused", f"{self.name}: the sync {self._sync} was not known: {message}")
            return
        on_reply = self._replies.pop(message.get("id", 0), None)
        if on_reply is not None:
            on_reply(message)

    async def _log_in_later(self, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        if self.wire is not None:
            self._log_in(self.wire)

    # --- what goes -----------------------------------------------------------------
    def ask(self, request: Message, on_reply: Callable[[Message | None], None]) -> None:
        """Send a request; ``on_reply`` is given the reply, or None when the connection is gone without one."""
        if self.wire is None:
            on_reply(None)
            return
        self._ids += 1
        self._replies[self._ids] = on_reply
        self.wire.send(orjson.dumps({**request, "id": self._ids}))

    async def request(self, request: Message) -> Message | None:
        """The same, waiting."""
        future: asyncio.Future[Message | None] = self._loop.create_future()
        self.ask(request, lambda reply: None if future.done() else future.set_result(reply))
        return await future

    def _on_pong(self, reply: Message | None) -> None:
        if reply is not None and "sync" in reply and not any(log.missing_to for log in self.record.logs.values()):
            self._sync = reply["sync"]

    async def _fill(self, conv: str) -> None:
        """Load what is missing before what is pushed, page by page."""
        wire = self.wire
        while self.wire is wire and self.record.logs[conv].missing_to:
            log = self.record.logs[conv]
            reply = await self.request({"t": "history", "c": conv, "after": log.held, "limit": PAGE, "raw": True})
            if reply is None or self.wire is not wire:
                return  # the next connection asks again
            if reply["t"] == "error":
                if "retry_after_ms" not in reply:
                    self.broken.add("refused", f"{self.name}: history was answered with {reply}")
                    return
                await asyncio.sleep(reply["retry_after_ms"] / 1000)
            elif self.record.page(conv, reply["entries"]):
                return
            elif not reply["entries"]:
                self.broken.add("lost", f"{self.name}: {conv} has nothing after {log.held}, but its head was higher")
                return

    # --- moving about --------------------------------------------------------------
    async def go_away(self) -> None:
        """Attach nothing."""
        self.away = True
        wire = self.wire
        if wire is not None:
            self.detached = True
            reply = await self.request({"t": "attach", "only": []})
            if self.wire is wire and reply is not None and reply["t"] == "error":
                self.detached = False  # refused, so that it is live still: with `have` it would be sent things twice

    async def come_back(self) -> None:
        """Attach everything again, from where it was left."""
        self.away = False
        wire = self.wire
        # Entries of what is live would be sent again, as asked: not if it logged in anew meanwhile.
        if wire is None or not self.detached:
            return
        self.detached = False
        reply = await self.request({"t": "attach", "only": list(self.record.logs), "have": self.record.have()})
        if reply is not None and reply["t"] == "error" and self.wire is wire:
            wire.abort()  # its next login attaches all

    async def look(self, conv: str) -> None:
        """Open a conversation, as an app does: its newest page holds all that this client had heard of before."""
        log = self.record.logs.get(conv)
        # Until it is logged in, what it asks may be answered with `unauthenticated`: behind an `auth` that failed.
        if log is None or not self.ready.is_set() or self.detached:
            return
        told = log.reached
        reply = await self.request({"t": "history", "c": conv, "limit": LOOK, "raw": True})
        if reply is not None and reply["t"] == "ok":
            self.record.looked(conv, told, reply["entries"], reply["at"])
        elif reply is not None and "retry_after_ms" not in reply:
            self.broken.add("refused", f"{self.name}: history was answered with {reply}")

    def drop(self, *, politely: bool) -> None:
        """End the connection by itself; it comes back."""
        if self.wire is not None:
            self._down(BY_ITSELF)
            with contextlib.suppress(OSError):
                self.wire.close() if politely else self.wire.abort()
