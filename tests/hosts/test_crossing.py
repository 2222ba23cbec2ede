"""Changes on one host reach clients on the other: everything that clients see, and nothing else than the log."""

from __future__ import annotations

import asyncio
import time

from ..e2e.client import Client
from ..e2e.world import User, new_cid
from .parts import Pair


async def _group(pair: Pair) -> tuple[User, Client, User, Client, str]:
    """Alice on one host, Bob on the other, both in a group."""
    alice, a = await pair.a.pair("alice")
    bob = await pair.a.user("bob")  # an account made on one host is good on the other
    b = await pair.b.connect(bob)
    return alice, a, bob, b, await pair.a.group(a, bob)


async def test_messages_cross_in_both_directions_and_in_one_order(pair: Pair) -> None:
    _, a, _, b, conv = await _group(pair)
    for i in range(5):
        sent = await pair.a.send(a, conv, f"from alice {i}")
        await b.expect(t="msg", c=conv, s=sent["s"], body=f"from alice {i}")
        sent = await pair.b.send(b, conv, f"from bob {i}")
        await a.expect(t="msg", c=conv, s=sent["s"], body=f"from bob {i}")
    log = await pair.b.whole_log(b, conv)
    assert a.log(conv) == log[-len(a.log(conv)) :]
    assert b.log(conv) == log[-len(b.log(conv)) :]


async def test_typing_crosses_to_the_others_only(pair: Pair) -> None:
    alice, a, bob, b, conv = await _group(pair)
    second = await pair.b.connect(alice)
    await a.request("typing", c=conv)
    await b.expect(t="typing", c=conv, user=alice.id)
    await b.request("typing", c=conv)
    await a.expect(t="typing", c=conv, user=bob.id)
    await second.expect(t="typing", c=conv, user=bob.id)
    assert not second.got(t="typing", user=alice.id), "to oneself"


async def test_a_read_mark_crosses_to_the_others_and_to_ones_own_devices(pair: Pair) -> None:
    _, a, bob, b, conv = await _group(pair)
    device = await pair.a.connect(bob)
    sent = await pair.a.send(a, conv)
    for client in (b, device):
        await client.reach(conv, sent["s"])
        client.forget()
    await b.request("read", c=conv, upto=sent["s"])
    await a.expect(t="read", c=conv, user=bob.id, upto=sent["s"])
    assert (await device.expect(t="conv", c=conv, read=sent["s"]))["unread"] == 0


async def test_membership_crosses(pair: Pair) -> None:
    _, a, bob, b, conv = await _group(pair)
    carol = await pair.b.user("carol")
    c = await pair.b.connect(carol)
    # Invited on one host, attached on the other, from the entry on.
    invited = await a.request("member", c=conv, user=carol.id, role="member")
    assert (await c.expect(t="conv", c=conv, after=...))["role"] == "member"
    sent = await pair.b.send(c, conv, "carol is in")
    await a.expect(t="msg", c=conv, s=sent["s"])
    # Removed on one host: that entry is the last; the other host refuses what comes after.
    await c.reach(conv, sent["s"])
    assert c.seqs(conv)[0] >= invited["s"]
    removed = await a.request("member", c=conv, user=carol.id, role="none")
    await c.expect(t="member", c=conv, s=removed["s"], user=carol.id, role="none")
    await c.refused("not_found", "send", c=conv, cid=new_cid(), body="still here?")
    await c.refused("not_found", "history", c=conv)
    last = (await pair.a.send(a, conv, "carol is out"))["s"]
    await b.reach(conv, last)
    assert c.seqs(conv)[-1] == removed["s"]
    # Appointed on one host, in office on the other.
    await a.request("member", c=conv, user=bob.id, role="admin")
    await b.expect(t="member", c=conv, user=bob.id, role="admin")
    renamed = await b.request("meta", c=conv, title="by bob", cid=new_cid())
    await a.expect(t="meta", c=conv, s=renamed["s"], title="by bob")


async def test_joining_and_leaving_a_channel_crosses_without_an_entry(pair: Pair) -> None:
    _, a = await pair.a.pair("alice")
    conv = await pair.a.channel(a)
    bob = await pair.a.user("bob")
    here, there = await pair.both(bob)
    await there.refused("not_found", "send", c=conv, cid=new_cid(), body="not yet")
    await here.request("member", c=conv, user=bob.id, role="member")
    await there.expect(t="conv", c=conv, after=...)
    sent = await pair.b.send(there, conv, "joined on the other host")
    for client in (a, here):
        await client.reach(conv, sent["s"])
    await there.request("member", c=conv, user=bob.id, role="none")
    await here.expect(t="conv", c=conv, role="none")
    await here.refused("not_found", "send", c=conv, cid=new_cid(), body="left on the other host")


