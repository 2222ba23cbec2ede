"""Several writers on one database, stores that hang, and files that are broken."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import apsw
import orjson
import pytest

from chatcore.entries import MemberFields, new_entry
from chatcore.errors import Forbidden, Unavailable
from chatcore.store.base import Appended, User
from chatcore.store.sqlite.schema import BrokenStore, database_path, prepare
from chatcore.store.sqlite.threads import WriteLock

from .harness import Opened, message, run

FORK = multiprocessing.get_context("fork")


def hammer(data: Path, conv: str, user: User, prefix: str, count: int, acked: Any) -> None:
    """A writing process: many messages at once, each ack reported as soon as it is there."""

    async def work(o: Opened) -> None:
        async def one(i: int) -> None:
            done = await o.store.append(message(conv, user, f"{prefix} {i}", f"{prefix}-{i}"))
            acked.send((f"{prefix}-{i}", done.seq))

        for at in range(0, count, 50):
            await asyncio.gather(*(one(i) for i in range(at, min(count, at + 50))))

    run(data, work)
    acked.send(None)


def test_two_processes_write_one_dense_log(tmp_path: Path) -> None:
    async def setup(o: Opened) -> tuple[User, str]:
        alice = await o.user("alice")
        return alice, await o.conversation(alice, title=None)

    alice, conv = run(tmp_path, setup)
    pipes = [FORK.Pipe(duplex=False) for _ in range(2)]
    writers = [
        FORK.Process(target=hammer, args=(tmp_path, conv, alice, f"w{i}", 500, pipe[1])) for i, pipe in enumerate(pipes)
    ]
    for writer in writers:
        writer.start()
    acked: dict[str, int] = {}
    for receive, _ in pipes:
        while (got := receive.recv()) is not None:
            acked[got[0]] = got[1]
    for writer in writers:
        writer.join(30)

    async def check(o: Opened) -> None:
        log = await o.log(conv)
        assert [e.seq for e in log] == list(range(1, 1002))
        assert sorted(acked.values()) == list(range(2, 1002))

    run(tmp_path, check)


def change_roles(data: Path, conv: str, actor: User, user: User, roles: list[str], acked: Any) -> None:
    """A process that changes the role of one user again and again."""

    async def work(o: Opened) -> None:
        for i, role in enumerate(roles):
            with contextlib.suppress(Forbidden):  # to appoint a user who is out
                await o.store.append(new_entry(conv, actor.id, f"{os.getpid()}-{i}", MemberFields(user.id, role)))

    run(data, work)
    acked.send(None)


def test_two_processes_that_change_one_member_each_know_the_role_before(tmp_path: Path) -> None:
    async def setup(o: Opened) -> tuple[User, User, str]:
        alice, bob = await o.user("alice"), await o.user("bob")
        return alice, bob, await o.conversation(alice, bob)

    alice, bob, conv = run(tmp_path, setup)
    pipes = [FORK.Pipe(duplex=False) for _ in range(2)]
    for (_, done), roles in zip(pipes, (["none", "member", "admin"], ["banned", "member"]), strict=True):
        FORK.Process(target=change_roles, args=(tmp_path, conv, alice, bob, roles * 40, done)).start()
    for receive, _ in pipes:
        assert receive.poll(60)
        receive.recv()

    async def check(o: Opened) -> None:
        before: dict[str, str] = {}
        entries = [orjson.loads(e.wire) for e in await o.log(conv) if e.t == "member"]
        assert len(entries) > 50
        for e in entries:
            assert e["was"] == before.get(e["user"], "none"), e
            before[e["user"]] = e["role"]

    run(tmp_path, check)


def test_a_killed_writer_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    async def setup(o: Opened) -> tuple[User, str]:
        alice = await o.user("alice")
        return alice, await o.conversation(alice, title=None)

    alice, conv = run(tmp_path, setup)
    receive, send = FORK.Pipe(duplex=False)
    writer = FORK.Process(target=hammer, args=(tmp_path, conv, alice, "w", 100_000, send))
    writer.start()
    send.close()
    acked: dict[str, int] = {}
    while len(acked) < 2000:
        cid, seq = receive.recv()
        acked[cid] = seq
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(30)
    try:
        while True:
            cid, seq = receive.recv()
            acked[cid] = seq
    except EOFError:
        pass

    async def check(o: Opened) -> None:
        log = await o.log(conv)
        assert [e.seq for e in log] == list(range(1, len(log) + 1))
        again = await asyncio.gather(
            *(o.store.append(message(conv, alice, cid.replace("-", " "), cid)) for cid in acked)
        )
        assert [d.seq for d in again] == list(acked.values())
        assert all(d.dup for d in again)

    run(tmp_path, check)


def test_the_write_lock_is_fair(tmp_path: Path) -> None:
    """A process that releases it and wants it again at once does not overtake one that waits."""
    prepare(tmp_path)
    started, turn = FORK.Event(), FORK.Event()

    def other() -> None:
        lock = WriteLock(tmp_path)
        started.set()
        with lock:
            turn.set()

    lock = WriteLock(tmp_path)
    rounds = 0
    with lock:
        process = FORK.Process(target=other)
        process.start()
        assert started.wait(10)
        # It waits now, or in a moment: it holds `next` while it does.
        probe = os.open(tmp_path / "write.next", os.O_RDWR)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(probe, fcntl.LOCK_UN)
            except BlockingIOError:
                break
        os.close(probe)
    while not turn.is_set() and rounds < 1000:
        with lock:
            rounds += 1
    process.join(10)
    lock.close()
    # At most the round that had begun to ask before the other was through the first lock.
    assert rounds <= 2


def test_a_store_that_hangs_answers_unavailable_and_the_same_cid_finds_out(tmp_path: Path) -> None:
    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice)
        lock = os.open(tmp_path / "write.lock", os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Unavailable):
            await o.store.append(message(conv, alice, "a", "stuck"))
        assert not o.store.healthy
        assert await o.store.heads([conv]), "reads go on"
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)
        done = await o.store.append(message(conv, alice, "a", "stuck"))
        assert done.dup, "the stuck one was written after all, once"
        assert [e.seq for e in await o.log(conv)] == [1, 2, done.seq]
        assert o.store.healthy

    run(tmp_path, work, timeout_ms=2_000)


def test_a_full_queue_refuses_instead_of_growing(tmp_path: Path) -> None:
    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice, title=None)
        lock = os.open(tmp_path / "write.lock", os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
        futures = [o.store.append(message(conv, alice)) for _ in range(40)]
        refused = [f for f in futures if f.done() and isinstance(f.exception(), Unavailable)]
        assert len(refused) >= 40 - 20 - 10  # the queue, and the batch that was taken
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)
        done = await asyncio.gather(*futures, return_exceptions=True)
        taken = [d for d in done if isinstance(d, Appended)]
        assert [d.seq for d in taken] == list(range(2, 2 + len(taken)))

    run(tmp_path, work, queue=20, batch=10)


def garbage(path: Path) -> None:
    path.write_bytes(b"this is no database\n" * 500)


def foreign(path: Path) -> None:
    db = apsw.Connection(str(path))
    db.execute("CREATE TABLE theirs(x); INSERT INTO theirs VALUES (1)")
    db.close()


def newer(path: Path) -> None:
    prepare(path.parent)
    db = apsw.Connection(str(path))
    db.execute("PRAGMA user_version = 999")
    db.close()


def truncated(path: Path) -> None:
    prepare(path.parent)
    db = apsw.Connection(str(path))
    db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    db.close()
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("spoil", [garbage, foreign, newer, truncated])
def test_a_file_that_is_not_ours_is_refused_and_not_touched(tmp_path: Path, spoil: Any) -> None:
    path = database_path(tmp_path)
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(BrokenStore) as refused:
        prepare(tmp_path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert path.read_bytes() == before
