"""Workers, devices and a script: one run of delivery on the model, and what must hold of it.

Sessions, the chat service, users and the delivery are the real ones; the store, the
bus, the sockets and the devices are the model's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

from chatcore.accounts.service import Identity
from chatcore.chat.delivery import Delivery
from chatcore.chat.directory import Directory
from chatcore.chat.service import Chat
from chatcore.chat.user_events import UserEvents
from chatcore.common.tasks import Tasks
from chatcore.entries import MemberFields, new_entry
from chatcore.errors import ChatError
from chatcore.protocol import Member as MemberRequest
from chatcore.protocol import Send as SendRequest
from chatcore.server.session import Services, Session
from chatcore.settings import Settings
from chatcore.store.base import Entry, User

from . import loop as virtual
from .deliver_store import Database, ModelStore
from .deliver_wires import ModelBus, ModelReactor, ModelTopic, Socket
from .device import Device
from .weather import CALM, Climate, Weather

OWNER = "alice"
USERS = (OWNER, "bob", "carol")
CONVS = ("c1", "c2")
#: name, user
DEVICES = (("alice1", OWNER), ("bob1", "bob"), ("bob2", "bob"), ("carol1", "carol"))
WORKERS = 2
#: A lost last message is found by the look of every second (in rotation: of every fifth), the store's
#: answers and a few retries.
QUIET_S = 6.0
QUIET_IN_ROTATION_S = 12.0
#: Two sweeps, and some.
FORGOTTEN_S = 45.0

_default = Settings.default()
SETTINGS = dataclasses.replace(
    _default, limits=dataclasses.replace(_default.limits, ring=4, backlog=12, connections_per_user=100)
)


# --- the script --------------------------------------------------------------
@dataclass(frozen=True)
class Connect:
    """A device connects (its old connection is lost), attached to all or to some.

    ``lie``: its ``have`` is so much higher than what it holds.
    """

    device: int
    worker: int
    only: tuple[int, ...] | None = None
    lie: int = 0


@dataclass(frozen=True)
class Drop:
    device: int


@dataclass(frozen=True)
class Slow:
    """A device reads nothing for some time."""

    device: int
    seconds: float


@dataclass(frozen=True)
class Attach:
    device: int
    only: tuple[int, ...] | None
    with_have: bool


@dataclass(frozen=True)
class Ping:
    device: int


@dataclass(frozen=True)
class Post:
    """Messages of somebody, through a worker."""

    worker: int
    conv: int
    user: int
    n: int = 1


@dataclass(frozen=True)
class Role:
    """The owner gives somebody a role."""

    worker: int
    conv: int
    user: int
    role: str


@dataclass(frozen=True)
class Open:
    """A device opens a group with all."""

    device: int


@dataclass(frozen=True)
class BusCut:
    seconds: float
    resync: bool


@dataclass(frozen=True)
class StoreDown:
    worker: int
    seconds: float


@dataclass(frozen=True)
class Wait:
    seconds: float


Action = Connect | Drop | Slow | Attach | Ping | Post | Role | Open | BusCut | StoreDown | Wait

MakeDelivery = Callable[..., Delivery]


class Silent:
    """Presence, which is not what is looked at here."""

    def changed(self, user: str) -> None: ...
    def forget(self, session: Any, watched: Any) -> None: ...


class Failures(Tasks):
    """Tasks, the failure of which is a broken promise."""

    def __init__(self, complain: Callable[[str], None]) -> None:
        super().__init__()
        self._complain = complain

    def _done(self, task: asyncio.Task[Any]) -> None:
        super()._done(task)
        if not task.cancelled() and task.exception() is not None:
            self._complain(f"a task failed: {task.get_name()} {task.exception()!r}")


class Worker:
    """The parts that a session works with."""

    def __init__(self, world: DeliverWorld) -> None:
        self.world = world
        self.tasks = Failures(world.complain)
        self.reactor = ModelReactor(world.weather, world.pushed)
        self.store = world.make_store(world.db, world.weather, self._on_commit)
        self.bus = world.bus.end(self._on_bus, lambda why: self.delivery.check())
        store: Any = self.store
        bus: Any = self.bus
        self.directory = Directory(store, bus, lambda user: None)
        presence: Any = Silent()
        self.delivery = world.make_delivery(
            store, bus, self.directory, lambda room: ModelTopic(self.reactor), bytes,
            recent=SETTINGS.limits.ring, backlog=SETTINGS.limits.backlog, check_interval_s=1.0,
        )  # fmt: skip
        self.user_events = UserEvents(bus, self.directory, self.delivery.refresh)
        self.chat = Chat(SETTINGS, store, bus, self.delivery, self.user_events)
        accounts: Any = self
        self.services = Services(
            SETTINGS,
            store.store_id,
            self.reactor,
            store,
            accounts,
            self.directory,
            self.delivery,
            presence,
            self.chat,
            self.tasks,
        )

    def _on_commit(self, entries: list[Entry]) -> None:
        self.chat.on_commit(entries)

    def _on_bus(self, channel: str, payload: bytes) -> None:
        kind, _, name = channel.partition(":")
        self.delivery.on_bus(name, payload) if kind == "c" else self.user_events.on_bus(payload)

    async def identify(self, token: str) -> Identity:
        """Accounts: the token of a user is its id."""
        await asyncio.sleep(self.world.weather.latency())
        return Identity(User(token, token), token.encode(), 10**9)


@dataclass
class DeliverWorld:
    """All of one run. :meth:`play` a script; it is checked all the time, and at its end."""

    seed: int
    climate: Climate
    make_delivery: MakeDelivery = Delivery
    make_store: type[ModelStore] = ModelStore
    rows_follow: bool = False  # members' rows are written after the entries that decide (MongoDB)
    broken: list[str] = field(default_factory=list)

    def play(self, script: Sequence[Action]) -> None:
        """:raises AssertionError: a promise is broken."""
        virtual.run(self._play(script))
        assert not self.broken, self.broken[0]

    def complain(self, what: str) -> None:
        self.broken.append(f"at {self.loop.time():.4f}: {what}")

    async def _play(self, script: Sequence[Action]) -> None:
        self.loop = asyncio.get_running_loop()
        self.weather = Weather(self.seed, CALM)
        self.db = Database()
        self._cids = 0
        for conv in CONVS:
            self.db.kinds[conv] = "group"
            for i, user in enumerate(USERS):
                role = "owner" if user == OWNER else "member"
                self.db.commit(new_entry(conv, OWNER, f"m{i}", MemberFields(user, role)))
        if self.rows_follow:
            self.db.split_rows()
        self.bus = ModelBus(self.weather)
        self.workers = [Worker(self) for _ in range(WORKERS)]
        self.devices = [Device(name, user, self.complain, self.db.is_in) for name, user in DEVICES]
        for worker in self.workers:
            await worker.delivery.start()
        self.weather.climate = self.climate
        for action in script:
            await self._act(action)
        await self._end()

    # --- acting ------------------------------------------------------------
    async def _act(self, action: Action) -> None:
        match action:
            case Wait(seconds):
                await asyncio.sleep(seconds)
            case Connect(device, worker, only, lie):
                choice = None if only is None else [CONVS[i] for i in only]
                self._connect(self.devices[device], self.workers[worker], choice, lie)
            case Drop(device):
                self._drop(self.devices[device])
            case Slow(device, seconds):
                socket = self.devices[device].socket
                if socket is not None:
                    socket.reading_from = self.loop.time() + seconds
            case Attach(device, only, with_have):
                d = self.devices[device]
                if d.ready:
                    self._send(d, d.attach(None if only is None else [CONVS[i] for i in only], with_have))
            case Ping(device):
                d = self.devices[device]
                if d.ready:
                    self._send(d, d.request("ping"))
            case Post(worker, conv, user, n):
                for _ in range(n):
                    self._post(self.workers[worker], CONVS[conv], USERS[user])
            case Role(worker, conv, user, role):
                chat = self.workers[worker].chat
                request = MemberRequest(c=CONVS[conv], user=USERS[user], role=cast(Any, role))
                self.workers[worker].tasks.spawn(self._may_be_refused(chat.member(OWNER, request)), "model-member")
            case Open(device):
                d = self.devices[device]
                if d.ready:
                    self._cids += 1
                    others = [user for user in USERS if user != d.user]
                    self._send(d, d.request("open", kind="group", members=others, cid=f"o{self._cids}"))
            case BusCut(seconds, resync):
                self.bus.cut = True
                self.loop.call_later(seconds, self._mend_bus, resync)
            case StoreDown(worker, seconds):
                store = self.workers[worker].store
                store.down = True
                self.loop.call_later(seconds, setattr, store, "down", False)

    def _mend_bus(self, resync: bool) -> None:
        self.bus.cut = False
        for end in self.bus.ends:
            if resync:
                end.on_resync_needed("the bus is back")

    async def _may_be_refused(self, work: Coroutine[Any, Any, Any]) -> None:
        with contextlib.suppress(ChatError):
            await work

    def _post(self, worker: Worker, conv: str, user: str) -> None:
        self._cids += 1
        worker.chat.send(user, SendRequest(c=conv, cid=f"s{self._cids}", body=str(self._cids)))

    def _connect(self, device: Device, worker: Worker, only: list[str] | None, lie: int = 0) -> None:
        self._drop(device)
        device.only = only
        socket = worker.reactor.accept(lambda conn: Session(worker.services, conn), lambda data: None)
        socket.received = lambda data: self._received(device, socket, data)
        device.reactor = worker.reactor
        self._send(device, device.auth(socket, lie))

    def _received(self, device: Device, socket: Socket, data: bytes) -> None:
        if device.socket is socket:
            refused = device.receive(data)
            if refused is not None:  # unavailable: it asks again, on the same connection
                self.loop.call_later(0.3, self._again, device, socket, refused)

    def _again(self, device: Device, socket: Socket, refused: str) -> None:
        if device.socket is socket and socket.open:
            self._send(device, device.auth(socket) if refused == "auth" else device.attach(device.only, False))

    def _send(self, device: Device, data: bytes) -> None:
        socket = device.socket
        assert socket is not None
        # In order, as on any connection.
        socket.arrives = max(socket.arrives, self.loop.time() + self.weather.latency())
        self.loop.call_at(socket.arrives, lambda: socket.open and socket.session.on_message(data, 0))

    def _drop(self, device: Device) -> None:
        """The connection is lost; the server finds out a little later."""
        socket, device.socket = device.socket, None
        device.ready = False
        if socket is not None and device.reactor is not None:
            self.loop.call_later(self.weather.latency(), device.reactor.lost, socket)

    # --- what must hold at every moment -------------------------------------
    def pushed(self, session: Session, payload: bytes) -> None:
        """Something is queued for a session: may it see it?"""
        message = orjson.loads(payload)
        if "s" not in message or "c" not in message or "id" in message:
            return
        conv, seq, user = message["c"], message["s"], session.user_id
        log = self.db.logs[conv]
        if seq > len(log) or log[seq - 1].entry.wire != payload:
            self.complain(f"{conv} {seq} was pushed to {user}: {payload!r}, which is not what the log has")
        # An entry is for those who were in before it, or are in by it or by anything since.
        if not any(self.db.was_in(conv, user, upto) for upto in range(seq - 1, len(log) + 1)):
            self.complain(f"{conv} {seq} was pushed to {user}, who is out")

    # --- what must hold at the end --------------------------------------------
    async def _end(self) -> None:
        """The store answers again, the bus may go on losing: everybody must have everything."""
        self.weather.climate = dataclasses.replace(self.climate, failed_read=0.0, stale_read=0.0)
        self._quiet_s = QUIET_S if self.make_store.global_positions else QUIET_IN_ROTATION_S
        await asyncio.sleep(2.0)
        for worker in self.workers:
            worker.store.down = False
        self.bus.cut = False
        for device in self.devices:
            if device.socket is not None and device.reactor is not None:
                device.reactor.reads_on(device.socket)
        await asyncio.sleep(self._quiet_s)
        for i, device in enumerate(self.devices):
            if device.socket is None or not device.socket.open:
                self._connect(device, self.workers[i % WORKERS], None)
        await asyncio.sleep(self._quiet_s)
        for conv in self.db.kinds:
            # Half of the time nothing comes any more: the last message before a silence arrives, too.
            if self.seed % 2:
                self._post(self.workers[0], conv, OWNER)
        await asyncio.sleep(self._quiet_s)
        for device in self.devices:
            self._check_device(device)
        self._check_rooms()
        for device in self.devices:
            self._drop(device)
        # Most of a run's time would go into waiting for that: one in four does.
        if self.seed % 4 < 1:
            await asyncio.sleep(FORGOTTEN_S)
            self._check_forgotten()
        await asyncio.sleep(1.0)
        for worker in self.workers:
            await worker.delivery.close()
            if len(worker.tasks):
                self.complain(f"left running: {list(worker.tasks)}")

    def _check_device(self, device: Device) -> None:
        if not device.ready:
            self.complain(f"{device.name} never got `ready`")
            return
        for conv in self.db.kinds:
            held, head = device.held.get(conv), self.db.head(conv)
            if not self.db.is_in(conv, device.user):
                if held is not None and not held.out:
                    self.complain(f"{device.name} was removed from {conv}, and does not know")
                continue
            if held is None or held.out:
                self.complain(f"{device.name} is in {conv}, and does not know")
                continue
            if held.head != head:
                self.complain(f"{device.name} believes that {conv} ends at {held.head}, not at {head}")
            told = held.pos is not None or self.seed % 2
            if (device.only is None or conv in device.only) and told and held.pos != head:
                self.complain(f"{device.name} has {conv} up to {held.pos}, not up to {head}")

    def _check_forgotten(self) -> None:
        for worker in self.workers:
            if worker.delivery.rooms or worker.bus.own:
                self.complain(f"nobody is connected, but {list(worker.delivery.rooms)} and {worker.bus.own} are kept")

    def _check_rooms(self) -> None:
        """Everybody in a topic has exactly what the room has delivered, and nobody is left on the way."""
        for worker in self.workers:
            for conv, room in worker.delivery.rooms.items():
                if room.last != self.db.head(conv):
                    self.complain(f"a room of {conv} is at {room.last}, the log at {self.db.head(conv)}")
                if room.attaching or room.pins:
                    self.complain(f"in a room of {conv} {len(room.attaching)} are still attaching, {room.pins} pins")


def deliver(script: Sequence[Action], seed: int, climate: Climate, **parts: Any) -> DeliverWorld:
    """One run, checked."""
    world = DeliverWorld(seed, climate, **parts)
    world.play(script)
    return world
