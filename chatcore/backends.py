"""Which store and which bus a worker has: by the settings, one host or several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .bus.base import Bus
from .bus.local import LocalBus
from .bus.redis import RedisBus
from .process import StartError, WorkerContext
from .settings import Settings
from .store.base import Entry, OnCommit, Store
from .store.mongo.client import MongoSettings
from .store.mongo.store import BrokenSchema, MongoStore
from .store.sqlite.lock import WriteLock
from .store.sqlite.schema import BrokenStore, prepare
from .store.sqlite.store import SQLiteStore


@dataclass(frozen=True, slots=True)
class Racing:
    """What a store whose writers race is to hear of the others (log.md): nothing, for SQLite."""

    heard: Callable[[Entry], None]
    on_yield: Callable[[str], None]
    row_changed: Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Backends:
    """The store, and how its bus is made once the store is open (the bus' names begin with the store's id)."""

    store: Store
    racing: Racing | None


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
            ),
            on_commit,
            publish_yield,
            max_conversations=settings.limits.conversations_per_user,
        )
        return Backends(store, Racing(store.heard, store.on_yield, store.row_changed))
    return Backends(
        SQLiteStore(
            Path(settings.server.data),
            on_commit,
            queue=settings.limits.append_queue,
            batch=settings.store.batch_entries,
            checkpoint_pages=settings.store.checkpoint_pages,
            timeout_ms=settings.timeouts.store_ms,
            max_conversations=settings.limits.conversations_per_user,
        ),
        None,
    )


async def start_store(settings: Settings, store: Store) -> None:
    """Open the store; an empty one is set up.

    :raises StartError: it cannot be used, in one line.
    :raises Unavailable: it does not answer.
    """
    data = Path(settings.server.data)
    (data / "run").mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        if not settings.store.mongodb_url:
            lock = WriteLock(data)
            try:
                with lock:  # the workers start together; one of them makes the database
                    prepare(data)
            finally:
                lock.close()
        await store.start()
    except (BrokenStore, BrokenSchema) as exc:
        raise StartError(str(exc)) from None


def make_bus(context: WorkerContext, store: Store) -> Bus:
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
