"""A client of the protocol, as ``protocol.md`` says that it may be, which notices every broken promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from .deliver_wires import ModelReactor, Socket

#: Told of what is wrong.
Complain = Callable[[str], None]


@dataclass
class Held:
    """What a device knows of one conversation. ``pos``: the last seq that it holds (None: not told)."""

    pos: int | None = None
    head: int = 0
    out: bool = False
    #: seq -> the entry as it came.
    entries: dict[int, bytes] = field(default_factory=dict)


class Device:
    """One device of one user; at most one connection at a time."""

    def __init__(self, name: str, user: str, complain: Complain, is_in: Callable[[str, str], bool]) -> None:
        self.name = name
        self.user = user
        self.complain = complain
        self.is_in = is_in
        self.held: dict[str, Held] = {}
        self.sync: str | None = None
        self.only: list[str] | None = None
        self.socket: Socket | None = None
        self.reactor: ModelReactor | None = None
        self.ready = False
        self._told: set[str] = set()  # conversations of which this connection had a `conv`
        self._full = False
        self._lied = False
        self._id = 0
        self._asked: dict[int, str] = {}

    # --- what it sends -----------------------------------------------------
    def auth(self, socket: Socket, lie: int = 0) -> bytes:
        """The first message of a new connection; its ``have`` is too high by a lie."""
        self.socket = socket
        self.ready = False
        self._told = set()
        self._asked = {}
        self._lied = lie > 0
        have = {c: h.pos + lie for c, h in self.held.items() if h.pos is not None and not h.out}
        fields: dict[str, Any] = {"token": self.user, "have": have}
        if self.sync is not None:
            fields["sync"] = self.sync
        if self.only is not None:
            fields["only"] = self.only
        return self.request("auth", **fields)

    def request(self, t: str, **fields: Any) -> bytes:
        self._id += 1
        self._asked[self._id] = t
        return orjson.dumps({"t": t, "id": self._id, **fields})

    def attach(self, only: list[str] | None, with_have: bool) -> bytes:
        """Replace the choice of attached conversations, or (without one) add ``have``."""
        have = {c: h.pos for c, h in self.held.items() if h.pos is not None and not h.out}
        fields: dict[str, Any] = {}
        if only is not None:
            fields["only"] = only
        if with_have and have:
            fields["have"] = have
        if only is not None or "have" not in fields:
            self.only = only
        return self.request("attach", **fields)

    # --- what it gets ------------------------------------------------------
    def receive(self, payload: bytes) -> str | None:
        """One message. Returns what is to be asked again, if it was refused and matters."""
        message = orjson.loads(payload)
        if "s" in message and "c" in message and "id" not in message:
            self._entry(message, payload)
            return None
        match message["t"]:
            case "conv":
                self._conv(message)
            case "ok":
                asked = self._asked.pop(message["id"])
                if asked == "auth":
                    self._full = message["full"]
                elif asked == "ping" and "sync" in message:
                    self.sync = message["sync"]
            case "ready":
                self.ready = True
                self.sync = message["sync"]
                if self._full:
                    for conv in set(self.held) - self._told:
                        del self.held[conv]
            case "error":
                refused = self._asked.pop(message["id"])
                if message["code"] == "internal":
                    self.complain(f"{self.name}: {refused} was answered `internal`")
                return refused if refused in ("auth", "attach") else None
        return None

    def _conv(self, message: dict[str, Any]) -> None:
        conv = message["c"]
        if message["role"] == "none":
            self.held.pop(conv, None)
            return
        self._told.add(conv)
        held = self.held.setdefault(conv, Held())
        held.out = False
        held.head = max(held.head, message["head"])
        if "after" in message:
            if message["after"] > message["head"] and not self._lied:
                self.complain(
                    f"{self.name}: {conv} is attached after {message['after']}, its head is {message['head']}"
                )
            held.pos = message["after"]

    def _entry(self, message: dict[str, Any], payload: bytes) -> None:
        conv, seq = message["c"], message["s"]
        held = self.held.get(conv)
        if held is None:
            # Told that it is out, it may still get what was on its way, up to its removal: it ignores that.
            if self.is_in(conv, self.user):
                self.complain(f"{self.name}: {conv} {seq} came, of which there was no `conv`")
            return
        if held.pos is not None and seq != held.pos + 1:
            what = "came again" if seq <= held.pos else "came after a hole"
            self.complain(f"{self.name}: {conv} {seq} {what}: it holds {held.pos}")
        held.pos = seq
        held.head = max(held.head, seq)
        held.entries[seq] = payload
        if message["t"] == "member" and message["user"] == self.user:
            held.out = message["role"] in ("none", "banned")
