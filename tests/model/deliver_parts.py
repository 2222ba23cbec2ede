"""What stands around the delivery: a model of the store's reads, of the bus, and of the sockets.

Reads take time both ways and see one state in between; `entries` and `heads` may be
told by a replica that lags. The bus loses, repeats and reorders. An outbox is as
slow as its client reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from chatcore.errors import ChatError, Conflict, Unavailable
from chatcore.protocol import MEMBER_ROLES, encode_entry
from chatcore.store import rules
from chatcore.store.base import Appended, Changes, Entry, NewEntry, Opened, Opening, View
from chatcore.store.entries import conversation_id, first_entries

from .weather import Weather


@dataclass
class Place:
    """A committed entry: the counter's value, when, and how many of the conversation were read before it."""

    id: int
    at: float
    new: NewEntry
    entry: Entry


@dataclass
class MemberRow:
    role: str
    rev: int


class Database:
    """What is durable. Everything changes in one step, as commits do."""

    def __init__(self) -> None:
        self.counter = 0
        self.logs: dict[str, list[Place]] = {}
        self.kinds: dict[str, str] = {}
        self.members: dict[tuple[str, str], MemberRow] = {}
        self.keys: dict[tuple[str, str, str], Place] = {}

    def commit(self, new: NewEntry) -> Entry:
        log = self.logs.setdefault(new.conv, [])
        self.counter += 1
        seq = len(log) + 1
        msgs, last = (log[-1].entry.msgs, log[-1].entry.last_msg) if log else (0, 0)
        if new.t == "msg":
            msgs, last = msgs + 1, seq
        wire = encode_entry(new.t, new.conv, seq, new.sender, 0, new.cid, new.fields)
        entry = Entry(new.conv, seq, new.t, new.sender, msgs, last, wire)
        place = Place(self.counter, asyncio.get_running_loop().time(), new, entry)
        log.append(place)
        self.keys[new.conv, new.sender, new.cid] = place
        if new.t == "member" and new.user is not None and new.role is not None:
            self.set_role(new.conv, new.user, new.role)
        return entry

    def set_role(self, conv: str, user: str, role: str) -> None:
        self.counter += 1
        self.members[conv, user] = MemberRow(role, self.counter)

    def role(self, conv: str, user: str) -> str | None:
        row = self.members.get((conv, user))
        return row.role if row is not None else None

    def is_in(self, conv: str, user: str) -> bool:
        return self.role(conv, user) in MEMBER_ROLES

    def was_in(self, conv: str, user: str, upto: int) -> bool:
        """Whether the entries up to a seq make somebody a member."""
        role = None
        for place in self.logs[conv][:upto]:
            if place.new.user == user:
                role = place.new.role
        return role in MEMBER_ROLES

    def head(self, conv: str) -> int:
        return len(self.logs.get(conv, ()))

    def view(self, conv: str, user: str) -> View:
        row = self.members[conv, user]
        log = self.logs[conv]
        count = sum(self.is_in(c, u) for c, u in self.members if c == conv)
        last = log[log[-1].entry.last_msg - 1].entry.wire if log[-1].entry.last_msg else None
        return View(
            conv, self.kinds[conv], None, None, None, row.role, count, "all", len(log), 0, 0, last, row.rev, log[-1].id
        )


