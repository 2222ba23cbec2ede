"""The client that an application uses: one user's session with a chatcore server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

from . import accounts
from .accounts import Address
from .connection import ConnectionLoop, now
from .core import ClientCore
from .errors import NotFound, OutboxFull
from .events import Conversation, Event, Presence, Sent, User
from .outbox import Draft, new_cid
from .requests import Requests, channel_of_title, states_of
from .state import State, StateSaver, decode

#: ``typing`` goes out at most this often per conversation.
TYPING_EVERY_S: Final = 3.0


class Client(Requests):
    """A chat session that reconnects by itself, loses no message and repeats none.

    Use it as an async context manager, read :meth:`events` in one task, and call
    the requests from any. It belongs to the event loop in which it was started.

    :param url: of the server, like ``http://127.0.0.1:8080``.
    :param token: from :meth:`login` or an earlier one; it never is in a URL.
    :param state: where to save what a restarted client needs to go on exactly
        where it was; without it everything ends with this object.
    :param only: attach just these conversations; an empty list means to be away.
    :param queue: events waiting for the application before the socket is held up.
    :param unacknowledged: messages waiting for their ``ok`` before :meth:`send` waits.
    :param window: messages on their way at the same time per conversation. With
        more than one, a refusal in the middle lets later ones overtake.
    :param ping_ms: how often the server is to ping; its own choice if None.
    :param timeout_s: how long a request waits for its reply, over reconnects too.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        state: State | None = None,
        only: Sequence[str] | None = None,
        queue: int = 1000,
        unacknowledged: int = 1000,
        window: int = 1,
        ping_ms: int | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        self.address = Address(url)
        self.token = token
        self._state = state
        self._only = list(only) if only is not None else None
        self._queue_max = queue
        self._unacknowledged_max = unacknowledged
        self._window = window
        self._ping_ms = ping_ms
        self._timeout_s = timeout_s
        self._users: dict[str, User] = {}
        self._typed: dict[str, float] = {}
        self._connection_loop: ConnectionLoop | None = None

    @classmethod
    async def login(cls, url: str, name: str, password: str, *, register: bool = False, **options: Any) -> Self:
        """Log in and return a client that is not started yet; ``options`` are the constructor's.

        :param register: make the account if there is none.
        :raises chatcore.errors.Unauthenticated: the name or the password is wrong.
        :raises OSError: the server cannot be reached.
        """
        log_in = accounts.login_or_register if register else accounts.login
        session = await log_in(Address(url), name, password)
        return cls(url, session.token, **options)

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The event at which the application failed is not processed.
        await self.close(done=kind is None)

    async def start(self) -> None:
        """Connect and authenticate, trying again for ``timeout_s``.

        :raises chatcore.client.errors.Rejected: the server does not accept this client.
        :raises ConnectionError: there was no connection in time.
        """
        if self._connection_loop is not None:
            raise RuntimeError("the client was started before")
        snapshot = decode(await asyncio.to_thread(self._state.load) if self._state is not None else None)
        core = ClientCore(self.token, snapshot, only=self._only, ping_ms=self._ping_ms, window=self._window)
        self._saver = StateSaver(self._state, snapshot, lambda: core.unacknowledged)
        self._connection_loop = io = ConnectionLoop(core, self._saver, self.address, self._queue_max)
        try:
            async with asyncio.timeout(self._timeout_s):
                await io.online.wait()
        except TimeoutError:
            raise ConnectionError(f"no connection to {self.address}: {io.last_loss or 'no answer'}") from None
        self._check_open()

    async def close(self, *, done: bool = True) -> None:
        """Disconnect and end all tasks. Messages not acknowledged stay in the saved state.

        :param done: the event that the application got last counts as processed.
        """
        if self._connection_loop is not None:
            await self._connection_loop.close(done=done)

    # State and events.

    @property
    def user(self) -> User:
        """The user of this session."""
        me = self._core.replica.me
        if me is None:
            raise RuntimeError("the client is not connected yet")
        return me

    @property
    def online(self) -> bool:
        """Whether the client is connected and authenticated right now."""
        return self._core.online

    @property
    def conversations(self) -> Mapping[str, Conversation]:
        """The user's views of all conversations, by id."""
        return self._core.replica.views

    @property
    def unacknowledged(self) -> int:
        """How many messages wait for their ``ok``."""
        return self._core.unacknowledged_count

    def events(self) -> AsyncIterator[Event]:
        """All events from here on until :meth:`close`; for one task at a time.

        Asking for the next event says that the application has processed the one
        before: only then does the saved state move past it.

        The iterator raises :class:`~chatcore.client.errors.Rejected` (and the
        like) when the connection ended for good.
        """
        return _Events(self._io)

    async def ready(self) -> None:
        """Wait until all conversations are known. Raises TimeoutError."""
        async with asyncio.timeout(self._timeout_s):
            while not self._core.ready:
                await self._until_changed()

    async def view(self, conv: str) -> Conversation:
        async with asyncio.timeout(self._timeout_s):
            while (view := self._core.replica.views.get(conv)) is None:
                await self._until_changed()
        return view

    # Requests that need more than a request and its reply.

    async def ask(
        self, t: str, fields: Mapping[str, Any], *, repeat: bool = True, timeout_s: float | None = None
    ) -> dict[str, Any]:
        return await self._ask(t, fields, _ignore, repeat=repeat, timeout_s=timeout_s)

    def post(
        self,
        conv: str,
        body: str,
        *,
        reply_to: int | None = None,
        files: Sequence[str] | None = None,
        data: str | None = None,
        cid: str | None = None,
    ) -> asyncio.Future[Sent]:
        """Send a message without waiting: it is in the outbox when this returns.

        It is repeated, over reconnects and restarts of the server, until it is
        durable or refused for good; messages to one conversation arrive in the
        order of the calls. Cancelling the future does not take it back.

        :raises OutboxFull: too many messages wait already.
        :raises chatcore.errors.BadRequest: the text is no Unicode (half a surrogate pair).
        """
        if self._core.unacknowledged_count >= self._unacknowledged_max:
            raise OutboxFull(f"{self._unacknowledged_max} messages wait for their acknowledgement")
        draft = Draft(conv, cid or new_cid(), body, reply_to, list(files) if files is not None else None, data)
        future: asyncio.Future[Sent] = asyncio.get_running_loop().create_future()
        # A caller that does not await it gets no warning about its exception when the client closes.
        future.add_done_callback(lambda f: f.cancelled() or f.exception())
        durable = self._saver.durable
        pending = self._core.send(draft, partial(_acknowledged, draft, future), stored=not durable)
        if durable and self._core.failure is None:

            def saved(waiter: asyncio.Future[None]) -> None:
                error = waiter.exception() if not waiter.cancelled() else None
                if error is None:
                    self._core.stored(pending)
                else:
                    self._core.discard(pending)
                    _resolve(future, error)
                self._io.apply_outputs()

            self._saver.save_now().add_done_callback(saved)
        self._io.apply_outputs()
        return future

    async def send(self, conv: str, body: str, **options: Any) -> Sent:
        """Send a message and return when it is durable; see :meth:`post` for ``options``.

        If this is cancelled the message goes out all the same.

        :raises chatcore.errors.ChatError: it was refused for good.
        """
        while self._core.unacknowledged_count >= self._unacknowledged_max:
            await self._until_changed()
        return await asyncio.shield(self.post(conv, body, **options))

    async def flush(self) -> None:
        """Return when no message waits for its acknowledgement any more."""
        while self._core.unacknowledged_count:
            await self._until_changed()

    def typing(self, conv: str) -> None:
        """Show the other members that the user is typing; dropped when offline, or sent a moment ago."""
        at = now()
        if at - self._typed.get(conv, -TYPING_EVERY_S) >= TYPING_EVERY_S:
            self._typed[conv] = at
            self._core.send_once("typing", {"c": conv})
            self._io.apply_outputs()

    async def read(self, conv: str, upto: int) -> None:
        await super().read(conv, upto)
        self._core.replica.read_upto(conv, upto)
        self._io.apply_outputs()

    async def attach(self, only: Sequence[str] | None) -> None:
        """Attach just these conversations from now on, on later connections too.

        None: all of them; an empty list: none, which means to be away.
        """
        fields: dict[str, Any] = {}
        if only is not None:
            cursors = self._core.replica.catchup.cursors
            fields = {"only": list(only), "have": {c: cursors[c].have for c in only if c in cursors}}
        await self.ask("attach", fields)
        self._core.attach(list(only) if only is not None else None)

    async def watch(self, users: Sequence[str]) -> list[Presence]:
        """Get :class:`Presence` events of these users (and no others), on later connections too.

        Returns their states now.
        """
        reply = await self.ask("watch", {"users": list(users)})
        self._core.watch(list(users))
        return states_of(reply)

    async def join(self, conv: str) -> Conversation:
        await self.ready()  # or the owner of a channel might make a plain member of himself
        if conv in self.conversations:
            return self.conversations[conv]
        await self.member(conv, self.user.id, "member")
        return await self.view(conv)

    async def leave(self, conv: str) -> None:
        def left(reply: dict[str, Any]) -> None:
            # At once: a push behind the reply may bring the user back.
            seq = reply.get("s")
            self._core.replica.left(conv, seq if isinstance(seq, int) else None)

        await self._ask("member", {"c": conv, "user": self.user.id, "role": "none"}, left)
        self._io.apply_outputs()

    async def channel(self, title: str) -> str:
        """The id of the channel of this title: joined, or made if there is none.

        See :mod:`chatcore.client.requests` for what happens when several clients make it at once.
        """
        return await channel_of_title(self, title)

    async def dm(self, name: str) -> str:
        """The id of the direct conversation with the user of this name. Raises NotFound."""
        user = await accounts.find_user(self.address, self.token, name)
        if user is None:
            raise NotFound(f"there is no user {name!r}")
        conv = await self.open("dm", members=[user.id])
        await self.view(conv)
        return conv

    async def name_of(self, user: str) -> str:
        """The name of a user by id; the id itself if there is no such user. Remembered."""
        if user not in self._users:
            for found in await self.users([user]):
                self._users[found.id] = found
        return self._users[user].name if user in self._users else user

    async def renew(self, token: str) -> None:
        """Use a new token of the same user, on this connection and later ones."""
        self.token = token
        self._core.renew(token, now())
        self._io.apply_outputs()

    async def logout(self) -> None:
        """End the session on the server; it closes the connection, which ends the client."""
        await accounts.logout(self.address, self.token)

    def nudge(self) -> None:
        """The machine woke up or changed networks: look at once whether the server is there."""
        self._core.nudge(now())
        self._io.apply_outputs()

    # Internals.

    async def _ask(
        self,
        t: str,
        fields: Mapping[str, Any],
        on_ok: Callable[[dict[str, Any]], None],
        *,
        repeat: bool = True,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """As :meth:`ask`; ``on_ok`` is called with the reply before any later message is looked at."""
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

        def done(reply: dict[str, Any] | Exception) -> None:
            if not isinstance(reply, Exception):
                on_ok(reply)
            _resolve(future, reply)

        call = self._core.call(t, fields, done, repeat=repeat)
        self._io.apply_outputs()
        try:
            async with asyncio.timeout(self._timeout_s if timeout_s is None else timeout_s):
                return await future
        finally:
            self._core.cancel(call)

    @property
    def _io(self) -> ConnectionLoop:
        if self._connection_loop is None:
            raise RuntimeError("the client is not started: use it in `async with`, or call start()")
        return self._connection_loop

    @property
    def _core(self) -> ClientCore:
        return self._io.core

    def _check_open(self) -> None:
        if self._core.failure is not None:
            raise self._core.failure

    async def _until_changed(self) -> None:
        """Wait until something has changed. Raises the exception that ended the connection for good."""
        self._check_open()
        self._io.changed.clear()
        await self._io.changed.wait()


class _Events:
    """The iterator of :meth:`Client.events`."""

    def __init__(self, io: ConnectionLoop) -> None:
        self._io = io

    def __aiter__(self) -> _Events:
        return self

    async def __anext__(self) -> Event:
        return await self._io.next_event()


def _acknowledged(draft: Draft, future: asyncio.Future[Sent], reply: dict[str, Any] | Exception) -> None:
    if isinstance(reply, Exception):
        _resolve(future, reply)
    else:
        seq, ts = int(reply.get("s", 0)), int(reply.get("ts", 0))
        _resolve(future, Sent(draft.conv, draft.cid, seq, ts, bool(reply.get("dup"))))


def _ignore(_: object) -> None:
    pass


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
