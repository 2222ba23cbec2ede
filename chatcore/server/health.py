"""How the parts of a worker are: their health, for readyz and the stats page, and their figures, for ``ctl status``.

Nobody asks a worker for them: it writes them into its cell of the stats page by itself, so those of a stuck
worker can be read, too. Counters are since the start of the worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from ..bus.base import Bus
from ..cache.store import CachedStore
from ..errors import ChatError
from ..queue.base import Queue
from ..store.base import Store
from ..supervisor.stats import Health, StatsCell

log = logging.getLogger("chatcore.health")

#: Figures are written this often: some 0.1 ms of work, for people who look now and then.
SHOW_S: Final = 1.0

#: Gives the figures of one part, as JSON can hold them; must not block.
Figures = Callable[[], dict[str, Any]]


class Panel:
    """One per worker. ``cache``: None if nothing is remembered."""

    def __init__(
        self,
        cell: StatsCell,
        store: Store,
        bus: Bus,
        cache: CachedStore | None,
        queue: Queue,
        figures: Mapping[str, Figures],
    ) -> None:
        self._cell = cell
        self._store = store
        self._bus = bus
        self._l2 = None if cache is None else cache.l2
        self._queue = queue
        self._figures = figures

    def health(self) -> dict[str, Health]:
        """Of each part, in the order in which they are shown."""
        return {
            "store": _health(self._store.healthy),
            "bus": _health(self._bus.healthy),
            "cache": Health.NONE if self._l2 is None else _health(self._l2.ready),
            "queue": _health(self._queue.healthy),
        }

    def beat(self) -> None:
        """Write the health into the cell; a few times each second, from the loop."""
        cell, health = self._cell, self.health()
        cell.store_health = health["store"]
        cell.bus_health = health["bus"]
        cell.cache_health = health["cache"]
        cell.queue_health = health["queue"]

    def show(self) -> None:
        """Write the figures into the cell."""
        self._cell.figures = {name: figures() for name, figures in self._figures.items()}

    async def run(self) -> None:
        """Show, for ever. The queue is asked whether it is there, since it may be long until somebody uses it."""
        while True:
            try:
                self.show()
                await self._queue.probe()
            except ChatError as exc:
                log.debug("the queue: %s", exc.message)
            except Exception:
                log.exception("the figures of this worker cannot be shown")
            await asyncio.sleep(SHOW_S)


def _health(well: bool) -> Health:
    return Health.OK if well else Health.DOWN
