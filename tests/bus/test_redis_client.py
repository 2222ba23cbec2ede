"""Clients for Redis: URLs, and the rules of the hot path (never repeat, never cancel, never wait long)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from chatcore.common.backoff import Backoff
from chatcore.common.breaker import Breaker, BreakerState
from chatcore.common.redis_client import RedisAddress, RedisClient, parse_url
from chatcore.errors import Unavailable

from ..services.redis import RedisServer, redis_server  # noqa: F401
from .redis_parts import Wire, run


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", RedisAddress("single", (("h", 6379),))),
        ("redis://h:1/2", RedisAddress("single", (("h", 1),), db=2)),
        ("redis://[::1]:1", RedisAddress("single", (("::1", 1),))),
        ("redis://[::1]", RedisAddress("single", (("::1", 6379),))),
        ("redis://:p%40ss@h?db=3", RedisAddress("single", (("h", 6379),), db=3, password="p@ss")),
        ("rediss://u:p@h", RedisAddress("single", (("h", 6379),), username="u", password="p", tls=True)),
        ("rediss://h?ssl_ca_certs=/ca", RedisAddress("single", (("h", 6379),), tls=True, ca_certs="/ca")),
        ("rediss://h?ssl_cert_reqs=none", RedisAddress("single", (("h", 6379),), tls=True, verify=False)),
        ("unix:///run/r%20s?db=1", RedisAddress("single", path="/run/r s", db=1)),
        ("unix://u:p@/run/r", RedisAddress("single", path="/run/r", username="u", password="p")),
        ("redis+sentinel://a,b:2/main/3", RedisAddress("sentinel", (("a", 26379), ("b", 2)), service="main", db=3)),
        (
            "rediss+sentinel://u:p@a/main?sentinel_username=s&sentinel_password=q",
            RedisAddress(
                "sentinel", (("a", 26379),), service="main", username="u", password="p",
                sentinel_username="s", sentinel_password="q", tls=True,
            ),
        ),
        ("redis+cluster://a:1,b", RedisAddress("cluster", (("a", 1), ("b", 6379)))),
    ],
)  # fmt: skip
def test_the_meaning_of_urls(url: str, address: RedisAddress) -> None:
    assert parse_url(url) == address
    assert parse_url(url).cluster == url.startswith("redis+cluster")


@pytest.mark.parametrize(
    "url",
    [
        "", "h:1", "http://h", "redis://", "redis://h:0", "redis://h:x", "redis://h:99999", "redis://a,b", "redis://h/x",
        "redis+sentinel://h", "redis+sentinel:///x", "redis+cluster://h/1", "unix://", "unix://h/run", "redis://h?x=1",
        "rediss://h?ssl_cert_reqs=maybe", "redis://h/-1", "redis://u:hunter2@h:x",
    ],
)  # fmt: skip
def test_malformed_urls(url: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        parse_url(url)
    assert "hunter2" not in str(refused.value)


def test_secrets_are_not_shown() -> None:
    address = parse_url("redis+sentinel://u:hunter2@h/main?sentinel_password=hunter3")
    assert "hunter" not in f"{address} {address!r}"
    assert str(address) == "h:26379 (main)"


@contextlib.asynccontextmanager
async def client(url: str, **options: Any) -> AsyncIterator[RedisClient]:
    made = RedisClient(parse_url(url), **{"timeout_s": 10.0, **options})
    try:
        yield made
    finally:
        await made.close()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_commands_pipelines_and_refusals(redis_server: RedisServer, loop: str) -> None:  # noqa: F811
    async def main() -> None:
        async with client(redis_server.url + "/1") as c:
            assert not c.cluster
            assert await c.call("SET", "k", b"\0\xff") is True
            assert await c.call("GET", "k") == b"\0\xff"
            assert await c.pipeline([]) == []
            replies = await c.pipeline([("INCR", "n"), ("LPUSH", "k", 1), ("INCR", "n")])
            assert replies[0] == 1 and replies[2] == 2 and isinstance(replies[1], ResponseError)
            assert await c.pipeline([("INCR", "n"), ("GET", "n")], transaction=True) == [3, b"3"]
            with pytest.raises(NoScriptError):
                await c.call("EVALSHA", "0" * 40, 0)
            with pytest.raises(ResponseError, match="WRONGTYPE"):
                await c.call("LPUSH", "k", 1)
            assert c.breaker.failures == 0, "a wrong command says nothing about Redis' health"
        async with client(f"unix://{redis_server.folder}/socket?db=1") as c:
            assert await c.call("GET", "n") == b"3"

    run(main(), loop)


@pytest.mark.parametrize("kind", ["call", "pipeline", "transaction", "script"])
def test_a_command_is_sent_once(redis_server: RedisServer, kind: str) -> None:  # noqa: F811
    """redis-py 8 sends again what may have been carried out: an INCR whose reply was lost became 11."""

    async def main() -> None:
        async with Wire(redis_server.port) as wire, client(wire.url) as c:
            await c.call("PING")
            wire.cut_before_reply_to = b"counter"
            with pytest.raises(Unavailable):
                match kind:
                    case "call":
                        await c.call("INCR", "counter")
                    case "pipeline" | "transaction":
                        await c.pipeline([("INCR", "counter")], transaction=kind == "transaction")
                    case "script":
                        await c.call("EVAL", "return redis.call('INCR', KEYS[1])", 1, "counter")
        assert redis_server.command("GET", "counter") == "1"

    run(main())


def test_a_client_that_repeats_is_seen(redis_server: RedisServer) -> None:  # noqa: F811
    """So the test above can fail. (redis-py's own default are 10 times, over 5 seconds.)"""

    async def main() -> None:
        async with Wire(redis_server.port) as wire:
            raw = redis.asyncio.Redis(host="127.0.0.1", port=wire.port, retry=Retry(NoBackoff(), 2))
            await raw.ping()
            wire.cut_before_reply_to = b"counter"
            with pytest.raises(RedisError):
                await raw.incr("counter")
            await raw.aclose()
        assert redis_server.command("GET", "counter") == "3"

    run(main())


def test_a_caller_that_gives_up_leaves_the_replies_to_those_they_are_for(redis_server: RedisServer) -> None:  # noqa: F811
    """A cancelled command once left its reply in the connection, for the next command on it."""
    for i in range(200):
        redis_server.command("SET", f"k{i}", f"v{i}") if i < 20 else None

    async def main() -> None:
        async with client(redis_server.url, max_connections=2) as c:
            for round in range(50):
                tasks = [asyncio.create_task(c.call("GET", f"k{i}")) for i in range(20)]
                for _ in range(round % 7):
                    await asyncio.sleep(0)
                for task in tasks[::2]:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                for i, result in enumerate(results):
                    if not isinstance(result, asyncio.CancelledError):
                        assert result == b"v%d" % i
            assert c.breaker.state is BreakerState.CLOSED

    run(main())


def test_no_caller_waits_longer_than_the_timeout(redis_server: RedisServer) -> None:  # noqa: F811
    async def main() -> None:
        async with client(redis_server.url, timeout_s=1.0, max_connections=4) as c:
            await asyncio.gather(*(c.call("PING") for _ in range(4)))
            redis_server.freeze()
            try:
                began = time.monotonic()
                results = await asyncio.gather(*(c.call("INCR", "n") for _ in range(50)), return_exceptions=True)
                assert all(isinstance(result, Unavailable) for result in results)
                assert time.monotonic() - began < 5
                # Now the breaker is open: no caller waits at all, until the next try.
                c.breaker._until = c.breaker._clock() + 60
                began = time.monotonic()
                for _ in range(50):
                    with pytest.raises(Unavailable) as refused:
                        await c.call("PING")
                assert time.monotonic() - began < 1.0, "less than one timeout for all 50"
                c.breaker._until = 0
                assert refused.value.retry_after_ms is not None and refused.value.retry_after_ms >= 1
            finally:
                redis_server.thaw()
            async with asyncio.timeout(20):
                while True:
                    with contextlib.suppress(Unavailable):
                        await c.call("PING")
                        break
                    await asyncio.sleep(0.01)
            assert c.breaker.state is BreakerState.CLOSED

    run(main())


def test_a_full_pool_makes_callers_wait(redis_server: RedisServer) -> None:  # noqa: F811
    async def main() -> None:
        async with client(redis_server.url, max_connections=3, timeout_s=10) as c:
            results = await asyncio.gather(*(c.call("INCR", "n") for _ in range(200)))
            assert sorted(results) == list(range(1, 201))
            (count,) = [
                line for line in redis_server.command("INFO", "clients").items() if line[0] == "connected_clients"
            ]
            assert int(count[1]) <= 4

    run(main())


def test_gone_and_back_with_one_line_each(redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    caplog.set_level(logging.INFO, "chatcore")

    async def main() -> None:
        breaker_options = {"failures": 3, "backoff": Backoff(0.01, 0.05)}
        async with client(redis_server.url) as c:
            c.breaker = Breaker("redis", on_change=c._log_availability, **breaker_options)  # type: ignore[arg-type]
            await c.call("SET", "k", "v")
            redis_server.kill()
            for _ in range(100):
                with pytest.raises(Unavailable):
                    await c.call("GET", "k")
                await asyncio.sleep(0.003)
            assert c.breaker.opened > 2
            redis_server.start()
            async with asyncio.timeout(20):
                while c.breaker.state is not BreakerState.CLOSED:
                    with contextlib.suppress(Unavailable):
                        assert await c.call("GET", "k") == b"v"
                    await asyncio.sleep(0.01)

    run(main())
    said = [r.getMessage() for r in caplog.records if r.name.startswith("chatcore")]
    assert len(said) == 2, said
    assert "does not answer" in said[0] and "answers again" in said[1]


def test_not_now_is_unavailable(redis_server: RedisServer) -> None:  # noqa: F811
    async def main() -> None:
        async with client(redis_server.url) as c:
            redis_server.command("CONFIG", "SET", "maxmemory", "1")
            with pytest.raises(Unavailable, match=r"OOM|maxmemory"):
                await c.call("SET", "k", "v")
            with pytest.raises(Unavailable):
                await c.pipeline([("SET", "k", "v")])
            redis_server.command("CONFIG", "SET", "maxmemory", "0")
            redis_server.command("REPLICAOF", "127.0.0.1", "1")
            with pytest.raises(Unavailable):
                await c.call("SET", "k", "v")
        redis_server.command("REPLICAOF", "NO", "ONE")
        redis_server.command("CONFIG", "SET", "requirepass", "x")
        async with client(redis_server.url) as c:
            with pytest.raises(Unavailable, match="uthenti"):
                await c.call("GET", "k")

    run(main())
