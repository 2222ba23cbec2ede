"""Every close code, and what brings it about."""

from __future__ import annotations

import asyncio
import json
import struct

import pytest

from .conftest import Serve
from .raw import BINARY, CLOSE, PING, PONG, TEXT, Raw, frame
from .rest import http
from .world import World, new_cid


async def _live(world: World) -> Raw:
    """A connection without manners that has logged in."""
    user = await world.user()
    raw = await world.raw()
    await raw.log_in(user.token)
    return raw


@pytest.mark.parametrize("code", [1000, 1001, 3000, 4999])
async def test_a_close_of_the_client_is_answered_with_its_code(world: World, code: int) -> None:
    raw = await _live(world)
    await raw.send(frame(CLOSE, struct.pack("!H", code) + b"bye"))
    assert (await raw.closing()).code == code
    await raw.ended()


async def test_a_close_without_a_code_is_answered_without_one(world: World) -> None:
    raw = await _live(world)
    await raw.send(frame(CLOSE, b""))
    assert (await raw.closing()).code == 1005
    await raw.ended()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(frame(TEXT, b"{}", masked=False), id="unmasked"),
        pytest.param(frame(TEXT, b"{}", rsv=4), id="rsv1"),
        pytest.param(frame(TEXT, b"{}", rsv=1), id="rsv3"),
        pytest.param(frame(3, b"{}"), id="reserved data opcode"),
        pytest.param(frame(11, b""), id="reserved control opcode"),
        pytest.param(frame(PING, b"", fin=False), id="fragmented ping"),
        pytest.param(frame(PING, b"x" * 126), id="long ping"),
        pytest.param(frame(0, b"{}"), id="continuation of nothing"),
        pytest.param(frame(TEXT, b"{", fin=False) + frame(TEXT, b"}"), id="text inside a fragmented text"),
        pytest.param(frame(CLOSE, b"x"), id="close with half a code"),
        pytest.param(frame(CLOSE, struct.pack("!H", 1005)), id="close with a code that is never sent"),
        pytest.param(frame(CLOSE, struct.pack("!H", 999)), id="close with a code below 1000"),
        pytest.param(b"\x81\xff" + struct.pack("!Q", 1 << 63), id="length of 64 bits"),
        pytest.param(b"\x81\xfe\x00\x05" + b"\0\0\0\0hello", id="length not in its shortest form"),
    ],
)
async def test_1002_what_is_not_the_websocket_protocol(world: World, data: bytes) -> None:
    raw = await _live(world)
    await raw.send(data)
    assert (await raw.closing()).code == 1002
    await raw.ended()


async def test_1003_a_binary_message(world: World) -> None:
    raw = await _live(world)
    await raw.send(frame(BINARY, b'{"t":"ping","id":1}'))
    assert (await raw.closing()).code == 1003
    await raw.ended()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(frame(TEXT, b'{"t":"\xff"}'), id="never a byte of UTF-8"),
        pytest.param(frame(TEXT, b'"\xed\xa0\x80"'), id="a surrogate"),
        pytest.param(frame(TEXT, b'"\xc0\xaf"'), id="overlong"),
        pytest.param(frame(TEXT, b'"\xe2\x82'), id="cut off"),
        pytest.param(frame(TEXT, b'"\xe2', fin=False) + frame(0, b'\x28"'), id="broken across fragments"),
        pytest.param(frame(CLOSE, struct.pack("!H", 1000) + b"\xff"), id="in the reason of a close"),
    ],
)
async def test_1007_text_that_is_not_utf8(world: World, data: bytes) -> None:
    raw = await _live(world)
    await raw.send(data)
    assert (await raw.closing()).code == 1007
    await raw.ended()


async def test_1009_a_message_over_the_limit_is_cut_off_by_its_header_alone(tight: World) -> None:
    raw = await _live(tight)
    await raw.send(b"\x81\xfe" + struct.pack("!H", 4097) + b"\0\0\0\0")
    assert (await raw.closing()).code == 1009
    await raw.ended()


