"""The Redis bus between processes: killed, stopped, too slow, leaving in order."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from ..services.redis import RedisServer, redis_server  # noqa: F401
from .redis_worker import RedisWorker


@pytest.fixture
def workers(redis_server: RedisServer) -> Iterator[list[RedisWorker]]:  # noqa: F811
    """Two, that know each other; `b` is subscribed to c0 and c1."""
    made = [RedisWorker(redis_server.url, name, prefix="p") for name in "ab"]
    try:
        for w, other in zip(made, "ba", strict=True):
            w.wait("started")
            w.rewind()
            w.wait("resync", why=f"{other} is there")
        made[1].do("subscribe", channels=["c0", "c1"])
        yield made
    finally:
        for w in made:
            w.end()


def publish(w: RedisWorker, n: int, mark: str, size: int = 200) -> None:
    w.do("publish", n=n, tick=100, channels=2, size=size, mark=mark)


def test_two_processes_hear_each_other_and_part_in_order(workers: list[RedisWorker]) -> None:
    a, b = workers
    publish(a, 5000, "end")
    assert b.wait("message", channel="c0", payload="!end")["seen"] >= 5000
    a.do("subscribe", channels=["c0"])
    publish(b, 10, "back")
    assert a.wait("message", payload="!back")["seen"] == 6
    assert b.close()["tasks"] == 0
    a.rewind()
    a.wait("gone", peer="b")
    a.rewind()
    a.wait("resync", why="b leaves")
    assert a.do("look")["peers"] == []
    assert a.close()["tasks"] == 0


def test_a_killed_worker_is_gone(workers: list[RedisWorker]) -> None:
    a, b = workers
    b.process.kill()
    a.wait("gone", peer="b")
    a.wait("resync", why="b is silent")
    assert a.do("look")["healthy"]


def test_a_stopped_worker_is_gone_until_it_goes_on(workers: list[RedisWorker]) -> None:
    a, b = workers
    b.process.send_signal(signal.SIGSTOP)
    a.wait("gone", peer="b")
    a.wait("resync", why="b is silent")
    publish(a, 10, "meanwhile")
    b.process.send_signal(signal.SIGCONT)
    a.wait("resync", why="b is there")
    # Redis kept for it what was published meanwhile. It calls no peer silent because of the time that it slept.
    b.wait("message", payload="!meanwhile")
    assert b.do("look")["sessions"] == 1
    assert not any(e["event"] == "gone" for e in b.events)


def test_a_subscriber_that_is_too_slow_is_cut_off_by_redis_and_looks(
    workers: list[RedisWorker],
    redis_server: RedisServer,  # noqa: F811
) -> None:
    redis_server.command("CONFIG", "SET", "client-output-buffer-limit", "pubsub 1mb 0 0")
    a, b = workers
    b.process.send_signal(signal.SIGSTOP)
    for i in range(100):
        publish(a, 200, f"{i}", size=5000)  # 1 MB; the kernel keeps some of it, too
        if not still_there(redis_server):
            break
    assert not still_there(redis_server), "100 MB behind, and redis has not cut it off"
    b.process.send_signal(signal.SIGCONT)
    b.wait("resync", why="the connection to redis is lost")
    b.wait("resync", why="connected to redis")
    a.rewind()
    a.wait("started")
    # Whether a had given it up meanwhile or not.
    a.wait("resync", why=lambda why: why in ("b lost messages", "b is there"))
    publish(a, 10, "again")
    b.rewind()
    b.wait("message", payload="!again")


def still_there(server: RedisServer) -> bool:
    """Whether b's subscribed connection is."""
    with server.client() as client:
        return any(c["name"] == "chatcore-b" for c in client.client_list(_type="pubsub"))
