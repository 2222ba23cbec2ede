"""The user's views of the conversations, folded from ``conv`` pushes and entries."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from .events import Conversation, Entry, MemberChanged, Message, MetaChanged, User, entry_from

_OUT: Final = ("none", "banned")


def is_out(role: str) -> bool:
    """Whoever has this role is not in the conversation."""
    return role in _OUT


class ConvPush(msgspec.Struct):
    """A ``conv`` push; absent fields are unchanged."""

    c: str
    kind: str | None = None
    title: str | None = None
    with_: User | None = msgspec.field(name="with", default=None)
    role: str | None = None
    members: int | None = None
    notify: str | None = None
    head: int | None = None
    read: int | None = None
    unread: int | None = None
    mentions: int | None = None
    last: dict[str, Any] | None = None
    after: int | None = None


_SAME_NAME: Final = ("kind", "title", "role", "members", "notify", "head", "read", "unread", "mentions")


def with_push(view: Conversation | None, push: ConvPush) -> Conversation:
    """The view after a ``conv`` push."""
    changes: dict[str, Any] = {}
    for name in _SAME_NAME:
        value = getattr(push, name)
        if value is not None:
            changes[name] = value
    if push.with_ is not None:
        changes["peer"] = push.with_
    if push.last is not None:
        last = entry_from({"c": push.c, **push.last})
        if isinstance(last, Message):
            changes["last"] = last
    return msgspec.structs.replace(view or Conversation(id=push.c), **changes)


def with_entry(view: Conversation, entry: Entry, me: str) -> Conversation:
    """The view after an entry; entries that the view counted already change nothing."""
    if entry.seq <= view.head:
        return view
    changes: dict[str, Any] = {"head": entry.seq}
    match entry:
        case Message():
            changes["last"] = entry
            if entry.sender == me:
                changes |= {"read": entry.seq, "unread": 0, "mentions": 0}
            else:
                changes["unread"] = view.unread + 1
                if me in entry.mentions:
                    changes["mentions"] = view.mentions + 1
        case MetaChanged():
            changes["title"] = entry.title
        case MemberChanged() if entry.user == me:
            changes["role"] = entry.role
    return msgspec.structs.replace(view, **changes)


def with_mark(view: Conversation, upto: int) -> Conversation:
    """The view after the user read everything up to ``upto``."""
    if upto <= view.read:
        return view
    if upto >= view.head:
        return msgspec.structs.replace(view, read=upto, unread=0, mentions=0)
    # How many of the unread ones lie below is the server's to say.
    return msgspec.structs.replace(view, read=upto)
