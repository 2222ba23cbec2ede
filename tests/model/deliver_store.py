"""A model of the store that delivery reads: a common database, and one way to it per worker.

Reads take time both ways and see one state in between; `entries` and `heads` may be
told by a replica that lags, answers may overtake each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from chatcore.entries import ENTRY_TYPES, Fact, NewEntry, RoleChange, Standing, by_oneself
from chatcore.errors import ChatError, Conflict, Unavailable
from chatcore.protocol import MEMBER_ROLES, encode_entry
from chatcore.store.base import Appended, Changes, Entry, Known, Memberships, Opened, Opening, View
from chatcore.store.opening import conversation_id, first_entries

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
    """``rev``: the common counter when it changed; ``own_rev``: that of the user's rows alone."""

    role: str
    rev: int
    own_rev: int
    as_of: int = 0


class Database:
    """What is durable. Everything changes in one step, as commits do."""

    def __init__(self) -> None:
        self.counter = 0
        self.logs: dict[str, list[Place]] = {}
        self.kinds: dict[str, str] = {}
        self.members: dict[tuple[str, str], MemberRow] = {}
        self.revs: dict[str, int] = {}
        # What is read of the members: the same, or (MongoDB) rows that follow the entries.
        self.rows = self.members
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
        if isinstance(new.change, RoleChange):
            self.set_role(new.conv, new.change.user, new.change.role)
        return entry

    def set_role(self, conv: str, user: str, role: str) -> None:
        self.counter += 1
        self.members[conv, user] = MemberRow(role, self.counter, self.revs.get(user, 0) + 1)
        if self.rows is self.members:
            self.revs[user] = self.revs.get(user, 0) + 1

    def split_rows(self) -> None:
        """From now on rows follow their entries (:meth:`project`)."""
        self.rows = dict(self.members)

    async def project(self, e: Entry, user: str, role: str, pause: Callable[[], float]) -> None:
        """Two writes: the user's counter of changes, then the row, unless it reflects a later entry."""
        await asyncio.sleep(pause())
        rev = self.revs[user] = self.revs.get(user, 0) + 1
        await asyncio.sleep(pause())
        before = self.rows.get((e.conv, user))
        if before is None or before.as_of < e.seq:
            self.rows[e.conv, user] = MemberRow(role, self.counter, rev, e.seq)

    def repair(self, conv: str) -> None:
        """A look at a conversation's rows brings them up to its head first (MongoStore.views)."""
        for place in self.logs.get(conv, ()):
            change = place.new.change
            if not isinstance(change, RoleChange) or self.rows is self.members:
                continue
            row = self.rows.get((conv, change.user))
            if row is None or row.as_of < place.entry.seq:
                rev = self.revs.get(change.user, 0) + 1
                self.revs[change.user] = rev
                self.rows[conv, change.user] = MemberRow(change.role, self.counter, rev, place.entry.seq)

    def row_is_in(self, conv: str, user: str) -> bool:
        """As far as the row tells."""
        row = self.rows.get((conv, user))
        return row is not None and row.role in MEMBER_ROLES

    def role(self, conv: str, user: str) -> str | None:
        row = self.members.get((conv, user))
        return row.role if row is not None else None

    def is_in(self, conv: str, user: str) -> bool:
        return self.role(conv, user) in MEMBER_ROLES

    def was_in(self, conv: str, user: str, upto: int) -> bool:
        """Whether the entries up to a seq make somebody a member."""
        role = None
        for place in self.logs[conv][:upto]:
            change = place.new.change
            if isinstance(change, RoleChange) and change.user == user:
                role = change.role
        return role in MEMBER_ROLES

    def head(self, conv: str) -> int:
        return len(self.logs.get(conv, ()))

    def view(self, conv: str, user: str) -> View:
        row = self.rows[conv, user]
        log = self.logs[conv]
        count = sum(self.is_in(c, u) for c, u in self.members if c == conv)
        last = log[log[-1].entry.last_msg - 1].entry.wire if log[-1].entry.last_msg else None
        return View(
            conv,
            self.kinds[conv],
            None,
            None,
            None,
            row.role,
            count,
            "all",
            len(log),
            0,
            0,
            last,
            row.rev,
            log[-1].id,
            row.as_of,
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
            await self._project(self.db.keys[new.conv, new.sender, new.cid].new, outcome)
            future.set_result(Appended(outcome.seq, 0))
        elif isinstance(outcome, Appended):
            await self._back()
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
            future.exception()

    async def _project(self, new: NewEntry, entry: Entry) -> None:
        """A change is answered when its row reflects it."""
        change = new.change
        if self.db.rows is not self.db.members and isinstance(change, RoleChange):
            await self.db.project(entry, change.user, change.role, self.weather.latency)

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
        change = new.change
        members = sum(db.is_in(c, u) for c, u in db.members if c == new.conv)
        standing = Standing(
            db.kinds.get(new.conv), db.role(new.conv, new.sender), owners=1, members=members,
            user_exists=True, user_conversations=0, user_blocks=False,
        )  # fmt: skip
        if isinstance(change, RoleChange):
            standing.user_role = db.role(new.conv, change.user)
        decision = ENTRY_TYPES[new.t].rule(new, standing)
        assert not isinstance(decision, Fact)
        if decision is None:
            return Appended(0, 0)
        if isinstance(decision, ChatError):
            return decision
        if standing.kind == "channel" and by_oneself(new):
            assert isinstance(decision.change, RoleChange)
            db.set_role(new.conv, decision.change.user, decision.change.role)
            return Appended(0, 0)
        return db.commit(decision)

    async def open(self, o: Opening) -> Opened:
        await self._way()
        conv = conversation_id(b"secret", o)
        if conv in self.db.kinds:
            return Opened(conv, False)
        self.db.kinds[conv] = o.kind
        first = first_entries(conv, o, [o.creator, *o.members])
        entries = [self.db.commit(e) for e in first]
        await self._tell(entries)
        for new, entry in zip(first, entries, strict=True):
            await self._project(new, entry)
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

    async def changes(self, after: int, known: Known | None = None, everything: bool = True) -> Changes:
        await self._way()
        db, end = self.db, min(self.db.counter, after + self.weather.random.choice((1, 5, 1000, 1000)))
        heads = {p.entry.conv: p.entry.seq for log in db.logs.values() for p in log if after < p.id <= end}
        rows = [(user, conv) for (conv, user), row in db.rows.items() if after < row.rev <= end]
        found = Changes(end, list(heads.items()), rows, [], [], more=end < db.counter)
        await self._back()
        return found

    async def memberships(self, user: str, since: int | None = None) -> Memberships:
        await self._way()
        found = Memberships(self.db.counter, *self._rows(user, since, lambda row: row.rev))
        await self._back()
        return found

    def _rows(self, user: str, since: int | None, rev: Callable[[MemberRow], int]) -> tuple[dict[str, int], list[str]]:
        mine = {conv: row for (conv, u), row in self.db.rows.items() if u == user}
        revs = {conv: rev(row) for conv, row in mine.items() if self.db.row_is_in(conv, user)}
        left = [c for c, row in mine.items() if since is not None and rev(row) > since and row.role not in MEMBER_ROLES]
        return revs, left

    async def views(self, user: str, convs: Sequence[str] | None = None) -> tuple[int, list[View]]:
        await self._way()
        for conv in convs or list(self.db.logs):
            self.db.repair(conv)
        mine = [conv for conv, u in self.db.rows if u == user and self.db.row_is_in(conv, u)]
        views = [self._view(conv, user) for conv in mine if convs is None or conv in convs]
        views.sort(key=lambda view: view.head_id, reverse=True)
        found = (self.db.counter, views)
        await self._back()
        return found

    def _view(self, conv: str, user: str) -> View:
        return self.db.view(conv, user)

    async def member_count(self, conv: str) -> int:
        await self._way()
        return sum(self.db.row_is_in(c, u) for c, u in self.db.rows if c == conv)


class RotatingStore(ModelStore):
    """A store without a common counter, as MongoDB: what is attached is looked at, all of it or a part in turn."""

    global_positions = False
    LOOKS = 5
    #: Revisions may become visible out of order: a position is that much lower.
    SLACK = 16

    def __init__(self, db: Database, weather: Weather, on_commit: Callable[[list[Entry]], None]) -> None:
        super().__init__(db, weather, on_commit)
        self._turn = 0
        self._revs: dict[str, int] = {}

    async def position(self) -> int:
        return 0

    async def changes(self, after: int, known: Known | None = None, everything: bool = True) -> Changes:
        assert known is not None
        self._turn += 1
        part = self._turn % self.LOOKS
        lasts = [item for i, item in enumerate(known.lasts().items()) if everything or i % self.LOOKS == part]
        users = [user for i, user in enumerate(known.users()) if everything or i % self.LOOKS == part]
        await self._way()
        heads = [(conv, last + 1) for conv, last in lasts if len(self._seen(conv)) > last]
        rows: list[tuple[str, str]] = []
        for user in users:
            before, now = self._revs.get(user), self.db.revs.get(user, 0)
            self._revs[user] = now
            if before is not None and now > before:
                mine = ((c, row) for (c, u), row in self.db.rows.items() if u == user)
                rows += [(user, conv) for conv, row in mine if row.own_rev > before - self.SLACK]
        await self._back()
        return Changes(0, heads, rows, [], [])

    async def memberships(self, user: str, since: int | None = None) -> Memberships:
        await self._way()
        rev = self.db.revs.get(user, 0)
        self._revs.setdefault(user, rev)
        found = Memberships(max(0, rev - self.SLACK), *self._rows(user, since, lambda row: row.own_rev))
        await self._back()
        return found

    def _view(self, conv: str, user: str) -> View:
        own_rev = self.db.rows[conv, user].own_rev
        return msgspec.structs.replace(super()._view(conv, user), rev=own_rev, head_id=2**53 - 1)
