"""Backpressure: partial writes, the low-water mark, and one slow reader among many."""

from __future__ import annotations

import socket

from chatcore._fast.reactor import Frame, Topic

from .support import Raw, Server, Session, close_payload, frame, on_loop

TEXT, CLOSE = 1, 8
TOO_SLOW = b"too slow: too much was waiting to be read"


async def slow(server: Server) -> Raw:
    """A client that reads nothing until told, with a small receive window."""
    raw = await Raw.websocket(server)
    raw.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    raw.writer.transport.pause_reading()
    return raw


@on_loop
async def test_partial_writes_keep_order_and_content() -> None:
    async with Server(outbox_limit_bytes=1 << 26) as server:
        raw = await slow(server)
        session = await server.session()
        # Small ones are copied together, large ones go out by reference, in every mixture.
        sizes = [0, 1, 100, 2047, 2048, 2049, 5000, 70000, 3, 3, 300000, 125, 126] * 12
        texts = [bytes([65 + i % 26]) * size for i, size in enumerate(sizes)]
        for text in texts:
            assert server.reactor.send(session.conn, text)
        assert server.reactor.queued(session.conn) == sum(len(Frame(t)) for t in texts)
        await server.until(lambda: server.reactor.stats()["sends"] >= 3, "the socket is full")
        assert server.reactor.queued(session.conn) > 0
        raw.writer.transport.resume_reading()
        for text in texts:
            assert await raw.frame() == (TEXT, text)
        await server.until(lambda: server.reactor.queued(session.conn) == 0, "all accounted for")
        # The socket takes more again, and nothing keeps it in the write set.
        for i in range(3):
            server.reactor.send(session.conn, b"%d" % i)
            assert await raw.frame() == (TEXT, b"%d" % i)
        await raw.close()


@on_loop
async def test_many_small_frames_are_one_system_call() -> None:
    async with Server() as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        before = server.reactor.stats()["sends"]
        for i in range(400):
            server.reactor.send(session.conn, b"%03d" % i)
        for i in range(400):
            assert await raw.frame() == (TEXT, b"%03d" % i)
        await server.until(lambda: server.reactor.queued(session.conn) == 0, "all accounted for")
        assert server.reactor.stats()["sends"] == before + 1
        await raw.close()


@on_loop
async def test_low_water() -> None:
    async with Server(outbox_low_water_bytes=1000, outbox_limit_bytes=1 << 25) as server:
        raw = await slow(server)
        session = await server.session()
        assert server.reactor.notify_writable(session.conn), "it is below the mark: no call will come"
        for _ in range(100):
            server.reactor.send(session.conn, b"x" * 100_000)
        assert not server.reactor.notify_writable(session.conn)
        await server.until(lambda: server.reactor.stats()["sends"] >= 3, "the socket is full")
        assert session.writable == 0
        levels: list[int] = []
        server.writable = lambda s: levels.append(server.reactor.queued(s.conn))
        raw.writer.transport.resume_reading()
        for _ in range(100):
            assert await raw.frame() == (TEXT, b"x" * 100_000)
        await server.until(lambda: session.writable == 1, "on_writable")
        assert levels[0] <= 1000
        # Once for each time it was asked for.
        server.reactor.send(session.conn, b"more")
        assert await raw.frame() == (TEXT, b"more")
        assert session.writable == 1
        await raw.close()
        await server.until(lambda: session.closed == [1006], "closed")
        assert not server.reactor.notify_writable(session.conn)


@on_loop
async def test_a_slow_reader_hurts_only_itself() -> None:
    async with Server(outbox_limit_bytes=300_000, slow_timeout_ms=15000) as server:
        topic = Topic(server.reactor, "room")
        lame = await slow(server)
        quick = [await Raw.websocket(server) for _ in range(3)]
        for session in server.sessions:
            assert topic.add(session.conn)
        lame_session, *quick_sessions = server.sessions
        text = b"t" * 50_000
        rounds = 0
        while len(topic) == 4:
            reached = topic.fan_out(Frame(text))
            rounds += 1
            assert reached == len(topic)
            for raw in quick:
                assert await raw.frame() == (TEXT, text)
        assert server.reactor.stats()["too_slow"] == 1
        await server.until(lambda: lame_session.closed == [4002], "the slow one is told")
        assert lame_session.conn not in topic
        for session in quick_sessions:
            assert session.conn in topic
            assert session.closed == []
            assert server.reactor.queued(session.conn) == 0
        # What it gets when it reads on: whole frames, then why.
        lame.writer.transport.resume_reading()
        got = []
        while True:
            opcode, payload = await lame.frame()
            if opcode == CLOSE:
                assert payload == close_payload(4002, TOO_SLOW)
                break
            assert (opcode, payload) == (TEXT, text)
            got.append(payload)
        assert 0 < len(got) < rounds
        for raw in (lame, *quick):
            await raw.close()
        await server.until(lambda: server.reactor.connections() == 0, "all gone")


