"""The I/O around the core: one socket after the other, a timer, the application's queue.

What to do is decided in :mod:`chatcore.client.core`. Everything here runs in
tasks that :meth:`Link.close` ends.
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
from .accounts import Address
from .core import Core
from .errors import ClientClosed
from .events import Event
from .keeper import Keeper
from .waiting import wait_within
from .world import Mark

SUBPROTOCOL: Final = "chatcore.v1"
#: The server's largest message is 256 KiB; more than this is not from it.
FRAME_MAX: Final = 1 << 20
#: Messages that the WebSocket library may read ahead.
READ_AHEAD: Final = 16
#: How long the other side may take to answer our closing handshake, in seconds.
CLOSE_TIMEOUT_S: Final = 2
#: An application that does not keep up holds up the socket this long. The server
#: gives up on a reader after 30 s; from here on we read and page later instead.
PAUSE_S: Final = 10.0

#: Counts on while the machine sleeps, where there is such a clock: a laptop
#: that wakes up should notice at once that it has not heard anything for long.
_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> float:
    """Seconds by the clock that the core is given; its zero means nothing."""
    return time.clock_gettime(_CLOCK)


class Link:
    """Runs one core. :meth:`settle` must follow every input to it."""

    def __init__(self, core: Core, keeper: Keeper, address: Address, queue_max: int) -> None:
        self.core = core
        self.last_loss = ""
        #: Set for good once authenticated, or when it is all over.
        self.online = asyncio.Event()
        #: Set after every change; whoever waits for one clears it first.
        self.changed = asyncio.Event()
        self._keeper = keeper
        self._address = address
        self._queue_max = queue_max
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[tuple[Event | None, Mark]] = deque()
        self._handed: Mark | None = None
        self._unacknowledged = core.unacknowledged_count
        self._told = asyncio.Event()
        self._writing = asyncio.Event()
        self._go_on = asyncio.Event()
        self._kick = asyncio.Event()
        self._ws: ClientConnection | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._saving = asyncio.create_task(keeper.run(), name="chatcore state")
        self._running = asyncio.create_task(self._run(), name="chatcore connection")
        self._running.add_done_callback(self._ended)

    async def close(self, *, done: bool) -> None:
        """Disconnect and end all tasks. ``done``: the application is through with its last event."""
        if done:
            self._handed_is_done()
        self._inbox.clear()
        self.core.fail(ClientClosed("the client was closed"))
        self.settle()
        if self._timer is not None:
            self._timer.cancel()
        self._keeper.stop()
        if self._ws is not None:
            await self._ws.close()
        self._running.cancel()
        await asyncio.gather(self._running, self._saving, return_exceptions=True)

    def settle(self) -> None:
        """Look at the core's outputs and do what they say."""
        core = self.core
        if told := core.take_events():
            self._inbox.extend(told)
            self._told.set()
        if core.unacknowledged_count < self._unacknowledged:
            self._keeper.touch()
        self._unacknowledged = core.unacknowledged_count
        if core.online and not self.online.is_set():
            self._keeper.is_user(core.user_id)
            self.online.set()
        if core.failure is not None:
            self.online.set()
            self._told.set()
        if core.has_frames:
            self._writing.set()
        self.changed.set()
        self._go_on.set()
        self._kick.set()
        if core.drop and self._ws is not None and not isinstance(core.failure, ClientClosed):
            self._ws.transport.abort()
        at = core.wake_at()
        if at is not None and (self._timer is None or at < self._timer_at):
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = at
            self._timer = self._loop.call_later(max(0.0, at - now()), self._tick)

    async def next_event(self) -> Event:
        """The next event, which also says that the application is through with the last one.

        :raises StopAsyncIteration: the client was closed.
        :raises Exception: why the connection ended for good.
        """
        self._handed_is_done()
        while True:
            while self._inbox:
                event, mark = self._inbox.popleft()
                self._popped()
                if event is not None:
                    self._handed = mark
                    return event
                self._keeper.done(mark)
            if self.core.failure is not None:
                raise StopAsyncIteration if isinstance(self.core.failure, ClientClosed) else self.core.failure
            self._told.clear()
            await self._told.wait()

    def _popped(self) -> None:
        if len(self._inbox) <= self._queue_max // 2:
            self._go_on.set()
            if not self.core.world.room:
                self.core.set_room(True, now())
                self.settle()

    def _handed_is_done(self) -> None:
        if self._handed is not None:
            self._keeper.done(self._handed)
            self._handed = None

    async def _run(self) -> None:
        core = self.core
        while core.failure is None:
            while (at := core.connect_at) is not None and (wait := at - now()) > 0:
                self._kick.clear()
                await wait_within(self._kick, wait)
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
            self.settle()

    async def _talk(self, ws: ClientConnection, gen: int) -> tuple[int, str]:
        """Use one connection to its end; its close code and reason."""
        self._ws = ws
        self.core.connected(gen, now())
        writer = asyncio.create_task(self._write(ws), name="chatcore writer")
        try:
            self.settle()
            while self.core.failure is None:
                await self._wait_for_room()
                data = await ws.recv(decode=False)
                self.core.received(gen, data, now())
                self.settle()
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
                    return  # the reader knows why
            if not self.core.has_frames:
                self._writing.clear()
                await self._writing.wait()

    async def _wait_for_room(self) -> None:
        """Hold up the socket while the application is behind, but neither for too long
        nor while somebody waits for an answer that would come over it."""
        core = self.core
        if len(self._inbox) < self._queue_max or not core.world.room:
            return
        core.reading(False, now())
        until = now() + PAUSE_S
        while len(self._inbox) > self._queue_max // 2 and not core.waiting and core.failure is None:
            self._go_on.clear()
            if not await wait_within(self._go_on, until - now()):
                break
        core.reading(True, now())
        core.set_room(len(self._inbox) <= self._queue_max // 2, now())
        self.settle()

    def _tick(self) -> None:
        self._timer = None
        self.core.tick(now())
        self.settle()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The connection's task is over: whatever still waits must not wait for ever."""
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self.core.fail(error)
        self.settle()
