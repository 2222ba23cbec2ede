"""The lock on the data directory, held as long as any process of the server lives.

The lock is a ``flock`` on ``<data>/lock``. Workers inherit it with the descriptor, so no new server can start on the
data while the orphaned workers of a dead supervisor still drain. The file itself is never removed: a lock on a
removed file would exclude no other server.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from .worker_process import StartError

LOCK_NAME = "lock"


def refuse_if_held(data: Path) -> None:
    """Raise StartError if another server holds the lock on `data`; changes nothing."""
    try:
        fd = os.open(data / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise StartError(f"data directory {data} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StartError(_held(data)) from None
    finally:
        os.close(fd)


def lock(data: Path) -> int:
    """Create the directory if it is missing, and lock it for this process and its children.

    Returns the descriptor: the lock is held while any process has it open. Raises StartError.
    """
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(data / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(f"data directory {data} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StartError(_held(data)) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _held(data: Path) -> str:
    try:
        server = (data / LOCK_NAME).read_text("ascii", "replace").strip()
    except OSError:
        server = ""
    holders = _openers(data / LOCK_NAME)
    if holders and server not in holders:
        return (
            f"data directory {data} is in use by the last workers (pid {', '.join(holders)}) of a server that "
            "died: they are finishing, try again in a moment"
        )
    return f"data directory {data} is in use by another server (pid {server or 'unknown'})"


def _openers(path: Path) -> list[str]:
    """Pids of the other processes that have `path` open, as far as this user may see."""
    path = path.resolve()
    pids = []
    for fds in Path("/proc").glob("[0-9]*/fd"):
        pid = fds.parent.name
        try:
            if pid != str(os.getpid()) and any(os.readlink(fd) == str(path) for fd in fds.iterdir()):
                pids.append(pid)
        except OSError:
            continue  # the process has ended, or belongs to another user
    return pids
