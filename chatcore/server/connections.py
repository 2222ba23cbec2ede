"""The clients of one worker: their HTTP connections, the upgrade to WebSocket, their sessions, and the drain."""

from __future__ import annotations

import asyncio
import logging
import random
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final

import orjson

from .. import protocol as p
from .._fast.reactor import Reactor
from ..common.tasks import Tasks
from ..errors import ChatError, Internal, Unavailable
from ..settings import Settings
from .http import HttpConnection, HttpRequest, HttpResponse, encode_response, error_response
from .session import Services, Session

log = logging.getLogger("chatcore.connections")

# Draining closes so many sessions at a time, with a pause between, so that other callbacks have their turn.
DRAIN_BATCH: Final = 200
DRAIN_PAUSE_S: Final = 0.01
# Reconnect time for each client that is sent away, more than a log-in takes. A client that waits can neither be
# reached nor send, so a few clients are not spread over as long as thousands.
RECONNECT_MS: Final = 10


class Connections:
    """Handles the events of the reactor. One per worker, made before the parts that sessions use (:meth:`serve`)."""

    def __init__(self, settings: Settings, version: str, tasks: Tasks) -> None:
        self._settings = settings
        self._tasks = tasks
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
            rate_refused=rates.messages_refused,
            handshake_timeout_ms=timeouts.handshake_ms,
            close_timeout_ms=timeouts.close_ms,
            slow_timeout_ms=timeouts.slow_ms,
            # Above the limit of sessions: excess clients are upgraded, then closed with 1013.
            max_connections=limits.connections_per_worker + limits.http_connections_per_worker,
            io_uring=settings.server.io_uring,
        )
        if settings.server.io_uring and not self.reactor.uses_io_uring():
            log.info("io_uring is not available on this kernel: each client is sent to with its own system call")
        self._hello = _make_hello(settings, version)
        self._http: dict[int, HttpConnection] = {}
        self._handle: Callable[[HttpRequest], Awaitable[HttpResponse]]
        self._services: Services
        self.draining = False
        self._spread_ms = settings.server.reconnect_spread_ms  # over which clients that are sent away reconnect
        self.to_close: set[Session] = set()  # while draining: the sessions that were not closed yet

    # --- life -------------------------------------------------------------------
    def serve(
        self, listener: int, services: Services, handle: Callable[[HttpRequest], Awaitable[HttpResponse]]
    ) -> None:
        """Accept clients from a listening socket. ``handle`` answers plain HTTP requests."""
        self._services = services
        self._handle = handle
        self.reactor.listen(listener)
        self._loop.add_reader(self.reactor.fileno(), self.reactor.poll)

    def stop_accepting(self) -> None:
        """Accept the backlog, then stop listening; new sessions are closed at once from here on."""
        self.reactor.accept_pending()
        self.reactor.unlisten()
        self.reactor.shorten_lingering()
        self.draining = True

    async def drain(self, deadline: float) -> None:
        """Answer outstanding requests, then close all clients. :param deadline: by the loop's clock."""
        for http in list(self._http.values()):
            http.close_idle()
        await self._close_sessions(deadline)
        await self._wait_for(lambda: self.reactor.connections() == 0, deadline)
        await self._wait_for(lambda: not len(self._tasks), deadline)

    def close(self) -> None:
        """Drop the connections that are left."""
        self._loop.remove_reader(self.reactor.fileno())
        self.reactor.shutdown()

    def _restart(self, x: Session) -> None:
        """Send a client away; it reconnects at random within a time that is enough for all of them."""
        x.close(p.CloseCode.RESTART, f"restart {random.randint(0, self._spread_ms)}")

    async def _close_sessions(self, deadline: float) -> None:
        self.to_close.update(self.reactor.sessions())
        self._spread_ms = min(self._settings.server.reconnect_spread_ms, len(self.to_close) * RECONNECT_MS)
        while self.to_close and self._loop.time() < deadline:
            # Sessions without outstanding requests first; the others have until the deadline to be answered.
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

    async def _wait_for(self, done: Callable[[], bool], deadline: float) -> None:
        while not done() and self._loop.time() < deadline:
            await asyncio.sleep(0.02)

    # --- the reactor's handler ----------------------------------------------------
    #: A message of a client goes to its session without another call in between (the hot path).
    on_message = staticmethod(Session.on_message)
    on_writable = staticmethod(Session.on_writable)

    def on_closed(self, session: Session, code: int) -> None:
        """A WebSocket connection is gone."""
        self.to_close.discard(session)
        session.on_closed()

    def on_http(self, conn: int, data: bytes) -> None:
        """Bytes of a connection that is not upgraded."""
        http = self._http.get(conn)
        if http is None:
            limits = self._settings.limits
            if len(self._http) >= limits.http_connections_per_worker:
                busy = error_response(Unavailable("too many connections"))
                self.reactor.write(conn, encode_response(busy, keep_alive=False), True)
                return
            http = self._http[conn] = HttpConnection(
                self, self.reactor, conn, limits.http_body_bytes, self._settings.timeouts.handshake_ms
            )
        http.feed(data)

    def on_http_closed(self, conn: int) -> None:
        """A connection that was never upgraded is gone."""
        http = self._http.pop(conn, None)
        if http is not None:
            http.over()

    # --- HTTP -----------------------------------------------------------------------
    def http_request(self, http: HttpConnection, request: HttpRequest) -> None:
        """Answer a plain request."""
        self._tasks.spawn(self._respond(http, request), "http-request")

    async def _respond(self, http: HttpConnection, request: HttpRequest) -> None:
        response: HttpResponse
        try:
            response = await self._handle(request)
        except ChatError as exc:
            response = error_response(exc)
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            response = error_response(Internal("internal error"))
        http.respond(response, last=self.draining)

    def upgraded(self, conn: int, response: bytes, leftover: bytes) -> None:
        """Make a session of a connection. Refusals come after the upgrade, where browsers can see them."""
        self._http.pop(conn, None)
        session = Session(self._services, conn)
        full = self.reactor.websockets() >= self._settings.limits.connections_per_worker
        if not (self.draining or full):
            response += self._hello
        else:
            leftover = b""
        if not self.reactor.upgrade(conn, session, response, leftover, self._settings.timeouts.auth_ms):
            return  # the client is gone already
        if self.draining:
            self._restart(session)
        elif full:
            session.close(p.CloseCode.OVER_CAPACITY, "over capacity")


