"""The control socket, both ends: one line of JSON in, one line out.

``<data>/run/control.sock``, for the server's own user only. Requests: ``{"cmd": "status" | "drain" | "reload"
| "scale", ...}``; answers: ``{"ok": true, ...}`` or ``{"ok": false, "error": "..."}``. The supervisor answers
from what it knows and what the stats page shows; it never waits for anybody here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

log = logging.getLogger("chatcore.control")

Json = dict[str, Any]

MAX_REQUEST_BYTES: Final = 4096
#: Callers at once; an operator and some monitoring need a few.
MAX_CLIENTS: Final = 32
#: A caller who has not finished its line by then is gone.
REQUEST_TIMEOUT_S: Final = 5.0
#: sun_path holds 108 bytes, the closing zero included.
MAX_ADDRESS_BYTES: Final = 107


class ControlError(Exception):
    """No server answers there, or it refused; one line for people."""


def socket_path(data: Path) -> Path:
    """Where the server of a data directory listens for commands."""
    return data / "run" / "control.sock"


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """`path` as an address for bind or connect, however long it is. Raises OSError."""
    if len(os.fsencode(path)) <= MAX_ADDRESS_BYTES:
        yield str(path)
        return
    # The kernel takes no longer address, but it does follow a link to the directory.
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


class Caller:
    """One connection to the control socket: a request, then an answer, now or later."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.received = b""
        self.asked = False
        self.unsent = b""
        self.deadline_s = time.monotonic() + REQUEST_TIMEOUT_S

    def answer(self, answer: Json) -> None:
        """Send the answer and hang up. A caller that is gone, or reads nothing, misses it."""
        self.unsent = json.dumps(answer).encode() + b"\n"
        self.deadline_s = time.monotonic() + REQUEST_TIMEOUT_S
        self.send()

    def send(self) -> None:
        """Send what the socket takes of the answer; hang up after the last of it."""
        try:
            while self.unsent:
                self.unsent = self.unsent[self.connection.send(self.unsent) :]
        except BlockingIOError:
            return  # the rest of a long answer goes in the next sweep
        except OSError:
            self.unsent = b""
        self.connection.close()

    def fail(self, error: str) -> None:
        self.answer({"ok": False, "error": error})


class ControlServer:
    """The supervisor's end. Never blocks; the owner polls `filenos` and calls `readable`."""

    def __init__(self, data: Path, handle: Callable[[Json, Caller], None]) -> None:
        """`handle` is called with each request and who asked. The data directory must be locked by this
        server: a socket that is there already is a dead one's. Raises OSError."""
        self._handle = handle
        self._path = socket_path(data)
        self._callers: dict[int, Caller] = {}
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            with _address(self._path) as address:
                self._listener.bind(address)
        except OSError:
            self._listener.close()
            raise
        finally:
            os.umask(before)
        self._listener.listen(MAX_CLIENTS)
        self._listener.setblocking(False)

    def filenos(self) -> list[int]:
        """What to watch for reading."""
        return [self._listener.fileno(), *(fd for fd, caller in self._callers.items() if not caller.asked)]

    def readable(self, fd: int) -> None:
        """Take a connection, or what one has sent."""
        if fd == self._listener.fileno():
            self._accept()
        elif fd in self._callers:
            self._read(fd, self._callers[fd])

    def sweep(self) -> None:
        """Send on, and forget who was answered, who never finished asking, and who does not read."""
        now = time.monotonic()
        for fd, caller in list(self._callers.items()):
            if caller.unsent:
                caller.send()
            if (caller.unsent or not caller.asked) and now > caller.deadline_s:
                caller.connection.close()
            if caller.connection.fileno() < 0:
                del self._callers[fd]

    def close(self) -> None:
        """Take no more requests; callers still waiting keep their connection. Removes the socket's file."""
        self._path.unlink(missing_ok=True)
        self._listener.close()

    def close_in_child(self) -> None:
        """Close a forked child's copies only."""
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
            caller.asked = True
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
    """Ask the server of `data`, wait for its answer (None: as long as it takes) and return it.

    Raises ControlError when no server runs there, it ends without an answer, or its answer is an error.
    """
    path = socket_path(data.absolute())
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            with _address(path) as address:
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
