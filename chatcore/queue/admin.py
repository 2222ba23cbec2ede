"""The queue for the command line; it works whether a server runs or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from ..common.redis_client import RedisClient, parse_url
from ..errors import BadRequest, ChatError
from ..settings import Settings
from ..store.sqlite.command import read, submit
from .base import Queue
from .redis import PREFIXES, RedisQueue
from .sqlite import SQLiteQueue

T = TypeVar("T")

# An operator waits longer than a user.
REDIS_TIMEOUT_S: Final = 10.0


def with_queue(settings: Settings, work: Callable[[Queue], Awaitable[T]], prefix: str | None = None) -> T:
    """Call ``work`` with the queue of a server; returns its result.

    :param prefix: of the queue in Redis, if several servers use that Redis.
    :raises BadRequest: there is no queue, or there are several and ``prefix`` is None.
    :raises Unavailable: the storage does not answer.
    """

    async def main() -> T:
        opened = _redis(settings, prefix) if settings.redis.url else _sqlite(settings)
        async with opened as queue:
            return await work(queue)

    return asyncio.run(main())


@asynccontextmanager
async def _redis(settings: Settings, prefix: str | None) -> AsyncIterator[Queue]:
    try:
        address = parse_url(settings.redis.url)
    except ValueError as exc:
        raise BadRequest(f"redis.url: {exc}") from None
    client = RedisClient(address, timeout_s=REDIS_TIMEOUT_S)
    try:
        known = sorted(name.decode() for name in await client.call("SMEMBERS", PREFIXES))
        if prefix is None and len(known) > 1:
            raise BadRequest(f"several servers keep a queue in this Redis; name one with --of: {', '.join(known)}")
        if prefix is not None and prefix not in known:
            raise BadRequest(f"there is no queue {prefix} in this Redis; there are: {', '.join(known) or 'none'}")
        # Without a known name nothing was ever put: an empty queue looks the same under any name.
        yield RedisQueue(client, prefix or (known or ["chatcore"])[0], settings.queue)
    finally:
        await client.close()


@asynccontextmanager
async def _sqlite(settings: Settings) -> AsyncIterator[Queue]:
    data = Path(settings.server.data)
    yield SQLiteQueue(
        lambda request: _run_now(lambda: submit(data, request, create=False)),
        lambda query: _run_now(lambda: read(data, query)),
        settings.queue,
    )


def _run_now(work: Callable[[], Any]) -> asyncio.Future[Any]:
    """Run in this thread what a store runs in its own."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    try:
        future.set_result(work())
    except ChatError as exc:
        future.set_exception(exc)
    return future
