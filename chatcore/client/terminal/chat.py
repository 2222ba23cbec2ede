"""The chat on the screen: one conversation at a time, its entries and its members."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from ...common.tasks import Tasks
from ..client import Client
from ..errors import ChatError, ClientError, NotFound, OutboxFull
from ..events import (
    ConversationGone,
    Disconnected,
    Entry,
    Event,
    Gap,
    MemberChanged,
    Message,
    MetaChanged,
    Presence,
    Ready,
    Reset,
    Sent,
    Typing,
    UserChanged,
)
from .screen import Screen, body_of, clock, listing, member_line, meta_line, one_line, title_of

log: Final = logging.getLogger("chatcore.client.terminal")

#: Members that are listed and watched; in larger conversations, these first ones.
MEMBERS_MAX: Final = 500
_PAGE: Final = 100
#: How long a typing signal is shown (docs/protocol.md, "typing").
TYPING_S: Final = 6.0


class MemberList:
    """The members of one conversation at a time."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._names: dict[str, str] = {}
        self._conv = ""
        self._roles: dict[str, str] = {}
        self._states: dict[str, str] = {}
        self._typing: dict[str, float] = {}

    async def load(self, conv: str) -> None:
        """Look up the members of a conversation, and watch their presence."""
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
            self._states = {}  # a member has left meanwhile; the next load will do

    def knows(self, user: str) -> bool:
        """Whether this user was a member when the members were loaded."""
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
        """Take in a presence; whether it changed that of a member."""
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
        """A user is typing, or has sent the message."""
        if yes and user != self._client.user.id:
            self._typing[user] = asyncio.get_running_loop().time() + TYPING_S
        else:
            self._typing.pop(user, None)

    def typing(self) -> list[str]:
        """The names of those typing now."""
        now = asyncio.get_running_loop().time()
        return sorted(self._names.get(user, user) for user, until in self._typing.items() if until > now)


