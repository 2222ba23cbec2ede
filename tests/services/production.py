"""MongoDB (or what speaks its protocol) and Redis, started once for a whole run and ended with it."""

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
    """The one of this run; started when somebody first needs it."""
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


def prepare(data: Path) -> Mapping[str, str]:
    """The settings of a server; a data directory has a database of its own, the same again when it restarts."""
    name = "t" + hashlib.blake2b(str(data).encode(), digest_size=8).hexdigest()
    return {
        "CHATCORE_STORE_MONGODB_URL": mongodb().url,
        "CHATCORE_STORE_MONGODB_DATABASE": name,
        "CHATCORE_REDIS_URL": redis_url(),
    }


@contextlib.contextmanager
def stall(data: Path) -> Iterator[None]:
    """The store does not answer meanwhile."""
    mongodb().pause()
    try:
        yield
    finally:
        mongodb().resume()
