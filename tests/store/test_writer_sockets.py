"""The writer over its socket: turns, bounds, garbage, a tail that is full, and connections that are lost."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw
import msgspec
import orjson
import pytest

from chatcore.common.unix_address import unix_address
from chatcore.entries import MsgFields, new_entry
from chatcore.errors import Unavailable
from chatcore.store.base import Opening
from chatcore.store.sqlite import writer as writer_module
from chatcore.store.sqlite.accounts import AddUser, Ping, SetRead
from chatcore.store.sqlite.engine import Engine
from chatcore.store.sqlite.indexer import Indexer
from chatcore.store.sqlite.lock import socket_path
from chatcore.store.sqlite.ops import Append, OpenConversation
from chatcore.store.sqlite.requests import FRAME_HEAD, FRAME_MAX_BYTES, LAST, Reply, Request
from chatcore.store.sqlite.schema import prepare
from chatcore.store.sqlite.writer import STORE_REQUESTS, Writer, _Connection

from .engine_world import Once
from .harness import Opened, change, message, run

BATCH = 50
BEHIND = ("unavailable", "the index of the store is behind")


class Peer:
    """A connection to the writer; it never waits."""

    def __init__(self, data: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with unix_address(socket_path(data)) as address:
            self.sock.connect(address)
        self.sock.setblocking(False)
        self.unsent = b""
        self.received = b""
        self.replies: list[Reply] = []
        self.closed = False

    def ask(self, *requests: Request) -> None:
        frame = msgspec.msgpack.encode(requests)
        self.unsent += FRAME_HEAD.pack(len(frame)) + frame
        self.send()

    def send(self) -> None:
        """As much as the socket takes."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self.unsent:
                self.unsent = self.unsent[self.sock.send(self.unsent) :]

    def take(self) -> list[Reply]:
        """All answers so far."""
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while data := self.sock.recv(1_000_000):
                self.received += data
            self.closed = True
        while len(self.received) >= FRAME_HEAD.size:
            (length,) = FRAME_HEAD.unpack_from(self.received)
            length &= ~LAST
            if len(self.received) < FRAME_HEAD.size + length:
                break
            body = self.received[FRAME_HEAD.size : FRAME_HEAD.size + length]
            self.replies += msgspec.msgpack.decode(body, type=list[Reply])
            self.received = self.received[FRAME_HEAD.size + length :]
        return self.replies


class Driven:
    """A writer whose loop goes round when the test says so."""

    def __init__(self, data: Path, kind: type[Indexer] = Indexer, **options: Any) -> None:
        prepare(data)
        self.data = data
        self.indexer = kind(data, portion=16, fan_in=2, slice_rows=20)
        self.indexer.open()
        self.engine = Engine(data, **options)
        self.engine.open()
        self.writer = Writer(self.engine, data, STORE_REQUESTS, batch=BATCH)
        self.writer.listen()
        self.peers: list[Peer] = []
        setup = self.peer()
        opening = Opening("alice", "c", "group", None, (), b"12345678")
        setup.ask(AddUser("alice", "alice", "h"), OpenConversation(opening, 9))
        value = self.until(setup, 2)[1].value
        assert value is not None
        self.conv: str = msgspec.msgpack.decode(value)["conv"]
        setup.sock.close()
        self.writer.turn(0.0)
        self.cids = 0

    def close(self) -> None:
        for peer in self.peers:
            peer.sock.close()
        self.writer.close()
        self.engine.close()
        self.indexer.close()

    def peer(self) -> Peer:
        self.peers.append(peer := Peer(self.data))
        return peer

    def messages(self, n: int, body: str = "hello") -> list[Append]:
        made = []
        for _ in range(n):
            self.cids += 1
            e = new_entry(self.conv, "alice", f"cid{self.cids}", MsgFields(body))
            made.append(Append(e.conv, e.sender, e.cid, e.t, e.fields, e.digest, 9))
        return made

    def until(self, peer: Peer, n: int, most: int = 1000) -> list[Reply]:
        """Go round until a connection has so many answers."""
        for _ in range(most):
            peer.send()
            if len(peer.take()) >= n:
                return peer.replies
            self.writer.turn(0.0)
        raise AssertionError(f"{len(peer.replies)} answers of {n}")

    def connections(self) -> Sequence[_Connection]:
        return list(self.writer._connections.values())

    def catch_up(self) -> None:
        """Index all that there is."""
        more = True
        while more:
            self.writer.turn(0.0)
            self.engine.look()
            more = self.indexer.step() or self.engine.due


