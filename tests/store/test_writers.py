"""Several workers on one writer, a writer that is killed or hangs, and files that are broken."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
from pathlib import Path
from typing import Any

import apsw
import orjson
import pytest

from chatcore.entries import MemberFields, new_entry
from chatcore.errors import Forbidden, Unavailable
from chatcore.store.base import Appended, User
from chatcore.store.sqlite.accounts import AddUser
from chatcore.store.sqlite.engine import Engine, Superseded
from chatcore.store.sqlite.indexer import Indexer
from chatcore.store.sqlite.lock import WriterLock
from chatcore.store.sqlite.schema import BrokenStore, connect, database_path, prepare

from .harness import Opened, message, run, stalled
from .hosting import hosted_apart

FORK = multiprocessing.get_context("fork")


def hammer(data: Path, conv: str, user: User, prefix: str, count: int, acked: Any) -> None:
    """A writing process: many messages at once, each ack reported as soon as it is there."""

    async def work(o: Opened) -> None:
        async def one(i: int) -> None:
            done = await o.store.append(message(conv, user, f"{prefix} {i}", f"{prefix}-{i}"))
            acked.send((f"{prefix}-{i}", done.seq))

        for at in range(0, count, 50):
            await asyncio.gather(*(one(i) for i in range(at, min(count, at + 50))))

    run(data, work, host=False)
    acked.send(None)


def test_two_workers_write_one_dense_log(tmp_path: Path) -> None:
    async def setup(o: Opened) -> tuple[User, str]:
        alice = await o.user("alice")
        return alice, await o.conversation(alice, title=None)

    with hosted_apart(tmp_path):
        alice, conv = run(tmp_path, setup, host=False)
        pipes = [FORK.Pipe(duplex=False) for _ in range(2)]
        workers = [
            FORK.Process(target=hammer, args=(tmp_path, conv, alice, f"w{i}", 500, pipe[1]))
            for i, pipe in enumerate(pipes)
        ]
        for worker in workers:
            worker.start()
        acked: dict[str, int] = {}
        for receive, _ in pipes:
            while (got := receive.recv()) is not None:
                acked[got[0]] = got[1]
        for worker in workers:
            worker.join(30)

        async def check(o: Opened) -> None:
            log = await o.log(conv)
            assert [e.seq for e in log] == list(range(1, 1002))
            assert sorted(acked.values()) == list(range(2, 1002))

        run(tmp_path, check, host=False)


def change_roles(data: Path, conv: str, actor: User, user: User, roles: list[str], acked: Any) -> None:
    """A process that changes the role of one user again and again."""

    async def work(o: Opened) -> None:
        for i, role in enumerate(roles):
            with contextlib.suppress(Forbidden):  # to appoint a user who is out
                await o.store.append(new_entry(conv, actor.id, f"{os.getpid()}-{i}", MemberFields(user.id, role)))

    run(data, work, host=False)
    acked.send(None)


def test_two_workers_that_change_one_member_each_know_the_role_before(tmp_path: Path) -> None:
    async def setup(o: Opened) -> tuple[User, User, str]:
        alice, bob = await o.user("alice"), await o.user("bob")
        return alice, bob, await o.conversation(alice, bob)

    with hosted_apart(tmp_path):
        alice, bob, conv = run(tmp_path, setup, host=False)
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

        run(tmp_path, check, host=False)


def test_a_killed_writer_loses_nothing_and_its_workers_go_on(tmp_path: Path) -> None:
    """The worker asks again what was not answered, in its old order; what was committed already is announced, too."""

    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice, title=None)
        acked: dict[str, int] = {}

        async def one(cid: str) -> None:
            acked[cid] = (await o.store.append(message(conv, alice, cid, cid))).seq

        for round_ in range(6):
            sending = [asyncio.ensure_future(one(f"{round_}-{i}")) for i in range(1000)]
            while len(acked) < 1000 * round_ + 300 * (round_ % 2):
                await asyncio.sleep(0)
            await asyncio.to_thread(host.kill)
            await asyncio.to_thread(host.start)
            await asyncio.gather(*sending)
        log = await o.log(conv)
        assert [e.seq for e in log] == list(range(1, 6002))
        # In the order in which they were sent, none twice.
        assert [orjson.loads(e.wire)["cid"] for e in log[1:]] == list(acked)
        assert list(acked.values()) == list(range(2, 6002))
        assert sorted({e.seq for e in o.announced}) == list(range(1, 6002)), "every entry was announced"
        again = await asyncio.gather(*(o.store.append(message(conv, alice, cid, cid)) for cid in acked))
        assert [d.seq for d in again] == list(acked.values())
        assert all(d.dup for d in again)

    with hosted_apart(tmp_path, portion=500) as host:
        run(tmp_path, work, host=False)


def test_there_is_one_writer_and_a_stale_one_ends(tmp_path: Path) -> None:
    """A writer that stood still while another one took over commits nothing any more."""
    lock = WriterLock(tmp_path)
    assert lock.acquire(0)
    assert not WriterLock(tmp_path).acquire(0)
    prepare(tmp_path)
    Indexer(tmp_path).open()
    stale = Engine(tmp_path)
    stale.open()
    assert stale.commit([AddUser("u1", "alice", "hash")])[0].error is None
    new = Engine(tmp_path)
    new.open()
    with pytest.raises(Superseded):
        stale.commit([AddUser("u2", "bob", "hash")])
    stale.close()
    assert new.commit([AddUser("u2", "bob", "hash")])[0].error is None
    new.close()
    lock.release()


def test_a_log_that_somebody_else_wrote_to_ends_the_writer(tmp_path: Path) -> None:
    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice, title=None)
        await o.store.append(message(conv, alice))

    run(tmp_path, work)
    engine = Engine(tmp_path)
    engine.open()
    db = connect(database_path(tmp_path), write=True)
    db.execute("INSERT INTO entries SELECT id + 1, conv, seq + 1, t, sender, 2, 2, 'x', digest, ts, fields"
               " FROM entries ORDER BY id DESC LIMIT 1")  # fmt: skip
    db.close()
    with pytest.raises(Superseded):
        engine.commit([AddUser("u", "bob", "hash")])
    engine.close()


def test_a_store_that_hangs_answers_unavailable_and_the_same_cid_finds_out(tmp_path: Path) -> None:
    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice)
        with stalled(tmp_path):
            with pytest.raises(Unavailable):
                await o.store.append(message(conv, alice, "a", "stuck"))
            assert not o.store.healthy
            assert await o.store.heads([conv]), "reads go on"
        done = await o.store.append(message(conv, alice, "a", "stuck"))
        assert done.dup, "the stuck one was written after all, once"
        assert [e.seq for e in await o.log(conv)] == [1, 2, done.seq]
        assert o.store.healthy

    run(tmp_path, work, timeout_ms=2_000)


def test_a_full_queue_refuses_instead_of_growing(tmp_path: Path) -> None:
    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice, title=None)
        with stalled(tmp_path):
            futures = [o.store.append(message(conv, alice)) for _ in range(40)]
            refused = [f for f in futures if f.done() and isinstance(f.exception(), Unavailable)]
            assert len(refused) == 20
        done = await asyncio.gather(*futures, return_exceptions=True)
        taken = [d for d in done if isinstance(d, Appended)]
        assert [d.seq for d in taken] == list(range(2, 22))

    run(tmp_path, work, queue=20)


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
