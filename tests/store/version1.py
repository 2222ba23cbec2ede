"""Folders as programs before schema version 2 left them: their tables, and a writer that keeps their rules."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import apsw

#: As those programs made the file. It describes existing folders, and does not change.
DDL: Final = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE users(
  id TEXT PRIMARY KEY, name TEXT NOT NULL, name_key TEXT NOT NULL UNIQUE, password TEXT NOT NULL,
  created INTEGER NOT NULL, disabled INTEGER NOT NULL DEFAULT 0, seen INTEGER
) WITHOUT ROWID;
CREATE TABLE tokens(
  hash BLOB PRIMARY KEY, user TEXT NOT NULL, created INTEGER NOT NULL, expires INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX tokens_user ON tokens(user);
CREATE INDEX tokens_expires ON tokens(expires);
CREATE TABLE revocations(rev INTEGER PRIMARY KEY, token BLOB, user TEXT);
CREATE TABLE convs(
  id TEXT PRIMARY KEY, kind TEXT NOT NULL, title TEXT, title_key TEXT, a TEXT, b TEXT,
  created INTEGER NOT NULL, members INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX convs_channels ON convs(title_key, id) WHERE kind = 'channel';
CREATE TABLE entries(
  id INTEGER PRIMARY KEY, conv TEXT NOT NULL, seq INTEGER NOT NULL, t TEXT NOT NULL, sender TEXT NOT NULL,
  cid TEXT NOT NULL, digest TEXT NOT NULL, ts INTEGER NOT NULL, msgs INTEGER NOT NULL, last_msg INTEGER NOT NULL,
  fields TEXT NOT NULL
);
CREATE UNIQUE INDEX entries_seq ON entries(conv, seq);
CREATE UNIQUE INDEX entries_cid ON entries(conv, sender, cid);
CREATE TABLE members(
  conv TEXT NOT NULL, user TEXT NOT NULL, role TEXT NOT NULL, as_of INTEGER NOT NULL, read INTEGER NOT NULL,
  read_msgs INTEGER NOT NULL, notify TEXT NOT NULL DEFAULT 'all', rev INTEGER NOT NULL, PRIMARY KEY(conv, user)
) WITHOUT ROWID;
CREATE INDEX members_user ON members(user, conv, role);
CREATE UNIQUE INDEX members_rev ON members(rev);
CREATE TABLE blocks(user TEXT NOT NULL, other TEXT NOT NULL, PRIMARY KEY(user, other)) WITHOUT ROWID;
"""

#: The queue's tables of then: other parts' tables are copied whatever they are.
QUEUE_DDL: Final = """
CREATE TABLE IF NOT EXISTS queue_topics(
  topic TEXT PRIMARY KEY, depth INTEGER NOT NULL DEFAULT 0, delayed INTEGER NOT NULL DEFAULT 0,
  retries INTEGER NOT NULL DEFAULT 0, dead INTEGER NOT NULL DEFAULT 0, dead_lost INTEGER NOT NULL DEFAULT 0,
  fence INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS queue_messages(
  place INTEGER PRIMARY KEY, id TEXT NOT NULL, topic TEXT NOT NULL, key TEXT NOT NULL, payload BLOB NOT NULL,
  created INTEGER NOT NULL, since INTEGER NOT NULL, deliveries INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS queue_messages_key ON queue_messages(topic, key, place);
CREATE INDEX IF NOT EXISTS queue_messages_topic ON queue_messages(topic, place);
"""

APPLICATION_ID: Final = 0x63686174
VERSION: Final = 1
ROLES: Final = ("member", "admin", "owner")


class RefusedByOld(Exception):
    """What a program of then says to a file that is not its own."""


