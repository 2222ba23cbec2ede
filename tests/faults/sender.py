"""A client that sends: each message at its time, with one cid, again and again until it is acknowledged.

The times are set beforehand and do not wait for the server: what is due while no worker answers waits in the
client's own queue, and its waiting counts.
"""

from __future__ import annotations

import asyncio
import base64
import random
from collections import deque
from dataclasses import dataclass
from typing import Any

from .device import Addresses, Device
from .record import Broken, Message

#: Only a request that the server forgot to answer waits so long: then it is sent again.
ANSWER_S = 15.0


@dataclass(slots=True)
class Sent:
    """One message of one sender."""

    conv: str
    cid: str
    body: str
    due: float
    first: float = 0.0  # when it was first sent; 0: not yet
    acked: float = 0.0  # when the first `ok` came; 0: not yet
    seq: int = 0
    tries: int = 0
    errors: int = 0


class Sender(Device):
    """``talk`` makes the messages and sees them acknowledged; one outstanding per conversation, so that their
    order is theirs."""

    def __init__(
        self, name: str, user: str, token: str, addresses: Addresses, broken: Broken, chance: random.Random
    ) -> None:
        super().__init__(name, user, token, addresses, broken, chance)
        self.convs: list[str] = []
        self.sent: list[Sent] = []
        self.sending = True
        self.flowing = asyncio.Event()
        self.errors: list[float] = []  # when a send was answered with an error that may pass
        self._queues: dict[str, deque[Sent]] = {}
        self._news: dict[str, asyncio.Event] = {}

    def queue(self) -> int:
        """How many are not acknowledged yet."""
        return sum(map(len, self._queues.values()))

    def wake(self) -> None:
        """Let tasks that wait for messages see that there will be none."""
        self.flowing.set()
        for news in self._news.values():
            news.set()

    async def talk(self, every_s: float, sizes: list[int]) -> None:
        """Send to ``convs`` in turn, a message each ``every_s`` on average, until ``sending`` is over and
        everything is acknowledged."""
        for conv in self.convs:
            self._queues[conv] = deque()
            self._news[conv] = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for conv in self.convs:
                group.create_task(self._deliver(conv))
            due = self._loop.time() + self.chance.uniform(0, every_s)
            number = 0
            while self.sending:
                if not self.flowing.is_set():
                    await self.flowing.wait()
                    due = self._loop.time() + self.chance.uniform(0, every_s)
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                if not (self.sending and self.flowing.is_set()):
                    continue
                conv = self.convs[number % len(self.convs)]
                cid = base64.urlsafe_b64encode(self.chance.randbytes(12)).decode()
                body = f"{self.name} {number} ".ljust(self.chance.choice(sizes), "x")
                message = Sent(conv, cid, body, due)
                self.sent.append(message)
                self._queues[conv].append(message)
                self._news[conv].set()
                number += 1
                due += self.chance.uniform(0.5, 1.5) * every_s
            self.wake()

    async def _deliver(self, conv: str) -> None:
        queue, news = self._queues[conv], self._news[conv]
        while queue or self.sending:
            if not queue:
                news.clear()
                await news.wait()
                continue
            await self._until_acked(queue[0])
            queue.popleft()

    async def _until_acked(self, message: Sent) -> None:
        request: Message = {"t": "send", "c": message.conv, "cid": message.cid, "body": message.body}
        while not message.acked:
            await self.ready.wait()
            message.first = message.first or self._loop.time()
            message.tries += 1
            reply: Any = None
            try:
                async with asyncio.timeout(ANSWER_S):
                    reply = await self.request(request)
            except TimeoutError:
                self.broken.add("unanswered", f"{self.name}: no answer to {message.cid} in {ANSWER_S:.0f} s")
            if reply is None:
                await asyncio.sleep(0)
            elif reply["t"] == "ok":
                message.acked, message.seq = self._loop.time(), reply["s"]
            elif "retry_after_ms" in reply:
                message.errors += 1
                self.errors.append(self._loop.time())
                await asyncio.sleep(reply["retry_after_ms"] / 1000)
            else:
                self.broken.add("refused", f"{self.name}: {message.cid} was answered with {reply}")
                return
