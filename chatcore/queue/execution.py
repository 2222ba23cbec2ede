"""One delivery while its handler runs: its time limit, its cancellation, and what came of it."""

from __future__ import annotations

import asyncio
import enum
import logging
from typing import Final

from .base import ERROR_CHARS_MAX, Handler, Job

log = logging.getLogger("chatcore.queue")

# A handler that was cancelled and goes on is told of this often: its key stays blocked until it ends.
STUBBORN_S: Final = 30.0


class Outcome(enum.Enum):
    """How a delivery ended."""

    DONE = "done"
    FAILED = "failed"
    #: Cancelled by us, not by the handler's fault.
    ABANDONED = "abandoned"


class Execution:
    """Runs a handler for one job. ``error`` says in one line why it failed."""

    def __init__(self, handler: Handler, job: Job, timeout_s: float) -> None:
        self.job = job
        self.error = ""
        self._handler = handler
        self._timeout_s = timeout_s
        self._abandoned = False
        self._task: asyncio.Task[None] | None = None

    def abandon(self) -> None:
        """Cancel it, once: the right to its key is lost, or the server stops."""
        if self._abandoned:
            return  # it may be tidying up
        self._abandoned = True
        if self._task is not None:
            self._task.cancel()

    def abandoned(self) -> bool:
        """Whether :meth:`abandon` was called."""
        return self._abandoned

    async def run(self) -> Outcome:
        """Run it to its end; never raises, and returns only when the handler no longer runs."""
        if self.abandoned():
            return Outcome.ABANDONED
        job = self.job
        self._task = task = asyncio.create_task(self._call(), name=f"queue-{job.topic}-{job.id}")
        _, running = await asyncio.wait({task}, timeout=self._timeout_s)
        late = bool(running)
        while running:
            # Not only once: a handler may swallow a cancellation.
            task.cancel()
            _, running = await asyncio.wait({task}, timeout=STUBBORN_S)
            if running:
                log.error("%s %s: the handler was cancelled and goes on; its key waits", job.topic, job.id)
        exc = None if task.cancelled() else task.exception()
        if not task.cancelled() and exc is None:
            return Outcome.DONE
        if self.abandoned():
            return Outcome.ABANDONED
        if late:
            self.error = f"took longer than {self._timeout_s:g} s"
        elif exc is None:
            self.error = "cancelled itself"
        else:
            self.error = f"{type(exc).__name__}: {exc}"[:ERROR_CHARS_MAX]
        log.warning(
            "%s %s of key %s failed in delivery %d: %s",
            job.topic,
            job.id,
            job.key,
            job.delivery,
            self.error,
            exc_info=exc,
        )
        return Outcome.FAILED

    async def _call(self) -> None:
        await self._handler(self.job)
