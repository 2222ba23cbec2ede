"""What the client knows: the user's conversations, how far it is in each log, and the events to give out.

Pushes and pages go in; events come out, each with its :class:`Progress`: what may be
saved as processed once the application is done with the event, so that a client that
starts again from the saved state misses nothing and repeats nothing.

Membership and role have one order, that of the log. A ``conv`` push is the view as of its
``head``: an own ``member`` entry up to that ``head`` is history, which is given out but
changes neither role nor membership, even if it removes the user (who has come back since).
An own ``member`` entry after ``head`` counts. A ``conv`` that entries have overtaken, because
its ``head`` is lower than an entry that was applied, does not change the role either.
A ``conv`` with role none counts at once.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import msgspec

from ..protocol import MEMBER_ROLES
from .catchup import CatchUp
from .events import (
    Conversation,
    ConversationChanged,
    ConversationGone,
    Entry,
    Event,
    Gap,
    MemberChanged,
    Message,
    MetaChanged,
    Presence,
    ReadMark,
    Ready,
    Reset,
    Typing,
    User,
    UserChanged,
    entry_from,
)

log: Final = logging.getLogger("chatcore.client")

_OUT: Final = ("none", "banned")


def is_out(role: str) -> bool:
    """Whether a user of this role is not in the conversation."""
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
#: The fields of a view that entries change.
_BY_ENTRIES: Final = frozenset({"title", "role", "head", "last"})
#: The fields that count from the read mark to the head.
_BY_MARK: Final = frozenset({"read", "unread", "mentions"})


def with_push(view: Conversation | None, push: ConvPush, *, overtaken: bool = False) -> Conversation:
    """The view after a ``conv`` push.

    :param overtaken: entries after its ``head`` were applied already: what they changed stays.
    """
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
    if view is not None and overtaken:
        kept = _BY_ENTRIES if (push.read or 0) > view.read else _BY_ENTRIES | _BY_MARK
        changes = {name: value for name, value in changes.items() if name not in kept}
    return msgspec.structs.replace(view or Conversation(id=push.c), **changes)


def with_entry(view: Conversation, entry: Entry, me: str) -> Conversation:
    """The view after an entry of the log; entries up to its ``head`` are in it already and change nothing."""
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
        case MemberChanged():
            if entry.user == me:
                changes["role"] = entry.role
            if entry.was:
                changes["members"] = view.members + (entry.role in MEMBER_ROLES) - (entry.was in MEMBER_ROLES)
    return msgspec.structs.replace(view, **changes)


def with_mark(view: Conversation, upto: int) -> Conversation:
    """The view after the user read everything up to ``upto``."""
    if upto <= view.read:
        return view
    if upto >= view.head:
        return msgspec.structs.replace(view, read=upto, unread=0, mentions=0)
    # How many of the unread ones lie below is for the server to say.
    return msgspec.structs.replace(view, read=upto)


class Progress(msgspec.Struct, frozen=True):
    """What to save once an event is processed; absent fields change nothing.

    ``have``: the seq up to which the log of ``conv`` is processed; ``gone``: forget ``conv``.
    """

    conv: str = ""
    have: int | None = None
    view: Conversation | None = None
    gone: bool = False
    sync: str | None = None


class Replica:
    """Conversations, cursors and ``sync`` of one user; outlives connections."""

    def __init__(self, have: dict[str, int], views: dict[str, Conversation], sync: str | None) -> None:
        self.me: User | None = None
        self.views = views
        self.catchup = CatchUp(have)
        #: From the last ``ready`` or ``ping`` reply before which nothing is missing.
        self.sync = sync
        #: False while the application is too slow: entries stay on the server, to be paged.
        self.accepting = True
        self._next_sync: str | None = None
        self._out: list[tuple[Event | None, Progress]] = []
        # Attached by a `conv` with `after` on this connection: its entries come since.
        self._attached: set[str] = set()
        # While every conversation is being sent: those sent so far.
        self._sent: set[str] | None = None
        # Changed while the application was too slow; the event is still due.
        self._changed: dict[str, None] = {}

    def take(self) -> list[tuple[Event | None, Progress]]:
        """The events to give out, in order; one of None only has progress to record."""
        out, self._out = self._out, []
        return out

    def authenticated(self, me: User, full: bool) -> None:
        """A connection begins; ``full``: every conversation is going to be sent."""
        self.me = me
        self._attached.clear()
        self._sent = set() if full else None

    def disconnected(self) -> None:
        """The connection is gone. The next one brings again what waited for ``sync``."""
        self.catchup.disconnected()
        self._next_sync = None

    def set_accepting(self, accepting: bool) -> None:
        """Whether the application can take more events now."""
        self.accepting = accepting
        if accepting:
            for conv in self._changed:
                self._emit_view(conv)
            self._changed.clear()
            self._advance_sync()

    def emit_at_most_once(self, event: Event) -> None:
        """Give out an event that may get lost: it is dropped while the application is too slow."""
        if self.accepting:
            self.emit(event)

    def emit(self, event: Event) -> None:
        """Give out an event that must not be lost."""
        self._out.append((event, Progress()))

    def push(self, obj: dict[str, Any]) -> None:
        """Take in one push. Unknown ones are ignored, malformed ones are logged."""
        try:
            if "s" in obj:
                self._entry(obj)
            else:
                self._state(obj)
        except msgspec.ValidationError as exc:
            log.warning("ignored a malformed %r push: %s", obj.get("t"), exc)
        self._advance_sync()

    def page(self, conv: str, reply: dict[str, Any], now: float) -> None:
        """Take in a page of history that was asked for to fill a hole."""
        rows = reply.get("entries")
        entries = [e for row in rows if (e := entry_from({"c": conv, **row}))] if isinstance(rows, list) else []
        at = reply.get("at")
        self._emit_log(conv, self.catchup.page(conv, entries, at if isinstance(at, int) else 0, now))
        self._advance_sync()

    def page_refused(self, conv: str, retry_at: float | None) -> None:
        """The page was refused, until ``retry_at`` or for good (None)."""
        self._emit_log(conv, self.catchup.refused(conv, retry_at))
        self._advance_sync()

    def synced(self, sync: object) -> None:
        """``sync`` stands for everything sent before it: it counts once all of that is given out."""
        if isinstance(sync, str):
            self._next_sync = sync
        self._advance_sync()

    def read_upto(self, conv: str, upto: int) -> None:
        """This client moved the user's own read mark."""
        view = self.views.get(conv)
        if view is not None and (new := with_mark(view, upto)) is not view:
            self.views[conv] = new
            self._emit_view(conv)

    def left(self, conv: str, seq: int | None) -> None:
        """The user left, by the entry ``seq`` (None: there is no entry), unless a ``conv`` shows a later return."""
        view = self.views.get(conv)
        if view is None or seq is None or view.head <= seq:
            self.forget(conv)

    def forget(self, conv: str) -> None:
        """The user is out of the conversation."""
        cursor = self.catchup.cursors.get(conv)
        if cursor is not None and cursor.behind:
            out: list[Event] = []
            cursor.jump(cursor.want, out)
            self._emit_log(conv, out)
        self.catchup.forget(conv)
        self._attached.discard(conv)
        if self.views.pop(conv, None) is not None or cursor is not None:
            self._emit_view(conv)

    def _state(self, obj: dict[str, Any]) -> None:
        match obj.get("t"):
            case "conv":
                self._conv(msgspec.convert(obj, ConvPush))
            case "ready":
                self._ready(obj)
            case "typing":
                self.emit_at_most_once(msgspec.convert(obj, Typing))
            case "read":
                self.emit_at_most_once(msgspec.convert(obj, ReadMark))
            case "presence":
                self.emit_at_most_once(msgspec.convert(obj, Presence))
            case "user":
                user = msgspec.convert(obj.get("user"), User)
                self.me = user
                self.emit_at_most_once(UserChanged(user=user))
            case _:
                pass

    def _conv(self, push: ConvPush) -> None:
        conv = push.c
        if push.role is not None and is_out(push.role):
            self.forget(conv)
            return
        if self._sent is not None:
            self._sent.add(conv)
        before = self.views.get(conv)
        # The first `conv` of a connection is never overtaken: a lower `head` is a log that went back.
        overtaken = conv in self._attached and before is not None and push.head is not None and push.head < before.head
        self.views[conv] = with_push(before, push, overtaken=overtaken)
        if push.after is not None:
            self._attach(conv, push.after)
        if self.views[conv] != before:
            self._emit_view(conv)

    def _attach(self, conv: str, after: int) -> None:
        """Entries after ``after`` are pushed from here on: see to those before it."""
        known = conv in self.catchup.cursors
        cursor = self.catchup.start(conv, after)
        if not known:
            # Where a conversation begins for this client must be saved too.
            self._out.append((None, Progress(conv=conv, have=after)))
        elif after > cursor.have:
            cursor.want = max(cursor.want, after)
        elif after < cursor.have and conv not in self._attached:
            # Only the first `after` of a connection answers the `have` of this client;
            # a later one may simply have been overtaken by live entries.
            cursor.reset(after)
            self._out.append((Reset(conv=conv, upto=after), Progress(conv=conv, have=after)))
        self._attached.add(conv)
        self.catchup.note(cursor)

    def _ready(self, obj: dict[str, Any]) -> None:
        if self._sent is not None:
            for conv in [c for c in (self.views.keys() | self.catchup.cursors.keys()) if c not in self._sent]:
                self.forget(conv)
        full, self._sent = self._sent is not None, None
        if self.me is not None:
            self.emit_at_most_once(Ready(user=self.me, full=full))
        self.synced(obj.get("sync"))

    def _entry(self, obj: dict[str, Any]) -> None:
        entry = entry_from(obj)
        if entry is None:
            log.warning("ignored a malformed entry: %.200r", obj)
            return
        ends = self._ends_membership(entry)
        if ends and entry.conv not in self.views and entry.conv not in self.catchup.cursors:
            return  # a `conv` with role none came first
        cursor = self.catchup.start(entry.conv, entry.seq - 1)
        out: list[Event] = []
        if ends:
            # The last entry that this client gets: those missing before it cannot be paged any more.
            cursor.jump(entry.seq - 1, out)
            out += cursor.push(entry)
        else:
            out = cursor.push(entry, accept=self.accepting)
        self.catchup.note(cursor)
        self._emit_log(entry.conv, out)

    def _ends_membership(self, entry: Entry) -> bool:
        """Whether the user is out by this entry: not by one up to the ``head`` of the view, which is history."""
        if not isinstance(entry, MemberChanged) or self.me is None or entry.user != self.me.id:
            return False
        view = self.views.get(entry.conv)
        return is_out(entry.role) and (view is None or entry.seq > view.head)

    def _emit_log(self, conv: str, events: list[Event]) -> None:
        """Apply entries to the view and give them out; gaps are given out only."""
        for event in events:
            match event:
                case Entry():
                    ends = self._ends_membership(event)
                    before = self.views.get(conv)
                    view = self._apply(event)
                    self._out.append((event, Progress(conv=conv, have=event.seq, view=view)))
                    if ends:
                        self.forget(conv)
                    elif before and view and (before.role, before.title) != (view.role, view.title):
                        self._emit_view(conv)
                case Gap():
                    self._out.append((event, Progress(conv=conv, have=event.last)))
                case _:
                    self._out.append((event, Progress()))

    def _apply(self, entry: Entry) -> Conversation | None:
        view = self.views.get(entry.conv)
        if view is not None:
            view = self.views[entry.conv] = with_entry(view, entry, self.me.id if self.me else "")
        return view

    def _emit_view(self, conv: str) -> None:
        """Give out a view, or that it is gone; while the application is too slow, later and only the last one."""
        if not self.accepting:
            self._changed[conv] = None
            return
        view = self.views.get(conv)
        if view is not None:
            self._out.append((ConversationChanged(conversation=view), Progress(conv=conv, view=view)))
        else:
            self._out.append((ConversationGone(conv=conv), Progress(conv=conv, gone=True)))

    def _advance_sync(self) -> None:
        """Take over ``sync`` when everything it stands for was given out."""
        if self._next_sync is not None and not self.catchup.behind and not self._changed:
            self.sync, self._next_sync = self._next_sync, None
            self._out.append((None, Progress(sync=self.sync)))
