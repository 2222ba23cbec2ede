"""WebSockets over real sockets: segmentation, both directions of the close, half-close, hostile input."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest
import websockets

from .support import Raw, Server, close_payload, frame, on_loop

TEXT, CLOSE, PING, PONG, CONT = 1, 8, 9, 10, 0


async def gone(server: Server) -> None:
    await server.until(
        lambda: server.reactor.connections() == 0 and all(s.closed for s in server.sessions),
        "every connection gone and its session told",
    )
    assert server.reactor.websockets() == 0


@on_loop
async def test_every_tcp_segmentation() -> None:
    """The same messages wherever TCP cuts, the request and what follows it included."""
    text = "aé日😀".encode()
    wire = frame(TEXT, text) + frame(TEXT, text[:5], fin=False) + frame(PING, b"p") + frame(CONT, text[5:])
    async with Server() as server:
        request = b"GET / HTTP/1.1\r\nSec-WebSocket-Key: abc\r\n\r\n"
        whole = request + wire
        for cut in range(1, len(whole)):
            raw = await Raw.tcp(server)
            raw.send(whole[:cut])
            before = server.reactor.stats()["bytes_in"]
            await server.until(lambda b=before: server.reactor.stats()["bytes_in"] > b, "the first part")
            raw.send(whole[cut:])
            await raw.reader.readuntil(b"\r\n\r\n")
            assert await raw.frame() == (PONG, b"p")
            session = server.sessions[-1]
            await server.until(lambda s=session: len(s.messages) == 2, f"both messages, cut at {cut}")
            assert session.messages == [text, text]
            await raw.close()
            await gone(server)
            assert session.closed == [1006]


@on_loop
async def test_byte_by_byte() -> None:
    wire = frame(TEXT, b"ab", fin=False) + frame(PING, b"xyz") + frame(CONT, b"cd") + frame(TEXT, b"e" * 300)
    async with Server() as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        start = server.reactor.stats()["bytes_in"]
        for i in range(len(wire)):
            raw.send(wire[i : i + 1])
            await server.until(lambda n=i: server.reactor.stats()["bytes_in"] > start + n, f"byte {i}")
        await server.until(lambda: len(session.messages) == 2, "both messages")
        assert session.messages == [b"abcd", b"e" * 300]
        assert await raw.frame() == (PONG, b"xyz")
        await raw.close()


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (frame(TEXT, b"x", mask=None), 1002),
        (frame(TEXT, b"x", rsv=4), 1002),
        (frame(3, b"x"), 1002),
        (frame(CONT, b"x"), 1002),
        (frame(PING, b"", fin=False), 1002),
        (frame(CLOSE, close_payload(1005)), 1002),
        (frame(2, b"x"), 1003),
        (frame(TEXT, b"\xff"), 1007),
        (frame(TEXT, b"", length=65537, form=64), 1009),
        (frame(TEXT, b"x" * 40000, fin=False) + frame(CONT, b"x" * 40000), 1009),
    ],
)
def test_a_protocol_error_closes_with_its_code(wire: bytes, code: int) -> None:
    @on_loop
    async def run() -> None:
        async with Server() as server:
            raw = await Raw.websocket(server)
            # What was complete before counts; what comes after the mistake is thrown away unread,
            # and unread input must not turn the close frame into a reset.
            raw.send(frame(TEXT, b"before") + wire + frame(TEXT, b"after") * 1000)
            assert await raw.close_code() == code
            assert await raw.end() == b""
            session = await server.session()
            assert session.messages == [b"before"]
            assert session.closed == [code]
            assert server.reactor.stats()["protocol_errors"] == 1
            await raw.close()
            await gone(server)

    run()


@on_loop
async def test_pings_are_answered() -> None:
    async with Server() as server:
        raw = await Raw.websocket(server)
        for payload in (b"", b"x", b"y" * 125):
            raw.send(frame(PING, payload))
            assert await raw.frame() == (PONG, payload)
        raw.send(frame(PONG, b"unasked"))
        raw.send(frame(PING, b"still there"))
        assert await raw.frame() == (PONG, b"still there")
        await raw.close()


# -- closing


@pytest.mark.parametrize(("payload", "told", "echoed"), [(b"", 1005, 1005), (close_payload(1001, b"bye"), 1001, 1001)])
def test_the_peer_closes(payload: bytes, told: int, echoed: int) -> None:
    @on_loop
    async def run() -> None:
        async with Server() as server:
            raw = await Raw.websocket(server)
            session = await server.session()
            server.reactor.send(session.conn, b"queued before")
            raw.send(frame(CLOSE, payload) + frame(TEXT, b"too late"))
            assert await raw.frame() == (TEXT, b"queued before")
            assert await raw.close_code() == echoed
            assert await raw.end() == b"", "the server sends its FIN first (section 7.1.1)"
            await server.until(lambda: session.closed == [told], "on_closed")
            # It waits for our FIN, so that nothing is reset.
            assert server.reactor.connections() == 1
            assert session.messages == []
            await raw.close()
            await gone(server)
            assert session.closed == [told]

    run()


@on_loop
async def test_the_server_closes_and_waits_for_the_peer() -> None:
    async with Server(close_timeout_ms=60000) as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        server.reactor.close(session.conn, 4101, b"token")
        await server.until(lambda: session.closed == [4101], "on_closed comes at once")
        assert await raw.frame() == (CLOSE, close_payload(4101, b"token"))
        # What is in flight is read and dropped, pings included.
        raw.send(frame(TEXT, b"in flight") + frame(PING, b"p") + frame(CLOSE, close_payload(4101)))
        assert await raw.end() == b""
        assert session.messages == []
        await raw.close()
        await gone(server)
        assert session.closed == [4101]


@on_loop
async def test_a_peer_that_does_not_answer_the_close_is_cut_off() -> None:
    async with Server(close_timeout_ms=150) as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        server.reactor.close(session.conn, 1012)
        assert await raw.close_code() == 1012
        assert await raw.end() == b""
        await gone(server)
        await raw.close()


@on_loop
async def test_a_peer_that_does_not_end_after_the_close_is_cut_off() -> None:
    async with Server(close_timeout_ms=150) as server:
        raw = await Raw.websocket(server)
        raw.send(frame(CLOSE, close_payload(1000)))
        assert await raw.close_code() == 1000
        await gone(server)
        await raw.close()


@on_loop
async def test_both_close_at_once() -> None:
    async with Server() as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        raw.send(frame(CLOSE, close_payload(1001)))
        server.reactor.close(session.conn, 1012)
        assert await raw.close_code() == 1012
        assert await raw.end() == b""
        await raw.close()
        await gone(server)
        assert session.closed == [1012]


@on_loop
async def test_a_large_reply_survives_the_close() -> None:
    """Draining: everything queued arrives though the server closes at once and the peer still
    sends (a close(2) with unread input would reset the connection and lose it)."""
    async with Server(outbox_limit_bytes=1 << 24, close_timeout_ms=15_000) as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        body = b"z" * 4_000_000
        server.reactor.send(session.conn, body)
        server.reactor.close(session.conn, 1012, b"restart")
        raw.send(frame(TEXT, b"noise" * 1000) * 10)
        assert await raw.frame() == (TEXT, body)
        assert await raw.frame() == (CLOSE, close_payload(1012, b"restart"))
        raw.send(frame(CLOSE, close_payload(1012)))
        assert await raw.end() == b""
        await raw.close()
        await gone(server)


@on_loop
async def test_a_long_reason_is_cut_between_characters() -> None:
    async with Server() as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        server.reactor.close(session.conn, 4000, "é".encode() * 100)
        assert await raw.frame() == (CLOSE, close_payload(4000, "é".encode() * 61))
        await raw.close()


@on_loop
async def test_half_close_without_a_close_frame() -> None:
    """The peer may still read: it gets what is queued, then our FIN."""
    async with Server(outbox_limit_bytes=1 << 24, close_timeout_ms=15_000) as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        body = b"z" * 3_000_000
        server.reactor.send(session.conn, body)
        raw.writer.write_eof()
        assert await raw.frame() == (TEXT, body)
        assert await raw.end() == b""
        await gone(server)
        assert session.closed == [1006]
        await raw.close()


@on_loop
async def test_a_reset_is_1006() -> None:
    async with Server() as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        sock = raw.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.writer.transport.abort()
        await server.until(lambda: session.closed == [1006], "on_closed")
        await gone(server)


@on_loop
async def test_abort_resets() -> None:
    async with Server() as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        server.reactor.abort(session.conn)
        assert server.reactor.connections() == 0
        assert session.closed == [], "no handler is called from inside abort"
        with pytest.raises(ConnectionResetError):
            await raw.end()
        await server.until(lambda: session.closed == [1006], "on_closed")
        await raw.close()


@on_loop
async def test_an_independent_client_sees_every_close() -> None:
    async with Server() as server:
        for code, reason in ((1000, ""), (1012, "restart"), (4104, "too many")):
            async with websockets.connect(server.url, compression=None) as client:
                session = await server.session(len(server.sessions) - 1)
                await server.until(lambda: server.reactor.websockets() == 1, "open")
                session = server.sessions[-1]
                server.reactor.close(session.conn, code, reason.encode())
                await client.wait_closed()
                assert (client.close_code, client.close_reason) == (code, reason)
        async with websockets.connect(server.url, compression=None) as client:
            await client.close(3456, "mine")
            assert client.close_code == 3456
        await gone(server)
        assert [s.closed for s in server.sessions] == [[1000], [1012], [4104], [3456]]


# -- plain HTTP on the same socket


@on_loop
async def test_http_keep_alive_and_close() -> None:
    async with Server() as server:
        peers: list[str] = []

        def plain(conn: int, data: bytes) -> None:
            peers.append(server.reactor.peer(conn))
            assert server.reactor.write(conn, b"answer to " + data, close=data == b"last")
            assert server.reactor.write(conn, b"more") == (data != b"last")

        server.plain = plain
        raw = await Raw.tcp(server)
        raw.send(b"first")
        assert await raw.reader.readexactly(19) == b"answer to firstmore"
        raw.send(b"last")
        assert await raw.end() == b"answer to last"
        await server.until(lambda: len(server.http_closed) == 1, "on_http_closed")
        assert server.reactor.connections() == 1
        await raw.close()
        await gone(server)
        port = raw.writer.get_extra_info("sockname")[1]
        assert peers == [f"127.0.0.1:{port}"] * 2
        assert server.reactor.peer(server.http_closed[0]) == ""


@on_loop
async def test_http_half_close_is_answered() -> None:
    """A client may send its request and its FIN and read on."""
    async with Server(close_timeout_ms=15_000) as server:
        asked: list[int] = []
        server.plain = lambda conn, data: asked.append(conn)
        raw = await Raw.tcp(server)
        raw.send(b"request")
        raw.writer.write_eof()
        await server.until(lambda: len(asked) == 1, "the request")
        await asyncio.get_running_loop().run_in_executor(None, lambda: None)  # the answer comes later
        assert server.reactor.connections() == 1
        assert server.reactor.write(asked[0], b"x" * 2_000_000, close=True)
        assert await raw.end() == b"x" * 2_000_000
        await raw.close()
        await gone(server)
        assert server.http_closed == asked


@on_loop
async def test_http_idle_keep_alive_ended_by_the_peer() -> None:
    async with Server() as server:
        server.plain = lambda conn, data: server.reactor.write(conn, data) and None
        raw = await Raw.tcp(server)
        raw.send(b"request")
        assert await raw.reader.readexactly(7) == b"request"
        await raw.close()
        await gone(server)
        await server.until(lambda: len(server.http_closed) == 1, "on_http_closed")
        # One that never said anything is nobody's business.
        silent = await Raw.tcp(server)
        await server.until(lambda: server.reactor.connections() == 1, "accepted")
        await silent.close()
        await gone(server)
        assert len(server.http_closed) == 1


@on_loop
async def test_upgrade_is_refused_where_it_makes_no_sense() -> None:
    async with Server() as server:
        asked: list[int] = []
        server.plain = lambda conn, data: asked.append(conn)
        raw = await Raw.tcp(server)
        raw.send(b"request")
        await server.until(lambda: len(asked) == 1, "the request")
        conn = asked[0]
        assert server.reactor.upgrade(conn, "session", b"101", b"", 0)
        assert not server.reactor.upgrade(conn, "again", b"101", b"", 0)
        assert not server.reactor.write(conn, b"no HTTP any more")
        server.reactor.http_deadline(conn, 1)
        assert server.reactor.websockets() == 1
        await raw.close()
