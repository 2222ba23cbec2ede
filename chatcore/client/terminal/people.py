"""Who is in the conversation on the screen: names, presence, who is typing."""

from __future__ import annotations

import asyncio
from typing import Final

from ..client import Client
from ..errors import ChatError
from ..events import Presence
from .text import one_line

#: Members that are listed and watched; in larger conversations, these first ones.
MEMBERS_MAX: Final = 500
_PAGE: Final = 100
#: How long a typing signal is shown (protocol.md).
TYPING_S: Final = 6.0


class People:
    """The members of one conversation at a time."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._names: dict[str, str] = {}
        self._conv = ""
        self._roles: dict[str, str] = {}
        self._states: dict[str, str] = {}
        self._typing: dict[str, float] = {}

    async def load(self, conv: str) -> None:
        """Look up the members of a conversation, and be told of their presence."""
        if conv != self._conv:
            self._conv = conv
            self._roles.clear()
            self._typing.clear()
        roles: dict[str, str] = {}
        after: str | None = None
        while len(roles) < MEMBERS_MAX:
            page = await self._client.members(conv, after=after, limit=_PAGE)
            roles |= {member.user: member.role for member in page.members}
            unknown = [user for user in roles if user not in self._names]
            if unknown:
                self._names |= {user.id: one_line(user.name) for user in await self._client.users(unknown)}
            after = page.next
            if after is None:
                break
        self._roles = roles
        others = [user for user in roles if user != self._client.user.id]
        try:
            self._states = {state.user: state.state for state in await self._client.watch(others)}
        except ChatError:
            self._states = {}  # somebody left meanwhile; the next look will do

    def knows(self, user: str) -> bool:
        """Whether this user is a member as far as was seen."""
        return user in self._roles

    async def name(self, user: str) -> str:
        """The name of a user, safe to print; the id if it cannot be found out."""
        if user not in self._names:
            try:
                self._names[user] = one_line(await self._client.name_of(user))
            except (ChatError, TimeoutError):
                return user
        return self._names[user]

    def forget_name(self, user: str) -> None:
        """The name has changed."""
        self._names.pop(user, None)

    def presence(self, event: Presence) -> bool:
        """Somebody came or went; whether that is news about a member."""
        before = self._states.get(event.user, "offline")
        self._states[event.user] = event.state
        return before != event.state and event.user in self._roles

    def online(self) -> list[str]:
        """The names of the other members who are online."""
        return sorted(self._names.get(u, u) for u, s in self._states.items() if s == "online" and u in self._roles)

    def who(self) -> list[str]:
        """One line for each member."""
        me = self._client.user.id
        lines = []
        for user, role in self._roles.items():
            state = "you" if user == me else self._states.get(user, "offline")
            lines.append(f"{self._names.get(user, user)} ({state}{', ' + role if role != 'member' else ''})")
        return sorted(lines)

    def is_typing(self, user: str, yes: bool = True) -> None:
        """Somebody is typing, or has sent what they were typing."""
        if yes and user != self._client.user.id:
            self._typing[user] = asyncio.get_running_loop().time() + TYPING_S
        else:
            self._typing.pop(user, None)

    def typing(self) -> list[str]:
        """The names of those typing now."""
        now = asyncio.get_running_loop().time()
        return sorted(self._names.get(user, user) for user, until in self._typing.items() if until > now)
