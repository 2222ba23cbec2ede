"""Workers that die or stand still in the middle of a handler: real processes, killed and stopped."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from chatcore.queue.base import DIED, Job

from .harness import SETTINGS, Backend, Log, empty, run, until
from .process import Process

#: Of the process that dies. Long enough that it does not lose it on a busy machine while it should have it.
LEASE_MS = 1_500


def test_what_a_killed_worker_handled_is_handled_by_another(backend: Backend) -> None:
    async def work() -> None:
        log = Log()
        async with backend.worker(replace(SETTINGS, lease_ms=1_500)) as queue:
            for key in ("a", "b"):
                for n in range(3):
                    await queue.put("t", key, b"%s%d" % (key.encode(), n))
            with Process("hang", backend, lease_ms=LEASE_MS) as process:
                await process.line("begun a0")
                process.kill()
                queue.consume("t", log)
                await empty(queue)
        assert log.payloads("a") == [b"a0", b"a1", b"a2"], "nothing is lost, and its order stays"
        assert log.payloads("b") == [b"b0", b"b1", b"b2"]
        [taken_over] = [j for j in log.done if j.payload == b"a0"]
        assert taken_over.delivery == 2
        assert [j.delivery for j in log.done if j.payload in (b"a1", b"b1")] == [1, 1], "what was not begun is as new"

    run(work)


def test_a_stopped_worker_that_wakes_up_later_does_no_harm(backend: Backend) -> None:
    async def work() -> None:
        begun: list[Job] = []
        go_on = asyncio.Event()

        async def handler(job: Job) -> None:
            begun.append(job)
            if job.payload == b"1":
                await go_on.wait()

        async with backend.worker(replace(SETTINGS, lease_ms=1_500)) as queue:
            await queue.put("t", "k", b"1")
            await queue.put("t", "k", b"2")
            with Process("stop", backend, lease_ms=LEASE_MS) as process:
                await process.line("begun 1")
                await process.stands_still()
                queue.consume("t", handler)
                await until(lambda: begun, "its message is begun here")
                process.go_on()
                # Its handler returns at once; it must not be believed.
                await process.line("does not count")
                assert not any("begun 2" in line for line in process.lines)
                assert [(j.payload, j.delivery) for j in begun] == [(b"1", 2)]
                [stats] = await queue.stats()
                assert stats.depth == 2, "nothing of what is handled here was ended by it"
                go_on.set()
                await empty(queue)
                seconds = [line for line in process.lines if "begun 2" in line]
                seconds += [j.payload.decode() for j in begun if j.payload == b"2"]
                if not seconds:  # it was its turn, and it reports that
                    await process.line("begun 2")
                assert len(seconds) <= 1
        assert begun[0].fence > 0

    run(work)


def test_a_message_that_kills_its_workers_is_a_dead_letter(backend: Backend) -> None:
    async def work() -> None:
        log = Log()
        async with backend.worker(replace(SETTINGS, lease_ms=1_500, deliveries=2)) as queue:
            await queue.put("t", "k", b"poison")
            await queue.put("t", "k", b"good")
            for delivery in (1, 2):
                with Process("die", backend, lease_ms=1_500, deliveries=2) as process:
                    await process.line(f"begun poison delivery {delivery}")
                    assert await process.end() == 9
            queue.consume("t", log)
            await empty(queue)
            assert log.payloads() == [b"good"]
            [letter] = await queue.dead()
        assert (letter.payload, letter.deliveries, letter.error) == (b"poison", 2, DIED)

    run(work)
