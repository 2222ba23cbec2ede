"""Removed and invited again: what a client that goes by the document alone takes itself to be in."""

from __future__ import annotations

from typing import Any

from .client import Client
from .world import User, World, new_cid


class Roles:
    """The own role by docs/protocol.md ("Are you in it?").

    A `conv` states it as of its `head`; a `member` entry about oneself changes it only with an `s` above that.
    """

    def __init__(self, user: str) -> None:
        self.user = user
        self.role: dict[str, str] = {}
        self._as_of: dict[str, int] = {}

    def take(self, messages: list[dict[str, Any]]) -> None:
        for m in messages:
            if m["t"] == "conv":
                self.role[m["c"]] = m["role"]
                self._as_of[m["c"]] = m.get("head", 0)
            elif m["t"] == "member" and m["user"] == self.user and m["s"] > self._as_of.get(m["c"], 0):
                self.role[m["c"]] = m["role"]


async def _gone_away(world: World) -> tuple[Client, User, str, int, str]:
    """A group that bob disconnected from: alice, bob's account, the group, bob's last seq, bob's `sync`."""
    _, alice = await world.pair("alice")
    bob = await world.user("bob")
    client = await world.connect(bob)
    conv = await world.group(alice, bob)
    held = (await client.expect(t="conv", c=conv))["head"]
    await client.reach(conv, held)
    sync = (await client.request("ping"))["sync"]
    await client.close()
    return alice, bob, conv, held, sync


async def _resumed(world: World, user: User, held: dict[str, int], sync: str) -> tuple[Client, Roles]:
    client = await world.connect(user, have=held, sync=sync)
    roles = Roles(user.id)
    roles.take(client.received)
    return client, roles


async def test_who_was_removed_and_invited_again_while_away_knows_that_it_is_in(world: World) -> None:
    """The replay brings the removal, too: a client that took it for news forgot a conversation that it is in."""
    alice, bob, conv, held, sync = await _gone_away(world)
    await alice.request("member", c=conv, user=bob.id, role="none")
    await alice.request("member", c=conv, user=bob.id, role="member")
    last = (await world.send(alice, conv, "welcome back"))["s"]
    client, roles = await _resumed(world, bob, {conv: held}, sync)
    await client.reach(conv, last)
    assert [m["role"] for m in client.got(t="member", c=conv, user=bob.id)] == ["none", "member"]
    roles.take(client.received)
    assert roles.role[conv] == "member"


async def test_who_was_invited_and_removed_again_while_away_knows_that_it_is_out(world: World) -> None:
    alice, bob, conv, held, sync = await _gone_away(world)
    for role in ("none", "member", "none"):
        await alice.request("member", c=conv, user=bob.id, role=role)
    _, roles = await _resumed(world, bob, {conv: held}, sync)
    assert roles.role[conv] == "none"


async def test_an_open_that_is_repeated_after_leaving_says_that_one_is_out(world: World) -> None:
    """The server answered `ok` with an id, and the client did not learn that it was no longer a member."""
    _, alice = await world.pair("alice")
    bob = await world.user("bob")
    request = {"kind": "group", "cid": new_cid(), "title": "Tea", "members": [bob.id]}
    conv = (await alice.request("open", **request))["c"]
    await alice.request("member", c=conv, user=bob.id, role="owner")
    await alice.request("member", c=conv, user=alice.user, role="none")
    await alice.expect(t="conv", c=conv, role="none")
    before = len(alice.received)
    assert (await alice.request("open", **request))["c"] == conv
    pushed = [m for m in alice.received[before:] if m["t"] in ("conv", "ok") and m.get("c") == conv]
    told = [(m["t"], m.get("role")) for m in pushed]
    assert ("conv", "none") in told[: told.index(("ok", None))]
