"""Appending: dense, once, in order, and only by users who may."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import msgspec
import orjson
import pytest

from chatcore.errors import Conflict, Forbidden, NotFound
from chatcore.store.base import Appended, Entry, Opening

from .harness import Opened, Place, change, message, run


def test_seqs_are_dense_and_in_the_order_of_the_calls(place: Place) -> None:
    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice, title=None)
        n = 1200 if isinstance(place, Path) else 350
        done = await asyncio.gather(*(o.store.append(message(conv, alice, str(i))) for i in range(n)))
        assert [d.seq for d in done] == list(range(2, n + 2))
        log = await o.log(conv)
        assert [e.seq for e in log] == list(range(1, n + 2))
        assert [orjson.loads(e.wire)["body"] for e in log[1:]] == [str(i) for i in range(n)]
        assert o.announced == log, "the entries announced after the commit are those in the log"

    run(place, work)


def test_a_cid_repeated_gets_the_first_result_and_stores_nothing(place: Place) -> None:
    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice)
        first = await o.store.append(message(conv, alice, "a", "same"))
        again = await o.store.append(message(conv, alice, "a", "same"))
        assert again == Appended(first.seq, first.ts, dup=True)
        # Twice in one batch, beside another.
        x, other, y = await asyncio.gather(
            o.store.append(message(conv, alice, "b", "twin")),
            o.store.append(message(conv, alice, "c")),
            o.store.append(message(conv, alice, "b", "twin")),
        )
        assert (y.seq, y.dup) == (x.seq, True)
        assert other.seq == x.seq + 1
        assert (await o.store.heads([conv]))[conv] == other.seq

    run(place, work)


def test_one_batch_of_many_conversations_repeats_and_refusals(place: Place) -> None:
    """However a batch is cut into statements: each gets its own outcome, and every log is dense."""

    async def work(o: Opened) -> None:
        alice, bob, eve = await o.user("alice"), await o.user("bob"), await o.user("eve")
        convs = [await o.conversation(alice, bob) for _ in range(7)]
        before = await o.store.heads(convs)
        sent = [message(convs[i % 7], (alice, bob)[i % 2], str(i), f"n{i}") for i in range(120)]
        batch = [*sent, *sent[40:70], *(message(conv, eve) for conv in convs), sent[0]]
        done = await asyncio.gather(*map(o.store.append, batch), return_exceptions=True)
        for i in range(120):
            assert isinstance(first := done[i], Appended)
            assert (first.seq, first.dup) == (before[convs[i % 7]] + i // 7 + 1, False)
        assert done[120:150] == [Appended(d.seq, d.ts, dup=True) for d in done[40:70] if isinstance(d, Appended)]
        assert all(isinstance(refused, NotFound) for refused in done[150:157])
        assert isinstance(done[157], Appended)
        assert done[157].dup
        for at, conv in enumerate(convs):
            log = await o.log(conv)
            assert [e.seq for e in log] == list(range(1, len(log) + 1))
            assert [orjson.loads(e.wire)["body"] for e in log[before[conv] :]] == [str(i) for i in range(at, 120, 7)]

    run(place, work)


def test_a_cid_for_something_else_is_a_conflict(place: Place) -> None:
    async def work(o: Opened) -> None:
        alice, bob = await o.user("alice"), await o.user("bob")
        conv = await o.conversation(alice, bob)
        await o.store.append(message(conv, alice, "a", "same"))
        head = (await o.store.heads([conv]))[conv]
        with pytest.raises(Conflict):
            await o.store.append(message(conv, alice, "b", "same"))
        twice = await asyncio.gather(
            o.store.append(message(conv, alice, "x", "twin")),
            o.store.append(message(conv, alice, "y", "twin")),
            return_exceptions=True,
        )
        assert isinstance(twice[0], Appended)
        assert isinstance(twice[1], Conflict)
        assert (await o.store.heads([conv]))[conv] == head + 1
        # A cid belongs to its sender: another's is another.
        assert not (await o.store.append(message(conv, bob, "b", "same"))).dup

    run(place, work)


def test_a_message_that_version_0_1_stored_may_be_repeated(tmp_path: Path) -> None:
    """Its digest was another: a client that had not got the `ok` before the upgrade got `conflict` after it."""

    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice)
        now = message(conv, alice, "a", "same")
        old = hashlib.blake2b(now.fields, digest_size=8).digest()
        first = await o.store.append(msgspec.structs.replace(now, digest=old))
        assert await o.store.append(now) == Appended(first.seq, first.ts, dup=True)
        with pytest.raises(Conflict):
            await o.store.append(message(conv, alice, "b", "same"))

    run(tmp_path, work)


def test_after_a_restart_a_cid_is_still_known(place: Place) -> None:
    async def first(o: Opened) -> tuple[object, str, Appended]:
        alice = await o.user("alice")
        conv = await o.conversation(alice)
        return alice, conv, await o.store.append(message(conv, alice, "a", "same"))

    alice, conv, done = run(place, first)

    async def second(o: Opened) -> Appended:
        return await o.store.append(message(conv, alice, "a", "same"))  # type: ignore[arg-type]

    assert run(place, second) == Appended(done.seq, done.ts, dup=True)


def test_who_is_removed_in_a_batch_cannot_write_later_in_it(place: Place) -> None:
    async def work(o: Opened) -> None:
        alice, bob = await o.user("alice"), await o.user("bob")
        conv = await o.conversation(alice, bob)
        before, removal, after = await asyncio.gather(
            o.store.append(message(conv, bob, "still here")),
            o.store.append(change(conv, alice, bob, "none")),
            o.store.append(message(conv, bob, "too late")),
            return_exceptions=True,
        )
        assert isinstance(before, Appended)
        assert isinstance(removal, Appended)
        assert isinstance(after, NotFound)
        assert (await o.log(conv))[-1].t == "member"

    run(place, work)


def test_a_refused_change_leaves_nothing_behind(place: Place) -> None:
    async def work(o: Opened) -> None:
        alice, bob, eve = await o.user("alice"), await o.user("bob"), await o.user("eve")
        conv = await o.conversation(alice, bob)
        log, position = await o.log(conv), await o.store.position()
        for refused in (
            change(conv, bob, alice, "none"),
            change(conv, bob, bob, "owner"),
            change(conv, eve, eve, "member"),
            message(conv, eve),
            message("no-such-conv", alice),
        ):
            with pytest.raises((Forbidden, NotFound)):
                await o.store.append(refused)
        assert await o.log(conv) == log
        assert await o.store.position() == position
        assert (await o.store.member_count(conv)) == 2

    run(place, work)


def test_opening_twice_is_one_conversation(place: Place) -> None:
    async def work(o: Opened) -> None:
        alice, bob = await o.user("alice"), await o.user("bob")
        group = Opening(alice.id, "cid", "group", "t", (bob.id,), b"12345678")
        first, again = await asyncio.gather(o.store.open(group), o.store.open(group))
        assert (first.conv, first.created, again.created) == (again.conv, True, False)
        with pytest.raises(Conflict):
            await o.store.open(Opening(alice.id, "cid", "group", "u", (bob.id,), b"87654321"))
        # A dm is known by its two users, whichever of them opens it.
        one = await o.store.open(Opening(alice.id, "x", "dm", None, (bob.id,), b"12345678"))
        other = await o.store.open(Opening(bob.id, "y", "dm", None, (alice.id,), b"12345678"))
        assert (one.conv, one.created, other.created) == (other.conv, True, False)
        assert [e.t for e in await o.log(one.conv)] == ["member", "member"]

    run(place, work)


@pytest.mark.parametrize("kind", ["dm", "group", "channel"])
def test_the_cid_of_a_dm_made_before_is_a_conflict(place: Place, kind: str) -> None:
    """The id of a dm comes from its two users, so its cid was forgotten: another dm of the same cid was opened."""

    async def work(o: Opened) -> None:
        alice, bob, carol = await o.user("alice"), await o.user("bob"), await o.user("carol")
        first = Opening(alice.id, "cid", "dm", None, (bob.id,), b"with bob")
        others = {"dm": (carol.id,), "group": (bob.id,), "channel": ()}[kind]
        other = Opening(alice.id, "cid", kind, None if kind == "dm" else "t", others, b"anything")
        made = await o.store.open(first)
        with pytest.raises(Conflict):
            await o.store.open(other)
        assert not (await o.store.open(first)).created
        # Another user's cid is another one, and so is the next.
        assert (await o.store.open(Opening(bob.id, "cid", "dm", None, (carol.id,), b"anything"))).conv != made.conv
        assert (await o.store.open(msgspec.structs.replace(other, cid="next"))).created
        # Nothing shows of what is remembered.
        [(view)] = [v for v in (await o.store.views(bob.id))[1] if v.with_id == alice.id]
        assert view.conv == made.conv

    run(place, work)


def test_the_cid_of_a_group_is_a_conflict_for_a_dm(place: Place) -> None:
    async def work(o: Opened) -> None:
        alice, bob = await o.user("alice"), await o.user("bob")
        await o.store.open(Opening(alice.id, "cid", "group", "t", (), b"as group"))
        with pytest.raises(Conflict):
            await o.store.open(Opening(alice.id, "cid", "dm", None, (bob.id,), b"as a dm."))
        assert (await o.store.views(bob.id))[1] == []

    run(place, work)


def _member_entries(log: list[Entry]) -> list[tuple[str, str, str]]:
    """User, role and role before of each."""
    fields = [orjson.loads(e.wire) for e in log if e.t == "member"]
    return [(f["user"], f["role"], f["was"]) for f in fields]


def test_a_member_entry_has_the_role_before(place: Place) -> None:
    async def work(o: Opened) -> None:
        alice, bob, eve = await o.user("alice"), await o.user("bob"), await o.user("eve")
        conv = await o.conversation(alice, bob)
        steps = [(bob, "admin"), (eve, "banned"), (eve, "member"), (bob, "member"), (bob, "none"), (bob, "member")]
        # At once: each is completed by what the one before it left behind.
        done = await asyncio.gather(*(o.store.append(change(conv, alice, user, role)) for user, role in steps))
        assert all(d.seq for d in done)
        assert _member_entries(await o.log(conv)) == [
            (alice.id, "owner", "none"),
            (bob.id, "member", "none"),
            (bob.id, "admin", "member"),
            (eve.id, "banned", "none"),
            (eve.id, "member", "banned"),
            (bob.id, "member", "admin"),
            (bob.id, "none", "member"),
            (bob.id, "member", "none"),
        ]
        # In a channel, where coming and going makes no entry, it is the role in the row.
        channel = await o.conversation(alice, kind="channel")
        await o.store.append(change(channel, bob, bob, "member"))
        await o.store.append(change(channel, alice, bob, "none"))
        assert _member_entries(await o.log(channel))[1:] == [(bob.id, "none", "member")]

    run(place, work)


def test_the_role_before_is_no_part_of_what_makes_two_requests_the_same(place: Place) -> None:
    """A change that is repeated comes to another head, and is found by the hash of what was asked for."""

    async def work(o: Opened) -> None:
        alice, bob = await o.user("alice"), await o.user("bob")
        conv = await o.conversation(alice, bob)
        asked = change(conv, alice, bob, "banned")
        first = await o.store.append(asked)
        await o.store.append(change(conv, alice, bob, "none"))
        assert await o.store.append(asked) == Appended(first.seq, first.ts, dup=True)
        with pytest.raises(Conflict):
            await o.store.append(msgspec.structs.replace(change(conv, alice, bob, "admin"), cid=asked.cid))

    run(place, work)


@pytest.mark.parametrize("role", ["none", "member"])
def test_lifting_the_ban_of_a_channel_makes_no_member(place: Place, role: str) -> None:
    async def work(o: Opened) -> None:
        alice, bob = await o.user("alice"), await o.user("bob")
        conv = await o.conversation(alice, kind="channel")
        await o.store.append(change(conv, alice, bob, "banned"))
        assert (await o.store.append(change(conv, alice, bob, role))).seq == 4
        assert _member_entries(await o.log(conv))[-1] == (bob.id, "none", "banned")
        assert (await o.store.role(bob.id, conv), await o.store.member_count(conv)) == ("none", 1)
        await o.store.append(change(conv, bob, bob, "member"))
        assert await o.store.role(bob.id, conv) == "member"

    run(place, work)


def test_the_ban_of_a_group_is_lifted_by_an_invitation(place: Place) -> None:
    async def work(o: Opened) -> None:
        alice, bob, eve = await o.user("alice"), await o.user("bob"), await o.user("eve")
        conv = await o.conversation(alice, bob, eve)
        await o.store.append(change(conv, alice, bob, "banned"))
        with pytest.raises(Forbidden):
            await o.store.append(change(conv, eve, bob, "member"))
        await o.store.append(change(conv, alice, bob, "member"))
        await o.store.append(message(conv, bob))

    run(place, work)


def test_who_joins_a_channel_that_everybody_left_owns_it(place: Place) -> None:
    async def work(o: Opened) -> None:
        alice, bob = await o.user("alice"), await o.user("bob")
        conv = await o.conversation(alice, kind="channel")
        await o.store.append(change(conv, alice, alice, "none"))
        await o.store.append(change(conv, bob, bob, "member"))
        await o.store.append(change(conv, alice, alice, "member"))
        assert (await o.store.role(bob.id, conv), await o.store.role(alice.id, conv)) == ("owner", "member")

    run(place, work)


def test_joining_a_channel_is_the_row_alone(place: Place) -> None:
    async def work(o: Opened) -> None:
        alice, bob = await o.user("alice"), await o.user("bob")
        conv = await o.conversation(alice, kind="channel")
        log = await o.log(conv)
        assert (await o.store.append(change(conv, bob, bob, "member"))).seq == 0
        assert await o.store.member_count(conv) == 2
        await o.store.append(message(conv, bob))
        assert (await o.store.append(change(conv, bob, bob, "none"))).seq == 0
        assert len(await o.log(conv)) == len(log) + 1
        with pytest.raises(NotFound):
            await o.store.append(message(conv, bob))
        await o.store.append(change(conv, bob, bob, "member"))
        assert (await o.store.append(change(conv, alice, bob, "banned"))).seq > 0
        with pytest.raises(Forbidden):
            await o.store.append(change(conv, bob, bob, "member"))

    run(place, work)


def test_blocked_users_cannot_send_or_open_a_dm(place: Place) -> None:
    async def work(o: Opened) -> None:
        alice, bob, eve = await o.user("alice"), await o.user("bob"), await o.user("eve")
        conv = await o.conversation(alice, bob, kind="dm", title=None)
        await o.store.block(bob.id, alice.id, True)
        with pytest.raises(Forbidden):
            await o.store.append(message(conv, alice))
        await o.store.append(message(conv, bob))
        await o.store.block(eve.id, alice.id, True)
        with pytest.raises(Forbidden):
            await o.conversation(alice, eve, kind="dm", title=None)
        await o.store.block(bob.id, alice.id, False)
        await o.store.append(message(conv, alice))

    run(place, work)


@pytest.mark.parametrize("body", ["", "\0", '"\\', "\u2028", "😀" * 100, "a" * 8192])
def test_what_was_sent_comes_back_as_it_was(place: Place, body: str) -> None:
    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice)
        await o.store.append(message(conv, alice, body))
        assert orjson.loads((await o.log(conv))[-1].wire)["body"] == body
        assert (await o.log(conv))[-1].wire == o.announced[-1].wire

    run(place, work)
