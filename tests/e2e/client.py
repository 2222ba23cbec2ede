"""A client that knows only the protocol: it keeps all that it receives, and waits for what a test expects."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import websockets
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from ..server import PATIENCE_S

Message = dict[str, Any]


def is_entry(message: Message) -> bool:
    """Whether it is an entry of a log, of whatever type."""
    return "s" in message and "from" in message


class Closed(NamedTuple):
    """How a connection ended: the close code that was received (1006: none)."""

    code: int
    reason: str


class Refused(Exception):
    """A request was answered with an error."""

    def __init__(self, reply: Message) -> None:
        super().__init__(reply)
        self.reply = reply
        self.code: str = reply["code"]


def matches(message: Message, wanted: Message) -> bool:
    """Whether the message has these fields (``...``: with any value)."""
    return all(name in message and value in (message[name], ...) for name, value in wanted.items())


class Client:
    """One connection. ``received`` holds everything in order; ``expect`` takes from those not taken yet."""

    def __init__(self, ws: ClientConnection) -> None:
        self.ws = ws
        self.received: list[Message] = []
        self.closed: Closed | None = None
        self.user = ""  # whose it is, once it has logged in
        self._inbox: list[Message] = []
        self._replies: dict[int, asyncio.Future[Message]] = {}
        self._changed = asyncio.Event()
        self._ids = 0
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def open(
        cls, address: tuple[str, int], *, source: str | None = None, subprotocol: bool = True, **options: Any
    ) -> Client:
        """Connect (``source``: from this address) and wait for `hello`."""
        host, port = address
        ws = await connect(
            f"ws://{host}:{port}/ws",
            subprotocols=[Subprotocol("chatcore.v1")] if subprotocol else None,
            local_addr=None if source is None else (source, 0),
            ping_interval=None,
            proxy=None,
            compression=None,
            **options,
        )
        return cls(ws)

    @property
    def port(self) -> int:
        """This end's port."""
        return int(self.ws.local_address[1])

    async def _read(self) -> None:
        try:
            async for text in self.ws:
                self._take(json.loads(text))
        except websockets.ConnectionClosed:
            pass
        finally:
            code = self.ws.close_code
            self.closed = Closed(1006 if code is None else code, self.ws.close_reason or "")
            for future in self._replies.values():
                if not future.done():
                    future.set_exception(ConnectionError(f"closed while a request was outstanding: {self.closed}"))
                    future.exception()
            self._changed.set()

    def _take(self, message: Message) -> None:
        self.received.append(message)
        if message["t"] in ("ok", "error"):
            future = self._replies.pop(message.get("id", 0), None)
            if future is not None and not future.done():
                future.set_result(message)
                return
        self._inbox.append(message)
        self._changed.set()

    # --- waiting ------------------------------------------------------------------
    async def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait for a condition on what was received; its value."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while not (value := condition()) and self.closed is None:
                    self._changed.clear()
                    await self._changed.wait()
        value = condition()
        assert value, f"{what}: not received; {self._told()}"
        return value

    def _told(self) -> str:
        last = "\n  ".join(json.dumps(message)[:300] for message in self.received[-15:])
        return f"closed: {self.closed}; the last of {len(self.received)} messages:\n  {last}"

    async def expect(self, **wanted: Any) -> Message:
        """The first message with these fields that was not taken yet; waits for it."""
        found = lambda: next((m for m in self._inbox if matches(m, wanted)), None)  # noqa: E731
        message: Message = await self.until(found, f"a message with {wanted}")
        self._inbox.remove(message)
        return message

    def got(self, **wanted: Any) -> list[Message]:
        """All messages with these fields so far, taken or not."""
        return [message for message in self.received if matches(message, wanted)]

    def forget(self) -> None:
        """Take everything that was not taken yet."""
        self._inbox.clear()

    def log(self, conv: str) -> list[Message]:
        """The entries of a conversation that were pushed, in order of arrival."""
        return [m for m in self.received if is_entry(m) and m["c"] == conv]

    def seqs(self, conv: str) -> list[int]:
        """Their seqs."""
        return [entry["s"] for entry in self.log(conv)]

    def after(self, conv: str) -> int:
        """The last `after` of a conversation that it was sent (entries above it are pushed)."""
        return int(self.got(t="conv", c=conv, after=...)[-1]["after"])

    async def reach(self, conv: str, seq: int) -> list[Message]:
        """Wait until the entry ``seq`` was pushed, unless it was attached above it; all that were."""

        def reached() -> bool:
            told = [view["after"] for view in self.got(t="conv", c=conv, after=...)]
            return any(s >= seq for s in (*self.seqs(conv), *told))

        await self.until(reached, f"entry {seq} of {conv}")
        return self.log(conv)

    async def end(self) -> Closed:
        """Wait until the connection is over; how."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.shield(self._reader)
        except TimeoutError:
            raise AssertionError(f"the connection was not closed; {self._told()}") from None
        assert self.closed is not None
        return self.closed

    # --- asking -------------------------------------------------------------------
    async def raw(self, data: str | bytes) -> None:
        """Send a message as it is."""
        await self.ws.send(data)

    async def tell(self, t: str, **fields: Any) -> None:
        """Send a request without an id: nothing is answered."""
        await self.ws.send(json.dumps({"t": t, **fields}))

    async def begin(self, t: str, **fields: Any) -> asyncio.Future[Message]:
        """Send a request; the future of its reply."""
        self._ids += 1
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._replies[self._ids] = future
        await self.ws.send(json.dumps({"t": t, "id": self._ids, **fields}))
        return future

    async def answer(self, future: asyncio.Future[Message]) -> Message:
        """Wait for a reply, `ok` or `error`."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await future
        except TimeoutError:
            raise AssertionError(f"no reply; {self._told()}") from None

    async def request(self, t: str, **fields: Any) -> Message:
        """Ask and wait for `ok`.

        :raises Refused: it was an error.
        """
        reply = await self.answer(await self.begin(t, **fields))
        if reply["t"] == "error":
            raise Refused(reply)
        return reply

    async def refused(self, code: str, t: str, **fields: Any) -> Message:
        """Ask and wait for an error with this code; the reply."""
        reply = await self.answer(await self.begin(t, **fields))
        assert reply["t"] == "error", f"{t} {fields} was not refused: {reply}"
        assert reply["code"] == code, f"{t} {fields}: {reply}"
        assert isinstance(reply["message"], str)
        return reply

    async def close(self, code: int = 1000) -> None:
        """Close from this side and wait for the end."""
        await self.ws.close(code)
        await self.end()
