"""What survives the client's process, where it is stored, and when it is saved.

A :class:`State` stores one blob. Its content is up to the client (:class:`Snapshot`), so
that another place to store it, a row of a database or a key of an app's settings, is two
short methods. :class:`StateSaver` keeps it behind what the application has processed,
never ahead of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec

from .errors import StateMismatch
from .events import Conversation
from .outbox import Draft
from .replica import Progress

log: Final = logging.getLogger("chatcore.client")

#: Progress alone is saved at most this often: after a crash the application only sees
#: some events again. Messages to be sent do not wait for it.
SAVE_EVERY_S: Final = 0.2
#: After the state could not be saved.
RETRY_S: Final = 1.0


class Snapshot(msgspec.Struct):
    """Everything that a new process needs to go on exactly where this one was.

    ``have``: per conversation, the seq up to which the application has processed it;
    ``sync``: the server's word for all that was processed; ``convs``: the views, since
    the server sends a resumed session only those that changed; ``sends``: messages not
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
        """The blob that was saved last, or None. Raises OSError."""

    def save(self, data: bytes) -> None:
        """Replace it. Durable when it returns; whole or not at all. Raises OSError."""


class MemoryState:
    """Stored as long as this object lives."""

    def __init__(self) -> None:
        self.data: bytes | None = None

    def load(self) -> bytes | None:
        return self.data

    def save(self, data: bytes) -> None:
        self.data = data


class FileState:
    """Stored in a file that only its owner can read; its directory must exist."""

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


async def wait_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event for at most so many seconds; whether it was set."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


class StateSaver:
    """Owns the snapshot. Saves run in a thread, one at a time, each with everything that is new.

    :param state: where to save; None: nowhere.
    :param drafts: returns the messages not acknowledged yet.
    """

    def __init__(self, state: State | None, snapshot: Snapshot, drafts: Callable[[], list[Draft]]) -> None:
        self.snapshot = snapshot
        self._state = state
        self._drafts = drafts
        self._dirty = asyncio.Event()
        self._urgent = asyncio.Event()
        self._stopping = False
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def durable(self) -> bool:
        """Whether there is a place to save to."""
        return self._state is not None

    def record(self, progress: Progress) -> None:
        """The application has processed the event of this progress."""
        if self._state is None:
            return
        snapshot = self.snapshot
        if progress.gone:
            snapshot.have.pop(progress.conv, None)
            snapshot.convs.pop(progress.conv, None)
        if progress.have is not None:
            snapshot.have[progress.conv] = progress.have
        if progress.view is not None:
            snapshot.convs[progress.conv] = progress.view
        if progress.sync is not None:
            snapshot.sync = progress.sync
        self._dirty.set()

    def set_user(self, id: str) -> None:
        """The user whose state this is."""
        self.snapshot.user = id

    def acknowledged(self) -> None:
        """A message was acknowledged: save soon, so that a restarted client does not send it again for nothing."""
        self._dirty.set()

    def save_now(self) -> asyncio.Future[None]:
        """Save at once; the future is done when everything up to this call is durable. It raises OSError."""
        future = asyncio.get_running_loop().create_future()
        self._waiters.append(future)
        self._dirty.set()
        self._urgent.set()
        return future

    async def run(self) -> None:
        """Save whatever changes until :meth:`stop`; then once more."""
        while True:
            await self._dirty.wait()
            if not self._waiters and not self._stopping:
                await wait_within(self._urgent, SAVE_EVERY_S)
            self._dirty.clear()
            self._urgent.clear()
            waiters, self._waiters = self._waiters, []
            saved = await self._save(waiters)
            if self._stopping and not self._dirty.is_set():
                return
            if not saved:
                self._dirty.set()
                await wait_within(self._urgent, RETRY_S)

    def stop(self) -> None:
        """Save once more, then let :meth:`run` end."""
        self._stopping = True
        self._dirty.set()
        self._urgent.set()

    async def _save(self, waiters: list[asyncio.Future[None]]) -> bool:
        if self._state is None:
            return True
        self.snapshot.sends = self._drafts()
        error: OSError | None = None
        try:
            await asyncio.to_thread(self._state.save, encode(self.snapshot))
        except OSError as exc:
            log.error("the client's state could not be saved: %s", exc)
            error = exc
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error) if error else waiter.set_result(None)
        return error is None
