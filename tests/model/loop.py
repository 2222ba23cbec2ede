"""An event loop whose clock jumps: what would be waited for happens at once, in order of time.

Deterministic: no file descriptors, no threads, no wall clock. A run that waits for
something that can never happen ends with :class:`Stuck` instead of hanging.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Stuck(AssertionError):
    """Nothing is ready and nothing is scheduled, but the run has not ended."""


class _Clock:
    """Stands where a selector stands: instead of waiting, it moves the time on."""

    def __init__(self) -> None:
        self.now = 0.0

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Stuck("waiting for something that nothing will bring about")
        self.now += max(timeout, 0)
        return []

    def close(self) -> None: ...


class VirtualLoop(asyncio.BaseEventLoop):
    """asyncio's own scheduling over a virtual clock, which starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = _Clock()
        self.failures: list[str] = []
        self.set_exception_handler(self._failed)

    def time(self) -> float:
        return self._selector.now

    def _process_events(self, event_list: list[Any]) -> None: ...

    def _write_to_self(self) -> None: ...

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.failures.append(f"{context.get('message')}: {context.get('exception')!r}")


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end in virtual time.

    :raises AssertionError: a task or callback failed, or tasks are left behind.
    """
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        try:
            loop.run_until_complete(work)
            left = [task for task in asyncio.all_tasks(loop) if not task.done()]
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
        assert not left, f"tasks left behind: {left}"
        assert not loop.failures, loop.failures
    finally:
        asyncio.set_event_loop(None)
        loop.close()
