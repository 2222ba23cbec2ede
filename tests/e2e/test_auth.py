"""Logging in on a connection: `hello`, `auth` and its renewal, `ready`."""

from __future__ import annotations

import asyncio
import json

from .raw import PING, PONG, TEXT, Raw, frame, handshake
from .world import World, new_cid


async def test_hello_tells_version_timeouts_features_and_limits(world: World) -> None:
    client = await world.open()
    (hello,) = client.got(t="hello")
    assert hello["v"] == 1
    assert hello["server"].startswith("chatcore/")
    assert hello["auth_ms"] == 10_000
    assert hello["ping_ms"] == 25_000
    assert isinstance(hello["features"], list)
    limits = hello["limits"]
    assert limits == {
        "frame": 65536,
        "body": 8192,
        "data": 8192,
        "have": 1000,
        "only": 100,
        "history": 100,
        "backlog": 500,
        "small": 100,
        "title": 100,
        "name": 32,
        "open_members": 100,
        "watch": 500,
        "users": 100,
        "members": 100,
        "channels": 100,
        "outstanding": 64,
        "rate": 10_000,  # of the tests' servers
        "burst": 10_000,
        "refused": 10_000,
        "typing_ms": 3000,
    }


async def test_hello_tells_the_limits_that_count(tight: World) -> None:
    """Limits that an operator may set and a client had to guess: title, watch, outstanding requests …"""
    client = await tight.open()
    limits = client.got(t="hello")[0]["limits"]
    assert {name: limits[name] for name in ("data", "title", "watch", "users", "members", "open_members")} == {
        "data": 100,
        "title": 20,
        "watch": 3,
        "users": 3,
        "members": 3,
        "open_members": 3,
    }
    assert limits["outstanding"] == 8


async def test_auth_tells_who_it_is_and_how_long_the_token_lives(world: World) -> None:
    user = await world.user("alice")
    client = await world.open()
    reply = await client.request("auth", v=1, token=user.token)
    assert reply["user"] == {"id": user.id, "name": user.name}
    assert 0 < reply["expires_ms"] <= 30 * 24 * 3600 * 1000
    assert reply["full"] is True
    ready = await client.expect(t="ready")
    assert isinstance(ready["sync"], str)


async def test_connections_reach_both_workers(world: World) -> None:
    user = await world.user()
    for slot in (0, 1):
        client = await world.connect(user, on=slot)
        assert world.server.slot_of(client.port) == slot


async def test_the_subprotocol_is_echoed_if_it_is_offered(world: World) -> None:
    assert (await world.open()).ws.subprotocol == "chatcore.v1"
    assert (await world.open(subprotocol=False)).ws.subprotocol is None


async def test_the_client_need_not_wait_for_hello(world: World) -> None:
    user = await world.user()
    raw = await Raw.open(world.server.address)
    world.raws.append(raw)
    auth = json.dumps({"t": "auth", "id": 1, "v": 1, "token": user.token}).encode()
    await raw.send(handshake() + frame(TEXT, auth))
    await raw.head()
    assert (await raw.frame()).json["t"] == "hello"
    assert (await raw.frame()).json["t"] == "ok"
    await raw.message("ready")


async def test_every_request_before_auth_is_unauthenticated_and_the_connection_stays_open(world: World) -> None:
    user = await world.user()
    client = await world.open()
    for t, fields in (
        ("send", {"c": "c1", "cid": "x", "body": "hi"}),
        ("history", {"c": "c1"}),
        ("attach", {}),
        ("read", {"c": "c1", "upto": 1}),
        ("typing", {"c": "c1"}),
        ("open", {"kind": "group", "cid": "x"}),
        ("member", {"c": "c1", "user": user.id, "role": "member"}),
        ("meta", {"c": "c1", "title": "t", "cid": "x"}),
        ("notify", {"c": "c1", "level": "all"}),
        ("members", {"c": "c1"}),
        ("users", {"ids": [user.id]}),
        ("channels", {}),
        ("watch", {"users": [user.id]}),
        ("block", {"user": user.id, "on": True}),
        ("ping", {}),
    ):
        reply = await client.refused("unauthenticated", t, **fields)
        assert "retry_after_ms" not in reply
    assert (await client.request("auth", v=1, token=user.token))["user"]["id"] == user.id