async def test_1009_fragments_that_are_too_much_together(tight: World) -> None:
    raw = await _live(tight)
    await raw.send(frame(TEXT, b"x" * 4000, fin=False) + frame(0, b"x" * 97))
    assert await raw.closing() == (1009, "the message is too large")
    await raw.ended()


async def test_a_message_of_exactly_the_limit_in_fragments_with_a_ping_in_between_is_taken(tight: World) -> None:
    raw = await _live(tight)
    text = json.dumps({"t": "ping", "id": 5, "pad": ""}).encode()
    text = text.replace(b'""', b'"' + b"x" * (4096 - len(text)) + b'"')
    assert len(text) == 4096
    await raw.send(frame(TEXT, text[:1000], fin=False) + frame(PING, b"still there?") + frame(0, text[1000:]))
    pong = await raw.frame()
    assert (pong.opcode, pong.payload) == (PONG, b"still there?")
    assert (await raw.message("ok"))["id"] == 5


async def test_1013_over_capacity_is_told_after_the_upgrade_and_there_is_room_again(serve: Serve) -> None:
    server = serve(settings={"limits.connections_per_worker": 2})
    held: list[Raw] = []

    async def come() -> int | None:
        """Connect; the slot of the worker that is full (None: welcome, and kept)."""
        raw = await Raw.open(server.address)
        await raw.upgrade()
        first = await raw.frame()
        if first.opcode != CLOSE:
            assert first.json["t"] == "hello"
            held.append(raw)
            return None
        assert struct.unpack("!H", first.payload[:2]) == (1013,)
        slot = server.slot_of(raw.port)
        raw.close()
        return slot

    try:
        full: set[int | None] = set()
        while not full >= {0, 1}:
            full.add(await come())
        assert len(held) == 4
        assert (await http(server.address, "GET", "/healthz")).status == 200, "HTTP has its own limit"
        held.pop().close()
        while len(held) < 4:
            await come()
    finally:
        for raw in held:
            raw.close()


async def test_4003_a_client_that_is_silent_for_two_intervals(hasty: World) -> None:
    user = await hasty.user()
    raw = await hasty.raw()
    await raw.log_in(user.token, ping_ms=200)
    pings = 0
    while (received := await raw.frame()).opcode != CLOSE:
        pings += received.opcode == PING
    assert struct.unpack("!H", received.payload[:2]) == (4003,)
    assert received.payload[2:] == b"no sign of life for two intervals of pings"
    assert pings >= 1
    await raw.ended()


async def test_any_frame_counts_as_a_sign_of_life(hasty: World) -> None:
    user = await hasty.user()
    raw = await hasty.raw()
    await raw.log_in(user.token, ping_ms=200)
    for i in range(3):
        while (received := await raw.frame()).opcode != PING:
            assert received.opcode != CLOSE
        await raw.send_json(t="ping", id=i + 1)  # not the pong that was asked for


async def test_4004_flooding(serve: Serve) -> None:
    settings = {"rates.messages_per_s": 1, "rates.messages_burst": 10, "rates.messages_refused": 10}
    world = World(serve(settings=settings))
    try:
        raw = await _live(world)
        other = await world.connect(await world.user())
        await raw.send(frame(TEXT, b'{"t":"ping","id":1}') * 60)
        assert await raw.closing() == (4004, "flooding: too many messages over the rate")
        await raw.ended()
        await other.request("ping")
        # Pings of the WebSocket count too.
        raw = await _live(world)
        await raw.send(frame(PING, b"") * 60)
        assert (await raw.closing()).code == 4004
    finally:
        await world.aclose()


async def test_4005_no_auth_in_time_whatever_else_is_sent(hasty: World) -> None:
    silent, busy = await hasty.raw(), await hasty.raw()
    await busy.send_json(t="ping", id=1)
    assert (await busy.message("error"))["code"] == "unauthenticated"
    for raw in (silent, busy):
        assert await raw.closing() == (4005, "no successful auth in time")
        await raw.ended()


