"""The chat on the screen: one conversation at a time, followed from its events."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

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
from .people import People
from .screen import Screen
from .text import body_of, clock, listing, member_line, meta_line, one_line, title_of

log: Final = logging.getLogger("chatcore.client.terminal")


class Chat:
    """Ties a client to a screen. ``follow`` runs beside whatever reads lines."""

    def __init__(self, client: Client, history: int) -> None:
        self.client = client
        self.people = People(client)
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

    # What is shown.

    @property
    def title(self) -> str:
        """What the conversation on the screen is called."""
        return title_of(self.client.conversations.get(self.conv)) if self.conv else "(nowhere)"

    def status(self) -> str:
        """The status line."""
        parts = [self.title]
        if self._offline:
            parts.append("reconnecting…")
        if online := self.people.online():
            parts.append(f"online: {listing(online)}")
        if typing := self.people.typing():
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
            await self.people.load(conv)
            await self.show_history(self._history)
        finally:
            held, self._held = self._held or [], None
        for entry in held:
            await self._show(entry)
        if online := self.people.online():
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

    # What the user does.

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

    # What happens.

    async def follow(self) -> None:
        """Show events until the connection ends for good, which raises its reason."""
        marking = asyncio.create_task(self._mark(), name="chat read marks")
        try:
            async for event in self.client.events():
                await self._event(event)
        finally:
            marking.cancel()
            await asyncio.gather(marking, return_exceptions=True)

    async def _event(self, event: Event) -> None:
        match event:
            case Entry():
                await self._entry(event)
            case Typing() if event.conv == self.conv:
                await self._meet(event.user)
                self.people.is_typing(event.user)
            case Presence():
                if self.people.presence(event):
                    self.screen.notice(f"{await self.people.name(event.user)} is {event.state}")
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
                self.screen.notice("the server went back in time; some messages above are gone there")
            case ConversationGone() if event.conv == self.conv:
                self._shown_more.set()
                self.leave()
            case UserChanged():
                self.people.forget_name(event.user.id)
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
            self.screen.notice(f"[{where}] {await self.people.name(entry.sender)}: {one_line(entry.body or '')}")

    async def _show(self, entry: Entry) -> None:
        if entry.seq <= self._shown:
            return
        await self._meet(entry.sender)
        await self._print(entry)
        self._shown = entry.seq
        self._shown_more.set()

    async def _print(self, entry: Entry) -> None:
        sender = await self.people.name(entry.sender)
        match entry:
            case Message():
                mine = entry.sender == self.client.user.id
                self.people.is_typing(entry.sender, False)
                self.screen.message(clock(entry.ts), sender, body_of(entry), mine)
                if not mine:
                    self._read = entry.seq
                    self._marks.set()
            case MemberChanged() if not self.title.startswith("@"):  # of a dm everybody knows
                self.screen.notice(member_line(entry, sender, await self.people.name(entry.user)))
            case MetaChanged():
                self.screen.notice(meta_line(entry, sender))
            case _:
                pass

    async def _meet(self, user: str) -> None:
        """Somebody shows up who was not there: joining a channel makes no entry."""
        if self.conv and not self.people.knows(user) and self.client.online:
            try:
                await self.people.load(self.conv)
            except (ChatError, TimeoutError) as error:
                log.debug("the members could not be looked up: %s", error)

    async def _mark(self) -> None:
        """Tell the server what was read: only the newest, one request at a time."""
        while True:
            await self._marks.wait()
            self._marks.clear()
            try:
                if self.conv:
                    await self.client.read(self.conv, self._read)
            except (ChatError, TimeoutError) as error:
                log.debug("the read mark could not be moved: %s", error)


class _NoScreen:
    """Before there is a screen."""

    def message(self, when: str, name: str, body: str, mine: bool) -> None:
        pass

    def notice(self, text: str) -> None:
        pass

    def refresh(self) -> None:
        pass

    async def line(self) -> str | None:
        return None
