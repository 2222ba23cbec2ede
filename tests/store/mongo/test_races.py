"""Several workers on one database: what they do to one conversation at once."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

import pytest

from chatcore.entries import MsgFields, new_entry
from chatcore.errors import Conflict, Forbidden, NotFound
from chatcore.store.append import Row, Unknown
from chatcore.store.base import Appended, Opening

from ..harness import Database, change, message
from .parts import Worker, assert_dense_and_once, run, workers


def test_two_workers_that_race_on_one_conversation_leave_it_dense(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            alice, bob = await a.user("alice"), await a.user("bob")
            conv = await a.conversation(alice, bob)
            answers: dict[str, Appended] = {}

            async def send(worker: Worker, sender: str) -> None:
                for i in range(30):
                    entry = new_entry(conv, sender, f"{sender}-{i}", MsgFields(str(i)))
                    answers[entry.cid] = await worker.store.append(entry)

            await asyncio.gather(send(a, alice.id), send(b, bob.id))
            assert_dense_and_once(await b.log(conv), answers)
            assert a.store.healthy and b.store.healthy
            for user in (alice, bob):
                seqs = [answers[f"{user.id}-{i}"].seq for i in range(30)]
                assert seqs == sorted(seqs), "what follows an `ok` comes after it"
            announced = {e.seq for e in a.announced} | {e.seq for e in b.announced}
            assert announced == set(range(1, len(await a.log(conv)) + 1)), "each entry is announced"

    run(work())


def test_the_same_cid_on_two_workers_at_once_is_stored_once(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            alice = await a.user("alice")
            conv = await a.conversation(alice)
            for i in range(10):
                entry = message(conv, alice, "once", f"same-{i}")
                one, other = await asyncio.gather(a.store.append(entry), b.store.append(entry))
                assert one.seq == other.seq
                assert sorted([one.dup, other.dup]) == [False, True]
                outcomes = await asyncio.gather(
                    a.store.append(message(conv, alice, "this", f"two-{i}")),
                    b.store.append(message(conv, alice, "that", f"two-{i}")),
                    return_exceptions=True,
                )
                assert sorted(type(x).__name__ for x in outcomes) == ["Appended", "Conflict"]
            assert [e.seq for e in await a.log(conv)] == list(range(1, 23))

    run(work())


def test_a_race_that_was_lost_is_no_ill_health(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 1) as [a]:
            alice = await a.user("alice")
            conv = await a.conversation(alice, title=None)
            for seq, cid in ((1, "the seq is taken"), (2, "new"), (3, "new")):
                lost = a.store._ops.insert(conv, [Row(message(conv, alice, cid=cid), seq, 0, seq, seq)])
                outcome = (await asyncio.gather(lost, return_exceptions=True))[0]
                assert isinstance(outcome, Unknown) == (seq != 2), outcome
                assert a.store.healthy

    run(work())


def test_three_processes_hammer_one_conversation(database: Database) -> None:
    async def prepare() -> tuple[str, list[str]]:
        async with workers(database, 1) as [a]:
            users = [await a.user(f"user{i}") for i in range(3)]
            return await a.conversation(*users), [user.id for user in users]

    conv, users = run(prepare())
    command = [sys.executable, "-m", "tests.store.mongo.process", database.url, database.name, conv]
    processes = [
        subprocess.Popen([*command, user, "40"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for user in users
    ]
    answers: dict[str, Appended] = {}
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err.decode()
        answers |= {cid: Appended(seq, 0) for cid, seq in json.loads(out).items()}
    assert len(answers) == 120

    async def look() -> None:
        async with workers(database, 1) as [a]:
            assert_dense_and_once(await a.log(conv), answers)

    run(look())


def test_who_is_removed_through_one_worker_cannot_write_through_another_that_has_not_heard(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            alice, bob = await a.user("alice"), await a.user("bob")
            conv = await a.conversation(alice, bob)
            await b.store.append(message(conv, bob))  # B knows the role and the head
            removed = await a.store.append(change(conv, alice, bob, "none"))
            with pytest.raises(NotFound):
                await b.store.append(message(conv, bob))
            assert (await a.log(conv))[-1].seq == removed.seq
            await a.store.append(change(conv, alice, bob, "member"))
            assert (await b.store.append(message(conv, bob))).seq == removed.seq + 2

    run(work())


def test_workers_that_change_one_member_at_once_each_know_the_role_before(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 3) as found:
            a = found[0]
            alice, bob = await a.user("alice"), await a.user("bob")
            conv = await a.conversation(alice, bob)
            for roles in [("admin", "none", "banned"), ("member", "owner", "admin"), ("none", "member", "banned")] * 4:
                changes = [w.store.append(change(conv, alice, bob, r)) for w, r in zip(found, roles, strict=True)]
                # By the order in which they come some are forbidden, as to appoint a user who is out.
                for outcome in await asyncio.gather(*changes, return_exceptions=True):
                    assert isinstance(outcome, Appended | Forbidden), outcome
            before: dict[str, str] = {}
            entries = [json.loads(e.wire) for e in await a.log(conv) if e.t == "member"]
            assert len(entries) > 12
            for e in entries:
                assert e["was"] == before.get(e["user"], "none"), e
                before[e["user"]] = e["role"]

    run(work())


def test_one_cid_for_dms_with_two_users_at_once_makes_one_of_them(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            bob, eve = await a.user("bob"), await a.user("eve")
            for i in range(8):
                alice = await a.user(f"alice{i}")
                outcomes = await asyncio.gather(
                    a.store.open(Opening(alice.id, "cid", "dm", None, (bob.id,), b"with bob")),
                    b.store.open(Opening(alice.id, "cid", "dm", None, (eve.id,), b"with eve")),
                    return_exceptions=True,
                )
                made = [x for x in outcomes if not isinstance(x, BaseException)]
                assert len(made) == 1, outcomes
                assert any(isinstance(x, Conflict) for x in outcomes)
                assert [view.conv for view in (await a.store.views(alice.id))[1]] == [made[0].conv]

    run(work())


def test_opening_a_dm_on_two_workers_at_once_is_one_with_each_member_once(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            for i in range(8):
                alice, bob = await a.user(f"alice{i}"), await a.user(f"bob{i}")
                one, other = await asyncio.gather(
                    a.store.open(Opening(alice.id, "x", "dm", None, (bob.id,), b"12345678")),
                    b.store.open(Opening(bob.id, "y", "dm", None, (alice.id,), b"87654321")),
                )
                assert one.conv == other.conv
                members = [json.loads(e.wire)["user"] for e in await a.log(one.conv)]
                assert sorted(members) == sorted([alice.id, bob.id])
                assert await a.store.role(alice.id, one.conv) == await a.store.role(bob.id, one.conv) == "member"

    run(work())


def test_the_same_cid_for_two_groups_at_once_makes_one_of_them(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            alice = await a.user("alice")
            for i in range(8):
                outcomes = await asyncio.gather(
                    a.store.open(Opening(alice.id, f"cid{i}", "group", "this", (), b"thisthis")),
                    b.store.open(Opening(alice.id, f"cid{i}", "group", "that", (), b"thatthat")),
                    return_exceptions=True,
                )
                made = [x for x in outcomes if not isinstance(x, BaseException)]
                assert len(made) == 1, outcomes
                assert any(isinstance(x, Conflict) for x in outcomes)
                assert [e.t for e in await a.log(made[0].conv)] == ["member", "meta"]

    run(work())


def test_an_owner_cannot_leave_by_an_older_count_of_owners(database: Database) -> None:
    """Two owners leave at once, each as if the other stayed: one must stay to lead."""

    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            alice, bob, eve = await a.user("alice"), await a.user("bob"), await a.user("eve")
            conv = await a.conversation(alice, bob, eve)
            await a.store.append(change(conv, alice, bob, "owner"))
            await b.store.append(message(conv, bob))
            # Alice has left, and her worker died before it wrote her row.
            await a.write_entry_alone(change(conv, alice, alice, "none"))
            with pytest.raises(Forbidden):
                await b.store.append(change(conv, bob, bob, "none"))
            assert await b.store.role(alice.id, conv) == "none"

    run(work())


def test_a_ban_and_a_join_at_once_end_in_the_ban(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            alice, bob = await a.user("alice"), await a.user("bob")
            for i in range(6):
                conv = await a.conversation(alice, kind="channel", title=f"t{i}")
                await asyncio.gather(
                    a.store.append(change(conv, alice, bob, "banned")),
                    b.store.append(change(conv, bob, bob, "member")),
                    return_exceptions=True,
                )
                with pytest.raises((NotFound, Forbidden)):
                    await b.store.append(message(conv, bob))
                assert await a.store.role(bob.id, conv) == "banned"

    run(work())


def test_a_row_made_by_an_earlier_change_meanwhile_is_overwritten_by_the_later_one(database: Database) -> None:
    """A ban found no row, the join before it made the row first, and the ban was never written."""

    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            alice, bob = await a.user("alice"), await a.user("bob")
            conv = await a.conversation(alice, kind="channel", title="t")
            there, here = b.store._members, a.store._members
            write = here._write

            lost: list[str] = []

            async def late(*args: Any) -> bool:
                if lost:
                    return await write(*args)
                # The server found no row to update; before it inserts one there is the join's: a duplicate key.
                await there._set_role(conv, bob.id, "member", 2, 1)
                lost.append(bob.id)
                return False

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(here, "_write", late)
                await here._set_role(conv, bob.id, "banned", 3, 1)
            row = await a.row(conv, bob)
            assert row is not None
            assert (row["role"], row["as_of"]) == ("banned", 3)

    run(work())


def test_four_workers_set_up_an_empty_database_at_once(database: Database) -> None:
    async def work() -> None:
        found = [Worker(database, {}, {}) for _ in range(4)]
        await asyncio.gather(*(worker.store.start() for worker in found))
        try:
            assert len({worker.store.store_id for worker in found}) == 1
            alice = await found[0].user("alice")
            opening = Opening(alice.id, "x", "group", None, (), b"12345678")
            opened = await asyncio.gather(*(worker.store.open(opening) for worker in found))
            assert len({one.conv for one in opened}) == 1, "the secret is one, too"
        finally:
            for worker in found:
                await worker.store.close()

    run(work())


def test_who_loses_asks_the_others_to_yield(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            alice = await a.user("alice")
            conv = await a.conversation(alice)

            async def send(worker: Worker, other: Worker) -> None:
                for _ in range(25):
                    await worker.store.append(message(conv, alice))
                    while worker.yields:
                        other.store.on_yield(worker.yields.pop())

            await asyncio.gather(send(a, b), send(b, a))
            assert [e.seq for e in await a.log(conv)] == list(range(1, 53))

    run(work())