@contextlib.contextmanager
def driven(data: Path, *args: Any, **options: Any) -> Iterator[Driven]:
    d = Driven(data, *args, **options)
    try:
        yield d
    finally:
        d.close()


# --- turns and bounds --------------------------------------------------------------------------


def test_one_request_waits_a_few_batches_for_ten_thousand_of_another_worker(tmp_path: Path) -> None:
    with driven(tmp_path) as d:
        flood, single = d.peer(), d.peer()
        flood.ask(*d.messages(10_000))
        d.until(flood, BATCH)
        for _ in range(5):
            had, batches = len(single.replies), len(flood.take())
            single.ask(*d.messages(1))
            d.until(single, had + 1)
            assert len(flood.take()) - batches <= 3 * BATCH
        seqs = [reply.seq for reply in d.until(flood, 10_000)]
        assert seqs == sorted(seqs)
        assert sorted(seqs + [reply.seq for reply in single.replies]) == list(range(2, 10_007))


def test_what_is_beyond_the_limit_of_a_connection_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "CONNECTION_REQUESTS", 200)
    monkeypatch.setattr(writer_module, "READ_BYTES", 40_000)
    with driven(tmp_path) as d:
        flood = d.peer()
        for _ in range(1_000):
            flood.ask(*d.messages(10, "x" * 200))
        assert flood.unsent, "the socket takes all of it, and nothing is shown"
        most = 0
        for _ in range(5_000):
            d.writer.turn(0.0)
            most = max(most, *(len(c.requests) for c in d.connections()))
            flood.send()
            if len(flood.take()) == 10_000:
                break
        assert [reply.seq for reply in flood.replies] == list(range(2, 10_002))
        assert 150 < most < 400


def test_a_connection_that_takes_no_answers_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "UNSENT_BYTES", 10_000)
    with driven(tmp_path) as d:
        deaf, other = d.peer(), d.peer()
        other.ask(Ping())
        d.until(other, 1)
        assert d.writer.connections == 2
        for _ in range(10_000):
            deaf.ask(*[Ping()] * 200)
            d.writer.turn(0.0)
            if d.writer.connections == 1:
                break
        else:
            raise AssertionError("it is never closed")
        other.ask(*d.messages(1))
        assert d.until(other, 2)[1].seq == 2


def frame(body: bytes) -> bytes:
    return FRAME_HEAD.pack(len(body)) + body