class OldProgram:
    """Writes into a folder as a program of then did: WAL, one counter for entries, members and revocations."""

    def __init__(self, data: Path) -> None:
        path = data / "chatcore.db"
        fresh = not path.exists()
        self.db = apsw.Connection(str(path))
        self.db.wal_autocheckpoint(0)
        self.db.execute("PRAGMA synchronous = OFF")  # no test here takes the power away
        if fresh:
            self.db.execute("PRAGMA journal_mode = WAL")
            with self.db:
                self.db.execute(DDL)
                self.db.execute("INSERT INTO meta VALUES ('store_id', 'an-old-store'), ('secret', ?)", (b"s" * 32,))
                self.db.execute(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION}")
            path.chmod(0o600)
        self._verify(path)
        if self.db.pragma("journal_mode") != "wal":
            self.db.execute("PRAGMA journal_mode = WAL")

    def _verify(self, path: Path) -> None:
        """The check that those programs made at their start."""
        if self.db.pragma("application_id") != APPLICATION_ID:
            raise RefusedByOld(f"{path} is not a chatcore database")
        version = self.db.pragma("user_version")
        if version != VERSION:
            raise RefusedByOld(f"{path} has schema version {version}; this program needs {VERSION}")

    def __enter__(self) -> OldProgram:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.db.close()

    def one(self, sql: str, *args: Any) -> Any:
        row = self.db.execute(sql, args).fetchone()
        return row[0] if row is not None and len(row) == 1 else row

    def tick(self) -> int:
        position = self.one(
            "SELECT max((SELECT coalesce(max(id), 0) FROM entries), (SELECT coalesce(max(rev), 0) FROM members),"
            " (SELECT coalesce(max(rev), 0) FROM revocations))"
        )
        return int(position) + 1

    def user(self, name: str) -> str:
        id = f"u-{name.encode('ascii', 'ignore').decode()}"
        self.db.execute("INSERT INTO users VALUES (?, ?, ?, 'hash', 1000, 0, NULL)", (id, name, name.casefold()))
        return id

    def conversation(self, conv: str, kind: str, title: str | None, *users: str) -> str:
        """With its first entries; the first user is the creator, who owns a group or channel."""
        a, b = sorted(users) if kind == "dm" else (None, None)
        with self.db:
            self.db.execute(
                "INSERT INTO convs(id, kind, title, title_key, a, b, created) VALUES (?, ?, ?, ?, ?, ?, 1000)",
                (conv, kind, title, title and title.casefold(), a, b),
            )
            for i, user in enumerate(users):
                self.change(conv, users[0], user, "owner" if kind != "dm" and not i else "member")
            if title is not None:
                self.title(conv, users[0], title)
        return conv

    def entry(self, conv: str, sender: str, t: str, fields: dict[str, Any], cid: str | None = None) -> tuple[int, int]:
        """Append one; its seq and the number of messages up to it."""
        head = self.one("SELECT seq, msgs, last_msg FROM entries WHERE conv = ? ORDER BY seq DESC LIMIT 1", conv)
        seq, msgs, last = head or (0, 0, 0)
        seq += 1
        if t == "msg":
            msgs, last = msgs + 1, seq
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
        # Version 0.1 hashed the fields alone; later ones with the type as the key.
        digest = hashlib.blake2b(text.encode(), key=b"" if seq % 2 else t.encode(), digest_size=8).hexdigest()
        self.db.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (self.tick(), conv, seq, t, sender, cid or f"{conv}-{seq}", digest, 1000 + seq, msgs, last, text),
        )
        return seq, msgs

    def send(self, conv: str, sender: str, body: str, cid: str | None = None) -> int:
        with self.db:
            seq, msgs = self.entry(conv, sender, "msg", {"body": body}, cid)
            self.db.execute(
                "UPDATE members SET read = ?, read_msgs = ? WHERE conv = ? AND user = ?", (seq, msgs, conv, sender)
            )
        return seq

    def title(self, conv: str, sender: str, title: str) -> None:
        self.entry(conv, sender, "meta", {"title": title})
        self.db.execute("UPDATE convs SET title = ?, title_key = ? WHERE id = ?", (title, title.casefold(), conv))

    def change(self, conv: str, sender: str, user: str, role: str) -> None:
        """A role by an entry."""
        with self.db:
            self.role(conv, user, role, *self.entry(conv, sender, "member", {"user": user, "role": role}))

    def by_oneself(self, conv: str, user: str, role: str) -> None:
        """Join or leave a channel: the row alone."""
        with self.db:
            head = self.one("SELECT seq, msgs FROM entries WHERE conv = ? ORDER BY seq DESC LIMIT 1", conv)
            self.role(conv, user, role, *head)

    def role(self, conv: str, user: str, role: str, as_of: int, msgs: int) -> None:
        before = self.one("SELECT role FROM members WHERE conv = ? AND user = ?", conv, user)
        was, is_, rev = before in ROLES, role in ROLES, self.tick()
        if before is None or (is_ and not was):
            self.db.execute("DELETE FROM members WHERE conv = ? AND user = ?", (conv, user))
            self.db.execute(
                "INSERT INTO members(conv, user, role, as_of, read, read_msgs, rev) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (conv, user, role, as_of, as_of, msgs, rev),
            )
        else:
            self.db.execute(
                "UPDATE members SET role = ?, as_of = ?, rev = ? WHERE conv = ? AND user = ?",
                (role, as_of, rev, conv, user),
            )
        self.db.execute("UPDATE convs SET members = members + ? WHERE id = ?", (is_ - was, conv))

    def read(self, conv: str, user: str, upto: int) -> None:
        if upto <= self.one("SELECT read FROM members WHERE conv = ? AND user = ?", conv, user):
            return
        with self.db:
            msgs = self.one("SELECT msgs FROM entries WHERE conv = ? AND seq = ?", conv, upto)
            self.db.execute(
                "UPDATE members SET read = ?, read_msgs = ?, rev = ? WHERE conv = ? AND user = ?",
                (upto, msgs, self.tick(), conv, user),
            )

    def revoke(self, token: bytes | None, user: str | None) -> None:
        with self.db:
            self.db.execute("INSERT INTO revocations VALUES (?, ?, ?)", (self.tick(), token, user))


