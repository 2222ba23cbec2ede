"""Where a store keeps things, for tests of what every store promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..services.production import mongodb
from .harness import Database


@pytest.fixture
def database() -> Iterator[Database]:
    """A fresh one on a real server."""
    server = mongodb()
    with server.fresh_database() as name:
        yield Database(server.url, name)


@pytest.fixture(params=["sqlite", "mongodb"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | Database:
    """A fresh folder, and a fresh database."""
    if request.param == "sqlite":
        return tmp_path
    found: Database = request.getfixturevalue("database")
    return found
