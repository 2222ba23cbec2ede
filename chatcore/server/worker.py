"""One worker: one core, one loop, its share of the clients. The parts that it is made of, and its life.

All parts are made here, after the fork, inside the running loop, and each is given the parts that it uses;
none is given the worker.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
import time
from typing import Final

import uvloop

from .._fast.reactor import TICK_MS, Frame, Topic
from ..accounts.service import Accounts
from ..bus.base import Bus
from ..chat import events
from ..chat.delivery import Delivery
from ..chat.directory import USER_CHANNEL, Directory
from ..chat.presence import PRESENCE_CHANNEL, Presence
from ..chat.service import Chat
from ..chat.user_events import UserEvents
from ..common.tasks import Tasks
from ..queue.base import HandlerRegistry
from ..store.base import CommitHooks, Store
from ..supervisor.stats import WorkerState
from ..supervisor.worker_process import WorkerContext
from .api import Api
from .backends import bus_metrics, make_bus, make_store, shares_user_channel, start_store
from .connections import Connections
from .health import Health
from .session import Services

log = logging.getLogger("chatcore.worker")

# A loop that was blocked for so long has missed heartbeats and bus messages: compare with the store.
STALL_S: Final = 2.0
# The interpreter passes its lock to a waiting thread (the store's) after this; the default of
# 5 ms would add that much to every commit while the loop is busy.
SWITCH_INTERVAL_S: Final = 0.0005
# The cycle collector examines the young objects when there are so many more, the middle-aged every 20th
# time, all every 20th of those. Almost nothing here ends in cycles; at its defaults (700, 10, 10) it took
# a sixth of the time of a reconnect storm.
GC_THRESHOLDS: Final = (20_000, 20, 20)


def main(context: WorkerContext) -> int:
    """Run a worker until it is drained; returns its exit code.

    :raises StartError: with one line that says why it cannot start.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(*GC_THRESHOLDS)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(context))


async def _run(context: WorkerContext) -> int:
    worker = Worker(context)
    await worker.start()
    await worker.stopping.wait()
    await worker.drain()
    return 0


