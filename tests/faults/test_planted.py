"""The checker is worth something: each promise that a planted fault breaks is seen to be broken, and by its name."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from .crowd import Scale
from .plan import SQLITE, plan
from .run import Result, Run

#: Enough for each plant to show (so many senders that each worker has some); the rest of a run is the same.
SCALE = Scale(conversations=6, senders=48, receivers=30, per_s=60.0)
SECONDS = 6.0  # if nothing happens
WARM_S = 3.0


def run(plant: str | None, *faults: str) -> Result:
    """A short run with a planted fault (None: with none)."""
    launcher = ("tests.faults.launch", *(("--plant", plant) if plant else ()))
    planned = plan(SQLITE, 1, 60, names=faults, warm_s=WARM_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Run(SQLITE, 1, SECONDS, SCALE, planned, launcher=launcher, compare_use=False).run())


@pytest.mark.parametrize(
    ("plant", "faults", "kind"),
    [
        pytest.param("acks-early", ["kill_worker"], "lost", id="ack before commit"),
        # A worker that dies makes the others look, which would find what was dropped.
        pytest.param("drops-last", [], "lost", id="dropped last publish"),
        # Between the two kills clients send messages, which the clients that come back have missed.
        pytest.param("repeats", ["kill_worker", "kill_worker"], "doubled", id="repeat on resume"),
        pytest.param("stale", ["kill_worker"], "stale", id="stale cache"),
    ],
)
def test_a_planted_fault_is_seen(plant: str, faults: list[str], kind: str) -> None:
    result = run(plant, *faults)
    assert result.broken.counts[kind], result.broken.lines()


def test_without_a_planted_fault_the_same_run_is_well() -> None:
    result = run(None, "kill_worker")
    assert not result.broken, "\n".join(result.broken.lines())
