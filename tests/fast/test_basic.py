"""The straight road: upgrade, talk, fan out, close."""

from __future__ import annotations

import websockets

from chatcore._fast.reactor import Frame, Topic

from .support import Raw, Server, Session, frame, on_loop


@on_loop
async def test_echo_with_an_independent_client() -> None:
    async with Server() as server:
        server.message = lambda s, data: server.reactor.send(s.conn, data) and None
        async with websockets.connect(server.url, compression=None) as client:
            for text in ("", "hello", "ü" * 200, "x" * 65535):
                await client.send(text)
                assert await client.recv() == text
        session = await server.session()
        await server.until(lambda: server.reactor.connections() == 0, "all closed")
        assert session.closed == [1000]


@on_loop
async def test_what_comes_with_the_request_is_a_message() -> None:
    async with Server() as server:
        raw = await Raw.websocket(server, also=frame(1, b"at once"))
        session = await server.session()
        await server.until(lambda: session.messages == [b"at once"], "the message")
        await raw.close()


@on_loop
async def test_fan_out() -> None:
    async with Server() as server:
        raws = [await Raw.websocket(server) for _ in range(5)]
        key = object()
        topic = Topic(server.reactor, key)
        for n, session in enumerate(server.sessions):
            server.reactor.authenticated(session.conn, n + 1, 0)
            assert topic.add(session.conn)
            assert not topic.add(session.conn)
            assert session.conn in topic
        assert len(topic) == 5 and topic.key is key
        assert set(topic.sessions()) == set(server.sessions)
        assert topic.fan_out(Frame(b"one")) == 5
        assert topic.fan_out(Frame(b"two"), skip_owner=3) == 4
        assert topic.discard(server.sessions[0].conn)
        assert not topic.discard(server.sessions[0].conn)
        assert topic.fan_out(Frame(b"three")) == 4
        expected = [[b"one", b"two", b"three"] for _ in raws]
        expected[0].remove(b"three")
        expected[2].remove(b"two")
        for raw, texts in zip(raws, expected, strict=True):
            assert [(await raw.frame()) for _ in texts] == [(1, t) for t in texts]
        # One system call for each connection's 101, one for each one's three frames.
        assert server.reactor.stats()["sends"] == 10
        for raw in raws:
            await raw.close()
        await server.until(lambda: len(topic) == 0, "members leave with their connections")


@on_loop
async def test_the_server_closes() -> None:
    async with Server() as server:
        async with websockets.connect(server.url, compression=None) as client:
            session: Session = await server.session()
            server.reactor.send(session.conn, b"last words")
            server.reactor.close(session.conn, 4101, b"go")
            assert not server.reactor.send(session.conn, b"too late")
            assert await client.recv() == "last words"
            await client.wait_closed()
            assert (client.close_code, client.close_reason) == (4101, "go")
        await server.until(lambda: server.reactor.connections() == 0, "all closed")
        assert session.closed == [4101]
        assert server.reactor.websockets() == 0
