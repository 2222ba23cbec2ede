"""Attached conversations: `only`, being away, and the request `attach`."""

from __future__ import annotations

from .client import Client
from .world import User, World


async def _two(world: World) -> tuple[Client, User, str, str]:
    _, a = await world.pair("alice", on=0)
    bob = await world.user("bob")
    one, two = await world.group(a, bob, title="one"), await world.group(a, bob, title="two")
    for conv in (one, two):
        await world.send(a, conv)
    return a, bob, one, two


async def test_only_the_chosen_are_attached_and_the_others_push_merged_convs(world: World) -> None:
    a, bob, one, two = await _two(world)
    b = await world.connect(bob, on=1, only=[one])
    views = {view["c"]: view for view in b.got(t="conv")}
    assert "after" in views[one]
    assert "after" not in views[two]
    head = await world.fill(a, two, 10)
    await a.request("typing", c=two)
    last = (await world.send(a, one))["s"]
    await b.reach(one, last)
    # One `conv` or few stand for the ten messages.
    view = await b.expect(t="conv", c=two, head=head)
    assert view["unread"] == 11
    assert view["last"]["s"] == head
    assert len(b.got(t="conv", c=two)) <= 4
    assert b.log(two) == []
    assert not b.got(t="typing", c=two)


async def test_away_means_no_entries_at_all_and_merged_convs(world: World) -> None:
    a, bob, one, two = await _two(world)
    b = await world.connect(bob, on=1, only=[])
    assert all("after" not in view for view in b.got(t="conv"))
    heads = {conv: await world.fill(a, conv, 5) for conv in (one, two)}
    for conv, head in heads.items():
        await b.expect(t="conv", c=conv, head=head, unread=6)
        assert b.log(conv) == []


async def test_away_resumes_with_sync_and_is_told_what_changed(world: World) -> None:
    a, bob, one, _ = await _two(world)
    b = await world.connect(bob, only=[])
    sync = b.got(t="ready")[0]["sync"]
    await b.close()
    head = (await world.send(a, one))["s"]
    b = await world.connect(bob, sync=sync, only=[])
    view = b.got(t="conv", c=one)[0]
    assert view["head"] == head
    assert "after" not in view


async def test_attach_replaces_the_choice(world: World) -> None:
    a, bob, one, two = await _two(world)
    b = await world.connect(bob, on=1, only=[one])
    b.forget()
    await b.request("attach", only=[two])
    view = await b.expect(t="conv", c=two, after=...)
    head = (await world.send(a, two))["s"]
    assert view["after"] == head - 1
    await b.reach(two, head)
    before = len(b.log(one))
    unseen = (await world.send(a, one))["s"]
    await b.expect(t="conv", c=one, head=unseen)
    assert len(b.log(one)) == before


async def test_attach_with_have_gives_the_rest(world: World) -> None:
    a, bob, one, two = await _two(world)
    b = await world.connect(bob, on=1, only=[])
    head = await world.fill(a, one, 5)
    b.forget()
    await b.request("attach", only=[one], have={one: head - 3})
    assert (await b.expect(t="conv", c=one, after=...))["after"] == head - 3
    last = (await world.send(a, one))["s"]
    await b.reach(one, last)
    assert b.seqs(one) == list(range(head - 2, last + 1))
    assert b.log(two) == []


async def test_attach_without_only_attaches_all(world: World) -> None:
    a, bob, one, two = await _two(world)
    b = await world.connect(bob, on=1, only=[])
    b.forget()
    await b.request("attach")
    for conv in (one, two):
        await b.expect(t="conv", c=conv, after=...)
        last = (await world.send(a, conv))["s"]
        await b.reach(conv, last)
        assert b.seqs(conv) == [last]


async def test_attach_with_only_have_adds_to_what_is_held_and_keeps_the_choice(world: World) -> None:
    a, bob, one, two = await _two(world)
    b = await world.connect(bob, on=1, only=[one])
    head = await world.fill(a, one, 5)
    await b.reach(one, head)
    b.forget()
    await b.request("attach", have={one: head - 2})
    assert (await b.expect(t="conv", c=one, after=...))["after"] == head - 2
    last = (await world.send(a, one))["s"]
    await b.until(lambda: b.seqs(one)[-1] == last, "the live one")
    assert b.seqs(one)[-3:] == [head - 1, head, last]
    await world.send(a, two)
    assert b.log(two) == []


async def test_the_ok_of_attach_comes_before_its_convs(world: World) -> None:
    _a, bob, one, two = await _two(world)
    b = await world.connect(bob, only=[])
    before = len(b.received)
    await b.request("attach", only=[one, two])
    await b.until(lambda: len([m for m in b.received[before:] if m["t"] == "conv"]) == 2, "two convs")
    assert next(m["t"] for m in b.received[before:]) == "ok"


async def test_a_conversation_one_is_added_to_is_attached_only_if_it_was_chosen(world: World) -> None:
    a, bob, one, _ = await _two(world)
    all_of_it = await world.connect(bob, on=0)
    chosen = await world.connect(bob, on=1, only=[one])
    new = await world.group(a, bob, title="new")
    head = (await world.send(a, new))["s"]
    await all_of_it.reach(new, head)
    assert all_of_it.seqs(new) == list(range(all_of_it.after(new) + 1, head + 1))
    await chosen.until(lambda: chosen.got(t="conv", c=new, head=head), "a conv with the new head")
    assert not chosen.got(t="conv", c=new, after=...)
    assert chosen.log(new) == []


async def test_too_much_in_attach_is_too_large_and_changes_nothing(tight: World) -> None:
    a, bob, one, two = await _two(tight)
    b = await tight.connect(bob, on=1, only=[one])
    await b.refused("too_large", "attach", only=["a", "b", "c", "d"])
    await b.refused("too_large", "attach", have={f"c{i}": 0 for i in range(6)})
    await b.refused("bad_request", "attach", only=two)
    await tight.send(a, two)
    last = (await tight.send(a, one))["s"]
    await b.reach(one, last)
    assert b.log(two) == []