async def test_requests_sent_right_behind_auth_wait_for_it_and_are_answered(world: World) -> None:
    alice, a = await world.pair()
    conv = await world.group(a)
    client = await world.open()
    futures = [
        await client.begin("auth", v=1, token=alice.token),
        await client.begin("send", c=conv, cid=new_cid(), body="first"),
        await client.begin("send", c=conv, cid=new_cid(), body="second"),
        await client.begin("ping"),
    ]
    replies = [await client.answer(future) for future in futures]
    assert [reply["t"] for reply in replies] == ["ok"] * 4
    assert replies[1]["s"] < replies[2]["s"]
    # Both messages came while it was being attached: once each, all the same.
    await a.reach(conv, replies[2]["s"])
    await client.expect(t="ready")
    await world.send(a, conv, "third")
    await client.reach(conv, replies[2]["s"] + 1)
    await a.reach(conv, replies[2]["s"] + 1)
    after = client.got(t="conv", c=conv)[0]["after"]
    assert client.seqs(conv) == list(range(after + 1, replies[2]["s"] + 2))


async def test_a_request_without_an_id_is_done_and_not_answered(world: World) -> None:
    _, a = await world.pair()
    conv = await world.group(a)
    await a.tell("send", c=conv, cid="quiet", body="psst")
    await a.expect(t="msg", c=conv, cid="quiet")
    await a.tell("history", c="nowhere")  # without an id, no error is sent
    await a.request("ping")
    replies = [m for m in a.received if m["t"] in ("ok", "error")]
    assert all("id" in reply for reply in replies)
    assert [reply["t"] for reply in replies] == ["ok"] * len(replies)


async def test_replies_may_come_in_any_order_but_each_has_the_id_of_its_request(world: World) -> None:
    _, a = await world.pair()
    conv = await world.group(a)
    await a.raw(json.dumps({"t": "ping", "id": 2**31 - 1}))
    await a.expect(t="ok", id=2**31 - 1, ts=...)
    futures = [await a.begin("send", c=conv, cid=new_cid(), body="x") for _ in range(5)]
    futures.append(await a.begin("ping"))
    for future in futures:
        assert (await a.answer(future))["t"] == "ok"


async def test_auth_renews_the_token_of_a_live_session(world: World) -> None:
    alice, client = await world.pair()
    fresh = await world.login(alice)
    reply = await client.request("auth", v=1, token=fresh.token)
    assert reply["user"]["id"] == alice.id
    assert reply["expires_ms"] > 0
    # The old token may go now; another session with it is cut off, this one is not.
    other = await world.connect(alice)
    assert (await world.http("DELETE", "/v1/sessions/current", token=alice.token)).status == 204
    assert (await other.end()).code == 4101
    await client.request("ping")
    # The new one is what the session depends on.
    assert (await world.http("DELETE", "/v1/sessions/current", token=fresh.token)).status == 204
    assert (await client.end()).code == 4101


async def test_renewal_with_a_token_of_another_user_is_forbidden(world: World) -> None:
    alice, a = await world.pair()
    bob = await world.user()
    await a.refused("forbidden", "auth", v=1, token=bob.token)
    assert (await a.request("users", ids=[alice.id]))["users"] == [{"id": alice.id, "name": alice.name}]


async def test_a_refused_auth_leaves_the_connection_open_for_another(world: World) -> None:
    user = await world.user()
    client = await world.open()
    for fields in ({}, {"token": 5}, {"token": user.token, "have": {"c": -1}}, {"token": user.token, "only": "c"}):
        await client.refused("bad_request", "auth", v=1, **fields)
    await client.request("auth", v=1, token=user.token)
    await client.expect(t="ready")


async def test_too_much_in_auth_is_too_large_and_leaves_the_connection_open(tight: World) -> None:
    user = await tight.user()
    client = await tight.open()
    have = {f"c{i}": 1 for i in range(6)}
    await client.refused("too_large", "auth", v=1, token=user.token, have=have)
    await client.refused("too_large", "auth", v=1, token=user.token, only=["a", "b", "c", "d"])
    await client.request("auth", v=1, token=user.token, have=dict(list(have.items())[:5]), only=["a", "b", "c"])


async def test_the_client_chooses_how_often_it_is_pinged(hasty: World) -> None:
    user = await hasty.user()
    raw = await hasty.raw()
    await raw.log_in(user.token, ping_ms=1)  # no more often than the server's least
    loop = asyncio.get_running_loop()
    begin = loop.time()
    for _ in range(3):
        while (await raw.frame()).opcode != PING:
            pass
        await raw.send(frame(PONG, b""))
    assert 1.5 < loop.time() - begin < 10, "three pings, about 1 s apart"


async def test_unknown_fields_are_ignored(world: World) -> None:
    user = await world.user()
    client = await world.open()
    await client.request("auth", v=1, token=user.token, colour="red", device={"os": "none"})
    await client.request("ping", later=True)
