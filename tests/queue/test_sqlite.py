"""What only the embedded queue has: the store's transactions, and clocks that it trusts no more than it must."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatcore.errors import Unavailable
from chatcore.queue.base import Clock, Job, QueueFull
from chatcore.queue.sqlite import SQLiteQueue
from chatcore.queue.sqlite_ops import Lease, QueueDone, QueueFailed, QueueGiveBack, QueueTake, Taken
from chatcore.store.sqlite.requests import Request

from .harness import SETTINGS, Log, SQLiteBackend, depth, empty, run, until


@pytest.fixture
def backend(tmp_path: Path) -> SQLiteBackend:
    return SQLiteBackend(tmp_path)


def test_a_delay_is_kept_by_the_wall_clock(backend: SQLiteBackend) -> None:
    async def work() -> None:
        now = {"ms": 1_000_000}
        log = Log()
        clock = Clock(wall_ms=lambda: now["ms"])
        async with backend.worker(SETTINGS, clock) as queue:
            queue.consume("t", log)
            await queue.put("t", "k", b"in a day", delay_ms=86_400_000)
            await queue.put("t", "k", b"now")
            await until(lambda: log.payloads() == [b"now"], "what is not delayed is handled")
            now["ms"] += 86_399_999
            await queue.put("t", "k", b"in between")
            await until(lambda: len(log.done) == 2, "what was put meanwhile is handled")
            now["ms"] += 1
            await empty(queue)
        assert log.payloads() == [b"now", b"in between", b"in a day"]

    run(work)


def test_a_wall_clock_that_is_set_back_keeps_nothing_waiting(backend: SQLiteBackend) -> None:
    async def work() -> None:
        now = {"ms": 10**12}
        log = Log(fails=lambda job: job.delivery == 1 and job.key == "k")
        async with backend.worker(SETTINGS, Clock(wall_ms=lambda: now["ms"])) as queue:
            await queue.put("t", "k", b"1")
            consumer = queue.consume("t", log)
            await until(lambda: log.begun, "it has failed once")
            await consumer.stop()
            now["ms"] -= 86_400_000
            await queue.put("t", "k2", b"2")
            queue.consume("t", log)
            await empty(queue)
            assert sorted(log.payloads()) == [b"1", b"2"]

    run(work)


def test_leases_of_another_boot_are_void(backend: SQLiteBackend) -> None:
    async def work() -> None:
        stuck, log = Log(slow_s=3600), Log()
        async with backend.worker(replace(SETTINGS, lease_ms=600_000)) as before, backend.worker() as after:
            await before.put("t", "k", b"1")
            before.consume("t", stuck)
            await until(lambda: stuck.begun, "it is begun")
            after.lease = Lease(after.lease.owner, "another boot")
            after.consume("t", log)
            await until(lambda: log.done, "it is begun again at once")
            assert log.done[0].delivery == 2

    run(work)


def test_a_store_that_does_not_answer_for_a_while_stops_nothing_for_good(backend: SQLiteBackend) -> None:
    async def work() -> None:
        log = Log()
        async with backend.worker() as inner:
            away = {"is": False}

            def answered(put: object) -> object:
                def call(work: object) -> asyncio.Future[object]:
                    if not away["is"]:
                        return put(work)  # type: ignore[operator, no-any-return]
                    future = asyncio.get_running_loop().create_future()
                    future.set_exception(Unavailable("the store does not answer"))
                    return future

                return call

            queue = SQLiteQueue(answered(inner._write), answered(inner._read), SETTINGS)  # type: ignore[arg-type]
            queue.consume("t", log)
            await queue.put("t", "k", b"1")
            await until(lambda: log.done, "it works")
            away["is"] = True
            with pytest.raises(Unavailable):
                await queue.put("t", "k", b"2")
            assert not queue.healthy
            await inner.put("t", "k", b"3")
            away["is"] = False
            await empty(queue)
            assert log.payloads() == [b"1", b"3"]
            await queue.close(0)

    run(work)


def test_a_worker_that_cannot_renew_its_leases_ends_its_handlers(backend: SQLiteBackend) -> None:
    async def work() -> None:
        cancelled: list[Job] = []
        renewed: list[object] = []
        away = False

        async def handler(job: Job) -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                cancelled.append(job)

        async with backend.worker() as inner:

            def write(request: Request) -> asyncio.Future[Any]:
                if not away:
                    renewed.append(request)
                    return inner._write(request)
                # As a store that hangs: its answer never comes.
                return asyncio.get_running_loop().create_future()

            queue = SQLiteQueue(write, inner._read, replace(SETTINGS, lease_ms=900))
            await queue.put("t", "k", b"1")
            queue.consume("t", handler)
            await until(lambda: len(renewed) >= 3, "it was put, taken and held once more")
            away = True
            await until(lambda: cancelled, "it is ended before another worker could begin it")
            for task in asyncio.all_tasks():
                if task.get_name().startswith("queue-"):
                    task.cancel()

    run(work)


def test_a_full_topic_does_not_make_the_queue_unhealthy(backend: SQLiteBackend) -> None:
    """It did, since "full" is a kind of "unavailable": the health of the worker said that its queue was down."""

    async def work() -> None:
        async with backend.worker(replace(SETTINGS, max_length=1)) as queue:
            await queue.put("t", "k", b"1")
            with pytest.raises(QueueFull):
                await queue.put("t", "k", b"2")
            assert queue.healthy

    run(work)


def test_an_outcome_that_is_written_twice_changes_nothing_more(backend: SQLiteBackend) -> None:
    """A worker asks again when the writer died before it answered."""

    async def work() -> None:
        async with backend.worker() as queue:
            settings, lease = queue.settings, queue.lease

            async def take() -> Job:
                now = queue.clock.mono_ms()
                jobs: list[Job] = await queue.write(
                    QueueTake("t", lease, 1, frozenset(), settings, queue.clock.wall_ms(), now)
                )
                [job] = jobs
                return job

            for payload in (b"1", b"2"):
                await queue.put("t", "k", payload)
            outcomes: list[Callable[[Taken], Request]] = [
                lambda taken: QueueFailed(taken, lease, "no", 0, settings, queue.clock.wall_ms()),
                lambda taken: QueueGiveBack(taken, lease),
                lambda taken: QueueFailed(taken, lease, "no", None, settings, queue.clock.wall_ms()),
                lambda taken: QueueDone(taken, lease),
            ]
            begun = []
            for outcome in outcomes:
                job = await take()
                begun.append((job.payload, job.delivery))
                request = outcome(Taken.of(job))
                assert await queue.write(request) is True
                assert await queue.write(request) is False
            assert begun == [(b"1", 1), (b"1", 2), (b"1", 2), (b"2", 1)]
            [stats] = await queue.stats()
            assert (stats.depth, stats.dead) == (0, 1)

    run(work)


def test_all_workers_put_into_one_bound(backend: SQLiteBackend) -> None:
    async def work() -> None:
        settings = replace(SETTINGS, max_length=10)
        async with backend.worker(settings) as a, backend.worker(settings) as b:
            puts = [queue.put("t", f"k{n}", b"") for n in range(10) for queue in (a, b)]
            outcomes = await asyncio.gather(*puts, return_exceptions=True)
            assert sum(isinstance(outcome, str) for outcome in outcomes) == 10
            assert await depth(a) == 10

    run(work)
