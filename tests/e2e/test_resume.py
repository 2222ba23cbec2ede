"""Coming back: exactly the rest, in order, then live, from any worker."""

from __future__ import annotations

import asyncio

import pytest

from .client import Client
from .conftest import Serve
from .world import User, World, new_cid


async def _leave(client: Client, conv: str) -> tuple[dict[str, int], str]:
    """Hang up; what one holds, and the `sync` of the last `ready`."""
    sync = client.got(t="ready")[-1]["sync"]
    have = {conv: client.seqs(conv)[-1]}
    await client.close()
    return have, sync


def sent(client: Client) -> dict[str, dict[str, object]]:
    """The `conv` that the log-in itself sent, by conversation in order.

    Changes from just before may be pushed once more to a session that knows them already, but only the
    log-in says where a conversation is attached.
    """
    views = client.got(t="conv", after=...)
    assert len({view["c"] for view in views}) == len(views)
    return {view["c"]: view for view in views}


async def _start(world: World) -> tuple[Client, User, Client, str]:
    """A sender, and a user who has joined, received messages, and is about to leave."""
    _, a = await world.pair("alice", on=0)
    bob = await world.user("bob")
    conv = await world.group(a, bob)
    head = await world.fill(a, conv, 3)
    b = await world.connect(bob)
    assert (await b.expect(t="conv", c=conv))["after"] == head
    await b.reach(conv, (await world.send(a, conv))["s"])
    return a, bob, b, conv


@pytest.mark.parametrize("slot", [0, 1])
async def test_with_have_one_gets_exactly_the_rest_and_then_what_is_live(world: World, slot: int) -> None:
    a, bob, b, conv = await _start(world)
    have, sync = await _leave(b, conv)
    head = await world.fill(a, conv, 30)
    b = await world.open(on=slot)
    reply = await b.request("auth", v=1, token=bob.token, sync=sync, have=have)
    assert reply["full"] is False
    view = await b.expect(t="conv", c=conv)
    assert (view["head"], view["after"]) == (head, have[conv])
    await b.expect(t="ready", sync=...)
    assert b.seqs(conv) == list(range(have[conv] + 1, head + 1)), "all of it before ready"
    last = await world.fill(a, conv, 3)
    assert await b.reach(conv, last) == (await world.whole_log(a, conv))[have[conv] :]


async def test_nothing_is_missed_or_repeated_while_others_go_on_sending(world: World) -> None:
    a, bob, b, conv = await _start(world)
    have, sync = await _leave(b, conv)
    held = have[conv]
    head = held
    for round in range(6):
        futures = [await a.begin("send", c=conv, cid=new_cid(), body=f"{round} {i}") for i in range(20)]
        b = await world.connect(bob, on=round % 2, sync=sync, have={conv: held}, ready=False)
        head = max([(await a.answer(future))["s"] for future in futures])
        await b.expect(t="ready")
        seqs = [entry["s"] for entry in await b.reach(conv, head - (10 if round % 2 else 0))]
        assert seqs == list(range(held + 1, held + 1 + len(seqs)))
        held = seqs[-1]
        sync = b.got(t="ready")[0]["sync"]
        await b.close()
    b = await world.connect(bob, sync=sync, have={conv: held})
    if held < head:
        await b.reach(conv, head)
    assert b.seqs(conv) == list(range(held + 1, head + 1))


async def test_after_a_last_message_nobody_was_attached_to_hear_it_comes_on_return(world: World) -> None:
    a, bob, b, conv = await _start(world)
    have, sync = await _leave(b, conv)
    last = (await world.send(a, conv, "the last before a silence"))["s"]
    await a.close()
    b = await world.connect(bob, sync=sync, have=have)
    assert b.seqs(conv) == [last]


async def test_with_nothing_new_there_is_no_conv_and_it_is_live(world: World) -> None:
    a, bob, b, conv = await _start(world)
    have, _ = await _leave(b, conv)
    b = await world.connect(bob)  # its `sync` stands for the last message too
    sync = b.got(t="ready")[0]["sync"]
    await b.close()
    b = await world.connect(bob, sync=sync, have=have)
    assert sent(b) == {}
    assert b.log(conv) == []
    last = (await world.send(a, conv))["s"]
    await b.reach(conv, last)
    assert b.seqs(conv) == [last]


