"""Who lives how long: handles, callbacks that turn back into the reactor, exceptions, exhaustion."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import socket
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from chatcore._fast.reactor import Frame, Reactor, Topic

from .support import Raw, Server, Session, close_payload, frame, on_loop

TEXT, CLOSE = 1, 8


async def gone(server: Server) -> None:
    await server.until(
        lambda: server.reactor.connections() == 0 and all(s.closed for s in server.sessions),
        "every connection gone and its session told",
    )
    assert server.reactor.websockets() == 0


@on_loop
async def test_a_stale_handle_is_refused() -> None:
    async with Server() as server:
        first = await Raw.websocket(server)
        old = (await server.session()).conn
        topic = Topic(server.reactor, None)
        await first.close()
        await gone(server)
        second = await Raw.websocket(server)
        new = (await server.session(1)).conn
        assert new & 0xFFFFFFFF == old & 0xFFFFFFFF, "the slot is used again"
        assert new != old
        r = server.reactor
        for conn in (old, 0, 1 << 40, (1 << 63) - 1, 1):
            assert not r.send(conn, b"x")
            assert not r.send_frame(conn, Frame(b"x"))
            assert not r.write(conn, b"x")
            assert not r.upgrade(conn, None, b"", b"", 0)
            assert not r.notify_writable(conn)
            assert not topic.add(conn)
            assert not topic.discard(conn)
            assert conn not in topic
            assert r.queued(conn) == 0
            assert r.peer(conn) == ""
            assert r.topics_of(conn) == []
            r.close(conn, 1000)
            r.abort(conn)
            r.authenticated(conn, 1, 1000)
            r.http_deadline(conn, 1)
        assert r.send(new, b"alive")
        assert await second.frame() == (TEXT, b"alive")
        await second.close()


# -- callbacks that call back


@on_loop
async def test_close_self_inside_on_message() -> None:
    async with Server() as server:
        inside: list[list[int]] = []

        def message(s: Session, data: bytes) -> None:
            server.reactor.send(s.conn, b"last")
            server.reactor.close(s.conn, 4001, b"enough")
            inside.append(list(s.closed))

        server.message = message
        raw = await Raw.websocket(server)
        raw.send(frame(TEXT, b"a") + frame(TEXT, b"b"))
        assert await raw.frame() == (TEXT, b"last")
        assert await raw.frame() == (CLOSE, close_payload(4001, b"enough"))
        assert inside == [[]], "one message, and on_closed not from inside close"
        await server.until(lambda: server.sessions[0].closed == [4001], "on_closed")
        await raw.close()
        await gone(server)


@on_loop
async def test_abort_self_inside_on_message() -> None:
    async with Server() as server:
        server.message = lambda s, data: server.reactor.abort(s.conn)
        raw = await Raw.websocket(server)
        raw.send(frame(TEXT, b"a") * 100 + frame(TEXT, b"half")[:5])
        await server.until(lambda: bool(server.sessions and server.sessions[0].closed), "on_closed")
        assert server.sessions[0].messages == [b"a"]
        assert server.sessions[0].closed == [1006]
        await gone(server)
        await raw.close()


@on_loop
async def test_abort_everybody_inside_on_message() -> None:
    """All of them have input in the same poll."""
    async with Server() as server:
        raws = [await Raw.websocket(server) for _ in range(10)]
        topic = Topic(server.reactor, None)
        for s in server.sessions:
            topic.add(s.conn)

        def message(session: Session, data: bytes) -> None:
            for s in server.sessions:
                server.reactor.abort(s.conn)
            assert len(topic) == 0

        server.message = message
        for raw in raws:
            os.write(raw.writer.get_extra_info("socket").fileno(), frame(TEXT, b"boom"))
        await server.until(lambda: all(s.closed for s in server.sessions), "on_closed for all")
        assert sum(len(s.messages) for s in server.sessions) == 1
        assert all(s.closed == [1006] for s in server.sessions)
        await gone(server)
        for raw in raws:
            await raw.close()


@on_loop
async def test_everything_is_called_from_everywhere() -> None:
    """Each callback closes, aborts, sends, changes topics, polls and flushes, for itself and others."""
    async with Server(close_timeout_ms=200, outbox_limit_bytes=20_000) as server:
        topic = Topic(server.reactor, None)
        turn = iter(range(1 << 30))

        def meddle(me: Session) -> None:
            r = server.reactor
            for s in [me, *server.sessions[-5:]]:
                n = next(turn) % 11
                if n == 0:
                    r.close(s.conn, 4000)
                elif n == 1:
                    r.abort(s.conn)
                elif n == 2:
                    topic.discard(s.conn)
                elif n <= 4:
                    topic.add(s.conn)
                elif n <= 6:
                    topic.fan_out(Frame(b"f" * 3000))
                elif n == 7:
                    r.poll()
                elif n == 8:
                    r.flush()
                elif n == 9:
                    r.notify_writable(s.conn)
                else:
                    r.tick()

        server.message = lambda s, data: meddle(s)
        server.closed = lambda s, code: meddle(s)
        server.writable = meddle
        raws = []
        for i in range(60):
            try:
                raw = await Raw.websocket(server, also=frame(TEXT, b"leftover"))
            except (AssertionError, OSError, asyncio.IncompleteReadError):
                continue
            raws.append(raw)
            for other in raws[-5:]:
                if not other.writer.transport.is_closing():
                    other.send(frame(TEXT, b"x") * (i % 4))
        for raw in raws:
            raw.writer.transport.abort()
        await gone(server)
        await server.until(lambda: all(len(s.closed) == 1 for s in server.sessions), "each told exactly once")


@on_loop
async def test_shutdown_inside_on_message() -> None:
    async with Server() as server:
        loop = asyncio.get_running_loop()

        def message(s: Session, data: bytes) -> None:
            loop.remove_reader(server.watched)
            server.watched = -1
            server.reactor.shutdown()
            server.reactor.send(s.conn, b"nobody hears")
            server.reactor.poll()
            server.reactor.flush()

        server.message = message
        raw = await Raw.websocket(server)
        raw.send(frame(TEXT, b"a") * 3)
        with pytest.raises(ConnectionResetError):
            await raw.end()
        assert server.sessions[0].messages == [b"a"]
        assert server.sessions[0].closed == [], "no handler is called"
        assert server.reactor.connections() == 0
        assert server.reactor.fileno() == -1
        server.reactor.shutdown()
        await raw.close()


@on_loop
async def test_leftover_may_close_its_own_upgrade() -> None:
    async with Server() as server:
        server.message = lambda s, data: server.reactor.abort(s.conn)
        raw = await Raw.tcp(server)
        raw.send(b"GET / HTTP/1.1\r\nSec-WebSocket-Key: k\r\n\r\n" + frame(TEXT, b"a") * 5)
        await server.until(lambda: bool(server.sessions and server.sessions[0].closed), "on_closed")
        assert server.sessions[0].messages == [b"a"]
        await gone(server)
        await raw.close()


# -- exceptions


@on_loop
async def test_an_exception_closes_that_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    async with Server() as server:

        def message(s: Session, data: bytes) -> None:
            if data == b"bad":
                raise ValueError("a bug in the handler")
            server.reactor.send(s.conn, data)

        server.message = message
        bad, good = await Raw.websocket(server), await Raw.websocket(server)
        with caplog.at_level(logging.ERROR, "chatcore.reactor"):
            bad.send(frame(TEXT, b"bad") + frame(TEXT, b"never seen"))
            assert await bad.close_code() == 4000
        good.send(frame(TEXT, b"good"))
        assert await good.frame() == (TEXT, b"good")
        assert server.sessions[0].messages == [b"bad"]
        await server.until(lambda: server.sessions[0].closed == [4000], "on_closed")
        assert "a bug in the handler" in caplog.text
        await bad.close()
        await good.close()


@on_loop
async def test_exceptions_in_the_other_callbacks(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("a bug")

    async with Server(outbox_low_water_bytes=10) as server:
        server.closed = fail
        server.writable = fail
        raw = await Raw.websocket(server)
        session = await server.session()
        with caplog.at_level(logging.ERROR, "chatcore.reactor"):
            server.reactor.send(session.conn, b"x" * 100)
            assert not server.reactor.notify_writable(session.conn)
            assert await raw.frame() == (TEXT, b"x" * 100)
            assert await raw.close_code() == 4000, "on_writable failed"
            await raw.close()
            await gone(server)
            await server.until(lambda: session.closed == [4000], "on_closed")
            server.plain = fail
            raw = await Raw.tcp(server)
            raw.send(b"request")
            assert await raw.end() == b""
            await server.until(lambda: len(server.http_closed) == 1, "on_http_closed")
            await raw.close()
        await gone(server)
        text = caplog.text
        assert "on_writable failed" in text
        assert "on_closed failed" in text
        assert "on_http failed" in text


class Interrupted(BaseException):
    """Like KeyboardInterrupt, but it does not end the test run."""


def test_an_interrupt_goes_through_and_loses_nothing() -> None:
    """KeyboardInterrupt in a handler leaves poll, after all that was received was handed out."""
    messages: list[bytes] = []

    class Handler:
        def on_http(self, conn: int, data: bytes) -> None:
            reactor.upgrade(conn, conn, b"101", b"", 0)

        def on_http_closed(self, conn: int) -> None: ...
        def on_writable(self, session: int) -> None: ...
        def on_closed(self, session: int, code: int) -> None: ...

        def on_message(self, session: int, data: bytes, wait_ms: int) -> None:
            messages.append(data)
            raise Interrupted

    reactor = Reactor(Handler(), lambda callback: None)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        reactor.listen(listener.fileno())
        peers = [socket.create_connection(listener.getsockname()) for _ in range(5)]
        for peer in peers:
            peer.sendall(b"x")
        while reactor.websockets() < 5:
            reactor.poll()
        reactor.flush()
        for i, peer in enumerate(peers):
            peer.sendall(frame(TEXT, b"%d" % i))
        with pytest.raises(Interrupted):
            while True:
                reactor.poll()
        while len(messages) < 5:
            with pytest.raises(Interrupted):
                while True:
                    reactor.poll()
        assert sorted(messages) == [b"0", b"1", b"2", b"3", b"4"]
        reactor.shutdown()
        for peer in peers:
            peer.close()


# -- memberships


@on_loop
async def test_memberships() -> None:
    async with Server() as server:
        raws = [await Raw.websocket(server) for _ in range(8)]
        topics = [Topic(server.reactor, n) for n in range(40)]
        conns = [s.conn for s in server.sessions]
        member = {(t, c): (t * 7 + c * 3) % 5 < 3 for t in range(40) for c in range(8)}
        for (t, c), is_in in member.items():
            if is_in:
                assert topics[t].add(conns[c])
        for round_ in range(3):
            for (t, c), is_in in list(member.items()):
                if (t + c + round_) % 3 == 0:
                    change = topics[t].discard if is_in else topics[t].add
                    assert change(conns[c])
                    assert not change(conns[c])
                    member[t, c] = not is_in
            for t in range(40):
                assert len(topics[t]) == sum(member[t, c] for c in range(8))
                assert set(topics[t].sessions()) == {server.sessions[c] for c in range(8) if member[t, c]}
            for c in range(8):
                assert {t.key for t in server.reactor.topics_of(conns[c])} == {t for t in range(40) if member[t, c]}
                assert all((conns[c] in topics[t]) == member[t, c] for t in range(40))
        # A topic goes away under its members.
        del topics[::2], change
        gc.collect()
        assert {t.key for t in server.reactor.topics_of(conns[0])} == {t for t in range(1, 40, 2) if member[t, 0]}
        # A connection goes away from all topics, from closing on.
        server.reactor.close(conns[1], 1000)
        assert not topics[0].add(conns[1])
        assert all(conns[1] not in t for t in topics)
        for raw in raws:
            await raw.close()
        await gone(server)
        assert [len(t) for t in topics] == [0] * 20


@on_loop
async def test_topics_outlive_their_reactor_and_the_other_way_round() -> None:
    async with Server() as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        topic = Topic(server.reactor, None)
        topic.add(session.conn)
        await raw.close()
    assert len(topic) == 0
    assert topic.fan_out(Frame(b"x")) == 0
    assert not topic.add(session.conn)


@on_loop
async def test_the_session_is_held_until_it_was_told_and_no_longer() -> None:
    async with Server() as server:
        raw = await Raw.websocket(server)
        ref = weakref.ref(await server.session())
        server.sessions.clear()
        server.by_conn.clear()
        told: list[int] = []
        server.closed = lambda s, code: told.append(code)
        gc.collect()
        assert ref() is not None
        await raw.close()
        await server.until(lambda: told == [1006], "on_closed")
        gc.collect()
        assert ref() is None


@on_loop
async def test_a_reactor_that_was_never_shut_down_is_collected() -> None:
    class Handler:
        on_http = on_http_closed = on_message = on_writable = on_closed = staticmethod(lambda *args: None)

    before = set(_open_files())
    for _ in range(5):
        Reactor(Handler(), lambda callback: None)
    gc.collect()
    assert set(_open_files()) == before


def _open_files() -> list[str]:
    return os.listdir("/proc/self/fd")


# -- many, and too many


@on_loop
async def test_churn() -> None:
    """2,000 connections come, talk and go in every way; nothing is left of them."""
    async with Server() as server:
        topic = Topic(server.reactor, None)

        def message(s: Session, data: bytes) -> None:
            topic.add(s.conn)
            server.reactor.send(s.conn, data)

        server.message = message
        server.sessions = sessions = []
        for wave in range(20):
            raws = await asyncio.gather(*(Raw.websocket(server, also=frame(TEXT, b"hi")) for _ in range(100)))
            for raw in raws:
                assert await raw.frame() == (TEXT, b"hi")
            assert len(topic) == 100
            for i, raw in enumerate(raws):
                how = (i + wave) % 5
                if how == 0:
                    raw.send(frame(CLOSE, close_payload(1000)))
                elif how == 1:
                    raw.writer.write_eof()
                elif how == 2:
                    raw.writer.transport.abort()
                elif how == 3:
                    server.reactor.abort(sessions[-1 - i].conn)
                else:
                    raw.send(frame(TEXT, b"\xff"))
            for raw in raws:
                await raw.close()
            await gone(server)
            assert len(topic) == 0
        await server.until(lambda: all(len(s.closed) == 1 for s in sessions), "each told exactly once")
        stats = server.reactor.stats()
        assert len(sessions) == stats["accepted"] == stats["closed"] == 2000
        assert stats["refused"] == 0


@on_loop
async def test_connections_beyond_the_limit_are_closed() -> None:
    async with Server(max_connections=3) as server:
        raws = [await Raw.websocket(server) for _ in range(3)]
        extra = await Raw.tcp(server)
        assert await extra.end() == b""
        assert server.reactor.stats()["refused"] == 1
        await raws[0].close()
        await server.until(lambda: server.reactor.connections() == 2, "one gone")
        await extra.close()
        again = await Raw.websocket(server)
        for raw in (*raws[1:], again):
            await raw.close()


@pytest.fixture
def few_descriptors() -> Iterator[Callable[[], None]]:
    """Call it to use up all descriptors; afterwards they are there again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []

    def use_up() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, _open_files())) + 1, hard))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.dup(0))

    yield use_up
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for fd in taken:
        os.close(fd)


