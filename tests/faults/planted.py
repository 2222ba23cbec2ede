"""Workers that break one promise each, so that the checker can be shown to see it. Only `launch.py` runs them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Coroutine
from typing import Any

from chatcore.chat import events
from chatcore.entries import NewEntry
from chatcore.server.worker import Worker
from chatcore.store.base import Appended, Entry, Page
from chatcore.supervisor.worker_process import WorkerContext

#: Long enough that a kill falls into it, and that the log is looked at before it is over.
EARLY_S = 1.0
#: One of so many entries is announced to other workers, so that a hole is found; the last ones are mostly not.
TOLD_OF = 5
#: The looks that would find what the bus lost.
NEVER_MS = 600_000


class Instead:
    """Everything as the original, but for what a subclass does instead."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


# --- ack before commit -----------------------------------------------------------------
class EarlyStore(Instead):
    """Answers at once and commits a moment later. ``head``: the newest seq known here."""

    def __init__(self, original: Any, worker: Worker) -> None:
        super().__init__(original)
        self._worker = worker

    def append(self, entry: NewEntry) -> asyncio.Future[Appended]:
        future: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
        room = self._worker.delivery.rooms.get(entry.conv)
        future.set_result(Appended(1 if room is None else room.last + 1, time.time_ns() // 1_000_000))
        self._worker.tasks.spawn(self._late(entry), "early")
        return future

    async def _late(self, entry: NewEntry) -> None:
        await asyncio.sleep(EARLY_S)
        await self._original.append(entry)


class AcksEarly(Worker):
    """Says `ok` before it is durable."""

    def _make_parts(self) -> None:
        store: Any = EarlyStore(self.store, self)
        self.store = store
        super()._make_parts()


# --- dropped last publish --------------------------------------------------------------
class LossyBus(Instead):
    """Loses entries, as a bus may, but more."""

    _count = 0

    def publish(self, channel: str, payload: bytes) -> None:
        if payload[:1] == events.ENTRY:
            self._count += 1
            if self._count % TOLD_OF:
                return
        self._original.publish(channel, payload)


class DropsLast(Worker):
    """Loses entries on the bus and does not look for them: a hole is found with the next entry, a last one is not."""

    def __init__(self, context: WorkerContext) -> None:
        store = dataclasses.replace(context.settings.store, check_interval_ms=NEVER_MS)
        super().__init__(dataclasses.replace(context, settings=dataclasses.replace(context.settings, store=store)))

    def _make_parts(self) -> None:
        bus: Any = LossyBus(self.bus)
        self.bus = bus
        super()._make_parts()


# --- repeat on resume ------------------------------------------------------------------
class Repeats(Worker):
    """Begins a replay with the entry that the client has."""

    def _make_parts(self) -> None:
        super()._make_parts()
        missing = self.delivery._missing

        def one_more(room: Any, cur: int) -> Coroutine[Any, Any, list[Entry]]:
            return missing(room, max(0, cur - 1))

        self.delivery._missing = one_more  # type: ignore[method-assign]


# --- stale cache -----------------------------------------------------------------------
class StaleCache(Instead):
    """Remembers the newest page of a conversation and never hears of what comes after."""

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self._pages: dict[str, Page] = {}

    async def page(
        self, user: str, conv: str, before: int | None, after: int | None, limit: int, max_bytes: int, hint: int
    ) -> Page:
        if before is None and after is None and conv in self._pages:
            return self._pages[conv]
        page: Page = await self._original.page(user, conv, before, after, limit, max_bytes, hint)
        if before is None and after is None:
            self._pages[conv] = page
        return page


class Stale(Worker):
    """Its cache is not the store."""

    def _make_parts(self) -> None:
        cache: Any = StaleCache(self.cache)
        self.cache = cache
        super()._make_parts()


PLANTED: dict[str, type[Worker]] = {
    "acks-early": AcksEarly,
    "drops-last": DropsLast,
    "repeats": Repeats,
    "stale": Stale,
}
