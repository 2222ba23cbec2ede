"""The campaign: ``python -m tests.faults --backend sqlite-local --seed 1 --seconds 600``."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import signal
import sys
from pathlib import Path

import uvloop

from .crowd import Scale
from .plan import BOTH, KINDS, plan
from .report import Results
from .run import Result, Run

RESULTS = Path(__file__).parents[2] / ".cache" / "faults"
REPORT = Path(__file__).with_name("REPORT.md")
LONG_S = 600.0
#: MongoDB is FerretDB here. It looks at every document for every query, several times for each login: this is what
#: it carries while clients come back by the dozen (with ten conversations and 52 clients, it took up to 20 s to serve
#: all that a reload brought back).
SCALES = {
    "sqlite-local": Scale(),
    "mongodb-redis": Scale(conversations=5, senders=8, receivers=24, per_s=2.0),
}


async def _until_terminated(run: Run) -> Result:
    """SIGTERM cleans up, as Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await run.run()


def main() -> int:
    """Run what was asked for; 1 if any promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--backend", choices=BOTH, action="append", help="store and bus (both, one after the other)")
    parser.add_argument("--seed", type=int, action="append", help="of the plan and of what clients do (1, 2 and 3)")
    parser.add_argument("--seconds", type=float, default=LONG_S, help="length of a run (600)")
    parser.add_argument("--faults", type=int, help="at most so many (as many as there is time for)")
    parser.add_argument("--only", action="append", choices=list(KINDS), help="these kinds, in this order")
    parser.add_argument("--conversations", type=int, help="one of them is hot (40; 5 on mongodb-redis)")
    parser.add_argument("--senders", type=int, help="(60; 8)")
    parser.add_argument("--receivers", type=int, help="(200; 24)")
    parser.add_argument("--per-s", type=float, help="messages of all senders per second (410; 2)")
    parser.add_argument("--plan", action="store_true", help="show what would happen, and when")
    parser.add_argument("--report", type=Path, help=f"where to write the report ({REPORT.name} here, after long runs)")
    options = parser.parse_args()
    broken = False
    for seed in options.seed or [1, 2, 3]:
        for backend in options.backend or BOTH:
            only = None if options.only is None else tuple(options.only)
            faults = plan(backend, seed, options.seconds, options.faults, only)
            if options.plan:
                print(f"{backend}, seed {seed}:", *faults, sep="\n  ")
                continue
            given = {name: getattr(options, name) for name in ("conversations", "senders", "receivers", "per_s")}
            scale = dataclasses.replace(SCALES[backend], **{name: n for name, n in given.items() if n is not None})
            print(f"--- {backend}, seed {seed}, {options.seconds:.0f} s, {len(faults)} faults", file=sys.stderr)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                result = runner.run(_until_terminated(Run(backend, seed, options.seconds, scale, faults)))
            results = Results(RESULTS)
            keep = options.report is not None or options.seconds >= LONG_S
            print(results.add(result, keep=keep))
            broken = broken or bool(result.broken)
            if keep:
                results.write(options.report or REPORT)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
