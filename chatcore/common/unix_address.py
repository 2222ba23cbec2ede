"""Paths of any length as addresses of Unix sockets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

#: sun_path holds 108 bytes, the closing zero included.
MAX_ADDRESS_BYTES: Final = 107


@contextlib.contextmanager
def unix_address(path: Path) -> Iterator[str]:
    """``path`` as an address for bind or connect, whatever its length; valid inside the ``with``.

    :raises OSError: the path is too long, and its folder cannot be opened.
    """
    if len(os.fsencode(path)) <= MAX_ADDRESS_BYTES:
        yield str(path)
        return
    # An address cannot be longer, but the kernel follows a link to the folder.
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)
