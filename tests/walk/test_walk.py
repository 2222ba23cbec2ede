"""A send and a resume stay readable: how many modules one run of each enters, and how often it comes back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import pytest
import uvloop

from .run import walk_of

#: At most so many modules, and returns to a package that was left.
SEND: Final = (14, 2)
#: A resume reads through two files, the log and its index.
RESUME: Final = (14, 2)


@pytest.mark.parametrize(
    ("scenario", "bounds", "through"),
    [
        ("send", SEND, {"_fast", "protocol", "store/sqlite/client", "chat/delivery"}),
        ("resume", RESUME, {"_fast", "protocol", "store/sqlite/reads", "chat/delivery"}),
    ],
)
def test_the_way_through_a_worker(scenario: str, bounds: tuple[int, int], through: set[str], tmp_path: Path) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        walk = runner.run(walk_of(scenario, tmp_path))
    assert through <= set(walk.modules), walk.report()
    assert walk.report().count("\n") > len(walk.modules)
    modules, returns = bounds
    assert len(walk.modules) <= modules, walk.report()
    assert len(walk.returns) <= returns, walk.report()
