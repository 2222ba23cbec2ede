"""What a topic holds until the end of the loop's turn keeps its place among everything else.

Frames of one turn are joined before they are queued; nobody may be able to tell but by the clock.
"""

from __future__ import annotations

import gc

from chatcore._fast.reactor import Frame, Topic

from .support import Raw, Server, Session, close_payload, on_loop

TEXT, CLOSE = 1, 8


async def pair(server: Server) -> tuple[Raw, Raw, Session, Session]:
    a, b = await Raw.websocket(server), await Raw.websocket(server)
    return a, b, await server.session(0), await server.session(1)


async def texts(raw: Raw, n: int) -> list[bytes]:
    return [(await raw.frame())[1] for _ in range(n)]


@on_loop
async def test_frames_of_one_turn_are_one_entry_in_each_outbox() -> None:
    async with Server() as server:
        a, b, x, y = await pair(server)
        topic = Topic(server.reactor, 0)
        assert topic.add(x.conn)
        assert topic.add(y.conn)
        before = server.reactor.stats()
        for i in range(50):
            assert topic.fan_out(Frame(b"%d" % i)) == 2
        wanted = [b"%d" % i for i in range(50)]
        assert await texts(a, 50) == wanted
        assert await texts(b, 50) == wanted
        after = server.reactor.stats()
        assert after["sends"] - before["sends"] == 2
        assert after["frames_queued"] - before["frames_queued"] == 100
        await a.close()
        await b.close()


@on_loop
async def test_what_is_sent_to_one_comes_in_its_place() -> None:
    async with Server() as server:
        a, b, x, y = await pair(server)
        topics = [Topic(server.reactor, i) for i in range(2)]
        for topic in topics:
            topic.add(x.conn)
            topic.add(y.conn)
        topics[0].fan_out(Frame(b"1"))
        topics[1].fan_out(Frame(b"2"))
        server.reactor.send(x.conn, b"3")
        topics[1].fan_out(Frame(b"4"))
        server.reactor.send_frame(x.conn, Frame(b"5"))
        topics[0].fan_out(Frame(b"6"))
        assert await texts(a, 6) == [b"1", b"2", b"3", b"4", b"5", b"6"]
        assert await texts(b, 4) == [b"1", b"2", b"4", b"6"]
        await a.close()
        await b.close()


@on_loop
async def test_who_joins_gets_what_comes_after_and_who_leaves_what_came_before() -> None:
    async with Server() as server:
        a, b, x, y = await pair(server)
        topic = Topic(server.reactor, 0)
        topic.add(x.conn)
        topic.fan_out(Frame(b"1"))
        topic.add(y.conn)
        topic.fan_out(Frame(b"2"))
        topic.discard(x.conn)
        topic.fan_out(Frame(b"3"))
        server.reactor.send(x.conn, b"end")
        server.reactor.send(y.conn, b"end")
        assert await texts(a, 3) == [b"1", b"2", b"end"]
        assert await texts(b, 3) == [b"2", b"3", b"end"]
        await a.close()
        await b.close()


@on_loop
async def test_a_close_comes_after_what_was_said() -> None:
    async with Server() as server:
        a, b, x, y = await pair(server)
        topic = Topic(server.reactor, 0)
        topic.add(x.conn)
        topic.add(y.conn)
        topic.fan_out(Frame(b"1"))
        server.reactor.close(x.conn, 1012, b"restart")
        topic.fan_out(Frame(b"2"))
        assert await a.frame() == (TEXT, b"1")
        assert await a.frame() == (CLOSE, close_payload(1012, b"restart"))
        assert await texts(b, 2) == [b"1", b"2"]
        await a.close()
        await b.close()


@on_loop
async def test_skipping_somebody_keeps_the_order() -> None:
    async with Server() as server:
        a, b, x, y = await pair(server)
        server.reactor.authenticated(x.conn, 7, 0)
        topic = Topic(server.reactor, 0)
        topic.add(x.conn)
        topic.add(y.conn)
        topic.fan_out(Frame(b"1"))
        assert topic.fan_out(Frame(b"2"), 7) == 1
        topic.fan_out(Frame(b"3"))
        assert await texts(a, 2) == [b"1", b"3"]
        assert await texts(b, 3) == [b"1", b"2", b"3"]
        await a.close()
        await b.close()


@on_loop
async def test_what_is_queued_counts_what_is_held() -> None:
    async with Server() as server:
        a, b, x, y = await pair(server)
        topic = Topic(server.reactor, 0)
        topic.add(x.conn)
        topic.fan_out(Frame(b"x" * 100))
        topic.fan_out(Frame(b"x" * 100))
        assert server.reactor.queued(x.conn) == 2 * len(Frame(b"x" * 100))
        assert server.reactor.queued(y.conn) == 0
        await a.close()
        await b.close()


@on_loop
async def test_much_in_one_turn_is_not_held_for_long() -> None:
    async with Server(outbox_limit_bytes=1 << 24) as server:
        a, b, x, y = await pair(server)
        topic = Topic(server.reactor, 0)
        topic.add(x.conn)
        topic.add(y.conn)
        wanted = [b"%d" % i for i in range(1000)] + [b"y" * 40_000] * 5
        for text in wanted:
            topic.fan_out(Frame(text))
        assert await texts(a, len(wanted)) == wanted
        assert await texts(b, len(wanted)) == wanted
        await a.close()
        await b.close()


@on_loop
async def test_a_topic_or_a_member_that_goes_takes_what_is_held_with_it() -> None:
    async with Server() as server:
        a, b, x, y = await pair(server)
        first, second = Topic(server.reactor, 0), Topic(server.reactor, 1)
        first.add(x.conn)
        second.add(x.conn)
        second.add(y.conn)
        first.fan_out(Frame(b"lost"))
        second.fan_out(Frame(b"1"))
        del first
        gc.collect()
        server.reactor.abort(x.conn)
        second.fan_out(Frame(b"2"))
        assert await texts(b, 2) == [b"1", b"2"]
        await server.until(lambda: bool(x.closed), "the end of the other")
        await a.close()
        await b.close()


@on_loop
async def test_a_topic_in_a_circle_leaves_nothing_of_itself_in_the_list_of_those_that_hold_something() -> None:
    """The collector cleared the topic, its reactor with it, before the topic took itself out of the list."""
    async with Server() as server:
        a, b, x, y = await pair(server)
        first, second = Topic(server.reactor, None), Topic(server.reactor, 1)
        first.key = [first]  # younger than the topic, which is therefore cleared first
        for topic in (first, second):
            topic.add(x.conn)
            topic.add(y.conn)
        first.fan_out(Frame(b"lost"))
        del first, topic
        gc.collect()
        second.fan_out(Frame(b"1"))
        assert await texts(a, 1) == [b"1"]
        assert await texts(b, 1) == [b"1"]
        await a.close()
        await b.close()


@on_loop
async def test_the_end_of_everything_with_something_held() -> None:
    async with Server() as server:
        a, b, x, _ = await pair(server)
        topic = Topic(server.reactor, 0)
        topic.add(x.conn)
        topic.fan_out(Frame(b"1"))
        server.loop.remove_reader(server.watched)
        server.watched = -1
        server.reactor.shutdown()
        assert len(topic) == 0
        assert topic.fan_out(Frame(b"2")) == 0
        await a.close()
        await b.close()
