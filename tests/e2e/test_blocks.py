"""The effects of a block: it stops messages and typing in the dm, presence, and invitations."""

from __future__ import annotations

from typing import Any

from .client import Client
from .world import User, World, new_cid


async def _pair(world: World) -> tuple[Client, Client, str, str, User]:
    """Two users who have a dm and a group, on two workers: alice, bob, the dm, the group, and bob's account."""
    _, alice = await world.pair("alice", on=0)
    user = await world.user("bob")
    bob = await world.connect(user, on=1)
    dm = await world.dm(alice, user)
    group = await world.group(alice, user)
    return alice, bob, dm, group, user


async def test_typing_in_the_dm_does_not_reach_who_blocks(world: World) -> None:
    alice, bob, dm, group, user = await _pair(world)
    await bob.request("typing", c=dm)
    await alice.expect(t="typing", c=dm, user=bob.user)
    await alice.request("block", user=bob.user, on=True)
    other = await world.connect(user)  # typing signals have an interval for each connection
    await other.request("typing", c=dm)
    await other.request("typing", c=group)
    await alice.expect(t="typing", c=group, user=bob.user)  # on one way with the other, and behind it
    assert len(alice.got(t="typing", c=dm)) == 1


async def test_who_is_blocked_sees_who_blocks_offline(world: World) -> None:
    alice, bob, *_ = await _pair(world)
    asked = [alice.user, bob.user]
    states = (await bob.request("watch", users=asked))["states"]
    assert [(state["user"], state["state"]) for state in states] == [(user, "online") for user in asked]
    await alice.request("block", user=bob.user, on=True)
    assert await bob.expect(t="presence", user=alice.user) == {
        "t": "presence", "user": alice.user, "state": "offline",
    }  # fmt: skip
    states = (await bob.request("watch", users=asked))["states"]
    assert states[0] == {"user": alice.user, "state": "offline"}
    await alice.request("block", user=bob.user, on=False)
    await bob.expect(t="presence", user=alice.user, state="online")


async def test_who_is_blocked_cannot_pull_who_blocks_into_a_group(world: World) -> None:
    alice, bob, *_ = await _pair(world)
    await alice.request("block", user=bob.user, on=True)
    refused = await bob.refused("forbidden", "open", kind="group", cid=new_cid(), members=[alice.user])
    assert "block" not in refused["message"]
    carol = await world.user("carol")
    conv = await world.group(bob, carol)
    await bob.refused("forbidden", "member", c=conv, user=alice.user, role="member")
    await alice.request("block", user=bob.user, on=False)
    await bob.request("member", c=conv, user=alice.user, role="member")
    await alice.expect(t="conv", c=conv, role="member")


async def test_a_block_does_not_end_what_both_are_in(world: World) -> None:
    alice, bob, _, group, _ = await _pair(world)
    await alice.request("block", user=bob.user, on=True)
    sent: dict[str, Any] = await world.send(bob, group, "to all")
    await alice.reach(group, sent["s"])
