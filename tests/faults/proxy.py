"""A small TCP proxy between a host and Redis, which can hold back one direction: late, never, or ended.

A connection that is made while a direction is blocked is blocked, too. Nothing is reset but by ``heal`` after a
``blackhole``: bytes that were swallowed cannot be brought back, so those connections end.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum

CHUNK = 65536


class How(enum.Enum):
    """The fate of bytes that go one way."""

    WELL = "well"
    LATE = "late"  # held back for ``delay_s``
    NEVER = "never"  # swallowed; the connection stays open
    ENDED = "ended"  # the sender's side is shut down: the receiver sees an end, the other way goes on


class Proxy:
    """Listens on a free port of the loopback, for one address behind it."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.port = 0
        self.up = How.WELL  # towards the target
        self.down = How.WELL
        self.delay_s = 0.0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        # (where bytes go, and whether that is towards the target), and those that lost some, or their end.
        self._lines: set[tuple[asyncio.StreamWriter, bool]] = set()
        self._spoilt: set[asyncio.StreamWriter] = set()

    async def start(self) -> Proxy:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def block(self, *, up: How = How.WELL, down: How = How.WELL, delay_s: float = 0.0) -> None:
        """From now on, for what is connected and what connects."""
        self.up, self.down, self.delay_s = up, down, delay_s
        for writer, upwards in self._lines:
            if self._how(upwards) is How.ENDED:
                self._end(writer)

    def heal(self) -> None:
        """All is well again; what lost bytes ends."""
        self.block()
        for writer in self._spoilt:
            writer.transport.abort()
        self._spoilt.clear()

    async def close(self) -> None:
        """End every connection."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        behind: asyncio.StreamWriter | None = None
        try:
            there, behind = await asyncio.open_connection(*self.target)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(reader, behind, upwards=True))
                group.create_task(self._carry(there, writer, upwards=False))
        except* (OSError, RuntimeError, asyncio.CancelledError):
            pass
        finally:
            for one in (writer, behind):
                if one is not None:
                    self._spoilt.discard(one)
                    one.transport.abort()
            self._tasks.discard(task)

    def _how(self, upwards: bool) -> How:
        return self.up if upwards else self.down

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, upwards: bool) -> None:
        """Until the end of what is read; an end is passed on."""
        line = (writer, upwards)
        self._lines.add(line)
        try:
            if self._how(upwards) is How.ENDED:
                self._end(writer)
            while data := await reader.read(CHUNK):
                if self._how(upwards) is How.LATE:
                    await asyncio.sleep(self.delay_s)
                if self._how(upwards) in (How.NEVER, How.ENDED):
                    self._spoilt.add(writer)
                if writer not in self._spoilt:
                    writer.write(data)
                    await writer.drain()
            if writer not in self._spoilt:
                self._end(writer)
        finally:
            self._lines.discard(line)

    def _end(self, writer: asyncio.StreamWriter) -> None:
        self._spoilt.add(writer)
        with contextlib.suppress(OSError, RuntimeError):  # uvloop raises the second when it is closed
            writer.write_eof()