class ModelStore:
    """One worker's store, over the common database."""

    name = "model"
    store_id = "model"
    global_positions = True

    def __init__(self, db: Database, weather: Weather, on_commit: Callable[[list[Entry]], None]) -> None:
        self.db = db
        self.weather = weather
        self.on_commit = on_commit
        self.down = False
        self._told = 0.0
        self._answered = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def _way(self) -> None:
        await asyncio.sleep(self.weather.latency())
        if self.down or self.weather.read_fails():
            raise Unavailable("the store does not answer")

    async def _back(self) -> None:
        """The way back of a read. One reader thread (SQLite) answers in order; a pool (MongoDB) need not."""
        latency = self.weather.latency()
        if not self.weather.happens(self.weather.climate.overtaking_reads):
            now = asyncio.get_running_loop().time()
            self._answered = max(self._answered, now + latency)
            latency = self._answered - now
        await asyncio.sleep(latency)

    # --- writes ------------------------------------------------------------
    def append(self, new: NewEntry) -> asyncio.Future[Appended]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Appended] = loop.create_future()
        task = loop.create_task(self._append(new, future))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return future

    async def _append(self, new: NewEntry, future: asyncio.Future[Appended]) -> None:
        try:
            await self._way()
            outcome = self._decide(new)
        except ChatError as exc:
            outcome = exc
        if isinstance(outcome, Entry):
            await self._tell([outcome])
            future.set_result(Appended(outcome.seq, 0))
        elif isinstance(outcome, Appended):
            await self._back()
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
            future.exception()

    async def _tell(self, entries: list[Entry]) -> None:
        """On_commit comes some time after others can read it, in the order of the commits."""
        now = asyncio.get_running_loop().time()
        self._told = max(self._told, now + self.weather.latency())
        await asyncio.sleep(self._told - now)
        self.on_commit(entries)

    def _decide(self, new: NewEntry) -> Entry | Appended | ChatError:
        db = self.db
        place = db.keys.get((new.conv, new.sender, new.cid))
        if place is not None:
            same = place.new.digest == new.digest
            return Appended(place.entry.seq, 0, dup=True) if same else Conflict("another content")
        kind, mine = db.kinds.get(new.conv), db.role(new.conv, new.sender)
        if new.t == "member":
            assert new.user is not None
            assert new.role is not None
            theirs = db.role(new.conv, new.user)
            count = sum(db.is_in(c, u) for c, u in db.members if c == new.conv)
            refused = rules.check_member(kind, new.sender, mine, new.user, theirs, new.role, 1, count)
            if refused is None and (theirs or "none") == new.role:
                return Appended(0, 0)
            if refused is None and kind == "channel" and new.user == new.sender:
                db.set_role(new.conv, new.user, new.role)
                return Appended(0, 0)
        else:
            refused = rules.check_send(kind, mine, False)
        return refused if refused is not None else db.commit(new)

    async def open(self, o: Opening) -> Opened:
        await self._way()
        conv = conversation_id(b"secret", o)
        if conv in self.db.kinds:
            return Opened(conv, False)
        self.db.kinds[conv] = o.kind
        entries = [self.db.commit(e) for e in first_entries(conv, o, [o.creator, *o.members])]
        await self._tell(entries)
        return Opened(conv, True)

    # --- reads -------------------------------------------------------------
    def _seen(self, conv: str) -> list[Place]:
        """The log, or what a replica has of it that lags."""
        log = self.db.logs.get(conv, [])
        if self.weather.reads_stale():
            before = asyncio.get_running_loop().time() - self.weather.random.choice((0.01, 0.1, 0.5))
            return [place for place in log if place.at <= before]
        return list(log)

    async def heads(self, convs: Sequence[str]) -> dict[str, int]:
        await self._way()
        found = {conv: len(self._seen(conv)) for conv in convs}
        await self._back()
        return found

    async def entries(self, conv: str, after: int, limit: int, max_bytes: int) -> list[Entry]:
        await self._way()
        # The bound in bytes cuts anywhere behind the first.
        some = self.weather.random.choice((1, 2, 5, limit, limit))
        found = [place.entry for place in self._seen(conv)[after : after + min(limit, some)]]
        await self._back()
        return found

    async def position(self) -> int:
        await self._way()
        return self.db.counter

    async def changes(self, after: int, known: object = None, everything: bool = True) -> Changes:
        await self._way()
        db, end = self.db, min(self.db.counter, after + self.weather.random.choice((1, 5, 1000, 1000)))
        heads = {p.entry.conv: p.entry.seq for log in db.logs.values() for p in log if after < p.id <= end}
        rows = [(user, conv) for (conv, user), row in db.members.items() if after < row.rev <= end]
        found = Changes(end, list(heads.items()), rows, [], [], more=end < db.counter)
        await self._back()
        return found

    async def conversations(self, user: str) -> tuple[int, list[str]]:
        await self._way()
        found = (self.db.counter, [conv for conv, u in self.db.members if u == user and self.db.is_in(conv, u)])
        await self._back()
        return found

    async def left_since(self, user: str, after: int) -> list[str]:
        await self._way()
        rows = self.db.members.items()
        found = [c for (c, u), r in rows if u == user and r.rev > after and r.role not in MEMBER_ROLES]
        await self._back()
        return found

    async def views(self, user: str, convs: Sequence[str] | None = None) -> tuple[int, list[View]]:
        await self._way()
        mine = [conv for conv, u in self.db.members if u == user and self.db.is_in(conv, u)]
        views = [self.db.view(conv, user) for conv in mine if convs is None or conv in convs]
        views.sort(key=lambda view: view.head_id, reverse=True)
        found = (self.db.counter, views)
        await self._back()
        return found

    async def member_count(self, conv: str) -> int:
        await self._way()
        return sum(self.db.is_in(c, u) for c, u in self.db.members if c == conv)


