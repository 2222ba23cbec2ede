"""MongoDB (or a server that speaks its protocol) and Redis, started once for a whole run and ended with it."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from .mongodb import MongoServer
from .redis import RedisServer


@cache
def mongodb() -> MongoServer:
    """The one of this run; started when a test first needs it."""
    server = MongoServer()
    server.__enter__()
    atexit.register(server.close)
    return server


@cache
def redis_url() -> str:
    """The one of this run, or the running one that CHATCORE_TEST_REDIS_URL names."""
    given = os.environ.get("CHATCORE_TEST_REDIS_URL")
    if given:
        return given
    folder = tempfile.TemporaryDirectory(prefix="chatcore-redis-")
    server = RedisServer(Path(folder.name)).start()

    def end() -> None:
        server.kill()
        folder.cleanup()

    atexit.register(end)
    return server.url


def _database(data: Path) -> str:
    return "t" + hashlib.blake2b(str(data).encode(), digest_size=8).hexdigest()


def prepare(data: Path) -> Mapping[str, str]:
    """The settings of a server; a data directory has a database of its own, the same again when it restarts."""
    return {
        "CHATCORE_STORE_MONGODB_URL": mongodb().url,
        "CHATCORE_STORE_MONGODB_DATABASE": _database(data),
        "CHATCORE_REDIS_URL": redis_url(),
    }


def empty(data: Path) -> None:
    """Remove what tests that are over left in the database of a running server. Each test makes its own users and
    conversations, and here a query takes longer the more there is (README.md, "What it costs")."""
    with mongodb().client() as client:
        for name in ("entries", "members", "convs", "users", "names", "tokens", "blocks"):
            client[_database(data)][name].delete_many({})


@contextlib.contextmanager
def stall(data: Path) -> Iterator[None]:
    """The store does not answer meanwhile."""
    mongodb().pause()
    try:
        yield
    finally:
        mongodb().resume()
