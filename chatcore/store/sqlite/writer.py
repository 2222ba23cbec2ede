"""The writer: one process of a host commits for all its workers, in one transaction at a time.

It is single-threaded: while COMMIT waits for the disk, what the workers send gathers in the sockets and makes the next
batch (:mod:`.engine` does the transactions).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from ...common.unix_address import unix_address
from ...errors import Unavailable
from .accounts import (
    AddToken,
    AddUser,
    Block,
    ExtendToken,
    MarkSeen,
    Ping,
    RevokeToken,
    SetDisabled,
    SetNotify,
    SetRead,
    UpdateUser,
)
from .engine import BEHIND, ERASE_S, Busy, Engine, Failed
from .lock import socket_path
from .ops import Append, OpenConversation, refusal
from .requests import FRAME_MAX_BYTES, Reply, Request, frame, take_frames

log = logging.getLogger("chatcore.writer")

STORE_REQUESTS: Final[tuple[type[Request], ...]] = (
    Ping,
    Append,
    OpenConversation,
    AddUser,
    UpdateUser,
    SetDisabled,
    AddToken,
    ExtendToken,
    RevokeToken,
    MarkSeen,
    SetRead,
    SetNotify,
    Block,
)

# The writer looks so often at what the index covers, if nothing is committed.
LOOK_S: Final = 0.25
# The pause after each commit while the index lags too much.
PRESSED_S: Final = 0.005
# The pause after a transaction without requests that failed.
REST_S: Final = 1.0
# Unprocessed requests of one worker after which the writer reads no more of them; and bytes read at once.
CONNECTION_REQUESTS: Final = 2_000
READ_BYTES: Final = 262_144
# Answers that a worker does not take, at most; it is gone or stuck then.
UNSENT_BYTES: Final = 64 * 1024 * 1024


class _Connection:
    """One worker, or one command: what it asked for, and the answers that it has not taken."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = bytearray()
        self.requests: deque[Request] = deque()
        self.unsent = bytearray()
        self.open = True
        self.writing = False  # waits until the socket takes more
        self.paused = False  # not read from: enough of its requests wait


