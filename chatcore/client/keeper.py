"""Keeps the saved state behind what the application is done with, never ahead of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from .outbox import Draft
from .state import Snapshot, State, encode
from .waiting import wait_within
from .world import Mark

log: Final = logging.getLogger("chatcore.client")

#: Progress alone is saved at most this often: losing it only means to look at
#: some events again, after a crash. Messages to be sent do not wait for it.
LAZY_S: Final = 0.2
#: After the state could not be saved.
RETRY_S: Final = 1.0


class Keeper:
    """Owns the snapshot. Saves run in a thread, one at a time, each with all that is new."""

    def __init__(self, state: State | None, snapshot: Snapshot, drafts: Callable[[], list[Draft]]) -> None:
        self.snapshot = snapshot
        self._state = state
        self._drafts = drafts
        self._dirty = asyncio.Event()
        self._urgent = asyncio.Event()
        self._stopping = False
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def lasting(self) -> bool:
        """There is a place to save to."""
        return self._state is not None

    def done(self, mark: Mark) -> None:
        """The application is through with the event of this mark."""
        if self._state is None:
            return
        kept = self.snapshot
        if mark.gone:
            kept.have.pop(mark.conv, None)
            kept.convs.pop(mark.conv, None)
        if mark.have is not None:
            kept.have[mark.conv] = mark.have
        if mark.view is not None:
            kept.convs[mark.conv] = mark.view
        if mark.sync is not None:
            kept.sync = mark.sync
        self._dirty.set()

    def is_user(self, id: str) -> None:
        """Whose state it is."""
        self.snapshot.user = id

    def touch(self) -> None:
        """A message was acknowledged: save soon, so that it is not sent again for nothing."""
        self._dirty.set()

    def urgent(self) -> asyncio.Future[None]:
        """Save now; done when everything up to this call is durable. Raises OSError."""
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
                await wait_within(self._urgent, LAZY_S)
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
