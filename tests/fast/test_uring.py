"""Sending to many at once gives everybody the same bytes, with io_uring and without.

What is special about it: more connections than one submission takes, small frames that share one
buffer with those of others, large ones that go by reference, and a socket that is full or gone in
the middle of a batch.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct

import pytest

from chatcore._fast.reactor import Frame, Reactor, Topic

from .support import Raw, Server, on_loop

TEXT = 1
MANY = 300  # more than one submission (256), fewer than the descriptors of a modest shell

both = pytest.mark.parametrize("io_uring", [True, False])


class Nobody:
    """A handler that is never called."""

    def __getattr__(self, name: str) -> object:
        return lambda *args: None


def must_work(server: Server, io_uring: bool) -> None:
    if io_uring and not server.reactor.uses_io_uring():
        pytest.skip("this kernel forbids io_uring")
    assert server.reactor.uses_io_uring() == io_uring


async def audience(server: Server, n: int) -> tuple[list[Raw], Topic]:
    raws = [await Raw.websocket(server) for _ in range(n)]
    await server.session(n - 1)
    topic = Topic(server.reactor, "all")
    for session in server.sessions:
        assert topic.add(session.conn)
    return raws, topic


def test_it_can_be_turned_off() -> None:
    reactor = Reactor(Nobody(), lambda f: None, io_uring=False)  # type: ignore[arg-type]
    assert not reactor.uses_io_uring()
    reactor.shutdown()


@both
@on_loop
async def test_many_get_one_frame_each(io_uring: bool) -> None:
    async with Server(io_uring=io_uring) as server:
        must_work(server, io_uring)
        raws, topic = await audience(server, MANY)
        before = server.reactor.stats()["sends"]
        assert topic.fan_out(Frame(b"hello")) == MANY
        for raw in raws:
            assert await raw.frame() == (TEXT, b"hello")
        assert server.reactor.stats()["sends"] - before == MANY
        for raw in raws:
            await raw.close()


@both
@on_loop
async def test_everybody_gets_their_own_of_every_size_in_order(io_uring: bool) -> None:
    sizes = [1, 100, 2040, 2048, 2049, 3, 70_000, 5, 2000, 30_000, 7, 7]
    async with Server(io_uring=io_uring, outbox_limit_bytes=1 << 24) as server:
        must_work(server, io_uring)
        raws, topic = await audience(server, 40)
        texts = {}
        for i, session in enumerate(server.sessions):
            # The common ones are shared; between them everybody has some alone, of other sizes than the others'.
            texts[i] = [bytes([33 + (i + k) % 90]) * size for k, size in enumerate(sizes[i % 12 :] + sizes[: i % 12])]
            for text in texts[i]:
                server.reactor.send(session.conn, text)
        topic.fan_out(Frame(b"last"))
        for i, raw in enumerate(raws):
            for text in [*texts[i], b"last"]:
                assert await raw.frame() == (TEXT, text)
            await raw.close()


@both
@on_loop
async def test_one_that_is_full_and_one_that_is_gone_among_many(io_uring: bool) -> None:
    async with Server(io_uring=io_uring, outbox_limit_bytes=1 << 26) as server:
        must_work(server, io_uring)
        raws, topic = await audience(server, 30)
        full, gone = raws[3], raws[7]
        full.writer.transport.pause_reading()
        # A reset that the server learns of by sending: it is not looked at before the batch goes out.
        gone.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.writer.transport.abort()
        texts = [bytes([65 + i % 26]) * 100_000 for i in range(100)]
        for text in texts:
            topic.fan_out(Frame(text))
        for i, raw in enumerate(raws):
            if i not in (3, 7):
                for text in texts:
                    assert await raw.frame() == (TEXT, text)
        await server.until(lambda: len(topic) == 29, "the one that is gone has left the topic")
        stuck = server.reactor.queued(server.by_conn[server.sessions[3].conn].conn)
        assert stuck > 0, "the one that does not read has its rest still queued"
        full.writer.transport.resume_reading()
        for text in texts:
            assert await full.frame() == (TEXT, text)
        for raw in raws:
            if raw is not gone:
                await raw.close()


def rings() -> set[int]:
    """The descriptors of rings in this process (the loop has one, too)."""
    found: set[int] = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "io_uring" in os.readlink(f"/proc/self/fd/{fd}"):
                found.add(int(fd))
    return found


@on_loop
async def test_a_ring_that_fails_is_done_without() -> None:
    """Whatever the kernel says to a submission: the ring is closed, and everybody gets everything by send()."""
    others = rings()
    async with Server(io_uring=True) as server:
        must_work(server, True)
        raws, topic = await audience(server, MANY)
        (ring,) = rings() - others
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, ring)  # what is entered from now on is no ring
        os.close(null)
        for body in (b"first", b"second"):
            assert topic.fan_out(Frame(body)) == MANY
            for raw in raws:
                assert await raw.frame() == (TEXT, body)
        assert not server.reactor.uses_io_uring()
        for raw in raws:
            await raw.close()