class ModelBus:
    """All buses of the model: what one publishes the others may get, some time, perhaps twice."""

    def __init__(self, weather: Weather) -> None:
        self.weather = weather
        self.ends: list[BusEnd] = []
        self.cut = False  # nothing gets through, and nobody is told

    def end(self, on_bus: Callable[[str, bytes], None], on_doubt: Callable[[str], None]) -> BusEnd:
        end = BusEnd(self, on_bus, on_doubt)
        self.ends.append(end)
        return end


class BusEnd:
    """One worker's bus."""

    healthy = True  # as far as it knows

    def __init__(self, bus: ModelBus, on_bus: Callable[[str, bytes], None], on_doubt: Callable[[str], None]) -> None:
        self.bus = bus
        self.on_bus = on_bus
        self.on_doubt = on_doubt
        self.own: dict[str, int] = {}  # counted
        self.known: set[str] = set()  # what the others know of it

    async def subscribe(self, channels: list[str]) -> None:
        for channel in channels:
            self.own[channel] = self.own.get(channel, 0) + 1
        await asyncio.sleep(self.bus.weather.latency())
        self.known.update(channels)
        await asyncio.sleep(self.bus.weather.latency())

    def unsubscribe(self, channels: list[str]) -> None:
        for channel in channels:
            count = self.own.get(channel, 0) - 1
            assert count >= 0, f"{channel} was given back more often than it was taken"
            if count:
                self.own[channel] = count
            else:
                del self.own[channel]
                self.known.discard(channel)

    def publish(self, channel: str, payload: bytes) -> None:
        weather, climate = self.bus.weather, self.bus.weather.climate
        loop = asyncio.get_running_loop()
        for other in self.bus.ends:
            if other is self or channel not in other.known or self.bus.cut:
                continue
            if weather.happens(climate.bus_lost):
                if weather.happens(0.5):
                    loop.call_later(weather.latency(), other.on_doubt, "lost")
                continue
            for _ in range(2 if weather.happens(climate.bus_repeated) else 1):
                late = weather.random.choice((0.005, 0.05, 2.0)) if weather.happens(climate.bus_late) else 0.0
                loop.call_later(weather.latency() + late, other._receive, channel, payload)

    def send_to(self, peer: str, channel: str, payload: bytes) -> None: ...

    def _receive(self, channel: str, payload: bytes) -> None:
        if channel in self.own:
            self.on_bus(channel, payload)


class Socket:
    """One connection, on the server: what is queued leaves as fast as the client reads."""

    def __init__(self, conn: int, session: Any, received: Callable[[bytes], None]) -> None:
        self.conn = conn
        self.session = session
        self.received = received
        self.outbox: list[bytes] = []
        self.open = True
        self.owner = 0
        self.wanted = False  # on_writable is to be called
        self.reading_from = 0.0  # the client reads nothing before
        self.arrives = 0.0  # when the client's last message arrives


