from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .harness import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Makes servers (see Server) that are gone at the end of the test, with all their workers."""
    servers: list[Server] = []

    def make(*arguments: str, **options: Any) -> Server:
        options.setdefault("data", tmp_path / "data")
        servers.append(Server(tmp_path, *arguments, **options))
        return servers[-1]

    yield make
    for one in servers:
        one.end()