async def test_a_dm_opened_on_both_hosts_at_once_is_one(pair: Pair) -> None:
    alice, a = await pair.a.pair("alice")
    bob, b = await pair.b.pair("bob")
    replies = await asyncio.gather(
        a.request("open", kind="dm", cid=new_cid(), members=[bob.id]),
        b.request("open", kind="dm", cid=new_cid(), members=[alice.id]),
    )
    assert replies[0]["c"] == replies[1]["c"]
    conv = replies[0]["c"]
    sent = await pair.a.send(a, conv, "hello")
    await b.reach(conv, sent["s"])
    assert [e["user"] for e in await pair.b.whole_log(b, conv) if e["t"] == "member"] in (
        [alice.id, bob.id],
        [bob.id, alice.id],
    )


async def test_presence_crosses(pair: Pair) -> None:
    _, a, bob, b, _ = await _group(pair)
    carol = await pair.a.user("carol")
    await pair.a.group(a, carol)
    states = (await a.request("watch", users=[bob.id, carol.id]))["states"]
    # He is on the other host: online in the reply, or pushed as soon as this host knows it.
    if {state["user"]: state["state"] for state in states}[bob.id] == "offline":
        await a.expect(t="presence", user=bob.id, state="online")
    c = await pair.b.connect(carol)
    await a.expect(t="presence", user=carol.id, state="online")
    # One of two devices goes, on whichever host: watchers are pushed nothing.
    second = await pair.a.connect(bob)
    await b.close()
    await c.close()
    push = await a.expect(t="presence", user=carol.id, state="offline")
    assert abs(push["seen"] - time.time() * 1000) < 10_000
    assert not a.got(t="presence", user=bob.id, state="offline")
    await second.close()
    await a.expect(t="presence", user=bob.id, state="offline")


async def test_a_token_revoked_on_one_host_ends_its_sessions_on_the_other(pair: Pair) -> None:
    alice = await pair.a.user("alice")
    other = await pair.b.login(alice)
    there = await pair.b.connect(alice)
    stays = await pair.b.connect(other)
    assert (await pair.a.http("DELETE", "/v1/sessions/current", token=alice.token)).status in (200, 204)
    assert (await there.end()).code == 4101
    await pair.b.worthless(alice.token)
    assert (await pair.b.http("GET", "/v1/me", token=alice.token)).status == 401
    await stays.request("ping")


async def test_a_cid_used_on_one_host_is_known_on_the_other(pair: Pair) -> None:
    alice, a, _, b, conv = await _group(pair)
    there = await pair.b.connect(alice)
    cid = new_cid()
    first = await a.request("send", c=conv, cid=cid, body="once")
    again = await there.request("send", c=conv, cid=cid, body="once")
    assert (again["s"], again["ts"], again["dup"]) == (first["s"], first["ts"], True)
    await there.refused("conflict", "send", c=conv, cid=cid, body="something else")
    # At the same time on both: one of them stores it.
    for i in range(5):
        cid = new_cid()
        replies = await asyncio.gather(
            *(client.request("send", c=conv, cid=cid, body=f"both {i}") for client in (a, there))
        )
        assert replies[0]["s"] == replies[1]["s"]
        assert sorted("dup" in reply for reply in replies) == [False, True], replies
    await b.reach(conv, replies[0]["s"])
    assert [e["s"] for e in await pair.b.whole_log(b, conv)][-1] == replies[0]["s"] == first["s"] + 5


async def test_one_resumes_on_the_other_host_with_exactly_the_rest(pair: Pair) -> None:
    _, a, bob, b, conv = await _group(pair)
    quiet = await pair.a.group(a, bob)
    await b.reach(conv, (await pair.a.send(a, conv))["s"])
    nothing = max([b.after(quiet), *b.seqs(quiet)])
    for world in (pair.a, pair.b):  # there, and back again
        sync = b.got(t="ready")[-1]["sync"]
        held = b.seqs(conv)[-1]
        have = {conv: held, quiet: nothing}
        await b.close()
        head = await pair.a.fill(a, conv, 10)
        b = await world.open()
        assert (await b.request("auth", v=1, token=bob.token, sync=sync, have=have))["full"] is False
        assert (await b.expect(t="conv", c=conv))["after"] == held
        await b.expect(t="ready", sync=...)
        assert b.seqs(conv) == list(range(held + 1, head + 1)), "all of it before ready"
        last = await pair.a.fill(a, conv, 2)
        assert await b.reach(conv, last) == (await world.whole_log(a, conv))[held:]
        assert not b.seqs(quiet)
