"""A real server with two workers for the tests of the client; coroutines run in a loop of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .. import coroutines
from ..server import Server

pytest_pyfunc_call = coroutines.runner()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests that do it no harm."""
    yield from _running(tmp_path_factory.mktemp("server"))


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server of the test's own, to be killed and started again."""
    yield from _running(tmp_path)


@pytest.fixture
def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def _running(directory: Path) -> Iterator[Server]:
    server = Server(directory / "data", settings={"server.reconnect_spread_ms": 0}).start()
    try:
        yield server
        server.stop()
    finally:
        server.kill()
