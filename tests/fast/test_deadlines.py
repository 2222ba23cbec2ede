"""Deadlines, pings and rates: the wheel and the bucket, seen from outside."""

from __future__ import annotations

import asyncio
import time

import pytest

from chatcore._fast.reactor import TICK_MS

from .support import Raw, Server, frame, on_loop

TEXT, CLOSE, PING, PONG = 1, 8, 9, 10


@on_loop
async def test_handshake_deadline() -> None:
    """In all, not per read: a byte now and then does not help."""
    async with Server(handshake_timeout_ms=300) as server:
        server.plain = lambda conn, data: None
        begun = time.monotonic()
        silent, slow = await Raw.tcp(server), await Raw.tcp(server)

        async def drip() -> None:
            while True:
                slow.send(b"G")
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        assert await silent.end() == b""
        assert time.monotonic() - begun >= 0.3
        try:
            assert await slow.end() == b""
        except ConnectionResetError:
            pass
        dripping.cancel()
        await server.until(lambda: server.reactor.connections() == 0, "both gone")
        await server.until(lambda: len(server.http_closed) == len(server.http), "the one that spoke")
        await silent.close()
        await slow.close()


@on_loop
async def test_http_deadline_can_be_moved() -> None:
    async with Server(handshake_timeout_ms=60000) as server:
        server.plain = lambda conn, data: server.reactor.http_deadline(conn, 100)
        raw = await Raw.tcp(server)
        raw.send(b"request")
        assert await raw.end() == b""
        await server.until(lambda: len(server.http_closed) == 1, "on_http_closed")
        await raw.close()


@on_loop
async def test_auth_deadline() -> None:
    async with Server(auth_timeout_ms=1500, handshake_timeout_ms=1000) as server:
        early = await Raw.websocket(server)
        server.reactor.authenticated(server.sessions[0].conn, 7, 0)
        late = await Raw.websocket(server)
        assert await late.close_code() == 4005
        await server.until(lambda: server.sessions[1].closed == [4005], "on_closed")
        early.send(frame(PING, b"still here"))
        assert await early.frame() == (PONG, b"still here")
        assert server.sessions[0].closed == []
        await late.close()
        await early.close()


@on_loop
async def test_pings_keep_a_live_peer_and_end_a_dead_one() -> None:
    async with Server() as server:
        begun = time.monotonic()
        live, dead = await Raw.websocket(server), await Raw.websocket(server)
        for session in server.sessions:
            server.reactor.authenticated(session.conn, 1, 200)

        async def answer() -> int:
            pings = 0
            while True:
                opcode, payload = await live.frame()
                assert opcode == PING
                live.send(frame(PONG, payload))
                pings += 1

        answering = asyncio.create_task(answer())
        frames = []
        while True:
            frames.append(await dead.frame())
            if frames[-1][0] == CLOSE:
                break
        assert frames[-1] == (CLOSE, (4003).to_bytes(2, "big"))
        assert 1 <= len(frames) - 1 <= 3, "it was pinged before"
        assert time.monotonic() - begun >= 0.4, "two whole intervals of silence"
        await server.until(lambda: server.sessions[1].closed == [4003], "on_closed")
        assert server.reactor.stats()["no_pong"] == 1
        assert server.sessions[0].closed == []
        assert not answering.done()
        answering.cancel()
        await live.close()
        await dead.close()


@on_loop
async def test_any_byte_is_a_sign_of_life() -> None:
    async with Server() as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        server.reactor.authenticated(session.conn, 1, 400)
        message = frame(TEXT, b"a slow message, a byte for each ping that comes")
        for i in range(4):
            assert await raw.frame() == (PING, b"")
            raw.send(message[i : i + 1])
        assert session.closed == []
        await raw.close()


@on_loop
async def test_no_pings_when_told_so() -> None:
    async with Server(auth_timeout_ms=1000) as server:
        raw = await Raw.websocket(server)
        server.reactor.authenticated(server.sessions[0].conn, 1, 0)
        clock = await Raw.websocket(server)
        server.reactor.authenticated(server.sessions[1].conn, 1, 300)
        for _ in range(5):
            assert await clock.frame() == (PING, b"")
            clock.send(frame(PONG))
        raw.send(frame(PING, b"x"))
        assert await raw.frame() == (PONG, b"x")
        await raw.close()
        await clock.close()


