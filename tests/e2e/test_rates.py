"""A client that does what the document says, to the letter, drains whatever it has to send at the full rate.

It is a bare socket, repeats each refused request exactly after its ``retry_after_ms``, and has no jitter.
"""

from __future__ import annotations

import asyncio
import heapq
import json
from typing import Any

import pytest

from ..server import PATIENCE_S, Server
from .conftest import Common, Serve
from .raw import CLOSE, TEXT, Raw, frame
from .world import World, new_cid

# The additional time that a loaded machine may take.
SLACK_S = 10.0


@pytest.fixture
def usual_server(common: Common) -> Server:
    """A server with the default rates; those of other tests have nearly none."""
    return common.server("usual", {"rates.messages_per_s": 50, "rates.messages_burst": 200})


@pytest.fixture
def usual(usual_server: Server) -> World:
    return World(usual_server)


class Strict:
    """Sends requests at once, at most ``window`` unanswered, and each again after its `retry_after_ms`."""

    def __init__(self, raw: Raw, requests: list[dict[str, Any]], window: int = 1 << 30) -> None:
        self.raw = raw
        self.requests = {request["id"]: frame(TEXT, json.dumps(request).encode()) for request in requests}
        self.waiting = [(0.0, id) for id in self.requests]  # when to send which, a heap
        self.window = window
        self.unanswered = 0
        self.refusals = 0
        self.done: dict[int, dict[str, Any]] = {}
        self.changed = asyncio.Event()

    async def run(self) -> float:
        """Until all are done; the seconds it took."""
        begin = asyncio.get_running_loop().time()
        reading = asyncio.create_task(self._read())
        try:
            async with asyncio.timeout(3 * PATIENCE_S):
                while len(self.done) < len(self.requests):
                    self.changed.clear()
                    pause = await self._send_what_is_due()
                    waiter = asyncio.create_task(self.changed.wait())
                    await asyncio.wait([waiter, reading], timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                    waiter.cancel()
                    if reading.done():
                        reading.result()
        except TimeoutError:
            raise AssertionError(f"{len(self.done)} of {len(self.requests)} are done, and it goes on") from None
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        return asyncio.get_running_loop().time() - begin

    async def _send_what_is_due(self) -> float | None:
        """Send it; seconds until something else is due (None: when something is answered)."""
        now = asyncio.get_running_loop().time()
        due = []
        while self.waiting and self.waiting[0][0] <= now and self.unanswered < self.window:
            due.append(self.requests[heapq.heappop(self.waiting)[1]])
            self.unanswered += 1
        await self.raw.send(b"".join(due))
        if not self.waiting or self.unanswered >= self.window:
            return None
        return max(0.0, self.waiting[0][0] - asyncio.get_running_loop().time())

    async def _read(self) -> None:
        while True:
            received = await self.raw.frame()
            assert received.opcode != CLOSE, f"after {len(self.done)}: {received.payload!r}"
            if received.opcode != TEXT or (reply := received.json)["t"] not in ("ok", "error"):
                continue
            self.unanswered -= 1
            if reply["t"] == "ok":
                self.done[reply["id"]] = reply
            else:
                assert reply["code"] == "rate_limited", reply
                self.refusals += 1
                at = asyncio.get_running_loop().time() + reply["retry_after_ms"] / 1000
                heapq.heappush(self.waiting, (at, reply["id"]))
            self.changed.set()


async def _live(world: World) -> Raw:
    raw = await world.raw(on=0)
    await raw.log_in((await world.user()).token)
    return raw


def _pings(count: int) -> list[dict[str, Any]]:
    return [{"t": "ping", "id": i + 1} for i in range(count)]


async def test_220_pings_at_once_are_all_answered_soon(usual: World) -> None:
    """156 were done after 4 s, and still 156 after 20 s."""
    strict = Strict(await _live(usual), _pings(220))
    took = await strict.run()
    assert took < (220 - 200) / 50 + SLACK_S
    assert 0 < strict.refusals < 2 * 220


async def test_300_at_once_are_no_flood_if_each_waits_as_long_as_it_was_told(usual: World) -> None:
    """They ended in 4004, since what was refused had taken tokens."""
    strict = Strict(await _live(usual), _pings(300))
    took = await strict.run()
    assert took < (300 - 200) / 50 + SLACK_S
    assert 0 < strict.refusals < 2 * 300


async def test_an_outbox_drains_at_the_full_rate(serve: Serve) -> None:
    """An outbox of 150 stuck at 137. Here it is 2,000, all sent at once, at a rate at which that takes 9 s."""
    world = World(serve(settings={"rates.messages_per_s": 200, "rates.messages_burst": 200}))
    try:
        user = await world.user()
        a = await world.connect(user, on=1)
        conv = await world.group(a)
        raw = await world.raw(on=0)
        await raw.log_in(user.token)
        cids = [new_cid() for _ in range(2000)]
        sends = [{"t": "send", "id": i + 1, "c": conv, "cid": cid, "body": str(i)} for i, cid in enumerate(cids)]
        strict = Strict(raw, sends)
        took = await strict.run()
        assert took < (2000 - 200) / 200 + SLACK_S
        assert 0 < strict.refusals < 2 * 2000
        last = max(reply["s"] for reply in strict.done.values())
        log = await a.reach(conv, last)
        assert sorted(entry["cid"] for entry in log if entry["t"] == "msg") == sorted(cids)
    finally:
        await world.aclose()


async def test_a_window_of_what_may_be_outstanding_is_refused_for_its_rate_alone(serve: Serve) -> None:
    world = World(serve(settings={"rates.messages_per_s": 200, "rates.messages_burst": 100}))
    try:
        user = await world.user()
        a = await world.connect(user, on=1)
        conv = await world.group(a)
        raw = await world.raw(on=0)
        await raw.log_in(user.token)
        sends = [{"t": "send", "id": i + 1, "c": conv, "cid": new_cid(), "body": str(i)} for i in range(600)]
        strict = Strict(raw, sends, window=64)
        took = await strict.run()
        assert took < (600 - 100) / 200 + SLACK_S
        last = max(reply["s"] for reply in strict.done.values())
        assert sum(entry["t"] == "msg" for entry in await a.reach(conv, last)) == 600
    finally:
        await world.aclose()


async def test_what_is_refused_for_being_too_many_outstanding_costs_nothing(serve: Serve) -> None:
    world = World(serve(settings={"limits.outstanding": 4, "rates.messages_per_s": 0.1, "rates.messages_burst": 40}))
    try:
        raw = await world.raw(on=0)
        await raw.log_in((await world.user()).token)  # one of the 40
        # In one piece, so that only the first ones are outstanding.
        await raw.send(b"".join(frame(TEXT, json.dumps(ping).encode()) for ping in _pings(100)))
        replies = [(await raw.frame()).json for _ in range(100)]
        busy = [reply for reply in replies if reply["t"] == "error"]
        assert len(busy) >= 60
        waits = [reply["retry_after_ms"] for reply in busy]
        assert waits == sorted(waits), "each has its own time"
        assert len(set(waits)) > len(waits) // 2
        # 40 at most were taken: none of them for a refusal.
        left = 40 - 1 - (100 - len(busy))
        for _ in range(left):
            await raw.send_json(t="ping", id=200)
            assert (await raw.frame()).json["t"] == "ok"
        await raw.send_json(t="ping", id=200)
        assert (await raw.frame()).json["code"] == "rate_limited"
    finally:
        await world.aclose()


async def test_4004_goes_to_who_ignores_what_it_is_told(serve: Serve) -> None:
    settings = {"rates.messages_per_s": 1, "rates.messages_burst": 10, "rates.messages_refused": 50}
    world = World(serve(settings=settings))
    try:
        raw = await world.raw(on=0)
        await raw.log_in((await world.user()).token)
        await raw.send(b"".join(frame(TEXT, json.dumps(ping).encode()) for ping in _pings(59)))
        refused = [reply for reply in [(await raw.frame()).json for _ in range(59)] if reply["t"] == "error"]
        assert len(refused) in (50, 49)  # a second may pass
        # It repeats them at once.
        await raw.send(b"".join(frame(TEXT, json.dumps(ping).encode()) for ping in _pings(59)))
        closed = await raw.closing()
        assert closed.code == 4004
        assert "flooding" in closed.reason
    finally:
        await world.aclose()
