"""The promises of both implementations (queue/base.py)."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import replace

import pytest

from chatcore.errors import BadRequest, TooLarge, Unavailable
from chatcore.queue.base import Clock, HandlerRegistry, Job, QueueFull

from .harness import SETTINGS, Backend, Log, depth, empty, run, until


def test_the_messages_of_a_key_are_handled_in_order_by_any_number_of_workers(backend: Backend) -> None:
    async def work() -> None:
        log = Log(slow_s=0.001)
        async with backend.worker() as a, backend.worker() as b, backend.worker() as c:
            for queue in (a, b, c):
                queue.consume("t", log, concurrency=8)

            async def fill(key: str) -> None:
                for n in range(15):
                    await (a, b, c)[n % 3].put("t", key, b"%d" % n)

            await asyncio.gather(*(fill(f"key {k}") for k in range(20)))
            await empty(a)
        assert not log.overlaps
        for k in range(20):
            assert log.payloads(f"key {k}") == [b"%d" % n for n in range(15)]
        assert len(log.done) == 300, "nothing twice while no worker dies"
        assert log.most_at_once > 1, "keys are handled in parallel"

    run(work)


def test_concurrency_is_bounded(backend: Backend) -> None:
    async def work() -> None:
        log = Log(slow_s=0.002)
        async with backend.worker() as queue:
            await asyncio.gather(*(queue.put("t", f"k{k}", b"x") for k in range(40)))
            queue.consume("t", log, concurrency=3)
            await empty(queue)
        assert log.most_at_once == 3
        assert len(log.done) == 40

    run(work)


def test_a_message_that_fails_holds_up_its_own_key_only(backend: Backend) -> None:
    async def work() -> None:
        # "bad" fails until everything else is done: it could not, if bad held it up.
        others = 30
        log = Log(fails=lambda job: job.payload == b"bad" and sum(j.key != "a" for j in log.done) < others)
        async with backend.worker(replace(SETTINGS, deliveries=100_000)) as queue:
            for payload in (b"bad", b"second", b"third"):
                await queue.put("t", "a", payload)
            for n in range(others):
                await queue.put("t", f"other {n % 7}", b"%d" % n)
            queue.consume("t", log, concurrency=2)
            await empty(queue)
            [stats] = await queue.stats()
        assert log.payloads("a") == [b"bad", b"second", b"third"]
        assert [j.payload for j in log.begun if j.key == "a"][:2] == [b"bad", b"bad"], "its key waits for it"
        assert not log.overlaps
        tries = [j.delivery for j in log.begun if j.payload == b"bad"]
        assert tries == list(range(1, len(tries) + 1))
        assert stats.retries == len(tries) - 1
        assert len({j.id for j in log.begun if j.payload == b"bad"}) == 1, "its id is the same in every delivery"

    run(work)


def test_after_five_deliveries_it_is_a_dead_letter_with_payload_and_error(backend: Backend) -> None:
    async def work() -> None:
        payload = b"\x00\xff bad \r\n"
        log = Log(fails=lambda job: b"bad" in job.payload)

        async def handler(job: Job) -> None:
            try:
                await log(job)
            except ValueError:
                raise RuntimeError("no\nway") from None
            except UnicodeDecodeError:
                raise RuntimeError("no\nway") from None

        async with backend.worker() as queue:
            id = await queue.put("t", "a", payload)
            await queue.put("t", "a", b"good")
            queue.consume("t", handler)
            await empty(queue)
            assert [j.delivery for j in log.begun if j.payload == payload] == [1, 2, 3, 4, 5]
            assert log.payloads() == [b"good"], "the next of the key goes on"
            [letter] = await queue.dead()
            assert (letter.id, letter.topic, letter.key) == (id, "t", "a")
            assert letter.payload == payload
            assert letter.deliveries == 5
            assert letter.error == "RuntimeError: no\nway"
            assert letter.created_ms <= letter.failed_ms
            [stats] = await queue.stats()
            assert (stats.depth, stats.retries, stats.dead) == (0, 4, 1)
            assert await queue.dead("other") == []

    run(work)


def test_an_error_that_is_no_unicode_text_is_kept_as_far_as_it_is(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """The outcome of such a delivery could not be written: the message was held until its lease ran out, and the
    dead letter did not say why."""
    caplog.set_level(logging.CRITICAL, "chatcore.queue")  # pytest-xdist sends no such text, either

    async def work() -> None:
        async def handler(job: Job) -> None:
            raise FileNotFoundError(os.fsdecode(b"caf\xe9.txt"))

        async with backend.worker(replace(SETTINGS, deliveries=1)) as queue:
            await queue.put("t", "k", b"x")
            queue.consume("t", handler)
            await empty(queue)
            [letter] = await queue.dead()
            assert letter.error == "FileNotFoundError: caf?.txt"

    run(work)


def test_dead_letters_are_retried_and_dropped(backend: Backend) -> None:
    async def work() -> None:
        mood = {"fails": True}
        log = Log(fails=lambda job: mood["fails"])
        async with backend.worker(replace(SETTINGS, deliveries=1)) as queue:
            ids = [await queue.put("t", f"k{n}", b"%d" % n) for n in range(4)]
            ids.append(await queue.put("u", "k", b"u"))
            queue.consume("t", log)
            queue.consume("u", log)
            await empty(queue)
            await empty(queue, "u")
            assert {x.id for x in await queue.dead()} == set(ids)
            mood["fails"] = False
            assert await queue.retry("nonsense") == 0
            assert await queue.retry(ids[0]) == 1
            await until(lambda: log.payloads() == [b"0"], "the retried one is handled")
            assert log.done[0].id == ids[0]
            assert log.done[0].delivery == 1, "as new"
            assert await queue.drop(ids[1]) == 1
            assert await queue.drop(ids[1]) == 0
            assert await queue.retry(None) == 3
            await until(lambda: sorted(log.payloads()) == [b"0", b"2", b"3", b"u"], "all others are handled")
            assert await queue.dead() == []
            mood["fails"] = True
            await queue.put("t", "k", b"x")
            await empty(queue)
            assert await queue.drop(None) == 1
            assert [s.dead for s in await queue.stats()] == [0, 0]

    run(work)


def test_of_too_many_dead_letters_the_oldest_go_and_are_counted(backend: Backend) -> None:
    async def work() -> None:
        async with backend.worker(replace(SETTINGS, deliveries=1, dead_max=3)) as queue:
            for n in range(5):
                await queue.put("t", "one key", b"%d" % n)
            queue.consume("t", Log(fails=lambda job: True))
            await empty(queue)
            assert [x.payload for x in await queue.dead()] == [b"2", b"3", b"4"]
            [stats] = await queue.stats()
            assert (stats.dead, stats.dead_lost) == (3, 2)

    run(work)


def test_a_full_queue_says_so_and_takes_more_when_there_is_room(backend: Backend) -> None:
    async def work() -> None:
        async with backend.worker(replace(SETTINGS, max_length=3)) as queue:
            await queue.put("t", "a", b"1")
            await queue.put("t", "b", b"2", delay_ms=3_600_000)
            await queue.put("t", "c", b"3")
            with pytest.raises(QueueFull, match="queue t is full: 3 messages") as refused:
                await queue.put("t", "d", b"4", dedupe_id="once")
            assert refused.value.code == "unavailable"
            assert refused.value.retry_after_ms
            assert await depth(queue) == 3
            await queue.put("u", "a", b"of another topic")
            log = Log()
            queue.consume("t", log)
            await until(lambda: sorted(log.payloads()) == [b"1", b"3"], "what waited is handled")
            await until_put(queue)
            await until(lambda: b"4" in log.payloads(), "what was refused left no dedupe id behind")

    async def until_put(queue: object) -> None:
        while True:
            try:
                await queue.put("t", "d", b"4", dedupe_id="once")  # type: ignore[attr-defined]
                return
            except QueueFull:
                await asyncio.sleep(0.005)

    run(work)


def test_a_delayed_message_comes_into_line_when_it_is_due(backend: Backend) -> None:
    async def work() -> None:
        log = Log()
        async with backend.worker() as queue:
            queue.consume("t", log)
            started = asyncio.get_running_loop().time()
            await queue.put("t", "a", b"later", delay_ms=2_000)
            await queue.put("t", "a", b"later still", delay_ms=2_001)
            await queue.put("t", "a", b"now")
            [stats] = await queue.stats()
            assert stats.delayed == 2
            assert stats.depth in (2, 3)
            await until(lambda: len(log.done) == 3, "all are handled")
            # The two clocks differ by what they round.
            assert asyncio.get_running_loop().time() - started >= 1.99
            await empty(queue)
        assert log.payloads() == [b"now", b"later", b"later still"]

    run(work)


def test_a_put_with_a_known_dedupe_id_stores_nothing(backend: Backend) -> None:
    async def work() -> None:
        log = Log()
        async with backend.worker(replace(SETTINGS, dedupe_ms=60_000)) as a, backend.worker() as b:
            first = await a.put("t", "k", b"1", dedupe_id="x")
            assert await b.put("t", "k", b"2", dedupe_id="x") == first
            other = await a.put("t", "k2", b"3", dedupe_id="x")
            assert other != first, "of another key"
            assert await a.put("t", "k", b"4") != await a.put("t", "k", b"4"), "without an id nothing is known"
            a.consume("t", log)
            await empty(a)
            assert await a.put("t", "k", b"5", dedupe_id="x") == first, "also when it is done with"
            assert sorted(log.payloads()) == [b"1", b"3", b"4", b"4"]

    run(work)


def test_a_dedupe_id_is_forgotten_after_its_time(backend: Backend) -> None:
    async def work() -> None:
        async with backend.worker(replace(SETTINGS, dedupe_ms=30)) as queue:
            first = await queue.put("t", "k", b"1", dedupe_id="x")

            async def forgotten() -> bool:
                return bool(await queue.put("t", "k", b"2", dedupe_id="x") != first)

            await until(forgotten, "the id can be used again")

    run(work)


def test_a_handler_that_takes_too_long_is_cancelled_and_called_again(backend: Backend) -> None:
    async def work() -> None:
        cancelled = []

        async def handler(job: Job) -> None:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                cancelled.append(job.delivery)
                raise

        async with backend.worker(replace(SETTINGS, handler_timeout_ms=20, deliveries=2)) as queue:
            await queue.put("t", "k", b"")
            queue.consume("t", handler)
            await empty(queue)
            [letter] = await queue.dead()
        assert cancelled == [1, 2]
        assert letter.error == "took longer than 0.02 s"

    run(work)


def test_a_long_handler_keeps_its_lease(backend: Backend) -> None:
    async def work() -> None:
        # Two leases long; the other worker would take it if one were missed.
        log = Log(slow_s=4.0)
        settings = replace(SETTINGS, lease_ms=2_000)
        async with backend.worker(settings) as a, backend.worker(settings) as b:
            await a.put("t", "k", b"1")
            a.consume("t", log)
            await until(lambda: log.begun, "it is begun")
            b.consume("t", log)
            await empty(a)
        assert [j.delivery for j in log.begun] == [1]

    run(work)


def test_a_consumer_that_stops_gives_back_what_it_could_not_end(backend: Backend) -> None:
    async def work() -> None:
        stuck = Log(slow_s=3600)
        log = Log()
        async with backend.worker() as a, backend.worker() as b:
            await a.put("t", "k", b"1")
            consumer = a.consume("t", stuck)
            await until(lambda: stuck.begun, "it is begun")
            await consumer.stop(0.01)
            b.consume("t", log)
            await until(lambda: log.done, "the other has it")
        # Well before the lease of 10 s was over.
        assert [j.delivery for j in log.done] == [1], "an interrupted delivery does not count"

    run(work)


def test_a_consumer_that_stops_lets_handlers_end(backend: Backend) -> None:
    async def work() -> None:
        log = Log(slow_s=0.05)
        async with backend.worker() as queue:
            for n in range(5):
                await queue.put("t", f"k{n}", b"x")
            consumer = queue.consume("t", log)
            await until(lambda: len(log.begun) == 5, "all are begun")
            await consumer.stop()
            assert len(log.done) == 5
            assert await depth(queue) == 0
            again = queue.consume("t", log)
            await again.stop()

    run(work)


def test_a_worker_that_stands_still_gives_up_before_others_begin(backend: Backend) -> None:
    """Seen from the worker: by its own clock its lease may have run out."""

    async def work() -> None:
        shift = {"ms": 0}
        real = Clock()
        begun: list[Job] = []
        ended: list[Job] = []

        async def handler(job: Job) -> None:
            assert len(ended) == len(begun), "the last has ended before the next is begun, by whomever"
            begun.append(job)
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                await asyncio.sleep(0.1)  # it tidies up
                ended.append(job)
                raise

        clock = Clock(mono_ms=lambda: real.mono_ms() + shift["ms"])
        async with backend.worker(replace(SETTINGS, lease_ms=2_000), clock) as queue:
            await queue.put("t", "k", b"1")
            queue.consume("t", handler)
            await until(lambda: begun, "it is begun")
            shift["ms"] = 60_000
            await until(lambda: ended, "the handler is cancelled")
            await until(lambda: len(begun) == 2, "it is begun again")
            assert begun[1].delivery == 2
            assert begun[1].id == begun[0].id

    run(work)


def test_unusable_arguments_are_refused(backend: Backend) -> None:
    async def work() -> None:
        async with backend.worker() as queue:
            for topic, key, delay_ms, dedupe_id in [
                ("", "k", 0, None), ("T", "k", 0, None), ("{t}", "k", 0, None), ("t" * 65, "k", 0, None),
                ("t", "", 0, None), ("t", "k" * 513, 0, None), ("t", "\ud800", 0, None),
                ("t", "k", -1, None), ("t", "k", 10**12, None), ("t", "k", 0, ""),
            ]:  # fmt: skip
                with pytest.raises(BadRequest):
                    await queue.put(topic, key, b"", delay_ms=delay_ms, dedupe_id=dedupe_id)
            with pytest.raises(TooLarge):
                await queue.put("t", "k", b"x" * (SETTINGS.payload_bytes + 1))
            await queue.put("t", "{k} 🙂", b"x" * SETTINGS.payload_bytes)
            log = Log()
            queue.consume("t", log)
            with pytest.raises(ValueError, match="has a consumer"):
                queue.consume("t", log)
            await empty(queue)
            assert [(j.key, len(j.payload)) for j in log.done] == [("{k} 🙂", SETTINGS.payload_bytes)]

    run(work)


def test_metrics_tell_depth_and_age(backend: Backend) -> None:
    async def work() -> None:
        async with backend.worker() as queue:
            assert await queue.stats() == []
            await queue.put("t", "k", b"1")
            await queue.put("t", "k", b"2")

            async def old() -> bool:
                [stats] = await queue.stats()
                assert (stats.topic, stats.depth, stats.delayed, stats.retries, stats.dead) == ("t", 2, 0, 0, 0)
                return bool(stats.oldest_ms >= 20)

            await until(old, "the oldest grows old")
            queue.consume("t", Log())
            await empty(queue)
            [stats] = await queue.stats()
            assert stats.oldest_ms == 0
            assert queue.healthy

    run(work)


def test_handlers_are_registered_once_and_started_together(backend: Backend) -> None:
    async def work() -> None:
        handlers = HandlerRegistry()
        logs = {"mail": Log(), "push": Log()}
        for topic, log in logs.items():
            handlers.register(topic, log, concurrency=2)
        with pytest.raises(ValueError, match="has a handler"):
            handlers.register("mail", Log())
        with pytest.raises(BadRequest):
            handlers.register("No Topic", Log())
        assert handlers.topics() == ["mail", "push"]
        async with backend.worker() as queue:
            handlers.start(queue)
            for topic in logs:
                await queue.put(topic, "k", topic.encode())
            await until(lambda: all(log.done for log in logs.values()), "both are handled")
        assert all(log.payloads() == [topic.encode()] for topic, log in logs.items())

    run(work)


def test_full_is_a_kind_of_unavailable() -> None:
    """Code that replies to a client does not have to know about queues."""
    assert issubclass(QueueFull, Unavailable)