GARBAGE = [
    FRAME_HEAD.pack(FRAME_MAX_BYTES + 1),
    FRAME_HEAD.pack(2**32 - 1),
    frame(b""),
    frame(b"\xc0"),
    frame(b"\xc1\xc1\xc1\xc1"),
    frame(b"\x91" * 100_000),
    frame(b"\x91\xdc\xff\xff\xa4Ping" + b"\x91" * 100_000),
    frame(b"\x91\x92\xa5Nobod"),
    frame(b"\x91\x91\xa2\xff\xff"),
    frame(b"\x91\x94\xa5Block\xa1\xff\xa1u\xc2"),
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_frame_of_garbage_ends_only_its_connection(tmp_path: Path, garbage: bytes) -> None:
    with driven(tmp_path) as d:
        bad, other = d.peer(), d.peer()
        other.ask(*d.messages(1))
        bad.ask(Ping())
        bad.unsent += garbage
        d.until(other, 1)
        for _ in range(20):
            bad.send()
            bad.take()
            d.writer.turn(0.0)
        assert bad.closed
        assert d.writer.connections == 1
        other.ask(*d.messages(1))
        assert d.until(other, 2)[1].seq == 3


# --- an index that lags ------------------------------------------------------------------------


def test_beyond_the_limit_of_the_tail_what_it_grows_by_is_refused_and_nothing_else(tmp_path: Path) -> None:
    """With what is refused all fails that is on its way behind it; a worker connects anew."""
    with driven(tmp_path, tail_entries=200) as d:
        for _ in range(2):
            peer = d.peer()
            peer.ask(*d.messages(500))
            while not peer.closed:
                d.writer.turn(0.0)
                peer.take()
            errors = [reply.error for reply in peer.replies]
            taken = errors.index(BEHIND)
            assert 0 < taken <= 200 + BATCH
            assert errors[:taken] == [None] * taken
            assert set(errors[taken:]) == {BEHIND}
            seq = peer.replies[taken - 1].seq
            other = d.peer()
            other.ask(Ping(), AddUser(f"u{seq}", f"u{seq}", "h"))
            assert [reply.error for reply in d.until(other, 2)] == [None] * 2
            other.ask(SetRead("alice", d.conv, seq - 1))
            assert d.until(other, 3)[2].error == BEHIND
            d.catch_up()
        peer = d.peer()
        peer.ask(*d.messages(10))
        assert [reply.seq for reply in d.until(peer, 10)] == list(range(seq + 1, seq + 11))


class Cramped(Indexer):
    """There is no room for its file to grow."""

    full = True

    def _connect(self) -> apsw.Connection:
        db = super()._connect()
        if self.full:
            db.execute("PRAGMA max_page_count = 1")  # means: as many as there are
        return db


def test_a_full_disk_of_the_index_alone_stops_messages_at_last_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cramped, "full", False)
    with driven(tmp_path, Cramped, tail_entries=200) as d:
        monkeypatch.setattr(Cramped, "full", True)
        d.indexer.close()
        failures = 0
        taken: list[int] = []
        for _ in range(80):  # it may find some free pages in its file
            peer = d.peer()
            peer.ask(*d.messages(10))
            replies = d.until(peer, 10)
            taken += [reply.seq for reply in replies if reply.error is None]
            for _ in range(20):
                try:
                    d.indexer.step()
                except apsw.FullError:
                    failures += 1
        assert failures
        assert 200 <= len(taken) < 800
        monkeypatch.setattr(Cramped, "full", False)
        d.indexer.close()
        d.catch_up()
        assert d.engine.behind < 16
        sent = d.cids
        d.cids = 0
        again = d.messages(sent)
        replies = []
        peer = d.peer()
        for request in again:
            peer.ask(request)
            replies.append(d.until(peer, len(peer.replies) + 1)[-1])
            d.catch_up()
        assert [reply.seq for reply in replies if reply.dup] == taken
        assert sorted(reply.seq for reply in replies) == list(range(2, sent + 2))


# --- connections that are lost -----------------------------------------------------------------


def test_after_a_lost_connection_each_is_asked_again_once_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer has committed and does not answer. What may be repeated is, in its order, and announced as it is in
    the log; what may not fails."""
    lost = False
    answer = Writer._answer

    def lose(self: Writer, connection: _Connection, replies: list[Reply], last: bool = False) -> None:
        if lost:
            self._drop(connection)
        else:
            answer(self, connection, replies, last)

    monkeypatch.setattr(Writer, "_answer", lose)

    async def work(o: Opened) -> None:
        nonlocal lost
        alice, bob = await o.user("alice"), await o.user("bob")
        conv = await o.conversation(alice, title=None)
        await o.store.append(message(conv, alice))
        told = len(o.announced)
        lost = True
        opening = Opening(alice.id, "lost", "group", "t", (bob.id,), b"12345678")
        futures: list[Any] = [
            o.store.append(message(conv, alice, "first")),
            o.store.append(change(conv, alice, bob, "member")),
            o.store.write(Once("once")),  # type: ignore[attr-defined]
            asyncio.ensure_future(o.store.open(opening)),
            o.store.append(message(conv, alice, "last")),
        ]
        async with asyncio.timeout(10):
            while await o.store.read(onces) < 1:  # type: ignore[attr-defined]
                await asyncio.sleep(0.005)
        lost = False
        done = await asyncio.gather(*futures, return_exceptions=True)
        assert isinstance(done[2], Unavailable)
        assert await o.store.read(onces) == 1  # type: ignore[attr-defined]
        assert [done[i].seq for i in (0, 1, 4)] == [3, 4, 5]
        log = await o.log(conv)
        assert orjson.loads(log[3].wire)["was"] == "none"
        announced = o.announced[told:]
        assert [e for e in announced if e.conv == conv] == log[2:]
        assert [e for e in announced if e.conv != conv] == await o.log(done[3].conv)

    def onces(db: apsw.Connection) -> int:
        found: Any = db.execute("SELECT count(*) FROM revocations WHERE user = 'once'").fetchall()
        return int(found[0][0])

    run(tmp_path, work, hosting={"requests": (*STORE_REQUESTS, Once)})
