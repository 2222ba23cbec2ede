"""Requests that ask about conversations and users, and set them: meta, notify, members, users, channels."""

from __future__ import annotations

import secrets
from typing import Any

import pytest

from .world import World, new_cid

# --- meta ---------------------------------------------------------------------------


async def test_a_new_title_is_an_entry_for_everybody(world: World) -> None:
    _, a = await world.pair(on=0)
    bob, b = await world.pair(on=1)
    conv = await world.group(a, bob, title="old")
    reply = await a.request("meta", c=conv, title="new", cid=new_cid())
    for client in (a, b):
        entry = await client.expect(t="meta", c=conv, title="new")
        assert entry["s"] == reply["s"]
    again = await world.connect(bob)
    assert (await again.expect(t="conv", c=conv))["title"] == "new"


async def test_a_title_set_again_with_the_same_cid_is_one_entry(world: World) -> None:
    alice = await world.user()
    a0, a1 = await world.both_workers(alice)
    conv = await world.group(a0)
    request = {"c": conv, "title": "new", "cid": new_cid()}
    first = await a0.request("meta", **request)
    again = await a1.request("meta", **request)
    assert (again["s"], again["dup"]) == (first["s"], True)
    await a1.refused("conflict", "meta", **{**request, "title": "other"})
    await a1.refused("conflict", "send", c=conv, cid=request["cid"], body="other")
    assert len(await world.whole_log(a0, conv)) == first["s"]


async def test_admins_change_the_title_and_members_do_not(world: World) -> None:
    _, a = await world.pair()
    bob, b = await world.pair()
    conv = await world.group(a, bob)
    await b.expect(t="conv", c=conv)
    await b.refused("forbidden", "meta", c=conv, title="mine", cid=new_cid())
    await a.request("member", c=conv, user=bob.id, role="admin")
    await b.request("meta", c=conv, title="mine", cid=new_cid())


async def test_a_dm_has_no_title(world: World) -> None:
    _, a = await world.pair()
    conv = await world.dm(a, await world.user())
    await a.refused("forbidden", "meta", c=conv, title="us", cid=new_cid())


