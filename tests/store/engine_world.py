"""The writer's transactions beside a model of what they have to come to, under errors, kills and a lagging index.

:class:`World` drives a real :class:`~chatcore.store.sqlite.engine.Engine` and a real indexer on a real folder, as a
worker would ask, and :class:`Model` does the same by brute force, with the rules of :mod:`chatcore.entries`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import apsw
import msgspec

from chatcore.entries import (
    ENTRY_TYPES,
    MESSAGES,
    ConversationChange,
    Fact,
    MemberFields,
    MetaFields,
    MsgFields,
    NewEntry,
    RoleChange,
    Standing,
    by_oneself,
    change_of,
    new_entry,
)
from chatcore.errors import ChatError, Conflict, Forbidden, NotFound, Unavailable
from chatcore.protocol import MEMBER_ROLES, encode_entry
from chatcore.store.base import Appended, Entry, Memberships, Opened, Opening, Peer, View
from chatcore.store.opening import conversation_id, first_entries, first_members
from chatcore.store.sqlite import client, folding, reads
from chatcore.store.sqlite import engine as engine_module
from chatcore.store.sqlite.accounts import AddUser, Block, SetNotify, SetRead
from chatcore.store.sqlite.engine import Engine, Failed, Superseded
from chatcore.store.sqlite.indexer import Indexer
from chatcore.store.sqlite.ops import Append, OpenConversation
from chatcore.store.sqlite.requests import Request
from chatcore.store.sqlite.schema import connect, database_path, prepare
from chatcore.store.sqlite.tail import Snapshot

#: Small, so that short logs have many portions, slices, runs and levels, and filters of several parts.
SMALL: dict[str, Any] = {"portion": 16, "fan_in": 2, "slice_rows": 5, "filter_part_bytes": 32}
USERS = [f"user{i}" for i in range(5)]
MOST = 6  # conversations of a user
ANY_SIZE = 10**9
FOREVER_S = 10**6


class Once(Request, frozen=True, gc=False):
    """A write that must not be done twice: each leaves a row."""

    user: str

    repeatable = False

    def apply(self, tx: Any) -> None:
        tx.db.execute("INSERT INTO revocations VALUES (?, NULL, ?)", (tx.tick(), self.user))


class Killed(BaseException):
    """The process of the engine is gone in the middle of a transaction."""


class Flaky:
    """A connection whose statements fail as planned.

    The engine's ``plan`` says what happens in the next transactions: (``at``, ``how``) for each; None: nothing.
    ``how`` is "before" (an error in place of the statement), "rollback" (the same, and SQLite has rolled back),
    "after" (at COMMIT alone: it is done, and an error), "kill before" and "kill after".
    """

    def __init__(self, db: apsw.Connection, engine: FlakyEngine) -> None:
        self.db = db
        self.engine = engine
        self.now: tuple[int, str] | None = None
        self.statements = 0
        self.dead = False

    def execute(self, sql: str, args: Any = ()) -> Any:
        if self.dead:
            raise Killed
        if sql == "BEGIN IMMEDIATE":
            engine = self.engine
            self.now = engine.plan.pop(0) if engine.plan else None
            engine.tries.append(Try())
            self.statements = 0
            return self.db.execute(sql)
        self.statements += 1
        if self.now is None or not self.db.in_transaction or sql == "ROLLBACK":
            return self.db.execute(sql, args)
        at, how = self.now
        last = sql == "COMMIT"
        self.engine.tries[-1].reached = last
        if not last and ("after" in how or self.statements < at):
            return self.db.execute(sql, args)
        self.now = None
        engine_module.BATCH_S = self.engine.limit  # type: ignore[misc]
        if "after" in how:
            self.db.execute(sql)
            self.engine.tries[-1].done = True
        if "kill" in how:
            self.dead = True
            raise Killed
        if how == "rollback":
            self.db.execute("ROLLBACK")
            raise apsw.FullError("database or disk is full")
        raise apsw.IOError("disk I/O error")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.db, name)


class Try(msgspec.Struct):
    """A transaction that fails: it came as far as COMMIT, and that was done."""

    reached: bool = False
    done: bool = False


class FlakyEngine(Engine):
    """An engine on a :class:`Flaky` file."""

    #: What takes the place of its parts: (module, name, value).
    parts: ClassVar[tuple[tuple[Any, str, Any], ...]] = ()

    def __init__(self, data: Path) -> None:
        super().__init__(data, tail_entries=10**9)
        self.plan: list[tuple[int, str] | None] = []
        self.tries: list[Try] = []
        #: How long a transaction may take after one that failed.
        self.limit = 0.0
        self.files: list[Any] = []

    def _open_file(self) -> apsw.Connection:
        db = Flaky(super()._open_file(), self)
        db.db.execute("PRAGMA synchronous = OFF")
        self.files.append(db)
        return db  # type: ignore[return-value]

    def vanish(self) -> None:
        """As a killed process: its files are closed, and nothing else is done."""
        for db in self.files:
            db.close(True)
        if self._snapshot is not None:
            self._snapshot.close()


class Row(msgspec.Struct):
    """A row of a member, with its read mark as it is in truth."""

    role: str
    read: int
    msgs: int
    rev: int
    notify: str = "all"


class Stored(msgspec.Struct):
    """An entry: as readers get it, and what a repetition is compared with."""

    id: int
    entry: Entry
    cid: str
    digest: bytes
    fields: bytes


class Conversation(msgspec.Struct):
    kind: str
    users: list[str]
    title: str | None
    log: list[Stored] = []

    @property
    def msgs(self) -> int:
        return self.log[-1].entry.msgs if self.log else 0


class Model:
    """What is committed, and what each request comes to, by brute force."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self.position = 0
        self.convs: dict[str, Conversation] = {}
        self.rows: dict[tuple[str, str], Row] = {}
        self.blocks: set[tuple[str, str]] = set()
        self.onces: list[str] = []
        #: (id, user, conv) of each change of a row.
        self.changed: list[tuple[int, str, str]] = []
        #: The requests for openings that were granted, by creator and cid.
        self.opened: dict[tuple[str, str], Opening] = {}

    def tick(self) -> int:
        self.position += 1
        return self.position

    def apply(self, request: Request) -> Any:
        """The result of a request as its caller gets it, a ChatError included."""
        match request:
            case Append():
                return self.append(request)
            case OpenConversation(opening=opening):
                return self.open(opening)
            case SetRead(user=user, conv=conv, upto=upto):
                return self.set_read(user, conv, upto)
            case SetNotify(user=user, conv=conv, level=level):
                row = self.rows.get((conv, user))
                if row is None or row.role not in MEMBER_ROLES:
                    return NotFound("")
                if row.notify != level:
                    row.notify, row.rev = level, self.row_changed(conv, user)
            case Block(user=user, other=other, on=on):
                (self.blocks.add if on else self.blocks.discard)((user, other))
            case Once(user=user):
                self.tick()
                self.onces.append(user)
        return None

    def row_changed(self, conv: str, user: str) -> int:
        id = self.tick()
        self.changed.append((id, user, conv))
        return id

    def find(self, conv: str, sender: str, cid: str) -> Stored | None:
        found = [s for s in self.convs[conv].log if (s.entry.sender, s.cid) == (sender, cid)]
        assert len(found) < 2
        return found[0] if found else None

    def append(self, r: Append) -> Any:
        c = self.convs.get(r.conv)
        if c is not None and (found := self.find(r.conv, r.sender, r.cid)):
            if found.digest != r.digest:
                return Conflict("")
            return Appended(found.entry.seq, 0, True)
        e = NewEntry(r.conv, r.sender, r.cid, r.t, r.fields, r.digest, change_of(r.t, r.fields))
        standing = self.standing(e)
        rule = ENTRY_TYPES[e.t].rule
        while isinstance(decision := rule(e, standing), Fact):
            self.load(decision, e, standing)
        if decision is None:
            return Appended(0, 0)
        if isinstance(decision, ChatError):
            return decision
        if standing.kind == "channel" and by_oneself(e):
            self.change(e.conv, decision.change)
            return Appended(0, 0)
        return Appended(self.write(decision), 0)

    def standing(self, e: NewEntry) -> Standing:
        c = self.convs.get(e.conv)
        if c is None:
            return Standing(None, None)
        found = Standing(c.kind, self.role(e.conv, e.sender), members=self.members(e.conv), max_conversations=MOST)
        if c.kind == "dm":
            found.blocked = any((user, e.sender) in self.blocks for user in c.users if user != e.sender)
        if isinstance(e.change, RoleChange):
            found.user_role = self.role(e.conv, e.change.user)
        return found

    def load(self, fact: Fact, e: NewEntry, standing: Standing) -> None:
        assert isinstance(e.change, RoleChange)
        user = e.change.user
        standing.owners = sum(row.role == "owner" for (conv, _), row in self.rows.items() if conv == e.conv)
        standing.user_exists = user in USERS
        standing.user_conversations = self.conversations(user)
        standing.user_blocks = (user, e.sender) in self.blocks

    def role(self, conv: str, user: str) -> str | None:
        row = self.rows.get((conv, user))
        return None if row is None else row.role

    def members(self, conv: str) -> int:
        return sum(row.role in MEMBER_ROLES for (c, _), row in self.rows.items() if c == conv)

    def conversations(self, user: str) -> int:
        return sum(row.role in MEMBER_ROLES for (_, u), row in self.rows.items() if u == user)

    def write(self, e: NewEntry) -> int:
        c = self.convs[e.conv]
        seq = len(c.log) + 1
        message = e.t in MESSAGES
        msgs = c.msgs + message
        last = seq if message else c.log[-1].entry.last_msg if c.log else 0
        id = self.tick()
        c.log.append(Stored(id, Entry(e.conv, seq, e.t, e.sender, msgs, last, b""), e.cid, e.digest, e.fields))
        if message:
            row = self.rows[e.conv, e.sender]
            row.read, row.msgs = seq, msgs
        self.change(e.conv, e.change)
        return seq

    def change(self, conv: str, change: Any) -> None:
        c = self.convs[conv]
        match change:
            case ConversationChange(title=title):
                c.title = title
            case RoleChange(user=user, role=role):
                before = self.rows.get((conv, user))
                rev = self.row_changed(conv, user)
                row = Row(role, len(c.log), c.msgs, rev)
                if before is not None:
                    row.notify = before.notify
                    if role not in MEMBER_ROLES or before.role in MEMBER_ROLES:
                        row.read, row.msgs = before.read, before.msgs
                self.rows[conv, user] = row

    def open(self, o: Opening) -> Any:
        conv = conversation_id(self.secret, o)
        made = self.opened.get((o.creator, o.cid))
        if made is not None and (made.kind == "dm") != (o.kind == "dm"):
            return Conflict("")
        if made is not None and (made.members if o.kind == "dm" else made.digest) != (
            o.members if o.kind == "dm" else o.digest
        ):
            return Conflict("")
        if conv in self.convs:
            return Opened(conv, False)
        users = first_members(o)
        for user in users:
            if self.conversations(user) >= MOST or (user != o.creator and (user, o.creator) in self.blocks):
                return Forbidden("")
        self.opened[o.creator, o.cid] = o
        self.convs[conv] = Conversation(o.kind, users, o.title)
        for e in first_entries(conv, o, users):
            self.write(e)
        return Opened(conv, True)

    def set_read(self, user: str, conv: str, upto: int) -> Any:
        row = self.rows.get((conv, user))
        if row is None or row.role not in MEMBER_ROLES:
            return NotFound("")
        log = self.convs[conv].log
        if upto > len(log):
            return NotFound("")
        if upto <= row.read:
            return False
        row.read, row.msgs, row.rev = upto, log[upto - 1].entry.msgs, self.row_changed(conv, user)
        return True

    # --- as readers see it --------------------------------------------------------------------
    def entries(self, conv: str) -> list[Entry]:
        return [stored.entry for stored in self.convs[conv].log]

    def views(self, user: str) -> list[View]:
        found = []
        for (conv, who), row in self.rows.items():
            if who != user or row.role not in MEMBER_ROLES:
                continue
            c = self.convs[conv]
            head = c.log[-1]
            other = next((u for u in c.users if u != user), None) if c.kind == "dm" else None
            last = c.log[head.entry.last_msg - 1].entry.wire if head.entry.last_msg else None
            mine = (row.role, self.members(conv), row.notify, head.entry.seq, row.read, c.msgs - row.msgs, last)
            found.append(View(conv, c.kind, c.title, other, other, *mine, row.rev, head.id))
        return sorted(found, key=lambda view: -view.head_id)

    def peers(self, conv: str) -> list[Peer]:
        rows = sorted((user, row) for (c, user), row in self.rows.items() if c == conv and row.role in MEMBER_ROLES)
        return [Peer(user, row.role, row.read) for user, row in rows]

    def memberships(self, user: str, since: int) -> Memberships:
        mine = {conv: row for (conv, who), row in self.rows.items() if who == user}
        return Memberships(
            self.position,
            {conv: row.rev for conv, row in mine.items() if row.role in MEMBER_ROLES},
            sorted(conv for conv, row in mine.items() if row.role not in MEMBER_ROLES and row.rev > since),
        )


