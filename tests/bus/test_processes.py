"""The local bus between real processes: killed, stopped, started together, leaving in order."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .harness import PATIENCE_S, Host


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with Host(tmp_path) as host:
        yield host


def sockets(host: Host) -> set[str]:
    return {p.name for p in host.run_dir.iterdir()}


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_workers_that_start_together_all_find_each_other(host: Host, loop: str) -> None:
    names = [f"h-{i}-n" for i in range(5)]
    workers = host.start(*names, loop=loop)
    for w in workers:
        w.wait("started")
        w.rewind()
        for other in names:
            if other != w.name:
                w.wait("resync", why=f"the link to {other} is up")
                w.rewind()
        assert set(w.do("subscribe", channels=["c"])["peers"]) == set(names) - {w.name}
    for w in workers:
        assert w.do("publish", channel="c", n=1, size=40, mark=f"!{w.name} ")["sent"] == 4
    for w in workers:
        for other in names:
            if other != w.name:
                w.rewind()
                w.wait("message", channel="c", payload=lambda p, other=other: p.startswith(f"!{other} "))
    for w in workers:
        assert w.close()["tasks"] == 0
    assert not sockets(host)


def test_after_subscribe_returns_nothing_published_is_missed(host: Host) -> None:
    """A peer that learns of the subscription in another way publishes to it at once."""
    a, b = host.up("a", "b")
    a.do("subscribe", channels=["requests"])
    for i in range(50):
        b.do("subscribe", channels=[f"c{i}"])
        b.do("send_to", peer="a", channel="requests", payload=f"publish:c{i}")
        b.wait("message", channel=f"c{i}", payload="as asked")
        b.do("unsubscribe", channels=[f"c{i}"])


def test_a_subscriber_gets_the_state_of_its_peers(host: Host) -> None:
    a, b = host.up("a", "b")
    b.do("subscribe", channels=["state"])
    b.rewind()
    b.wait("message", channel="state", payload="state of a")
    # A worker that comes later subscribes before it has a peer; it gets the state as soon as the links are up.
    (c,) = host.start("c")
    c.order("subscribe", channels=["state"])
    for name in ("a", "b"):
        c.rewind()
        c.wait("message", channel="state", payload=f"state of {name}")
    assert a.process.poll() is None


def test_a_killed_peer_is_gone_and_its_socket_too(host: Host) -> None:
    a, b, c = host.up("a", "b", "c")
    for w in (a, b, c):
        w.do("subscribe", channels=["c"])
    a.order("publish", channel="c", n=200_000, size=200, mark="")
    c.wait("message")
    b.process.kill()
    for w in (a, c):
        w.rewind()
        w.wait("gone", peer="b")
        w.wait("resync", why="the link to b is gone")
    deadline = time.monotonic() + PATIENCE_S
    while "bus-b.sock" in sockets(host):
        assert time.monotonic() < deadline, "the socket of a dead worker is still there"
        time.sleep(0.01)
    assert a.until(lambda s: s["peers"] == ["c"] and s["healthy"])
    # Its successor is found by both sides, and hears what is published from then on.
    (b2,) = host.start("b2")
    b2.wait("started")
    b2.do("subscribe", channels=["c"])
    a.do("publish", channel="c", n=1, size=10, mark="!")
    b2.wait("message", channel="c")


def test_a_stopped_peer_costs_one_timeout_and_bounded_memory(host: Host) -> None:
    a, b, c = host.up("a", "b", "c", queue_bytes=1 << 20, confirm_timeout_ms=300)
    for w in (b, c):
        w.do("subscribe", channels=["c"])
    b.process.send_signal(signal.SIGSTOP)

    # It does not confirm: `subscribe` returns all the same, and calls for a resync.
    a.do("subscribe", channels=["d"])
    a.rewind()
    a.wait("resync", why=lambda why: why in ("not confirmed in time by b", "b is silent"))
    a.rewind()
    a.wait("resync", why="b is silent")
    assert a.until(lambda s: not s["healthy"])
    assert c.process.poll() is None

    # Its queue overflows: what does not fit is dropped and counted; the other peer gets everything.
    for i in range(1, 11):
        state = a.do("publish", channel="c", n=500, size=1000, mark=f"!{i}:")
        c.wait("message", payload=lambda p, i=i: p.startswith(f"!{i}:000000499"))
    assert state["dropped"] > 2_000

    # When it goes on it gets what had fitted, in order, then the call for a resync, and nothing in between.
    b.process.send_signal(signal.SIGCONT)
    b.wait("resync", why="a had to drop messages for this worker")
    kept = b.do("look")["seen"]
    assert kept == 5_000 - state["dropped"]
    a.wait("resync", why="b is heard again")
    # Its confirmation for `a` comes late and calls for a resync; then all is as before.
    a.rewind()
    a.wait("resync", why=lambda why: why in ("b confirmed late", "the link to b is up"))
    a.until(lambda s: s["healthy"])
    b.do("publish", channel="d", n=1, size=10, mark="!")
    a.wait("message", channel="d")
    a.do("publish", channel="c", n=1, size=10, mark="!")
    assert b.wait("message", channel="c")["seen"] == kept + 1


def test_subscriptions_made_during_an_overflow_are_in_force_after_it(host: Host) -> None:
    a, b = host.up("a", "b", queue_bytes=256 * 1024, confirm_timeout_ms=200)
    b.do("subscribe", channels=["c"])
    b.do("summary_only", on=True)
    a.do("subscribe", channels=["old"])
    b.process.send_signal(signal.SIGSTOP)
    assert a.do("publish", channel="c", n=2000, size=1000, mark="")["dropped"]
    a.do("subscribe", channels=["new"])
    a.do("unsubscribe", channels=["old"])
    b.process.send_signal(signal.SIGCONT)
    b.wait("subscriber", peer="a", channel="new")
    a.until(lambda s: s["healthy"])
    sent = b.do("publish", channel="old", n=1, size=10, mark="!")["sent"]
    b.do("publish", channel="new", n=1, size=10, mark="!")
    assert a.wait("message")["channel"] == "new"
    assert sent == 0


def test_what_was_queued_before_close_arrives(host: Host) -> None:
    a, b = host.up("a", "b", queue_bytes=16 << 20, confirm_timeout_ms=10_000)
    b.do("subscribe", channels=["c"])
    b.do("summary_only", on=True)
    assert a.do("publish", channel="c", n=20_000, size=500, mark="")["dropped"] == 0
    a.close()
    b.wait("gone", peer="a")
    assert b.do("look")["seen"] == 20_000


def test_all_leave_at_once_and_nothing_of_the_last_messages_is_lost(host: Host) -> None:
    workers = host.up("a", "b", "c", queue_bytes=16 << 20, confirm_timeout_ms=10_000)
    for w in workers:
        w.do("subscribe", channels=["c"])
    published = [w.order("publish", channel="c", n=1000, size=100, mark="") for w in workers]
    for w, number in zip(workers, published, strict=True):
        w.wait("did", number=number)
    for w in workers:
        w.leave()
    for w in workers:
        w.wait("closed", tasks=0)
        assert sum(e["event"] == "message" for e in w.events) == 2000
    assert not sockets(host)


def test_a_peer_that_dies_while_stopped_is_gone(host: Host) -> None:
    a, b = host.up("a", "b")
    b.process.send_signal(signal.SIGSTOP)
    a.wait("resync", why="b is silent")
    b.process.kill()
    a.wait("gone", peer="b")
    a.until(lambda s: s["healthy"] and not s["peers"])


def test_killed_again_and_again_in_traffic(host: Host) -> None:
    """The messages that a survivor receives of one publisher are in order and have no holes."""
    (a,) = host.up("a")
    a.do("subscribe", channels=["c"])
    for i in range(5):
        (b,) = host.start(f"b{i}")
        b.wait("started")
        b.order("publish", channel="c", n=300_000, size=100, mark=f"{i}:")
        a.wait("message", payload=lambda p, i=i: p.startswith(f"{i}:"))
        b.process.kill()
        a.wait("gone", peer=f"b{i}")
    for i in range(5):
        numbers = [
            int(e["payload"][2:11]) for e in a.events if e["event"] == "message" and e["payload"].startswith(f"{i}:")
        ]
        assert numbers == list(range(len(numbers))), f"publisher {i}: a hole or a disorder"
    assert a.do("look")["malformed"] == 0
