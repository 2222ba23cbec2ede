"""Deadlines, pings and rates: the wheel and the bucket, seen from outside."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from chatcore._fast.reactor import TICK_MS

from .support import Raw, Server, Session, close_payload, frame, on_loop

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
        assert await late.frame() == (CLOSE, close_payload(4005, b"no successful auth in time"))
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
        assert frames[-1] == (CLOSE, close_payload(4003, b"no sign of life for two intervals of pings"))
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
    async with Server(rate_per_s=0.01, rate_burst=10, rate_refused=10) as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        raw.send(frame(TEXT, b"x") * 30)
        opcode, payload = await raw.frame()
        assert (opcode, payload) == (CLOSE, close_payload(4004, b"flooding: too many messages over the rate"))
        await server.until(lambda: session.closed == [4004], "on_closed")
        # Ten fill the burst, ten are told when to come back, the next one is too much.
        assert len(session.messages) == 20
        assert session.waits[:10] == [0] * 10
        assert 99_000 <= session.waits[10] <= 100_002, "one token each 100 s: the next one"
        gaps = [b - a for a, b in itertools.pairwise(session.waits[10:])]
        assert all(99_000 <= gap <= 100_002 for gap in gaps), "and each has its own"
        assert server.reactor.stats()["flooding"] == 1
        assert await raw.end() == b""
        await raw.close()


@on_loop
async def test_what_it_was_told_to_wait_is_enough() -> None:
    async with Server(rate_per_s=50, rate_burst=2) as server:
        raw = await Raw.websocket(server)
        session = await server.session()
        raw.send(frame(TEXT, b"x") * 5)
        await server.until(lambda: len(session.messages) == 5, "five messages")
        assert session.waits[:2] == [0, 0]
        waits = session.waits[2:]
        assert 0 < waits[0] <= 22
        begin = time.monotonic()
        for wait in waits:
            # By the clock that counts: the loop's own is only set once per turn.
            while time.monotonic() < begin + wait / 1000:
                await asyncio.sleep(0.001)
            raw.send(frame(TEXT, b"x"))
        await server.until(lambda: len(session.messages) == 8, "those again")
        assert session.waits[5:] == [0, 0, 0]
        await raw.close()


@on_loop
async def test_control_frames_and_fragments_count() -> None:
    async with Server(rate_per_s=0.01, rate_burst=4, rate_refused=4) as server:
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
async def test_a_deferred_message_costs_nothing_and_has_a_time_of_its_own() -> None:
    async with Server(rate_per_s=0.01, rate_burst=10, rate_refused=8) as server:
        waits: list[int] = []

        def defer(session: Session, data: bytes) -> None:
            if data == b"busy":
                waits.append(server.reactor.defer(session.conn))

        server.message = defer
        raw = await Raw.websocket(server)
        session = await server.session()
        raw.send(frame(TEXT, b"busy") * 4 + frame(TEXT, b"x") * 10)
        await server.until(lambda: len(session.messages) == 14, "all of them")
        assert session.waits == [0] * 14, "no token is missing"
        assert waits == sorted(set(waits))
        assert waits[0] > 0
        # The ten tokens that were taken are more than were promised: eight can be again, and then it is too much.
        raw.send(frame(TEXT, b"x") * 9)
        assert await raw.close_code() == 4004
        await server.until(lambda: session.closed == [4004], "on_closed")
        assert len(session.messages) == 22
        assert server.reactor.defer(session.conn) == 0
        await raw.close()


@on_loop
async def test_deferring_too_many_is_a_flood_too() -> None:
    async with Server(rate_per_s=0.01, rate_burst=100, rate_refused=8) as server:
        waits: list[int] = []
        server.message = lambda session, data: waits.append(server.reactor.defer(session.conn))
        raw = await Raw.websocket(server)
        session = await server.session()
        raw.send(frame(TEXT, b"x") * 20)
        assert await raw.close_code() == 4004
        await server.until(lambda: session.closed == [4004], "on_closed")
        assert waits == [*sorted(waits[:8]), 0]
        assert server.reactor.stats()["flooding"] == 1
        await raw.close()


@on_loop
async def test_a_slot_that_is_used_again_knows_no_promises() -> None:
    async with Server(rate_per_s=0.01, rate_burst=1, rate_refused=8) as server:
        for turn in range(2):
            raw = await Raw.websocket(server)
            session = await server.session(turn)
            raw.send(frame(TEXT, b"x") * 9)
            await server.until(lambda s=session: len(s.messages) == 9, "nine messages")  # type: ignore[misc]
            assert 99_000 <= session.waits[1] <= 100_002
            raw.writer.transport.abort()
            await server.until(lambda: server.reactor.connections() == 0, "it is gone")


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
        {"rate_refused": 0},
        {"slow_timeout_ms": -1},
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
