"""Loading ahead of need: what is likely to be opened next is in memory before it is asked for.

Two occasions: a worker starts (*warming*: the most active conversations of all, within a budget), and
a user logs in (*prefetch*: the first few of his list). Both read tails, one at a time, from level 2 if
it has them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from lru import LRU

from ..errors import ChatError
from ..settings import Cache as CacheSettings
from ..store.base import Store, View
from .activity import Activity
from .history import History
from .lookup import Spawn

log = logging.getLogger("chatcore.cache")

# Users whose list of conversations was just read: what they open next is loaded when their views are known.
ARRIVING: Final = 2_000
# Conversations that wait to be loaded; beyond, they are read when they are opened.
WAITING: Final = 500
# Conversations whose heads are asked for together.
HEADS: Final = 500
# How far back a store with one counter for everything is asked for what was written to last.
POSITIONS: Final = 2_000


class Ahead:
    """One per worker."""

    def __init__(
        self,
        store: Store,
        history: History,
        activity: Activity,
        settings: CacheSettings,
        *,
        spawn: Spawn,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._history = history
        self._activity = activity
        self._settings = settings
        self._spawn = spawn
        self._clock = clock
        self._arriving: Any = LRU(ARRIVING)
        self._waiting: dict[str, int] = {}
        self._loading = False
        #: Tails loaded at the start, and at log-ins; `idle` is set while none is being loaded.
        self.warmed = 0
        self.prefetched = 0
        self.warm = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()

    # --- at the start ----------------------------------------------------------------
    async def run(self) -> None:
        """Load the most active conversations, within the budget; ``warm`` is set at the end."""
        try:
            if self._settings.warm_conversations:
                await self._warm()
        except ChatError as exc:
            log.info("warming ended early: %s", exc)
        finally:
            self.warm.set()

    async def _warm(self) -> None:
        until = self._clock() + self._settings.warm_budget_ms / 1000

        def go_on() -> bool:
            return self._clock() < until

        for convs in await self._active(self._settings.warm_conversations):
            if go_on():
                heads = await self._store.heads(convs)
                self.warmed += await self._history.load_ahead(list(heads.items()), go_on)
        log.info("%d conversations are warm", self.warmed)

    async def _active(self, most: int) -> Iterable[Sequence[str]]:
        """The most active conversations, in lots."""
        convs = await self._activity.hottest(most)
        if not convs and self._store.global_positions:
            # Nobody has kept a score: those written to last.
            position = await self._store.position()
            changes = await self._store.changes(max(0, position - POSITIONS))
            convs = [conv for conv, _ in changes.heads][-most:]
        return [convs[at : at + HEADS] for at in range(0, len(convs), HEADS)]

    # --- at a log-in ---------------------------------------------------------------------
    def arriving(self, user: str) -> None:
        """A user logs in; :meth:`views` follows."""
        self._arriving[user] = True

    def views(self, user: str, views: Sequence[View]) -> None:
        """A user's views, newest first. If he has just arrived, the first are loaded."""
        if not self._arriving.pop(user, False):
            return
        for view in views[: self._settings.prefetch_conversations]:
            if len(self._waiting) < WAITING:
                self._waiting[view.conv] = view.head
        if self._waiting and not self._loading:
            self._loading = True
            self.idle.clear()
            self._spawn(self._prefetch(), "cache-prefetch")

    async def _prefetch(self) -> None:
        try:
            while self._waiting:
                heads, self._waiting = list(self._waiting.items()), {}
                self.prefetched += await self._history.load_ahead(heads)
        except ChatError as exc:
            log.debug("prefetch: %s", exc)
        finally:
            self._loading = False
            self.idle.set()
