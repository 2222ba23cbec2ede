"""The client's requests and events against a real server with two workers."""

from __future__ import annotations

import asyncio

import pytest

from chatcore.client import (
    Client,
    ConversationChanged,
    ConversationGone,
    MemberChanged,
    Message,
    MetaChanged,
    Presence,
    ReadMark,
    Ready,
    TokenRejected,
    Typing,
)
from chatcore.client.errors import Conflict, Forbidden, NotFound, TooLarge, Unauthenticated

from .helpers import PASSWORD, bodies, fresh, login, until


async def test_ten_lines(url: str) -> None:
    async with await Client.login(url, fresh("alice"), PASSWORD, register=True) as chat:
        room = await chat.channel(fresh("lobby"))
        sent = await chat.send(room, "hello")
        message = await until(chat, Message)
    assert (message.body, message.seq, message.cid) == ("hello", sent.seq, sent.cid)
    assert message.sender == chat.user.id


async def test_a_wrong_password_is_unauthenticated_and_registers_nothing(url: str) -> None:
    name = fresh()
    async with await login(url, name):
        pass
    with pytest.raises(Unauthenticated):
        await Client.login(url, name, "wrong horse")
    with pytest.raises(Unauthenticated):
        await Client.login(url, name, "wrong horse", register=True)


async def test_nobody_there_is_an_oserror() -> None:
    with pytest.raises(OSError, match="refused"):
        await Client.login("http://127.0.0.1:1", "alice", PASSWORD)


async def test_a_group_from_its_opening_to_its_end(url: str) -> None:
    async with await login(url) as alice, await login(url) as bob, await login(url) as carol:
        group = await alice.open("group", title="plan", members=[bob.user.id])
        changed = await until(bob, ConversationChanged, lambda e: e.conversation.id == group)
        assert (changed.conversation.kind, changed.conversation.title) == ("group", "plan")

        assert await alice.invite(group, carol.user.id) is not None
        added = await until(bob, MemberChanged, lambda e: e.user == carol.user.id)
        assert (added.role, added.sender) == ("member", alice.user.id)
        await carol.view(group)

        await alice.set_title(group, "better plan")
        assert (await until(bob, MetaChanged, lambda e: e.title != "plan")).title == "better plan"
        assert bob.conversations[group].title == "better plan"

        page = await alice.members(group, limit=2)
        rest = await alice.members(group, after=page.next)
        roles = {member.user: member.role for member in page.members + rest.members}
        assert roles == {alice.user.id: "owner", bob.user.id: "member", carol.user.id: "member"}

        await bob.send(group, "hi")
        said = await until(carol, Message, lambda e: e.conv == group)
        await carol.read(group, said.seq)
        assert carol.conversations[group].unread == 0
        mark = await until(alice, ReadMark, lambda e: e.user == carol.user.id)
        assert mark.upto == said.seq

        carol.typing(group)
        assert (await until(bob, Typing)).user == carol.user.id

        await bob.notify(group, "none")
        with pytest.raises(Forbidden):
            await bob.remove(group, carol.user.id)
        await alice.remove(group, carol.user.id)
        gone = await until(carol, ConversationGone, lambda e: e.conv == group)
        assert gone.conv not in carol.conversations
        with pytest.raises(NotFound):
            await carol.send(group, "still here?")

        await bob.leave(group)
        assert group not in bob.conversations


async def test_a_dm_by_name_is_the_same_from_both_sides(url: str) -> None:
    name = fresh("bob")
    async with await login(url) as alice, await login(url, name) as bob:
        ours = await alice.dm(name)
        assert await bob.open("dm", members=[alice.user.id]) == ours
        peer = alice.conversations[ours].peer
        assert peer is not None
        assert (peer.id, peer.name) == (bob.user.id, name)
        with pytest.raises(NotFound):
            await alice.dm(fresh("nobody"))


async def test_block_keeps_new_dms_away(url: str) -> None:
    async with await login(url) as alice, await login(url) as bob:
        await bob.block(alice.user.id)
        with pytest.raises(Forbidden):
            await alice.open("dm", members=[bob.user.id])
        await bob.block(alice.user.id, on=False)
        await alice.open("dm", members=[bob.user.id])


async def test_presence_of_watched_users(url: str) -> None:
    name = fresh("bob")
    async with await login(url) as alice:
        async with await login(url, name) as bob:
            await alice.dm(name)
            (now,) = await alice.watch([bob.user.id])
            if now.state != "online":  # known on another worker, and on its way from there
                now = await until(alice, Presence)
            assert (now.user, now.state) == (bob.user.id, "online")
        away = await until(alice, Presence)
        while away.state != "offline":
            away = await until(alice, Presence)
        assert away.user == bob.user.id


