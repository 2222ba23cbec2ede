"""HTTP/1.1 itself on the client port: health, refusals, keep-alive, pipelining, and bad upgrades."""

from __future__ import annotations

import asyncio
import json

import pytest

from .raw import TEXT, Raw, frame, handshake
from .rest import Http, encode
from .world import World


async def test_health_and_readiness_need_no_token(world: World) -> None:
    assert (await world.http("GET", "/healthz")).status == 200
    ready = await world.http("GET", "/readyz")
    assert ready.status == 200
    assert ready.json["ready"] is True
    shared = "none" if world.server.backend.file is not None else "ok"
    assert ready.json["parts"] == {"worker": "ok", "store": "ok", "bus": "ok", "cache": shared, "queue": "ok"}
    assert (await world.http("HEAD", "/healthz")).body == b""


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/v1", "/v1/", "/v2/me", "/v1/me/", "/v1/users/", "/v1/users/a/b", "/v1/conversations//messages"),
        *("/healthz/x", "/v1/conversations/c1", "/v1/../v1/me", "/etc/passwd", "/%00", "/v1/%2e%2e/me"),
    ],
)
async def test_404_for_what_is_not_there(world: World, path: str) -> None:
    response = await world.http("GET", path)
    assert (response.status, response.json["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/users", {"GET", "POST"}),
        ("PUT", "/v1/me", {"GET", "PATCH"}),
        ("POST", "/healthz", {"GET"}),
        ("GET", "/v1/sessions", {"POST"}),
        ("PATCH", "/v1/conversations/c1/messages", {"GET", "POST"}),
        ("OPTIONS", "/v1/me", {"GET", "PATCH"}),
    ],
)
async def test_405_names_the_methods_that_are_allowed(world: World, method: str, path: str, allowed: set[str]) -> None:
    response = await world.http(method, path)
    assert response.status == 405
    assert {name.strip() for name in response.headers["allow"].split(",")} == allowed


async def _refused(world: World, data: bytes) -> int:
    """The status that bytes are answered with, after which the connection must be over."""
    connection = await Http.open(world.server.address)
    try:
        await connection.send(data)
        response = await connection.response()
        assert response.headers["connection"] == "close"
        assert {"code", "message"} <= set(response.json)
        assert await connection.ended() == b""
        return response.status
    finally:
        await connection.aclose()


async def test_413_for_a_body_that_is_announced_too_large(tight: World) -> None:
    head = b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 2049\r\n\r\n"
    assert await _refused(tight, head) == 413


async def test_413_for_chunks_that_are_too_large_together(tight: World) -> None:
    head = b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert await _refused(tight, head + (b"400\r\n" + b"x" * 1024 + b"\r\n") * 3) == 413


