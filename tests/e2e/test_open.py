"""`open`: dms, groups and channels are made once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from .world import World, new_cid


async def test_a_group_is_told_to_all_its_members_on_every_worker(world: World) -> None:
    alice, a = await world.pair(on=0)
    bob = await world.user("bob")
    b0, b1 = await world.both_workers(bob)
    reply = await a.request("open", kind="group", cid=new_cid(), title="Tea", members=[bob.id])
    conv = reply["c"]
    mine = await a.expect(t="conv", c=conv)
    assert mine | {"head": 0, "read": 0, "unread": 0} == {
        "t": "conv",
        "c": conv,
        "kind": "group",
        "title": "Tea",
        "role": "owner",
        "members": 2,
        "notify": "all",
        "head": 0,
        "read": 0,
        "unread": 0,
        "mentions": 0,
        "after": 0,
    }
    head = mine["head"]
    for client in (b0, b1):
        theirs = await client.expect(t="conv", c=conv)
        assert theirs["role"] == "member"
        assert theirs["title"] == "Tea"
        assert await client.reach(conv, head) == (await a.reach(conv, head))[client.after(conv) :]
    added = {entry["user"]: entry["role"] for entry in a.log(conv) if entry["t"] == "member"}
    assert added == {alice.id: "owner", bob.id: "member"}


async def test_the_conv_comes_before_the_ok(world: World) -> None:
    _, a = await world.pair()
    bob = await world.user()
    for kind, fields in (("group", {"title": "x"}), ("channel", {"title": "y"}), ("dm", {"members": [bob.id]})):
        before = len(a.received)
        conv = (await a.request("open", kind=kind, cid=new_cid(), **fields))["c"]
        types = [m["t"] for m in a.received[before:] if m["t"] == "ok" or (m["t"] == "conv" and m["c"] == conv)]
        assert types[0] == "conv"


async def test_a_group_may_have_no_title_and_no_other_member(world: World) -> None:
    _, a = await world.pair()
    conv = await world.group(a, title=None)
    view = await a.expect(t="conv", c=conv)
    assert view["members"] == 1
    assert not view.get("title")


async def test_opening_again_with_the_same_cid_gives_the_same_conversation_from_any_worker(world: World) -> None:
    alice = await world.user()
    a0, a1 = await world.both_workers(alice)
    bob = await world.user()
    request: dict[str, Any] = {"kind": "group", "cid": new_cid(), "title": "One", "members": [bob.id]}
    futures = [await client.begin("open", **request) for client in (a0, a1)]
    replies = [await client.answer(future) for client, future in zip((a0, a1), futures, strict=True)]
    replies.append(await a1.request("open", **request))
    assert len({reply["c"] for reply in replies}) == 1
    assert len(await world.whole_log(a0, replies[0]["c"])) == len(await world.whole_log(a1, replies[0]["c"]))
    members = [entry["user"] for entry in await world.whole_log(a0, replies[0]["c"]) if entry["t"] == "member"]
    assert sorted(members) == sorted([alice.id, bob.id])


async def test_the_cid_of_another_opening_is_a_conflict(world: World) -> None:
    _, a = await world.pair()
    bob = await world.user()
    cid = new_cid()
    conv = (await a.request("open", kind="group", cid=cid, title="One"))["c"]
    await a.refused("conflict", "open", kind="group", cid=cid, title="Two")
    await a.refused("conflict", "open", kind="group", cid=cid, title="One", members=[bob.id])
    await a.refused("conflict", "open", kind="channel", cid=cid, title="One")
    assert (await a.request("members", c=conv))["members"][0]["role"] == "owner"


async def test_the_cid_of_a_dm_is_a_conflict_for_another_one(world: World) -> None:
    """It was `ok`: the cid of a dm was not remembered, since its id comes from its two users."""
    alice = await world.user()
    a0, a1 = await world.both_workers(alice)
    bob, carol = await world.user(), await world.user()
    cid = new_cid()
    conv = (await a0.request("open", kind="dm", cid=cid, members=[bob.id]))["c"]
    for a in (a0, a1):
        await a.refused("conflict", "open", kind="dm", cid=cid, members=[carol.id])
        await a.refused("conflict", "open", kind="group", cid=cid, title="t")
        assert (await a.request("open", kind="dm", cid=cid, members=[bob.id]))["c"] == conv
    await a0.request("open", kind="group", cid=(used := new_cid()), title="t")
    await a1.refused("conflict", "open", kind="dm", cid=used, members=[carol.id])
    assert (await a1.request("open", kind="dm", cid=new_cid(), members=[carol.id]))["c"] != conv


async def test_a_dm_of_the_same_two_is_the_same_whoever_opens_it_and_however_often(world: World) -> None:
    alice, a = await world.pair("alice", on=0)
    bob, b = await world.pair("bob", on=1)
    futures = await asyncio.gather(
        a.begin("open", kind="dm", cid=new_cid(), members=[bob.id]),
        b.begin("open", kind="dm", cid=new_cid(), members=[alice.id]),
    )
    first, second = await a.answer(futures[0]), await b.answer(futures[1])
    assert first["c"] == second["c"] == await world.dm(a, bob)
    assert (await a.expect(t="conv", c=first["c"]))["with"] == {"id": bob.id, "name": bob.name}
    view = await b.expect(t="conv", c=first["c"])
    assert view["with"] == {"id": alice.id, "name": alice.name}
    assert view["kind"] == "dm"
    assert view["members"] == 2


async def test_a_dm_carries_messages_both_ways(world: World) -> None:
    _, a = await world.pair(on=0)
    bob, b = await world.pair(on=1)
    conv = await world.dm(a, bob)
    await b.expect(t="conv", c=conv)
    await world.send(a, conv, "ping")
    await b.expect(t="msg", c=conv, body="ping")
    await world.send(b, conv, "pong")
    await a.expect(t="msg", c=conv, body="pong")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"kind": "dm"}, "bad_request"),
        ({"kind": "dm", "members": []}, "bad_request"),
        ({"kind": "dm", "members": ["SELF"]}, "bad_request"),
        ({"kind": "dm", "members": ["BOB", "CAROL"]}, "bad_request"),
        ({"kind": "dm", "members": ["nobody-there"]}, "not_found"),
        ({"kind": "group", "title": "g", "members": ["BOB", "nobody-there"]}, "not_found"),
        ({"kind": "channel"}, "bad_request"),
        ({"kind": "channel", "title": ""}, "bad_request"),
        ({"kind": "channel", "title": "   "}, "bad_request"),
        ({"kind": "channel", "title": "a\nb"}, "bad_request"),
        ({"kind": "channel", "title": "x" * 101}, "bad_request"),
        ({"kind": "room", "title": "r"}, "bad_request"),
        ({"kind": "group", "title": 7}, "bad_request"),
        ({"kind": "group", "members": ["not an id"]}, "bad_request"),
        ({"title": "r"}, "bad_request"),
    ],
)
async def test_what_cannot_be_opened_is_refused_and_makes_nothing(
    world: World, fields: dict[str, Any], code: str
) -> None:
    alice, a = await world.pair()
    bob, carol = await world.user(), await world.user()
    names = {"SELF": alice.id, "BOB": bob.id, "CAROL": carol.id}
    if "members" in fields:
        fields = {**fields, "members": [names.get(member, member) for member in fields["members"]]}
    await a.refused(code, "open", cid=new_cid(), **fields)
    assert (await world.http("GET", "/v1/conversations", token=alice.token)).json["conversations"] == []
    assert (await world.http("GET", "/v1/conversations", token=bob.token)).json["conversations"] == []


async def test_too_many_members_at_once_are_too_large(tight: World) -> None:
    _, a = await tight.pair()
    others = [await tight.user() for _ in range(4)]
    ids = [user.id for user in others]
    await a.refused("too_large", "open", kind="group", cid=new_cid(), title="g", members=ids)
    await a.request("open", kind="group", cid=new_cid(), title="g", members=ids[:3])


async def test_a_user_can_be_in_so_many_conversations_and_no_more(tight: World) -> None:
    alice, a = await tight.pair()
    for _ in range(12):
        await tight.group(a)
    await a.refused("forbidden", "open", kind="group", cid=new_cid(), title="one too many")
    # Nor is he brought into one more, by others or by himself.
    bob, b = await tight.pair()
    group, channel = await tight.group(b), await tight.channel(b)
    await b.refused("forbidden", "member", c=group, user=alice.id, role="member")
    await a.refused("forbidden", "member", c=channel, user=alice.id, role="member")
    assert [m["user"] for m in (await b.request("members", c=group, limit=3))["members"]] == [bob.id]
