"""Who writes the files of a data folder: the one process that holds the lock of each, and where the writer listens."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Final

from ...common.files import make_private

#: Pause between two tries to get the lock: ``flock`` itself knows no time limit.
RETRY_S: Final = 0.005


def socket_path(data: Path) -> Path:
    """Where the writer of a running server takes requests (see :mod:`.requests`)."""
    return data / "run" / "writer.sock"


class _Lock:
    """A ``flock`` on a file of the data folder, which the kernel releases when the holder dies.

    A child that is forked while it is held shares it, so the holder forks none. The file is never removed: a lock on a
    removed file keeps nobody out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def acquire(self, timeout_s: float) -> bool:
        """Take it; False: another process still has it after ``timeout_s`` (0: do not wait).

        :raises OSError: the file cannot be opened.
        """
        make_private(self.path)
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        until = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= until:
                    os.close(fd)
                    return False
                time.sleep(RETRY_S)
            except BaseException:
                os.close(fd)
                raise
            else:
                self._fd = fd
                return True

    def release(self) -> None:
        """Let another process have it. Harmless if it is not held."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class WriterLock(_Lock):
    """The lock of ``chatcore.db``: the process that holds it is the folder's writer."""

    def __init__(self, data: Path) -> None:
        super().__init__(data / "writer.lock")


class IndexerLock(_Lock):
    """The lock of ``index.db``."""

    def __init__(self, data: Path) -> None:
        super().__init__(data / "indexer.lock")