def _make_hello(settings: Settings, version: str) -> bytes:
    """The first frame that every client is sent, header included: it leaves with the upgrade's response."""
    limits, timeouts, rates = settings.limits, settings.timeouts, settings.rates
    fields: dict[str, Any] = {
        "t": "hello",
        "v": p.VERSION,
        "server": f"chatcore/{version}",
        "auth_ms": timeouts.auth_ms,
        "ping_ms": timeouts.ping_ms,
        "features": [],
        "limits": {
            "frame": limits.frame_bytes,
            "body": limits.body_bytes,
            "data": limits.data_bytes,
            "have": limits.have,
            "only": limits.only,
            "history": limits.history,
            "backlog": limits.backlog,
            "small": limits.small,
            "title": limits.title_chars,
            "name": limits.name_chars,
            "open_members": limits.open_members,
            "watch": limits.watch,
            "users": limits.users,
            "members": limits.members,
            "channels": limits.channels,
            "outstanding": limits.outstanding,
            "rate": rates.messages_per_s,
            "burst": rates.messages_burst,
            "refused": rates.messages_refused,
            "typing_ms": rates.typing_interval_ms,
        },
    }
    hello = orjson.dumps(fields)
    # RFC 6455, 5.2: final text frame, 16-bit length.
    return struct.pack("!BBH", 0x81, 126, len(hello)) + hello
