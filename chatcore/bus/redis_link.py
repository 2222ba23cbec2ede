"""One connection to a Redis server: bytes out, replies in.

Not a connection of redis-py: that one wakes a task per message, resubscribes without a word
after a reconnect and believes a connection that no longer answers. Here it is a transport and
hiredis' parser. RESP2 is spoken, which every server can; what a server of RESP3 would push is
read all the same, since both come out of the parser as lists.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, cast

import hiredis

from ..common.redis_client import RedisAddress
from .redis_frames import command

#: What the parser gives when there is no complete reply; a reply may be None or False.
NOTHING: Final = object()


class LinkError(Exception):
    """The connection cannot be made, is gone, or the server refuses; says why in one line."""


class Refused(Exception):
    """An error that the server replied with."""


class Link(asyncio.Protocol):
    """A connection. Replies go to :attr:`consume`; until it is set anew, to the requests in order.

    :param on_lost: told once, with the reason, when it ends by itself.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_lost: Callable[[str], None]) -> None:
        self.loop = loop
        self.transport: asyncio.Transport | None = None
        #: When the last bytes came (loop time).
        self.heard = loop.time()
        #: Called with a function that returns the next reply, or `NOTHING`.
        self.consume: Callable[[Callable[[], Any]], None] = self._replies
        #: Called when enough was sent to go on writing.
        self.on_drained: Callable[[], None] | None = None
        self._on_lost: Callable[[str], None] | None = on_lost
        self._reader = hiredis.Reader(protocolError=LinkError, replyError=Refused, notEnoughData=NOTHING)
        self._requests: deque[asyncio.Future[Any]] = deque()
        self._ended: asyncio.Future[None] = loop.create_future()

    # --- life ------------------------------------------------------------------
    async def open(self, address: RedisAddress, server: tuple[str, int], name: str, auth: tuple[str, str]) -> None:
        """Connect, log in, and tell the server a name for ``CLIENT LIST``. The caller bounds the time.

        No SELECT: pub/sub knows no databases.

        :param server: host and port; not looked at if the address is the path of a socket.
        :raises LinkError: it did not work.
        """
        context = address.ssl_context()
        try:
            if address.path:
                await self.loop.create_unix_connection(lambda: self, address.path)
            else:
                host, port = server
                await self.loop.create_connection(
                    lambda: self, host, port, ssl=context, server_hostname=host if context else None
                )
        except OSError as exc:
            where = address.path or f"{server[0]}:{server[1]}"
            raise LinkError(f"cannot connect to {where}: {exc}") from None
        username, password = auth
        if password:
            await self.request(b"AUTH", *([username.encode()] if username else []), password.encode())
        try:
            await self.request(b"CLIENT", b"SETNAME", name.encode())
        except Refused:
            pass  # an ACL may forbid it; it is for people only

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast: uvloop's transports are no subclasses of asyncio's.
        self.transport = cast(asyncio.Transport, transport)
        self.heard = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._lost(str(exc) if exc else "the server closed the connection")
        if not self._ended.done():
            self._ended.set_result(None)

    def drop(self) -> None:
        """End it now; nothing is told any more."""
        self._on_lost = None
        if self.transport is not None:
            self.transport.abort()

    async def gone(self) -> None:
        """Wait until a dropped connection's socket is closed."""
        if self.transport is not None:
            await self._ended

    def _lost(self, why: str) -> None:
        on_lost, self._on_lost = self._on_lost, None
        for future in self._requests:
            if not future.done():
                future.set_exception(LinkError(why))
                future.exception()  # its owner may be gone
        self._requests.clear()
        if self.transport is not None:
            self.transport.abort()
        if on_lost is not None:
            on_lost(why)

    # --- bytes -------------------------------------------------------------------
    def write(self, data: bytes) -> None:
        """Send, or nothing if the connection is gone (whoever owns it is told)."""
        if self.transport is not None:
            self.transport.write(data)

    @property
    def unsent(self) -> int:
        """Bytes that wait for the kernel to take them."""
        return self.transport.get_write_buffer_size() if self.transport is not None else 0

    def resume_writing(self) -> None:
        if self.on_drained is not None:
            self.on_drained()

    def data_received(self, data: bytes) -> None:
        self.heard = self.loop.time()
        try:
            self._reader.feed(data)
            self.consume(self._reader.gets)
        except LinkError as exc:
            self._lost(f"unexpected bytes: {exc}")

    # --- requests ------------------------------------------------------------------
    def request(self, *args: bytes) -> asyncio.Future[Any]:
        """Send a command; its reply. Only before :attr:`consume` is set anew.

        The future raises :class:`Refused` or :class:`LinkError`.
        """
        future: asyncio.Future[Any] = self.loop.create_future()
        if self.transport is None:
            future.set_exception(LinkError("not connected"))
        else:
            self._requests.append(future)
            self.write(command(*args))
        return future

    def _replies(self, gets: Callable[[], Any]) -> None:
        while (reply := gets()) is not NOTHING:
            if not self._requests:
                raise LinkError("a reply that nobody asked for")
            future = self._requests.popleft()
            if future.done():
                continue
            if isinstance(reply, Refused):
                future.set_exception(reply)
            else:
                future.set_result(reply)
