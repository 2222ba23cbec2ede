"""Runs chatcore for the campaign: the same command, whose workers also say how many tasks they have when they
are sent SIGUSR2 - and, with ``--plant NAME`` first, break one promise, so that the checker can be shown to see it.

    python -m tests.faults.launch [--plant NAME] serve --data DIR ...
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import uvloop

from chatcore import cli
from chatcore.server.store_processes import STORE_MAINS
from chatcore.server.worker import SWITCH_INTERVAL_S, Worker
from chatcore.supervisor.worker_process import WorkerContext, WorkerMain

TASKS_FILE = "tasks-{}"


def worker_main(made_of: type[Worker]) -> WorkerMain:
    """The same as `chatcore.server.worker.main`, with this class."""

    def main(context: WorkerContext) -> int:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(made_of, context))

    return main


async def _run(made_of: type[Worker], context: WorkerContext) -> int:
    worker = made_of(context)
    loop = asyncio.get_running_loop()
    path = Path(context.settings.server.data) / "run" / TASKS_FILE.format(os.getpid())

    def tell() -> None:
        path.write_text(str(len(asyncio.all_tasks())))

    loop.add_signal_handler(signal.SIGUSR2, tell)
    await worker.start()
    await worker.stopping.wait()
    await worker.drain()
    return 0


def main(arguments: list[str]) -> int:
    """Run one command."""
    made_of = Worker
    if arguments[:1] == ["--plant"]:
        from .planted import PLANTED

        made_of = PLANTED[arguments[1]]
        arguments = arguments[2:]
    return cli.main(arguments, worker_main=worker_main(made_of), store_mains=STORE_MAINS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