class World:
    """An engine, an indexer, a reader, and the model beside them.

    :param kind: the engine.
    """

    def __init__(self, data: Path, seed: int, kind: type[FlakyEngine] = FlakyEngine) -> None:
        prepare(data)
        self.data = data
        self.kind = kind
        self.random = random.Random(seed)
        self.db = connect(database_path(data), write=False)
        ((secret,),) = self.db.execute("SELECT value FROM meta WHERE key = 'secret'").fetchall()
        self.model = Model(secret)
        self.indexer = Indexer(data, **SMALL)
        self.indexer.open()
        self.snapshot = Snapshot(data)
        self.engine = self.opened()
        self.corpses: list[FlakyEngine] = []
        self.cids = 0
        #: Entries that a worker was told to announce: (conv, seq).
        self.announced: set[tuple[str, int]] = set()
        self.asked: list[Request] = []
        self.counts: dict[str, int] = {}
        replies = self.engine.commit([AddUser(user, user, "hash") for user in USERS])
        assert len(replies) == len(USERS)

    def close(self) -> None:
        self.runs = self.snapshot.index.runs
        for engine in (self.engine, *self.corpses):
            engine.close()
        self.indexer.close()
        self.snapshot.close()
        self.db.close()

    def opened(self) -> FlakyEngine:
        engine = self.kind(self.data)
        engine.open()
        return engine

    # --- asking -------------------------------------------------------------------------------
    def request(self) -> Request:
        """A new one, or one that was made before, exactly or nearly so."""
        r = self.random
        if self.asked and r.random() < 0.25:
            old = r.choice(self.asked)
            if isinstance(old, Append) and r.random() < 0.2:
                return self.message(old.conv, old.sender, old.cid)
            return old
        user, other = r.choice(USERS), r.choice(USERS)
        conv = r.choice([*self.model.convs, "nowhere"]) if r.random() < 0.98 else "nowhere"
        match r.randrange(20):
            case 0:
                kind = r.choice(["dm", "group", "group", "channel"])
                others = {"dm": [other], "group": r.sample(USERS, 3), "channel": []}[kind]
                title = None if kind == "dm" or r.random() < 0.5 else "t"
                if kind == "dm" and other == user:
                    return Block(user, USERS[0], False)
                cid = f"open{r.randrange(12)}"
                opening = Opening(user, cid, kind, title, tuple(others), b"%8d" % r.randrange(4))
                return OpenConversation(opening, MOST)
            case 1 | 2:
                role = r.choice(["member", "member", "none", "banned", "admin", "owner"])
                user = user if r.random() < 0.3 else self.somebody(conv)
                return self.entry(conv, user, MemberFields(other, role))
            case 3:
                return self.entry(conv, user, MetaFields(f"title {r.random()}"))
            case 4 | 5 | 6:
                log = self.model.convs[conv].log if conv in self.model.convs else []
                return SetRead(user, conv, r.randint(0, len(log) + 1))
            case 7:
                return SetNotify(user, conv, r.choice(["all", "none"]))
            case 8:
                return Block(user, other, r.random() < 0.3)
            case 9:
                return Once(user)
            case _:
                return self.message(conv, user if r.random() < 0.1 else self.somebody(conv))

    def somebody(self, conv: str) -> str:
        """Nearly always a member."""
        members = [peer.user for peer in self.model.peers(conv)]
        return self.random.choice(members or USERS)

    def message(self, conv: str, user: str, cid: str | None = None) -> Append:
        return self.entry(conv, user, MsgFields(f"text {self.random.random()}"), cid)

    def entry(self, conv: str, user: str, fields: Any, cid: str | None = None) -> Append:
        self.cids += 1
        e = new_entry(conv, user, cid or f"cid{self.cids}", fields)
        return Append(e.conv, e.sender, e.cid, e.t, e.fields, e.digest, MOST)

    def batch(self) -> list[Request]:
        for _ in range(n := self.random.choice([1, 1, 3, 8, 20, 40])):
            self.asked.append(self.request())
        return self.asked[-n:]

    # --- committing ---------------------------------------------------------------------------
    def write(self, batch: Sequence[Request]) -> None:
        """Ask until all is answered, as a worker does: what a lost writer has not answered is asked again."""
        again = False
        while batch:
            answered = self.commit(batch, again)
            again = answered is None
            batch = batch[answered or 0 :]

    def commit(self, batch: Sequence[Request], again: bool = False) -> int | None:
        """One batch; how many were answered (None: the writer was lost)."""
        r = self.random
        plan = [(r.randint(1, 12), r.choice(FAILURES)) if r.random() < 0.3 else None for _ in range(2)]
        self.engine.plan[:] = plan
        # Each transaction does all, or as little as it can.
        limits = [r.choice([0.0, FOREVER_S]) for _ in range(2)]
        engine_module.BATCH_S = limits[0]  # type: ignore[misc]
        engine_module.LOOK_S = r.choice([0.0, FOREVER_S])  # type: ignore[misc]
        self.engine.limit = limits[1]
        tries = self.engine.tries
        tries.clear()
        replies = None
        try:
            replies = self.engine.commit(batch)
        except Killed:
            self.count("killed")
        except Failed:
            self.count("failed")
        most = unknown = 0
        for i, one in enumerate(tries):
            unknown = most if i and tries[0].reached else 0
            most = max(unknown, _first(batch, limits[i]))
            if one.done:
                self.count("done with an error")
                self.done(batch[:most], again, None, unknown)
        if replies is not None:
            assert len(replies) == most, "some that may be committed were put back"
            self.done(batch[:most], again, replies, unknown)
            return most
        if not self.engine.files[-1].dead:
            return len(batch)
        self.kill()
        return None

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def done(self, batch: Sequence[Request], again: bool, replies: Any, unknown: int = 0) -> None:
        """The model does these; ``replies`` must say the same. Without replies nobody has been told.

        :param unknown: so many may have been done before.
        """
        for i, request in enumerate(batch):
            if i < unknown and not request.repeatable:
                if replies is not None:
                    self.same(request, Unavailable(""), replies[i], [])
                continue
            position = self.model.position
            expected = self.model.apply(request)
            self.complete(position)
            new = [
                (conv, stored.entry.seq)
                for conv, c in self.model.convs.items()
                for stored in reversed(c.log)
                if stored.id > position
            ]
            if replies is None:
                continue
            told: list[Entry] = []
            item = client._Item(request, None, 0.0)  # type: ignore[arg-type]
            item.again = again
            outcome = client._outcome(item, replies[i], told)
            self.same(request, expected, outcome, told)
            for entry in told:
                assert entry in self.model.entries(entry.conv), f"{entry} is announced, and is not in the log"
                self.announced.add((entry.conv, entry.seq))
            if again or i < unknown:
                new += self.entries_of(request, expected)
            missing = [key for key in new if key not in self.announced]
            assert not missing, f"{missing} of {request} are announced by nobody"

    def same(self, request: Request, expected: Any, got: Any, told: list[Entry]) -> None:
        if isinstance(got, msgspec.Struct) and hasattr(got, "error"):
            got = client._outcome(client._Item(request, None, 0.0), got, told)  # type: ignore[arg-type]
        if isinstance(expected, ChatError):
            assert type(got) is type(expected), f"{request}: {got!r}, not {expected!r}"
            return
        if isinstance(expected, Appended):
            assert isinstance(got, Appended), f"{request}: {got!r}, not {expected!r}"
            ts = self.ts(request.conv, expected.seq) if expected.seq else got.ts  # type: ignore[attr-defined]
            expected = msgspec.structs.replace(expected, ts=ts)
        assert got == expected, f"{request}: {got!r}, not {expected!r}"

    def entries_of(self, request: Request, result: Any) -> list[tuple[str, int]]:
        """The entries that a request has appended, now or before."""
        match request, result:
            case Append(conv=conv), Appended(seq=seq) if seq:
                return [(conv, seq)]
            case OpenConversation(opening=o), Opened(conv=conv):
                return [(conv, i + 1) for i in range(len(first_members(o)) + (o.title is not None))]
        return []

    def complete(self, after: int) -> None:
        """New entries in the model get what only the file has, their time."""
        for conv, c in self.model.convs.items():
            for stored in reversed(c.log):
                if stored.id <= after:
                    break
                e = stored.entry
                wire = encode_entry(e.t, conv, e.seq, e.sender, self.ts_of(stored.id), stored.cid, stored.fields)
                stored.entry = msgspec.structs.replace(e, wire=wire)

    def ts_of(self, id: int) -> int:
        found = self.db.execute("SELECT ts FROM entries WHERE id = ?", (id,)).fetchall()
        assert found, f"entry {id} is not in the file"
        return int(found[0][0])

    def ts(self, conv: str, seq: int) -> int:
        return self.ts_of(self.model.convs[conv].log[seq - 1].id)

    # --- what else happens --------------------------------------------------------------------
    def kill(self) -> None:
        self.engine.vanish()
        self.engine = self.opened()

    def usurp(self) -> None:
        """Another writer takes over while this one lives, which must then end."""
        old, self.engine = self.engine, self.opened()
        self.corpses.append(old)
        if self.random.random() < 0.5:
            self.write(self.batch())
        old.plan.clear()
        try:
            old.commit(self.batch())
        except Superseded:
            self.count("superseded")
            return
        raise AssertionError("two writers commit")

    def forget(self) -> None:
        """Memory for what is remembered is short."""
        state = self.engine._state
        caches = [getattr(state, name) for name in ("logs", "roles", "blocks", "ids", "members")]
        for cache in caches:
            if self.random.random() < 0.5:
                cache.clear()

    def step(self) -> None:
        """One random event; nothing of what is true may change but by requests."""
        match self.random.randrange(16):
            case 0:
                self.engine.close()  # as after an error
                self.engine.look()
            case 1:
                self.kill()
            case 2:
                self.usurp()
            case 3 | 4:
                self.forget()
            case 5 | 6:
                for _ in range(self.random.choice([1, 3, 30])):
                    self.indexer.step()
            case 7 | 8:
                self.engine.look()
            case 9:
                self.engine.checkpoint()
                self.ask_for_old_ones()
            case 10 | 11:
                for _ in range(self.random.choice([1, 10])):
                    if self.engine.due:
                        self.engine.plan.clear()
                        self.engine.commit([])
            case _:
                self.write(self.batch())

    def settle(self) -> None:
        """All marks are in rows, and all is indexed and merged."""
        more = True
        while more:
            self.engine.plan.clear()
            self.engine.commit([])
            self.engine.look()
            more = self.indexer.step() or self.engine.due

    # --- what must be true --------------------------------------------------------------------
    def check(self) -> None:
        """The file, and what readers see."""
        model = self.model
        names = dict(self.db.execute("SELECT n, id FROM ids").fetchall())
        found = self.db.execute("SELECT id, conv, seq, t, sender, msgs, last_msg, cid, digest FROM entries").fetchall()
        stored = sorted((s for c in model.convs.values() for s in c.log), key=lambda s: s.id)
        assert [(id, names[n], seq, t, names[sender], *rest) for id, n, seq, t, sender, *rest in found] == [
            (s.id, e.conv, e.seq, e.t, e.sender, e.msgs, e.last_msg, s.cid, s.digest) for s in stored for e in [s.entry]
        ]
        assert [u for (u,) in self.db.execute("SELECT user FROM revocations ORDER BY rev").fetchall()] == model.onces
        folded, trimmed = (self.meta(key) for key in ("folded", "trimmed"))
        assert trimmed <= folded <= model.position
        snapshots = [self.snapshot]
        if self.random.random() < 0.1:
            snapshots.append(Snapshot(self.data))
        for snapshot in snapshots:
            self.see(snapshot, trimmed)
            if snapshot is not self.snapshot:
                snapshot.close()

    def meta(self, key: str) -> int:
        ((value,),) = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchall()
        return int(value)

    def see(self, snapshot: Snapshot, trimmed: int) -> None:
        model, r = self.model, self.random
        assert reads.position(snapshot) == model.position
        convs = list(model.convs)
        assert reads.heads(convs)(snapshot) == {conv: len(model.convs[conv].log) for conv in convs}
        for conv in convs:
            after, limit = r.randint(0, len(model.convs[conv].log)), r.randint(1, 50)
            assert reads.entries(conv, after, limit, ANY_SIZE)(snapshot) == model.entries(conv)[after : after + limit]
            peers = model.peers(conv)
            if peers:
                assert reads.members(peers[0].user, conv, None, 100)(snapshot) == (peers, None)
        since = r.randint(0, model.position)
        for user in USERS:
            assert reads.views(user, None)(snapshot) == (model.position, model.views(user))
            got = reads.memberships(user, since)(snapshot)
            assert msgspec.structs.replace(got, left=sorted(got.left)) == model.memberships(user, since)
        changes = reads.changes(since)(snapshot)
        assert (changes is None) == (since < trimmed)
        if changes is not None:
            assert changes.position == model.position
            heads = {c: len(m.log) for c, m in model.convs.items() if m.log[-1].id > since}
            assert dict(changes.heads) == heads
            assert set(changes.rows) == {(user, conv) for id, user, conv in model.changed if id > since}

    def check_all_cids(self) -> None:
        """Each cid is known, at whatever age, and so is a conflict."""
        for c in self.model.convs.values():
            self.check_cids(c.log)

    def check_cids(self, log: Sequence[Stored]) -> None:
        batch: list[Append] = []
        for stored in log:
            e = stored.entry
            same = Append(e.conv, e.sender, stored.cid, e.t, stored.fields, stored.digest, MOST)
            batch += [same, msgspec.structs.replace(same, digest=b"another!")]
        self.engine.plan.clear()
        engine_module.BATCH_S = FOREVER_S  # type: ignore[misc]
        self.done(batch, False, self.engine.commit(batch))

    def ask_for_old_ones(self) -> None:
        """The index goes on, which the engine has not seen, and cids of any age come again."""
        engine_module.LOOK_S = FOREVER_S  # type: ignore[misc]
        self.engine.look()
        for _ in range(self.random.choice([10, 30, 60])):
            self.indexer.step()
        log = [stored for c in self.model.convs.values() for stored in c.log]
        self.check_cids(self.random.sample(log, min(20, len(log))))


