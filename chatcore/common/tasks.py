"""Background tasks with one owner, who awaits or cancels all of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

log = logging.getLogger("chatcore.tasks")

T = TypeVar("T")


class Tasks:
    """The background tasks of one owner. A task that fails is logged with its name, then forgotten.

    Not :class:`asyncio.TaskGroup`: the failure of one task must not cancel its siblings.
    """

    __slots__ = ("_tasks",)

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[asyncio.Task[Any]]:
        return iter(list(self._tasks))

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start a task on the running loop. It belongs to this owner until it ends."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("task %s failed", task.get_name(), exc_info=exc)

    def cancel(self) -> None:
        """Cancel all of them, without waiting."""
        for task in self:
            task.cancel()

    async def close(self) -> None:
        """Cancel all of them and wait until each has ended; failures were logged already."""
        self.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