@on_loop
async def test_a_slow_reader_that_never_reads_is_cut_off() -> None:
    async with Server(outbox_limit_bytes=100_000, slow_timeout_ms=150) as server:
        raw = await slow(server)
        session = await server.session()
        while server.reactor.send(session.conn, b"x" * 20_000):
            server.reactor.flush()
        await server.until(lambda: session.closed == [4002], "on_closed")
        assert server.reactor.queued(session.conn) < 30_000, "what was unsent is dropped"
        await server.until(lambda: server.reactor.connections() == 0, "cut off")
        raw.writer.transport.abort()


async def fill(server: Server, session: Session) -> None:
    """Send to somebody who does not read until that is too much."""
    while server.reactor.send(session.conn, b"x" * 20_000):
        server.reactor.flush()
    await server.until(lambda: session.closed == [4002], "on_closed")


async def close_timeout(server: Server) -> None:
    """Wait until a closing handshake that begins now is given up: the peer does not answer."""
    deaf = await Raw.websocket(server)
    session = server.sessions[-1]
    server.reactor.close(session.conn, 4000)
    before = server.reactor.connections()
    await server.until(lambda: server.reactor.connections() < before, "the closing handshake is given up")
    await deaf.close()


@on_loop
async def test_who_reads_on_much_later_learns_that_it_was_too_slow() -> None:
    """After the time for a closing handshake, 2 s, the connection was reset: 1006, whatever the reason."""
    async with Server(outbox_limit_bytes=100_000, close_timeout_ms=150, slow_timeout_ms=60_000) as server:
        raw = await slow(server)
        session = await server.session()
        await fill(server, session)
        await close_timeout(server)
        raw.send(frame(TEXT, b"what it says meanwhile is not read") * 100)
        raw.writer.transport.resume_reading()
        while (received := await raw.frame()) == (TEXT, b"x" * 20_000):
            pass
        assert received == (CLOSE, close_payload(4002, TOO_SLOW))
        assert await raw.end() == b"", "FIN follows"
        assert session.messages == []
        await raw.close()
        await server.until(lambda: server.reactor.connections() == 0, "all gone")


@on_loop
async def test_closing_with_4002_drops_what_is_queued_too() -> None:
    async with Server(close_timeout_ms=150, slow_timeout_ms=60_000) as server:
        raw = await slow(server)
        session = await server.session()
        while server.reactor.queued(session.conn) < 500_000:
            server.reactor.send(session.conn, b"x" * 20_000)
            server.reactor.flush()
        server.reactor.close(session.conn, 4002, b"nothing was read")
        assert server.reactor.queued(session.conn) < 30_000
        await close_timeout(server)
        raw.writer.transport.resume_reading()
        while (received := await raw.frame())[0] == TEXT:
            pass
        assert received == (CLOSE, close_payload(4002, b"nothing was read"))
        assert await raw.end() == b""
        await raw.close()


@on_loop
async def test_a_server_that_stops_does_not_wait_for_slow_ones() -> None:
    async with Server(outbox_limit_bytes=100_000, close_timeout_ms=150, slow_timeout_ms=60_000) as server:
        raws = []
        for n in range(2):
            raws.append(await slow(server))
            session = await server.session(n)
            if n == 1:
                server.reactor.shorten_lingering()
            await fill(server, session)
        await server.until(lambda: server.reactor.connections() == 0, "cut off")
        for raw in raws:
            raw.writer.transport.abort()


@on_loop
async def test_replies_nobody_reads_are_limited_too() -> None:
    """A peer that asks and never reads fills its own outbox, pongs included."""
    async with Server(outbox_limit_bytes=50_000, rate_per_s=0, slow_timeout_ms=150) as server:
        server.message = lambda s, data: server.reactor.send(s.conn, data * 100) and None
        raw = await slow(server)
        session = await server.session()
        pings = frame(9, b"p" * 125) * 50 + frame(TEXT, b"x" * 100)
        while not session.closed:
            raw.send(pings)
            before = server.reactor.stats()["bytes_in"]
            await server.until(
                lambda n=before: bool(session.closed) or server.reactor.stats()["bytes_in"] > n, "it is read or closed"
            )
        assert session.closed == [4002]
        await server.until(lambda: server.reactor.connections() == 0, "cut off")
        raw.writer.transport.abort()


@on_loop
async def test_frames_are_shared() -> None:
    """A frame outlives its object as long as an outbox needs it."""
    async with Server() as server:
        raws = [await Raw.websocket(server) for _ in range(3)]
        topic = Topic(server.reactor, None)
        for session in server.sessions:
            topic.add(session.conn)
        shared = Frame(b"shared")
        assert topic.fan_out(shared) == 3
        assert server.reactor.send_frame(server.sessions[0].conn, shared)
        del shared
        for i, raw in enumerate(raws):
            for _ in range(2 if i == 0 else 1):
                assert await raw.frame() == (TEXT, b"shared")
            await raw.close()