@on_loop
async def test_deadlines_longer_than_the_wheel_do_not_come_early() -> None:
    """512 slots of 100 ms: 51.2 s, 102.4 s lie where "now" lies."""
    async with Server(handshake_timeout_ms=51200, auth_timeout_ms=102400) as server:
        waiting = await Raw.tcp(server)
        upgraded = await Raw.websocket(server)
        clock = await Raw.websocket(server)
        server.reactor.authenticated(server.sessions[1].conn, 1, 3 * TICK_MS)
        for _ in range(3):
            assert (await clock.frame())[0] == PING
            clock.send(frame(PONG))
        assert server.reactor.connections() == 3
        for raw in (waiting, upgraded, clock):
            await raw.close()


# -- the bucket


@on_loop
async def test_over_its_rate_a_client_is_told_then_closed() -> None:
    async with Server(rate_per_s=0.01, rate_burst=10) as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        raw.send(frame(TEXT, b"x") * 30)
        assert await raw.close_code() == 4004
        await server.until(lambda: session.closed == [4004], "on_closed")
        # Ten fill the burst, ten go into debt, the next one is too much.
        assert len(session.messages) == 20
        assert session.waits[:10] == [0] * 10
        assert all(a < b for a, b in zip(session.waits[10:], session.waits[11:], strict=False))
        assert 100_000 <= session.waits[10] <= 200_001, "one token each 100 s: two are missing"
        assert server.reactor.stats()["flooding"] == 1
        assert await raw.end() == b""
        await raw.close()


@on_loop
async def test_what_it_was_told_to_wait_is_enough() -> None:
    async with Server(rate_per_s=50, rate_burst=2) as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        raw.send(frame(TEXT, b"x") * 3)
        await server.until(lambda: len(session.messages) == 3, "three messages")
        assert session.waits[:2] == [0, 0]
        assert 0 < session.waits[2] <= 41
        # By the clock that counts: the loop's own is only set once per turn.
        until = time.monotonic() + session.waits[2] / 1000
        while time.monotonic() < until:
            await asyncio.sleep(0.001)
        raw.send(frame(TEXT, b"x"))
        await server.until(lambda: len(session.messages) == 4, "the fourth")
        assert session.waits[3] == 0
        await raw.close()


@on_loop
async def test_control_frames_and_fragments_count() -> None:
    async with Server(rate_per_s=0.01, rate_burst=4) as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        raw.send(frame(PING, b"1") + frame(PONG) + frame(TEXT, b"a", fin=False) + frame(0, b"b", fin=False))
        raw.send(frame(PING, b"unanswered") + frame(0, b"c") + frame(TEXT, b"d"))
        assert await raw.frame() == (PONG, b"1")
        await server.until(lambda: len(session.messages) == 2, "both messages")
        assert session.messages == [b"abc", b"d"]
        assert min(session.waits) > 0
        raw.send(frame(PONG) * 2)
        assert await raw.close_code() == 4004
        await raw.close()


@on_loop
async def test_no_rate_is_no_limit() -> None:
    async with Server(rate_per_s=0, rate_burst=1) as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        raw.send(frame(TEXT, b"x") * 5000)
        await server.until(lambda: len(session.messages) == 5000, "all of them")
        assert set(session.waits) == {0}
        await raw.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"rate_burst": 0},
        {"rate_per_s": -1.0},
        {"max_message_bytes": 1},
        {"outbox_limit_bytes": 1},
        {"outbox_low_water_bytes": 1 << 30},
        {"handshake_timeout_ms": -1},
        {"close_timeout_ms": 1 << 40},
        {"recv_buffer_bytes": 100},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, int]) -> None:
    @on_loop
    async def run() -> None:
        with pytest.raises(ValueError, match=next(iter(settings))):
            Server(**settings)

    run()
