"""One request, or one query, of a command: it works whether a server runs on the data folder or not.

While a server runs, its writer does what is asked. Otherwise the command is the writer for a moment.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import apsw
import msgspec

from ...common.unix_address import unix_address
from ...errors import BadRequest, ChatError, Unavailable
from .catch_up import catch_up
from .engine import Busy, Engine, Failed
from .lock import WriterLock, socket_path
from .requests import FRAME_HEAD, LAST, Reply, Request, frame, result_of
from .schema import BrokenStore, check_version, connect, database_path, prepare

T = TypeVar("T")

#: An operator waits longer than a user, and the writer may be about to be replaced.
TIMEOUT_S: Final = 10.0
#: Between two looks whether the writer listens, or is gone.
PAUSE_S: Final = 0.05


class _Lost(Exception):
    """The writer took the request and ended without an answer."""


def submit(data: Path, request: Request, *, create: bool, timeout_s: float = TIMEOUT_S) -> Any:
    """Do one request; returns its result.

    :param create: make the folder and the database if there is none.
    :param timeout_s: how long to wait for a server's writer.
    :raises BadRequest: there is no database.
    :raises Unavailable: it cannot be used, or it does not answer; the message is one line.
    :raises ChatError: as the request says.
    """
    with _usable(data):
        if create:
            data.mkdir(parents=True, exist_ok=True, mode=0o700)
        else:
            _must_exist(data)
        result = result_of(request, _submit(data, request, time.monotonic() + timeout_s))
    if isinstance(result, ChatError):
        raise result
    return result


def read(data: Path, query: Callable[[apsw.Connection], T]) -> T:
    """Run one query on what is committed.

    :raises BadRequest: there is no database.
    :raises Unavailable: it cannot be used; the message is one line.
    """
    with _usable(data):
        _must_exist(data)
        path = database_path(data)
        try:
            db = connect(path, write=False)
            try:
                check_version(db, path)
                return query(db)
            finally:
                db.close()
        except apsw.Error as exc:
            raise Unavailable(f"the database {path} cannot be used: {exc}") from None


def _must_exist(data: Path) -> None:
    if not database_path(data).exists():
        raise BadRequest(f"there is no chatcore data in {data}")


@contextlib.contextmanager
def _usable(data: Path) -> Iterator[None]:
    """What keeps a database from being used, in one line."""
    try:
        yield
    except (BrokenStore, Busy, Failed, apsw.Error) as exc:
        raise Unavailable(str(exc)) from None
    except OSError as exc:
        raise Unavailable(f"the data in {data} cannot be used: {exc.strerror or exc}") from None


def _submit(data: Path, request: Request, until: float) -> Reply:
    lock = WriterLock(data)
    while True:
        if lock.acquire(0):
            try:
                return _commit(data, request)
            finally:
                lock.release()
        try:
            reply = _ask(data, request, until)
        except _Lost:
            if not request.repeatable:
                raise Unavailable("the server ended without an answer: it may be done, and it may not") from None
            reply = None
        if reply is not None:
            return reply
        if time.monotonic() >= until:
            raise Unavailable(f"another process writes the data in {data}, and does not answer")
        time.sleep(PAUSE_S)


def _commit(data: Path, request: Request) -> Reply:
    """Do it as the writer."""
    prepare(data)
    catch_up(data)
    engine = Engine(data)
    try:
        engine.open()
        [reply] = engine.commit([request])
    finally:
        engine.close()
    return reply


def _ask(data: Path, request: Request, until: float) -> Reply | None:
    """Let the server's writer do it. None: it does not listen, or not yet.

    :raises _Lost: there is no answer, and will be none.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(max(PAUSE_S, until - time.monotonic()))
        try:
            with unix_address(socket_path(data)) as address:
                connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            return None  # BlockingIOError: too many wait to be accepted
        try:
            connection.sendall(frame([request]))
            with connection.makefile("rb") as answers:
                (length,) = FRAME_HEAD.unpack(_exactly(answers.read, FRAME_HEAD.size))
                answer = _exactly(answers.read, length & ~LAST)
        except TimeoutError:
            raise Unavailable("the server does not answer: it may be done, and it may not") from None
        except (BrokenPipeError, ConnectionResetError):
            raise _Lost from None
    reply: Reply
    [reply] = msgspec.msgpack.decode(answer, type=list[Reply])
    return reply


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    """Read so many bytes.

    :raises _Lost: there are no more.
    """
    found = read(size)
    if len(found) < size:
        raise _Lost
    return found
