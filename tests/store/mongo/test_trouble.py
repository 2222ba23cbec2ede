"""The server is killed, stands still, is too busy, or is not there at all."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from chatcore.errors import Conflict, Unavailable
from chatcore.store.base import Appended, Opening
from chatcore.store.mongo.store import BrokenSchema

from ...services.mongodb import MongoServer
from ..harness import Database, change, message
from .parts import QUICK, Worker, assert_dense_and_once, insist, run, until_answered, workers


@pytest.fixture(scope="module")
def server() -> Iterator[MongoServer]:
    """One of our own, to be killed."""
    with MongoServer() as server:
        if server.external:
            pytest.skip("a server of others is not killed")
        yield server


@pytest.fixture
def database(server: MongoServer) -> Iterator[Database]:
    with server.fresh_database() as name:
        yield Database(server.url, name)


def test_nothing_is_lost_or_stored_twice_when_the_server_is_killed_in_the_middle(
    database: Database, server: MongoServer
) -> None:
    async def work() -> None:
        async with workers(database, 2, QUICK) as [a, b]:
            alice, bob = await a.user("alice"), await a.user("bob")
            conv = await a.conversation(alice, bob)
            answers: dict[str, Appended] = {}
            stop = asyncio.Event()

            async def send(worker: Worker, sender: Any) -> None:
                while not stop.is_set():
                    entry = message(conv, sender)
                    answers[entry.cid] = await insist(worker, entry)
                    await asyncio.sleep(random.random() * 0.02)

            senders = [asyncio.create_task(send(w, u)) for w in (a, b) for u in (alice, bob)]
            for _ in range(2):
                await asyncio.sleep(0.4)
                await asyncio.to_thread(server.kill)
                await asyncio.sleep(0.2)
                await asyncio.to_thread(server.start)
            await asyncio.sleep(1.0)
            stop.set()
            await asyncio.gather(*senders)
            log = await a.log(conv)
            assert_dense_and_once(log, answers)
            assert len(log) == len(answers) + 3, "and nothing that was not answered"

    run(work())


def test_what_lands_after_its_sender_was_told_unavailable_is_told_and_found(
    database: Database, server: MongoServer
) -> None:
    async def work() -> None:
        async with workers(database, 1, QUICK) as [a]:
            alice = await a.user("alice")
            conv = await a.conversation(alice, title=None)
            await a.store.append(message(conv, alice))
            server.pause()
            try:
                await asyncio.sleep(0.1)  # until it does stand still
                began = time.monotonic()
                late = [a.store.append(message(conv, alice, cid=f"late-{i}")) for i in range(3)]
                await asyncio.sleep(0.05)  # it is under way
                outcomes = await asyncio.gather(
                    *late,
                    a.store.append(change(conv, alice, alice, "admin")),
                    a.store.open(Opening(alice.id, "x", "group", None, (), b"12345678")),
                    a.store.heads([conv]),
                    return_exceptions=True,
                )
                assert [type(x) for x in outcomes] == [Unavailable] * 6, outcomes
                assert time.monotonic() - began < 6.0
                assert not a.store.healthy
            finally:
                server.resume()

            async def announced() -> bool:
                return {e.seq for e in a.announced} >= {1, 2, 3, 4, 5}

            # It landed when the server went on, and is announced without another send.
            await a.until(announced, 6.0)
            done = await a.store.append(message(conv, alice, cid="late-0"))
            assert (done.seq, done.dup) == (3, True)
            with pytest.raises(Conflict):
                await a.store.append(message(conv, alice, "something else", "late-0"))
            answers = {f"late-{i}": await insist(a, message(conv, alice, cid=f"late-{i}")) for i in range(3)}
            assert_dense_and_once(await a.log(conv), answers)

    run(work())


def test_a_send_is_refused_in_time_though_the_insert_and_the_look_at_it_each_take_that_long(
    database: Database, server: MongoServer
) -> None:
    """Each operation had as long as the whole: a send to a server that stands still was refused after twice that."""

    async def work() -> None:
        limits = {"timeout_ms": 2800, "server_selection_ms": 2800, "append_ms": 3000}
        async with workers(database, 1, limits) as [a]:
            alice = await a.user("alice")
            conv, other = [await a.conversation(alice, title=None) for _ in range(2)]
            await a.store.append(message(conv, alice))
            server.pause()
            try:
                loop = asyncio.get_running_loop()
                began = loop.time()
                # The second comes while the first is under way; of the third conversation nothing is known.
                first = a.store.append(message(conv, alice, cid="first"))
                await asyncio.sleep(0.7)
                second = a.store.append(message(conv, alice, cid="second"))
                third = a.store.append(message(other, alice, cid="third"))
                with pytest.raises(Unavailable):
                    await first
                assert loop.time() - began < 5.0
                assert isinstance(second.exception(), Unavailable), "nothing overtakes what failed"
                with pytest.raises(Unavailable):
                    await third
                assert loop.time() - began < 0.7 + 4.6
            finally:
                server.resume()
            answers = {"first": await insist(a, message(conv, alice, cid="first"))}
            answers["second"] = await insist(a, message(conv, alice, cid="second"))
            assert answers["first"].dup, "it landed when the server went on"
            assert [e.seq for e in await a.log(conv)] == [1, 2, 3, 4]
            assert (answers["first"].seq, answers["second"].seq) == (3, 4)
            await insist(a, message(other, alice, cid="third"))

    run(work())


def test_it_is_noticed_that_the_server_is_away_and_back_though_nobody_asks(
    database: Database, server: MongoServer
) -> None:
    async def work() -> None:
        async with workers(database, 1, QUICK) as [a]:

            async def healthy() -> bool:
                return a.store.healthy

            async def away() -> bool:
                return not a.store.healthy

            assert a.store.healthy
            server.pause()
            try:
                await a.until(away)
            finally:
                server.resume()
            await a.until(healthy)
            await a.user("alice")

    run(work())


def test_marks_that_could_not_be_written_are_written_later(database: Database, server: MongoServer) -> None:
    async def work() -> None:
        async with workers(database, 2, QUICK) as [a, b]:
            alice = await a.user("alice")
            conv = await a.conversation(alice, title=None)
            await a.store.append(message(conv, alice))
            server.pause()
            await asyncio.sleep(2.8)  # the marks are due, and fail
            server.resume()
            _, [view] = await until_answered(lambda: a.store.views(alice.id))
            assert (view.read, view.unread) == (2, 0)

            async def written() -> bool:
                row = await b.row(conv, alice)
                return row is not None and row["read"] == 2

            await b.until(written)

    run(work())


@pytest.mark.parametrize("frozen", [False, True], ids=["well", "while the server stands still"])
def test_close_leaves_nothing_behind(database: Database, server: MongoServer, frozen: bool) -> None:
    async def work() -> None:
        threads = threading.active_count()
        worker = Worker(database, QUICK, {})
        await worker.store.start()
        alice = await worker.user("alice")
        conv = await worker.conversation(alice, title=None)
        futures = [worker.store.append(message(conv, alice)) for _ in range(5)]
        if frozen:
            await asyncio.sleep(0)
            server.pause()
        try:
            began = time.monotonic()
            await worker.store.close()
            assert time.monotonic() - began < (7.0 if frozen else 5.0)
        finally:
            server.resume()
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        assert all(isinstance(x, Unavailable if frozen else Appended) for x in outcomes), outcomes
        assert all(future.done() for future in futures)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert worker.store.mongo.listener.connections == 0
        assert threading.active_count() <= threads
        assert isinstance(
            (await asyncio.gather(worker.store.append(message(conv, alice)), return_exceptions=True))[0], Unavailable
        )

    run(work())


def test_who_is_cancelled_closes_no_connection(database: Database, server: MongoServer) -> None:
    async def work() -> None:
        async with workers(database, 1, {"pool_min": 0}) as [a]:
            alice = await a.user("alice")
            conv = await a.conversation(alice, title=None)
            listener = a.store.mongo.listener
            await asyncio.gather(*(a.store.heads([conv]) for _ in range(4)))
            for i in range(20):
                task = asyncio.create_task(a.store.entries(conv, 0, 10, 10**6))
                await asyncio.sleep(0.0005 * (i % 4))
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await asyncio.gather(*(a.store.heads([conv]) for _ in range(4)))

            async def all_ready() -> bool:
                return listener.connections == listener.counts["connections_ready"]

            await a.until(all_ready)  # one that was closed would keep them apart for ever

    run(work())


def test_when_all_connections_are_busy_the_answer_comes_soon(database: Database, server: MongoServer) -> None:
    async def work() -> None:
        settings = {"pool_max": 2, "pool_min": 1, "wait_queue_ms": 1000, "timeout_ms": 6000}
        async with workers(database, 1, settings) as [a]:
            server.pause()
            try:
                busy = [asyncio.create_task(a.store.heads(["c"])) for _ in range(2)]
                await asyncio.sleep(0.05)
                began = time.monotonic()
                with pytest.raises(Unavailable):
                    await a.store.heads(["c"])
                assert time.monotonic() - began < 4.0
            finally:
                server.resume()
            assert await asyncio.gather(*busy) == [{"c": 0}, {"c": 0}]
            assert await asyncio.gather(*(a.store.heads(["c"]) for _ in range(4))) == [{"c": 0}] * 4

    run(work())


def test_a_server_that_is_not_there_is_told_at_the_start_and_leaves_nothing_behind() -> None:
    async def work() -> None:
        worker = Worker(Database("mongodb://127.0.0.1:1/?directConnection=true", "x"), QUICK, {})
        assert not worker.store.healthy
        with pytest.raises(Unavailable):
            await worker.store.start()
        await worker.store.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        wrong = Worker(Database("mongodb://127.0.0.1,127.0.0.2/?directConnection=true", "x"), QUICK, {})
        with pytest.raises(BrokenSchema, match=r"store\.mongodb_url"):
            await wrong.store.start()

    run(work())
