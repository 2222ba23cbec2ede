"""The events that a client gives its application, one frozen, typed struct for each kind.

Entries (:class:`Entry` and its subclasses) belong to a conversation's log: each
comes exactly once and in order. All other events are states: the newest one
counts, and each comes at most once.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from ..entries import ENTRY_TYPES

#: What :mod:`chatcore.client` exports of this module.
__all__ = [
    "Conversation",
    "ConversationChanged",
    "ConversationGone",
    "Disconnected",
    "Entry",
    "Event",
    "Gap",
    "MemberChanged",
    "Message",
    "MetaChanged",
    "Presence",
    "ReadMark",
    "Ready",
    "Refused",
    "Reset",
    "Sent",
    "Typing",
    "User",
    "UserChanged",
]

Kind = Literal["dm", "group", "channel"]
Level = Literal["all", "mentions", "none"]
State = Literal["online", "offline"]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """The base of everything that :meth:`chatcore.client.Client.events` yields."""


class User(msgspec.Struct, frozen=True):
    """An account as others see it."""

    id: str
    name: str


class Entry(Event, frozen=True, kw_only=True):
    """One entry of a conversation's log.

    As this very class it is an entry of a type that this version does not know:
    ``raw`` then holds all its fields. ``ts`` is Unix milliseconds by
    the server's clock, for display only.
    """

    conv: str = msgspec.field(name="c")
    seq: int = msgspec.field(name="s")
    sender: str = msgspec.field(name="from", default="")
    ts: int = 0
    cid: str = ""
    type: str = msgspec.field(name="t", default="")
    raw: dict[str, Any] = msgspec.field(default_factory=dict)


class Message(Entry, frozen=True, kw_only=True):
    """A message. ``body`` is None once it was deleted."""

    body: str | None = None
    reply_to: int | None = msgspec.field(name="re", default=None)
    files: list[dict[str, Any]] = msgspec.field(default_factory=list)
    mentions: list[str] = msgspec.field(default_factory=list)
    data: str | None = None


class MemberChanged(Entry, frozen=True, kw_only=True):
    """``user`` now has ``role``: none, banned, member, admin or owner; it ``was`` the one before ("": not known)."""

    user: str
    role: str
    was: str = ""


class MetaChanged(Entry, frozen=True, kw_only=True):
    """The conversation has a new title."""

    title: str = ""


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """The user's own view of a conversation, kept current from pushes and entries.

    ``head`` is the newest seq known to exist, ``read`` the user's own mark,
    ``unread`` and ``mentions`` count others' messages after it. ``members`` is
    as the server sent it last, and counted on by entries. Joining and leaving a channel by
    oneself makes no entry.
    """

    id: str
    kind: str = ""
    title: str = ""
    peer: User | None = None
    role: str = "member"
    members: int = 0
    notify: str = "all"
    head: int = 0
    read: int = 0
    unread: int = 0
    mentions: int = 0
    last: Message | None = None


class ConversationChanged(Event, frozen=True, kw_only=True):
    """A conversation is new to this user, or the view of it changed."""

    conversation: Conversation


class ConversationGone(Event, frozen=True, kw_only=True):
    """The user is no longer in the conversation: forget it."""

    conv: str


class Gap(Event, frozen=True, kw_only=True):
    """Entries ``first`` to ``last`` cannot be had (removed, or lost by the server)."""

    conv: str
    first: int
    last: int


class Reset(Event, frozen=True, kw_only=True):
    """The server's log ends before what was held (restored from a backup?).

    Drop everything after ``upto``: entries go on from there, with seqs that
    were used before.
    """

    conv: str
    upto: int


class Typing(Event, frozen=True, kw_only=True):
    """``user`` is typing; show it for six seconds."""

    conv: str = msgspec.field(name="c")
    user: str


class ReadMark(Event, frozen=True, kw_only=True):
    """``user`` has read everything up to ``upto``."""

    conv: str = msgspec.field(name="c")
    user: str
    upto: int


class Presence(Event, frozen=True, kw_only=True):
    """``user`` is online or offline; ``seen`` is Unix ms of the last sign of life."""

    user: str
    state: str
    seen: int = 0


class UserChanged(Event, frozen=True, kw_only=True):
    """The own account changed."""

    user: User


class Ready(Event, frozen=True, kw_only=True):
    """Connected and in step: all conversations are known.

    ``full`` says that the server sent every conversation anew. Entries missed
    meanwhile may still be coming, each once and in order.
    """

    user: User
    full: bool


class Disconnected(Event, frozen=True, kw_only=True):
    """The connection is gone, or could not be made; it is tried again by itself.

    ``code`` is the WebSocket close code (1006: none was received).
    """

    code: int
    reason: str
    retry_in_s: float
    attempt: int


class Refused(Event, frozen=True, kw_only=True):
    """A message kept from an earlier run was refused for good, and dropped."""

    conv: str
    cid: str
    body: str
    error: Exception


class Sent(msgspec.Struct, frozen=True):
    """A message that is durable. ``dup`` says that an earlier try had arrived."""

    conv: str
    cid: str
    seq: int
    ts: int
    dup: bool = False


_EVENTS: Final = {event.__name__: event for event in (Message, MemberChanged, MetaChanged)}
#: By type, as each type of entry declares it.
_ENTRIES: Final[dict[str, type[Entry]]] = {t: _EVENTS[one.event] for t, one in ENTRY_TYPES.items()}


def entry_from(obj: dict[str, Any]) -> Entry | None:
    """The entry that a push or a page holds; None if it is not even one.

    An unknown type, or a known one that does not look as it should, becomes a
    plain :class:`Entry`, so that its seq counts all the same.
    """
    kind = _ENTRIES.get(obj.get("t", ""))
    if kind is not None:
        try:
            return msgspec.convert(obj, kind)
        except msgspec.ValidationError:
            pass
    try:
        entry = msgspec.convert({k: v for k, v in obj.items() if k != "raw"}, Entry)
    except msgspec.ValidationError:
        return None
    return msgspec.structs.replace(entry, raw=obj)