@pytest.mark.parametrize(
    "title",
    [
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 Familie",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    ],
    ids=ascii,
)
async def test_words_and_emoji_with_joiners_are_titles(world: World, title: str) -> None:
    """They were refused as control characters: families, Persian, the flag of Scotland."""
    alice, a = await world.pair()
    conv = await world.group(a, title=title)
    assert (await a.expect(t="conv", c=conv))["title"] == title
    await a.request("meta", c=conv, title=f"{title} 2", cid=new_cid())
    await a.expect(t="meta", c=conv, title=f"{title} 2")
    again = await world.connect(alice)
    assert (await again.expect(t="conv", c=conv))["title"] == f"{title} 2"


@pytest.mark.parametrize(
    "title", ["", "  ", "a\tb", "x" * 101, "a\u202eb", "a\u2066b", "a\u2028b", "\u200b", "\u200d\ufe0f"], ids=ascii
)
async def test_a_title_that_is_none_is_a_bad_request(world: World, title: str) -> None:
    _, a = await world.pair()
    conv = await world.group(a)
    head = len(await world.whole_log(a, conv))
    await a.refused("bad_request", "meta", c=conv, title=title, cid=new_cid())
    assert len(await world.whole_log(a, conv)) == head


# --- notify ---------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["mentions", "none"])
async def test_the_level_of_notifications_is_kept_and_told_to_ones_other_devices(world: World, level: str) -> None:
    alice = await world.user()
    a0, a1 = await world.both_workers(alice)
    bob, b = await world.pair()
    conv = await world.group(a0, bob)
    await a1.expect(t="conv", c=conv, notify="all", after=...)
    await a0.request("notify", c=conv, level=level)
    await a1.expect(t="conv", c=conv, notify=level)
    fresh = await world.connect(alice)
    assert (await fresh.expect(t="conv", c=conv))["notify"] == level
    # No other user's level changed.
    assert (await (await world.connect(bob)).expect(t="conv", c=conv))["notify"] == "all"
    assert not b.got(t="conv", c=conv, notify=level)


async def test_an_unknown_level_is_a_bad_request(world: World) -> None:
    alice, a = await world.pair()
    conv = await world.group(a)
    await a.refused("bad_request", "notify", c=conv, level="loud")
    assert (await (await world.connect(alice)).expect(t="conv", c=conv))["notify"] == "all"


# --- members ---------------------------------------------------------------------------


async def test_members_are_told_with_role_and_read_mark_by_pages(tight: World) -> None:
    _, a = await tight.pair()
    others = [await tight.user() for _ in range(3)]
    conv = await tight.group(a, *others)
    b = await tight.connect(others[0])
    head = (await tight.send(a, conv))["s"]
    await b.request("read", c=conv, upto=head)
    found: list[dict[str, Any]] = []
    after = None
    pages = 0
    while True:
        page = await a.request("members", c=conv, limit=2, **({} if after is None else {"after": after}))
        found += page["members"]
        pages += 1
        after = page.get("next")
        if after is None:
            break
    assert pages == 2
    assert {m["user"] for m in found} >= {user.id for user in others}
    assert len(found) == 4
    assert sorted(m["role"] for m in found) == ["member", "member", "member", "owner"]
    marks = {m["user"]: m["read"] for m in found}
    assert marks[others[0].id] == head
    assert marks[others[1].id] < head


async def test_too_long_pages_are_too_large(tight: World) -> None:
    _, a = await tight.pair()
    conv = await tight.group(a)
    await a.refused("too_large", "members", c=conv, limit=4)
    await a.refused("too_large", "channels", limit=4)
    await a.refused("too_large", "users", ids=["a", "b", "c", "d"])
    await a.request("members", c=conv, limit=3)
    await a.request("channels", limit=3)
    await a.request("users", ids=["a", "b", "c"])


# --- users ---------------------------------------------------------------------------


async def test_users_are_looked_up_by_id_and_unknown_ones_left_out(world: World) -> None:
    alice, a = await world.pair("alice")
    bob = await world.user("bob")
    reply = await a.request("users", ids=[bob.id, "nobody", alice.id])
    found = {user["id"]: user["name"] for user in reply["users"]}
    assert found == {alice.id: alice.name, bob.id: bob.name}
    assert (await a.request("users", ids=[]))["users"] == []


# --- channels --------------------------------------------------------------------------


async def test_the_directory_lists_channels_by_title_to_anybody_by_pages(world: World) -> None:
    _, a = await world.pair()
    bob, b = await world.pair()
    stem = f"Dir-{secrets.token_hex(6)}"
    convs = [await world.channel(a, f"{stem} {name}") for name in ("ccc", "aaa", "bbb")]
    await world.group(a, title=f"{stem} private")
    await b.request("member", c=convs[0], user=bob.id, role="member")
    titles: list[str] = []
    rows: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        page = await b.request("channels", prefix=stem.lower(), limit=2, **after)  # case does not matter
        rows += page["conversations"]
        titles += [row["title"] for row in page["conversations"]]
        if "next" not in page:
            break
        after = {"after": page["next"]}
    assert titles == [f"{stem} aaa", f"{stem} bbb", f"{stem} ccc"]
    assert rows[2]["c"] == convs[0]
    assert [row["members"] for row in rows] == [1, 1, 2]


async def test_the_directory_begins_with_the_prefix_only(world: World) -> None:
    _, a = await world.pair()
    stem = secrets.token_hex(6)
    conv = await world.channel(a, f"{stem}_%")
    await world.channel(a, f"{stem}xy")
    reply = await a.request("channels", prefix=f"{stem}_")
    assert [row["c"] for row in reply["conversations"]] == [conv]
    assert (await a.request("channels", prefix=f"{stem}z"))["conversations"] == []


async def test_a_renamed_channel_is_found_by_its_new_title_only(world: World) -> None:
    _, a = await world.pair()
    old, new = secrets.token_hex(6), secrets.token_hex(6)
    conv = await world.channel(a, old)
    await a.request("meta", c=conv, title=new, cid=new_cid())
    assert (await a.request("channels", prefix=old))["conversations"] == []
    assert [row["c"] for row in (await a.request("channels", prefix=new))["conversations"]] == [conv]
