"""The store, cache, queue and bus of a worker, by the settings: for one host or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bus.local import LocalBus
from ..bus.redis import RedisBus
from ..cache.store import CachedStore, SharedCachedStore
from ..common.redis_client import RedisClient, parse_url
from ..queue.base import Queue
from ..queue.redis import RedisQueue
from ..queue.sqlite import SQLiteQueue
from ..settings import Settings
from ..store.base import Entry, OnCommit, Store
from ..store.mongo.client import MongoSettings
from ..store.mongo.store import BrokenSchema, MongoStore
from ..store.sqlite.store import SQLiteStore
from ..supervisor.worker_process import StartError, WorkerContext
from .health import Metrics


@dataclass(frozen=True, slots=True)
class Contention:
    """What a store whose writers contend for a log must hear of the others (docs/log.md, "Append")."""

    heard: Callable[[Entry], None]
    on_yield: Callable[[str], None]
    row_changed: Callable[[str, str], None]
    blocks_changed: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Backends:
    """The store (behind its cache), and how the queue is made once the store is open."""

    store: Store
    contention: Contention | None
    cache: CachedStore | None
    queue: Callable[[], Queue]
    #: Clients that the parts share; closed last.
    clients: tuple[RedisClient, ...]
    #: What `ctl status` shows of each.
    metrics: dict[str, Metrics]


def worker_name(context: WorkerContext) -> str:
    """The worker's name on the bus: host, slot and nonce, in letters that sockets and channels may have."""
    name = f"{context.host}-{context.slot}-{context.nonce:x}"
    return "".join(ch if ch.isascii() and (ch.isalnum() or ch in "-_") else "_" for ch in name)[-48:]


def make_store(settings: Settings, on_commit: OnCommit, publish_yield: Callable[[str], None]) -> Backends:
    """The store that the settings name; not started."""
    if settings.store.mongodb_url:
        store = MongoStore(
            MongoSettings(
                settings.store.mongodb_url,
                settings.store.mongodb_database,
                settings.store.pool_max,
                settings.store.pool_min,
                settings.store.pool_wait_ms,
                settings.store.server_selection_ms,
                min(settings.store.operation_ms, settings.timeouts.store_ms),
                settings.store.history_from_secondaries,
                settings.timeouts.store_ms,
            ),
            on_commit,
            publish_yield,
            max_conversations=settings.limits.conversations_per_user,
        )
        address = parse_url(settings.redis.url)
        client = RedisClient(address)
        contention = Contention(store.heard, store.on_yield, store.row_changed, store.blocks_changed)
        breakers = {"queue": client.breaker}
        cache: CachedStore | None = None
        near = None
        if settings.cache.enabled:
            if settings.cache.l2:
                near = RedisClient(address, timeout_s=settings.cache.l2_timeout_ms / 1000)
                breakers["cache"] = near.breaker
            cache = SharedCachedStore(store, settings.cache, near)
        return Backends(
            cache or store,
            contention,
            cache,
            lambda: RedisQueue(client, f"chatcore:{store.store_id}", settings.queue),
            (client,),
            {
                "store": lambda: {"name": store.name, **store.mongo.stats()},
                **_metrics_of(cache),
                "breakers": lambda: {name: breaker.shown() for name, breaker in breakers.items()},
            },
        )
    embedded = SQLiteStore(
        Path(settings.server.data),
        on_commit,
        queue=settings.limits.append_queue,
        timeout_ms=settings.timeouts.store_ms,
        max_conversations=settings.limits.conversations_per_user,
    )
    cache = CachedStore(embedded, settings.cache) if settings.cache.enabled else None
    return Backends(
        cache or embedded,
        None,
        cache,
        lambda: SQLiteQueue(embedded.write, embedded.read, settings.queue),
        (),
        {"store": lambda: {"name": embedded.name}, **_metrics_of(cache)},
    )


def _metrics_of(cache: CachedStore | None) -> dict[str, Metrics]:
    return {} if cache is None else {"cache": cache.stats}


def bus_metrics(bus: RedisBus | LocalBus) -> dict[str, Any]:
    """What `ctl status` shows of the bus: how many other workers it hears of, and counters."""
    return {"name": "redis" if isinstance(bus, RedisBus) else "local", "peers": len(bus.peers)} | dataclasses.asdict(
        bus.stats
    )


def shares_user_channel(bus: RedisBus | LocalBus) -> bool:
    """Whether the events of all users go over one channel of the bus.

    On one host every worker may as well hear the events of all users: they are rare, and a channel for each user
    would cost half a kilobyte, and each log-in a round over the other workers.
    """
    return isinstance(bus, LocalBus)


async def start_store(settings: Settings, store: Store) -> None:
    """Open the store; an empty one of MongoDB is set up (the writer sets up the embedded one).

    :raises StartError: it cannot be used, in one line.
    :raises Unavailable: it does not answer.
    """
    data = Path(settings.server.data)
    (data / "run").mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        await store.start()
    except BrokenSchema as exc:
        raise StartError(str(exc)) from None


def make_bus(context: WorkerContext, store: Store) -> RedisBus | LocalBus:
    """The bus that the settings name; the store is open."""
    settings = context.settings
    name = worker_name(context)
    if settings.redis.url:
        return RedisBus(
            settings.redis.url,
            name,
            prefix=store.store_id,
            queue_bytes=settings.bus.queue_bytes,
            heartbeat_ms=settings.bus.heartbeat_ms,
            confirm_timeout_ms=settings.bus.confirm_timeout_ms,
        )
    return LocalBus(
        Path(settings.server.data) / "run",
        name,
        queue_bytes=settings.bus.queue_bytes,
        confirm_timeout_ms=settings.bus.confirm_timeout_ms,
        heartbeat_ms=settings.bus.heartbeat_ms,
    )
