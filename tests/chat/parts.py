"""What stands around delivery, users and sessions in their tests: a store that fails on demand, and silent lines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from chatcore.accounts.service import Identity
from chatcore.chat.delivery import Delivery
from chatcore.chat.directory import Directory
from chatcore.chat.presence import Presence
from chatcore.chat.service import Chat
from chatcore.chat.user_events import UserEvents
from chatcore.common.tasks import Tasks
from chatcore.entries import NewEntry
from chatcore.errors import Unavailable
from chatcore.protocol import encode_entry
from chatcore.server.session import Services, Session
from chatcore.settings import Settings
from chatcore.store.base import Appended, Changes, Entry, Known, Memberships, User, View

# Only what fails ever waits so long.
PATIENCE_S = 10.0


async def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for something that tells nobody when it happens."""
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {PATIENCE_S} s: {what}"
        await asyncio.sleep(0.005)


def message(conv: str, seq: int, body: str = "hello") -> Entry:
    """A committed message."""
    wire = encode_entry("msg", conv, seq, "somebody", 0, f"cid{seq}", orjson.dumps({"body": body}))
    return Entry(conv, seq, "msg", "somebody", seq, seq, wire)


class Shelf:
    """A store of what a test puts there. It notes what it was asked; it fails while ``down``, or in what is
    named in ``failing``."""

    store_id = "shelf"
    global_positions = True

    def __init__(self) -> None:
        self.down = False
        self.failing: set[str] = set()
        self.asked: list[tuple[Any, ...]] = []
        self.at = 5  # the change counter
        self.logs: dict[str, list[Entry]] = {}
        self.rows: dict[str, dict[str, Any]] = {}  # conversation -> what a view of it says
        self.changed: list[tuple[str, str]] = []  # (user, conversation) rows that the next look finds
        self.last_seen: dict[str, int] = {}
        self.acquaintances: set[str] = set()
        self.blocking: set[str] = set()  # the users who block all others
        self.gate: asyncio.Event | None = None  # queries of who knows whom wait for it

    def conversation(self, conv: str, length: int = 1, body: str = "hello") -> None:
        """Put a conversation of this many messages."""
        self.logs[conv] = [message(conv, seq, body) for seq in range(1, length + 1)]
        self.change(conv, read=0)

    def change(self, conv: str, **fields: Any) -> None:
        """Change everybody's row of a conversation."""
        self.at += 1
        self.rows[conv] = {**self.rows.get(conv, {}), **fields, "rev": self.at}

    def append(self, new: NewEntry) -> asyncio.Future[Appended]:
        future: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
        future.set_exception(Unavailable("nothing can be added here"))
        return future

    async def _ask(self, *what: Any) -> None:
        self.asked.append(what)
        fails = self.down or what[0] in self.failing
        await asyncio.sleep(0)
        if fails:
            raise Unavailable("the store does not answer")

    async def position(self) -> int:
        await self._ask("position")
        return self.at

    async def heads(self, convs: Sequence[str]) -> dict[str, int]:
        await self._ask("heads")
        return {conv: len(self.logs[conv]) for conv in convs}

    async def entries(self, conv: str, after: int, limit: int, max_bytes: int) -> list[Entry]:
        await self._ask("entries", conv, after)
        found: list[Entry] = []
        for e in self.logs[conv][after : after + limit]:
            if found and sum(len(x.wire) for x in found) + len(e.wire) > max_bytes:
                break
            found.append(e)
        return found

    async def changes(self, after: int, known: Known | None = None, everything: bool = True) -> Changes:
        await self._ask("changes")
        rows, self.changed = self.changed, []
        return Changes(self.at, [], rows, [], [])

    async def memberships(self, user: str, since: int | None = None) -> Memberships:
        await self._ask("memberships")
        return Memberships(self.at, {conv: row["rev"] for conv, row in self.rows.items()}, [])

    async def views(self, user: str, convs: Sequence[str] | None = None) -> tuple[int, list[View]]:
        await self._ask("views", user)
        wanted = [conv for conv in self.rows if convs is None or conv in convs]
        return self.at, [self._view(conv) for conv in wanted]

    def _view(self, conv: str) -> View:
        head, row = len(self.logs[conv]), self.rows[conv]
        last = self.logs[conv][-1].wire
        return View(
            conv, "group", None, None, None, "member", 2, "all", head, row["read"], 0, last, row["rev"], row["rev"]
        )

    async def acquainted(self, user: str, others: Sequence[str]) -> set[str]:
        await self._ask("acquainted", *others)
        if self.gate is not None:
            await self.gate.wait()
        return self.acquaintances & set(others)

    async def blockers(self, user: str, others: Sequence[str]) -> set[str]:
        await self._ask("blockers", *others)
        return self.blocking & set(others)

    async def users(self, ids: Sequence[str]) -> list[User]:
        await self._ask("users", *ids)
        return [User(id, id) for id in ids]

    async def seen(self, ids: Sequence[str]) -> dict[str, int]:
        await self._ask("seen", *ids)
        return {id: self.last_seen[id] for id in ids if id in self.last_seen}

    async def mark_seen(self, users: Sequence[str]) -> None:
        await self._ask("mark_seen", *users)
        self.last_seen.update(dict.fromkeys(users, 1))


