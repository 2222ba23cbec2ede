"""Clients that read slowly, or not at all, or say nothing: they hurt only themselves."""

from __future__ import annotations

import asyncio
import json
import signal
import struct

from .conftest import Serve
from .raw import CLOSE, TEXT, Raw, frame
from .world import World, new_cid

BODY = "x" * 8000
# The kernel holds some megabytes for a reader that sleeps (its end and ours); then the outbox fills.
MUCH = 800


async def test_4002_a_reader_that_does_not_read_is_cut_off_and_hurts_nobody_else(world: World) -> None:
    _, a = await world.pair(on=0)
    bob, carol = await world.user(), await world.user()
    conv = await world.group(a, bob, carol)
    begin = len(await world.whole_log(a, conv))
    slow = await world.raw(on=0, receive_buffer=4096)
    await slow.log_in(bob.token)
    readers = [await world.connect(carol, on=0), await world.connect(bob, on=0), await world.connect(bob, on=1)]
    last = await world.fill(a, conv, MUCH, BODY)
    for client in readers:
        await client.reach(conv, last)
        assert client.seqs(conv) == list(range(begin + 1, last + 1))
    # The bytes that it can still read are whole and in order, and end with the code.
    held = begin
    while (received := await slow.frame()).opcode != CLOSE:
        message = received.json
        if message["t"] == "msg":
            assert message["s"] == held + 1
            held += 1
    assert struct.unpack("!H", received.payload[:2]) == (4002,)
    assert received.payload[2:] == b"too slow: too much was waiting to be read"
    assert begin < held < last
    await slow.ended()
    # It can resume, and page through what is too much.
    again = await world.connect(bob)
    seqs: list[int] = []
    while not seqs or seqs[-1] < last:
        page = await again.request("history", c=conv, after=seqs[-1] if seqs else held, limit=100)
        seqs += [entry["s"] for entry in page["entries"]]
    assert seqs == list(range(held + 1, last + 1))


async def test_4002_who_reads_on_much_later_learns_why(serve: Serve) -> None:
    """The connection was reset 2 s after it was given up, with the reason still in the server: 1006."""
    world = World(serve(settings={"timeouts.close_ms": 200, "timeouts.slow_ms": 120_000}))
    try:
        _, a = await world.pair(on=0)
        bob = await world.user()
        conv = await world.group(a, bob)
        begin = len(await world.whole_log(a, conv))
        slow = await world.raw(on=0, receive_buffer=4096)
        await slow.log_in(bob.token)
        await a.request("watch", users=[bob.id])
        last = await world.fill(a, conv, MUCH, BODY)
        await a.expect(t="presence", user=bob.id, state="offline")  # it is given up
        # A closing handshake without an answer is given up, too, and the slow client still is there.
        deaf = await world.raw(on=0)
        await deaf.send(frame(TEXT, b"[]"))
        await deaf.ended()
        assert world.server.slot_of(slow.port) == 0
        held = begin
        while (received := await slow.frame()).opcode != CLOSE:
            message = received.json
            if message["t"] == "msg":
                assert message["s"] == held + 1
                held += 1
        assert struct.unpack("!H", received.payload[:2]) == (4002,)
        assert b"too slow" in received.payload
        assert held < last
        await slow.ended()
    finally:
        await world.aclose()


async def test_a_stop_does_not_wait_for_who_was_too_slow(serve: Serve) -> None:
    server = serve(settings={"timeouts.close_ms": 200, "timeouts.slow_ms": 120_000, "server.drain_timeout_ms": 120_000})
    world = World(server)
    try:
        _, a = await world.pair(on=0)
        bob = await world.user()
        conv = await world.group(a, bob)
        slow = await world.raw(on=0, receive_buffer=4096)
        await slow.log_in(bob.token)
        await a.request("watch", users=[bob.id])
        await world.fill(a, conv, MUCH, BODY)
        await a.expect(t="presence", user=bob.id, state="offline")
        server.signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.wait) == 0
    finally:
        await world.aclose()


async def _read_slowly(raw: Raw, conv: str, until_seq: int, pause_every: int) -> list[int]:
    """Read entries up to a seq, with a pause now and then; a close fails the test."""
    seqs: list[int] = []
    while not seqs or seqs[-1] < until_seq:
        received = await raw.frame()
        assert received.opcode != CLOSE, received.payload
        if received.opcode != TEXT:
            continue
        message = json.loads(received.payload)
        if message["t"] == "msg" and message["c"] == conv:
            seqs.append(message["s"])
            if len(seqs) % pause_every == 0:
                await asyncio.sleep(0.02)
    return seqs


