"""Requests and queries of the command line: without a server, through a server's writer, and in all between."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest

from chatcore.errors import BadRequest, Conflict, NotFound, Unavailable
from chatcore.queue.sqlite_ops import QueueRetry
from chatcore.store.base import User
from chatcore.store.sqlite import command
from chatcore.store.sqlite.accounts import AddUser, SetDisabled
from chatcore.store.sqlite.lock import WriterLock, socket_path
from chatcore.store.sqlite.requests import FRAME_HEAD, Reply
from chatcore.store.sqlite.schema import database_path, prepare

from .harness import stalled
from .hosting import hosted

_ids = itertools.count()


def add(data: Path, name: str, timeout_s: float = command.TIMEOUT_S) -> User:
    """An account, with an id of its own."""
    request = AddUser(f"id-{next(_ids)}", name, "hash")
    user: User = command.submit(data, request, create=True, timeout_s=timeout_s)
    return user


def names(data: Path) -> list[str]:
    rows: list[Any] = command.read(data, lambda db: db.execute("SELECT name FROM users ORDER BY name").fetchall())
    return [name for (name,) in rows]


@contextlib.contextmanager
def stand_in(data: Path, *answers: Callable[[socket.socket], None]) -> Iterator[None]:
    """Hold the lock, and treat one connection after the other so; then release the lock and listen no more."""
    lock = WriterLock(data)
    assert lock.acquire(0)
    path = socket_path(data)
    path.parent.mkdir()

    def serve() -> None:
        for i, answer in enumerate(answers):
            connection, _ = listener.accept()
            with connection:
                if i == len(answers) - 1:
                    listener.close()
                    lock.release()
                answer(connection)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            thread.join()


def dies_after_reading(connection: socket.socket) -> None:
    connection.recv(1)


def dies_within_its_answer(connection: socket.socket) -> None:
    connection.recv(65_536)
    connection.sendall(FRAME_HEAD.pack(1000) + b"half of it")


@pytest.fixture(params=["no server", "a server"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder with a database."""
    prepare(tmp_path)
    with hosted(tmp_path) if request.param == "a server" else contextlib.nullcontext():
        yield tmp_path


def test_results_and_refusals_are_the_requests_own(data: Path) -> None:
    alice = add(data, "alice")
    assert alice == User(alice.id, "alice")
    with pytest.raises(Conflict, match="this name is taken"):
        add(data, "ALICE")
    assert command.submit(data, SetDisabled("alice", True), create=False) is None
    with pytest.raises(NotFound, match="no such user: bob"):
        command.submit(data, SetDisabled("bob", True), create=False)
    assert names(data) == ["alice"]


def test_commands_at_once_come_one_after_the_other(data: Path) -> None:
    threads = [threading.Thread(target=add, args=(data, f"user {n}")) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(data) == [f"user {n}" for n in range(8)]


def test_a_query_that_fails_is_one_line(data: Path) -> None:
    with pytest.raises(Unavailable, match="no such table: nowhere"):
        command.read(data, lambda db: db.execute("SELECT * FROM nowhere").fetchall())
    with pytest.raises(Unavailable, match="attempt to write a readonly database"):
        command.read(data, lambda db: db.execute("DELETE FROM users"))


def test_without_data_nothing_is_made_unless_it_is_to_be(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with pytest.raises(BadRequest, match="there is no chatcore data in"):
        command.submit(data, SetDisabled("alice", True), create=False)
    with pytest.raises(BadRequest, match="there is no chatcore data in"):
        names(data)
    assert not data.exists()
    add(data, "alice")
    assert names(data) == ["alice"]
    assert data.stat().st_mode & 0o777 == 0o700


def test_what_is_no_database_stays_as_it_is(tmp_path: Path) -> None:
    database_path(tmp_path).write_bytes(b"something else, and not short at all" * 100)
    before = database_path(tmp_path).read_bytes()
    for work in (lambda: add(tmp_path, "alice"), lambda: names(tmp_path)):
        with pytest.raises(Unavailable) as refused:
            work()
        assert str(database_path(tmp_path)) in refused.value.message
        assert "\n" not in refused.value.message
    assert database_path(tmp_path).read_bytes() == before


def test_a_folder_that_may_not_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(Unavailable, match=r"data cannot be used: File exists"):
        add(tmp_path / "data", "alice")


def test_a_server_whose_path_is_longer_than_an_address(tmp_path: Path) -> None:
    data = tmp_path / ("d" * 90) / ("e" * 90)
    data.mkdir(parents=True)
    with hosted(data):
        add(data, "alice")
        assert names(data) == ["alice"]


def test_a_request_whose_writer_dies_is_repeated(tmp_path: Path) -> None:
    """By the command itself, if no new writer is there before."""
    prepare(tmp_path)
    with stand_in(tmp_path, dies_after_reading, dies_within_its_answer):
        add(tmp_path, "alice")
    assert names(tmp_path) == ["alice"]


def test_a_request_that_must_not_be_repeated_is_not(tmp_path: Path) -> None:
    prepare(tmp_path)
    for dies in (dies_after_reading, dies_within_its_answer):
        with stand_in(tmp_path, dies), pytest.raises(Unavailable, match="it may be done, and it may not"):
            command.submit(tmp_path, QueueRetry(None, 0), create=False)
        socket_path(tmp_path).unlink()
        socket_path(tmp_path).parent.rmdir()


def test_a_writer_that_does_not_answer_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    prepare(tmp_path)
    lock = WriterLock(tmp_path)
    assert lock.acquire(0)
    with pytest.raises(Unavailable, match=r"another process writes the data in .*, and does not answer"):
        add(tmp_path, "alice", timeout_s=0.1)
    lock.release()
    with hosted(tmp_path), stalled(tmp_path), pytest.raises(Unavailable, match="the server does not answer"):
        add(tmp_path, "alice", timeout_s=0.1)


def test_a_command_waits_for_a_writer_that_is_about_to_listen(tmp_path: Path) -> None:
    prepare(tmp_path)
    lock = WriterLock(tmp_path)
    assert lock.acquire(0)
    adding = threading.Thread(target=add, args=(tmp_path, "alice"))
    adding.start()
    socket_path(tmp_path).parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(socket_path(tmp_path)))
        listener.listen()
        connection, _ = listener.accept()
        with connection:
            body = msgspec.msgpack.encode([Reply(value=msgspec.msgpack.encode(User("1", "alice")))])
            connection.sendall(FRAME_HEAD.pack(len(body)) + body)
            adding.join()
    lock.release()


def test_a_command_leaves_the_files_free(tmp_path: Path) -> None:
    add(tmp_path, "alice")
    names(tmp_path)
    lock = WriterLock(tmp_path)
    assert lock.acquire(0)
    lock.release()
    db = apsw.Connection(str(database_path(tmp_path)))
    db.execute("BEGIN EXCLUSIVE; ROLLBACK")
    db.close()
