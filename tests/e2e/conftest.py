"""Servers and clients of the end-to-end tests.

Everything runs on each backend of `tests.server.BACKENDS`. A test that is a coroutine runs in a
loop of its own; fixtures with an ``aclose`` are closed in that loop when it is over.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..server import BACKENDS, Backend, Server
from .world import World

# How much of a server's log is shown with a test that failed.
LOG_LINES = 60


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}

    async def run() -> None:
        try:
            await pyfuncitem.obj(**arguments)
        finally:
            for value in pyfuncitem.funcargs.values():
                if hasattr(value, "aclose"):
                    await value.aclose()

    asyncio.run(run())
    return True


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if not report.failed:
        return
    found = [
        server for value in getattr(item, "funcargs", {}).values() for server in getattr(value, "servers", [value])
    ]
    for server in {one for one in found if isinstance(one, Server)}:
        tail = "\n".join(server.log().splitlines()[-LOG_LINES:])
        report.sections.append((f"log of the server on {server.data}", tail))


@pytest.fixture(scope="session", params=BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Where the servers of the test keep their data."""
    return request.param


class Serve:
    """Makes servers with special settings; they are stopped, and looked at, when the test is over."""

    def __init__(self, directory: Path, backend: Backend) -> None:
        self._directory = directory
        self._backend = backend
        self.servers: list[Server] = []

    def __call__(self, *, start: bool = True, data: Path | None = None, **options: Any) -> Server:
        options.setdefault("backend", self._backend)
        server = Server(data or self._directory / f"data{len(self.servers)}", **options)
        self.servers.append(server)
        return server.start() if start else server

    def end(self) -> None:
        try:
            for server in self.servers:
                server.stop()
        finally:
            for server in self.servers:
                server.kill()


@pytest.fixture
def serve(tmp_path: Path, backend: Backend) -> Iterator[Serve]:
    """Makes servers: ``serve(settings={"limits.backlog": 5})``."""
    serve = Serve(tmp_path, backend)
    yield serve
    serve.end()


class Common:
    """Servers for many tests: starting one takes longer than most tests."""

    def __init__(self, tmp_path_factory: pytest.TempPathFactory, backend: Backend) -> None:
        self._directories = tmp_path_factory
        self._backend = backend
        self._serves: dict[str, Serve] = {}

    def server(self, kind: str, settings: dict[str, object]) -> Server:
        """The common server of a kind, without what earlier tests left."""
        serve = self._serves.get(kind)
        if serve is None:
            serve = self._serves[kind] = Serve(self._directories.mktemp(kind), self._backend)
            return serve(settings=settings)
        server = serve.servers[0]
        self._backend.empty(server.data)
        return server

    def end(self) -> None:
        for serve in self._serves.values():
            serve.end()


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory, backend: Backend) -> Iterator[Common]:
    """Where the common servers are."""
    common = Common(tmp_path_factory, backend)
    yield common
    common.end()


def _shared(kind: str, **settings: object) -> Callable[..., Server]:
    def fixture(common: Common) -> Server:
        return common.server(kind, {name.replace("__", "."): value for name, value in settings.items()})

    return fixture


#: The server of most tests: two workers, default limits.
server = pytest.fixture(name="server")(_shared("server"))
#: A server with limits so small that tests reach them.
tight_server = pytest.fixture(name="tight_server")(
    _shared(
        "tight",
        limits__backlog=20,
        limits__small=3,
        limits__frame_bytes=4096,
        limits__body_bytes=100,
        limits__data_bytes=100,
        limits__have=5,
        limits__only=3,
        limits__history=10,
        limits__watch=3,
        limits__users=3,
        limits__members=3,
        limits__channels=3,
        limits__open_members=3,
        limits__title_chars=20,
        limits__name_chars=32,
        limits__outstanding=8,
        limits__http_body_bytes=2048,
        limits__connections_per_user=3,
        limits__conversations_per_user=12,
        limits__outbox_bytes=65536,
        limits__outbox_low_water_bytes=16384,
    )
)
#: A server that is impatient.
hasty_server = pytest.fixture(name="hasty_server")(
    _shared(
        "hasty",
        timeouts__auth_ms=2000,
        timeouts__handshake_ms=2000,
        timeouts__close_ms=500,
        timeouts__slow_ms=500,
        timeouts__ping_ms=10_000,
        timeouts__ping_min_ms=1000,
        timeouts__replay_stall_ms=500,
    )
)


@pytest.fixture
def world(server: Server) -> World:
    """Users, clients and conversations on the common server."""
    return World(server)


@pytest.fixture
def tight(tight_server: Server) -> World:
    """The same on the server with small limits."""
    return World(tight_server)


@pytest.fixture
def hasty(hasty_server: Server) -> World:
    """The same on the server with short timeouts."""
    return World(hasty_server)