# --- tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "nonsense", "x" * 5000, "\u00e9\0"])
async def test_4101_a_bad_token(world: World, token: str) -> None:
    client = await world.open()
    await client.tell("auth", id=1, v=1, token=token)
    assert (await client.end()).code == 4101


async def test_4101_a_revoked_token_ends_its_sessions_on_every_worker_and_no_others(world: World) -> None:
    alice = await world.user()
    kept = await world.connect(await world.login(alice))
    sessions = await world.both_workers(alice)
    assert (await world.http("DELETE", "/v1/sessions/current", token=alice.token)).status == 204
    for client in sessions:
        assert (await client.end()).code == 4101
    await world.worthless(alice.token)
    await kept.request("ping")


async def test_4101_an_expired_token_and_a_session_whose_token_expires(serve: Serve) -> None:
    world = World(serve(settings={"accounts.token_ttl_ms": 3000}))
    try:
        alice, a = await world.pair()
        bob, b = await world.pair()
        ended = asyncio.create_task(a.end())
        # `auth` on a live session renews its token. Hers is not renewed, and ends.
        while not ended.done():
            assert (await b.request("auth", v=1, token=bob.token))["expires_ms"] > 0
            await asyncio.wait([ended], timeout=0.2)
        assert ended.result().code == 4101
        late = await world.open()
        await late.tell("auth", id=1, v=1, token=alice.token)
        assert (await late.end()).code == 4101
        assert (await world.http("GET", "/v1/me", token=alice.token)).status == 401
        await b.request("ping")
    finally:
        await world.aclose()


async def test_4101_a_disabled_user_is_cut_off_on_every_worker(world: World) -> None:
    alice = await world.user()
    sessions = await world.both_workers(alice)
    other = await world.connect(await world.user())
    done = await world.command("user", "disable", alice.name)
    assert done.returncode == 0, done.stderr
    for client in sessions:
        assert (await client.end()).code == 4101
    await world.worthless(alice.token)
    body = {"name": alice.name, "password": "correct horse"}
    assert (await world.http("POST", "/v1/sessions", body=body)).status == 401
    await other.request("ping")


async def test_4101_a_bad_token_on_a_live_session(world: World) -> None:
    _, a = await world.pair()
    await a.tell("auth", id=9, v=1, token="nonsense")
    assert (await a.end()).code == 4101


# --- the rest ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, -1, 10**9])
async def test_4102_another_version_of_the_protocol(world: World, version: int) -> None:
    user = await world.user()
    client = await world.open()
    await client.tell("auth", id=1, v=version, token=user.token)
    assert (await client.end()).code == 4102


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "ping", "{", '{"t":"ping"', "[]", '[{"t":"ping","id":1}]', '"text"', "7", "null", "{'t':'ping'}"),
        *("[" * 20000, '{"t":"ping","id":1}{"t":"ping","id":2}', '{"t":"ping","id":1,}', '\ufeff{"t":"ping"}'),
    ],
)
@pytest.mark.parametrize("live", [True, False])
async def test_4103_what_is_no_json_object(world: World, text: str, live: bool) -> None:
    client = (await world.pair())[1] if live else await world.open()
    await client.raw(text)
    assert (await client.end()).code == 4103


async def test_4104_the_users_oldest_connection_is_closed_if_there_are_too_many(tight: World) -> None:
    user = await tight.user()
    clients = [await tight.connect(user, on=0) for _ in range(3)]
    other = await tight.connect(await tight.user(), on=0)
    newest = await tight.connect(user, on=0)
    assert (await clients[0].end()).code == 4104
    for client in (*clients[1:], newest, other):
        await client.request("ping")


async def test_a_message_sent_just_before_the_close_is_stored_and_told(world: World) -> None:
    _, a = await world.pair(on=0)
    bob, b = await world.pair(on=1)
    conv = await world.group(a, bob)
    await b.expect(t="conv", c=conv)
    cid = new_cid()
    await a.tell("send", c=conv, cid=cid, body="last words")
    await a.close()
    await b.expect(t="msg", c=conv, cid=cid)