class ModelReactor:
    """The client sockets of one worker."""

    LOW_WATER_BYTES = 600

    def __init__(self, weather: Weather, pushed: Callable[[Any, bytes], None]) -> None:
        self.weather = weather
        self.pushed = pushed
        self.sockets: dict[int, Socket] = {}
        self.topics: list[ModelTopic] = []
        self._conns = 0

    def accept(self, make_session: Callable[[int], Any], received: Callable[[bytes], None]) -> Socket:
        self._conns += 1
        socket = Socket(self._conns, make_session(self._conns), received)
        self.sockets[self._conns] = socket
        return socket

    def send(self, conn: int, payload: bytes) -> bool:
        socket = self.sockets.get(conn)
        if socket is None:
            return False
        self.pushed(socket.session, payload)
        socket.outbox.append(payload)
        if len(socket.outbox) == 1:
            self._drain_later(socket)
        return True

    def _drain_later(self, socket: Socket) -> None:
        loop = asyncio.get_running_loop()
        wait = max(self.weather.latency(), socket.reading_from - loop.time())
        loop.call_later(wait, self._drain, socket)

    def _drain(self, socket: Socket) -> None:
        if not socket.open:
            return
        if socket.reading_from > asyncio.get_running_loop().time():
            self._drain_later(socket)
            return
        outbox, socket.outbox = socket.outbox, []
        for payload in outbox:
            if socket.open:
                socket.received(payload)
        if socket.open and socket.wanted:
            socket.wanted = False
            socket.session.on_writable()

    def reads_on(self, socket: Socket) -> None:
        """A slow client is slow no longer."""
        socket.reading_from = 0.0
        self._drain(socket)

    def queued(self, conn: int) -> int:
        socket = self.sockets.get(conn)
        return sum(map(len, socket.outbox)) if socket is not None else 0

    def notify_writable(self, conn: int) -> bool:
        socket = self.sockets.get(conn)
        if socket is None or self.queued(conn) <= self.LOW_WATER_BYTES:
            return True
        socket.wanted = True
        return False

    def authenticated(self, conn: int, owner: int, ping_ms: int) -> None:
        self.sockets[conn].owner = owner

    def close(self, conn: int, code: int, reason: bytes) -> None:
        socket = self.sockets.get(conn)
        if socket is not None:
            asyncio.get_running_loop().call_soon(self.lost, socket)

    def lost(self, socket: Socket) -> None:
        """The connection is over, whoever ended it."""
        if not socket.open:
            return
        socket.open = False
        del self.sockets[socket.conn]
        for topic in self.topics:
            topic.conns.pop(socket.conn, None)
        socket.session.on_closed()


class ModelTopic:
    """Like ``_fast.Topic``: who ends leaves by itself, who has ended does not come in."""

    def __init__(self, reactor: ModelReactor) -> None:
        self.reactor = reactor
        self.conns: dict[int, None] = {}
        reactor.topics.append(self)

    def __len__(self) -> int:
        return len(self.conns)

    def __contains__(self, conn: int) -> bool:
        return conn in self.conns

    def add(self, conn: int) -> bool:
        if conn in self.conns or conn not in self.reactor.sockets:
            return False
        self.conns[conn] = None
        return True

    def discard(self, conn: int) -> bool:
        return self.conns.pop(conn, self) is None

    def fan_out(self, frame: bytes, skip_owner: int = 0) -> int:
        told = 0
        for conn in list(self.conns):
            socket = self.reactor.sockets[conn]
            if not skip_owner or socket.owner != skip_owner:
                self.reactor.send(conn, frame)
                told += 1
        return told

    def sessions(self) -> list[Any]:
        return [self.reactor.sockets[conn].session for conn in self.conns]