class Worker:
    """All parts of one worker. Listens to the bus, and reports to the stats page at each tick."""

    def __init__(self, context: WorkerContext) -> None:
        self.context = context
        self.settings = context.settings
        self.stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.tasks = Tasks()
        self.connections = Connections(context.settings, context.version, self.tasks)
        self._tick_timer: asyncio.TimerHandle | None = None
        self._last_tick = time.monotonic()

    # --- life -------------------------------------------------------------------
    async def start(self) -> None:
        """Open the store and the bus, make the parts that need them, then accept clients.

        :raises StartError: the store cannot be used.
        """
        self._loop.add_signal_handler(signal.SIGTERM, self.stopping.set)
        self._loop.add_reader(self.context.parent_fd, self._parent_gone)
        committed = CommitHooks()
        self._backends = backends = make_store(self.settings, committed, self._publish_yield)
        self._contention = backends.contention
        self.cache = backends.cache
        self.store: Store = backends.store
        await start_store(self.settings, self.store)
        bus = make_bus(self.context, self.store)
        self.bus: Bus = bus
        self._one_user_channel = shares_user_channel(bus)
        self._make_parts()
        if self.cache is not None:
            committed.append(self.cache.on_commit)
        committed.append(self.chat.on_commit)
        metrics = {**backends.metrics, "bus": lambda: bus_metrics(bus)}
        self._health = Health(self.context.stats, self.store, bus, self.cache, self.queue, metrics)
        api = Api(
            self.settings.limits,
            self.store,
            self.accounts,
            self.chat,
            self._user_events,
            self._health,
            lambda: self.connections.draining,
        )
        await self.bus.start(self)
        if self.cache is not None:
            await self.cache.listen(self.bus)
        if self.handlers.topics():
            await self.queue.start()
        await self.delivery.start()
        await self.directory.start()
        self.presence.start()
        services = Services(
            self.settings,
            self.store.store_id,
            self.connections.reactor,
            self.store,
            self.accounts,
            self.directory,
            self.delivery,
            self.presence,
            self.chat,
            self.tasks,
        )
        self.connections.serve(self.context.listener.fileno(), services, api.handle)
        self._tick()
        self._health.start()
        self.context.stats.ready()
        self.handlers.start(self.queue)

    def _make_parts(self) -> None:
        settings, limits = self.settings, self.settings.limits
        contention, cache = self._contention, self.cache
        store, bus, reactor = self.store, self.bus, self.connections.reactor
        self.queue = self._backends.queue()
        self.handlers = HandlerRegistry()
        self.directory = Directory(
            store, bus, lambda user: self.presence.changed(user), one_channel=self._one_user_channel
        )
        self.presence = Presence(store, bus, self.directory.is_online)
        self.delivery = Delivery(
            store,
            bus,
            self.directory,
            lambda room: Topic(reactor, room),
            Frame,
            recent=limits.ring,
            recent_bytes=limits.ring_bytes,
            # With the low-water mark before it, a replay stays below the limit of the outbox.
            replay_bytes=(limits.outbox_bytes - limits.outbox_low_water_bytes) // 2,
            backlog=limits.backlog,
            check_interval_s=settings.store.check_interval_ms / 1000,
            replay=None if cache is None else cache.replay,
        )
        self._user_events = UserEvents(
            bus,
            self.directory,
            self.delivery.refresh,
            contention.row_changed if contention is not None else lambda conv, user: None,
            contention.blocks_changed if contention is not None else lambda: None,
            one_channel=self._one_user_channel,
        )
        page = None if cache is None else cache.page
        self.chat = Chat(settings, store, bus, self.delivery, self._user_events, page)
        self.accounts = Accounts(settings, store)

    def _parent_gone(self) -> None:
        log.warning("the supervisor is gone: draining")
        self._loop.remove_reader(self.context.parent_fd)
        self.stopping.set()

    async def drain(self) -> None:
        """Accept the backlog, stop listening, answer what is outstanding, send all clients away, end."""
        self.context.stats.state = WorkerState.DRAINING
        deadline = self._loop.time() + self.settings.server.drain_timeout_ms / 1000
        self.connections.stop_accepting()
        self.context.listener.close()
        await self.connections.drain(deadline)
        await self._health.close()
        await self.presence.close()
        await self.directory.close()
        await self.delivery.close()
        await self.queue.close()
        await self.store.close()
        await self.bus.close()
        for client in self._backends.clients:
            await client.close()
        await self.tasks.close()
        self.accounts.close()
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        self.connections.close()

    def _tick(self) -> None:
        now = time.monotonic()
        late = now - self._last_tick - TICK_MS / 1000
        self._last_tick = now
        reactor, stats = self.connections.reactor, self.context.stats
        reactor.tick()
        if late > 0:
            stats.loop_lag_max_ns = max(stats.loop_lag_max_ns, int(late * 1e9))
        if late > STALL_S:
            log.warning("the loop was blocked for %.1f s", late)
            self.on_resync_needed("the loop was blocked")
        stats.connections = reactor.connections()
        stats.websockets = reactor.websockets()
        stats.sessions = self.directory.sessions
        stats.attached = len(self.delivery.rooms)
        stats.entries_appended = self.chat.appended
        stats.deliveries = self.delivery.deliveries
        stats.messages_in = reactor.stats()["messages_in"]
        self._health.beat()
        stats.beat()
        self._tick_timer = self._loop.call_later(TICK_MS / 1000, self._tick)

    def _publish_yield(self, conv: str) -> None:
        self.bus.publish(events.conv_channel(conv), events.YIELD)

    # --- the bus' listener ------------------------------------------------------------
    def on_bus(self, channel: str, payload: bytes) -> None:
        """A message of another worker. A malformed one is a bug of that worker: logged and dropped."""
        kind, name = channel[:2], channel[2:]
        try:
            if kind == events.CONV_CHANNEL:
                self._on_conversation(name, payload)
            elif kind == USER_CHANNEL:
                self._user_events.on_bus(payload)
            elif kind == PRESENCE_CHANNEL:
                self.presence.on_bus(name, payload)
            elif kind == "i:" and self.cache is not None:
                self.cache.on_bus(payload)
        except (ValueError, KeyError) as exc:
            log.warning("bus message on %s dropped: %s", channel, exc)

    def _on_conversation(self, conv: str, payload: bytes) -> None:
        kind = payload[:1]
        if kind == events.ENTRY:
            entry = events.unpack_entry(conv, payload)
            if self._contention is not None:
                self._contention.heard(entry)
            if self.cache is not None:
                self.cache.on_entry(entry)
            self.delivery.on_entry(entry)
        elif kind == events.STATE:
            self.delivery.push_state(conv, *events.unpack_state(payload))
        elif kind == events.YIELD and self._contention is not None:
            self._contention.on_yield(conv)

    def on_resync_needed(self, why: str) -> None:
        """Messages may have been lost: compare with the store."""
        log.debug("resync: %s", why)
        if self.cache is not None:
            self.cache.on_resync_needed()
        self.delivery.check()

    def on_peer_gone(self, peer: str) -> None:
        """Another worker is gone."""
        self.presence.on_peer_gone(peer)

    def on_peer_subscribed(self, peer: str, channel: str) -> None:
        """Another worker subscribed to a channel."""
        if channel.startswith(PRESENCE_CHANNEL):
            self.presence.on_peer_subscribed(peer, channel[len(PRESENCE_CHANNEL) :])