async def test_a_chunked_body_is_taken(world: World) -> None:
    user = await world.user()
    body = json.dumps({"name": user.name, "password": "correct horse"}).encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7))
    connection = await Http.open(world.server.address)
    try:
        head = b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        await connection.send(head + chunks + b"0\r\n\r\n")
        assert (await connection.response()).status == 201
    finally:
        await connection.aclose()


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(b"X-Long: " + b"x" * 9000 + b"\r\n", id="a long line"),
        pytest.param(b"".join(b"X-%d: y\r\n" % i for i in range(200)), id="many lines"),
        pytest.param(b"".join(b"X-%d: %b\r\n" % (i, b"y" * 4000) for i in range(20)), id="too much together"),
    ],
)
async def test_431_for_too_much_head(world: World, headers: bytes) -> None:
    assert await _refused(world, b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n") == 431


async def test_414_for_a_long_target(world: World) -> None:
    assert await _refused(world, b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n") == 414


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHo st: x\r\n\r\n",
        b"POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Length: 5x\r\n\r\n",
        b"POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/users HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/%ff%fe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    ],
)
async def test_400_for_what_is_no_request(world: World, data: bytes) -> None:
    assert await _refused(world, data) == 400


# --- connections --------------------------------------------------------------------------------


async def test_a_connection_is_kept_for_the_next_request(world: World) -> None:
    user = await world.user()
    connection = await Http.open(world.server.address)
    try:
        for _ in range(3):
            assert (await connection.request("GET", "/v1/me", token=user.token)).status == 200
            assert (await connection.request("GET", "/nowhere")).status == 404
            assert (await connection.request("HEAD", "/v1/me", token=user.token)).status == 200
    finally:
        await connection.aclose()


@pytest.mark.parametrize("request_line", [b"GET /healthz HTTP/1.1\r\nConnection: close", b"GET /healthz HTTP/1.0"])
async def test_a_connection_is_closed_when_the_client_wants_that(world: World, request_line: bytes) -> None:
    connection = await Http.open(world.server.address)
    try:
        await connection.send(request_line + b"\r\nHost: x\r\n\r\n")
        assert (await connection.response()).headers["connection"] == "close"
        assert await connection.ended() == b""
    finally:
        await connection.aclose()


async def test_requests_sent_ahead_are_answered_in_order(world: World) -> None:
    user = await world.user()
    connection = await Http.open(world.server.address)
    try:
        body = {"name": user.name, "password": "correct horse"}
        requests = [
            encode("POST", "/v1/sessions", body=body),
            encode("GET", "/healthz"),
            encode("GET", "/v1/me", token=user.token),
            encode("GET", "/nowhere"),
            encode("GET", f"/v1/users/{user.id}", token=user.token),
        ]
        await connection.send(b"".join(requests * 3))
        for _ in range(3):
            statuses = [(await connection.response()).status for _ in requests]
            assert statuses == [201, 200, 200, 404, 200]
    finally:
        await connection.aclose()


async def test_far_more_requests_ahead_than_are_parsed_at_once_are_answered(world: World) -> None:
    connection = await Http.open(world.server.address)
    try:
        await connection.send(encode("GET", "/healthz") * 500)
        for _ in range(500):
            assert (await connection.response()).status == 200
        # A malformed request behind valid ones is refused after their answers.
        await connection.send(encode("GET", "/healthz") * 3 + b"nonsense\r\n\r\n")
        assert [(await connection.response()).status for _ in range(4)] == [200, 200, 200, 400]
        assert await connection.ended() == b""
    finally:
        await connection.aclose()


async def test_an_upgrade_behind_other_requests_comes_after_their_answers(world: World) -> None:
    user = await world.user()
    auth = json.dumps({"t": "auth", "id": 1, "v": 1, "token": user.token}).encode()
    connection = await Http.open(world.server.address)
    try:
        await connection.send(encode("GET", "/v1/me", token=user.token) + handshake() + frame(TEXT, auth))
        assert (await connection.response()).json["id"] == user.id
        assert (await connection.response()).status == 101
        first = await connection.reader.readexactly(4)
        hello = await connection.reader.readexactly(int.from_bytes(first[2:], "big"))
        assert json.loads(hello)["t"] == "hello"
        assert (await connection.reader.readexactly(2))[0] == 0x81
    finally:
        await connection.aclose()


async def test_requests_that_come_in_pieces_are_understood(world: World) -> None:
    user = await world.user()
    data = encode("GET", "/v1/me", token=user.token) + encode("GET", "/healthz")
    connection = await Http.open(world.server.address)
    try:
        for i in range(0, len(data), 11):
            await connection.send(data[i : i + 11])
            await asyncio.sleep(0)
        assert (await connection.response()).json["id"] == user.id
        assert (await connection.response()).status == 200
    finally:
        await connection.aclose()


# --- upgrades -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec_WebSocket_Version": "8"}, 426),
        ({"Sec_WebSocket_Version": "14"}, 426),
        ({"Sec_WebSocket_Version": None}, 426),
        ({"Sec_WebSocket_Key": None}, 400),
        ({"Sec_WebSocket_Key": ""}, 400),
        ({"Sec_WebSocket_Key": "short"}, 400),
        ({"Sec_WebSocket_Key": "AAAAAAAAAAAAAAAAAAAAAAAA"}, 400),
        ({"Sec_WebSocket_Key": "!" * 24}, 400),
        ({"Upgrade": "h2c"}, 426),
        ({"Content_Length": "5"}, 400),
        ({"Transfer_Encoding": "chunked"}, 400),
    ],
)
async def test_a_bad_upgrade_is_refused(world: World, headers: dict[str, str | None], status: int) -> None:
    connection = await Http.open(world.server.address)
    try:
        await connection.send(handshake(**headers))
        response = await connection.response()
        assert response.status == status
        if status == 426:
            assert response.headers["sec-websocket-version"] == "13"
        assert await connection.ended() == b""
    finally:
        await connection.aclose()


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        (b"GET /ws ", b"POST /ws ", 400),
        (b"GET /ws ", b"GET / ", 404),
        (b"GET /ws ", b"GET /v1/me ", 404),
        (b"HTTP/1.1", b"HTTP/1.0", 400),
    ],
)
async def test_an_upgrade_of_something_else_is_refused(world: World, old: bytes, new: bytes, status: int) -> None:
    connection = await Http.open(world.server.address)
    try:
        await connection.send(handshake().replace(old, new, 1))
        assert (await connection.response()).status == status
        assert await connection.ended() == b""
    finally:
        await connection.aclose()


@pytest.mark.parametrize("missing", ["Upgrade", "Connection"])
async def test_ws_without_an_upgrade_is_answered_as_http(world: World, missing: str) -> None:
    connection = await Http.open(world.server.address)
    try:
        await connection.send(handshake(**{missing: None}))
        assert (await connection.response()).status in (400, 404, 426)
    finally:
        await connection.aclose()


async def test_headers_of_an_upgrade_may_be_in_any_case_and_hold_more(world: World) -> None:
    request = (
        b"GET /ws?from=browser HTTP/1.1\r\nHOST: x\r\nuPGRADE: WebSocket\r\nCONNECTION: keep-alive, upgrade\r\n"
        b"SEC-WEBSOCKET-VERSION: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
        b"Sec-WebSocket-Protocol: other.v2, chatcore.v1\r\n\r\n"
    )
    raw = await Raw.open(world.server.address)
    world.raws.append(raw)
    await raw.send(request)
    head = (await raw.head()).lower()
    # The example of RFC 6455, 1.3.
    assert b"sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=" in head
    assert b"sec-websocket-protocol: chatcore.v1" in head
    assert b"sec-websocket-extensions" not in head
    assert (await raw.frame()).json["t"] == "hello"
