"""The presence of users, pushed to those who watch them; and blocking."""

from __future__ import annotations

import time
from typing import Any

from .client import Client
from .world import World, new_cid


async def test_watch_tells_the_states_now(world: World) -> None:
    alice, a = await world.pair(on=0)
    bob, _ = await world.pair(on=1)
    carol = await world.user()
    conv = await world.group(a, bob, carol)
    assert conv
    reply = await a.request("watch", users=[alice.id, bob.id, carol.id])
    states = {state["user"]: state["state"] for state in reply["states"]}
    assert states[alice.id] == "online"
    assert states[carol.id] == "offline"
    # He is on the other worker: online in the reply, or pushed as soon as this worker knows it.
    if states[bob.id] == "offline":
        await a.expect(t="presence", user=bob.id, state="online")


async def test_coming_and_going_is_told_to_watchers_on_every_worker(world: World) -> None:
    alice = await world.user()
    bob = await world.user()
    watchers = await world.both_workers(alice)
    await world.group(watchers[0], bob)
    for client in watchers:
        await client.request("watch", users=[bob.id])
    b = await world.connect(bob, on=1)
    for client in watchers:
        await client.expect(t="presence", user=bob.id, state="online")
    left = time.time() * 1000
    await b.close()
    for client in watchers:
        push = await client.expect(t="presence", user=bob.id, state="offline")
        assert left - 2000 < push["seen"] < time.time() * 1000 + 2000
    # A session that asks later is answered the same.
    states = (await (await world.connect(alice)).request("watch", users=[bob.id]))["states"]
    assert [(state["user"], state["state"]) for state in states] == [(bob.id, "offline")]
    assert states[0]["seen"] == push["seen"]


async def _settled(watcher: Client, user: str, state: str) -> None:
    reply = await watcher.request("watch", users=[user])
    if reply["states"][0]["state"] != state:
        await watcher.expect(t="presence", user=user, state=state)
    watcher.forget()


async def test_one_of_two_sessions_going_is_not_told(world: World) -> None:
    _, a = await world.pair(on=0)
    bob = await world.user()
    carol = await world.user()
    await world.group(a, bob, carol)
    b0, b1 = await world.both_workers(bob)
    await _settled(a, bob.id, "online")
    c = await world.connect(carol)
    await a.request("watch", users=[bob.id, carol.id])
    a.forget()
    await b1.close()
    await c.close()  # she went after him: a push about her comes after one about him would
    await a.expect(t="presence", user=carol.id, state="offline")
    assert not a.got(t="presence", user=bob.id, state="offline")
    await b0.request("ping")


async def test_who_is_away_in_all_sessions_appears_offline(world: World) -> None:
    _, a = await world.pair(on=0)
    bob, b = await world.pair(on=1)
    await world.group(a, bob)
    await _settled(a, bob.id, "online")
    await b.request("attach", only=[])
    await a.expect(t="presence", user=bob.id, state="offline")
    await b.request("attach")
    await a.expect(t="presence", user=bob.id, state="online")


async def test_watch_replaces_who_was_watched_before(world: World) -> None:
    _, a = await world.pair(on=0)
    bob, carol = await world.user(), await world.user()
    await world.group(a, bob, carol)
    await a.request("watch", users=[bob.id])
    await a.request("watch", users=[carol.id])
    await world.connect(bob, on=1)
    await world.connect(carol, on=1)
    await a.expect(t="presence", user=carol.id, state="online")
    assert not a.got(t="presence", user=bob.id)


async def test_only_people_one_shares_a_conversation_with_can_be_watched(world: World) -> None:
    _, a = await world.pair()
    bob, stranger = await world.user(), await world.user()
    await world.group(a, bob)
    await a.refused("forbidden", "watch", users=[bob.id, stranger.id])
    await a.refused("forbidden", "watch", users=["nobody-at-all"])
    await a.request("watch", users=[bob.id])


async def test_watching_too_many_is_too_large(tight: World) -> None:
    _, a = await tight.pair()
    await a.refused("too_large", "watch", users=["u1", "u2", "u3", "u4"])


# --- block ------------------------------------------------------------------------------


async def test_somebody_blocked_can_neither_open_a_dm_nor_write_in_one(world: World) -> None:
    alice, a = await world.pair(on=0)
    bob, b = await world.pair(on=1)
    carol, _ = await world.pair()
    conv = await world.dm(a, bob)
    group = await world.group(b, alice)
    head = (await world.send(b, conv, "hello"))["s"]
    await a.request("block", user=bob.id, on=True)
    # On another host it is heard of a moment later: what gets through until then is one of the last.
    while (reply := await b.answer(await b.begin("send", c=conv, cid=new_cid(), body="hello?")))["t"] == "ok":
        head = reply["s"]
    assert reply["code"] == "forbidden"
    assert "retry_after_ms" not in reply
    assert len(await world.whole_log(a, conv)) == head
    # A new dm is refused too; what both are in already goes on, and so does what alice writes herself.
    await (await world.connect(carol)).request("block", user=bob.id, on=True)
    await b.refused("forbidden", "open", kind="dm", cid=new_cid(), members=[carol.id])
    await world.send(b, group, "in a group")
    await world.send(a, conv, "I can still write")
    await a.request("block", user=bob.id, on=False)
    await world.send(b, conv, "hello again")


async def test_blocking_oneself_or_nobody_is_refused(world: World) -> None:
    alice, a = await world.pair()
    await a.refused("bad_request", "block", user=alice.id, on=True)
    await a.refused("not_found", "block", user="nobody-at-all", on=True)
    fields: dict[str, Any] = {"user": "nobody-at-all", "on": 1}
    await a.refused("bad_request", "block", **fields)
