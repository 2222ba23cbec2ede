"""The campaign's short lane: six faults in less than a minute, with everything that the checker checks."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from .crowd import Scale
from .plan import BOTH, MONGODB, SHORT, SQLITE, plan
from .run import Run

SEED = 1
WARM_S = 2.0
SCALES = {
    # So many that the worker which is killed in a commit has some.
    SQLITE: Scale(conversations=10, senders=48, receivers=40, per_s=60.0),
    MONGODB: Scale(conversations=4, senders=6, receivers=16, per_s=4.0),
}


@pytest.mark.parametrize("backend", BOTH)
def test_three_faults_break_no_promise(backend: str) -> None:
    faults = plan(backend, SEED, 60.0, names=SHORT[backend], warm_s=WARM_S, rest_s=(3.0, 4.0))
    assert len(faults) == 3
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        # The long lane compares what the servers use: caches are not full yet here.
        run = Run(backend, SEED, 60.0, SCALES[backend], faults, compare_use=False)
        result = runner.run(run.run())
    for one in result.happened:
        if one.skipped:
            print(f"{one.fault.kind.name} was skipped: {one.skipped}")
    assert not result.broken, "\n".join(result.broken.lines())
    assert result.messages > 0
    assert result.unacked == 0
