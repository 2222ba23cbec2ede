"""Print the way of a send or of a resume: ``python -m tests.walk send``, ``python -m tests.walk resume``."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

import uvloop

from .run import SCENARIOS, walk_of


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.walk", description=__doc__)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--calls", action="store_true", help="print every call, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as data, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        walk = runner.run(walk_of(options.scenario, Path(data)))
    if options.calls:
        for step in walk.steps:
            print(f"{step.thread:14} {step.module:24} {step.function}{' (resumed)' if step.resumed else ''}")
        print()
    print(walk.report())


main()