class Writer:
    """Serves the writer's socket. One per data folder; the caller holds the lock.

    :param requests: all that may be asked.
    :param batch: requests of one transaction, at most.
    :param beat: called in each turn, a few times each second at least.
    """

    def __init__(
        self,
        engine: Engine,
        data: Path,
        requests: tuple[type[Request], ...],
        *,
        batch: int = 500,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._batch = batch
        self._beat = beat
        self._decoder = msgspec.msgpack.Decoder(list[functools.reduce(operator.or_, requests)])  # type: ignore[misc]
        self._path = socket_path(data)
        self._connections: dict[int, _Connection] = {}
        self._turn = 0
        # One for all: a buffer of this size that is made for each read costs more than the read.
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._rest_until = 0.0
        self._poll = select.epoll()

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._connections)

    def listen(self, wake: Sequence[int] = ()) -> None:
        """Accept connections from now on.

        :param wake: descriptors that become readable when ``stopping`` may have changed.
        :raises OSError: the socket cannot be made.
        """
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)  # of a writer before this one
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        with unix_address(self._path) as address:
            self._listener.bind(address)
        self._path.chmod(0o600)
        self._listener.listen(128)
        self._poll.register(self._listener, select.EPOLLIN)
        for fd in wake:
            self._poll.register(fd, select.EPOLLIN)

    def run(self, stopping: Callable[[], bool]) -> None:
        """Serve until ``stopping`` and all that was asked is answered.

        :raises Superseded: another writer has written.
        """
        try:
            while not (stopping() and not self._waiting()):
                self._beat()
                busy = self._waiting() or self._due()
                self.turn(0.0 if busy else ERASE_S if self._engine.erasing else LOOK_S)
        finally:
            self.close()

    def close(self) -> None:
        """Close all sockets."""
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._listener.close()
        self._poll.close()

    def _due(self) -> bool:
        return self._engine.due and time.monotonic() >= self._rest_until

    def _waiting(self) -> bool:
        return any(c.requests for c in self._connections.values())

    def turn(self, wait_s: float) -> None:
        """Take what came, commit a batch of it, answer."""
        events = self._poll.poll(wait_s)
        for fd, event in events:
            if fd == self._listener.fileno():
                self._accept()
                continue
            connection = self._connections.get(fd)
            if connection is None:
                self._poll.unregister(fd)  # it woke the loop, and would go on
                continue
            if event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                self._receive(connection)
            if event & select.EPOLLOUT and connection.open:
                self._send(connection)
        batch = self._take()
        if batch or self._due():
            self._commit(batch)
            self._engine.checkpoint()
            if self._engine.pressed:
                time.sleep(PRESSED_S)
        elif not events:
            self._engine.look()
            if self._engine.erasing:
                self._engine.checkpoint()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                self._connections[sock.fileno()] = _Connection(sock)
                self._poll.register(sock, select.EPOLLIN)

    def _drop(self, connection: _Connection) -> None:
        if connection.open:
            connection.open = False
            del self._connections[connection.sock.fileno()]
            self._poll.unregister(connection.sock)
            connection.sock.close()
            connection.requests.clear()

    def _receive(self, connection: _Connection) -> None:
        try:
            n = connection.sock.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            n = 0
        if not n:
            # Its requests are not done: a worker that lost its connection asks again on a new one.
            self._drop(connection)
            return
        connection.received += self._buffer[:n]
        try:
            for body, last in take_frames(connection.received, FRAME_MAX_BYTES):
                if last:
                    raise ValueError("a frame of answers")
                connection.requests.extend(self._decoder.decode(body))
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:  # ValueError: also text that is none
            log.error("a request that cannot be read: %s", exc)
            self._drop(connection)
            return
        if len(connection.requests) >= CONNECTION_REQUESTS:
            connection.paused = True
            self._watch(connection)

    def _watch(self, connection: _Connection) -> None:
        events = (0 if connection.paused else select.EPOLLIN) | (select.EPOLLOUT if connection.writing else 0)
        self._poll.modify(connection.sock, events)

    def _take(self) -> list[tuple[_Connection, Request]]:
        """The next batch: as much of each connection in turn as its share is."""
        busy = [c for c in self._connections.values() if c.requests]
        if not busy:
            return []
        share = -(-self._batch // len(busy))
        self._turn = (self._turn + 1) % len(busy)
        batch: list[tuple[_Connection, Request]] = []
        for connection in busy[self._turn :] + busy[: self._turn]:
            most = min(share, len(connection.requests), self._batch - len(batch))
            batch.extend((connection, connection.requests.popleft()) for _ in range(most))
        return batch

    def _commit(self, batch: list[tuple[_Connection, Request]]) -> None:
        try:
            replies = self._engine.commit([request for _, request in batch])
        except Busy:
            replies = []
        except Failed as exc:
            if batch:
                self._fail(exc)
            else:
                self._rest_until = time.monotonic() + REST_S
            return
        for connection, request in reversed(batch[len(replies) :]):
            connection.requests.appendleft(request)
        answers: dict[_Connection, list[Reply]] = {}
        for (connection, _), reply in zip(batch, replies, strict=False):
            answers.setdefault(connection, []).append(reply)
        for connection, mine in answers.items():
            self._answer(connection, mine)
            if self._engine.full and BEHIND in mine:
                # Whatever the worker sent before it hears of this fails, too: no entry overtakes one that was refused.
                self._answer(connection, [BEHIND], last=True)
                self._drop(connection)

    def _fail(self, why: Failed) -> None:
        """Answer `unavailable` to the batch and all that waits behind it: no entry overtakes one that failed. What
        has not been read yet is lost with the connection, so the worker fails it, too."""
        failed = refusal(Unavailable(str(why)))
        for connection in list(self._connections.values()):
            self._answer(connection, [failed], last=True)
            self._drop(connection)

    def _answer(self, connection: _Connection, replies: list[Reply], last: bool = False) -> None:
        if not connection.open:
            return
        connection.unsent += frame(replies, last=last)
        self._send(connection)

    def _send(self, connection: _Connection) -> None:
        try:
            sent = connection.sock.send(connection.unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(connection)
            return
        del connection.unsent[:sent]
        if len(connection.unsent) > UNSENT_BYTES:
            log.warning("a connection that takes no answers is closed")
            self._drop(connection)
            return
        writing = bool(connection.unsent)
        paused = connection.paused and len(connection.requests) >= CONNECTION_REQUESTS // 2
        if (writing, paused) != (connection.writing, connection.paused):
            connection.writing, connection.paused = writing, paused
            self._watch(connection)
