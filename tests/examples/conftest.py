"""A real server for the examples; coroutines run in a loop of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .. import coroutines
from ..server import Server

pytest_pyfunc_call = coroutines.runner()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server with two workers."""
    server = Server(tmp_path_factory.mktemp("server") / "data").start()
    try:
        yield f"http://127.0.0.1:{server.port}"
        server.stop()
    finally:
        server.kill()