async def test_names_users_and_ping(url: str) -> None:
    name = fresh("alice")
    async with await login(url, name) as alice:
        assert [user.name for user in await alice.users([alice.user.id, "nobody-of-this-id"])] == [name]
        assert await alice.name_of(alice.user.id) == name
        assert await alice.name_of("nobody") == "nobody"
        assert await alice.ping() > 1_700_000_000_000


async def test_history_in_pages(url: str) -> None:
    async with await login(url) as chat:
        room = await chat.channel(fresh("lobby"))
        sent = [await chat.send(room, str(n)) for n in range(5)]
        newest = await chat.history(room, limit=2)
        assert [e.seq for e in newest.entries] == [s.seq for s in sent[-2:]]
        assert newest.more
        before = await chat.history(room, before=sent[3].seq, limit=2)
        assert [e.seq for e in before.entries] == [s.seq for s in sent[1:3]]
        after = await chat.history(room, after=sent[3].seq)
        assert [e.seq for e in after.entries] == [sent[4].seq]
        assert not after.more


async def test_a_refused_message_is_refused_once_and_the_next_goes_out(url: str) -> None:
    async with await login(url) as chat:
        room = await chat.channel(fresh("lobby"))
        too_large = chat.post(room, "x" * 9000)
        too_large_frame = chat.post(room, "x" * 70_000)
        fine = chat.post(room, "fine")
        with pytest.raises(TooLarge):
            await too_large
        with pytest.raises(TooLarge):
            await too_large_frame
        await fine
        assert (await until(chat, Message)).body == "fine"


async def test_a_cid_used_again_is_the_same_message_or_a_conflict(url: str) -> None:
    async with await login(url) as chat:
        room = await chat.channel(fresh("lobby"))
        first = await chat.send(room, "hi", cid="the-same-cid-again")
        again = await chat.send(room, "hi", cid="the-same-cid-again")
        assert (again.seq, again.dup) == (first.seq, True)
        with pytest.raises(Conflict):
            await chat.send(room, "something else", cid="the-same-cid-again")


async def test_only_attached_conversations_push_entries(url: str) -> None:
    async with await login(url) as alice:
        loud, quiet = await alice.channel(fresh("loud")), await alice.channel(fresh("quiet"))
        await alice.attach([quiet])
        await alice.send(loud, "unheard")
        await alice.send(quiet, "heard")
        assert (await until(alice, Message)).body == "heard"
        await alice.attach(None)
        assert (await until(alice, Message)).body == "unheard"


async def test_a_revoked_token_ends_the_client_with_its_error(url: str) -> None:
    async with await login(url) as chat:
        await until(chat, Ready)
        await chat.logout()
        with pytest.raises(TokenRejected):
            await until(chat, MetaChanged)
        with pytest.raises(TokenRejected):
            await chat.users([])
    with pytest.raises(TokenRejected):
        async with Client(url, chat.token):
            pass


async def test_those_who_make_the_same_channel_at_once_end_in_the_same(url: str) -> None:
    title = fresh("lobby")
    clients = [await login(url) for _ in range(6)]
    try:
        await asyncio.gather(*(chat.start() for chat in clients))
        ids = await asyncio.gather(*(chat.channel(title) for chat in clients))
        assert len(set(ids)) == 1
        for chat in clients:
            titles = [view.title for view in chat.conversations.values()]
            assert titles == [title], "the others were left again"
        async with await login(url) as late:
            assert await late.channel(title.upper()) == ids[0]
    finally:
        await asyncio.gather(*(chat.close() for chat in clients))


async def test_a_slow_application_loses_nothing_and_can_still_send(url: str) -> None:
    async with await login(url) as alice, await login(url, queue=20) as slow:
        group = await alice.open("group", members=[slow.user.id])
        await slow.view(group)
        for n in range(300):
            alice.post(group, str(n))
        await alice.flush()
        # Its queue is full and nobody reads it; the answer to this must come all the same.
        sent = await slow.send(group, "I am slow")
        got = await bodies(slow, group, 301)
        assert [m.body for m in got] == [*map(str, range(300)), "I am slow"]
        assert [m.seq for m in got] == list(range(sent.seq - 300, sent.seq + 1))


async def test_closing_ends_events_requests_and_tasks(url: str) -> None:
    before = asyncio.all_tasks()
    chat = await login(url)
    await chat.start()
    reading = asyncio.create_task(until(chat, Message))
    await chat.close()
    with pytest.raises(AssertionError, match="ended"):
        await reading
    assert asyncio.all_tasks() == before