async def test_a_replay_is_as_fast_as_the_reader_and_does_not_cut_it_off(world: World) -> None:
    _, a = await world.pair(on=0)
    bob = await world.user()
    conv = await world.group(a, bob)
    b = await world.connect(bob)
    await b.reach(conv, (await world.send(a, conv))["s"])
    sync, held = b.got(t="ready")[0]["sync"], b.seqs(conv)[-1] if b.seqs(conv) else 0
    await b.close()
    last = await world.fill(a, conv, 490, BODY)  # 4 MB: four times what an outbox may hold
    slow = await world.raw(on=1, receive_buffer=4096)
    await slow.send_json(t="auth", id=1, v=1, token=bob.token, sync=sync, have={conv: held})
    end = await world.fill(a, conv, 10, "live")  # while the replay is stuck behind the reader
    seqs = await _read_slowly(slow, conv, end, 40)
    assert seqs == list(range(held + 1, end + 1))
    assert end > last


async def test_4002_a_replay_that_makes_no_progress_is_given_up(hasty: World) -> None:
    _, a = await hasty.pair(on=0)
    bob = await hasty.user()
    conv = await hasty.group(a, bob)
    b = await hasty.connect(bob)
    await b.reach(conv, (await hasty.send(a, conv))["s"])
    sync, held = b.got(t="ready")[0]["sync"], b.seqs(conv)[-1]
    await b.close()
    await hasty.fill(a, conv, 490, BODY)
    watcher = await hasty.connect(bob, on=1)
    stuck = await hasty.raw(on=1, receive_buffer=4096)
    await stuck.send_json(t="auth", id=1, v=1, token=bob.token, sync=sync, have={conv: held}, ping_ms=60000)

    # It answers nothing and reads nothing until the server has given it up.
    async def given_up() -> None:
        while hasty.server.slot_of(stuck.port) is not None:
            await watcher.request("ping")
            await asyncio.sleep(0.05)

    await asyncio.wait_for(given_up(), 15)


async def test_a_slow_reader_delays_no_acknowledgement(world: World) -> None:
    alice = await world.user()
    a = await world.connect(alice, on=0)
    bob = await world.user()
    conv = await world.group(a, bob)
    sleepers = []
    for _ in range(5):
        raw = await world.raw(on=0, receive_buffer=4096)
        await raw.log_in(bob.token)
        sleepers.append(raw)
    loop = asyncio.get_running_loop()
    times = []
    for _ in range(100):
        begin = loop.time()
        await world.send(a, conv, BODY)
        times.append(loop.time() - begin)
    assert sorted(times)[50] < 0.5


# --- strangers ---------------------------------------------------------------------------------


async def test_a_connection_that_says_nothing_is_ended(hasty: World) -> None:
    raw = await Raw.open(hasty.server.address)
    try:
        await raw.ended()
    finally:
        raw.close()


async def test_slow_bytes_do_not_extend_the_time_for_a_request(hasty: World) -> None:
    raw = await Raw.open(hasty.server.address)
    loop = asyncio.get_running_loop()
    begin = loop.time()

    async def drip() -> None:
        for byte in b"GET /ws HTTP/1.1\r\nHost: " + b"x" * 1000:
            await raw.send(bytes([byte]))
            await asyncio.sleep(0.05)

    dripping = asyncio.create_task(drip())
    try:
        await raw.ended()
        assert loop.time() - begin < 5
    finally:
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
        raw.close()


async def test_a_body_that_does_not_come_is_not_waited_for(hasty: World) -> None:
    raw = await Raw.open(hasty.server.address)
    try:
        await raw.send(b"POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        await raw.ended()
    finally:
        raw.close()


async def test_a_client_that_vanishes_in_the_middle_of_a_frame_is_forgotten(world: World) -> None:
    user = await world.user()
    raw = await world.raw(on=0)
    await raw.log_in(user.token)
    port = raw.port
    await raw.send(b"\x81\xfe\x10\x00abcd" + b"x" * 100)
    raw.sock.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SO_LINGER: close with a reset
    raw.close()
    client = await world.connect(user, on=0)
    while world.server.slot_of(port) is not None:
        await client.request("ping")


async def test_half_a_close_still_gets_its_answers(world: World) -> None:
    """A client that has shut down its sending side reads the replies to what it sent."""
    user = await world.user()
    a = await world.connect(user)
    conv = await world.group(a)
    raw = await world.raw()
    await raw.log_in(user.token)
    cid = new_cid()
    await raw.send_json(t="send", id=5, c=conv, cid=cid, body="and over")
    raw.sock.shutdown(1)
    await a.expect(t="msg", c=conv, cid=cid)
    await raw.ended()
