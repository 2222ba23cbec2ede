"""A client of the campaign believes what it is answered, not what it asked for."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import orjson
import pytest
import uvloop

from .device import Device
from .record import Broken, Message


class Line:
    """A connection that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, data: bytes) -> None:
        self.sent.append(orjson.loads(data))


@pytest.mark.parametrize(("reply", "asks_again"), [({"t": "ok"}, True), ({"t": "error", "code": "unavailable"}, False)])
def test_who_was_refused_to_go_away_is_live_still(reply: Message, asks_again: bool) -> None:
    """It came back with a `have` that live entries had overtaken, and was sent them twice, as it had asked."""

    async def main() -> None:
        device = Device("r1", "user", "token", lambda: [], Broken(), random.Random(1))
        line: Any = Line()
        device.wire = line
        going = asyncio.create_task(device.go_away())
        await asyncio.sleep(0)
        device._take(orjson.dumps({**reply, "id": line.sent[-1]["id"]}))
        await going
        coming = asyncio.create_task(device.come_back())
        await asyncio.sleep(0)
        assert [("have" in request) for request in line.sent[1:]] == ([True] if asks_again else [])
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
