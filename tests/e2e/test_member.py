"""`member`: joining, inviting, leaving, removing, banning, appointing; and which roles may not."""

from __future__ import annotations

import pytest

from .client import Client
from .world import User, World, new_cid


class Group:
    """An owner, an admin, two members and an outsider, on both workers."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.users: dict[str, User] = {}
        self.clients: dict[str, Client] = {}
        self.conv = ""

    @classmethod
    async def make(cls, world: World) -> Group:
        group = cls(world)
        for i, name in enumerate(("owner", "admin", "bob", "carol", "outsider")):
            group.users[name], group.clients[name] = await world.pair(name, on=i % 2)
        owner = group.clients["owner"]
        group.conv = await world.group(owner, *(group.users[name] for name in ("admin", "bob", "carol")))
        await owner.request("member", c=group.conv, user=group.users["admin"].id, role="admin")
        for name in ("admin", "bob", "carol"):
            await group.clients[name].expect(t="member", user=group.users["admin"].id, role="admin")
        return group

    async def set(self, actor: str, user: str, role: str) -> dict[str, object]:
        return await self.clients[actor].request("member", c=self.conv, user=self.users[user].id, role=role)

    async def refused(self, code: str, actor: str, user: str, role: str) -> None:
        await self.clients[actor].refused(code, "member", c=self.conv, user=self.users[user].id, role=role)

    async def roles(self) -> dict[str, str]:
        page = await self.clients["owner"].request("members", c=self.conv)
        names = {user.id: name for name, user in self.users.items()}
        return {names[member["user"]]: member["role"] for member in page["members"]}

    async def told(self, name: str, user: str, role: str) -> dict[str, object]:
        """Wait until this user is pushed the entry of a change."""
        return await self.clients[name].expect(t="member", c=self.conv, user=self.users[user].id, role=role)


BEFORE = {"owner": "owner", "admin": "admin", "bob": "member", "carol": "member"}


# --- channels -----------------------------------------------------------------------


async def test_anybody_joins_and_leaves_a_channel_by_oneself_without_an_entry(world: World) -> None:
    _, a = await world.pair(on=0)
    bob, b = await world.pair(on=1)
    conv = await world.channel(a)
    head = (await world.send(a, conv, "before"))["s"]
    await b.refused("not_found", "history", c=conv)
    reply = await b.request("member", c=conv, user=bob.id, role="member")
    assert "s" not in reply
    view = await b.expect(t="conv", c=conv)
    assert (view["role"], view["members"], view["unread"]) == ("member", 2, 0)
    last = (await world.send(a, conv, "after"))["s"]
    assert last == head + 1
    await b.reach(conv, last)
    assert b.seqs(conv) == list(range(view["after"] + 1, last + 1))
    assert "s" not in await b.request("member", c=conv, user=bob.id, role="none")
    await b.expect(t="conv", c=conv, role="none")
    assert (await world.send(a, conv, "alone again"))["s"] == last + 1
    await b.refused("not_found", "send", c=conv, cid=new_cid(), body="still here?")
    await b.refused("not_found", "history", c=conv)
    assert b.seqs(conv)[-1] == last


async def test_all_sessions_of_a_user_hear_of_a_channel_joined_and_left(world: World) -> None:
    _, a = await world.pair()
    conv = await world.channel(a)
    bob = await world.user()
    b0, b1 = await world.both_workers(bob)
    for _ in range(2):  # the second time is no different from the first
        await b0.request("member", c=conv, user=bob.id, role="member")
        for client in (b0, b1):
            await client.expect(t="conv", c=conv, role="member", after=...)
        last = (await world.send(a, conv))["s"]
        for client in (b0, b1):
            await client.expect(t="msg", c=conv, s=last)
        await b1.request("member", c=conv, user=bob.id, role="none")
        for client in (b0, b1):
            await client.expect(t="conv", c=conv, role="none")


async def test_joining_a_channel_again_is_ok_and_changes_nothing(world: World) -> None:
    _, a = await world.pair()
    bob, b = await world.pair()
    conv = await world.channel(a)
    for _ in range(2):
        assert "s" not in await b.request("member", c=conv, user=bob.id, role="member")
    assert len((await a.request("members", c=conv))["members"]) == 2


async def test_nobody_is_put_into_a_channel_by_others(world: World) -> None:
    _, a = await world.pair()
    bob = await world.user()
    conv = await world.channel(a)
    await a.refused("forbidden", "member", c=conv, user=bob.id, role="member")


async def test_somebody_removed_from_a_channel_may_come_back_and_somebody_banned_may_not(world: World) -> None:
    _, a = await world.pair(on=0)
    bob, b = await world.pair(on=1)
    conv = await world.channel(a)
    await b.request("member", c=conv, user=bob.id, role="member")
    await b.expect(t="conv", c=conv, after=...)
    assert (await a.request("member", c=conv, user=bob.id, role="none"))["s"] > 0
    await b.expect(t="member", c=conv, user=bob.id, role="none")
    await b.request("member", c=conv, user=bob.id, role="member")
    await b.expect(t="conv", c=conv, role="member", after=...)
    await a.request("member", c=conv, user=bob.id, role="banned")
    await b.expect(t="member", c=conv, user=bob.id, role="banned")
    await b.refused("forbidden", "member", c=conv, user=bob.id, role="member")
    await b.refused("not_found", "send", c=conv, cid=new_cid(), body="let me in")
    # Unbanned, he may.
    await a.request("member", c=conv, user=bob.id, role="none")
    await b.request("member", c=conv, user=bob.id, role="member")
    await world.send(b, conv, "back")


@pytest.mark.parametrize("role", ["none", "member"])
async def test_lifting_the_ban_of_a_channel_makes_no_member(world: World, role: str) -> None:
    """A user who had never joined was banned, and made a member when the ban was lifted."""
    _, a = await world.pair(on=0)
    bob, b = await world.pair(on=1)
    conv = await world.channel(a)
    banned = (await a.request("member", c=conv, user=bob.id, role="banned"))["s"]
    await b.refused("forbidden", "member", c=conv, user=bob.id, role="member")
    lifted = (await a.request("member", c=conv, user=bob.id, role=role))["s"]
    assert lifted == banned + 1
    entry = await a.expect(t="member", c=conv, s=lifted)
    assert (entry["role"], entry["was"]) == ("none", "banned")
    await b.refused("not_found", "history", c=conv)
    assert len((await a.request("members", c=conv))["members"]) == 1
    await b.request("member", c=conv, user=bob.id, role="member")
    await world.send(b, conv, "by myself")


# --- inviting and leaving --------------------------------------------------------------


async def test_members_invite_to_a_group(world: World) -> None:
    group = await Group.make(world)
    reply = await group.set("bob", "outsider", "member")
    # Where rows and the number of members are written one after the other, a first view may come in between.
    view = await group.clients["outsider"].expect(t="conv", c=group.conv, members=5)
    assert view["role"] == "member"
    await group.clients["outsider"].reach(group.conv, reply["s"])
    for name in ("owner", "admin", "bob", "carol"):
        entry = await group.told(name, "outsider", "member")
        assert entry["s"] == reply["s"]
        assert entry["from"] == group.users["bob"].id
    await world.send(group.clients["outsider"], group.conv, "thanks")


async def test_a_role_already_held_is_ok_without_s(world: World) -> None:
    group = await Group.make(world)
    for actor, user, role in (("bob", "carol", "member"), ("owner", "admin", "admin"), ("bob", "bob", "member")):
        assert "s" not in await group.set(actor, user, role)
    assert await group.roles() == BEFORE


async def test_outsiders_can_neither_join_a_group_nor_invite_to_it(world: World) -> None:
    group = await Group.make(world)
    for user, role in (("outsider", "member"), ("bob", "none"), ("outsider", "owner"), ("outsider", "none")):
        await group.refused("not_found", "outsider", user, role)
    assert await group.roles() == BEFORE


async def test_inviting_somebody_who_does_not_exist_is_not_found(world: World) -> None:
    group = await Group.make(world)
    await group.clients["bob"].refused("not_found", "member", c=group.conv, user="nobody-here", role="member")


async def test_a_member_leaves_a_group_by_an_entry(world: World) -> None:
    group = await Group.make(world)
    reply = await group.set("bob", "bob", "none")
    for name in ("owner", "carol", "bob"):
        assert (await group.told(name, "bob", "none"))["s"] == reply["s"]
    await group.clients["bob"].refused("not_found", "history", c=group.conv)
    assert "bob" not in await group.roles()


async def test_the_only_owner_appoints_another_before_leaving(world: World) -> None:
    group = await Group.make(world)
    await group.refused("forbidden", "owner", "owner", "none")
    await group.refused("forbidden", "owner", "owner", "member")
    await group.set("owner", "bob", "owner")
    await group.set("owner", "owner", "none")
    page = await group.clients["bob"].request("members", c=group.conv)
    assert {m["role"] for m in page["members"] if m["user"] == group.users["bob"].id} == {"owner"}


async def test_members_are_counted_from_their_entries(world: World) -> None:
    """A dismissed admin looked like a new member."""
    group = await Group.make(world)
    for actor, user, role in (
        ("owner", "admin", "member"),
        ("admin", "outsider", "member"),
        ("owner", "bob", "admin"),
        ("carol", "carol", "none"),
        ("bob", "outsider", "banned"),
        ("bob", "outsider", "member"),
        ("owner", "bob", "none"),
    ):
        await group.set(actor, user, role)
    roles: dict[str, str] = {}
    members = 0
    for entry in await world.whole_log(group.clients["owner"], group.conv):
        if entry["t"] != "member":
            continue
        user = entry["user"]
        assert entry["was"] == roles.get(user, "none"), entry
        roles[user] = entry["role"]
        members += (entry["role"] not in ("none", "banned")) - (entry["was"] not in ("none", "banned"))
    assert members == len(await group.roles()) == 3


async def test_the_last_one_may_leave(world: World) -> None:
    alice, a = await world.pair()
    conv = await world.group(a)
    await a.request("member", c=conv, user=alice.id, role="none")
    await a.refused("not_found", "history", c=conv)


# --- removing and banning ----------------------------------------------------------------


async def test_somebody_removed_gets_that_entry_last_and_nothing_after(world: World) -> None:
    group = await Group.make(world)
    await world.send(group.clients["owner"], group.conv, "before")
    removed = (await group.set("admin", "bob", "none"))["s"]
    later = (await world.send(group.clients["owner"], group.conv, "we are alone"))["s"]
    # carol is on the other worker, admin on bob's: both have got what came later.
    for name in ("carol", "admin"):
        await group.clients[name].reach(group.conv, later)
    bob = group.clients["bob"]
    await bob.request("ping")
    assert bob.log(group.conv)[-1]["s"] == removed
    assert bob.log(group.conv)[-1]["role"] == "none"
    for m in bob.received[bob.received.index(bob.log(group.conv)[-1]) + 1 :]:
        assert m.get("c") != group.conv or (m["t"], m["role"]) == ("conv", "none"), m


async def test_somebody_banned_gets_that_entry_last_and_cannot_come_back(world: World) -> None:
    group = await Group.make(world)
    banned = (await group.set("admin", "bob", "banned"))["s"]
    assert (await group.told("bob", "bob", "banned"))["s"] == banned
    for role in ("member", "owner"):
        reply = await group.clients["bob"].answer(
            await group.clients["bob"].begin("member", c=group.conv, user=group.users["bob"].id, role=role)
        )
        assert reply["code"] in ("forbidden", "not_found")
    # No member can bring him back, an admin can.
    await group.refused("forbidden", "carol", "bob", "member")
    group.clients["bob"].forget()
    await group.set("admin", "bob", "member")
    view = await group.clients["bob"].expect(t="conv", c=group.conv, role="member", after=...)
    assert view["after"] >= banned
    await world.send(group.clients["bob"], group.conv, "I am sorry")


async def test_somebody_can_be_banned_before_ever_coming(world: World) -> None:
    group = await Group.make(world)
    await group.set("admin", "outsider", "banned")
    await group.refused("forbidden", "bob", "outsider", "member")
    await group.clients["outsider"].refused("not_found", "history", c=group.conv)


async def test_somebody_removed_twice_is_told_twice(world: World) -> None:
    """Also those sessions that are not attached, which see no entries."""
    group = await Group.make(world)
    bob = group.users["bob"]
    quiet = await world.both_workers(bob, only=[])
    for client in quiet:
        client.forget()
    for _ in range(2):
        await group.set("admin", "bob", "none")
        for client in quiet:
            await client.expect(t="conv", c=group.conv, role="none")
        await group.set("admin", "bob", "member")
        for client in quiet:
            await client.expect(t="conv", c=group.conv, role="member")
    for client in quiet:
        assert client.log(group.conv) == []


async def test_somebody_removed_cannot_write_through_the_other_worker(world: World) -> None:
    group = await Group.make(world)
    bob = await world.connect(group.users["bob"], on=0), await world.connect(group.users["bob"], on=1)
    futures = []
    for i in range(20):
        futures += [(c, await c.begin("send", c=group.conv, cid=new_cid(), body=f"{i}")) for c in bob]
        if i == 10:
            await group.set("owner", "bob", "none")
    replies = [await client.answer(future) for client, future in futures]
    log = await world.whole_log(group.clients["owner"], group.conv)
    removal = next(e["s"] for e in log if e["t"] == "member" and e["role"] == "none")
    assert all(reply["s"] < removal for reply in replies if reply["t"] == "ok")
    assert {reply["code"] for reply in replies if reply["t"] == "error"} == {"not_found"}
    assert [e["s"] for e in log if e["t"] == "msg"] == sorted(reply["s"] for reply in replies if reply["t"] == "ok")


async def test_a_message_stored_before_the_removal_is_still_acknowledged_to_its_sender(world: World) -> None:
    group = await Group.make(world)
    message = {"c": group.conv, "cid": new_cid(), "body": "last words"}
    first = await group.clients["bob"].request("send", **message)
    await group.set("owner", "bob", "none")
    again = await group.clients["bob"].request("send", **message)
    assert (again["s"], again["dup"]) == (first["s"], True)


# --- appointing, and what is forbidden ---------------------------------------------------


@pytest.mark.parametrize(("user", "role"), [("bob", "admin"), ("bob", "owner"), ("admin", "member"), ("admin", "none")])
async def test_the_owner_appoints_and_removes_whom_he_appointed(world: World, user: str, role: str) -> None:
    group = await Group.make(world)
    reply = await group.set("owner", user, role)
    assert reply["s"] > 0
    for name in ("owner", "carol"):
        await group.told(name, user, role)
    roles = await group.roles()
    assert roles.get(user, "none") == role


@pytest.mark.parametrize(
    ("actor", "user", "role"),
    [
        ("bob", "carol", "none"),
        ("bob", "carol", "banned"),
        ("bob", "carol", "admin"),
        ("bob", "bob", "admin"),
        ("bob", "bob", "banned"),
        ("bob", "owner", "none"),
        ("bob", "outsider", "admin"),
        ("admin", "bob", "admin"),
        ("admin", "bob", "owner"),
        ("admin", "admin", "owner"),
        ("admin", "owner", "none"),
        ("admin", "owner", "member"),
        ("admin", "outsider", "admin"),
        ("owner", "owner", "banned"),
    ],
)
async def test_what_a_role_does_not_allow_is_forbidden_and_changes_nothing(
    world: World, actor: str, user: str, role: str
) -> None:
    group = await Group.make(world)
    head = len(await world.whole_log(group.clients["owner"], group.conv))
    await group.refused("forbidden", actor, user, role)
    assert await group.roles() == BEFORE
    assert len(await world.whole_log(group.clients["owner"], group.conv)) == head


async def test_removing_somebody_who_is_not_in_changes_nothing(world: World) -> None:
    group = await Group.make(world)
    assert "s" not in await group.set("admin", "outsider", "none")
    assert await group.roles() == BEFORE


async def test_only_a_member_can_be_appointed(world: World) -> None:
    """It was `not_found`, which a client takes for a conversation that it is no longer in."""
    group = await Group.make(world)
    for role in ("admin", "owner"):
        await group.refused("forbidden", "owner", "outsider", role)
    assert await group.roles() == BEFORE


@pytest.mark.parametrize("role", ["none", "banned", "member", "admin", "owner"])
async def test_a_dm_has_always_the_same_two(world: World, role: str) -> None:
    alice, a = await world.pair()
    bob, carol = await world.user(), await world.user()
    conv = await world.dm(a, bob)
    for user in (alice, bob, carol):
        await a.refused("forbidden", "member", c=conv, user=user.id, role=role)
    assert len((await a.request("members", c=conv))["members"]) == 2
