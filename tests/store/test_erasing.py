"""Overwritten text is in none of the files of the folder within a second."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chatcore.common.unix_address import unix_address
from chatcore.entries import MsgFields, new_entry
from chatcore.store.base import Opening
from chatcore.store.sqlite.accounts import AddUser
from chatcore.store.sqlite.engine import Engine
from chatcore.store.sqlite.indexer import Indexer
from chatcore.store.sqlite.lock import socket_path
from chatcore.store.sqlite.ops import Append, OpenConversation
from chatcore.store.sqlite.requests import FRAME_HEAD, LAST, Reply, Request
from chatcore.store.sqlite.schema import prepare
from chatcore.store.sqlite.tail import Snapshot
from chatcore.store.sqlite.transaction import Transaction
from chatcore.store.sqlite.writer import STORE_REQUESTS

from .hosting import hosted

PROMISED_S = 1.0
#: How long a reader may look at an old state.
QUERY_S = 0.5
SECRET = "what-nobody-may-read"


class Rewrite(Request, frozen=True, gc=False):
    """Replace what an entry says."""

    conv: str
    seq: int
    fields: bytes

    def apply(self, tx: Transaction) -> None:
        tx.rewrite(tx.log(self.conv), self.seq, self.fields)


def found_in(data: Path, text: str) -> list[str]:
    """The files of the folder that have a text."""
    return [p.name for p in data.iterdir() if p.is_file() and text.encode() in p.read_bytes()]


def message(conv: str, i: int, body: str) -> Append:
    e = new_entry(conv, "alice", f"cid{i}", MsgFields(body))
    return Append(e.conv, e.sender, e.cid, e.t, e.fields, e.digest, 100)


def body(text: str) -> bytes:
    return msgspec.json.encode({"body": text})


def ask(data: Path, *requests: Request) -> list[Reply]:
    """As a worker does."""
    replies: list[Reply] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        with unix_address(socket_path(data)) as address:
            sock.connect(address)
        frame = msgspec.msgpack.encode(requests)
        sock.sendall(FRAME_HEAD.pack(len(frame)) + frame)
        with sock.makefile("rb") as answers:
            while len(replies) < len(requests):
                (length,) = FRAME_HEAD.unpack(answers.read(FRAME_HEAD.size))
                replies += msgspec.msgpack.decode(answers.read(length & ~LAST), type=list[Reply])
                if length & LAST:
                    break
    assert all(reply.error is None for reply in replies), replies
    return replies


def opened(send: Callable[..., Any]) -> str:
    replies = send(AddUser("alice", "alice", "h"), OpenConversation(Opening("alice", "c", "group", None, (), b"x"), 9))
    conv: str = msgspec.msgpack.decode(replies[-1].value)["conv"]
    return conv


def gone_in_time(data: Path, text: str = SECRET) -> float:
    """Wait until no file has the text; how long it took."""
    began = time.monotonic()
    while files := found_in(data, text):
        assert time.monotonic() - began < PROMISED_S, f"still in {files}"
        time.sleep(0.01)
    return time.monotonic() - began


@contextmanager
def threads(*works: Callable[[], None]) -> Iterator[None]:
    """Each is done again and again until the end of the block."""
    stop = threading.Event()
    failed: list[BaseException] = []

    def again(work: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as exc:
            failed.append(exc)

    running = [threading.Thread(target=again, args=(work,)) for work in works]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in running:
            thread.join()
    assert not failed, failed


#: A short text, one of some pages, and one of many.
SIZES = [20, 9_000, 200_000]


@pytest.mark.parametrize("size", SIZES)
def test_of_a_new_entry_nothing_is_left(tmp_path: Path, size: int) -> None:
    with hosted(tmp_path, (*STORE_REQUESTS, Rewrite)):
        conv = opened(lambda *requests: ask(tmp_path, *requests))
        ask(tmp_path, message(conv, 1, "before"), message(conv, 2, SECRET * (size // 20)), message(conv, 3, "after"))
        assert found_in(tmp_path, SECRET)
        ask(tmp_path, Rewrite(conv, 3, body("removed")))
        gone_in_time(tmp_path)


def test_of_an_old_entry_that_is_indexed_and_merged_nothing_is_left(tmp_path: Path) -> None:
    with hosted(tmp_path, (*STORE_REQUESTS, Rewrite), portion=16) as engine:
        conv = opened(lambda *requests: ask(tmp_path, *requests))
        for at in range(0, 800, 100):
            ask(tmp_path, *(message(conv, at + i, f"{SECRET} {at + i}") for i in range(100)))
        began = time.monotonic()
        while engine.behind >= 32:
            assert time.monotonic() - began < 10
            time.sleep(0.01)
        ask(tmp_path, *(Rewrite(conv, seq, body("removed")) for seq in range(2, 802) if seq != 300))
        began = time.monotonic()
        while [name for i in range(800) if i != 298 for name in found_in(tmp_path, f'{SECRET} {i}"')]:
            assert time.monotonic() - began < 5 * PROMISED_S  # to look takes long
        assert found_in(tmp_path, f"{SECRET} 298")


def test_also_beside_a_reader_on_an_old_state_and_workers_that_write(tmp_path: Path) -> None:
    """A reader keeps the write-ahead log from being emptied for as long as a query may take."""
    cids = iter(range(10, 10**9))
    lock = threading.Lock()

    def write() -> None:
        with lock:
            some = [next(cids) for _ in range(5)]
        ask(tmp_path, *(message(conv, i, "other") for i in some))

    def read() -> None:
        with snapshots[threading.get_ident()] as snapshot:
            assert snapshot.ids(snapshot.number(conv), 1, 1)
            time.sleep(0.003)

    class Own(dict[int, Snapshot]):
        def __missing__(self, thread: int) -> Snapshot:
            self[thread] = found = Snapshot(tmp_path)
            return found

    snapshots = Own()
    with hosted(tmp_path, (*STORE_REQUESTS, Rewrite), portion=1000):
        conv = opened(lambda *requests: ask(tmp_path, *requests))
        ask(tmp_path, message(conv, 1, SECRET), message(conv, 2, "after"))
        old = Snapshot(tmp_path)
        with threads(write, write, read, read, read):
            for _ in range(3):
                ask(tmp_path, message(conv, next(cids), SECRET))
                with old:
                    seq = old.head_seqs([old.number(conv)])[old.number(conv)]
                    rewritten = [i for i in range(2, seq + 1) if SECRET.encode() in entry(old, conv, i)]
                    ask(tmp_path, *(Rewrite(conv, i, body("removed")) for i in rewritten))
                    began = time.monotonic()
                    time.sleep(QUERY_S)
                left = PROMISED_S - (time.monotonic() - began)
                assert gone_in_time(tmp_path) < left
        for snapshot in (old, *snapshots.values()):
            snapshot.close()


def entry(snapshot: Snapshot, conv: str, seq: int) -> bytes:
    [row] = snapshot.rows(snapshot.number(conv), seq, seq)
    return row[-1].encode()


def test_a_writer_killed_after_the_commit_leaves_it_to_the_next(tmp_path: Path) -> None:
    prepare(tmp_path)
    indexer = Indexer(tmp_path)
    indexer.open()
    engine = Engine(tmp_path)
    engine.open()
    conv = opened(lambda *requests: engine.commit(requests))
    engine.commit([message(conv, 1, SECRET), message(conv, 2, "after")])
    engine.commit([Rewrite(conv, 2, body("removed"))])
    assert found_in(tmp_path, SECRET)
    with hosted(tmp_path, (*STORE_REQUESTS, Rewrite)):  # the files stay open, so that nobody else empties the log
        gone_in_time(tmp_path)
    engine.close()
    indexer.close()


@pytest.mark.parametrize("seed", range(6))
def test_no_copy_stays_in_a_page_whatever_was_rewritten_before(tmp_path: Path, seed: int) -> None:
    """Rows of another size moved their neighbours to other pages, and copies of these stayed where they had been."""
    r = random.Random(seed)
    prepare(tmp_path)
    indexer = Indexer(tmp_path)
    indexer.open()
    engine = Engine(tmp_path)
    engine.open()
    conv = opened(lambda *requests: engine.commit(requests))
    texts = {seq: f"<{seq}:0>" * r.choice([3, 10, 40, 400, 1500]) for seq in range(2, 202)}
    batch = [message(conv, seq, text) for seq, text in texts.items()]
    while batch:
        del batch[: len(engine.commit(batch))]
    old: set[str] = set()
    for i in range(1, 400):
        seq = r.choice(list(texts))
        text = f"<{seq}:{i}>"
        if len(text) <= len(texts[seq]):
            old.add(texts[seq][: texts[seq].index(">") + 1])
            texts[seq] = text * r.randint(1, len(texts[seq]) // len(text))
            [reply] = engine.commit([Rewrite(conv, seq, body(texts[seq]))])
            assert reply.error is None
    engine.checkpoint()
    assert not engine.erasing
    with Snapshot(tmp_path) as snapshot:
        for row in snapshot.rows(snapshot.number(conv), 2, 201):
            assert msgspec.json.decode(row[-1]) == {"body": texts[row[1]]}
    snapshot.close()
    engine.close()
    indexer.close()
    assert not {text: files for text in old if (files := found_in(tmp_path, text))}


def test_a_longer_text_is_refused(tmp_path: Path) -> None:
    """It would move the rows beside it."""
    with hosted(tmp_path, (*STORE_REQUESTS, Rewrite)) as engine:
        conv = opened(lambda *requests: ask(tmp_path, *requests))
        ask(tmp_path, message(conv, 1, "short"))
        with pytest.raises(AssertionError, match="unavailable"):
            ask(tmp_path, Rewrite(conv, 2, body("longer")))
        ask(tmp_path, Rewrite(conv, 2, body("brief")))
        assert engine.behind
