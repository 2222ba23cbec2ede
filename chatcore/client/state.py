"""What survives the client's process, and where it is kept.

A :class:`State` keeps one blob. What is in it is the client's affair
(:class:`Snapshot`), so that another place to keep it, a row of a database or a
key of an app's settings, is two short methods.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import msgspec

from .errors import StateMismatch
from .events import Conversation
from .outbox import Draft


class Snapshot(msgspec.Struct):
    """Everything that a new process needs to go on exactly where this one was.

    ``have``: per conversation, the seq up to which the application is done;
    ``sync``: the server's word for all that is done; ``convs``: the views, since
    a resumed session is only told of those that changed; ``sends``: messages not
    acknowledged yet, in order per conversation.
    """

    user: str = ""
    sync: str | None = None
    have: dict[str, int] = msgspec.field(default_factory=dict)
    convs: dict[str, Conversation] = msgspec.field(default_factory=dict)
    sends: list[Draft] = msgspec.field(default_factory=list)


class State(Protocol):
    """A place for one blob. Both methods are called from a thread, never at the same time."""

    def load(self) -> bytes | None:
        """What was saved last, or None. Raises OSError."""

    def save(self, data: bytes) -> None:
        """Replace it. Durable when it returns; whole or not at all. Raises OSError."""


class MemoryState:
    """Kept as long as this object lives."""

    def __init__(self) -> None:
        self.data: bytes | None = None

    def load(self) -> bytes | None:
        return self.data

    def save(self, data: bytes) -> None:
        self.data = data


class FileState:
    """Kept in a file that only its owner can read; its directory must exist."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def load(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def save(self, data: bytes) -> None:
        replace_file(self._path, data)


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` for its owner only: durably, and whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself is durable only with its directory.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def decode(data: bytes | None) -> Snapshot:
    """The snapshot in a saved blob; an empty one for None. Raises StateMismatch."""
    if data is None:
        return Snapshot()
    try:
        return msgspec.json.decode(data, type=Snapshot)
    except msgspec.MsgspecError as exc:
        raise StateMismatch(f"the saved state cannot be read: {exc}") from None


def encode(snapshot: Snapshot) -> bytes:
    """The blob for a snapshot."""
    return msgspec.json.encode(snapshot)
