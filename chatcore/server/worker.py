"""One worker: one core, one loop, its share of the clients. What it is made of, and its life.

Everything is made here, after the fork, inside the running loop, and passed in;
the worker is the only global there is.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import signal
import struct
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

import orjson
import uvloop

from .. import protocol as p
from .._fast.reactor import TICK_MS, Frame, Reactor, Topic
from ..accounts.service import Accounts
from ..bus.base import Bus
from ..chat import events
from ..chat.delivery import Delivery
from ..chat.presence import Presence
from ..chat.room import Room
from ..chat.service import Chat
from ..chat.users import Users
from ..errors import ChatError, Internal, Unavailable
from ..queue.handlers import Handlers
from ..store.base import Entry, Store
from ..supervisor.stats import State
from ..supervisor.worker_process import WorkerContext
from .api import Api
from .backends import bus_figures, make_bus, make_store, start_store, user_channels
from .health import Panel
from .http import HttpConnection, HttpRequest, HttpResponse, encode_response, error_response
from .session import Session

log = logging.getLogger("chatcore.worker")

# A loop that stood still so long has missed heartbeats and bus messages: look at the store.
STALL_S: Final = 2.0
# Draining: sessions closed at a time, with a pause, so that others come to their turn.
DRAIN_BATCH: Final = 200
DRAIN_PAUSE_S: Final = 0.01
# Time for each of the clients that are told to come back, more than a log-in takes. Who waits can neither be reached
# nor send, so a few clients are not spread over as long as thousands.
RECONNECT_MS: Final = 10
# The interpreter lets a waiting thread (the store's) have its lock after this; the default of
# 5 ms would add that much to every commit while the loop is busy.
SWITCH_INTERVAL_S: Final = 0.0005
# The cycle collector looks at the young objects when there are so many more, at the middle-aged every 20th
# time, at all every 20th of those. Almost nothing here ends in cycles; at its defaults (700, 10, 10) it took
# a sixth of the time of a reconnect storm.
GC_THRESHOLDS: Final = (20_000, 20, 20)


def main(context: WorkerContext) -> int:
    """Run a worker until it is drained; returns its exit code.

    :raises StartError: with one line that says why it cannot start.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(*GC_THRESHOLDS)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(context))


async def _run(context: WorkerContext) -> int:
    worker = Worker(context)
    await worker.start()
    await worker.stopping.wait()
    await worker.drain()
    return 0


