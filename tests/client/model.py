"""A chat server of a few lines for one user, as docs/protocol.md describes it, and an application.

It has no sockets: messages lie in two queues until a test moves them, so that a
connection can end between any two of them.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import msgspec

from chatcore.client import state
from chatcore.client.core import ClientCore
from chatcore.client.events import Conversation, ConversationGone, Entry, Event, Gap, Reset
from chatcore.client.outbox import Draft, new_cid
from chatcore.client.state import Snapshot

ME = {"id": "u1", "name": "alice"}


class ModelServer:
    """Logs of several conversations; one connection at a time, to user u1."""

    def __init__(self, *, backlog: int = 5, page: int = 3) -> None:
        self.logs: dict[str, list[dict[str, Any]]] = {}
        self.backlog = backlog
        self.page = page
        self.to_client: deque[dict[str, Any]] = deque()
        self.from_client: deque[dict[str, Any]] = deque()
        self.attached = False
        self.syncs: dict[str, dict[str, int]] = {}
        self.refuse = 0
        #: Conversations that u1 was removed from, ever, and now.
        self.removed: set[str] = set()
        self.out: set[str] = set()

    def append(self, conv: str, sender: str, cid: str, *, told: bool = True) -> int:
        """Append a message; not ``told`` is a push that got lost, which must do no harm."""
        log = self.logs.setdefault(conv, [])
        new = {"t": "msg", "c": conv, "s": len(log) + 1, "from": sender, "ts": 1, "cid": cid, "body": cid}
        log.append(new)
        self._tell(conv, new if told else None)
        return len(log)

    def remove(self, conv: str, *, conv_push: bool) -> None:
        """Remove u1. A live session gets the entry, or only the ``conv`` that says the same."""
        entry = self._member(conv, "none")
        self._tell(conv, {"t": "conv", "c": conv, "role": "none"} if conv_push else entry)
        self.out.add(conv)
        self.removed.add(conv)

    def invite(self, conv: str) -> None:
        """Bring u1 back."""
        entry = self._member(conv, "member")
        self.out.discard(conv)
        self._tell(conv, self._conv(conv, len(self.logs[conv]) - 1))
        self._tell(conv, entry)

    def remove_and_invite(self, conv: str) -> None:
        """Both before u1 hears of either: a ``conv`` as of the end comes before the entries."""
        removal = self._member(conv, "none")
        self.removed.add(conv)
        self._member(conv, "member")
        head = len(self.logs[conv])
        self._tell(conv, {k: v for k, v in self._conv(conv, 0).items() if k != "after"})
        self._tell(conv, removal)
        self._tell(conv, self._conv(conv, head - 1))
        self._tell(conv, self.logs[conv][-1])

    def say_view_of_before(self, conv: str, back: int) -> None:
        """A ``conv`` that was read before the newest entries, if no role has changed since."""
        log = self.logs[conv]
        if all(row["t"] == "msg" for row in log[len(log) - back :]):
            self._tell(conv, {"t": "conv", "c": conv, "role": "member", "head": max(0, len(log) - back)})

    def _member(self, conv: str, role: str) -> dict[str, Any]:
        log = self.logs[conv]
        entry = {"t": "member", "c": conv, "s": len(log) + 1, "from": "u2", "ts": 1, "user": ME["id"], "role": role}
        log.append(entry)
        return entry

    def _tell(self, conv: str, push: dict[str, Any] | None) -> None:
        if self.attached and conv not in self.out and push is not None:
            self.to_client.append(push)

    def create(self, conv: str) -> None:
        self.logs[conv] = []
        if self.attached:
            self.to_client.append(self._conv(conv, 0))

    def closed(self) -> None:
        self.attached = False
        self.to_client.clear()
        self.from_client.clear()

    def serve(self) -> None:
        """Answer one request."""
        asked = self.from_client.popleft()
        if asked.get("c") in self.out:
            self.to_client.append({"t": "error", "id": asked["id"], "code": "not_found", "message": ""})
            return
        answer = getattr(self, "_" + asked["t"])(asked)
        if "id" in asked and answer is not None:
            self.to_client.append({"t": "ok", **answer, "id": asked["id"]})

    def _auth(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        before = self.syncs.get(asked.get("sync", ""))
        have = asked.get("have", {}) if before is not None else {}
        self.to_client.append({"t": "ok", "id": asked["id"], "user": ME, "full": before is None, "expires_ms": 10**8})
        self.attached = True
        for conv, log in self.logs.items():
            head = len(log)
            if conv in self.out:
                if before is not None:
                    self.to_client.append({"t": "conv", "c": conv, "role": "none"})
                continue
            if before is not None and before.get(conv) == head and have.get(conv, head) == head:
                continue
            known = have.get(conv)
            after = known if known is not None and known <= head and head - known <= self.backlog else head
            self.to_client.append(self._conv(conv, after))
            self.to_client.extend(log[after:])
        self.to_client.append({"t": "ready", "sync": self._sync()})
        return None

    def _send(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        for old in self.logs[asked["c"]]:
            if (old["from"], old["cid"]) == (ME["id"], asked["cid"]):
                return {"s": old["s"], "ts": 1, "dup": True}
        if self.refuse:
            self.refuse -= 1
            error = {"t": "error", "id": asked["id"], "code": "unavailable", "message": "", "retry_after_ms": 700}
            self.to_client.append(error)
            return None
        return {"s": self.append(asked["c"], ME["id"], asked["cid"]), "ts": 1}

    def _history(self, asked: dict[str, Any]) -> dict[str, Any]:
        log = self.logs[asked["c"]]
        rows = log[asked["after"] :][: min(self.page, asked["limit"])]
        at = rows[-1]["s"] if rows else len(log)
        return {"entries": rows, "more": at < len(log), "at": at}

    def _ping(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"ts": 1, "sync": self._sync()}

    def _sync(self) -> str:
        name = f"sync{len(self.syncs)}"
        self.syncs[name] = {conv: len(log) for conv, log in self.logs.items()}
        return name

    def _conv(self, conv: str, after: int) -> dict[str, Any]:
        head = len(self.logs[conv])
        return {"t": "conv", "c": conv, "kind": "group", "title": conv, "role": "member", "head": head, "after": after}


class App:
    """A core, what its application got, and the saved state; all of one user."""

    def __init__(self, server: ModelServer, seed: int = 0) -> None:
        self.server = server
        self.now = 0.0
        self.got: dict[str, list[int]] = {}
        self.start: dict[str, int] = {}
        self.sent: dict[str, list[str]] = {}
        self.acked: set[str] = set()
        self.inbox: deque[tuple[Event | None, Any]] = deque()
        self.saved = Snapshot()
        self.rng = random.Random(seed)
        self.gen = 0
        self.core = ClientCore("token", self.saved, rng=self.rng)

    def restart(self) -> None:
        """The process ends without a word, and another one goes on from what was saved."""
        self.saved.sends = self.core.unacknowledged
        self.lose()
        self.inbox.clear()
        self.saved = state.decode(state.encode(self.saved))
        self.core = ClientCore("token", self.saved, rng=self.rng)

    def connect(self) -> None:
        if self.core.connect_at is not None:
            self.now = max(self.now, self.core.connect_at)
            self.gen = self.core.connecting()
            self.core.connected(self.gen, self.now)
            self.collect()

    def lose(self, code: int = 1006, reason: str = "") -> None:
        self.server.closed()
        self.core.lost(self.gen, code, reason, self.now)
        self.collect()

    def send(self, conv: str) -> None:
        cid = new_cid()
        self.sent.setdefault(conv, []).append(cid)
        self.core.send(Draft(conv, cid, "x"), lambda reply: self.acked.add(cid), stored=True)
        self.collect()

    def receive(self) -> None:
        """One message from the server arrives."""
        data = msgspec.json.encode(self.server.to_client.popleft())
        self.core.received(self.gen, data, self.now)
        self.collect()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.core.tick(self.now)
        self.collect()
        if self.core.drop:
            self.lose()

    def collect(self) -> None:
        for frame in self.core.take_frames():
            self.server.from_client.append(msgspec.json.decode(frame))
        self.inbox.extend(self.core.take_events())

    def consume(self) -> None:
        """The application takes one event and is through with it."""
        event, progress = self.inbox.popleft()
        match event:
            case ConversationGone():
                self.got.pop(event.conv, None)
                self.start.pop(event.conv, None)
            case Gap() if event.conv in self.server.removed:
                self.got[event.conv] = []
                self.start[event.conv] = event.last + 1
            case Entry():
                start = self.start.setdefault(event.conv, event.seq)
                got = self.got.setdefault(event.conv, [])
                assert event.seq == start + len(got), f"{event.conv}: {event.seq} after {got[-3:]}"
                got.append(event.seq)
            case Gap() | Reset():
                raise AssertionError(f"nothing was lost, and yet: {event}")
        if progress.gone:
            self.saved.have.pop(progress.conv, None)
            self.saved.convs.pop(progress.conv, None)
        if progress.have is not None:
            self.saved.have[progress.conv] = progress.have
            # Where the log begins for this application.
            self.start.setdefault(progress.conv, progress.have + 1)
        if isinstance(progress.view, Conversation):
            self.saved.convs[progress.conv] = progress.view
        if progress.sync is not None:
            self.saved.sync = progress.sync
        if self.core.user_id:
            self.saved.user = self.core.user_id

    def finish(self) -> None:
        """Everything works from here on: run until there is nothing left to do."""
        self.server.refuse = 0
        self.core.set_accepting(True, self.now)
        for _ in range(2000):
            self.connect()
            while self.server.from_client:
                self.server.serve()
            while self.server.to_client:
                self.receive()
            while self.inbox:
                self.consume()
            if (
                not self.server.from_client
                and not self.core.unacknowledged_count
                and not self.core.replica.catchup.behind
            ):
                return
            self.pass_time(0.5)
        raise AssertionError("it never came to rest")