@on_loop
async def test_out_of_descriptors(few_descriptors: Callable[[], None]) -> None:
    """The peer is told at once, the loop does not spin, and afterwards all is well again."""
    async with Server() as server:
        held = await Raw.websocket(server)
        waiting = [socket.socket() for _ in range(5)]
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)
        few_descriptors()
        for sock in waiting:
            sock.connect(("127.0.0.1", server.port))  # the kernel's queue takes it
            sock.setblocking(False)
        await server.until(lambda: server.reactor.stats()["refused"] == 5, "all refused")
        for sock in waiting:
            assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
            sock.close()
        held.send(frame(9, b"alive"))
        assert await held.frame() == (10, b"alive")
        resource.setrlimit(resource.RLIMIT_NOFILE, soft)
        again = await Raw.websocket(server)
        await again.close()
        await held.close()


@on_loop
async def test_unlisten_and_accept_pending() -> None:
    async with Server() as server:
        with socket.socket() as second:
            second.bind(("127.0.0.1", 0))
            second.listen(200)
            second.setblocking(False)
            server.reactor.listen(second.fileno())
            with pytest.raises(OSError, match="File exists"):
                server.reactor.listen(second.fileno())
            peers = [socket.create_connection(second.getsockname()) for _ in range(150)]
            # More than one batch, all at once; the last of a handshake may be under way still.
            accepted = server.reactor.accept_pending()
            assert accepted > 128
            deadline = time.monotonic() + 10
            while accepted < 150 and time.monotonic() < deadline:
                accepted += server.reactor.accept_pending()
            assert accepted == 150
            server.reactor.unlisten()
            server.reactor.unlisten()
            assert server.reactor.accept_pending() == 0
            for peer in peers:
                peer.close()
            peers = [socket.create_connection(second.getsockname())]
            peers[0].close()
            await gone(server)
            server.reactor.listen(second.fileno())
            fresh = socket.create_connection(second.getsockname())
            await server.until(lambda: server.reactor.stats()["accepted"] == 152, "both of them")
            fresh.close()
            await gone(server)


