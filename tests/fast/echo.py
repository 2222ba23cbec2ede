"""An echo server on the bare reactor, for conformance suites: ``python -m tests.fast.echo PORT``."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys

import uvloop

from chatcore._fast.reactor import TICK_MS, Reactor

from .support import accept_response


class Echo:
    """Answers every message in kind."""

    def __init__(self, port: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.requests: dict[int, bytes] = {}
        # Conformance suites send large messages fast; neither is what is tested here.
        self.reactor = Reactor(
            self,
            self.loop.call_soon,
            max_message_bytes=1 << 26,
            outbox_limit_bytes=1 << 28,
            rate_per_s=1e6,
            rate_burst=1_000_000,
            allow_binary=True,
        )
        self.listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.listener.setblocking(False)
        self.reactor.listen(self.listener.fileno())
        self.loop.add_reader(self.reactor.fileno(), self.reactor.poll)
        self._tick()

    def _tick(self) -> None:
        self.reactor.tick()
        self.loop.call_later(TICK_MS / 1000, self._tick)

    def on_http(self, conn: int, data: bytes) -> None:
        data = self.requests.pop(conn, b"") + data
        head, end, leftover = data.partition(b"\r\n\r\n")
        if not end:
            self.requests[conn] = data
            return
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"sec-websocket-key":
                self.reactor.upgrade(conn, conn, accept_response(value.strip()), leftover, 0)
                return
        self.reactor.write(conn, b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", True)

    def on_http_closed(self, conn: int) -> None:
        self.requests.pop(conn, None)

    def on_message(self, conn: int, data: bytes | str, wait_ms: int) -> None:
        if isinstance(data, str):
            self.reactor.send(conn, data.encode())
        else:
            self.reactor.send_binary(conn, data)

    def on_writable(self, conn: int) -> None: ...

    def on_closed(self, conn: int, code: int) -> None: ...


async def main(port: int) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    echo = Echo(port)
    print(f"echo on 127.0.0.1:{echo.listener.getsockname()[1]}", flush=True)
    await stop.wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
