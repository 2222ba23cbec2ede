"""Prefetch: conversations that are likely to be opened next are loaded before a client asks for them.

There are two occasions: a worker starts and loads the most active conversations of all, within a budget (*warming*);
and a user logs in, and the newest of their conversations are loaded. Both load recent entries, one conversation at a
time, from level 2 if it has them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from lru import LRU

from ..errors import ChatError
from ..settings import CacheSettings
from ..store.base import Store, View
from .l2 import L2, Args
from .lookup import Spawn
from .recent import RecentEntries

log = logging.getLogger("chatcore.cache")

#: Length of a window of the activity score, and how many are added up, each worth half of the next: a conversation
#: that was busy two hours ago is worth a sixteenth of one that is busy now.
WINDOW_S: Final = 1800
WINDOWS: Final = 4
#: Conversations kept in Redis for each window; more than any worker warms.
MAX_SCORED: Final = 20_000
#: Conversations counted between two batches, and the time between them.
MAX_COUNTED: Final = 2_000
BATCH_S: Final = 5.0

#: Users who have just logged in and whose views have not been read yet.
MAX_LOGINS: Final = 2_000
#: Conversations that wait to be prefetched; beyond, a conversation is loaded when it is opened.
MAX_WAITING: Final = 500
#: Conversations whose heads are read together.
HEADS: Final = 500
#: How far back a store with one counter for all changes is asked for the conversations last written to.
POSITIONS: Final = 2_000


class Activity:
    """Scores conversations by how much is read and written in them, halved with each window of time that has passed.

    The scores are those of the workers of all hosts together, in one sorted set of level 2 for each window, which
    expires by itself; each worker adds to them in batches. One per worker.

    :param l2: None: there are no scores.
    :param wall: Unix time in seconds: it only names the window.
    """

    def __init__(self, l2: L2 | None, wall: Callable[[], float] = time.time) -> None:
        self._l2 = l2
        self._wall = wall
        self._counts: Any = LRU(MAX_COUNTED)

    def note(self, conv: str) -> None:
        """Count a read or a write in a conversation."""
        self._counts[conv] = self._counts.get(conv, 0) + 1

    def _keys(self, l2: L2) -> list[str]:
        """Of the windows, the current one first."""
        now = int(self._wall() // WINDOW_S)
        return [l2.key("hot", str(now - i)) for i in range(WINDOWS)]

    async def run(self) -> None:
        """Send batches until cancelled."""
        while True:
            await asyncio.sleep(BATCH_S)
            await self.send()

    async def send(self) -> None:
        """Send the counts; they are lost if level 2 is out of use, since a score need not be exact."""
        counts = dict(self._counts.items())
        self._counts.clear()
        if self._l2 is None or not counts:
            return
        key = self._keys(self._l2)[0]
        commands: list[Args] = [("ZINCRBY", key, n, conv) for conv, n in counts.items()]
        commands += [("ZREMRANGEBYRANK", key, 0, -1 - MAX_SCORED), ("PEXPIRE", key, WINDOWS * WINDOW_S * 1000)]
        await self._l2.run(commands)

    async def hottest(self, most: int) -> list[str]:
        """The most active conversations, the most active first (none if level 2 is out of use)."""
        if self._l2 is None or most <= 0:
            return []
        keys = self._keys(self._l2)
        replies = await self._l2.run([("ZREVRANGE", key, 0, 2 * most - 1, "WITHSCORES") for key in keys])
        scores: dict[str, float] = {}
        for i, reply in enumerate(reply for reply in replies or () if not isinstance(reply, Exception)):
            flat = [x for pair in reply for x in pair] if reply and not isinstance(reply[0], bytes) else reply
            for at in range(0, len(flat), 2):
                conv = flat[at].decode()
                scores[conv] = scores.get(conv, 0.0) + float(flat[at + 1]) / 2**i
        return sorted(scores, key=lambda conv: scores[conv], reverse=True)[:most]


class Prefetcher:
    """One per worker."""

    def __init__(
        self,
        store: Store,
        recent: RecentEntries,
        activity: Activity,
        settings: CacheSettings,
        *,
        spawn: Spawn,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._recent = recent
        self._activity = activity
        self._settings = settings
        self._spawn = spawn
        self._clock = clock
        self._logins: Any = LRU(MAX_LOGINS)
        self._waiting: dict[str, int] = {}
        self._loading = False
        #: Conversations loaded at the start, and at log-ins.
        self.warmed = 0
        self.prefetched = 0
        #: Set when warming has ended; and while no prefetch is under way.
        self.warm = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()

    # --- at the start ----------------------------------------------------------------
    async def warm_up(self) -> None:
        """Load the most active conversations, within the budget; ``warm`` is set at the end."""
        try:
            if self._settings.warm_conversations:
                await self._warm_up()
        except ChatError as exc:
            log.info("warming ended early: %s", exc)
        finally:
            self.warm.set()

    async def _warm_up(self) -> None:
        until = self._clock() + self._settings.warm_budget_ms / 1000

        def go_on() -> bool:
            return self._clock() < until

        for convs in await self._active(self._settings.warm_conversations):
            if go_on():
                heads = await self._store.heads(convs)
                self.warmed += await self._recent.prefetch(list(heads.items()), go_on)
        log.info("%d conversations are warm", self.warmed)

    async def _active(self, most: int) -> Iterable[Sequence[str]]:
        """The most active conversations, in batches."""
        convs = await self._activity.hottest(most)
        if not convs and self._store.global_positions:
            # There are no scores: take the conversations last written to.
            position = await self._store.position()
            changes = await self._store.changes(max(0, position - POSITIONS))
            convs = [conv for conv, _ in changes.heads][-most:]
        return [convs[at : at + HEADS] for at in range(0, len(convs), HEADS)]

    # --- at a log-in ---------------------------------------------------------------------
    def on_login(self, user: str) -> None:
        """A user logs in; the next :meth:`on_views` of the user starts a prefetch."""
        self._logins[user] = True

    def on_views(self, user: str, views: Sequence[View]) -> None:
        """The views of a user were read, newest first. Right after a log-in, load the first of them."""
        if not self._logins.pop(user, False):
            return
        for view in views[: self._settings.prefetch_conversations]:
            if len(self._waiting) < MAX_WAITING:
                self._waiting[view.conv] = view.head
        if self._waiting and not self._loading:
            self._loading = True
            self.idle.clear()
            self._spawn(self._prefetch(), "cache-prefetch")

    async def _prefetch(self) -> None:
        try:
            while self._waiting:
                heads, self._waiting = list(self._waiting.items()), {}
                self.prefetched += await self._recent.prefetch(heads)
        except ChatError as exc:
            log.debug("prefetch: %s", exc)
        finally:
            self._loading = False
            self.idle.set()