async def test_only_conversations_that_changed_are_sent_newest_first(world: World) -> None:
    _, a = await world.pair(on=0)
    bob = await world.user("bob")
    convs = [await world.group(a, bob, title=f"t{i}") for i in range(4)]
    heads = [(await world.send(a, conv))["s"] for conv in convs]
    b = await world.connect(bob)
    assert list(sent(b)) == convs[::-1]
    sync = b.got(t="ready")[0]["sync"]
    await b.close()
    for i in (2, 0):
        await world.send(a, convs[i])
    b = await world.connect(bob, sync=sync, have=dict(zip(convs, heads, strict=True)))
    assert list(sent(b)) == [convs[0], convs[2]]
    for i, conv in enumerate(convs):
        assert b.seqs(conv) == ([heads[i] + 1] if i in (0, 2) else [])
    # The others are attached as well.
    await world.send(a, convs[1])
    await b.reach(convs[1], heads[1] + 1)


async def test_what_changed_without_an_entry_is_sent_too(world: World) -> None:
    _a, bob, b, conv = await _start(world)
    have, sync = await _leave(b, conv)
    other = await world.connect(bob)
    await other.request("read", c=conv, upto=have[conv])
    await other.request("notify", c=conv, level="none")
    b = await world.connect(bob, sync=sync, have=have)
    view = sent(b)[conv]
    assert (view["notify"], view["read"], view["unread"]) == ("none", have[conv], 0)
    assert b.seqs(conv) == []


async def test_a_conversation_one_was_added_to_meanwhile_is_sent(world: World) -> None:
    a, bob, b, conv = await _start(world)
    have, sync = await _leave(b, conv)
    new = await world.group(a, bob, title="new")
    head = (await world.send(a, new))["s"]
    b = await world.connect(bob, sync=sync, have=have)
    view = sent(b)[new]
    assert (view["title"], view["head"], view["after"], view["unread"]) == ("new", head, head, 1)


@pytest.mark.parametrize("role", ["none", "banned"])
async def test_a_conversation_one_was_removed_from_meanwhile_is_told_with_role_none(world: World, role: str) -> None:
    a, bob, b, conv = await _start(world)
    kept = await world.group(a, bob)
    have, sync = await _leave(b, conv)
    await a.request("member", c=conv, user=bob.id, role=role)
    await world.send(a, conv, "not for him")
    b = await world.connect(bob, sync=sync, have={**have, kept: 0})
    assert b.got(t="conv", c=conv)[0] == {"t": "conv", "c": conv, "role": "none"}
    assert conv not in sent(b)
    assert b.log(conv) == []
    # Without a sync there is nothing to forget piece by piece: what is not sent is over.
    b = await world.connect(bob)
    assert list(sent(b)) == [kept]


async def test_a_channel_left_on_another_device_is_told_with_role_none(world: World) -> None:
    _, a = await world.pair()
    bob, b = await world.pair()
    conv = await world.channel(a)
    await b.request("member", c=conv, user=bob.id, role="member")
    await b.expect(t="conv", c=conv)
    await b.reach(conv, (await world.send(a, conv))["s"])
    # The `sync` of `ready` is older than that; a later one comes with `ping`.
    have, sync = await _leave(b, conv)
    other = await world.connect(bob)
    await other.request("member", c=conv, user=bob.id, role="none")
    b = await world.connect(bob, sync=sync, have=have)
    assert b.got(t="conv", c=conv)[0] == {"t": "conv", "c": conv, "role": "none"}
    assert conv not in sent(b)


@pytest.mark.parametrize("sync", ["", "x", "a.b.c", "OTHER", "FUTURE", "..", "x" * 2000])
async def test_without_a_sync_that_is_known_for_the_user_everything_is_sent_in_full(world: World, sync: str) -> None:
    a, bob, b, conv = await _start(world)
    have, mine = await _leave(b, conv)
    if sync == "OTHER":
        sync = a.got(t="ready")[0]["sync"]  # of another user
    elif sync == "FUTURE":
        sync = mine.rpartition(".")[0] + ".999999999"
    head = (await world.send(a, conv))["s"]
    b = await world.open()
    reply = await b.request("auth", v=1, token=bob.token, sync=sync, have=have)
    assert reply["full"] is True
    view = await b.expect(t="conv", c=conv)
    await b.expect(t="ready")
    assert view["after"] == head, "have is ignored"
    assert b.log(conv) == []


