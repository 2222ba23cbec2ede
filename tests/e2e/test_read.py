"""Read marks, unread counts, and typing."""

from __future__ import annotations

import pytest

from .client import Client
from .world import User, World, new_cid


async def _pair(world: World) -> tuple[Client, User, Client, str]:
    _, a = await world.pair("alice", on=0)
    bob, b = await world.pair("bob", on=1)
    conv = await world.group(a, bob)
    await b.expect(t="conv", c=conv)
    return a, bob, b, conv


async def _view(world: World, user: User, conv: str) -> dict[str, object]:
    """The `conv` of a conversation for a user who connects now."""
    client = await world.connect(user)
    view = await client.expect(t="conv", c=conv)
    await client.close()
    return view


async def test_unread_counts_the_others_messages_from_the_mark_to_the_head(world: World) -> None:
    a, bob, b, conv = await _pair(world)
    head = await world.fill(a, conv, 5)
    view = await _view(world, bob, conv)
    assert (view["unread"], view["head"], view["mentions"]) == (5, head, 0)
    assert view["last"]["s"] == head
    assert view["last"]["t"] == "msg"
    await b.request("read", c=conv, upto=head - 2)
    view = await _view(world, bob, conv)
    assert (view["unread"], view["read"]) == (2, head - 2)
    await b.request("read", c=conv, upto=head)
    assert (await _view(world, bob, conv))["unread"] == 0


async def test_unread_does_not_count_what_is_no_message(world: World) -> None:
    a, bob, _, conv = await _pair(world)
    await world.send(a, conv)
    await a.request("meta", c=conv, title="new title", cid=new_cid())
    view = await _view(world, bob, conv)
    assert view["unread"] == 1
    assert view["last"]["s"] == view["head"] - 1


async def test_sending_moves_the_senders_mark(world: World) -> None:
    a, bob, b, conv = await _pair(world)
    await world.fill(a, conv, 3)
    mine = (await world.send(b, conv, "I saw all that"))["s"]
    view = await _view(world, bob, conv)
    assert (view["unread"], view["read"]) == (0, mine)


async def test_a_mark_never_moves_back(world: World) -> None:
    a, bob, b, conv = await _pair(world)
    head = await world.fill(a, conv, 3)
    await b.request("read", c=conv, upto=head)
    await b.request("read", c=conv, upto=head - 1)
    await b.request("read", c=conv, upto=0)
    assert (await _view(world, bob, conv))["read"] == head


async def test_a_mark_beyond_the_head_is_refused(world: World) -> None:
    a, bob, b, conv = await _pair(world)
    head = await world.fill(a, conv, 1)
    before = (await _view(world, bob, conv))["read"]
    await b.refused("not_found", "read", c=conv, upto=head + 1)
    assert (await _view(world, bob, conv))["read"] == before


async def test_ones_other_devices_are_told_that_the_mark_moved(world: World) -> None:
    a, bob, b, conv = await _pair(world)
    b0, b1 = await world.both_workers(bob)
    head = await world.fill(a, conv, 4)
    await b.request("read", c=conv, upto=head - 1)
    for client in (b0, b1):
        view = await client.expect(t="conv", c=conv, read=head - 1)
        assert view["unread"] == 1


async def test_the_others_see_the_mark_on_every_worker(world: World) -> None:
    alice, a0 = await world.pair(on=0)
    a1 = await world.connect(alice, on=1)
    bob, b = await world.pair(on=1)
    conv = await world.group(a0, bob)
    await b.expect(t="conv", c=conv)
    await a1.expect(t="conv", c=conv)
    head = await world.fill(a0, conv, 2)
    for upto in (head - 1, head):
        await b.request("read", c=conv, upto=upto)
        for client in (a0, a1):
            assert await client.expect(t="read", c=conv) == {"t": "read", "c": conv, "user": bob.id, "upto": upto}
    assert not b.got(t="read", c=conv)


async def test_marks_and_typing_are_told_in_small_conversations_only(tight: World) -> None:
    _, a = await tight.pair(on=0)
    bob, b = await tight.pair(on=1)
    carol, dave = await tight.user(), await tight.user()
    small = await tight.group(a, bob, carol)
    large = await tight.group(a, bob, carol, dave)
    for conv in (small, large):
        await b.expect(t="conv", c=conv)
        await tight.send(a, conv)
    for conv in (large, small):
        await b.reach(conv, len(await tight.whole_log(a, conv)))
        await b.request("read", c=conv, upto=b.seqs(conv)[-1])
        await b.request("typing", c=conv)
    # Pushed in this order over one way: pushes of the large one would have come before.
    await a.expect(t="typing", c=small)
    await a.expect(t="read", c=small)
    assert not a.got(t="read", c=large)
    assert not a.got(t="typing", c=large)


async def test_typing_is_told_to_the_others_on_every_worker_and_not_to_oneself(world: World) -> None:
    alice, a0 = await world.pair(on=0)
    a1 = await world.connect(alice, on=1)
    bob = await world.user()
    b0, b1 = await world.both_workers(bob)
    conv = await world.group(a0, bob)
    for client in (a1, b0, b1):
        await client.expect(t="conv", c=conv)
    await b0.request("typing", c=conv)
    for client in (a0, a1):
        assert await client.expect(t="typing") == {"t": "typing", "c": conv, "user": bob.id}
    seq = (await world.send(b0, conv))["s"]
    for client in (b0, b1):
        await client.reach(conv, seq)
        assert not client.got(t="typing")


async def test_typing_too_often_is_rate_limited_for_each_conversation(world: World) -> None:
    a, bob, _, conv = await _pair(world)
    other = await world.group(a, bob)
    await a.request("typing", c=conv)
    reply = await a.refused("rate_limited", "typing", c=conv)
    assert 0 < reply["retry_after_ms"] <= 3000
    await a.request("typing", c=other)


@pytest.mark.parametrize("upto", [-1, 2**53, "1", None, 1.5])
async def test_a_mark_that_is_no_seq_is_a_bad_request(world: World, upto: object) -> None:
    _, _, b, conv = await _pair(world)
    await b.refused("bad_request", "read", c=conv, upto=upto)
