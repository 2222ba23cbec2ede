"""What the log says when the server goes and comes back."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from pymongo.errors import AutoReconnect

from chatcore.errors import Unavailable
from chatcore.store.mongo.outage import DRIVER_LOG, PAUSE_S, Outage

from ...services.mongodb import MongoServer
from ..harness import Database
from .parts import run, workers


@pytest.fixture
def server() -> Iterator[MongoServer]:
    """One of our own, to be killed."""
    with MongoServer() as server:
        if server.external:
            pytest.skip("a server of others is not killed")
        yield server


def driver_logs(error: BaseException) -> None:
    """As it does of its background tasks."""
    try:
        raise error
    except BaseException:
        logging.getLogger(DRIVER_LOG).exception("MongoClient background task encountered an error:")


def test_an_outage_is_one_line_and_its_end_another(server: MongoServer, caplog: pytest.LogCaptureFixture) -> None:
    """The driver wrote an error with a traceback of 30 lines for each connection that it lost in the background."""

    async def work() -> None:
        with server.fresh_database() as name:
            # So soon that the driver's own look at the server has not stopped it from making connections.
            settings = {"timeout_ms": 700, "server_selection_ms": 700, "pool_min": 4}
            async with workers(Database(server.url, name), 1, settings) as [a]:
                listener, outage = a.store.mongo.listener, a.store.mongo.outage

                async def full() -> bool:
                    return listener.connections == 4

                async def told() -> bool:
                    return outage.background > 0

                await a.until(full)
                caplog.clear()
                server.pause()
                with pytest.raises(Unavailable):
                    await a.store.heads(["c"])  # which costs its connection
                # The driver makes another one in the background, gets no answer to its greeting, and loses it.
                await a.until(full)
                server.kill()
                await a.until(told)
                server.start()

                async def healthy() -> bool:
                    return a.store.healthy

                await a.until(healthy)

    with caplog.at_level(logging.INFO):
        run(work())
    told = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert [line[:2] for line in told] == [("chatcore.store", "WARNING"), ("chatcore.store", "INFO")], told
    port = server.url.split(":")[2].split("/")[0]
    assert told[0][2].startswith(f"mongodb at 127.0.0.1:{port} does not answer: ")
    assert told[1][2] == f"mongodb at 127.0.0.1:{port} answers again"


def test_one_that_comes_and_goes_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    outage = Outage("somewhere", lambda: now)
    with caplog.at_level(logging.INFO):
        outage.failed("it was never there: the start says so")
        assert not caplog.records
        outage.succeeded()
        for _ in range(100):
            outage.failed("ConnectionError")
            outage.failed("ConnectionError")
            outage.succeeded()
            outage.succeeded()
        assert len(caplog.records) == 2
        now = PAUSE_S
        outage.failed("ConnectionError")
        assert len(caplog.records) == 3


def test_the_driver_is_heard_where_no_server_is_to_blame(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    outage = Outage("somewhere", lambda: 0.0)
    outage.watch()
    try:
        for _ in range(10):
            driver_logs(AutoReconnect("10.0.0.7:27017: [Errno 111] Connection refused (configured timeouts: 20 s)"))
        assert [record.getMessage() for record in caplog.records] == [
            "mongodb: no connection to a server, or a lost one: 10.0.0.7:27017: [Errno 111] Connection refused"
        ]
        assert outage.background == 10
        driver_logs(TypeError("a bug"))
        assert caplog.records[-1].name == DRIVER_LOG
        assert caplog.records[-1].exc_info
    finally:
        outage.close()
    driver_logs(AutoReconnect("of another client"))
    assert caplog.records[-1].name == DRIVER_LOG


def test_closing_gives_the_drivers_log_back(server: MongoServer) -> None:
    async def work() -> None:
        with server.fresh_database() as name:
            async with workers(Database(server.url, name), 2):
                assert len(logging.getLogger(DRIVER_LOG).filters) == before + 2

    before = len(logging.getLogger(DRIVER_LOG).filters)
    run(work())
    assert len(logging.getLogger(DRIVER_LOG).filters) == before
