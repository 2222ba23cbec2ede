"""How the parts of a worker are: their health, for readyz and the stats page, and their metrics, for ``ctl status``.

A worker writes both into its cell of the stats page by itself and is never asked, so those of a stuck
worker can be read, too. Counters are since the start of the worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from ..bus.base import Bus
from ..cache.store import CachedStore
from ..common.tasks import Tasks
from ..errors import ChatError
from ..queue.base import Queue
from ..store.base import Store
from ..supervisor.stats import PartHealth, StatsCell

log = logging.getLogger("chatcore.health")

#: Metrics are written this often: some 0.1 ms of work, for people who look now and then.
METRICS_S: Final = 1.0

#: Gives the metrics of one part, as JSON can hold them; must not block.
Metrics = Callable[[], dict[str, Any]]


class Health:
    """One per worker. ``cache``: None if this server has none. Owns the task that writes the metrics."""

    def __init__(
        self,
        cell: StatsCell,
        store: Store,
        bus: Bus,
        cache: CachedStore | None,
        queue: Queue,
        metrics: Mapping[str, Metrics],
    ) -> None:
        self._cell = cell
        self._store = store
        self._bus = bus
        self._l2 = None if cache is None else cache.l2
        self._queue = queue
        self._metrics = metrics
        self._tasks = Tasks()

    def start(self) -> None:
        """Begin to write the metrics."""
        self._tasks.spawn(self._run(), "health-metrics")

    async def close(self) -> None:
        """Stop writing."""
        await self._tasks.close()

    def parts(self) -> dict[str, PartHealth]:
        """The health of each part, in the order in which they are shown."""
        return {
            "store": _state(self._store.healthy),
            "bus": _state(self._bus.healthy),
            "cache": PartHealth.NONE if self._l2 is None else _state(self._l2.ready),
            "queue": _state(self._queue.healthy),
        }

    def beat(self) -> None:
        """Write the health into the cell; a few times each second, from the loop."""
        cell, parts = self._cell, self.parts()
        cell.store_health = parts["store"]
        cell.bus_health = parts["bus"]
        cell.cache_health = parts["cache"]
        cell.queue_health = parts["queue"]

    async def _run(self) -> None:
        """The queue is probed, too, since it may be long until a worker uses it."""
        while True:
            try:
                self._cell.metrics = {name: metrics() for name, metrics in self._metrics.items()}
                await self._queue.probe()
            except ChatError as exc:
                log.debug("the queue: %s", exc.message)
            except Exception:
                log.exception("the metrics of this worker cannot be written")
            await asyncio.sleep(METRICS_S)


def _state(well: bool) -> PartHealth:
    return PartHealth.OK if well else PartHealth.DOWN
