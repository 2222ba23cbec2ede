"""Every request of the protocol as one typed method, and a channel by its title, which takes several.

Titles are not unique on the server, so two clients that both find no ``lobby`` and both
make one have to end in the same. The rule is that the oldest wins: a client that has just
made a channel lists the directory once more, and if there are several of that title takes
the one whose first entry has the lowest time stamp (then the lowest id), leaving its own.
A client that listed before the other one was made holds the older one already, so both
agree; and a channel that is made later under the same title does not draw anybody away.
Namesakes that all members have left are looked at only if there are no others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from .errors import Forbidden, Internal
from .events import Conversation, Entry, Kind, Level, Presence, User, entry_from
from .outbox import new_cid
from .replica import is_out

T = TypeVar("T")

#: Channels looked at for one title; more namesakes than this are not an accident.
_LISTED_MAX: Final = 200
_PAGE: Final = 50
#: Later than any time stamp.
MAX_TS: Final = 2**53
#: Between tries to leave a namesake; others look at it for a few milliseconds.
LEAVE_WAITS_S: Final = (0.05, 0.1, 0.2, 0.4, 0.8)


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

    The methods without a body are those that need more than the request: see :class:`.client.Client`.
    """

    async def ask(
        self, t: str, fields: Mapping[str, Any], *, repeat: bool = True, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Send any request and return the reply; the methods below are made of this."""
        raise NotImplementedError

    async def view(self, conv: str) -> Conversation:
        """The view of a conversation; waits until the server has sent it. Raises TimeoutError."""
        raise NotImplementedError

    async def join(self, conv: str) -> Conversation:
        """Join a channel; nothing happens to one that the user is in already."""
        raise NotImplementedError

    async def leave(self, conv: str) -> None:
        """Leave a conversation; no more events come of it."""
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
        """Invite ``user`` into a group."""
        return await self.member(conv, user, "member")

    async def remove(self, conv: str, user: str) -> int | None:
        """Remove ``user``."""
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


async def channel_of_title(requests: Requests, title: str) -> str:
    """The id of the channel of this title: joined, or made if there is none."""
    found = await namesakes(requests, title)
    made = ""
    if not found:
        made = await requests.open("channel", title=title)
        found = await namesakes(requests, title)
        if made not in [c.id for c in found]:
            return made  # the directory does not show it yet, and no other one either
    chosen = found[0] if len(found) == 1 else await _oldest(requests, found, made)
    if is_out(chosen.role):
        await requests.join(chosen.id)
    await requests.view(chosen.id)
    return chosen.id


async def namesakes(requests: Requests, title: str) -> list[Channel]:
    """All channels of this title; as in the directory, case does not matter."""
    wanted = title.strip().casefold()
    found: list[Channel] = []
    after: str | None = None
    listed = 0
    while listed < _LISTED_MAX:
        page = await requests.channels(title, after=after, limit=_PAGE)
        found += [c for c in page.conversations if c.title.casefold() == wanted]
        listed += _PAGE
        after = page.next
        if after is None:
            break
    return [one for one in found if one.members] or found


async def _oldest(requests: Requests, found: list[Channel], made: str) -> Channel:
    """The oldest of several channels; ``made`` is the one that this client has just made, if any.

    A log is only for members: look at each from inside.
    """
    ages: list[tuple[int, str, Channel]] = []
    joined: list[str] = []
    for one in found:
        if is_out(one.role):
            try:
                await requests.join(one.id)
            except Forbidden:
                continue  # closed to this user, so not where users meet
            joined.append(one.id)
        first = await requests.history(one.id, after=0, limit=1, raw=True)
        # One without any entry is the youngest: no message was sent there.
        ages.append((first.entries[0].ts if first.entries else MAX_TS, one.id, one))
    if not ages:
        raise Forbidden(f"you may not join {found[0].title!r}")
    chosen = min(ages)[2]
    # Leave those joined to look, and at last the namesake that this client has just made: while it waits
    # for the others to leave that one, they may be waiting for it to leave theirs.
    for conv in [*joined, made]:
        if conv and conv != chosen.id:
            await _leave_namesake(requests, conv)
    return msgspec.structs.replace(chosen, role="member")


async def _leave_namesake(requests: Requests, conv: str) -> None:
    """Leave a namesake. Its owner cannot while others are in it, who only came to look."""
    for wait_s in LEAVE_WAITS_S:
        try:
            await requests.leave(conv)
        except Forbidden:
            await asyncio.sleep(wait_s)
        else:
            return
    # The user stays in it, which does no harm.


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
