"""The Redis bus on a real Redis, while all is well."""

from __future__ import annotations

import asyncio
import uuid

import pytest
import redis.asyncio

from chatcore.bus.base import MAX_PAYLOAD_BYTES
from chatcore.bus.redis import RedisBus

from ..services.redis import RedisServer, redis_server, redis_url  # noqa: F401
from .redis_parts import PATIENCE_S, buses, connected, run


@pytest.fixture
def prefix() -> str:
    return f"test-{uuid.uuid4().hex}"


async def ask(url: str, *args: str) -> list[object]:
    """A command on a connection of its own."""
    async with redis.asyncio.Redis.from_url(url) as client:
        reply: list[object] = await client.execute_command(*args)  # type: ignore[no-untyped-call]
        return reply


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_published_to_those_who_subscribed_and_not_to_oneself(redis_url: str, loop: str) -> None:  # noqa: F811
    async def main() -> None:
        async with buses(redis_url, "a", "b", "c") as [(a, ra), (b, rb), (c, rc)]:
            assert (set(c.peers), set(b.peers)) == ({"a", "b"}, {"a", "c"})
            assert a.healthy and b.healthy and c.healthy
            await b.subscribe(["x", "y"])
            await a.subscribe(["x"])
            a.publish("x", b"1")
            a.publish("nobody", b"2")
            a.publish("y", b"")
            a.send_to("c", "x", b"not subscribed")
            a.send_to("b", "x", b"3")
            a.send_to("nobody", "x", b"4")
            a.send_to("a", "x", b"to oneself")
            await rb.until(lambda: len(rb.messages) == 3)
            assert sorted(rb.messages) == [("x", b"1"), ("x", b"3"), ("y", b"")]
            b.publish("x", b"5")
            await ra.until(lambda: bool(ra.messages))
            assert ra.messages == [("x", b"5")]
            assert not rc.messages
            await rb.until(lambda: b.stats.own >= 2, "its greeting and its message came back, and were dropped")
            assert not any(payload == b"5" for _, payload in rb.messages)

    run(main(), loop)


