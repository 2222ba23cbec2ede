"""A log written straight into its file, and what is true of it: for tests of the readers and of the index."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import msgspec

from chatcore.protocol import MEMBER_ROLES, encode_entry
from chatcore.store.base import Changes, Entry, Memberships, Page, Peer, View
from chatcore.store.sqlite.schema import connect, database_path, prepare


class Row(msgspec.Struct):
    """A row of a member, with the read mark as it is in truth, not in the file."""

    role: str
    read: int
    msgs: int
    rev: int


class Log(msgspec.Struct):
    """A conversation: its entries, and the (id, msgs) of each."""

    n: int
    entries: list[Entry] = []
    ids: list[int] = []


class World:
    """Writes as the writer does, but what a test wants: one change in each transaction."""

    def __init__(self, data: Path, seed: int = 0, convs: int = 4, users: int = 4) -> None:
        prepare(data)
        self.random = random.Random(seed)
        self.db = connect(database_path(data), write=True)
        self.db.execute("PRAGMA synchronous = OFF")
        self.position = self.folded = 0
        self.logs: dict[str, Log] = {}
        self.users = [f"user{i}" for i in range(users)]
        self.rows: dict[tuple[str, str], Row] = {}
        #: Read marks that are not in the rows of the file: (id, conv, user, seq, msgs, whether set by the user).
        self.unfolded: list[tuple[int, str, str, int, int, bool]] = []
        #: Changed rows: (id, user, conv).
        self.changed: list[tuple[int, str, str]] = []
        self._cids = itertools.count()
        self._numbers: dict[str, int] = {}
        for user in self.users:
            self.db.execute(
                "INSERT INTO users(id, name, name_key, password, created) VALUES (?1, ?1, ?1, '', 0)", (user,)
            )
        for i in range(convs):
            self.open(f"conv{i}")

    def close(self) -> None:
        self.db.close()

    # --- writing --------------------------------------------------------------------------
    def number(self, id: str) -> int:
        if id not in self._numbers:
            rows = self.db.execute("INSERT INTO ids(id) VALUES (?) RETURNING n", (id,)).fetchall()
            self._numbers[id] = rows[0][0]
        return self._numbers[id]

    def tick(self) -> int:
        self.position += 1
        return self.position

    def open(self, conv: str) -> None:
        """A conversation with a first entry, in which all users but the last are members."""
        with self.db:
            self.db.execute(
                "INSERT INTO convs(id, kind, title, created, members) VALUES (?, 'group', ?, 0, ?)",
                (conv, f"about {conv}", len(self.users) - 1),
            )
            self.logs[conv] = Log(self.number(conv))
        self.append(conv, self.users[0], "meta")
        for user in self.users[:-1]:
            self.set_role(conv, user, "member")

    def append(self, conv: str, sender: str, t: str = "msg") -> None:
        """An entry. It says nothing of what happens to rows."""
        log = self.logs[conv]
        before = log.entries[-1] if log.entries else None
        msgs, last = (before.msgs, before.last_msg) if before else (0, 0)
        seq = len(log.entries) + 1
        if t == "msg":
            msgs, last = msgs + 1, seq
        id, cid, fields = self.tick(), f"cid{next(self._cids)}", b'{"body":"%d"}' % self.position
        with self.db:
            self.db.execute(
                "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (id, log.n, seq, t, self.number(sender), msgs, last, cid, b"12345678", id, fields.decode()),
            )
        log.ids.append(id)
        wire = encode_entry(t, conv, seq, sender, id, cid, fields)
        log.entries.append(Entry(conv, seq, t, sender, msgs, last, wire))
        if t == "msg":
            self._mark(id, conv, sender, seq, msgs, False)

    def _mark(self, id: int, conv: str, user: str, seq: int, msgs: int, explicit: bool) -> None:
        row = self.rows.get((conv, user))
        if row is not None and row.read < seq:
            row.read, row.msgs = seq, msgs
            if explicit:
                row.rev = id
        self.unfolded.append((id, conv, user, seq, msgs, explicit))

    def set_read(self, conv: str, user: str) -> bool:
        """A user reads on, by some entries; False: there is nothing to read."""
        row = self.rows.get((conv, user))
        log = self.logs[conv]
        if row is None or row.role not in MEMBER_ROLES or row.read == len(log.entries):
            return False
        seq = self.random.randint(row.read + 1, len(log.entries))
        msgs = log.entries[seq - 1].msgs
        id = self.tick()
        with self.db:
            self.db.execute("INSERT INTO row_changes VALUES (?, ?, ?, ?, ?)", (id, log.n, self.number(user), seq, msgs))
        self._mark(id, conv, user, seq, msgs, True)
        self.changed.append((id, user, conv))
        return True

    def set_role(self, conv: str, user: str, role: str) -> None:
        """Into the row alone, as in a channel. Who comes in has read everything."""
        log = self.logs[conv]
        old = self.rows.get((conv, user))
        id, head = self.tick(), log.entries[-1]
        row = Row(role, head.seq, head.msgs, id)
        if old is not None and not (role in MEMBER_ROLES and old.role not in MEMBER_ROLES):
            row.read, row.msgs = old.read, old.msgs
        self.rows[(conv, user)] = row
        with self.db:
            if old is None or row.read != old.read:
                self.db.execute(
                    "REPLACE INTO members(conv, user, role, as_of, read, read_msgs, rev) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (conv, user, role, head.seq, row.read, row.msgs, id),
                )
            else:
                self.db.execute(
                    "UPDATE members SET role = ?, rev = ? WHERE conv = ? AND user = ?", (role, id, conv, user)
                )
            self.db.execute("INSERT INTO row_changes VALUES (?, ?, ?, NULL, NULL)", (id, log.n, self.number(user)))
        self.changed.append((id, user, conv))

    def fold(self, upto: int | None = None) -> None:
        """Bring the marks up to a position into the rows."""
        self.folded = upto = self.position if upto is None else upto
        with self.db:
            for id, conv, user, seq, msgs, explicit in self.unfolded:
                if id <= upto:
                    self.db.execute(
                        "UPDATE members SET read = ?1, read_msgs = ?2, rev = max(rev, ?3)"
                        " WHERE conv = ?4 AND user = ?5 AND read < ?1",
                        (seq, msgs, id if explicit else 0, conv, user),
                    )
            self.db.execute("UPDATE meta SET value = ? WHERE key = 'folded'", (upto,))
        self.unfolded = [mark for mark in self.unfolded if mark[0] > upto]

    def trim(self, upto: int) -> None:
        """Delete changes that are folded."""
        with self.db:
            self.db.execute("DELETE FROM row_changes WHERE id <= ?", (upto,))
            self.db.execute("UPDATE meta SET value = ? WHERE key = 'trimmed'", (upto,))

    def something(self) -> None:
        """One random change."""
        conv = self.random.choice(list(self.logs))
        user = self.random.choice(self.users)
        match self.random.randrange(10):
            case 0:
                self.set_role(conv, user, self.random.choice(["member", "none", "admin"]))
            case 1 | 2 | 3:
                self.set_read(conv, user)
            case 4:
                self.append(conv, user, "meta")
            case _:
                self.append(conv, user)

    # --- what is true -----------------------------------------------------------------------
    def page(self, conv: str, before: int | None, after: int | None, limit: int) -> Page:
        log = self.logs[conv].entries
        found = [e for e in log if (before is None or e.seq < before) and (after is None or e.seq > after)]
        taken = found[:limit] if after is not None else found[-limit:]
        return Page(taken, len(found) > limit, len(log))

    def views(self, user: str) -> list[View]:
        found = []
        for (conv, who), row in self.rows.items():
            if who == user and row.role in MEMBER_ROLES:
                log = self.logs[conv]
                head = log.entries[-1]
                last = log.entries[head.last_msg - 1].wire if head.last_msg else None
                unread = head.msgs - row.msgs
                title = f"about {conv}"
                members = len(self.users) - 1  # the column is not what this is about
                mine = (row.role, members, "all", head.seq, row.read, unread, last, row.rev, log.ids[-1])
                found.append(View(conv, "group", title, None, None, *mine))
        return sorted(found, key=lambda view: -view.head_id)

    def members(self, conv: str) -> list[Peer]:
        return sorted(
            (
                Peer(user, row.role, row.read)
                for (c, user), row in self.rows.items()
                if c == conv and row.role in MEMBER_ROLES
            ),
            key=lambda peer: peer.user,
        )

    def memberships(self, user: str, since: int) -> Memberships:
        mine = {conv: row for (conv, who), row in self.rows.items() if who == user}
        return Memberships(
            self.position,
            {conv: row.rev for conv, row in mine.items() if row.role in MEMBER_ROLES},
            [conv for conv, row in sorted(mine.items()) if row.role not in MEMBER_ROLES and row.rev > since],
        )

    def changes(self, after: int) -> Changes:
        heads = {conv: len(log.entries) for conv, log in self.logs.items() if log.ids[-1] > after}
        rows = {(user, conv) for id, user, conv in self.changed if id > after}
        return Changes(self.position, sorted(heads.items()), sorted(rows), [], [])
