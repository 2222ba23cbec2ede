"""What users do with conversations. The same for WebSocket and HTTP; no connection is known here.

Every method checks what was asked against the limits, does it, and tells whoever
is concerned. ``user`` is the id of who asks.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import struct
import zlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

import orjson

from ..bus.base import Bus
from ..errors import BadRequest, Forbidden, NotFound, RateLimited, TooLarge
from ..protocol import (
    MAX_SERVER_MESSAGE_BYTES,
    MEMBER_ROLES,
    Channels,
    History,
    Member,
    Members,
    Meta,
    Open,
    Read,
    Send,
    Typing,
)
from ..settings import Settings
from ..store.base import Appended, Entry, NewEntry, Opened, Opening, Page, Store
from ..store.entries import new_entry
from . import events
from .delivery import Delivery
from .users import Users

# Users in one query of who knows whom: it may look at every conversation of each, and others wait for it.
_ACQUAINTED_AT_ONCE: Final = 25
# Room for the envelope of a page around its entries.
_ENVELOPE_BYTES: Final = 1024
_DIGEST: Final = struct.Struct("<II")


#: (user, conversation, before, after, limit, max_bytes, hint), as Store.page; ``hint`` is a seq known to be
#: committed, 0 if none is.
RecentPage = Callable[[str, str, int | None, int | None, int, int, int], Awaitable[Page]]


class Chat:
    """One per worker."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        bus: Bus,
        delivery: Delivery,
        users: Users,
        recent_page: RecentPage | None = None,
    ) -> None:
        """``recent_page``: pages up to a seq that is known, from nearer than the store, if it can."""
        self._limits = settings.limits
        self._store = store
        self._bus = bus
        self._delivery = delivery
        self._recent_page = recent_page
        self._users = users
        self.appended = 0

    # --- the log ---------------------------------------------------------------
    def on_commit(self, entries: list[Entry]) -> None:
        """New entries are durable: tell those attached here, and the other workers."""
        self.appended += len(entries)
        # The bus first: what is queued first is sent first, so that other workers know, or are about to,
        # when the sender is answered and asks them.
        for e in entries:
            self._bus.publish(events.conv_channel(e.conv), events.pack_entry(e))
        for e in entries:
            self._delivery.on_entry(e)

    def send(self, user: str, req: Send) -> asyncio.Future[Appended]:
        """Append a message. Hot: no await, so that a connection's sends keep their order.

        :raises TooLarge: body or data over their limits.
        :raises BadRequest: nothing to send, or files, which this version has not.
        """
        limits = self._limits
        body, data = req.body, req.data
        # A character has at most 4 bytes: short texts need no encoding to be measured.
        if len(body) * 4 > limits.body_bytes and len(body.encode()) > limits.body_bytes:
            raise TooLarge(f"body: at most {limits.body_bytes} bytes")
        if data is not None and len(data) * 4 > limits.data_bytes and len(data.encode()) > limits.data_bytes:
            raise TooLarge(f"data: at most {limits.data_bytes} bytes")
        if req.files:
            raise BadRequest("files: this server takes none")
        if not body and not data:
            raise BadRequest("body: a message needs a text or data")
        fields: dict[str, Any] = {"body": body}
        if req.re is not None:
            fields["re"] = req.re
        if data is not None:
            fields["data"] = data
        encoded = orjson.dumps(fields)
        # It detects mistakes, not attacks: the user's own other message under the same cid.
        digest = _DIGEST.pack(zlib.crc32(encoded), zlib.adler32(encoded))
        return self._store.append(NewEntry(req.c, user, req.cid, "msg", encoded, digest))

    async def history(self, user: str, req: History, *, live: bool = False) -> Page:
        """A page of entries: at most the limit of entries, and of one server message.

        ``live``: who asks is told of new entries by this worker. Then a page up to what was told
        is new enough; what somebody sent by another way must be looked for in the store.
        """
        limits = self._limits
        if req.limit > limits.history:
            raise TooLarge(f"limit: at most {limits.history}")
        if req.before is not None and req.after is not None:
            raise BadRequest("before and after exclude each other")
        room = MAX_SERVER_MESSAGE_BYTES - _ENVELOPE_BYTES
        if self._recent_page is None:
            return await self._store.page(user, req.c, req.before, req.after, req.limit, room)
        known = self._delivery.rooms.get(req.c) if live else None
        hint = max(known.want, known.last, 0) if known is not None else 0
        return await self._recent_page(user, req.c, req.before, req.after, req.limit, room, hint)

    # --- conversations -----------------------------------------------------------
    def _title(self, title: str) -> str:
        title = title.strip()
        if not 1 <= len(title) <= self._limits.title_chars:
            raise BadRequest(f"title: 1 to {self._limits.title_chars} characters")
        if not title.isprintable():
            raise BadRequest("title: no control characters")
        return title

    async def open(self, user: str, req: Open) -> Opened:
        """Make a conversation, or find it. :meth:`tell_opened` is to follow."""
        others = list(dict.fromkeys(req.members or ()))
        title = None if req.title is None else self._title(req.title)
        if req.kind == "dm":
            if len(others) != 1 or others[0] == user:
                raise BadRequest("members: a dm is with exactly one other user")
            if title is not None:
                raise BadRequest("title: a dm has none")
        elif req.kind == "channel":
            if title is None:
                raise BadRequest("title: a channel needs one")
            if others:
                raise BadRequest("members: one joins a channel by oneself")
        elif len(others) > self._limits.open_members:
            raise TooLarge(f"members: at most {self._limits.open_members}")
        asked = orjson.dumps([req.kind, title, sorted(others)])
        digest = hashlib.blake2b(asked, digest_size=8).digest()
        return await self._store.open(Opening(user, req.cid, req.kind, title, tuple(others), digest))

    def tell_opened(self, user: str, req: Open, opened: Opened) -> None:
        """All sessions of all members hear of a new conversation."""
        if opened.created:
            for member in dict.fromkeys([user, *(req.members or ())]):
                self._users.tell_changed(member, opened.conv, have=0)

    async def member(self, user: str, req: Member) -> Appended:
        """Join, leave, invite, remove, ban, appoint."""
        entry = new_entry(req.c, user, secrets.token_urlsafe(12), "member", {"user": req.user, "role": req.role})
        done = await self._store.append(entry)
        self._users.tell_changed(req.user, req.c, have=done.seq - 1 if done.seq else None)
        return done

    async def meta(self, user: str, req: Meta) -> Appended:
        """Change the title."""
        return await self._store.append(new_entry(req.c, user, req.cid, "meta", {"title": self._title(req.title)}))

    async def notify(self, user: str, conv: str, level: str) -> None:
        """Set which messages notify the user; the user's other sessions hear of it."""
        await self._store.set_notify(user, conv, level)
        self._users.tell_changed(user, conv)

    async def members(self, user: str, req: Members) -> dict[str, Any]:
        """A page of members."""
        if req.limit > self._limits.members:
            raise TooLarge(f"limit: at most {self._limits.members}")
        peers, more = await self._store.members(user, req.c, req.after, req.limit)
        page: dict[str, Any] = {"members": [{"user": p.user, "role": p.role, "read": p.read} for p in peers]}
        if more is not None:
            page["next"] = more
        return page

    async def channels(self, user: str, req: Channels) -> dict[str, Any]:
        """A page of the directory."""
        if req.limit > self._limits.channels:
            raise TooLarge(f"limit: at most {self._limits.channels}")
        found, more = await self._store.channels(user, req.prefix, req.after, req.limit)
        page: dict[str, Any] = {"conversations": found}
        if more is not None:
            page["next"] = more
        return page

    async def users(self, ids: list[str]) -> list[dict[str, str]]:
        """Users by id."""
        if len(ids) > self._limits.users:
            raise TooLarge(f"ids: at most {self._limits.users}")
        return [{"id": u.id, "name": u.name} for u in await self._store.users(ids)]

    async def block(self, user: str, other: str, on: bool) -> None:
        """Refuse direct messages from another user, or allow them again."""
        if user == other:
            raise BadRequest("user: nobody blocks oneself")
        await self._store.block(user, other, on)
        self._users.tell_blocked(other)

    async def acquainted(self, user: str, others: list[str]) -> None:
        """:raises Forbidden: somebody among them shares no conversation with the user."""
        if len(others) > self._limits.watch:
            raise TooLarge(f"users: at most {self._limits.watch}")
        asked = sorted(set(others) - {user})
        for at in range(0, len(asked), _ACQUAINTED_AT_ONCE):
            some = asked[at : at + _ACQUAINTED_AT_ONCE]
            strangers = set(some) - await self._store.acquainted(user, some)
            if strangers:
                raise Forbidden(f"you share no conversation with {min(strangers)}")

    # --- states, at most once -------------------------------------------------------
    async def read(self, user: str, req: Read) -> None:
        """Move the read mark; the others see it in small conversations."""
        if await self._store.set_read(user, req.c, req.upto):
            self._users.tell_changed(user, req.c)
            if await self._store.member_count(req.c) <= self._limits.small:
                wire = orjson.dumps({"t": "read", "c": req.c, "user": user, "upto": req.upto})
                self._tell(req.c, user, wire)

    async def typing(self, user: str, req: Typing) -> None:
        """Tell the others in a small conversation. A signal for each key pressed: it reads what is remembered."""
        if await self._store.role(user, req.c) not in MEMBER_ROLES:
            raise NotFound("no such conversation")
        if await self._store.member_count(req.c) <= self._limits.small:
            self._tell(req.c, user, orjson.dumps({"t": "typing", "c": req.c, "user": user}))

    def _tell(self, conv: str, skip_user: str, wire: bytes) -> None:
        self._delivery.push_state(conv, skip_user, wire)
        self._bus.publish(events.conv_channel(conv), events.pack_state(skip_user, wire))


class TypingGate:
    """Typing signals of one session: at most one per conversation and interval."""

    __slots__ = ("_interval_s", "_last")
    # Conversations remembered; one types in one at a time.
    _MAX: Final = 16

    def __init__(self, interval_ms: int) -> None:
        self._interval_s = interval_ms / 1000
        self._last: dict[str, float] = {}

    def check(self, conv: str, now: float) -> None:
        """:raises RateLimited: too soon after the last."""
        left = self._last.get(conv, -1e9) + self._interval_s - now
        if left > 0:
            raise RateLimited("typing: too often", retry_after_ms=max(1, int(left * 1000)))
        if len(self._last) >= self._MAX:
            self._last.clear()
        self._last[conv] = now
