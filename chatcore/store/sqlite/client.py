"""A worker's connection to the writer: requests go out in order, answers come back in the same order.

While the connection is down, requests wait, bounded. On the next one everything unanswered is asked again first, in
its old order, then what is new. An entry that turns out to be in the log already is announced then: the writer may
have died between its commit and its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from ...common.backoff import Backoff
from ...common.unix_address import unix_address
from ...errors import ChatError, Unavailable, error_of
from ...protocol import encode_entry
from ..base import Appended, Entry, OnCommit
from .lock import socket_path
from .ops import Append
from .requests import Reply, Request, frame, result_of, take_frames

log = logging.getLogger("chatcore.store")

# Between tries to connect: a new writer is there within a few hundred milliseconds.
CONNECT_FIRST_S: Final = 0.005
CONNECT_MAX_S: Final = 0.1

# A frame that has several requests, at most.
FRAME_BYTES: Final = 1024 * 1024

_decode: Final = msgspec.msgpack.Decoder(list[Reply]).decode


class _Item:
    """A request that is not answered."""

    __slots__ = ("again", "future", "request", "since")

    def __init__(self, request: Request, future: asyncio.Future[Any], since: float) -> None:
        self.request = request
        self.future = future
        self.since = since
        self.again = False  # asked before, on another connection


class _Link(asyncio.Protocol):
    """One connection. The end of one may be told after the next has begun, so each has what belongs to it."""

    def __init__(self, client: WriterClient, closed: asyncio.Future[None]) -> None:
        self._client = client
        self._received = bytearray()
        self.closed = closed
        self.heard = False  # it has been answered on
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._client.connected(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
        self._client.disconnected(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        for body, last in take_frames(self._received):
            self._client.answered(self, _decode(body), last)


class WriterClient:
    """One per worker. Made inside the running loop.

    :param limit: requests that are not answered, at most; further ones are refused.
    """

    def __init__(self, data: Path, on_commit: OnCommit, *, limit: int) -> None:
        self._path = socket_path(data)
        self._on_commit = on_commit
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._asked: deque[_Item] = deque()  # on this connection, in order
        self._new: list[_Item] = []
        self._link: _Link | None = None
        self._flushing = False
        self._closing = False
        self._connected = asyncio.Event()
        self._answered = asyncio.Event()
        self._connecting: asyncio.Task[None] | None = None
        #: False while the writer does not answer.
        self.healthy = True

    # --- life -----------------------------------------------------------------------------
    async def start(self, timeout_s: float) -> None:
        """Connect.

        :raises Unavailable: there was no writer for so long.
        """
        self._connecting = self._loop.create_task(self._connect(), name="store-writer-connect")
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        except TimeoutError:
            raise Unavailable("the writer of the store does not answer") from None

    async def close(self, timeout_s: float) -> None:
        """Wait until all is answered, for so long at most, and disconnect."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._asked or self._new:
                    self._answered.clear()
                    await self._answered.wait()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        self._fail_all(Unavailable("the server is stopping"))
        if self._link is not None and self._link.transport is not None:
            self._link.transport.abort()

    async def _connect(self) -> None:
        """Keep a connection as long as the worker lives."""
        pauses = Backoff(CONNECT_FIRST_S, CONNECT_MAX_S)
        while True:
            link = _Link(self, self._loop.create_future())
            try:
                with unix_address(self._path) as address:
                    # The loop makes the socket: one that is given to it is closed by it, too, if this fails, and then
                    # its number may be that of another file already.
                    await self._loop.create_unix_connection(lambda link=link: link, address)  # type: ignore[misc]
            except Exception as exc:
                if not isinstance(exc, OSError):
                    log.exception("connecting to the writer of the store")  # a mistake of ours must not end this loop
                if link.transport is not None:
                    link.transport.abort()
                await asyncio.sleep(pauses.next())
                continue
            await link.closed
            if link.heard:  # a writer that answers nothing is tried ever less
                pauses.reset()
            else:
                await asyncio.sleep(pauses.next())

    def connected(self, link: _Link) -> None:
        """A connection was made: ask everything unanswered again, in its order, then what is new."""
        self._link = link
        again: list[_Item] = []
        for item in self._asked:
            if item.future.done():
                continue  # given up: the look at the changes finds what came of it
            if not item.request.repeatable:
                item.future.set_exception(Unavailable("the writer of the store was lost"))
                continue
            item.again = True
            again.append(item)
        self._asked.clear()
        self._new = again + self._new
        self._connected.set()
        self._flush()

    def disconnected(self, link: _Link) -> None:
        """A connection has ended."""
        if self._link is not link:
            return  # another one took its place
        self._link = None
        self._connected.clear()
        if not self._closing:
            log.warning("the writer of the store is gone; %d requests wait", len(self._asked) + len(self._new))

    # --- asking ---------------------------------------------------------------------------
    def put(self, request: Request) -> asyncio.Future[Any]:
        """Ask the writer; the future is resolved on the loop, or fails with a ChatError."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._closing or len(self._asked) + len(self._new) >= self._limit:
            future.set_exception(Unavailable("the server is stopping" if self._closing else "the store is busy"))
            return future
        self._new.append(_Item(request, future, self._loop.time()))
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        return future

    def idle(self) -> bool:
        """Nothing waits for an answer."""
        return not self._asked and not self._new

    def give_up(self, older_than_s: float) -> None:
        """If the oldest request has waited longer, answer `unavailable` to all: no entry overtakes one that failed.
        What was asked may still be done."""
        oldest = self._asked[0] if self._asked else self._new[0] if self._new else None
        if oldest is not None and oldest.since < self._loop.time() - older_than_s:
            self.healthy = False
            self._fail_all(Unavailable("the store does not answer"))

    def _fail_all(self, error: ChatError) -> None:
        for item in (*self._asked, *self._new):
            if not item.future.done():
                item.future.set_exception(error)
                item.future.exception()  # an answer, not a bug: no log line if it is never retrieved
        self._new.clear()
        self._answered.set()

    def _flush(self) -> None:
        """Send what is new, in one frame."""
        self._flushing = False
        transport = None if self._link is None else self._link.transport
        if transport is None or not self._new:
            return
        new, self._new = self._new, []
        self._asked.extend(new)
        self._send(transport, [item.request for item in new])

    def _send(self, transport: asyncio.Transport, requests: list[Request]) -> None:
        """In one frame, or in as many as it takes for none to be too large."""
        encoded = frame(requests)
        if len(encoded) > FRAME_BYTES and len(requests) > 1:
            half = len(requests) // 2
            self._send(transport, requests[:half])
            self._send(transport, requests[half:])
        else:
            transport.write(encoded)

    # --- answers --------------------------------------------------------------------------
    def answered(self, link: _Link, replies: list[Reply], last: bool) -> None:
        """Answers to the oldest requests; ``last``: one error for all that is asked, and the end of the connection."""
        if self._link is not link:
            return  # what was asked on it has been asked again
        if last:
            # Neither what the writer has nor what is on the way to it is done.
            self.healthy = False
            self._fail_all(error_of(*(replies[0].error or ("unavailable", "the store does not answer"))))
            self._asked.clear()
        elif len(replies) > len(self._asked):
            log.error("the writer of the store answers more than it was asked: connecting anew")
            assert link.transport is not None
            link.transport.abort()
        else:
            self.healthy = link.heard = True
            self._resolve(replies)

    def _resolve(self, replies: list[Reply]) -> None:
        """Answer, and announce the new entries.

        A caller that waits for its answer goes on in the loop's next turn, after the announcement here,
        and before the clients are written to: the sender's own entry and its ``ok`` leave together.
        """
        entries: list[Entry] = []
        for reply in replies:
            item = self._asked.popleft()
            outcome = _outcome(item, reply, entries)
            if item.future.done():
                continue
            if isinstance(outcome, BaseException):
                item.future.set_exception(outcome)
            else:
                item.future.set_result(outcome)
        if self._closing:
            self._answered.set()
        if entries:
            try:
                self._on_commit(entries)
            except Exception:
                # They are durable, and the next look at the store finds them: the callers are answered.
                log.exception("announcing %d new entries failed", len(entries))


def _outcome(item: _Item, reply: Reply, entries: list[Entry]) -> Any:
    """The result or the error of a request; what is to be announced is added to ``entries``."""
    request = item.request
    if reply.error is not None:
        return result_of(request, reply)
    # An entry that was asked for on a connection before this one may never have been announced.
    announce = reply.announce or (reply.dup and item.again)
    if reply.entries is not None:
        for c in reply.entries if announce or not reply.dup else ():
            wire = encode_entry(c.t, c.conv, c.seq, c.sender, c.ts, c.cid, c.fields)
            entries.append(Entry(c.conv, c.seq, c.t, c.sender, c.msgs, c.last_msg, wire))
    elif type(request) is Append and announce:
        e = request
        wire = encode_entry(e.t, e.conv, reply.seq, e.sender, reply.ts, e.cid, e.fields)
        entries.append(Entry(e.conv, reply.seq, e.t, e.sender, reply.msgs, reply.seq, wire))
    if type(request) is Append:
        return Appended(reply.seq, reply.ts, reply.dup)
    return result_of(request, reply)
