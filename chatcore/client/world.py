"""What the client knows: its conversations, how far it is in each, and what to tell.

Pushes and pages go in; events with marks come out. A mark says what may be
remembered as done once the application is through with the event, so that a
client that starts again from saved marks misses nothing and repeats nothing.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import msgspec

from .catchup import CatchUp
from .events import (
    Conversation,
    ConversationChanged,
    ConversationGone,
    Entry,
    Event,
    Gap,
    MemberChanged,
    Presence,
    ReadMark,
    Ready,
    Reset,
    Typing,
    User,
    UserChanged,
    entry_from,
)
from .views import ConvPush, is_out, with_entry, with_mark, with_push

log: Final = logging.getLogger("chatcore.client")


class Mark(msgspec.Struct, frozen=True):
    """What to remember when an event is done with; absent fields change nothing."""

    conv: str = ""
    have: int | None = None
    view: Conversation | None = None
    gone: bool = False
    sync: str | None = None


class World:
    """Conversations, cursors and ``sync`` of one user; outlives connections."""

    def __init__(self, have: dict[str, int], views: dict[str, Conversation], sync: str | None) -> None:
        self.me: User | None = None
        self.views = views
        self.catchup = CatchUp(have)
        #: From the last ``ready`` or ``ping`` reply before which nothing is missing.
        self.sync = sync
        #: False while the application is too slow: entries stay on the server, to be paged.
        self.room = True
        self._next_sync: str | None = None
        self._out: list[tuple[Event | None, Mark]] = []
        self._based: set[str] = set()
        self._sent: set[str] | None = None
        self._untold: dict[str, None] = {}

    def take(self) -> list[tuple[Event | None, Mark]]:
        """What to tell the application, in order; an event of None is only to be marked."""
        out, self._out = self._out, []
        return out

    def authenticated(self, me: User, full: bool) -> None:
        """A connection begins; ``full``: every conversation is going to be sent."""
        self.me = me
        self._based.clear()
        self._sent = set() if full else None

    def disconnected(self) -> None:
        """The connection is gone. What waited for ``sync`` will be told of again."""
        self.catchup.disconnected()
        self._next_sync = None

    def set_room(self, room: bool) -> None:
        """Whether the application can take more events now."""
        self.room = room
        if room:
            for conv in self._untold:
                self._tell_view(conv)
            self._untold.clear()
            self._settle()

    def say(self, event: Event) -> None:
        """Tell of something that is told at most once: dropped when there is no room."""
        if self.room:
            self._out.append((event, Mark()))

    def insist(self, event: Event) -> None:
        """Tell of something that must not be lost."""
        self._out.append((event, Mark()))

    def push(self, obj: dict[str, Any]) -> None:
        """Take in one push. Unknown ones are ignored, malformed ones are logged."""
        try:
            if "s" in obj:
                self._entry(obj)
            else:
                self._state(obj)
        except msgspec.ValidationError as exc:
            log.warning("ignored a malformed %r push: %s", obj.get("t"), exc)
        self._settle()

    def page(self, conv: str, reply: dict[str, Any], now: float) -> None:
        """Take in a page of history that was asked for to fill a hole."""
        rows = reply.get("entries")
        entries = [e for row in rows if (e := entry_from({"c": conv, **row}))] if isinstance(rows, list) else []
        at = reply.get("at")
        self._give(conv, self.catchup.page(conv, entries, at if isinstance(at, int) else 0, now))
        self._settle()

    def page_refused(self, conv: str, retry_at: float | None) -> None:
        """The page was refused, until ``retry_at`` or for good (None)."""
        self._give(conv, self.catchup.refused(conv, retry_at))
        self._settle()

    def synced(self, sync: object) -> None:
        """``sync`` stands for all that was sent before it: it counts once all that is given out."""
        if isinstance(sync, str):
            self._next_sync = sync
        self._settle()

    def marked(self, conv: str, upto: int) -> None:
        """The user's own read mark was moved by this client."""
        view = self.views.get(conv)
        if view is not None and (new := with_mark(view, upto)) is not view:
            self.views[conv] = new
            self._tell_view(conv)

    def forget(self, conv: str) -> None:
        """The user is out of the conversation."""
        cursor = self.catchup.cursors.get(conv)
        if cursor is not None and cursor.behind:
            out: list[Event] = []
            cursor.jump(cursor.want, out)
            self._give(conv, out)
        self.catchup.forget(conv)
        self._based.discard(conv)
        if self.views.pop(conv, None) is not None or cursor is not None:
            self._tell_view(conv)

    def _state(self, obj: dict[str, Any]) -> None:
        match obj.get("t"):
            case "conv":
                self._conv(msgspec.convert(obj, ConvPush))
            case "ready":
                self._ready(obj)
            case "typing":
                self.say(msgspec.convert(obj, Typing))
            case "read":
                self.say(msgspec.convert(obj, ReadMark))
            case "presence":
                self.say(msgspec.convert(obj, Presence))
            case "user":
                user = msgspec.convert(obj.get("user"), User)
                self.me = user
                self.say(UserChanged(user=user))
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
        self.views[conv] = with_push(before, push)
        if push.after is not None:
            self._attached(conv, push.after)
        if self.views[conv] != before:
            self._tell_view(conv)

    def _attached(self, conv: str, after: int) -> None:
        """Entries after ``after`` are pushed from here on: see to what lies before it."""
        known = conv in self.catchup.cursors
        cursor = self.catchup.start(conv, after)
        if not known:
            # Where a conversation begins for this client must be remembered too.
            self._out.append((None, Mark(conv=conv, have=after)))
        elif after > cursor.have:
            cursor.want = max(cursor.want, after)
        elif after < cursor.have and conv not in self._based:
            # Only the first `after` of a connection answers what we said we have;
            # a later one may simply have been overtaken by live entries.
            cursor.reset(after)
            self._out.append((Reset(conv=conv, upto=after), Mark(conv=conv, have=after)))
        self._based.add(conv)
        self.catchup.note(cursor)

    def _ready(self, obj: dict[str, Any]) -> None:
        if self._sent is not None:
            for conv in [c for c in (self.views.keys() | self.catchup.cursors.keys()) if c not in self._sent]:
                self.forget(conv)
        full, self._sent = self._sent is not None, None
        if self.me is not None:
            self.say(Ready(user=self.me, full=full))
        self.synced(obj.get("sync"))

    def _entry(self, obj: dict[str, Any]) -> None:
        entry = entry_from(obj)
        if entry is None:
            log.warning("ignored a malformed entry: %.200r", obj)
            return
        ends = self._ends_membership(entry)
        if ends and entry.conv not in self.views and entry.conv not in self.catchup.cursors:
            return  # the `conv` that says the same was first
        cursor = self.catchup.start(entry.conv, entry.seq - 1)
        out: list[Event] = []
        if ends:
            # The last entry that we get: what is missing before it cannot be paged any more.
            cursor.jump(entry.seq - 1, out)
            out += cursor.push(entry)
        else:
            out = cursor.push(entry, room=self.room)
        self.catchup.note(cursor)
        self._give(entry.conv, out)

    def _ends_membership(self, entry: Entry) -> bool:
        if not isinstance(entry, MemberChanged) or self.me is None or entry.user != self.me.id:
            return False
        # A removal that the view has counted already is history: the user came back since.
        view = self.views.get(entry.conv)
        return is_out(entry.role) and (view is None or entry.seq > view.head)

    def _give(self, conv: str, events: list[Event]) -> None:
        for event in events:
            match event:
                case Entry():
                    ends = self._ends_membership(event)
                    before = self.views.get(conv)
                    view = self._fold(event)
                    self._out.append((event, Mark(conv=conv, have=event.seq, view=view)))
                    if ends:
                        self.forget(conv)
                    elif before and view and (before.role, before.title) != (view.role, view.title):
                        self._tell_view(conv)
                case Gap():
                    self._out.append((event, Mark(conv=conv, have=event.last)))
                case _:
                    self._out.append((event, Mark()))

    def _fold(self, entry: Entry) -> Conversation | None:
        view = self.views.get(entry.conv)
        if view is not None:
            view = self.views[entry.conv] = with_entry(view, entry, self.me.id if self.me else "")
        return view

    def _tell_view(self, conv: str) -> None:
        """Tell of a view, or that it is gone; when there is no room, later and only the last one."""
        if not self.room:
            self._untold[conv] = None
            return
        view = self.views.get(conv)
        if view is not None:
            self._out.append((ConversationChanged(conversation=view), Mark(conv=conv, view=view)))
        else:
            self._out.append((ConversationGone(conv=conv), Mark(conv=conv, gone=True)))

    def _settle(self) -> None:
        """Take over ``sync`` when everything it stands for was given out."""
        if self._next_sync is not None and not self.catchup.behind and not self._untold:
            self.sync, self._next_sync = self._next_sync, None
            self._out.append((None, Mark(sync=self.sync)))
