"""chatcore itself: ``chatcore serve`` with the embedded store, every message durable before it is acknowledged.

Accounts, tokens, conversations and members are seeded by the store's own operations: registering thousands of users
by HTTP would measure argon2.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import apsw

from chatcore import __version__
from chatcore.accounts.service import token_hash
from chatcore.entries import MsgFields, new_entry
from chatcore.store.base import Opening
from chatcore.store.sqlite import accounts, ops
from chatcore.store.sqlite.schema import connect, database_path, prepare

from ..machine import commit
from .base import BODY, CID, REQUEST_ID, Peer, Send, Step, Wait, World

#: Limits that protect a server from a client that sends like a benchmark.
RAISED = {
    "rates.messages_per_s": "100000",
    "rates.messages_burst": "100000",
    "limits.connections_per_worker": "19000",
    "limits.outstanding": "256",
    "timeouts.auth_ms": "600000",  # bare connections are measured, too
}
BATCH = 500
#: As fresh tokens have: older ones are extended when they are used.
TOKEN_MS = 30 * 86_400_000


class Chatcore(Peer):
    name = "chatcore"
    about = "the whole chat path: authenticated, durable (SQLite, synchronous=FULL) before any delivery"
    benches = frozenset({"fanout", "send", "idle", "storm", "history", "users"})
    multi_process = True
    durable = True
    path = "/ws"
    subprotocol = "chatcore.v1"
    ack = '{"t":"ok","id":'
    error = '"t":"error"'

    def __init__(self) -> None:
        self.users: list[str] = []
        self.convs: list[str] = []
        self._tokens: list[str] = []
        self._first: list[int] = []  # entries of each room before its messages

    def seeded_as(self, other: Chatcore) -> None:
        """Take over the users and rooms that another peer has seeded."""
        self.users, self.convs, self._tokens, self._first = other.users, other.convs, other._tokens, other._first

    def missing(self) -> str | None:
        return None

    def versions(self) -> dict[str, str]:
        return {
            "chatcore": __version__,
            "commit": commit(),
            "uvloop": version("uvloop"),
            "sqlite": apsw.sqlite_lib_version(),
            "python": sys.version.split()[0],
        }

    def command(self, port: int, workers: int, data: Path) -> list[str]:
        options = ["--port", str(port), "--workers", str(workers), "--data", str(data)]
        return [sys.executable, "-m", "chatcore", "serve", *options]

    def env(self, workers: int) -> dict[str, str]:
        return {"CHATCORE_" + name.replace(".", "_").upper(): value for name, value in RAISED.items()}

    def settings(self) -> dict[str, str]:
        return dict(RAISED)

    def prepare(self, data: Path, world: World) -> None:
        self._tokens = [secrets.token_urlsafe(32) for _ in range(world.users)]
        prepare(data)
        db = connect(database_path(data), write=True)
        try:
            rows: list[Any] = db.execute("SELECT value FROM meta WHERE key = 'secret'").fetchall()
            db.execute("BEGIN IMMEDIATE")
            tx = ops.Transaction(db, rows[0][0])
            expires = int(time.time() * 1000) + TOKEN_MS
            users = self.users = [accounts.add_user(f"user-{i}", "none")(tx).id for i in range(world.users)]
            for user, token in zip(users, self._tokens, strict=True):
                accounts.add_token(token_hash(token), user, expires, "none")(tx)
            self.convs, self._first = [], []
            for i, members in enumerate(world.rooms):
                self._open(tx, i, [users[member] for member in members])
                entries = world.entries_of[i] if world.entries_of else world.entries
                self._fill(tx, i, [users[member] for member in members], entries)
            db.execute("COMMIT")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            db.close()

    def _open(self, tx: ops.Transaction, room: int, users: list[str]) -> None:
        opening = Opening(users[0], f"perf-{room}", "group", f"room {room}", tuple(users[1:]), b"perf....")
        self.convs.append(ops.open_conversation(opening)(tx).conv)
        self._first.append(len(users) + 1)
        tx.appended.clear()

    def _fill(self, tx: ops.Transaction, room: int, users: list[str], entries: int) -> None:
        conv, body = self.convs[room], MsgFields("x" * 80)
        for start in range(0, entries, BATCH):
            some = range(start, min(entries, start + BATCH))
            ops.append_messages(tx, [new_entry(conv, users[i % len(users)], f"seed-{i}", body) for i in some])
            tx.appended.clear()

    def _auth(self, user: int, **more: object) -> list[Step]:
        text = json.dumps({"t": "auth", "id": 1, "v": 1, "token": self._tokens[user], **more}, separators=(",", ":"))
        return [Send(text), Wait('"t":"ready"', capture='"sync":"')]

    def join(self, user: int, rooms: Sequence[int]) -> list[Step]:
        return self._auth(user)

    def resume(self, user: int, rooms: Sequence[int], have: int) -> list[Step]:
        held = {self.convs[room]: self._first[room] + have for room in rooms}
        return self._auth(user, sync="@CAPTURED@", have=held)

    def send(self, user: int, room: int) -> str:
        return f'{{"t":"send","id":{REQUEST_ID},"c":"{self.convs[room]}","cid":"{CID}","body":"{BODY}"}}'

    def history(self, user: int, room: int, before: int | None = None) -> str:
        bound = "" if before is None else f'"before":{before},'
        return f'{{"t":"history","id":{REQUEST_ID},"c":"{self.convs[room]}",{bound}"limit":50}}'


PEERS = (Chatcore(),)
