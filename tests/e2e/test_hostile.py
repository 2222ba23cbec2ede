"""Clients that mean harm, and bad luck at the worst moment. Each test is a bug that was found by reading the code."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..server import Backend, Server
from .client import Client, Refused
from .conftest import Serve
from .raw import TEXT, frame
from .rest import Http, encode
from .world import PASSWORD, World, new_cid, until

# As large as a text may be, and each byte of it is six in JSON: entries of 48 KiB.
LARGE = "\x01" * 8192


@pytest.fixture(scope="module")
def lean_server(tmp_path_factory: pytest.TempPathFactory, backend: Backend) -> Iterator[Server]:
    """A server that holds little for its clients, so that a few large messages are much."""
    serve = Serve(tmp_path_factory.mktemp("lean"), backend)
    yield serve(settings={"limits.outbox_bytes": 65_536, "limits.outbox_low_water_bytes": 1_024})
    serve.end()


@pytest.fixture
def lean(lean_server: Server) -> World:
    return World(lean_server)


# --- large messages ------------------------------------------------------------------------------


async def test_large_last_messages_in_many_conversations_lock_nobody_out(lean: World) -> None:
    """An attacker could lock a user out by some groups with a large message in each: all the `conv` pushes of a
    log-in were queued at once, which was more than an outbox may hold, so each log-in ended with 4002.
    """
    _, m = await lean.pair(only=[])
    victim = await lean.user()
    convs = []
    for i in range(24):
        convs.append(await lean.group(m, victim, title=f"g{i}"))
        await lean.send(m, convs[-1], LARGE)
    for slot in (0, 1):
        client = await lean.connect(victim, on=slot)  # waits for `ready`
        told = client.got(t="conv")
        assert [view["c"] for view in told] == convs[::-1]
        assert all(view["last"]["body"] == LARGE for view in told)
        await client.request("ping")
        assert client.closed is None


async def _burst(world: World, sender: Client, conv: str, count: int) -> int:
    """Send large messages that are all committed together, as a store does that was held up; the last seq."""
    with world.server.backend.stall(world.server.data):
        replies = [await sender.begin("send", c=conv, cid=new_cid(), body=LARGE) for _ in range(count)]
        # A request that needs no store is answered once all before it were received.
        await sender.request("ping")
    done = [await sender.answer(reply) for reply in replies]
    assert [reply["t"] for reply in done] == ["ok"] * count
    return max(reply["s"] for reply in done)


async def test_a_burst_of_large_messages_cuts_off_nobody_who_reads(world: World) -> None:
    """63 sends at once, three megabytes in one commit: every attached client was over the limit of the outbox before
    the first byte could be sent, and the whole conversation was cut off with 4002. A client that had been away
    was cut off at each try to resume, since the replay queued as much at once.
    """
    _, m = await world.pair(on=0)
    victim = await world.user()
    conv = await world.group(m, victim)
    away = await world.connect(victim)
    sync, held = away.got(t="ready")[0]["sync"], away.got(t="conv", c=conv)[0]["head"]
    await away.close()
    readers = [await world.connect(victim, on=slot) for slot in (0, 1)]
    last = await _burst(world, m, conv, 63)
    for reader in readers:
        await reader.reach(conv, last)
        assert reader.seqs(conv) == list(range(held + 1, last + 1))
        assert reader.closed is None
        await reader.close()
    for slot in (0, 1):
        client = await world.connect(victim, on=slot, sync=sync, have={conv: held})
        assert client.got(t="ok")[0]["full"] is False
        await client.reach(conv, last)
        assert client.seqs(conv) == list(range(held + 1, last + 1))
        await client.request("ping")
        assert client.closed is None


async def test_many_large_entries_are_resumed_where_an_outbox_holds_one(lean: World) -> None:
    """A replay queued up to 100 entries of the ring at once, whatever their size."""
    _, m = await lean.pair(on=0, only=[])
    victim = await lean.user()
    conv = await lean.group(m, victim)
    away = await lean.connect(victim)
    sync, held = away.got(t="ready")[0]["sync"], away.got(t="conv", c=conv)[0]["head"]
    await away.close()
    last = await lean.fill(m, conv, 60, LARGE[:8000])
    for slot in (0, 1):
        client = await lean.connect(victim, on=slot, sync=sync, have={conv: held})
        await client.reach(conv, last)
        assert client.seqs(conv) == list(range(held + 1, last + 1))
        await client.request("ping")
        assert client.closed is None


# --- HTTP ----------------------------------------------------------------------------------------


def _peak_kib(server: Server) -> int:
    """The most memory that the workers have used, together."""
    status = [Path(f"/proc/{pid}/status").read_text() for pid in server.pids().values()]
    lines = [line for text in status for line in text.splitlines() if line.startswith("VmHWM:")]
    return sum(int(line.split()[1]) for line in lines)


async def test_a_header_without_an_end_is_refused_and_takes_no_memory(world: World) -> None:
    """The parser kept an unfinished line to itself, and copied it with each piece: a stranger filled the memory of a
    worker for as long as a handshake may take, and the worker did nothing else meanwhile.
    """
    before = _peak_kib(world.server)
    connection = await Http.open(world.server.address)

    async def pour() -> None:
        for _ in range(256):
            await connection.send(b"a" * 262_144)  # 64 MiB in all

    try:
        await connection.send(b"GET / HTTP/1.1\r\nHost: x\r\nX-A: ")
        pouring = asyncio.create_task(pour())
        response = await connection.response()
        assert (response.status, response.json["code"]) == (431, "too_large")
        assert response.headers["connection"] == "close"
        await asyncio.gather(pouring, return_exceptions=True)  # it is cut off, sooner or later
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await connection.send(b"a" * 262_144)
            await connection.response()
    finally:
        await connection.aclose()
    assert _peak_kib(world.server) - before < 16 * 1024


async def test_two_posts_in_one_piece_are_both_done_each_with_its_own_headers(world: World) -> None:
    """Bytes behind a request that had a body ended the connection with 400, and the answer was lost; or the
    headers of the second were taken for the first.
    """
    alice, a = await world.pair()
    bob = await world.user()
    conv = await world.group(a, bob)
    path = f"/v1/conversations/{conv}/messages"
    cids = [new_cid(), new_cid()]
    posts = [
        encode("POST", path, token=user.token, body={"body": body}, headers={"Idempotency-Key": cid})
        for user, body, cid in ((alice, "first", cids[0]), (bob, "second", cids[1]))
    ]
    connection = await Http.open(world.server.address)
    try:
        await connection.send(b"".join(posts))
        answers = [await connection.response() for _ in posts]
        assert [answer.status for answer in answers] == [201, 201]
        assert [answer.json["cid"] for answer in answers] == cids
        # No token in the first is none, whatever is in the second.
        await connection.send(encode("GET", "/v1/me") + encode("GET", "/v1/me", token=bob.token))
        assert (await connection.response()).status == 401
        assert (await connection.response()).json["id"] == bob.id
    finally:
        await connection.aclose()
    log = await world.whole_log(a, conv)
    assert [(e["from"], e["body"], e["cid"]) for e in log if e["t"] == "msg"] == [
        (alice.id, "first", cids[0]),
        (bob.id, "second", cids[1]),
    ]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"name":"\xff","password":"correct horse"}', id="not UTF-8"),
        pytest.param(b'{"name":"x\xed\xa0\x80","password":"correct horse"}', id="half a character"),
        pytest.param(b'{"name":"x","password":"y","z":' + b"[" * 30000 + b"]" * 30000 + b"}", id="deep"),
    ],
)
async def test_a_body_that_cannot_be_decoded_is_a_bad_request(world: World, body: bytes) -> None:
    """It was 500, with a traceback in the log for each."""
    for path in ("/v1/users", "/v1/sessions"):
        response = await world.http("POST", path, body=body)
        assert (response.status, response.json["code"]) == (400, "bad_request")


async def test_an_idle_connection_does_not_delay_a_stop(serve: Serve) -> None:
    """A browser's or balancer's connection that was kept for a next request was waited for until its deadline."""
    server = serve(settings={"timeouts.handshake_ms": 60_000, "server.drain_timeout_ms": 60_000})
    connections = [await Http.open(server.address) for _ in range(8)]
    try:
        for connection in connections:
            assert (await connection.request("GET", "/healthz")).status == 200
        server.signal(signal.SIGTERM)
        for connection in connections:
            assert await connection.ended() == b""
            await connection.aclose()
        assert await asyncio.to_thread(server.wait) == 0
    finally:
        for connection in connections:
            await connection.aclose()


async def test_readiness_comes_back_after_a_failed_write_without_another(serve: Serve) -> None:
    """A write had failed, so the balancer sent no clients, so none wrote, so the server stayed not ready."""
    server = serve(errors="write failed", settings={"timeouts.store_ms": 1_000})
    if server.backend.file is None:
        pytest.skip("its store is shared: others write to it")
    world = World(server)
    stall = server.backend.stall(server.data)
    stall.__enter__()
    connections = [await Http.open(server.address) for _ in range(8)]
    try:
        mine: dict[int, Http] = {}  # by worker
        for connection in connections:
            assert (await connection.request("GET", "/readyz")).status == 200
            slot = server.slot_of(connection.writer.get_extra_info("sockname")[1])
            assert slot is not None
            mine.setdefault(slot, connection)
        for connection in mine.values():
            body = {"name": f"alice-{connection.writer.get_extra_info('sockname')[1]}", "password": PASSWORD}
            assert (await connection.request("POST", "/v1/users", body=body)).status == 503
            response = await connection.request("GET", "/readyz")
            assert (response.status, response.json["parts"]["store"]) == (503, "down")
        stall.__exit__(None, None, None)

        async def ready() -> bool:
            return all([(await each.request("GET", "/readyz")).status == 200 for each in mine.values()])

        await until(ready, "readiness")
        await world.user()
    finally:
        for connection in connections:
            await connection.aclose()
        await world.aclose()


# --- requests ------------------------------------------------------------------------------------


async def test_what_waits_behind_a_failing_auth_is_answered(world: World) -> None:
    """`auth` with another user's token was answered with an error, and what had been sent behind it with nothing:
    a client that waited for its replies waited for ever.
    """
    alice, a = await world.pair()
    other = await world.user()
    conv = await world.group(a)
    raw = await world.raw()
    await raw.log_in(alice.token)
    requests = [
        {"t": "auth", "id": 11, "v": 1, "token": other.token},
        {"t": "send", "id": 12, "c": conv, "cid": new_cid(), "body": "behind it"},
        {"t": "ping", "id": 13},
    ]
    # In one piece, so that the others wait while the token is looked up.
    await raw.send(b"".join(frame(TEXT, json.dumps(request).encode()) for request in requests))
    replies = {}
    while len(replies) < len(requests):
        message = (await raw.frame()).json
        if message["t"] in ("ok", "error"):
            replies[message["id"]] = message
    assert (replies[11]["t"], replies[11]["code"]) == ("error", "forbidden")
    assert [replies[id]["t"] for id in (12, 13)] == ["ok", "ok"]
    assert (await a.reach(conv, replies[12]["s"]))[-1]["body"] == "behind it"


async def test_a_ping_before_ready_has_no_sync(world: World) -> None:
    """A `sync` before `ready` stood for conversations that had not been sent: a client that was cut off then, and
    came back with it, never heard of them.
    """
    alice, a = await world.pair()
    for _ in range(3):
        await world.send(a, await world.group(a), LARGE)
    raw = await world.raw()
    requests = [{"t": "auth", "id": 1, "v": 1, "token": alice.token}, {"t": "ping", "id": 2}]
    await raw.send(b"".join(frame(TEXT, json.dumps(request).encode()) for request in requests))
    seen = []
    while not seen or seen[-1]["t"] != "ready":
        seen.append((await raw.frame()).json)
    pongs = [message for message in seen if message["t"] == "ok" and message["id"] == 2]
    assert pongs, "it was answered after `ready`: this shows nothing"
    assert "ts" in pongs[0] and "sync" not in pongs[0]
    await raw.send_json(t="ping", id=3)
    assert (await raw.message("ok"))["sync"]


async def test_a_change_of_role_that_is_repeated_is_ok(world: World) -> None:
    """A client repeats what it got no answer to: the second time it was refused, as if the first had failed."""
    alice, a = await world.pair(on=0)
    bob, b = await world.pair(on=1)
    group = await world.group(a, bob)
    channel = await world.channel(a)
    for client, conv, user, role in (
        (a, group, bob, "admin"),
        (a, group, bob, "none"),
        (a, group, bob, "member"),
        (b, group, bob, "none"),
        (a, group, bob, "banned"),
        (b, channel, bob, "member"),
        (b, channel, bob, "none"),
        (a, channel, alice, "none"),
    ):
        await client.request("member", c=conv, user=user.id, role=role)
        again = await client.request("member", c=conv, user=user.id, role=role)
        assert "s" not in again, (role, again)


async def test_the_limit_on_conversations_binds_invitations_and_joins(tight: World) -> None:
    """It was asked when a conversation was opened only: others could put a user into any number of groups."""
    alice, a = await tight.pair()
    bob, b = await tight.pair()
    full = [await tight.group(b) for _ in range(12)]  # as many as a user may be in there
    group, channel = await tight.group(a), await tight.channel(a)
    await a.refused("forbidden", "member", c=group, user=bob.id, role="member")
    await b.refused("forbidden", "member", c=channel, user=bob.id, role="member")
    await a.refused("forbidden", "open", kind="group", cid=new_cid(), title="g", members=[bob.id])
    page = await a.request("members", c=group, limit=3)
    assert [member["user"] for member in page["members"]] == [alice.id]
    # There is room again when one has been left.
    await b.request("member", c=full[0], user=bob.id, role="none")
    await a.request("member", c=group, user=bob.id, role="member")
    await b.refused("forbidden", "member", c=channel, user=bob.id, role="member")


async def test_a_new_password_revokes_the_other_tokens_but_not_this_one(world: World) -> None:
    """It revoked them all, and the device on which it was changed was logged out with the others; or none."""
    alice = await world.user()
    stolen = await world.login(alice)
    thief, own = await world.connect(stolen, on=0), await world.connect(alice, on=1)
    body = {"password": "battery staple", "old_password": PASSWORD}
    assert (await world.http("PATCH", "/v1/me", token=alice.token, body=body)).status == 200
    assert (await thief.end()).code == 4101
    await world.worthless(stolen.token)
    assert (await world.http("GET", "/v1/me", token=stolen.token)).status == 401
    assert (await world.http("GET", "/v1/me", token=alice.token)).status == 200
    await own.request("auth", v=1, token=alice.token)


async def test_conversations_are_listed_by_pages(serve: Serve) -> None:
    """All of them came in one answer, each with its last message: 50 MB for a member of many groups."""
    world = World(serve(settings={"limits.conversations": 4}))
    try:
        alice, a = await world.pair()
        convs = [await world.group(a, title=f"g{i}") for i in range(9)]
        for path, most in (("/v1/conversations", 4), ("/v1/conversations?limit=3", 3)):
            listed: list[str] = []
            after = ""
            while True:
                page = await world.http("GET", path + after, token=alice.token)
                assert page.status == 200
                found = [view["c"] for view in page.json["conversations"]]
                assert 1 <= len(found) <= most
                listed += found
                if "next" not in page.json:
                    break
                assert page.json["next"] == found[-1]
                after = ("&" if "?" in path else "?") + f"after={found[-1]}"
            assert listed == convs[::-1]
        for query, status in (("limit=0", 400), ("limit=5", 400), ("limit=x", 400), ("after=nothing", 404)):
            assert (await world.http("GET", f"/v1/conversations?{query}", token=alice.token)).status == status
    finally:
        await world.aclose()


async def test_who_joins_a_channel_that_everybody_left_owns_it(world: World) -> None:
    """It had members again but never an owner: no member could change its title or appoint others."""
    alice, a = await world.pair(on=0)
    bob, b = await world.pair(on=1)
    carol, c = await world.pair(on=0)
    channel = await world.channel(a)
    await a.request("member", c=channel, user=alice.id, role="none")
    await b.request("member", c=channel, user=bob.id, role="member")
    assert (await b.expect(t="conv", c=channel, role="owner"))["members"] == 1
    await c.request("member", c=channel, user=carol.id, role="member")
    page = await b.request("members", c=channel)
    assert {m["user"]: m["role"] for m in page["members"]} == {bob.id: "owner", carol.id: "member"}
    await b.request("meta", c=channel, cid=new_cid(), title="ours now")
    with pytest.raises(Refused):
        await c.request("meta", c=channel, cid=new_cid(), title="mine")