async def test_without_any_sync_have_is_ignored_and_it_is_full(world: World) -> None:
    a, bob, b, conv = await _start(world)
    have, _ = await _leave(b, conv)
    head = (await world.send(a, conv))["s"]
    b = await world.connect(bob, have=have)
    assert b.got(t="ok")[0]["full"] is True
    assert sent(b)[conv]["after"] == head


async def test_the_sync_of_a_ping_stands_for_what_was_sent_before_it(world: World) -> None:
    a, bob, b, conv = await _start(world)
    new = await world.group(a, bob)
    await b.expect(t="conv", c=new)
    await b.reach(conv, (await world.send(a, conv))["s"])
    first = b.got(t="ready")[0]["sync"]

    async def moved() -> str | None:
        sync = (await b.request("ping"))["sync"]
        return sync if sync != first else None

    sync = await moved()
    for _ in range(20):  # it may lag; an older one only brings more
        if sync is not None:
            break
        await b.expect(t="msg", c=conv, s=(await world.send(a, conv))["s"])
        sync = await moved()
    sync = sync or first
    have = {conv: b.seqs(conv)[-1], new: max([b.after(new), *b.seqs(new)])}
    await b.close()
    last = (await world.send(a, conv))["s"]
    b = await world.connect(bob, sync=sync, have=have)
    assert b.got(t="ok")[0]["full"] is False
    assert b.seqs(conv) == list(range(have[conv] + 1, last + 1))
    assert b.seqs(new) == []


async def test_who_is_too_far_behind_is_told_so_and_pages_through_history(tight: World) -> None:
    a, bob, b, conv = await _start(tight)
    have, sync = await _leave(b, conv)
    head = await tight.fill(a, conv, 21)
    b = await tight.connect(bob, sync=sync, have=have)
    view = sent(b)[conv]
    assert (view["after"], view["head"]) == (head, head)
    assert b.log(conv) == []
    last = (await tight.send(a, conv))["s"]
    await b.reach(conv, last)
    seqs: list[int] = []
    while True:
        page = await b.request("history", c=conv, after=seqs[-1] if seqs else have[conv], limit=10)
        seqs += [entry["s"] for entry in page["entries"]]
        if not page["more"]:
            break
    assert seqs == list(range(have[conv] + 1, last + 1))


async def test_a_backlog_of_exactly_the_limit_is_replayed(tight: World) -> None:
    a, bob, b, conv = await _start(tight)
    have, sync = await _leave(b, conv)
    head = await tight.fill(a, conv, 20)
    b = await tight.connect(bob, sync=sync, have=have)
    assert sent(b)[conv]["after"] == have[conv]
    assert b.seqs(conv) == list(range(have[conv] + 1, head + 1))


async def test_a_have_beyond_the_head_is_not_believed(world: World) -> None:
    a, bob, b, conv = await _start(world)
    have, sync = await _leave(b, conv)
    b = await world.connect(bob, sync=sync, have={conv: have[conv] + 1000})
    assert sent(b)[conv]["after"] == have[conv]
    last = (await world.send(a, conv))["s"]
    await b.reach(conv, last)
    assert b.seqs(conv) == [last]


async def test_a_have_of_conversations_one_is_not_in_tells_nothing_about_them(world: World) -> None:
    a, bob, b, conv = await _start(world)
    have, sync = await _leave(b, conv)
    secret = await world.group(a)
    await world.send(a, secret)
    b = await world.connect(bob, sync=sync, have={**have, secret: 0, "no-such-conv": 5})
    assert {m.get("c") for m in b.received} <= {None, conv}


async def test_sync_and_have_outlive_a_restart(serve: Serve) -> None:
    server = serve()
    world = World(server)
    try:
        a, bob, b, conv = await _start(world)
        quiet = await world.group(a, bob)
        await b.expect(t="conv", c=quiet)
        b = await world.connect(bob)
        sync = b.got(t="ready")[0]["sync"]
        have = {conv: sent(b)[conv]["head"], quiet: sent(b)[quiet]["head"]}
        await b.close()
        last = await world.fill(a, conv, 5)
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.start)
        b = await world.connect(bob, sync=sync, have=have)
        assert b.got(t="ok")[0]["full"] is False
        assert list(sent(b)) == [conv]
        assert b.seqs(conv) == list(range(have[conv] + 1, last + 1))
    finally:
        await world.aclose()