class Worker:
    """All parts of one worker."""

    def __init__(self, context: WorkerContext) -> None:
        self.context = context
        self.settings = settings = context.settings
        self.stats = context.stats
        self.data = Path(settings.server.data)
        self.stopping = asyncio.Event()
        self.draining = False
        self._spread_ms = settings.server.reconnect_spread_ms  # of those who are told to come back
        self.to_close: set[Session] = set()  # while draining: those that were not told yet
        self._http: dict[int, HttpConnection] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        limits, timeouts, rates = settings.limits, settings.timeouts, settings.rates
        self.reactor = Reactor(
            self,
            self._loop.call_soon,
            max_message_bytes=limits.frame_bytes,
            outbox_limit_bytes=limits.outbox_bytes,
            outbox_low_water_bytes=limits.outbox_low_water_bytes,
            rate_per_s=rates.messages_per_s,
            rate_burst=rates.messages_burst,
            handshake_timeout_ms=timeouts.handshake_ms,
            close_timeout_ms=timeouts.close_ms,
            # Some more than may stay: who is too many is upgraded and told so (1013).
            max_connections=limits.connections_per_worker + limits.http_connections_per_worker,
            io_uring=settings.server.io_uring,
        )
        if settings.server.io_uring and not self.reactor.uses_io_uring():
            log.info("this kernel has no io_uring for us: clients are sent to one by one")
        self._hello = self._make_hello()
        self._tick_timer: asyncio.TimerHandle | None = None
        self._last_tick = time.monotonic()

    # --- life -------------------------------------------------------------------
    async def start(self) -> None:
        """Open the store and the bus, make the parts that need them, then take clients.

        :raises StartError: the store cannot be used.
        """
        self._loop.add_signal_handler(signal.SIGTERM, self.stopping.set)
        self._loop.add_reader(self.context.parent_fd, self._parent_gone)
        backends = make_store(self.settings, self._on_commit, self._publish_yield)
        self._backends = backends
        self._racing = backends.racing
        self.cache = backends.cache
        self.store: Store = backends.store
        await start_store(self.settings, self.store)
        bus = make_bus(self.context, self.store)
        self.bus: Bus = bus
        self._user_channels = user_channels(bus)
        self._make_parts()
        figures = {**backends.figures, "bus": lambda: bus_figures(bus)}
        self.panel = Panel(self.stats, self.store, bus, self.cache, self.queue, figures)
        await self.bus.start(self)
        if self.cache is not None:
            await self.cache.listen(self.bus)
        if self.handlers.topics():
            await self.queue.start()
        await self.delivery.start()
        self.users.start()
        self.presence.start()
        self.reactor.listen(self.context.listener.fileno())
        self._loop.add_reader(self.reactor.fileno(), self.reactor.poll)
        self._tick()
        self._showing = self._loop.create_task(self.panel.run(), name="panel")
        self.stats.ready()
        self.handlers.start(self.queue)

    def _make_parts(self) -> None:
        settings, limits = self.settings, self.settings.limits
        racing, cache = self._racing, self.cache
        self.queue = self._backends.queue()
        self.handlers = Handlers()
        self.users = Users(
            self.store,
            self.bus,
            self.spawn,
            self._on_presence,
            racing.row_changed if racing is not None else lambda conv, user: None,
            racing.blocks_changed if racing is not None else lambda: None,
            channels=self._user_channels,
        )
        self.presence = Presence(self.store, self.bus, self.users.is_online)
        self.delivery = Delivery(
            self.store,
            self.bus,
            self.users,
            self._make_topic,
            Frame,
            ring=limits.ring,
            ring_bytes=limits.ring_bytes,
            # With the low-water mark before it, a replay stays below the limit of the outbox.
            replay_bytes=(limits.outbox_bytes - limits.outbox_low_water_bytes) // 2,
            backlog=limits.backlog,
            check_interval_s=settings.store.check_interval_ms / 1000,
            replay=None if cache is None else cache.replay,
        )
        self.users.delivery = self.delivery
        page = None if cache is None else cache.page
        self.chat = Chat(settings, self.store, self.bus, self.delivery, self.users, page)
        self.accounts = Accounts(settings, self.store)
        self.api = Api(self)

    def _parent_gone(self) -> None:
        log.warning("the supervisor is gone: draining")
        self._loop.remove_reader(self.context.parent_fd)
        self.stopping.set()

    async def drain(self) -> None:
        """Take no more clients, answer what is outstanding, tell everybody to come back, end."""
        self.stats.state = State.DRAINING
        deadline = self._loop.time() + self.settings.server.drain_timeout_ms / 1000
        # Who is in the queue of the listener is taken, and told; then others must.
        self.reactor.accept_pending()
        self.reactor.unlisten()
        self.context.listener.close()
        self.draining = True
        for http in list(self._http.values()):
            http.close_idle()
        await self._close_sessions(deadline)
        await self._wait_for(lambda: self.reactor.connections() == 0, deadline)
        await self._wait_for(lambda: not self._tasks, deadline)
        self._showing.cancel()
        await asyncio.gather(self._showing, return_exceptions=True)
        await self.presence.close()
        await self.users.close()
        await self.queue.close()
        await self.store.close()
        await self.bus.close()
        for client in self._backends.clients:
            await client.close()
        await self.delivery.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.accounts.close()
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        self._loop.remove_reader(self.reactor.fileno())
        self.reactor.shutdown()

    def _restart(self, x: Session) -> None:
        """Tell a client to come back, at random within a time that is enough for all of them."""
        x.close(p.CloseCode.RESTART, f"restart {random.randint(0, self._spread_ms)}")

    async def _close_sessions(self, deadline: float) -> None:
        self.to_close.update(self.reactor.sessions())
        self._spread_ms = min(self.settings.server.reconnect_spread_ms, len(self.to_close) * RECONNECT_MS)
        while self.to_close and self._loop.time() < deadline:
            # Those with nothing outstanding first; the others get until the deadline to be answered.
            for i, x in enumerate(list(self.to_close)):
                if x.busy:
                    continue
                self._restart(x)
                self.to_close.discard(x)
                if i % DRAIN_BATCH == DRAIN_BATCH - 1:
                    await asyncio.sleep(DRAIN_PAUSE_S)
            if self.to_close:
                await asyncio.sleep(DRAIN_PAUSE_S)
        for x in self.to_close:
            self._restart(x)

    async def _wait_for(self, done: Any, deadline: float) -> None:
        while not done() and self._loop.time() < deadline:
            await asyncio.sleep(0.02)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start a task that the worker owns: it is awaited or cancelled before the end."""
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("task %s failed", task.get_name(), exc_info=exc)

    def _tick(self) -> None:
        now = time.monotonic()
        late = now - self._last_tick - TICK_MS / 1000
        self._last_tick = now
        self.reactor.tick()
        stats = self.stats
        if late > 0:
            stats.loop_lag_max_ns = max(stats.loop_lag_max_ns, int(late * 1e9))
        if late > STALL_S:
            log.warning("the loop stood still for %.1f s", late)
            self.on_doubt("the loop stood still")
        stats.connections = self.reactor.connections()
        stats.websockets = self.reactor.websockets()
        stats.sessions = self.users.sessions
        stats.attached = len(self.delivery.rooms)
        stats.entries_appended = self.chat.appended
        stats.deliveries = self.delivery.deliveries
        stats.messages_in = self.reactor.stats()["messages_in"]
        self.panel.beat()
        stats.beat()
        self._tick_timer = self._loop.call_later(TICK_MS / 1000, self._tick)

    # --- parts that need each other -----------------------------------------------
    def _make_topic(self, room: Room) -> Topic:
        return Topic(self.reactor, room)

    def _on_commit(self, entries: list[Entry]) -> None:
        if self.cache is not None:
            self.cache.on_commit(entries)
        self.chat.on_commit(entries)

    def _publish_yield(self, conv: str) -> None:
        self.bus.publish(events.conv_channel(conv), events.YIELD)

    def _on_presence(self, user: str) -> None:
        self.presence.changed(user)

    def now_ms(self) -> int:
        """Unix time in ms, for display."""
        return time.time_ns() // 1_000_000

    def _make_hello(self) -> bytes:
        """The first frame that every client is sent, header included: it leaves with the upgrade's response."""
        limits, timeouts = self.settings.limits, self.settings.timeouts
        hello = orjson.dumps(
            {
                "t": "hello",
                "v": p.VERSION,
                "server": f"chatcore/{self.context.version}",
                "auth_ms": timeouts.auth_ms,
                "ping_ms": timeouts.ping_ms,
                "features": [],
                "limits": {
                    "frame": limits.frame_bytes,
                    "body": limits.body_bytes,
                    "have": limits.have,
                    "only": limits.only,
                    "history": limits.history,
                    "backlog": limits.backlog,
                    "small": limits.small,
                },
            }
        )
        # RFC 6455, 5.2: final text frame, 16-bit length.
        return struct.pack("!BBH", 0x81, 126, len(hello)) + hello

    # --- the reactor's handler -------------------------------------------------------
    def on_http(self, conn: int, data: bytes) -> None:
        """Bytes of a connection that is not upgraded."""
        http = self._http.get(conn)
        if http is None:
            if len(self._http) >= self.settings.limits.http_connections_per_worker:
                busy = error_response(Unavailable("too many connections"))
                self.reactor.write(conn, encode_response(busy, keep_alive=False), True)
                return
            http = self._http[conn] = HttpConnection(
                self,
                self.reactor,
                conn,
                self.settings.limits.http_body_bytes,
                self.settings.timeouts.handshake_ms,
            )
        http.feed(data)

    def on_http_closed(self, conn: int) -> None:
        """A connection that was never upgraded is gone."""
        http = self._http.pop(conn, None)
        if http is not None:
            http.over()

    def on_message(self, session: Session, data: bytes, wait_ms: int) -> None:
        """One message of a client."""
        session.on_message(data, wait_ms)

    def on_writable(self, session: Session) -> None:
        """A client has read on."""
        session.on_writable()

    def on_closed(self, session: Session, code: int) -> None:
        """A client is gone."""
        self.to_close.discard(session)
        session.on_closed()

    # --- HTTP -----------------------------------------------------------------------
    def http_request(self, http: HttpConnection, request: HttpRequest) -> None:
        """Answer a plain request."""
        self.spawn(self._respond(http, request), "http-request")

    async def _respond(self, http: HttpConnection, request: HttpRequest) -> None:
        response: HttpResponse
        try:
            response = await self.api.handle(request)
        except ChatError as exc:
            response = error_response(exc)
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            response = error_response(Internal("internal error"))
        http.respond(response, last=self.draining)

    def upgraded(self, conn: int, response: bytes, leftover: bytes) -> None:
        """Make a session of a connection. Refusals come after the upgrade, where browsers can see them."""
        self._http.pop(conn, None)
        session = Session(self, conn)
        auth_ms = self.settings.timeouts.auth_ms
        full = self.reactor.websockets() >= self.settings.limits.connections_per_worker
        if not (self.draining or full):
            response += self._hello
        else:
            leftover = b""
        if not self.reactor.upgrade(conn, session, response, leftover, auth_ms):
            return  # the client is gone already
        if self.draining:
            self._restart(session)
        elif full:
            session.close(p.CloseCode.OVER_CAPACITY, "over capacity")

    # --- the bus' listener ------------------------------------------------------------
    def on_bus(self, channel: str, payload: bytes) -> None:
        """A message of another worker. Malformed ones are a bug over there: told and dropped."""
        kind, _, name = channel.partition(":")
        try:
            if kind == "c":
                self._on_conversation(name, payload)
            elif kind == "u":
                self.users.on_bus(payload)
            elif kind == "p":
                self.presence.on_bus(name, payload)
            elif kind == "i" and self.cache is not None:
                self.cache.on_bus(payload)
        except (ValueError, KeyError) as exc:
            log.warning("bus message on %s dropped: %s", channel, exc)

    def _on_conversation(self, conv: str, payload: bytes) -> None:
        kind = payload[:1]
        if kind == events.ENTRY:
            entry = events.unpack_entry(conv, payload)
            if self._racing is not None:
                self._racing.heard(entry)
            if self.cache is not None:
                self.cache.heard(entry)
            self.delivery.on_entry(entry)
        elif kind == events.STATE:
            self.delivery.push_state(conv, *events.unpack_state(payload))
        elif kind == events.YIELD and self._racing is not None:
            self._racing.on_yield(conv)

    def on_doubt(self, why: str) -> None:
        """Something may have been missed."""
        log.debug("doubt: %s", why)
        if self.cache is not None:
            self.cache.on_doubt()
        self.delivery.check()

    def on_peer_gone(self, peer: str) -> None:
        """Another worker is gone."""
        self.presence.on_peer_gone(peer)

    def on_peer_subscribed(self, peer: str, channel: str) -> None:
        """Another worker listens to a channel."""
        if channel.startswith("p:"):
            self.presence.on_peer_subscribed(peer, channel[2:])
