"""The writer's transactions and the index beside a model, under errors of the disk, kills, and with little memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from .engine_world import play

SEEDS = range(12)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_promise_in_any_order_of_events(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    play(tmp_path, seed, monkeypatch)


def test_long_histories_have_all_that_may_go_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above shows little."""
    seen: Counter[str] = Counter()
    for seed in range(2):
        data = tmp_path / str(seed)
        data.mkdir()
        world = play(data, 1000 + seed, monkeypatch, steps=300)
        seen.update(world.counts)
        seen["levels"] += max(run.level for run in world.runs)
        seen["entries"] += sum(len(c.log) for c in world.model.convs.values())
    for what in ("killed", "failed", "done with an error", "superseded"):
        assert seen[what] >= 5, seen
    assert seen["levels"] >= 4 and seen["entries"] > 300, seen
