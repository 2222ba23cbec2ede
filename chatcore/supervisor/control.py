"""The control socket, both ends: one line of JSON in, one line out.

``<data>/run/control.sock``, for the server's own user only. Requests: ``{"cmd": "status" | "drain" | "reload"
| "scale", ...}``; answers: ``{"ok": true, ...}`` or ``{"ok": false, "error": "..."}``. The supervisor answers
from its own state and the stats page; it never waits for a worker or a caller here.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ..common.unix_address import unix_address

log = logging.getLogger("chatcore.control")

Json = dict[str, Any]

MAX_REQUEST_BYTES: Final = 4096
#: Connections at once; an operator and some monitoring need a few.
MAX_CLIENTS: Final = 32
#: Time for a caller to send its request, and again to read the answer; then the connection is closed.
REQUEST_TIMEOUT_S: Final = 5.0


class ControlError(Exception):
    """No server answers on the control socket, or it refused the request; the message is one line for the operator."""


def socket_path(data: Path) -> Path:
    """The control socket of the server that runs on `data`."""
    return data / "run" / "control.sock"


class Caller:
    """One connection to the control socket: a request, then one answer, at once or later."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.received = b""
        self.complete = False
        self.unsent = b""
        self.deadline_s = time.monotonic() + REQUEST_TIMEOUT_S

    def answer(self, answer: Json) -> None:
        """Send the answer and close the connection. A caller that is gone or does not read misses the answer."""
        self.unsent = json.dumps(answer).encode() + b"\n"
        self.deadline_s = time.monotonic() + REQUEST_TIMEOUT_S
        self.send()

    def send(self) -> None:
        """Send as much of the answer as the socket takes; close the connection after the last byte."""
        try:
            while self.unsent:
                self.unsent = self.unsent[self.connection.send(self.unsent) :]
        except BlockingIOError:
            return  # the next sweep sends the rest of a long answer
        except OSError:
            self.unsent = b""
        self.connection.close()

    def fail(self, error: str) -> None:
        self.answer({"ok": False, "error": error})


class ControlServer:
    """The supervisor's end. It never blocks; its owner polls `filenos` and calls `readable` and `sweep`."""

    def __init__(self, data: Path, handle: Callable[[Json, Caller], None]) -> None:
        """`handle` is called with each request and its caller. This server must hold the lock on the data directory,
        so that a socket found there belongs to a dead server. Raises OSError."""
        self._handle = handle
        self._path = socket_path(data)
        self._callers: dict[int, Caller] = {}
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            with unix_address(self._path) as address:
                self._listener.bind(address)
        except OSError:
            self._listener.close()
            raise
        finally:
            os.umask(before)
        self._listener.listen(MAX_CLIENTS)
        self._listener.setblocking(False)

    def filenos(self) -> list[int]:
        """The descriptors to poll for reading."""
        return [self._listener.fileno(), *(fd for fd, caller in self._callers.items() if not caller.complete)]

    def readable(self, fd: int) -> None:
        """Accept a connection, or read what a caller has sent."""
        if fd == self._listener.fileno():
            self._accept()
        elif fd in self._callers:
            self._read(fd, self._callers[fd])

    def sweep(self) -> None:
        """Go on sending answers. Drop callers that are done, and those whose time to ask or to read is over."""
        now = time.monotonic()
        for fd, caller in list(self._callers.items()):
            if caller.unsent:
                caller.send()
            if (caller.unsent or not caller.complete) and now > caller.deadline_s:
                caller.connection.close()
            if caller.connection.fileno() < 0:
                del self._callers[fd]

    def close(self) -> None:
        """Accept no more requests and remove the socket file; callers that wait for an answer keep their connection."""
        self._path.unlink(missing_ok=True)
        self._listener.close()

    def close_in_child(self) -> None:
        """Close the descriptors in a forked child; the parent keeps its own."""
        self._listener.close()
        for caller in self._callers.values():
            caller.connection.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if len(self._callers) >= MAX_CLIENTS:
            connection.close()
            return
        connection.setblocking(False)
        self._callers[connection.fileno()] = Caller(connection)

    def _read(self, fd: int, caller: Caller) -> None:
        try:
            data = caller.connection.recv(MAX_REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        caller.received += data
        if b"\n" in caller.received:
            caller.complete = True
            try:
                request = json.loads(caller.received.partition(b"\n")[0])
            except ValueError:
                request = None
            if isinstance(request, dict):
                self._handle(request, caller)
            else:
                caller.fail("a request is one JSON object on a line")
        elif not data or len(caller.received) > MAX_REQUEST_BYTES:
            caller.connection.close()


def call(data: Path, request: Json, timeout_s: float | None = None) -> Json:
    """Send a request to the server of `data` and return its answer; `timeout_s` None waits without a limit.

    Raises ControlError when no server runs there, when it ends without an answer, or when its answer is an error.
    """
    path = socket_path(data.absolute())
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            with unix_address(path) as address:
                connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            raise ControlError(f"no server runs on data directory {data.absolute()}") from None
        except OSError as error:
            raise ControlError(f"control socket {path} cannot be used: {error.strerror}") from error
        try:
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as lines:
                line = lines.readline()
        except TimeoutError:
            raise ControlError(f"the server did not answer within {timeout_s:g} s") from None
        except OSError as error:
            raise ControlError(f"the server went away: {error.strerror}") from error
    if not line:
        raise ControlError("the server ended without an answer")
    answer: Json = json.loads(line)
    if not answer.get("ok"):
        raise ControlError(str(answer.get("error", "the server gave no reason")))
    return answer
