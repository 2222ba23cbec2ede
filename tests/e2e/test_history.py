"""`history`: pages of the log, ascending, whole and without holes."""

from __future__ import annotations

import json

import pytest

from .client import Client
from .world import World, new_cid

TWELVE = 12  # messages, after the entries that made the group


async def _filled(world: World) -> tuple[Client, str, int]:
    _, a = await world.pair()
    conv = await world.group(a)
    return a, conv, await world.fill(a, conv, TWELVE)


async def test_without_a_bound_it_is_the_newest_page(world: World) -> None:
    a, conv, head = await _filled(world)
    page = await a.request("history", c=conv, limit=5)
    assert [entry["s"] for entry in page["entries"]] == list(range(head - 4, head + 1))
    assert page["more"] is True
    assert page["at"] == head


async def test_the_whole_log_fits_one_page_and_there_is_no_more(world: World) -> None:
    a, conv, head = await _filled(world)
    page = await a.request("history", c=conv)
    assert [entry["s"] for entry in page["entries"]] == list(range(1, head + 1))
    assert page["more"] is False


async def test_before_pages_backwards_to_the_beginning(world: World) -> None:
    a, conv, head = await _filled(world)
    seqs: list[int] = []
    more = True
    while more:
        page = await a.request("history", c=conv, before=seqs[0] if seqs else head + 1, limit=5)
        assert page["at"] == head
        seqs = [entry["s"] for entry in page["entries"]] + seqs
        more = page["more"]
    assert seqs == list(range(1, head + 1))


async def test_after_pages_forwards_to_the_head(world: World) -> None:
    a, conv, head = await _filled(world)
    seqs: list[int] = []
    more = True
    while more:
        page = await a.request("history", c=conv, after=seqs[-1] if seqs else 0, limit=5)
        seqs += [entry["s"] for entry in page["entries"]]
        more = page["more"]
    assert seqs == list(range(1, head + 1))


async def test_a_permalink_is_one_page_before_and_one_after(world: World) -> None:
    a, conv, head = await _filled(world)
    s = head - 4
    until = await a.request("history", c=conv, before=s + 1, limit=3)
    onwards = await a.request("history", c=conv, after=s, limit=3)
    assert [entry["s"] for entry in until["entries"] + onwards["entries"]] == list(range(s - 2, s + 4))


@pytest.mark.parametrize("bound", [{"before": 1}, {"before": 0}, {"after": 10**9}])
async def test_beyond_the_ends_a_page_is_empty(world: World, bound: dict[str, int]) -> None:
    a, conv, head = await _filled(world)
    page = await a.request("history", c=conv, **bound)
    assert page["entries"] == []
    assert page["more"] is False
    assert page["at"] == head


async def test_raw_pages_hold_exactly_what_was_pushed(world: World) -> None:
    a, conv, head = await _filled(world)
    pushed = await a.reach(conv, head)
    page = await a.request("history", c=conv, raw=True)
    assert page["entries"] == pushed
    assert [entry["s"] for entry in pushed] == list(range(1, head + 1))


async def test_a_page_is_cut_at_the_largest_message_and_says_more(world: World) -> None:
    _, a = await world.pair()
    conv = await world.group(a)
    first = (await world.send(a, conv, "begin"))["s"]
    head = await world.fill(a, conv, 80, "x" * 8000)
    before = len(a.received)
    page = await a.request("history", c=conv, after=first, limit=100)
    assert page["more"] is True
    assert 1 < len(page["entries"]) < 80
    assert [entry["s"] for entry in page["entries"]] == list(range(first + 1, first + 1 + len(page["entries"])))
    reply = next(m for m in a.received[before:] if m["t"] == "ok")
    assert len(json.dumps(reply, separators=(",", ":")).encode()) <= 256 * 1024
    # The newest page is cut at its other end.
    page = await a.request("history", c=conv, limit=100)
    assert page["more"] is True
    assert page["entries"][-1]["s"] == head


async def test_a_limit_over_the_servers_is_too_large(tight: World) -> None:
    _, a = await tight.pair()
    conv = await tight.group(a)
    await a.refused("too_large", "history", c=conv, limit=11)
    await a.request("history", c=conv, limit=10)


@pytest.mark.parametrize(
    "fields",
    [{"limit": 0}, {"limit": -1}, {"before": -1}, {"after": -1}, {"after": 2**53}, {"before": "1"}, {"raw": 1}],
)
async def test_a_bound_that_is_none_is_a_bad_request(world: World, fields: dict[str, object]) -> None:
    _, a = await world.pair()
    conv = await world.group(a)
    await a.refused("bad_request", "history", **{"c": conv, **fields})


async def test_before_and_after_exclude_each_other(world: World) -> None:
    _, a = await world.pair()
    conv = await world.group(a)
    await a.refused("bad_request", "history", c=conv, before=3, after=1)


async def test_a_member_who_came_late_sees_the_whole_log(world: World) -> None:
    a, conv, _ = await _filled(world)
    bob, b = await world.pair()
    await a.request("member", c=conv, user=bob.id, role="member")
    assert await world.whole_log(b, conv) == await world.whole_log(a, conv)
    cid = new_cid()
    await b.request("send", c=conv, cid=cid, body="I read it all")
    await a.expect(t="msg", c=conv, cid=cid)
