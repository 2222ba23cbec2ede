"""Sending: stored once, in one order, pushed to all members on every worker."""

from __future__ import annotations

import asyncio
import time

import pytest

from .conftest import Serve
from .world import World, new_cid


async def test_a_message_reaches_members_on_both_workers_with_all_its_fields(world: World) -> None:
    alice, a0 = await world.pair(on=0)
    bob = await world.user()
    b0, b1 = await world.both_workers(bob)
    conv = await world.group(a0, bob)
    cid = new_cid()
    reply = await a0.request("send", c=conv, cid=cid, body="hé 👋", re=1, data='{"x":1}')
    assert set(reply) == {"t", "id", "s", "ts"}
    assert abs(reply["ts"] - time.time() * 1000) < 60_000
    for client in (a0, b0, b1):
        entry = await client.expect(t="msg", c=conv, s=reply["s"])
        assert entry == {
            "t": "msg",
            "c": conv,
            "s": reply["s"],
            "from": alice.id,
            "ts": reply["ts"],
            "cid": cid,
            "body": "hé 👋",
            "re": 1,
            "data": '{"x":1}',
        }


async def test_all_sessions_of_the_sender_get_the_message_too(world: World) -> None:
    alice = await world.user()
    a0, a1 = await world.both_workers(alice)
    conv = await world.group(a0)
    await a1.expect(t="conv", c=conv, after=...)
    reply = await world.send(a1, conv)
    for client in (a0, a1):
        await client.expect(t="msg", c=conv, s=reply["s"])


async def test_data_alone_is_a_message(world: World) -> None:
    _, a = await world.pair()
    conv = await world.group(a)
    reply = await a.request("send", c=conv, cid=new_cid(), body="", data="payload")
    assert (await a.expect(t="msg", s=reply["s"]))["data"] == "payload"


async def test_the_same_cid_returns_the_first_result_from_any_worker(world: World) -> None:
    alice = await world.user()
    a0, a1 = await world.both_workers(alice)
    conv = await world.group(a0)
    message = {"c": conv, "cid": new_cid(), "body": "once"}
    first = await a0.request("send", **message)
    assert "dup" not in first
    for client in (a0, a1, a0):
        again = await client.request("send", **message)
        assert (again["s"], again["ts"], again["dup"]) == (first["s"], first["ts"], True)
    assert [entry["cid"] for entry in await world.whole_log(a1, conv)].count(message["cid"]) == 1


async def test_the_same_cid_at_the_same_time_on_both_workers_is_stored_once(world: World) -> None:
    alice = await world.user()
    clients = [await world.connect(alice, on=slot) for slot in (0, 1, 0, 1)]
    conv = await world.group(clients[0])
    for _ in range(5):
        message = {"c": conv, "cid": new_cid(), "body": "once"}
        futures = [await client.begin("send", **message) for client in clients]
        replies = [await client.answer(future) for client, future in zip(clients, futures, strict=True)]
        assert len({reply["s"] for reply in replies}) == 1, replies
        assert sum("dup" not in reply for reply in replies) == 1
    assert len(await world.whole_log(clients[0], conv)) == replies[0]["s"]


async def test_the_same_cid_returns_the_first_result_after_a_restart(serve: Serve) -> None:
    server = serve()
    world = World(server)
    try:
        alice, a = await world.pair()
        conv = await world.group(a)
        message = {"c": conv, "cid": new_cid(), "body": "once"}
        first = await a.request("send", **message)
        await asyncio.to_thread(server.stop)
        assert (await a.end()).code == 1012
        await asyncio.to_thread(server.start)
        for slot in (0, 1):
            client = await world.connect(alice, on=slot)
            again = await client.request("send", **message)
            assert (again["s"], again["ts"], again["dup"]) == (first["s"], first["ts"], True)
            assert len(await world.whole_log(client, conv)) == first["s"]
    finally:
        await world.aclose()


@pytest.mark.parametrize("other", [{"body": "other"}, {"data": "more"}, {"re": 1}])
async def test_a_cid_used_again_for_something_else_is_a_conflict(world: World, other: dict[str, object]) -> None:
    alice = await world.user()
    a0, a1 = await world.both_workers(alice)
    conv = await world.group(a0)
    message = {"c": conv, "cid": new_cid(), "body": "first"}
    first = await a0.request("send", **message)
    for client in (a0, a1):
        reply = await client.refused("conflict", "send", **{**message, **other})
        assert "retry_after_ms" not in reply
    log = await world.whole_log(a1, conv)
    assert len(log) == first["s"]
    assert log[-1]["body"] == "first"