FAILURES = ["before", "rollback", "before", "after", "after", "after", "kill before", "kill after"]


def _first(batch: Sequence[Request], limit: float) -> int:
    """How many of a batch a transaction does: all, or all messages that stand together at its front, or one."""
    if limit or not batch:
        return len(batch)
    n = 0
    while n < len(batch) and isinstance(e := batch[n], Append) and e.t in MESSAGES:
        n += 1
    return n or 1


def play(data: Path, seed: int, monkeypatch: Any, kind: type[FlakyEngine] = FlakyEngine, steps: int = 150) -> World:
    """A random history, checked after each step; the world is closed at the end."""
    for module, name, value in (
        (engine_module, "BATCH_S", FOREVER_S),
        (engine_module, "LOOK_S", 0.0),
        (folding, "FOLD_ROWS", 3),
        (folding, "TRIM_ROWS", 5),
        (folding, "KEEP_CHANGES", 100),
        *kind.parts,
    ):
        monkeypatch.setattr(module, name, value)
    world = World(data, seed, kind)
    try:
        for _ in range(steps):
            world.step()
            world.check()
        world.check_all_cids()
        world.settle()
        world.check()
        world.check_all_cids()
        world.kill()
        world.check_all_cids()
        world.check()
    finally:
        world.close()
    return world
