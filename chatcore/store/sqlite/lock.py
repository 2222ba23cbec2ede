"""The fair write lock between the workers of one data directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from .schema import LOCK_NAMES


class WriteLock:
    """Two file locks that make a queue.

    ``flock`` alone is not fair: a process that releases it and wants it again at
    once wins against a waiter that has yet to wake up. Here one waiter holds
    ``next`` while it waits for ``write``, and a process that wants the lock again
    must get ``next`` first, which it cannot before that waiter has had its turn.
    The kernel releases both when a process dies.

    One per thread: it owns its two descriptors (opened after the fork, since a
    descriptor that is inherited shares its locks).
    """

    def __init__(self, data: Path) -> None:
        self._next, self._write = (
            os.open(data / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for name in LOCK_NAMES
        )

    def __enter__(self) -> None:
        fcntl.flock(self._next, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._write, fcntl.LOCK_EX)
        finally:
            fcntl.flock(self._next, fcntl.LOCK_UN)

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        fcntl.flock(self._write, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close both descriptors."""
        os.close(self._next)
        os.close(self._write)
