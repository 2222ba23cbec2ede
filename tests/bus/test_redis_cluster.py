"""The Redis bus and client on a real Redis Cluster, where pub/sub is sharded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
from redis.crc import key_slot
from redis.exceptions import ResponseError

from chatcore.common.redis_client import RedisClient, parse_url
from chatcore.errors import Unavailable

from ..services.redis import RedisCluster, RedisServer
from .redis_parts import buses, connected, run


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    with RedisCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def shard_channels(node: RedisServer) -> set[str]:
    return set(node.command("PUBSUB", "SHARDCHANNELS"))


def test_each_channel_lives_on_its_own_node(cluster: RedisCluster) -> None:
    async def main() -> None:
        async with buses(cluster.url, "a", "b", prefix="p1") as [x, y]:
            (a, _), (b, rb) = x, y
            await connected(x, y)
            channels = [f"c{i}" for i in range(60)] + ["p:1"]
            await b.subscribe(channels)
            for channel in channels:
                a.publish(channel, channel.encode())
                a.send_to("b", channel, b"to b")
            await rb.until(lambda: len(rb.messages) >= 2 * len(channels))
            assert {m for m in rb.messages if m[1] != b"to b"} >= {(c, c.encode()) for c in channels}
            assert ("p:1", b"state at a") in rb.messages
            spread = [{c for c in shard_channels(n) if c.startswith("p1:")} for n in cluster.nodes]
            assert all(len(part) > 5 for part in spread), "on all nodes"
            assert set().union(*spread) == {f"p1:{c}" for c in channels}
            assert not any(n.command("PUBSUB", "CHANNELS") for n in cluster.nodes), "and nothing goes to all nodes"
            b.unsubscribe(channels)
            await b.subscribe(["last"])
            await rb.until(lambda: [c for n in cluster.nodes for c in shard_channels(n) if ":c" in c] == [])

    run(main())


def test_a_slot_that_moves_calls_for_a_resync_and_then_goes_on(cluster: RedisCluster) -> None:
    channel = "moving"
    slot = str(key_slot(f"p2:{channel}".encode()))

    async def main() -> None:
        async with buses(cluster.url, "a", "b", prefix="p2", heartbeat_ms=200) as [x, y]:
            await connected(x, y)
            await y[0].subscribe([channel])
            (owner,) = [n for n in cluster.nodes if f"p2:{channel}" in shard_channels(n)]
            (other, *_) = [n for n in cluster.nodes if n is not owner]
            id = other.command("CLUSTER", "MYID")
            # The slot holds no keys, so moving it means to inform every node.
            for node in [other, owner, *(n for n in cluster.nodes if n not in (owner, other))]:
                node.command("CLUSTER", "SETSLOT", slot, "NODE", id)
            await y[1].resynced("the connection to redis is lost")
            await y[1].resynced("connected to redis")
            await y[1].until(lambda: f"p2:{channel}" in shard_channels(other))
            # The publisher learns it from a refusal, or from the topology; its losses then change.
            x[0].publish(channel, b"1")
            await x[1].resynced("the connection to redis is lost")
            await connected(x, y)
            x[0].publish(channel, b"2")
            await y[1].until(lambda: (channel, b"2") in y[1].messages)

    run(main())


def test_a_node_that_stands_still_is_noticed_even_if_the_heartbeats_do_not_pass_it(cluster: RedisCluster) -> None:
    async def main() -> None:
        async with buses(cluster.url, "a", prefix="p3", heartbeat_ms=100, confirm_ms=500) as [(a, r)]:
            (beats,) = [n for n in cluster.nodes if "p3!all" in shard_channels(n)]
            (other, *_) = [n for n in cluster.nodes if n is not beats]
            other.freeze()
            try:
                await r.resynced("the connection to redis is lost")
                assert not a.healthy
            finally:
                other.thaw()
            await r.resynced("connected to redis")
            await r.until(lambda: a.healthy)

    run(main())


def test_commands(cluster: RedisCluster) -> None:
    async def main() -> None:
        client = RedisClient(parse_url(cluster.url), timeout_s=10)
        assert client.cluster
        try:
            results = await asyncio.gather(*(client.call("SET", f"k{i}", i) for i in range(100)))
            assert all(results)
            assert await client.pipeline([("GET", f"k{i}") for i in range(100)]) == [b"%d" % i for i in range(100)]
            script = "return redis.call('INCR', KEYS[1]) + redis.call('INCR', KEYS[2])"
            assert await client.call("EVAL", script, 2, "{t}1", "{t}2") == 2
            assert await client.pipeline([("INCR", "{t}1"), ("GET", "{t}2")], transaction=True) == [2, b"1"]
            with pytest.raises(ResponseError, match="WRONGTYPE"):
                await client.call("LPUSH", "k1", 1)
            assert client.breaker.failures == 0
        finally:
            await client.close()

    run(main())


def test_a_command_is_sent_once_and_no_caller_waits_long(cluster: RedisCluster) -> None:
    async def main() -> None:
        client = RedisClient(parse_url(cluster.url), timeout_s=1)
        node = cluster.nodes[0]
        key = next(f"n{i}" for i in range(1000) if owner(cluster, f"n{i}") is node)
        try:
            assert await client.call("INCR", key) == 1
            node.freeze()
            try:
                began = asyncio.get_running_loop().time()
                with pytest.raises(Unavailable):
                    await client.call("INCR", key)
                assert asyncio.get_running_loop().time() - began < 5
                await asyncio.sleep(0.5)  # long enough for a client that repeats
            finally:
                node.thaw()
            async with asyncio.timeout(20):
                while True:
                    with contextlib.suppress(Unavailable):
                        assert await client.call("GET", key) == b"2"
                        break
                    await asyncio.sleep(0.05)
        finally:
            await client.close()

    run(main())


def owner(cluster: RedisCluster, key: str) -> RedisServer | None:
    """The node that has the key's slot."""
    slot = key_slot(key.encode())
    with cluster.nodes[0].client() as client:
        for first, last, (_, port, *_rest), *_replicas in client.execute_command("CLUSTER SLOTS", RAW=True):
            if int(first) <= slot <= int(last):
                return next(n for n in cluster.nodes if n.port == int(port))
    return None