def fill(data: Path, messages: int = 60) -> None:
    """A folder with something of everything."""
    with OldProgram(data) as old:
        ann, bob, eve, zoe = (old.user(name) for name in ("Ann", "Bob", "Eve", "Zoéy"))
        team = old.conversation("team-conv-id", "group", "Team", ann, bob, eve)
        lobby = old.conversation("lobby-conv-id", "channel", "Lobby", ann)
        dm = old.conversation("dm-conv-id", "dm", None, ann, bob)
        # The record of which dm a cid made: no conversation.
        old.db.execute("INSERT INTO convs VALUES ('record-id', 'dm_request', NULL, NULL, ?, ?, 1000, 0)", (ann, bob))
        old.by_oneself(lobby, bob, "member")
        old.by_oneself(lobby, zoe, "member")
        for n in range(messages):
            conv = (team, lobby, dm)[n % 3]
            old.send(conv, (ann, bob)[n // 3 % 2], f"message {n} ☃")
            if n == messages // 2:
                old.change(team, ann, bob, "admin")
                old.change(team, bob, eve, "none")
                old.change(lobby, ann, zoe, "banned")
                old.title(lobby, ann, "Straße")
                old.read(team, bob, 3)
        old.by_oneself(lobby, bob, "none")
        with old.db:
            old.db.execute("INSERT INTO tokens VALUES (?, ?, 1000, 99000), (?, ?, 1000, 98000)", (b"1", ann, b"2", bob))
            old.db.execute("INSERT INTO blocks VALUES (?, ?)", (bob, eve))
            old.db.execute("UPDATE users SET disabled = 1, seen = 5000 WHERE id = ?", (eve,))
            old.db.execute("UPDATE members SET notify = 'none', rev = ? WHERE user = ?", (old.tick(), zoe))
            old.db.execute(QUEUE_DDL)
            old.db.execute("INSERT INTO queue_topics(topic, depth) VALUES ('mail', 1)")
            old.db.execute("INSERT INTO queue_messages VALUES (7, 'id', 'mail', 'key', ?, 1, 2, 3)", (b"\0payload",))
        old.revoke(b"3", None)
        old.read(lobby, ann, old.one("SELECT max(seq) FROM entries WHERE conv = ?", lobby))
