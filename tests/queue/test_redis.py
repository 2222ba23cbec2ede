"""What only the queue on Redis has: a Redis that is away, has forgotten everything, or is a Cluster; shares."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from pathlib import Path

import pytest

from chatcore.errors import Unavailable
from chatcore.queue.base import Job, JobHandler
from chatcore.queue.redis import PARTITIONS, RedisQueue
from chatcore.queue.redis_scripts import TopicKeys
from tests.services.redis import RedisCluster, RedisServer

from .harness import SETTINGS, Log, RedisBackend, depth, empty, run, until


async def put_when_possible(queue: RedisQueue, key: str, payload: bytes) -> None:
    """As a caller does it: again with the same dedupe id, until it is known to be put."""
    while True:
        try:
            await queue.put("t", key, payload, dedupe_id=payload.decode())
            return
        except Unavailable:
            await asyncio.sleep(0.01)


def test_redis_away_and_back_loses_and_repeats_nothing(redis_server: RedisServer) -> None:
    async def work() -> None:
        log = Log()
        backend = RedisBackend(redis_server.url)
        async with backend.worker() as a, backend.worker() as b:
            a.consume("t", log)
            for n in range(10):
                await put_when_possible(a, f"k{n % 3}", b"%d" % n)
            await until(lambda: len(log.done) == 10, "it works")
            redis_server.kill()
            with pytest.raises(Unavailable):
                await a.put("t", "k0", b"refused")
            assert not a.healthy
            b.consume("t", log)  # also what begins now works when Redis is back
            waiting = [asyncio.ensure_future(put_when_possible(b, f"k{n % 3}", b"%d" % n)) for n in range(10, 13)]
            await asyncio.sleep(0.3)
            await asyncio.to_thread(redis_server.start)
            await asyncio.gather(*waiting)
            await until(lambda: len({*log.payloads()}) == 13, "all are handled")
            await empty(a)
            await until(lambda: a.healthy, "it is well again")
        for k in range(3):
            assert log.payloads(f"k{k}")[:4] == [b"%d" % n for n in range(k, 13, 3)][:4]
        assert not log.overlaps

    run(work)


def test_an_unused_queue_notices_that_redis_is_away_and_back(redis_server: RedisServer) -> None:
    async def work() -> None:
        async with RedisBackend(redis_server.url).worker() as queue:
            await queue.probe()
            assert queue.healthy
            redis_server.kill()
            with pytest.raises(Unavailable):
                await queue.probe()
            assert not queue.healthy
            await asyncio.to_thread(redis_server.start)
            while not queue.healthy:
                with contextlib.suppress(Unavailable):  # the breaker waits a moment
                    await queue.probe()
                await asyncio.sleep(0.01)

    run(work)


def test_a_worker_that_cannot_renew_its_leases_ends_its_handlers(redis_server: RedisServer) -> None:
    async def work() -> None:
        begun: list[Job] = []
        cancelled: list[Job] = []

        async def handler(job: Job) -> None:
            begun.append(job)
            if job.delivery == 1:
                try:
                    await asyncio.sleep(3600)
                finally:
                    cancelled.append(job)

        async with RedisBackend(redis_server.url).worker(replace(SETTINGS, lease_ms=1_000)) as queue:
            await queue.put("t", "k", b"1")
            queue.consume("t", handler)
            await until(lambda: begun, "it is begun")
            redis_server.freeze()
            await until(lambda: cancelled, "it is ended before another worker could begin it")
            redis_server.thaw()
            await empty(queue)
        assert [j.delivery for j in begun] == [1, 2]
        assert begun[1].fence >= begun[0].fence, "the same if no other worker had it meanwhile"

    run(work)


def test_a_redis_that_comes_back_empty_is_used_on(redis_server: RedisServer) -> None:
    async def work() -> None:
        log = Log()
        started_us = time.time_ns() // 1000
        async with RedisBackend(redis_server.url).worker(replace(SETTINGS, lease_ms=1_500)) as queue:
            queue.consume("t", log)
            await queue.put("t", "k", b"before")
            await until(lambda: log.done, "it works")
            await asyncio.to_thread(redis_server.restart, lose_data=True)
            await put_when_possible(queue, "k", b"after")
            await until(lambda: len(log.done) == 2, "what is put from now on is handled")
            await empty(queue)
        assert log.payloads() == [b"before", b"after"]
        assert log.done[1].fence > log.done[0].fence > started_us, "fencing numbers do not begin again"

    run(work)


def test_a_worker_that_lost_its_lease_without_noticing_changes_nothing_more(redis_server: RedisServer) -> None:
    """Every script checks the lease, so the clock of the worker that lost it does not matter."""

    async def work() -> None:
        backend = RedisBackend(redis_server.url)
        begun: dict[str, list[Job]] = {"a": [], "b": []}
        go_on = {"a": asyncio.Event(), "b": asyncio.Event()}

        def handler(name: str) -> JobHandler:
            async def handle(job: Job) -> None:
                begun[name].append(job)
                await go_on[name].wait()

            return handle

        # The first looks for its leases every 200 s.
        async with backend.worker(replace(SETTINGS, lease_ms=600_000)) as a, backend.worker(SETTINGS) as b:
            for n in (b"1", b"2"):
                await a.put("t", "k", n)
            first = a.consume("t", handler("a"))
            await until(lambda: begun["a"], "it is begun")
            keys = a.keys("t")
            await asyncio.to_thread(redis_server.command, "DEL", keys.consumers, *keys.leases)
            b.consume("t", handler("b"))
            await until(lambda: begun["b"], "the other begins it, too")
            go_on["a"].set()
            await until(
                lambda: keys.partition("k") not in first.partitions, "the first learns it when it writes the outcome"
            )
            assert await depth(b) == 2, "it is not ended"
            assert [j.payload for j in begun["a"]] == [b"1"], "and the next is not begun"
            go_on["b"].set()
            await empty(b)
            assert [(j.payload, j.delivery) for j in begun["b"]] == [(b"1", 2), (b"2", 1)]
            assert begun["b"][0].fence > begun["a"][0].fence

    run(work)


def test_an_idle_consumer_sends_few_commands(redis_server: RedisServer) -> None:
    async def work() -> None:
        async with RedisBackend(redis_server.url).worker() as queue:
            consumer = queue.consume("t", Log())
            await queue.put("t", "k", b"1")
            await empty(queue)
            await until(lambda: len(consumer.partitions) == PARTITIONS, "it has everything")

            async def calls(command: str) -> int:
                stats = await asyncio.to_thread(redis_server.command, "INFO", "commandstats")
                return int(stats.get(f"cmdstat_{command}", {}).get("calls", 0))

            waits = await calls("blpop")

            async def waited(times: int) -> bool:
                return await calls("blpop") >= waits + times

            await until(lambda: waited(2), "all that was put has been seen")
            before = await calls("evalsha")
            await until(lambda: waited(6), "it has waited for some more")
            # One to look for what is due before each wait; and a renewal may fall in between.
            assert await calls("evalsha") - before <= 12 + PARTITIONS

    run(work)


def test_a_stream_that_was_deleted_is_created_again(redis_server: RedisServer) -> None:
    async def work() -> None:
        log = Log()
        async with RedisBackend(redis_server.url).worker(replace(SETTINGS, lease_ms=1_500)) as queue:
            queue.consume("t", log)
            await queue.put("t", "k", b"1")
            await empty(queue)
            keys = queue.keys("t")
            await asyncio.to_thread(redis_server.command, "DEL", *keys.streams)
            await queue.put("t", "k", b"2")
            await until(lambda: len(log.done) == 2, "it goes on")

    run(work)


def test_the_workers_of_a_topic_share_its_partitions(redis_server: RedisServer) -> None:
    async def work() -> None:
        backend = RedisBackend(redis_server.url)
        settings = replace(SETTINGS, lease_ms=1_500)
        async with backend.worker(settings) as a, backend.worker(settings) as b:
            first = a.consume("t", Log())
            await until(lambda: len(first.partitions) == PARTITIONS, "one alone has all")
            second = b.consume("t", Log())
            half = PARTITIONS // 2
            await until(lambda: (len(first.partitions), len(second.partitions)) == (half, half), "two have half each")
            assert not first.partitions.keys() & second.partitions.keys()
            await first.stop()
            await until(lambda: len(second.partitions) == PARTITIONS, "a worker that stops gives up its own")

    run(work)


def test_a_busy_worker_gives_up_partitions_where_nothing_runs(redis_server: RedisServer) -> None:
    async def work() -> None:
        backend = RedisBackend(redis_server.url)
        settings = replace(SETTINGS, lease_ms=4_500)
        stuck, log = Log(slow_s=3600), Log()
        async with backend.worker(settings) as a, backend.worker(settings) as b:
            for n in range(64):
                await a.put("t", f"k{n}", b"x")
            first = a.consume("t", stuck, concurrency=1)
            await until(lambda: stuck.begun, "its only place is taken")
            b.consume("t", log)
            await until(lambda: len(first.partitions) == PARTITIONS // 2, "the other gets its share")
            await until(lambda: log.done, "and handles it")
            assert len(stuck.begun) == 1

    run(work)


def test_it_works_on_a_cluster(tmp_path: Path) -> None:
    async def work(url: str) -> None:
        log = Log(fails=lambda job: job.payload == b"bad")
        async with RedisBackend(url).worker(replace(SETTINGS, deliveries=2)) as queue:
            await queue.probe()
            queue.consume("t", log)
            queue.consume("u", log)
            for n in range(6):
                await queue.put("t", f"k{n % 2}", b"%d" % n, dedupe_id=str(n))
                await queue.put("u", f"u{n % 2}", b"%d" % n, delay_ms=n)
            await queue.put("t", "k0", b"bad")
            await empty(queue)
            await empty(queue, "u")
            assert log.payloads("k0") == [b"0", b"2", b"4"]
            assert log.payloads("u1") == [b"1", b"3", b"5"]
            [letter] = await queue.dead()
            assert letter.payload == b"bad"
            assert [s.topic for s in await queue.stats()] == ["t", "u"]
            assert await queue.retry(letter.id) == 1
            await until(lambda: len([j for j in log.begun if j.payload == b"bad"]) == 4, "it is tried again")

    with RedisCluster(tmp_path) as cluster:
        run(lambda: work(cluster.url))


def test_all_keys_of_a_topic_share_a_slot_and_a_dedupe_id_is_of_its_key() -> None:
    k = TopicKeys("chatcore:abc", "t", 2)
    names = [
        *k.streams,
        *k.leases,
        *k.wakes,
        k.consumers,
        k.fence,
        k.delayed,
        k.later,
        k.dead,
        k.counts,
        k.once("a", "b"),
    ]
    assert {name.partition("}")[0] for name in names} == {"{chatcore:abc:q:t"}
    assert len({*names}) == len(names)
    assert k.once("ab", "c") != k.once("a", "bc")


def test_a_put_whose_caller_gave_up_is_still_put_once(redis_server: RedisServer) -> None:
    async def work() -> None:
        async with RedisBackend(redis_server.url).worker() as queue:
            await queue.put("t", "k", b"0")
            putting = asyncio.ensure_future(queue.put("t", "k", b"1", dedupe_id="1"))
            await asyncio.sleep(0)
            putting.cancel()
            await asyncio.gather(putting, return_exceptions=True)
            await queue.put("t", "k", b"1", dedupe_id="1")
            assert await depth(queue) == 2

    run(work)
