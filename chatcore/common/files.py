"""Files that a process makes for the owner of a folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def make_private(path: Path) -> None:
    """Make an empty file that only its owner may read, unless it is there. The owner is that of the folder, also if
    root runs a command there: the server has to open it.

    :raises OSError: it cannot be made.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    try:
        owner = path.parent.stat()
        with contextlib.suppress(PermissionError):
            os.fchown(fd, owner.st_uid, owner.st_gid)
    finally:
        os.close(fd)
