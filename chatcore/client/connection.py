"""The I/O around the core: one socket after the other, a timer, the queue of events for the application.

:mod:`chatcore.client.core` decides what to do. Everything here runs in tasks that
:meth:`ConnectionLoop.close` ends.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.typing import Subprotocol

from .. import __version__
from ..common.tasks import Tasks
from .accounts import Address
from .core import ClientCore
from .errors import ClientClosed
from .events import Event
from .replica import Progress
from .state import StateSaver, wait_within

SUBPROTOCOL: Final = "chatcore.v1"
#: The server's largest message is 256 KiB; a larger frame than this is not from a chatcore server.
FRAME_MAX: Final = 1 << 20
#: Messages that the WebSocket library may read ahead.
READ_AHEAD: Final = 16
#: How long the server may take to answer the closing handshake, in seconds.
CLOSE_TIMEOUT_S: Final = 2
#: An application that does not keep up holds up the socket this long. The server gives up
#: on a reader after 30 s; after this the client reads on, drops entries and pages them later.
PAUSE_S: Final = 10.0

#: Counts on while the machine sleeps, where there is such a clock: a laptop
#: that wakes up should notice at once that it has not heard anything for long.
_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> float:
    """Seconds of the clock that the core is given; its zero means nothing."""
    return time.clock_gettime(_CLOCK)


class ConnectionLoop:
    """Runs one core. :meth:`apply_outputs` must follow every input to it.

    :param saver: saves what the application has processed.
    :param queue_max: events waiting for the application before the socket is held up.
    """

    def __init__(self, core: ClientCore, saver: StateSaver, address: Address, queue_max: int) -> None:
        self.core = core
        self.last_loss = ""
        #: Set for good once authenticated, or when the session ended for good.
        self.online = asyncio.Event()
        #: Set after every change; a task that waits for one clears it first.
        self.changed = asyncio.Event()
        self._saver = saver
        self._address = address
        self._queue_max = queue_max
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[Event | None, Progress]] = deque()
        # Of the event that the application has now: to be recorded when it asks for the next one.
        self._processing: Progress | None = None
        self._unacknowledged = core.unacknowledged_count
        self._more_events = asyncio.Event()
        self._more_frames = asyncio.Event()
        self._resume_reading = asyncio.Event()
        self._reconnect = asyncio.Event()
        self._ws: ClientConnection | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._tasks = Tasks()
        self._saving = self._tasks.spawn(saver.run(), "chatcore state")
        self._running = self._tasks.spawn(self._run(), "chatcore connection")
        self._running.add_done_callback(self._ended)

    async def close(self, *, done: bool) -> None:
        """Disconnect and end all tasks. ``done``: the application has processed its last event."""
        if done:
            self._record_processed()
        self._events.clear()
        self.core.fail(ClientClosed("the client was closed"))
        self.apply_outputs()
        if self._timer is not None:
            self._timer.cancel()
        self._saver.stop()
        if self._ws is not None:
            await self._ws.close()
        self._running.cancel()
        # Not cancelled: it ends by itself after the last save.
        await asyncio.gather(self._running, self._saving, return_exceptions=True)
        await self._tasks.close()

    def apply_outputs(self) -> None:
        """Look at the core's outputs and do what they say."""
        core = self.core
        if events := core.take_events():
            self._events.extend(events)
            self._more_events.set()
        if core.unacknowledged_count < self._unacknowledged:
            self._saver.acknowledged()
        self._unacknowledged = core.unacknowledged_count
        if core.online and not self.online.is_set():
            self._saver.set_user(core.user_id)
            self.online.set()
        if core.failure is not None:
            self.online.set()
            self._more_events.set()
        if core.has_frames:
            self._more_frames.set()
        self.changed.set()
        self._resume_reading.set()
        self._reconnect.set()
        if core.drop and self._ws is not None and not isinstance(core.failure, ClientClosed):
            self._ws.transport.abort()
        at = core.wake_at()
        if at is not None and (self._timer is None or at < self._timer_at):
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = at
            self._timer = self._loop.call_later(max(0.0, at - now()), self._tick)

    async def next_event(self) -> Event:
        """The next event; asking for it also says that the application has processed the last one.

        :raises StopAsyncIteration: the client was closed.
        :raises Exception: why the connection ended for good.
        """
        self._record_processed()
        while True:
            while self._events:
                event, progress = self._events.popleft()
                self._popped()
                if event is not None:
                    self._processing = progress
                    return event
                self._saver.record(progress)
            if self.core.failure is not None:
                raise StopAsyncIteration if isinstance(self.core.failure, ClientClosed) else self.core.failure
            self._more_events.clear()
            await self._more_events.wait()

    def _popped(self) -> None:
        if len(self._events) <= self._queue_max // 2:
            self._resume_reading.set()
            if not self.core.replica.accepting:
                self.core.set_accepting(True, now())
                self.apply_outputs()

    def _record_processed(self) -> None:
        if self._processing is not None:
            self._saver.record(self._processing)
            self._processing = None

    async def _run(self) -> None:
        core = self.core
        while core.failure is None:
            while (at := core.connect_at) is not None and (wait := at - now()) > 0:
                self._reconnect.clear()
                await wait_within(self._reconnect, wait)
            gen = core.connecting()
            try:
                ws = await connect(
                    self._address.ws,
                    subprotocols=[Subprotocol(SUBPROTOCOL)],
                    user_agent_header=f"chatcore/{__version__}",
                    # Chat messages are small; and the core has its own heartbeat, which counts any message.
                    compression=None,
                    ping_interval=None,
                    close_timeout=CLOSE_TIMEOUT_S,
                    max_size=FRAME_MAX,
                    max_queue=READ_AHEAD,
                    proxy=None if self._address.local else True,
                )
            except (OSError, WebSocketException) as exc:
                code, reason = 1006, str(exc) or type(exc).__name__
            else:
                code, reason = await self._talk(ws, gen)
            self.last_loss = reason
            core.lost(gen, code, reason, now())
            self.apply_outputs()

    async def _talk(self, ws: ClientConnection, gen: int) -> tuple[int, str]:
        """Use one connection to its end; its close code and reason."""
        self._ws = ws
        self.core.connected(gen, now())
        writer = self._tasks.spawn(self._write(ws), "chatcore writer")
        try:
            self.apply_outputs()
            while self.core.failure is None:
                await self._wait_for_application()
                data = await ws.recv(decode=False)
                self.core.received(gen, data, now())
                self.apply_outputs()
            return 1000, ""
        except ConnectionClosed as exc:
            return (exc.rcvd.code, exc.rcvd.reason) if exc.rcvd else (1006, str(exc))
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            self._ws = None
            ws.transport.abort()

    async def _write(self, ws: ClientConnection) -> None:
        while True:
            for frame in self.core.take_frames():
                try:
                    await ws.send(frame, text=True)
                except ConnectionClosed:
                    return  # _talk reports the reason
            if not self.core.has_frames:
                self._more_frames.clear()
                await self._more_frames.wait()

    async def _wait_for_application(self) -> None:
        """Hold up the socket while the application is behind, but neither for too long nor while a reply is
        awaited, which comes over the same socket."""
        core = self.core
        if len(self._events) < self._queue_max or not core.replica.accepting:
            return
        core.reading(False, now())
        until = now() + PAUSE_S
        while len(self._events) > self._queue_max // 2 and not core.waiting and core.failure is None:
            self._resume_reading.clear()
            if not await wait_within(self._resume_reading, until - now()):
                break
        core.reading(True, now())
        core.set_accepting(len(self._events) <= self._queue_max // 2, now())
        self.apply_outputs()

    def _tick(self) -> None:
        self._timer = None
        self.core.tick(now())
        self.apply_outputs()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The connection's task has ended: fail everything that still waits."""
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self.core.fail(error)
        self.apply_outputs()
