"""Accounts from the command line; it works whether a server runs or not.

A running server sees these changes within its check interval.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..settings import Settings
from ..store.base import Store, User
from ..store.names import check_name
from ..store.sqlite import command
from ..store.sqlite.accounts import AddUser, SetDisabled
from .passwords import Passwords, check_password

T = TypeVar("T")


class _IgnoreBus:
    """Ignores all messages of the bus: the command line only publishes."""

    def on_bus(self, channel: str, payload: bytes) -> None: ...
    def on_resync_needed(self, why: str) -> None: ...
    def on_peer_gone(self, peer: str) -> None: ...
    def on_peer_subscribed(self, peer: str, channel: str) -> None: ...


def _with_hosts(settings: Settings, work: Callable[[Store], Awaitable[T]]) -> T:
    """Run `work` as a worker would: on MongoDB, with invalidations for the caches of all hosts."""
    # Not at the top of the file, as the embedded default needs neither.
    from ..bus.redis import RedisBus
    from ..server.backends import make_store

    no_prefetch = replace(settings, cache=replace(settings.cache, warm_conversations=0, prefetch_conversations=0))

    async def main() -> T:
        backends = make_store(no_prefetch, lambda entries: None, lambda conv: None)
        await backends.store.start()
        bus = RedisBus(
            settings.redis.url,
            f"command-{os.getpid()}-{secrets.token_hex(4)}",
            prefix=backends.store.store_id,
            queue_bytes=settings.bus.queue_bytes,
            heartbeat_ms=settings.bus.heartbeat_ms,
            confirm_timeout_ms=settings.bus.confirm_timeout_ms,
        )
        try:
            await bus.start(_IgnoreBus())
            if backends.cache is not None:
                await backends.cache.listen(bus)
            return await work(backends.store)
        finally:
            await bus.close()
            await backends.store.close()
            for client in backends.clients:
                await client.close()

    return asyncio.run(main())


def add_user(settings: Settings, name: str, password: str) -> str:
    """Create an account; returns its id.

    :raises BadRequest: the name or the password is not allowed.
    :raises Conflict: the name is taken.
    """
    name = check_name(name, settings.limits.name_chars)
    check_password(password, settings)
    hasher = Passwords.configured(settings, queue=1)
    try:
        hashed = hasher.hash_now(password)
    finally:
        hasher.close()
    if settings.store.mongodb_url:
        return _with_hosts(settings, lambda store: store.add_user(name, hashed)).id
    request = AddUser(secrets.token_urlsafe(9), name, hashed)
    user: User = command.submit(Path(settings.server.data), request, create=True)
    return user.id


def list_users(settings: Settings) -> list[tuple[str, str, int, bool]]:
    """All accounts in the order of their names: (id, name, created in Unix ms, disabled)."""
    if settings.store.mongodb_url:
        from ..store.mongo.admin import accounts as list_accounts

        return list_accounts(settings)
    sql = "SELECT id, name, created, disabled FROM users ORDER BY name_key"
    rows: list[Any] = command.read(Path(settings.server.data), lambda db: db.execute(sql).fetchall())
    return [(id, name, created, bool(disabled)) for id, name, created, disabled in rows]


def disable_user(settings: Settings, name: str) -> None:
    """Disable an account and revoke its tokens, which ends its sessions.

    :raises NotFound: there is no account of this name.
    """
    if settings.store.mongodb_url:
        _with_hosts(settings, lambda store: store.set_disabled(name, True))
        return
    command.submit(Path(settings.server.data), SetDisabled(name, True), create=False)
