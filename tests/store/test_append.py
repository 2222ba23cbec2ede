"""Appending: dense, once, in order, and only by who may."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import msgspec
import orjson
import pytest

from chatcore.errors import Conflict, Forbidden, NotFound
from chatcore.store.base import Appended, Opening

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
        assert o.told == log, "what is told after the commit is what is in the log"

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
    """Its digest was another: who had not heard the `ok` before the upgrade was told `conflict` after it."""

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
        # A dm is known by its two users, whoever opens it.
        one = await o.store.open(Opening(alice.id, "x", "dm", None, (bob.id,), b"12345678"))
        other = await o.store.open(Opening(bob.id, "y", "dm", None, (alice.id,), b"12345678"))
        assert (one.conv, one.created, other.created) == (other.conv, True, False)
        assert [e.t for e in await o.log(one.conv)] == ["member", "member"]

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
        assert (await o.log(conv))[-1].wire == o.told[-1].wire

    run(place, work)
