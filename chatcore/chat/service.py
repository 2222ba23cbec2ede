"""The requests of users on conversations, the same for WebSocket and HTTP; this module knows no connections.

Each method checks the request against the limits, carries it out, and notifies the sessions
that it concerns. ``user`` is the id of the requesting user.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import struct
import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import orjson
from lru import LRU

from ..bus.base import Bus
from ..common.text import is_line, is_visible
from ..entries import MemberFields, MetaFields, MsgFields, NewEntry, encode_fields, new_entry
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
from ..store.base import Appended, Entry, Opened, Opening, Page, Store
from . import events
from .delivery import Delivery
from .user_events import UserEvents

# Users in one query of who knows whom: it may look at every conversation of each, and others wait for it.
_ACQUAINTED_AT_ONCE: Final = 25
# Room for the envelope of a page around its entries.
_ENVELOPE_BYTES: Final = 1024
# Typing signals ask for the other member of a dm; so many are remembered, some 200 B each.
DM_PEERS_MAX: Final = 10_000
DM_MEMBERS: Final = 2
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
        user_events: UserEvents,
        recent_page: RecentPage | None = None,
    ) -> None:
        """``recent_page``: pages up to a seq that is known, from nearer than the store, if it can."""
        self._limits = settings.limits
        self._store = store
        self._bus = bus
        self._delivery = delivery
        self._recent_page = recent_page
        self._user_events = user_events
        self.appended = 0
        # (user, conversation of two) -> the other member of a dm; None: it is no dm.
        self._dm_peers: LRU[tuple[str, str], str | None] = LRU(DM_PEERS_MAX)

    # --- the log ---------------------------------------------------------------
    def on_commit(self, entries: list[Entry]) -> None:
        """New entries are durable: publish them to the other workers, and deliver them to the sessions here."""
        self.appended += len(entries)
        # The bus first: it is flushed in this order, so that the other workers know of an entry, or are about to,
        # when its sender is answered and asks them.
        for e in entries:
            self._bus.publish(events.conv_channel(e.conv), events.pack_entry(e))
        for e in entries:
            self._delivery.on_entry(e)

    def send(self, user: str, req: Send) -> asyncio.Future[Appended]:
        """Append a message. Hot: no await, so that a connection's sends keep their order.

        :raises TooLarge: body or data over their limits.
        :raises BadRequest: neither text nor data, or files, which this version does not support.
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
        encoded = encode_fields(MsgFields(body, req.re, data))
        # It detects mistakes, not attacks: the user's own other message under the same cid.
        digest = _DIGEST.pack(zlib.crc32(encoded), zlib.adler32(encoded))
        return self._store.append(NewEntry(req.c, user, req.cid, "msg", encoded, digest))

    async def history(self, user: str, req: History, *, live: bool = False) -> Page:
        """A page of entries: at most the limit of entries, and of one server message.

        ``live``: the session is attached on this worker. Then a page up to the newest entry that the worker
        has heard of is new enough; a client that may have sent by another way is answered from the store.
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
        hint = max(known.newest, known.last, 0) if known is not None else 0
        return await self._recent_page(user, req.c, req.before, req.after, req.limit, room, hint)

    # --- conversations -----------------------------------------------------------
    def _title(self, title: str) -> str:
        title = title.strip()
        if not 1 <= len(title) <= self._limits.title_chars:
            raise BadRequest(f"title: 1 to {self._limits.title_chars} characters")
        if not is_line(title):
            raise BadRequest("title: one line, without control characters")
        if not is_visible(title):
            raise BadRequest("title: nothing of it can be seen")
        return title

    async def open(self, user: str, req: Open) -> Opened:
        """Make a conversation, or find it. :meth:`announce_opened` must follow."""
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
                raise BadRequest("members: a channel is opened without members; each user joins it")
        elif len(others) > self._limits.open_members:
            raise TooLarge(f"members: at most {self._limits.open_members}")
        asked = orjson.dumps([req.kind, title, sorted(others)])
        digest = hashlib.blake2b(asked, digest_size=8).digest()
        return await self._store.open(Opening(user, req.cid, req.kind, title, tuple(others), digest))

    def announce_opened(self, user: str, req: Open, opened: Opened) -> None:
        """Bring all sessions of all members of a new conversation up to date."""
        if opened.created:
            for member in dict.fromkeys([user, *(req.members or ())]):
                self._user_events.row_changed(member, opened.conv, have=0)

    async def member(self, user: str, req: Member) -> Appended:
        """Join, leave, invite, remove, ban, appoint."""
        entry = new_entry(req.c, user, secrets.token_urlsafe(12), MemberFields(req.user, req.role))
        done = await self._store.append(entry)
        self._user_events.row_changed(req.user, req.c, have=done.seq - 1 if done.seq else None)
        return done

    async def meta(self, user: str, req: Meta) -> Appended:
        """Change the title."""
        return await self._store.append(new_entry(req.c, user, req.cid, MetaFields(self._title(req.title))))

    async def notify(self, user: str, conv: str, level: str) -> None:
        """Set which messages notify the user, and bring the user's other sessions up to date."""
        await self._store.set_notify(user, conv, level)
        self._user_events.row_changed(user, conv)

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
            raise BadRequest("user: you cannot block yourself")
        await self._store.block(user, other, on)
        self._user_events.blocks_changed(other)

    async def blockers(self, user: str, others: Sequence[str]) -> set[str]:
        """Those of ``others`` who block the user."""
        return await self._store.blockers(user, others)

    async def acquainted(self, user: str, others: list[str]) -> None:
        """:raises Forbidden: one of them shares no conversation with the user."""
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
        """Move the read mark; push it to the others in small conversations."""
        if await self._store.set_read(user, req.c, req.upto):
            self._user_events.row_changed(user, req.c)
            if await self._store.member_count(req.c) <= self._limits.small:
                wire = orjson.dumps({"t": "read", "c": req.c, "user": user, "upto": req.upto})
                self._push_state(req.c, user, wire)

    async def typing(self, user: str, req: Typing) -> None:
        """Push a typing signal to the others in a small conversation. As frequent as keys: it reads cached rows."""
        if await self._store.role(user, req.c) not in MEMBER_ROLES:
            raise NotFound("no such conversation")
        members = await self._store.member_count(req.c)
        if members == DM_MEMBERS and await self._blocked_in_dm(user, req.c):
            return  # not refused: a signal is never confirmed, and a block need not be announced
        if members <= self._limits.small:
            self._push_state(req.c, user, orjson.dumps({"t": "typing", "c": req.c, "user": user}))

    async def _blocked_in_dm(self, user: str, conv: str) -> bool:
        """Whether the conversation is a dm whose other member blocks the user."""
        if (user, conv) not in self._dm_peers:
            self._dm_peers[user, conv] = await self._store.dm_peer(user, conv)  # it never changes
        peer = self._dm_peers[user, conv]
        return peer is not None and bool(await self._store.blockers(user, [peer]))

    def _push_state(self, conv: str, skip_user: str, wire: bytes) -> None:
        self._delivery.push_state(conv, skip_user, wire)
        self._bus.publish(events.conv_channel(conv), events.pack_state(skip_user, wire))


class TypingGate:
    """Limits the typing signals of one session to one per conversation and interval."""

    __slots__ = ("_interval_s", "_last")
    # Conversations remembered; a person types in one at a time.
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