async def test_a_cid_belongs_to_one_user_and_one_conversation(world: World) -> None:
    _, a = await world.pair()
    bob, b = await world.pair()
    one, two = await world.group(a, bob), await world.group(a, bob)
    await b.expect(t="conv", c=two)
    cid = new_cid()
    for client, conv in ((a, one), (a, two), (b, one), (b, two)):
        assert "dup" not in await client.request("send", c=conv, cid=cid, body="mine")


async def test_sends_outstanding_at_the_same_time_keep_their_order(world: World) -> None:
    _, a = await world.pair()
    conv = await world.group(a)
    futures = [await a.begin("send", c=conv, cid=new_cid(), body=str(i)) for i in range(60)]
    seqs = [(await a.answer(future))["s"] for future in futures]
    assert seqs == list(range(seqs[0], seqs[0] + 60))
    bodies = [entry["body"] for entry in await world.whole_log(a, conv) if entry["t"] == "msg"]
    assert bodies == [str(i) for i in range(60)]


async def test_everybody_sees_one_order_without_holes_whoever_sends_where(world: World) -> None:
    users = [await world.user() for _ in range(4)]
    clients = [await world.connect(user, on=i % 2) for i, user in enumerate(users)]
    conv = await world.group(clients[0], *users[1:])
    for client in clients[1:]:
        await client.expect(t="conv", c=conv, after=...)
    lasts = await asyncio.gather(
        *(world.fill(client, conv, 40, user.id) for client, user in zip(clients, users, strict=True))
    )
    last = max(lasts)
    log = await world.whole_log(clients[0], conv)
    assert len(log) == last
    for client in clients:
        assert await client.reach(conv, last) == log[client.after(conv) :]
    for user in users:
        mine = [entry["body"] for entry in log if entry["t"] == "msg" and entry["from"] == user.id]
        assert mine == [f"{user.id} {i}" for i in range(40)]


async def test_what_is_sent_after_an_ok_comes_after_it_whoever_sends_it(world: World) -> None:
    _, a = await world.pair(on=0)
    bob, b = await world.pair(on=1)
    conv = await world.group(a, bob)
    await b.expect(t="conv", c=conv)
    before = 0
    for client in (a, b) * 10:
        seq = (await world.send(client, conv))["s"]
        assert seq > before
        before = seq


async def test_a_body_of_exactly_the_limit_is_taken_and_one_byte_more_is_too_large(tight: World) -> None:
    _, a = await tight.pair()
    conv = await tight.group(a)
    await tight.send(a, conv, "x" * 100)
    await tight.send(a, conv, "é" * 50)  # bytes count, not characters
    head = (await tight.send(a, conv, "ok", data="d" * 100))["s"]
    for fields in ({"body": "x" * 101}, {"body": "é" * 50 + "x"}, {"body": "ok", "data": "d" * 101}):
        reply = await a.refused("too_large", "send", c=conv, cid=new_cid(), **fields)
        assert "retry_after_ms" not in reply
    assert len(await tight.whole_log(a, conv)) == head


async def test_a_refused_send_does_not_take_its_cid(tight: World) -> None:
    _, a = await tight.pair()
    conv = await tight.group(a)
    cid = new_cid()
    await a.refused("too_large", "send", c=conv, cid=cid, body="x" * 101)
    assert "dup" not in await a.request("send", c=conv, cid=cid, body="short")


async def test_files_are_refused_not_lost(world: World) -> None:
    _, a = await world.pair()
    conv = await world.group(a)
    await a.refused("bad_request", "send", c=conv, cid=new_cid(), body="see", files=["f1"])
    assert "msg" not in [entry["t"] for entry in await world.whole_log(a, conv)]


async def test_a_message_with_nothing_in_it_is_a_bad_request(world: World) -> None:
    _, a = await world.pair()
    conv = await world.group(a)
    await a.refused("bad_request", "send", c=conv, cid=new_cid(), body="")
