"""The two backends, and a Redis that the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.services.redis import redis_server, redis_url

from .harness import Backend, RedisBackend, SQLiteBackend

__all__ = ["redis_server", "redis_url"]


@pytest.fixture(params=["sqlite", "redis"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """Either."""
    if request.param == "sqlite":
        return SQLiteBackend(tmp_path)
    return RedisBackend(request.getfixturevalue("redis_url"))
