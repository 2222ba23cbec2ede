"""The Redis bus when Redis, or the network to it, fails. The promises: nothing blocks, every loss calls for a
resync on the side that needs it, and the bus recovers without a restart."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import time
from pathlib import Path

import pytest

from chatcore.bus.redis import RedisBus

from ..services.redis import RedisServer, free_port, redis_server  # noqa: F401
from .redis_parts import Recorder, Wire, buses, connected, run

Made = tuple[RedisBus, Recorder]


async def hears(x: Made, y: Made, mark: bytes) -> None:
    """What x publishes reaches y."""
    x[0].publish("x", mark)
    await y[1].until(lambda: ("x", mark) in y[1].messages, f"{mark!r} arrives")


def clients(server: RedisServer, kind: str, name: str) -> list[str]:
    """Ids of the connections of a kind (pubsub: those that are subscribed) and a name."""
    with server.client() as client:
        return [c["id"] for c in client.client_list(_type=kind) if c["name"] == name]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("chatcore") and r.levelno >= logging.INFO]


@pytest.mark.parametrize("lose_data", [False, True])
def test_redis_killed_and_back(
    redis_server: RedisServer,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    lose_data: bool,
) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        # So rare that what is counted below is not their doing.
        async with buses(redis_server.url, "a", "b", heartbeat_ms=5000, confirm_ms=30_000) as [x, y]:
            (a, ra), (b, rb) = x, y
            await b.subscribe(["x", "p:1"])
            await ra.until(lambda: ra.subscribers == [("b", "p:1")])
            caplog.clear()
            redis_server.kill(lose_data=lose_data)
            for bus, r in (x, y):
                await r.resynced("the connection to redis is lost")
                assert not bus.healthy
            # No call blocks or raises.
            began = time.monotonic()
            a.publish("x", b"lost")
            a.send_to("b", "x", b"lost")
            await asyncio.gather(*(b.subscribe([f"while away {i}", "p:2"]) for i in range(20)))
            b.unsubscribe(["while away 7"])
            assert time.monotonic() - began < 10
            await asyncio.sleep(0.5)  # some attempts fail
            assert len(lines(caplog)) <= 4, "one line for each bus that it is away, and one for why it stays so"
            ra.subscribers.clear()
            redis_server.start()
            for _, r in (x, y):
                await r.resynced("connected to redis")
            await connected(x, y)
            assert ra.gone == ["b"], "what b announced has to be learnt anew"
            await ra.until(lambda: sorted(ra.subscribers) == [("b", "p:1"), ("b", "p:2")])
            await hears(x, y, b"back")
            a.publish("while away 7", b"not any more")
            a.publish("while away 8", b"subscribed now")
            await rb.until(lambda: ("while away 8", b"subscribed now") in rb.messages)
            assert ("while away 7", b"not any more") not in rb.messages
            assert sum("connected to" in line and "not" not in line for line in lines(caplog)) == 2, lines(caplog)

    run(main())


def test_a_frozen_redis_is_noticed_by_the_own_heartbeat(redis_server: RedisServer) -> None:  # noqa: F811
    async def main() -> None:
        async with buses(redis_server.url, "a", "b", heartbeat_ms=100, confirm_ms=500) as [x, y]:
            await y[0].subscribe(["x"])
            redis_server.freeze()
            try:
                # The kernel still accepts everything: only the silence shows it.
                for _, r in (x, y):
                    await r.resynced("the connection to redis is lost")
                assert not x[0].healthy
                await x[1].until(lambda: x[0].stats.sessions == 1)
            finally:
                redis_server.thaw()
            await x[1].resynced("connected to redis")
            await connected(x, y)
            await hears(x, y, b"back")

    run(main())


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_way_that_is_blocked_in_one_direction(redis_server: RedisServer, direction: str) -> None:  # noqa: F811
    async def main() -> None:
        async with (
            Wire(redis_server.port) as wire,
            buses(wire.url, "a", prefix="p", heartbeat_ms=100, confirm_ms=500) as [x],
            buses(redis_server.url, "b", prefix="p", heartbeat_ms=100) as [y],
        ):
            await connected(x, y)
            await x[0].subscribe(["x"])
            setattr(wire, direction, False)
            await x[1].resynced("the connection to redis is lost")
            await y[1].resynced("a is silent")
            assert not x[0].healthy and y[0].healthy
            wire.mend()
            await x[1].resynced("connected to redis")
            await y[1].resynced("a is there")
            await connected(x, y)
            await hears(y, x, b"back")

    run(main())


@pytest.mark.parametrize("kind", ["pubsub", "normal"])
def test_a_killed_connection_calls_for_a_resync_on_both_sides(redis_server: RedisServer, kind: str) -> None:  # noqa: F811
    async def main() -> None:
        async with buses(redis_server.url, "a", "b", heartbeat_ms=60_000) as [x, y]:
            await y[0].subscribe(["x", "p:1"])
            (victim,) = clients(redis_server, kind, "chatcore-a")
            redis_server.command("CLIENT", "KILL", "ID", victim)
            await x[1].resynced("the connection to redis is lost")
            await x[1].resynced("connected to redis")
            # Without a heartbeat in between: the greeting of the new connection carries the losses.
            await y[1].resynced("a lost messages")
            assert y[1].gone == ["a"]
            await connected(x, y)
            await hears(x, y, b"back")

    run(main())


def test_an_unexpected_reply_calls_for_a_resync(redis_server: RedisServer) -> None:  # noqa: F811
    async def main() -> None:
        async with Wire(redis_server.port) as wire, buses(wire.url, "a") as [(a, r)]:
            for strange in (
                b"*3\r\n$9\r\nsubscribe\r\n$1\r\nx\r\n:1\r\n",
                b">3\r\n$11\r\nunsubscribe\r\n$1\r\nx\r\n:1\r\n",
                b"-NOPERM no more\r\n",
                b"+what\r\n",
                b"HTTP/1.1 400 Bad Request\r\n\r\n",
            ):
                await r.until(lambda: a.healthy)
                await a.subscribe(["again"])
                for client in wire.clients[-2:]:
                    client.write(strange)
                await r.resynced("the connection to redis is lost")
                await r.resynced("connected to redis")

    run(main())


def test_pushes_of_resp3_are_read_as_well(redis_server: RedisServer) -> None:  # noqa: F811
    async def main() -> None:
        async with Wire(redis_server.port) as wire, buses(wire.url, "a", prefix="p") as [(a, r)]:
            await a.subscribe(["x"])
            message = b">3\r\n$7\r\nmessage\r\n$3\r\np:x\r\n$11\r\n87654321\0hi\r\n"
            # One of the two is the subscribed one; to the other it is a reply that is no number.
            wire.clients[-2].write(message)
            wire.clients[-1].write(message)
            await r.until(lambda: ("x", b"hi") in r.messages)

    run(main())


def test_an_overflow_drops_and_the_receivers_resync(redis_server: RedisServer) -> None:  # noqa: F811
    async def main() -> None:
        async with buses(redis_server.url, "a", "b", queue_bytes=1 << 20, heartbeat_ms=60_000) as [x, y]:
            (a, _), (b, rb) = x, y
            await b.subscribe(["x"])
            redis_server.freeze()
            sent = 0
            began = time.monotonic()
            while a.stats.dropped < 100:
                a.publish("x", b"%09d" % sent + bytes(2000))
                sent += 1
                if sent % 50 == 0:
                    await asyncio.sleep(0)
                assert sent < 100_000, "a bounded queue"
            assert time.monotonic() - began < 10
            assert not a.healthy
            redis_server.thaw()
            await rb.resynced("a lost messages")
            numbers = [int(payload[:9]) for _, payload in rb.messages]
            assert numbers == list(range(sent - 100)), "what had fitted, in order, then the call for a resync"
            await rb.until(lambda: a.healthy)
            assert a.stats.sessions == 1
            await hears(x, y, b"again")

    run(main())


def test_a_user_and_a_password(redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    """The least that an ACL has to allow; and what happens with less."""
    for user, channels in (("good", "&p:* &p!*"), ("half", "&p:nothing* &p!*"), ("bad", "&other:*")):
        rules = f"on >s3cret/#? resetchannels {channels} +subscribe +unsubscribe +publish +ping"
        redis_server.command("ACL", "SETUSER", user, *rules.split())
    redis_server.command("CONFIG", "SET", "requirepass", "main")
    redis_server.password = "main"
    place = f"127.0.0.1:{redis_server.port}"

    async def main() -> None:
        secret = "s3cret%2F%23%3F"
        async with (
            buses(f"redis://good:{secret}@{place}", "a", prefix="p") as [x],
            buses(f"redis://:main@{place}/2", "b", prefix="p") as [y],
        ):
            await connected(x, y)
            await x[0].subscribe(["x"])
            await hears(y, x, b"in")
        for url in (f"redis://{place}", f"redis://good:wrong@{place}", f"redis://bad:{secret}@{place}"):
            caplog.clear()
            began = time.monotonic()
            async with buses(url, "a", prefix="p", confirm_ms=30_000) as [x]:
                assert time.monotonic() - began < 10, "it starts all the same"
                assert not x[0].healthy
                x[0].publish("x", b"1")
                await x[0].subscribe(["x"])
            assert any("not connected" in line for line in lines(caplog)), "and says why"
            assert not any("s3cret" in line or "wrong@" in line for line in lines(caplog))
        async with buses(f"redis://half:{secret}@{place}", "a", prefix="p") as [x]:
            assert x[0].healthy
            await x[0].subscribe(["x"])
            await x[1].resynced("the connection to redis is lost")

    run(main())


def test_started_before_redis(tmp_path: Path) -> None:
    port = free_port()

    async def main() -> None:
        server = RedisServer(tmp_path / "redis")
        server.port = port
        began = time.monotonic()
        async with buses(f"redis://127.0.0.1:{port}", "a", "b", confirm_ms=30_000) as [x, y]:
            assert time.monotonic() - began < 10
            await x[0].subscribe(["x"])
            try:
                server.start()
                await connected(x, y)
                await hears(y, x, b"up")
            finally:
                server.kill()

    run(main())


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A folder with a certificate for 127.0.0.1 that signs itself, and its key."""
    new = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -keyout key -out cert"
    subject = "-subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(f"{new} {subject}".split(), cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def test_with_tls(certificates: Path) -> None:
    port = free_port()
    options = [f"tls-port {port}", "tls-auth-clients no", f"tls-cert-file {certificates}/cert"]
    options += [f"tls-key-file {certificates}/key", f"tls-ca-cert-file {certificates}/cert"]

    async def main() -> None:
        trusting = f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificates}/cert"
        async with buses(trusting, "a", prefix="p") as [x], buses(trusting, "b", prefix="p") as [y]:
            await connected(x, y)
            await x[0].subscribe(["x"])
            await hears(y, x, b"secret")
        async with buses(f"rediss://127.0.0.1:{port}", "a") as [x]:
            assert not x[0].healthy, "its certificate has no known issuer"
        async with buses(f"rediss://127.0.0.1:{port}?ssl_cert_reqs=none", "a") as [x]:
            assert x[0].healthy

    with RedisServer(certificates / "redis", *options):
        run(main())
