"""Every request of the protocol as one typed method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from .errors import Internal
from .events import Entry, Kind, Level, Message, Presence, User, entry_from
from .outbox import new_cid

T = TypeVar("T")


class Page(msgspec.Struct, frozen=True):
    """A page of history, ascending, with messages in their present state.

    ``more``: there are further entries in the direction asked for. ``at``: the
    page includes everything up to this seq; apply only later entries to it.
    """

    entries: list[Entry]
    more: bool
    at: int


class MemberInfo(msgspec.Struct, frozen=True):
    """A member: the user's id, role, and how far this member has read."""

    user: str
    role: str
    read: int = 0


class MembersPage(msgspec.Struct, frozen=True):
    """Members by user id; ``next`` is the ``after`` of the next page, if there is one."""

    members: list[MemberInfo]
    next: str | None = None


class Channel(msgspec.Struct, frozen=True):
    """A channel of the public directory; ``role`` is the user's own in it ("none": not in it)."""

    id: str = msgspec.field(name="c")
    title: str = ""
    members: int = 0
    role: str = "none"


class ChannelsPage(msgspec.Struct, frozen=True):
    """Channels by title; ``next`` is the ``after`` of the next page, if there is one."""

    conversations: list[Channel]
    next: str | None = None


class Requests:
    """The requests. All of them raise the classes of :mod:`chatcore.errors` when refused,
    TimeoutError when the server cannot be reached for too long, and survive reconnects:
    a request whose reply was lost is asked again, which the protocol makes harmless.
    """

    async def ask(
        self, t: str, fields: Mapping[str, Any], *, repeat: bool = True, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Ask anything and return the reply; the methods below are made of this."""
        raise NotImplementedError

    async def history(
        self, conv: str, *, before: int | None = None, after: int | None = None, limit: int = 50, raw: bool = False
    ) -> Page:
        """A page: below ``before``, above ``after``, or the newest one. ``raw``: all as pushed."""
        fields = _given(c=conv, before=before, after=after, limit=limit, raw=raw or None)
        reply = await self.ask("history", fields)
        rows = reply.get("entries")
        entries = [e for row in rows if (e := entry_from({"c": conv, **row}))] if isinstance(rows, list) else []
        return Page(entries, bool(reply.get("more")), int(reply.get("at", 0)))

    async def read(self, conv: str, upto: int) -> None:
        """Move the own read mark up to seq ``upto``; it never moves back."""
        await self.ask("read", {"c": conv, "upto": upto})

    async def open(
        self, kind: Kind, *, title: str | None = None, members: Sequence[str] | None = None, cid: str | None = None
    ) -> str:
        """Make a conversation and return its id.

        A dm (``members``: the one other user's id) that exists is found. For the
        others, calling again with the same ``cid`` finds what was made by the first.
        """
        fields = _given(
            kind=kind, title=title, members=list(members) if members is not None else None, cid=cid or new_cid()
        )
        return _str(await self.ask("open", fields), "c")

    async def member(self, conv: str, user: str, role: str) -> int | None:
        """Give ``user`` a role; the seq of the entry about it, None if there is none."""
        seq = (await self.ask("member", {"c": conv, "user": user, "role": role})).get("s")
        return seq if isinstance(seq, int) else None

    async def invite(self, conv: str, user: str) -> int | None:
        """Bring ``user`` into a group."""
        return await self.member(conv, user, "member")

    async def remove(self, conv: str, user: str) -> int | None:
        """Take ``user`` out."""
        return await self.member(conv, user, "none")

    async def set_title(self, conv: str, title: str, *, cid: str | None = None) -> None:
        """Give the conversation a new title."""
        await self.ask("meta", {"c": conv, "title": title, "cid": cid or new_cid()})

    async def notify(self, conv: str, level: Level) -> None:
        """Choose which messages of the conversation notify this user."""
        await self.ask("notify", {"c": conv, "level": level})

    async def members(self, conv: str, *, after: str | None = None, limit: int = 50) -> MembersPage:
        """A page of the members, by user id."""
        return _as(MembersPage, await self.ask("members", _given(c=conv, after=after, limit=limit)))

    async def users(self, ids: Sequence[str]) -> list[User]:
        """The accounts with these ids (at most 100); unknown ones are left out."""
        return _as(list[User], (await self.ask("users", {"ids": list(ids)})).get("users", []))

    async def channels(self, prefix: str | None = None, *, after: str | None = None, limit: int = 50) -> ChannelsPage:
        """A page of the public directory: channels whose title begins with ``prefix``."""
        return _as(ChannelsPage, await self.ask("channels", _given(prefix=prefix, after=after, limit=limit)))

    async def block(self, user: str, on: bool = True) -> None:
        """Refuse direct messages from ``user``, or allow them again."""
        await self.ask("block", {"user": user, "on": on})

    async def ping(self) -> int:
        """Ask for a sign of life; the server's clock in Unix ms."""
        return int((await self.ask("ping", {}, repeat=False)).get("ts", 0))


def states_of(reply: dict[str, Any]) -> list[Presence]:
    """The presence states in a reply to ``watch``."""
    return _as(list[Presence], reply.get("states", []))


def messages(page: Page) -> list[Message]:
    """Only what people said."""
    return [entry for entry in page.entries if isinstance(entry, Message)]


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _str(reply: dict[str, Any], name: str) -> str:
    value = reply.get(name)
    if not isinstance(value, str):
        raise Internal(f"the reply lacks {name!r}")
    return value


def _as(kind: type[T], value: Any) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        raise Internal(f"the reply is not as expected: {exc}") from None
