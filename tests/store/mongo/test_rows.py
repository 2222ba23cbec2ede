"""Rows follow their entries: what is shown and allowed while they are behind, and which worker brings them up."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from chatcore.errors import Forbidden, NotFound
from chatcore.store.base import Changes, Opening, User
from chatcore.store.mongo.accounts import UPDATES
from chatcore.store.mongo.members import ROW_WRITE_MS, MemberRows
from chatcore.store.mongo.store import ROTATION_LOOKS

from ..harness import Database, change, message
from .parts import Worker, run, workers


@dataclass
class Holding:
    """What a worker holds, as ``changes`` asks for it."""

    convs: dict[str, int] = field(default_factory=dict)
    connected: list[str] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)

    def lasts(self) -> dict[str, int]:
        return self.convs

    def users(self) -> list[str]:
        return self.connected

    def tokens(self) -> list[bytes]:
        return self.hashes


@pytest.mark.parametrize("known", [True, False], ids=["a worker that knows the conversation", "one that does not"])
def test_a_removal_counts_before_anybody_has_folded_it(database: Database, known: bool) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            alice, bob = await a.user("alice"), await a.user("bob")
            conv = await a.conversation(alice, bob)
            if known:
                await b.store.append(message(conv, bob))
            removal = await a.write_entry_alone(change(conv, alice, bob, "none"))
            row = await a.row(conv, bob)
            assert row is not None and row["role"] == "member", "it is behind"
            with pytest.raises(NotFound):
                await b.store.append(message(conv, bob))
            assert (await b.log(conv))[-1].seq == removal.seq

    run(work())


def test_who_joins_a_channel_again_is_not_put_out_by_a_removal_that_is_folded_late(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            alice, bob = await a.user("alice"), await a.user("bob")
            conv = await a.conversation(alice, kind="channel")
            await a.store.append(change(conv, bob, bob, "member"))
            await b.store.append(message(conv, alice))  # B knows the conversation, so it applies nothing
            await a.write_entry_alone(change(conv, alice, bob, "none"))
            await b.store.append(change(conv, bob, bob, "member"))
            await b.store.append(message(conv, bob))
            assert await a.store.views(alice.id)  # which applies it
            assert await a.store.role(bob.id, conv) == "member"
            await a.store.append(message(conv, bob))

    run(work())


def test_joining_by_an_older_entry_than_the_row_reflects_is_decided_anew(database: Database) -> None:
    """A ban that comes between the rules and the row stays."""

    async def work() -> None:
        async with workers(database, 1) as [a]:
            alice, bob = await a.user("alice"), await a.user("bob")
            conv = await a.conversation(alice, kind="channel")
            banned = await a.store.append(change(conv, alice, bob, "banned"))
            members = MemberRows(a.store.mongo)
            assert not await members.set_own_row(conv, bob.id, "member", banned.seq - 1, 0)
            assert await a.store.role(bob.id, conv) == "banned"
            assert await a.store.member_count(conv) == 1

    run(work())


async def _behind(a: Worker, kind: str = "group") -> tuple[str, User, User, Any]:
    """A conversation of three, out of which Bob was put by an entry whose writer died."""
    alice, bob, eve = await a.user("alice"), await a.user("bob"), await a.user("eve")
    conv = await a.conversation(alice, bob, eve, kind=kind)
    return conv, alice, bob, await a.write_entry_alone(change(conv, alice, bob, "none"))


def test_views_never_show_a_row_that_is_older_than_the_head(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            conv, alice, bob, _ = await _behind(a)
            _, views = await b.store.views(bob.id, [conv])
            assert views == []
            _, [view] = await b.store.views(alice.id)
            assert (view.head, view.as_of, view.members) == (5, 1, 2)

    run(work())


@pytest.mark.parametrize("how", ["heard of", "read"])
def test_whoever_comes_across_a_change_folds_it(database: Database, how: str) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            conv, _, bob, entry = await _behind(a)
            if how == "heard of":
                b.store.heard(entry)
            else:
                await b.store.entries(conv, entry.seq - 1, 10, 10**6)

            async def applied() -> bool:
                # First the row, then the number.
                return await a.store.role(bob.id, conv) == "none" and await b.store.member_count(conv) == 2

            await b.until(applied)

    run(work())


def test_folding_twice_at_once_and_again_is_folding_once(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 1) as [a]:
            conv, alice, bob, _ = await _behind(a)
            await a.write_entry_alone(change(conv, alice, bob, "member"))
            await a.write_entry_alone(change(conv, alice, bob, "admin"))
            members = [MemberRows(a.store.mongo) for _ in range(2)]
            changes = await members[0].changes(conv, 4)
            assert [doc["s"] for doc in changes] == [5, 6, 7]
            await members[0].apply(conv, changes[:2])
            await members[1].apply(conv, changes[:1])  # older, and late
            await asyncio.gather(*(one.apply_changes(conv) for one in members))
            await members[1].apply(conv, changes)
            row = await a.row(conv, bob)
            assert row is not None
            assert (row["role"], row["as_of"], row["read"]) == ("admin", 7, 6), "read up to where the user came in"
            doc = await a.store.mongo["convs"].find_one({"_id": conv})
            assert doc is not None and doc["folded"] == 7

    run(work())


def test_a_death_between_a_row_and_the_number_of_members_is_made_good(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 1) as [a]:
            conv, _, bob, entry = await _behind(a)
            # The worker died after it wrote the row.
            await a.store.mongo["members"].update_one(
                {"_id": f"{conv}:{bob.id}"}, {"$set": {"role": "none", "as_of": entry.seq}}
            )
            members = MemberRows(a.store.mongo, recount_after_s=0.0)
            await members.apply_changes(conv, late=True)
            assert await a.store.member_count(conv) == 3
            await members.recount()
            assert await a.store.member_count(conv) == 2

    run(work())


# --- opening --------------------------------------------------------------------------


def test_whoever_asks_again_completes_what_was_half_opened(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 2, max_conversations=2) as [a, b]:
            alice, bob = await a.user("alice"), await a.user("bob")
            opening = Opening(alice.id, "cid", "group", "t", (bob.id,), b"12345678")
            whole = await a.store.open(opening)
            log = await a.log(whole.conv)
            # As it was when the writer died after the first entry.
            mongo = a.store.mongo
            await mongo["entries"].delete_many({"c": whole.conv, "s": {"$gt": 1}})
            await mongo["members"].delete_many({"c": whole.conv})
            await mongo["convs"].update_one(
                {"_id": whole.conv}, {"$set": {"opened": False, "folded": 0, "members": 0, "title_as_of": 0}}
            )
            assert (await b.store.channels(alice.id, None, None, 10))[0] == []
            # What was allowed then stays so: Bob is in as many as the limit allows, and his account is disabled.
            for i in range(2):
                await b.conversation(bob, title=f"t{i}")
            await b.store.set_disabled("bob", True)
            again = await b.store.open(opening)
            assert (again.conv, again.created) == (whole.conv, True)
            assert [e.seq for e in await b.log(whole.conv)] == [1, 2, 3]
            assert [e.t for e in await b.log(whole.conv)] == [e.t for e in log]
            assert await b.store.member_count(whole.conv) == 2
            assert not (await a.store.open(opening)).created

    run(work())


def test_a_conversation_that_was_asked_for_too_early_is_not_thought_missing_for_ever(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            alice, bob = await a.user("alice"), await a.user("bob")
            first = await a.store.open(Opening(alice.id, "x", "dm", None, (bob.id,), b"12345678"))
            for collection in ("entries", "members"):
                await a.store.mongo[collection].delete_many({"c": first.conv})
            await a.store.mongo["convs"].delete_many({"_id": first.conv})
            with pytest.raises(NotFound):
                await b.store.append(message(first.conv, bob))
            async with workers(database, 1) as [c]:
                await c.store.open(Opening(alice.id, "x", "dm", None, (bob.id,), b"12345678"))
            assert (await b.store.append(message(first.conv, bob))).seq == 3

    run(work())


def test_who_cancels_an_open_or_a_change_does_not_stop_it(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 1) as [a]:
            alice, bob = await a.user("alice"), await a.user("bob")
            opening = Opening(alice.id, "cid", "group", "t", (bob.id,), b"12345678")
            task = asyncio.create_task(a.store.open(opening))
            await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            opened = await a.store.open(opening)
            assert len(await a.log(opened.conv)) == 3
            future = a.store.append(change(opened.conv, alice, bob, "none"))
            await asyncio.sleep(0.002)
            future.cancel()

            async def out() -> bool:
                return await a.store.role(bob.id, opened.conv) == "none"

            await a.until(out)

    run(work())


# --- what other workers hear ----------------------------------------------------------


def test_a_block_is_seen_by_a_worker_that_has_not_heard_of_it(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            alice, bob = await a.user("alice"), await a.user("bob")
            conv = await a.conversation(alice, bob, kind="dm", title=None)
            await b.store.append(message(conv, alice))
            await a.store.block(bob.id, alice.id, True)
            await a.store.block(bob.id, alice.id, True)  # again: as good as once

            async def refused() -> bool:
                try:
                    await b.store.append(message(conv, alice))
                except Forbidden:
                    return True
                return False

            assert await b.until(refused, 20.0) < 10.0
            await b.store.append(message(conv, bob))
            await b.store.block(bob.id, alice.id, False)
            await b.store.append(message(conv, alice))

    run(work())


@pytest.mark.parametrize("how", ["by the bus", "by looking"])
def test_leaving_a_channel_is_seen_by_another_worker(database: Database, how: str) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            alice, bob = await a.user("alice"), await a.user("bob")
            conv = await a.conversation(alice, kind="channel")
            await a.store.append(change(conv, bob, bob, "member"))
            await b.store.append(message(conv, bob))
            holding = Holding(connected=[bob.id])
            await b.store.memberships(bob.id)
            assert (await b.store.changes(0, holding)).rows == []
            await a.store.append(change(conv, bob, bob, "none"))
            if how == "by the bus":
                b.store.row_changed(conv, bob.id)
            else:
                assert (await b.store.changes(0, holding)).rows == [(bob.id, conv)]
            with pytest.raises(NotFound):
                await b.store.append(message(conv, bob))

    run(work())


def test_a_rotation_finds_everything_in_as_many_looks(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            users = [await a.user(f"user{i}") for i in range(7)]
            convs = [await a.conversation(user, title=None) for user in users]
            for i, user in enumerate(users):
                await a.store.add_token(b"%d" % i, user.id, 2**50, "hash")
            holding = Holding(dict.fromkeys(convs, 1), [u.id for u in users], [b"%d" % i for i in range(7)])
            for _ in range(3):  # rows are given out for a while after their counter moved
                await b.store.changes(0, holding)
            assert await b.store.changes(0, holding) == Changes(0, [], [], [], [])
            for conv, user in zip(convs, users, strict=True):
                await a.store.append(message(conv, user))
            await a.store.set_notify(users[3].id, convs[3], "none")
            await a.store.revoke_token(b"5")
            await a.store.set_disabled("user6", True)
            heads, rows, tokens, revoked = set(), set(), set(), set()
            for _ in range(ROTATION_LOOKS):
                found = await b.store.changes(0, holding, everything=False)
                assert len(found.heads) <= 2, "a part of it"
                heads.update(found.heads)
                rows.update(found.rows)
                tokens.update(found.revoked_tokens)
                revoked.update(found.revoked_users)
            assert heads == {(conv, 2) for conv in convs}
            assert rows >= {(users[3].id, convs[3])}
            assert (tokens, revoked) == ({b"5", b"6"}, {users[6].id})
            everything = await b.store.changes(0, holding)
            assert set(everything.heads) == heads

    run(work())


def test_a_row_that_is_written_after_its_counter_moved_is_not_missed(database: Database) -> None:
    """A session that resumes is shown each row whose number is above its position."""

    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            alice = await a.user("alice")
            conv = await a.conversation(alice, title=None)
            other = await a.conversation(alice)
            holding = Holding(connected=[alice.id])
            await b.store.changes(0, holding)
            before = (await b.store.memberships(alice.id)).position
            members = MemberRows(a.store.mongo)
            async with members.row_write(alice.id) as rev:  # a change that stops here for a while
                for _ in range(20):
                    await b.store.set_notify(alice.id, other, "none")
                    await b.store.set_notify(alice.id, other, "all")
                mine = await b.store.memberships(alice.id)
                position, convs = mine.position, list(mine.revs)
                assert set(convs) == {conv, other}
                assert position == before < rev
                for _ in range(2):
                    assert (await b.store.changes(0, holding)).rows == [(alice.id, other)]
                await a.store.mongo["members"].update_one(
                    {"_id": f"{conv}:{alice.id}"}, {"$set": {"rev": rev, "role": "none"}}
                )
            assert set((await b.store.changes(0, holding)).rows) == {(alice.id, conv), (alice.id, other)}
            assert (await b.store.changes(0, holding)).rows == []
            assert (await b.store.memberships(alice.id, position)).left == [conv]
            after = (await b.store.memberships(alice.id)).position
            assert after == rev + 40, "it is exact when nothing moves"
            _, [view] = await b.store.views(alice.id)
            assert position < view.rev <= after

    run(work())


def test_who_dies_while_a_row_moves_is_forgiven(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 1) as [a]:
            alice = await a.user("alice")
            conv = await a.conversation(alice, title=None)
            before = (await a.store.memberships(alice.id)).position
            moving = MemberRows(a.store.mongo).row_write(alice.id)
            await moving.__aenter__()  # and no more of it
            await a.store.set_notify(alice.id, conv, "none")
            assert (await a.store.memberships(alice.id)).position == before
            users = a.store.mongo["users"]
            await users.update_one({"_id": alice.id}, {"$inc": {"at": -ROW_WRITE_MS - 1}})
            assert (await a.store.memberships(alice.id)).position == before + 2
            await a.store.set_notify(alice.id, conv, "all")
            assert (await a.store.memberships(alice.id)).position == before + 3

    run(work())


def test_what_one_sends_is_read_at_once_here_and_soon_elsewhere(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 2) as [a, b]:
            alice, bob = await a.user("alice"), await a.user("bob")
            conv = await a.conversation(alice, bob, title=None)
            for _ in range(3):
                mine = (await a.store.append(message(conv, alice))).seq
            for worker in (a, b):
                _, [view] = await worker.store.views(alice.id)
                assert (view.read, view.unread) == (mine, 0), "the newest is one's own"
            await b.store.append(message(conv, bob))
            _, [view] = await a.store.views(alice.id)
            assert (view.read, view.unread) == (mine, 1), "this worker knows what is not written yet"

            async def written() -> bool:
                _, [view] = await b.store.views(alice.id)
                return (view.read, view.unread) == (mine, 1)

            assert await b.until(written) < 8.0
            # A repetition does not move it back.
            for cid in ("again", "then", "again"):
                await a.store.append(message(conv, alice, cid=cid))
            await b.store.append(message(conv, bob))
            _, [view] = await a.store.views(alice.id)
            assert (view.read, view.unread) == (mine + 3, 1)

    run(work())


def test_more_marks_than_one_command_takes_are_all_written(database: Database) -> None:
    """FerretDB stands still for ever when a hundred updates come in one command."""

    async def work() -> None:
        async with workers(database, 1) as [a]:
            alice = await a.user("alice")
            convs = [await a.conversation(alice, title=None) for _ in range(45)]
            await asyncio.gather(*(a.store.append(message(conv, alice)) for conv in convs))
        async with workers(database, 1) as [b]:
            rows = await b.store.mongo["members"].find({"read": 2}).to_list()
            assert len(rows) == 45
        assert max(len(command["updates"]) for command in a.sent.of("update")) == UPDATES <= 20

    run(work())
