"""chatcore itself: ``chatcore serve`` with the embedded store, every message durable before it is acknowledged.

Accounts, tokens, conversations and members are seeded through the store: registering thousands of users by HTTP would
measure argon2.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import sys
import time
from collections.abc import Awaitable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import apsw

from chatcore import __version__
from chatcore.accounts.service import token_hash
from chatcore.entries import MsgFields, new_entry
from chatcore.store.base import Opening
from chatcore.store.sqlite.store import SQLiteStore

from ..machine import commit
from ..store_processes import OWN, host
from .base import BODY, CID, REQUEST_ID, Peer, Send, Step, Wait, World

#: Limits that protect a server from a client that sends like a benchmark.
RAISED = {
    "rates.messages_per_s": "100000",
    "rates.messages_burst": "100000",
    "limits.connections_per_worker": "19000",
    "limits.outstanding": "256",
    "timeouts.auth_ms": "600000",  # bare connections are measured, too
}
#: Requests that are under way at the same time while the data is made.
TOGETHER = 2000
#: As fresh tokens have: older ones are extended when they are used.
TOKEN_MS = 30 * 86_400_000

T = TypeVar("T")


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
        with host(OWN, data), asyncio.Runner() as runner:
            runner.run(self._seed(data, world))

    async def _seed(self, data: Path, world: World) -> None:
        store = SQLiteStore(data, lambda entries: None)
        await store.start()
        made = await together(store.add_user(f"user-{i}", "none") for i in range(world.users))
        users = self.users = [user.id for user in made]
        self._tokens = [secrets.token_urlsafe(32) for _ in users]
        expires = int(time.time() * 1000) + TOKEN_MS
        await together(
            store.add_token(token_hash(token), user, expires, "none")
            for user, token in zip(users, self._tokens, strict=True)
        )
        rooms = [[users[member] for member in members] for members in world.rooms]
        opened = await together(
            store.open(Opening(members[0], f"perf-{i}", "group", f"room {i}", tuple(members[1:]), b"perf...."))
            for i, members in enumerate(rooms)
        )
        self.convs = [conversation.conv for conversation in opened]
        self._first = [len(members) + 1 for members in rooms]
        body = MsgFields("x" * 80)
        await together(
            store.append(new_entry(conv, members[i % len(members)], f"seed-{i}", body))
            for conv, members, entries in zip(
                self.convs, rooms, world.entries_of or [world.entries] * len(rooms), strict=True
            )
            for i in range(entries)
        )
        await store.close()

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


async def together(requests: Iterator[Awaitable[T]]) -> list[T]:
    """The results of all, so many at a time as one worker may ask for."""
    found: list[T] = []
    while some := list(itertools.islice(requests, TOGETHER)):
        found += await asyncio.gather(*some)
    return found


PEERS = (Chatcore(),)