@on_loop
async def test_small_messages_leave_at_once() -> None:
    """TCP_NODELAY is on every accepted socket (set on the listener, which hands it on)."""
    async with Server() as server:
        server.reactor.unlisten()
        peer = socket.create_connection(("127.0.0.1", server.port))
        taken, _ = server.listener.accept()
        assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        taken.close()
        peer.close()


@on_loop
async def test_ipv6_peers() -> None:
    async with Server() as server:
        try:
            listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
        except OSError:
            pytest.skip("this machine has no IPv6")
        listener.setblocking(False)
        server.reactor.listen(listener.fileno())
        seen: list[str] = []
        server.plain = lambda conn, data: seen.append(server.reactor.peer(conn))
        peer = socket.create_connection(listener.getsockname()[:2])
        peer.sendall(b"x")
        await server.until(lambda: len(seen) == 1, "the request")
        assert seen == [f"[::1]:{peer.getsockname()[1]}"]
        peer.close()
        listener.close()


@on_loop
async def test_one_busy_connection_does_not_starve_the_loop() -> None:
    """A poll is bounded: the loop's other callbacks get their turn while input never ends."""
    async with Server(rate_per_s=0) as server:
        raws = [await Raw.websocket(server) for _ in range(4)]
        loop = asyncio.get_running_loop()
        turns = 0

        def turn() -> None:
            nonlocal turns
            turns += 1
            loop.call_soon(turn)

        loop.call_soon(turn)
        for raw in raws:
            raw.send(frame(TEXT, b"x" * 1000) * 3000)
        await server.until(lambda: sum(len(s.messages) for s in server.sessions) == 12000, "all of it")
        assert turns > 12000 * 1008 / 262144 / 2, "a turn for each buffer of input at least"
        for raw in raws:
            await raw.close()