class TerminalChat:
    """Ties a client to a screen. ``follow`` runs beside whatever reads lines."""

    def __init__(self, client: Client, history: int) -> None:
        self.client = client
        self.members = MemberList(client)
        self.conv = ""
        #: Messages that were refused for good.
        self.refused = 0
        self.screen: Screen = _NoScreen()
        self._history = history
        self._shown = 0
        self._held: list[Entry] | None = None
        self._offline = False
        self._shown_more = asyncio.Event()
        self._read = 0
        self._mine = 0
        self._marks = asyncio.Event()

    # Showing.

    @property
    def title(self) -> str:
        """The name of the conversation on the screen."""
        return title_of(self.client.conversations.get(self.conv)) if self.conv else "(nowhere)"

    def status(self) -> str:
        """The status line."""
        parts = [self.title]
        if self._offline:
            parts.append("reconnecting…")
        if online := self.members.online():
            parts.append(f"online: {listing(online)}")
        if typing := self.members.typing():
            parts.append(f"{listing(typing, 3)} {'is' if len(typing) == 1 else 'are'} typing…")
        if waiting := self.client.unacknowledged:
            parts.append(f"{waiting} not sent yet")
        return " · ".join(parts)

    async def enter(self, target: str) -> None:
        """Put a conversation on the screen: ``#channel``, ``@user`` or an id. Raises ChatError."""
        conv = await self._find(target)
        self.conv, self._held, self._shown, self._mine = conv, [], 0, 0
        self.screen.notice(self.title)
        try:
            await self.members.load(conv)
            await self.show_history(self._history)
        finally:
            held, self._held = self._held or [], None
        for entry in held:
            await self._show(entry)
        if online := self.members.online():
            self.screen.notice(f"online: {listing(online)}")
        self.screen.refresh()

    def leave(self) -> None:
        """No conversation is on the screen."""
        self.conv = ""
        self.screen.notice("you are nowhere now: /join #channel, /dm user, /list")
        self.screen.refresh()

    async def show_history(self, limit: int) -> None:
        """Show the newest messages."""
        if not limit:
            view = self.client.conversations.get(self.conv)
            self._shown = max(self._shown, view.head if view else 0)
            return
        page = await self.client.history(self.conv, limit=limit)
        for entry in page.entries:
            await self._print(entry)
            self._shown = max(self._shown, entry.seq)
        # The page stands for everything up to `at`; later entries come as events.
        self._shown = max(self._shown, page.at)

    async def _find(self, target: str) -> str:
        if target.startswith("#"):
            return await self.client.channel(target[1:])
        if target.startswith("@"):
            return await self.client.dm(target[1:])
        await self.client.ready()
        if target not in self.client.conversations:
            try:
                await self.client.join(target)
            except NotFound:
                raise NotFound(f"there is no conversation {target!r} that you are in") from None
        return target

    # Actions of the user.

    def say(self, text: str) -> None:
        """Send a line to the conversation on the screen; it goes out as soon as it can."""
        if not self.conv:
            self.screen.notice("you are nowhere: /join #channel first")
            return
        try:
            sent = self.client.post(self.conv, text)
        except (OutboxFull, ChatError, ClientError) as error:
            self.screen.notice(f"not sent: {one_line(text)}: {error}")
            self.refused += 1
            return
        sent.add_done_callback(lambda future: self._sent(text, future))
        self.screen.refresh()

    def typed(self, text: str) -> None:
        """The line being typed has changed."""
        if text and not text.startswith("/") and self.conv:
            self.client.typing(self.conv)

    def _sent(self, text: str, future: asyncio.Future[Sent]) -> None:
        error = None if future.cancelled() else future.exception()
        if isinstance(error, ChatError):
            self.refused += 1
            self.screen.notice(f"not sent: {one_line(text)}: {error.message}")
        elif error is None and not future.cancelled() and future.result().conv == self.conv:
            self._mine = max(self._mine, future.result().seq)
        self.screen.refresh()

    async def finish(self) -> None:
        """Wait until everything typed is acknowledged and shown."""
        await self.client.flush()
        while self.conv and self._shown < self._mine:
            self._shown_more.clear()
            await self._shown_more.wait()

    # Events.

    async def follow(self) -> None:
        """Show events until the connection ends for good, which raises its reason."""
        tasks = Tasks()
        tasks.spawn(self._mark(), "chat read marks")
        try:
            async for event in self.client.events():
                await self._event(event)
        finally:
            await tasks.close()

    async def _event(self, event: Event) -> None:
        match event:
            case Entry():
                await self._entry(event)
            case Typing() if event.conv == self.conv:
                await self._meet(event.user)
                self.members.is_typing(event.user)
            case Presence():
                if self.members.presence(event):
                    self.screen.notice(f"{await self.members.name(event.user)} is {event.state}")
            case Disconnected():
                if not self._offline:
                    self._offline = True
                    self.screen.notice("reconnecting…")
            case Ready():
                if self._offline:
                    self._offline = False
                    self.screen.notice("connected again")
            case Gap() if event.conv == self.conv:
                self.screen.notice(f"{event.last - event.first + 1} entries are missing here")
            case Reset() if event.conv == self.conv:
                self._shown = event.upto
                self.screen.notice("the log on the server was set back; some messages above are gone there")
            case ConversationGone() if event.conv == self.conv:
                self._shown_more.set()
                self.leave()
            case UserChanged():
                self.members.forget_name(event.user.id)
            case _:
                return
        self.screen.refresh()

    async def _entry(self, entry: Entry) -> None:
        if entry.conv == self.conv:
            if self._held is not None:
                self._held.append(entry)
            else:
                await self._show(entry)
        elif isinstance(entry, Message) and entry.sender != self.client.user.id:
            where = title_of(self.client.conversations.get(entry.conv))
            self.screen.notice(f"[{where}] {await self.members.name(entry.sender)}: {one_line(entry.body or '')}")

    async def _show(self, entry: Entry) -> None:
        if entry.seq <= self._shown:
            return
        await self._meet(entry.sender)
        await self._print(entry)
        self._shown = entry.seq
        self._shown_more.set()

    async def _print(self, entry: Entry) -> None:
        sender = await self.members.name(entry.sender)
        match entry:
            case Message():
                mine = entry.sender == self.client.user.id
                self.members.is_typing(entry.sender, False)
                self.screen.message(clock(entry.ts), sender, body_of(entry), mine)
                if not mine:
                    self._read = entry.seq
                    self._marks.set()
            case MemberChanged() if not self.title.startswith("@"):  # both users of a dm know it
                self.screen.notice(member_line(entry, sender, await self.members.name(entry.user)))
            case MetaChanged():
                self.screen.notice(meta_line(entry, sender))
            case _:
                pass

    async def _meet(self, user: str) -> None:
        """Load the members again if this user is not among them: joining a channel makes no entry."""
        if self.conv and not self.members.knows(user) and self.client.online:
            try:
                await self.members.load(self.conv)
            except (ChatError, TimeoutError) as error:
                log.debug("the members could not be looked up: %s", error)

    async def _mark(self) -> None:
        """Move the read mark on the server: only the newest one, one request at a time."""
        while True:
            await self._marks.wait()
            self._marks.clear()
            try:
                if self.conv:
                    await self.client.read(self.conv, self._read)
            except (ChatError, TimeoutError) as error:
                log.debug("the read mark could not be moved: %s", error)


class _NoScreen:
    """The screen before there is one: it shows no line."""

    def message(self, when: str, name: str, body: str, mine: bool) -> None:
        pass

    def notice(self, text: str) -> None:
        pass

    def refresh(self) -> None:
        pass

    async def line(self) -> str | None:
        return None
