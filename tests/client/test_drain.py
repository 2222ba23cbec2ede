"""A long outbox drains at the full rate of a strict server, in fake time.

The story: messages that were over the rate used to be sent again all together, at the latest of their times. A
server that allows one of them at each of these times refuses all others again, and so the outbox hardly moved.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest

from chatcore.client.core import RETRY_MIN_S, ClientCore
from chatcore.client.outbox import UNANSWERED_DEFAULT, UNANSWERED_SPARE, Draft

RATE = 50
BURST = 200
#: Between client and server, one way; and what the server takes for a request.
WAY_S = 0.004
WORK_S = 0.003
#: Refused messages whose time has not come, at most; more is flooding.
PROMISES_MAX = 100


class StrictServer:
    """Acknowledges what is in time and refuses the rest; fails the test when the client does what it may not.

    A refused message takes no token. It is promised the next free one, at a time of its own.
    """

    def __init__(self, outstanding: int, *, rate: float = RATE) -> None:
        self.outstanding = outstanding
        self.unanswered = 0
        self.most_unanswered = 0
        self.log: dict[str, list[str]] = {}
        self.refused = 0
        self.latest_s = 0.0
        self._token_s = 1 / rate
        self._full_at = 0.0
        self._promised = 0.0
        self._not_before: dict[str, float] = {}

    def take(self, request: dict[str, Any], now: float) -> dict[str, Any]:
        """The reply to a request."""
        reply = {"t": "ok", "id": request["id"]}
        if request["t"] == "auth":
            return reply | {"user": {"id": "u1", "name": "alice"}, "full": True, "expires_ms": 10**9}
        self.unanswered += 1
        self.most_unanswered = max(self.most_unanswered, self.unanswered)
        assert self.unanswered <= self.outstanding, "more unanswered requests than the server takes"
        at = max(self._full_at, now) + self._token_s
        cid = request.get("cid") or f"request {request['id']}"
        if (not_before := self._not_before.pop(cid, None)) is not None:
            assert now >= not_before, f"{cid} comes before its time"
            self.latest_s = max(self.latest_s, now - not_before)
        if at - now > BURST * self._token_s + 1e-9:
            self.refused += 1
            wait_ms = self._promise(now)
            self._not_before[cid] = now + wait_ms / 1000
            return reply | {"t": "error", "code": "rate_limited", "message": "", "retry_after_ms": wait_ms}
        self._full_at = at
        if request["t"] != "send":
            return reply | {"ts": 1}
        log = self.log.setdefault(request["c"], [])
        assert cid not in log, f"{cid} comes again after its ok"
        log.append(cid)
        return reply | {"s": len(log), "ts": 1}

    def answered(self) -> None:
        self.unanswered -= 1

    def _promise(self, now: float) -> int:
        """Whole ms until the next token that nobody was promised."""
        free_at = max(self._full_at, now)
        at = max(self._promised, free_at)
        assert (at - free_at) / self._token_s < PROMISES_MAX, "flooding"
        self._promised = at + self._token_s
        return int((self._promised - now - BURST * self._token_s) * 1000) + 1


class ChargingServer(StrictServer):
    """Charges for what it refuses, so that a promise holds only if nothing else is refused meanwhile."""

    def _promise(self, now: float) -> int:
        self._full_at = max(self._full_at, now) + self._token_s
        missing_s = self._full_at - now - BURST * self._token_s
        assert missing_s <= BURST * self._token_s, "flooding"
        return int((missing_s + self._token_s) * 1000) + 1


class Simulation:
    """A core and a server with the network between them, on a clock that jumps to whatever is next."""

    def __init__(self, server: StrictServer, *, hello: bool = True, **options: Any) -> None:
        self.server = server
        self.core = ClientCore("token", **options)
        self.now = 0.0
        self.acked: list[str] = []
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.gen = self.core.connecting()
        self.core.connected(self.gen, self.now)
        if hello:
            self._receive({"t": "hello", "v": 1, "limits": {"outstanding": server.outstanding}})
        self._collect()

    def send(self, conv: str, cid: str) -> None:
        self.core.send(Draft(conv, cid, "hi"), lambda reply: self._done(cid, reply), stored=True)

    def run(self, until_acked: int) -> float:
        """Let everything happen until so many are acknowledged; the time then."""
        self._collect()
        while len(self.acked) < until_acked:
            wake_at = self.core.wake_at()
            assert self._due or wake_at is not None, f"it stands still with {len(self.acked)} acknowledged"
            if wake_at is not None and (not self._due or wake_at <= self._due[0][0]):
                self.now = max(self.now, wake_at)
                self.core.tick(self.now)
            else:
                self.now, _, step = heapq.heappop(self._due)
                step()
            assert not self.core.drop
            self._collect()
        return self.now

    def _done(self, cid: str, reply: dict[str, Any] | Exception) -> None:
        assert not isinstance(reply, Exception), f"{cid}: {reply}"
        self.acked.append(cid)

    def _collect(self) -> None:
        for frame in self.core.take_frames():
            self._later(WAY_S, partial(self._arrive, msgspec.json.decode(frame)))

    def _arrive(self, request: dict[str, Any]) -> None:
        reply = self.server.take(request, self.now)

        def answer() -> None:
            if request["t"] != "auth":
                self.server.answered()
            self._later(WAY_S, lambda: self._receive(reply))

        # A refusal takes the server no work.
        self._later(0.0 if reply["t"] == "error" else WORK_S, answer)

    def _receive(self, message: dict[str, Any]) -> None:
        self.core.received(self.gen, msgspec.json.encode(message), self.now)

    def _later(self, seconds: float, step: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._due, (self.now + seconds, self._count, step))


@pytest.mark.parametrize(("conversations", "window"), [(1, 1), (40, 1), (10_000, 1), (3, 10)])
def test_ten_thousand_messages_drain_at_the_full_rate(conversations: int, window: int) -> None:
    """None before its time, each once, in order per conversation, and no slower than the rate allows."""
    count = 10_000
    sim = Simulation(StrictServer(outstanding=64), window=window)
    for n in range(count):
        sim.send(f"c{n % conversations}", str(n))
    took_s = sim.run(count)
    at_best_s = (count - BURST) / RATE
    assert at_best_s <= took_s <= at_best_s * 1.01 + 1.0
    assert sim.core.unacknowledged_count == 0
    assert sorted(map(int, sim.acked)) == list(range(count))
    for conv, log in sim.server.log.items():
        if window == 1:
            assert list(map(int, log)) == sorted(map(int, log)), f"{conv} is out of order"
    # A message is refused about once before it goes out, not again and again.
    assert sim.server.refused <= 1.2 * count
    if window == 1:
        assert sim.server.latest_s <= 2 * WAY_S + RETRY_MIN_S, "each comes at its own time, not at that of others"


def test_the_window_is_that_of_hello_and_leaves_some_to_spare() -> None:
    sim = Simulation(StrictServer(outstanding=64, rate=1e6))
    for n in range(500):
        sim.send(f"c{n}", str(n))
    sim.run(500)
    assert sim.server.most_unanswered == 64 - UNANSWERED_SPARE


def test_a_server_that_does_not_say_how_many_it_takes_gets_few() -> None:
    sim = Simulation(StrictServer(outstanding=64, rate=1e6), hello=False)
    for n in range(500):
        sim.send(f"c{n}", str(n))
    sim.run(500)
    assert sim.server.most_unanswered == UNANSWERED_DEFAULT


def test_other_requests_count_for_the_window() -> None:
    sim = Simulation(StrictServer(outstanding=64, rate=1e6))
    answered: list[Any] = []
    for n in range(200):
        sim.core.call("users", {"ids": [str(n)]}, answered.append)
        sim.send(f"c{n}", str(n))
    sim.run(200)
    assert len(answered) == 200
    assert sim.server.most_unanswered == 64 - UNANSWERED_SPARE


def test_a_server_that_takes_one_request_at_a_time_gets_one_at_a_time() -> None:
    sim = Simulation(StrictServer(outstanding=1, rate=1e6))
    for n in range(20):
        sim.send(f"c{n}", str(n))
    sim.run(20)
    assert sim.server.most_unanswered == 1


def test_typed_messages_do_not_wait_for_long_behind_a_drained_outbox() -> None:
    """What is new waits until the refused ones have gone out, and these are at most a window full."""
    sim = Simulation(StrictServer(outstanding=64))
    for n in range(1000):
        sim.send(f"c{n % 100}", str(n))
    sim.run(400)
    sim.send("fresh", "typed")
    before = sim.now
    while "typed" not in sim.acked:
        sim.run(len(sim.acked) + 1)
    assert sim.now - before < 5.0


def test_other_requests_that_take_the_promised_tokens_cost_no_more_than_these() -> None:
    """A request of the application takes a token that was promised to a message; the message is refused again."""
    sim = Simulation(StrictServer(outstanding=64))
    for n in range(2000):
        sim.send(f"c{n % 40}", str(n))
    took: list[Any] = []
    for acked in range(300, 2000, 10):
        sim.run(acked)
        sim.core.call("users", {"ids": []}, took.append)
    sim.run(2000)
    tokens = 2000 + sum(isinstance(reply, dict) for reply in took) - BURST
    assert tokens / RATE <= sim.now <= tokens / RATE * 1.05 + 2.0


def test_a_server_that_charges_for_refusals_does_not_bring_it_to_a_stop() -> None:
    """The story: each repeated message was refused again and charged, for ever."""
    count = 1000
    sim = Simulation(ChargingServer(outstanding=64))
    for n in range(count):
        sim.send(f"c{n % 40}", str(n))
    assert sim.run(count) <= 5 * (count - BURST) / RATE