class Line:
    """A bus with nobody at the other end; what was published is kept."""

    name = "here"
    healthy = True

    def __init__(self) -> None:
        self.published: list[tuple[str, Any]] = []

    async def subscribe(self, channels: list[str]) -> None:
        await asyncio.sleep(0)

    def unsubscribe(self, channels: list[str]) -> None: ...

    def publish(self, channel: str, payload: bytes) -> None:
        self.published.append((channel, orjson.loads(payload) if payload[:1] == b"{" else payload))

    def send_to(self, peer: str, channel: str, payload: bytes) -> None: ...


class Switchboard:
    """Where connections end: a reactor without sockets. A client reads all at once, unless it is ``stuck``."""

    def __init__(self) -> None:
        self.sessions: dict[int, Session] = {}
        self.received: dict[int, list[dict[str, Any]]] = {}
        self.closed: dict[int, int] = {}
        self.stuck: set[int] = set()

    def send(self, conn: int, payload: bytes) -> bool:
        self.received[conn].append(orjson.loads(payload))
        return True

    def queued(self, conn: int) -> int:
        return 0

    def notify_writable(self, conn: int) -> bool:
        return conn not in self.stuck

    def reads_on(self, conn: int) -> None:
        """The client is stuck no longer."""
        self.stuck.discard(conn)
        self.sessions[conn].on_writable()

    def authenticated(self, conn: int, owner: int, ping_ms: int) -> None: ...

    def close(self, conn: int, code: int, reason: bytes = b"") -> None:
        self.closed[conn] = code
        self.sessions[conn].on_closed()


class Ring:
    """A topic on a switchboard."""

    def __init__(self, board: Switchboard) -> None:
        self._board = board
        self._conns: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._conns)

    def __contains__(self, conn: int) -> bool:
        return conn in self._conns

    def add(self, conn: int) -> bool:
        self._conns[conn] = None
        return True

    def discard(self, conn: int) -> bool:
        return self._conns.pop(conn, self) is None

    def fan_out(self, frame: bytes, skip_owner: int = 0) -> int:
        return sum(self._board.send(conn, frame) for conn in self._conns)

    def sessions(self) -> list[Session]:
        return [self._board.sessions[conn] for conn in self._conns]


class Tokens:
    """Accounts that know everybody: the token of a user is his name."""

    async def identify(self, token: str) -> Identity:
        return Identity(User(token, token), token.encode(), 10**9)


class Desk:
    """The parts of a worker that a session uses: real ones on a shelf, a line and a switchboard."""

    def __init__(self, shelf: Shelf, **delivery: Any) -> None:
        self.settings = Settings.default()
        self.store = shelf
        self.bus = Line()
        self.reactor = Switchboard()
        self.accounts = Tokens()
        self._tasks = Tasks()
        self._ids = 0
        self.directory = Directory(shelf, self.bus, lambda user: self.presence.changed(user))  # type: ignore[arg-type]
        self.presence = Presence(shelf, self.bus, self.directory.is_online)  # type: ignore[arg-type]
        self.delivery = Delivery(
            shelf,
            self.bus,
            self.directory,
            lambda room: Ring(self.reactor),
            lambda wire: wire,
            check_interval_s=0.02,
            **delivery,
        )
        self.user_events = UserEvents(self.bus, self.directory, self.delivery.refresh)
        self.chat = Chat(self.settings, shelf, self.bus, self.delivery, self.user_events)  # type: ignore[arg-type]
        self._services = Services(
            self.settings,
            shelf.store_id,
            self.reactor,
            shelf,  # type: ignore[arg-type]
            self.accounts,  # type: ignore[arg-type]
            self.directory,
            self.delivery,
            self.presence,
            self.chat,
            self._tasks,
        )

    async def __aenter__(self) -> Desk:
        await self.delivery.start()
        self.presence.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._tasks.close()
        await self.presence.close()
        await self.delivery.close()

    def connect(self) -> Session:
        """A connection that has not logged in."""
        conn = len(self.reactor.sessions) + 1
        session = self.reactor.sessions[conn] = Session(self._services, conn)
        self.reactor.received[conn] = []
        return session

    def begin(self, x: Session, t: str, **fields: Any) -> int:
        """A request of the client; its id."""
        self._ids += 1
        x.on_message(orjson.dumps({"t": t, "id": self._ids, **fields}), 0)
        return self._ids

    def got(self, x: Session, **wanted: Any) -> list[dict[str, Any]]:
        """What the client was sent with these fields."""
        return [m for m in self.reactor.received[x.conn] if wanted.items() <= m.items()]

    async def answer(self, x: Session, id: int) -> dict[str, Any]:
        """The reply to a request."""
        await until(lambda: self.got(x, id=id), f"a reply to request {id}")
        return self.got(x, id=id)[0]

    async def log_in(self, user: str, *, stuck: bool = False, **fields: Any) -> Session:
        """A session of a user, after its `ready`; or ``stuck`` before the first `conv`, but for the answer."""
        x = self.connect()
        if stuck:
            self.reactor.stuck.add(x.conn)
        reply = await self.answer(x, self.begin(x, "auth", v=1, token=user, **fields))
        assert reply["t"] == "ok", reply
        if stuck:
            await until(lambda: ("views", user) in self.store.asked, "the reading of what is to be told")
            assert not self.got(x, t="conv")
        else:
            await until(lambda: self.got(x, t="ready"), "ready")
        return x