def test_nothing_follows_the_goodbye(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A heartbeat or an answer after it made a worker that had left a peer again, for three silent heartbeats."""

    async def main() -> None:
        async with buses(redis_url, "a", "b", heartbeat_ms=50) as [(a, ra), (b, _)]:
            session = b._session
            assert session is not None
            wait_replies = session.wait_replies

            async def late() -> None:
                await asyncio.sleep(0.3)  # some heartbeats
                await wait_replies()

            monkeypatch.setattr(session, "wait_replies", late)
            await b.close()
            own = a.stats.own
            await ra.until(lambda: a.stats.own > own + 1, "what Redis got from b is here, too")
            assert ra.resyncs[-1] == "b leaves"
            assert a.peers == []

    run(main())


def test_messages_of_one_channel_keep_their_order_and_their_bytes(redis_url: str) -> None:  # noqa: F811
    async def main() -> None:
        async with buses(redis_url, "a", "b") as [(a, _), (b, rb)]:
            await b.subscribe(["x"])
            sent = [bytes([i % 256]) * (i % 700) for i in range(1000)]  # more than one packet
            sent += [b"\r\n$-1\r\n", b"", b"\0\1\2", bytes(MAX_PAYLOAD_BYTES)]
            for i, payload in enumerate(sent):
                a.publish("x", payload)
                if i % 300 == 299:
                    await asyncio.sleep(0)
            await rb.until(lambda: len(rb.messages) == len(sent))
            assert [payload for _, payload in rb.messages] == sent
            assert a.stats.sent < 50, "messages of one tick and channel share packets"

    run(main())


def test_a_tick_is_one_write_and_does_not_wait_for_replies(redis_server: RedisServer) -> None:  # noqa: F811
    def reads() -> int:
        return int(redis_server.command("INFO", "stats")["total_reads_processed"])

    async def main() -> None:
        async with buses(redis_server.url, "a", "b", heartbeat_ms=60_000) as [(a, _), (b, rb)]:
            channels = [f"c{i}" for i in range(100)]
            await b.subscribe(channels)
            before = reads()
            looking = reads() - before  # what a look costs
            before = reads()
            for channel in channels:
                a.publish(channel, b"x" * 10)
            await rb.until(lambda: len(rb.messages) == 100)
            assert reads() - before - looking <= 2, "100 messages of a tick are one write"
            # Redis does not reply, and yet each tick leaves.
            redis_server.freeze()
            before_write = a.stats.sent
            for channel in channels:
                a.publish(channel, b"y")
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            assert a.stats.sent == before_write + 100
            redis_server.thaw()
            await rb.until(lambda: len(rb.messages) == 200)

    run(main())


def test_subscriptions_are_counted_and_unsubscribing_reaches_redis(redis_url: str, prefix: str) -> None:  # noqa: F811
    async def main() -> None:
        async with buses(redis_url, "a", "b", prefix=prefix) as [(a, _), (b, rb)]:

            async def subscribers(channel: str) -> object:
                return (await ask(redis_url, "PUBSUB", "NUMSUB", f"{prefix}:{channel}"))[1]

            await b.subscribe(["x"])
            await b.subscribe(["x", "y"])
            b.unsubscribe(["x"])
            await b.subscribe(["flush"])
            assert await subscribers("x") == 1
            a.publish("x", b"1")
            await rb.until(lambda: rb.messages == [("x", b"1")])
            b.unsubscribe(["x", "x", "never"])
            await b.subscribe(["flush2"])  # confirmed behind it
            assert [await subscribers(c) for c in ("x", "y")] == [0, 1]
            a.publish("x", b"2")
            a.publish("y", b"3")
            await rb.until(lambda: ("y", b"3") in rb.messages)
            assert ("x", b"2") not in rb.messages
            # Given up and taken again within one tick, and across two.
            b.unsubscribe(["y"])
            await b.subscribe(["y"])
            b.unsubscribe(["y"])
            await asyncio.sleep(0)
            await b.subscribe(["y"])
            assert await subscribers("y") == 1

    run(main())


def test_after_subscribe_returns_nothing_published_is_missed(redis_url: str) -> None:  # noqa: F811
    async def main() -> None:
        async with buses(redis_url, "a", "b") as [(a, _), (b, rb)]:
            for i in range(100):
                await b.subscribe([f"c{i}"])
                a.publish(f"c{i}", b"at once")
                await rb.until(lambda i=i: (f"c{i}", b"at once") in rb.messages)  # type: ignore[misc]
                b.unsubscribe([f"c{i}"])

    run(main())


def test_subscriptions_of_one_tick_wait_together(redis_url: str) -> None:  # noqa: F811
    async def main() -> None:
        async with buses(redis_url, "a", "b") as [(a, _), (b, rb)]:
            await asyncio.gather(*(b.subscribe([f"c{i}", "same"]) for i in range(50)))
            for i in range(50):
                a.publish(f"c{i}", b"1")
            a.publish("same", b"2")
            await rb.until(lambda: len(rb.messages) == 51)
            # One that is cancelled takes back its own subscription only.
            task = asyncio.create_task(b.subscribe(["same", "other"]))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            b.unsubscribe(["same"] * 49)
            await b.subscribe(["flush"])
            a.publish("other", b"3")
            a.publish("same", b"4")
            await rb.until(lambda: ("same", b"4") in rb.messages)
            assert ("other", b"3") not in rb.messages

    run(main())


def test_the_states_of_all_peers_are_there_when_a_watch_is_confirmed(redis_url: str) -> None:  # noqa: F811
    async def main() -> None:
        async with buses(redis_url, "a", "b", "c") as [(_, ra), (b, rb), (_, rc)]:
            await b.subscribe(["x"])
            assert not ra.subscribers, "only presence is announced"
            users = [f"p:{i}" for i in range(1200)]  # more than one announcement
            await b.subscribe(users)
            assert ra.subscribers == rc.subscribers == [("b", user) for user in users]
            assert sorted(rb.messages) == sorted((u, b"state at " + peer) for u in users for peer in (b"a", b"c"))
            await b.subscribe(["p:1"])
            assert len(ra.subscribers) == len(users), "it was announced already"

    run(main())


def test_every_watch_is_announced_to_a_worker_that_comes_later(redis_url: str, prefix: str) -> None:  # noqa: F811
    async def main() -> None:
        async with buses(redis_url, "a", prefix=prefix) as [(a, ra)]:
            await a.subscribe(["p:1", "p:2", "x"])
            async with buses(redis_url, "b", prefix=prefix) as [(b, rb)]:
                assert b.peers == ["a"]
                await rb.until(lambda: rb.subscribers == [("a", "p:1"), ("a", "p:2")])
                await ra.until(lambda: ra.messages == [("p:1", b"state at b"), ("p:2", b"state at b")])
            await ra.resynced("b leaves")
            assert ra.gone == ["b"]
            assert a.peers == []

    run(main())


def test_two_prefixes_do_not_hear_each_other(redis_url: str) -> None:  # noqa: F811
    async def main() -> None:
        async with buses(redis_url, "a", "b") as [(a, _), (b, rb)], buses(redis_url, "a2") as [(a2, ra2)]:
            await b.subscribe(["x"])
            await a2.subscribe(["x", "p:1"])
            a.publish("x", b"mine")
            a2.publish("x", b"yours")
            a2.send_to("b", "x", b"yours")
            await rb.until(lambda: bool(rb.messages))
            await b.subscribe(["flush"])
            assert rb.messages == [("x", b"mine")]
            assert not ra2.messages and not a2.peers and not rb.subscribers

    run(main())


def test_limits_and_malformed_packets(redis_url: str, prefix: str) -> None:  # noqa: F811
    async def main() -> None:
        async with buses(redis_url, "a", "b", prefix=prefix) as [(a, _), (b, rb)]:
            for channel in ("", "c" * 201, "ü" * 101):
                with pytest.raises(ValueError, match="bytes"):
                    await a.subscribe([channel])
            await b.subscribe(["c" * 200, "ü", "x"])
            a.publish("c" * 200, b"1")
            a.publish("ü", b"2")
            a.publish("x", bytes(MAX_PAYLOAD_BYTES + 1))
            assert a.stats.dropped == 1
            await rb.until(lambda: len(rb.messages) == 2)
            for channel in (":x", "!all", "!to:b"):
                for packet in (b"", b"12345678", b"12345678\1\xff\xff", b"12345678\1\1\0\0\0\0\xff", b"12345678\2x"):
                    async with redis.asyncio.Redis.from_url(redis_url) as client:
                        await client.publish(prefix + channel, packet)
            await rb.until(lambda: b.stats.malformed == 15 - 1)  # a record of one byte is a fine message for x
            rb.fail = True
            a.publish("x", b"3")
            a.publish("x", b"4")
            a.publish("ü", b"5")
            await rb.until(lambda: ("ü", b"5") in rb.messages)
            rb.fail = False
            assert b.healthy and a.peers == ["b"]

    run(main())


@pytest.mark.parametrize("name", ["", "a b", "x" * 201, "a\nb"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match="bus name"):
        RedisBus("redis://127.0.0.1", name, prefix="p", queue_bytes=1, confirm_timeout_ms=1, heartbeat_ms=1)


def test_by_a_unix_socket_with_a_database(redis_server: RedisServer) -> None:  # noqa: F811
    async def main() -> None:
        socket = f"unix://{redis_server.folder}/socket?db=3"
        async with buses(socket, "a", prefix="p") as [x], buses(redis_server.url + "/1", "b", prefix="p") as [y]:
            await connected(x, y)  # pub/sub knows no databases
            await y[0].subscribe(["x"])
            x[0].publish("x", b"1")
            await y[1].until(lambda: y[1].messages == [("x", b"1")])

    run(main())


def test_many_workers_that_start_together_find_each_other(redis_url: str) -> None:  # noqa: F811
    async def main() -> None:
        names = [f"w{i}" for i in range(16)]
        async with buses(redis_url, *names, heartbeat_ms=60_000) as made:
            async with asyncio.timeout(PATIENCE_S):
                await connected(*made)

    run(main())
