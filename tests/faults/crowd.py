"""All clients of a run: which conversations they are in, and how they behave."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import orjson

from .device import Addresses, Device
from .record import Broken, Message
from .rest import post
from .sender import Sender
from .wire import Wire, dial

#: How a receiver behaves, and how many of ten do.
BEHAVIOURS = ("steady",) * 4 + ("roams",) * 3 + ("away",) * 2 + ("slow",)
#: Of bodies, in bytes: mostly short, now and then long.
SIZES = [40, 60, 80, 120, 200, 400]
HOT_EVERY_SENDER = 3
HOT_EVERY_RECEIVER = 5
SETTLED_S = 120.0
SETUP_AT_ONCE = 8


@dataclass(frozen=True)
class Scale:
    """How many of everything, and how often they send."""

    conversations: int = 40
    senders: int = 60
    receivers: int = 200
    per_s: float = 410.0  # messages of all senders together; some more than what is to be reached


class Crowd:
    """Made by ``gather``; then ``begin``, ``hush`` (no new messages), ``end``."""

    def __init__(self, scale: Scale, seed: int, addresses: Addresses) -> None:
        self.scale = scale
        self.broken = Broken()
        self.senders: list[Sender] = []
        self.receivers: list[Device] = []
        self.convs: list[str] = []
        self.reader: tuple[str, str] = ("", "")  # user and token of a user who is in every conversation
        self._chance = random.Random(f"crowd {seed}")
        self._addresses = addresses
        self._still = asyncio.Event()
        self._lives: list[asyncio.Task[None]] = []
        self._talks: list[asyncio.Task[None]] = []
        self._moves: list[asyncio.Task[None]] = []

    @property
    def devices(self) -> list[Device]:
        """All clients."""
        return [*self.senders, *self.receivers]

    # --- setting up ----------------------------------------------------------------
    def _members(self) -> list[list[str]]:
        """The members of each conversation, by names; the first is the hot one."""
        cold = self.scale.conversations - 1
        members: list[list[str]] = [[] for _ in range(self.scale.conversations)]
        for kind, count, every in (
            ("s", self.scale.senders, HOT_EVERY_SENDER),
            ("r", self.scale.receivers, HOT_EVERY_RECEIVER),
        ):
            for i in range(count):
                members[1 + i % cold].append(f"{kind}{i}")
                if i % every == 0:
                    members[0].append(f"{kind}{i}")
        return members

    async def gather(self) -> None:
        """Make users and conversations."""
        names = [f"s{i}" for i in range(self.scale.senders)] + [f"r{i}" for i in range(self.scale.receivers)]
        limit = asyncio.Semaphore(SETUP_AT_ONCE)
        tag = f"{self._chance.getrandbits(32):08x}"

        async def user(name: str) -> tuple[str, str]:
            async with limit:
                made = await post(
                    self._addresses()[0], "/v1/users", {"name": f"{name}-{tag}", "password": "correct horse"}
                )
            return made["user"]["id"], made["token"]

        made = await asyncio.gather(*(user(name) for name in ["reader", *names]))
        users = dict(zip(["reader", *names], made, strict=True))
        self.reader = users["reader"]
        self.convs = await self._open([[users[name][0] for name in members] for members in self._members()])
        for name in names:
            id, token = users[name]
            chance = random.Random(self._chance.getrandbits(64))
            if name.startswith("s"):
                self.senders.append(Sender(name, id, token, self._addresses, self.broken, chance))
                continue
            behaviour = BEHAVIOURS[len(self.receivers) % len(BEHAVIOURS)]
            slow = behaviour == "slow"
            device = Device(f"{name} ({behaviour})", id, token, self._addresses, self.broken, chance, slow=slow)
            self.receivers.append(device)
        by_name = {sender.name: sender for sender in self.senders}
        for conv, members in zip(self.convs, self._members(), strict=True):
            for name in members:
                if name in by_name:
                    by_name[name].convs.append(conv)

    async def _open(self, members: list[list[str]]) -> list[str]:
        """Open the conversations; their ids."""
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        wire = await dial(self._addresses()[0], lambda data: inbox.put_nowait(orjson.loads(data)))
        convs: list[str] = []

        async def ask(request: Message) -> Message:
            wire.send(orjson.dumps(request))
            async with asyncio.timeout(SETTLED_S):
                while (reply := await inbox.get()).get("id") != request["id"]:
                    pass
            assert reply["t"] == "ok", reply
            return reply

        await ask({"t": "auth", "id": 1, "v": 1, "token": self.reader[1]})
        for i, users in enumerate(members):
            cid = f"open-{i}-{self._chance.getrandbits(96):x}"
            request = {"t": "open", "id": i + 2, "kind": "group", "title": f"c{i}", "members": users[:99], "cid": cid}
            convs.append((await ask(request))["c"])
        wire.close()
        return convs

    # --- a run ---------------------------------------------------------------------
    async def connect(self) -> None:
        """Connect all clients; returns when all are ready."""
        loop = asyncio.get_running_loop()
        for device in self.devices:
            self._lives.append(loop.create_task(device.live(), name=f"live {device.name}"))
            await asyncio.sleep(0.005)
        async with asyncio.timeout(SETTLED_S):
            for device in self.devices:
                await device.ready.wait()

    def flow(self, on: bool) -> None:
        """Let new messages come, or hold them back for a while."""
        for sender in self.senders:
            sender.flowing.set() if on else sender.flowing.clear()

    def begin(self) -> None:
        """All senders send, while messages flow."""
        loop = asyncio.get_running_loop()
        every_s = len(self.senders) / self.scale.per_s
        self._talks = [loop.create_task(sender.talk(every_s, SIZES), name=sender.name) for sender in self.senders]

    def move(self) -> None:
        """Receivers begin to move about."""
        loop = asyncio.get_running_loop()
        for i, device in enumerate(self.receivers):
            behaviour = BEHAVIOURS[i % len(BEHAVIOURS)]
            self._moves.append(loop.create_task(getattr(self, f"_{behaviour}")(device), name=device.name))

    async def _pause(self, seconds: float) -> bool:
        """Wait; False if it is time to stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._still.wait()
        return not self._still.is_set()

    async def _steady(self, device: Device) -> None:
        """Opens one of its conversations now and then."""
        while await self._pause(device.chance.uniform(5, 25)):
            await device.look(device.chance.choice(list(device.record.logs)))

    async def _roams(self, device: Device) -> None:
        """Drops its connection now and then, with or without a word."""
        while await self._pause(device.chance.uniform(10, 40)):
            device.drop(politely=device.chance.random() < 0.5)

    async def _away(self, device: Device) -> None:
        """Looks elsewhere for some seconds."""
        while await self._pause(device.chance.uniform(5, 20)):
            await device.go_away()
            await self._pause(device.chance.uniform(1, 15))
            await device.come_back()

    async def _slow(self, device: Device) -> None:
        """Reads nothing for some seconds."""
        while await self._pause(device.chance.uniform(5, 20)):
            wire = device.wire
            if wire is not None:
                wire.pause()
                await self._pause(device.chance.uniform(2, 15))
                wire.go_on()

    async def hush(self) -> None:
        """End new messages and all moving about; all clients are attached and read."""
        for sender in self.senders:
            sender.sending = False
            sender.wake()
        self._still.set()
        await asyncio.gather(*self._moves)

    async def quiet(self, patience_s: float) -> int:
        """Wait until every message is acknowledged, or the time is over; how many are not."""
        done, late = await asyncio.wait(self._talks, timeout=patience_s)
        for task in done:
            task.result()
        await self._stop(list(late))
        return sum(sender.queue() for sender in self.senders)

    def waiting(self, heads: dict[str, int]) -> Iterator[str]:
        """The clients that do not hold everything up to these seqs, and what they hold."""
        for device in self.devices:
            for conv, log in device.record.logs.items():
                if log.held < heads[conv]:
                    yield f"{device.name} holds {log.held} of {heads[conv]} of {conv}"

    async def end(self) -> None:
        """End all tasks and connections."""
        await self._stop([*self._talks, *self._moves, *self._lives])

    @staticmethod
    async def _stop(tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def silent(address: tuple[str, int], token: str) -> Wire:
    """A client that logs in and never reads."""
    wire = await dial(address, lambda data: None, slow=True)
    wire.send(orjson.dumps({"t": "auth", "id": 1, "v": 1, "token": token}))
    wire.pause()
    return wire
