"""The Redis bus and client behind a sentinel: the primary stands still, the replica takes over."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from chatcore.common.redis_client import RedisClient, parse_url
from chatcore.errors import Unavailable

from ..services.redis import RedisSentinel, RedisServer
from .redis_parts import buses, connected, run


async def answer(client: RedisClient, *args: str) -> object:
    """The reply, as soon as a server gives one."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(Unavailable):
                return await client.call(*args)
            await asyncio.sleep(0.02)


def test_failover(tmp_path: Path) -> None:
    async def main(service: RedisSentinel) -> None:
        client = RedisClient(parse_url(service.url))
        assert not client.cluster
        async with buses(service.url, "a", "b", heartbeat_ms=200, confirm_ms=1000) as [x, y]:
            await connected(x, y)
            await y[0].subscribe(["x"])
            assert await client.call("SET", "k", "v")
            await y[1].until(lambda: service.replica.command("GET", "k") == "v")
            service.primary.freeze()
            try:
                for _, r in (x, y):
                    await r.resynced("the connection to redis is lost")
                    await r.resynced("connected to redis")
                await connected(x, y)
                assert workers_at(service.replica) == 2
                x[0].publish("x", b"moved")
                await y[1].until(lambda: ("x", b"moved") in y[1].messages)
                assert await answer(client, "GET", "k") == b"v"
                assert await answer(client, "SET", "k2", "v2")
            finally:
                service.primary.thaw()
            # The old primary is back and, until the sentinel demotes it, a primary: no bus connects to it.
            assert service.primary.command("ROLE")[0] == "master"
            await y[1].until(lambda: workers_at(service.primary) == 0)
            x[0].publish("x", b"still here")
            await y[1].until(lambda: ("x", b"still here") in y[1].messages)
            assert [bus.stats.sessions for bus, _ in (x, y)] == [2, 2]
        await client.close()

    with RedisSentinel(tmp_path) as service:
        run(main(service))


def workers_at(server: RedisServer) -> int:
    """How many buses are connected to it."""
    channels = server.command("PUBSUB", "CHANNELS", "*!all")
    return int(server.command("PUBSUB", "NUMSUB", *channels)[1]) if channels else 0
