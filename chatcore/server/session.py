"""One client on one WebSocket connection: states, dispatch, limits.

States: connected (only ``auth`` is answered) → logging in (what comes meanwhile
waits) → live. A session owns nothing that outlives its connection; the worker
owns its tasks, which find ``closed`` set when they come back from an await.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Final

import orjson

from .. import protocol as p
from ..accounts.service import Identity
from ..chat.service import TypingGate
from ..chat.users import ConnectedUser
from ..errors import ChatError, Forbidden, Internal, RateLimited, TooLarge, Unauthenticated, Unavailable
from ..store.base import Appended, View

if TYPE_CHECKING:
    from .worker import Worker

log = logging.getLogger("chatcore.session")

# An empty set of its own would be 216 bytes.
NOTHING: Final[frozenset[str]] = frozenset()
# Sends and the like are answered with this delay when too many requests are unanswered.
BUSY_RETRY_MS: Final = 500


class Session:
    """Implements :class:`~.chat.delivery.Subscriber`."""

    __slots__ = (
        "_busy",
        "_drained",
        "_live",
        "_only",
        "_sync",
        "_typing",
        "_user",
        "_waiting",
        "_worker",
        "closed",
        "conn",
        "expires",
        "joining",
        "missed",
        "ready",
        "token_hash",
        "watching",
    )

    def __init__(self, worker: Worker, conn: int) -> None:
        self._worker = worker
        self.conn = conn
        self.closed = False
        self.ready = False  # live: told of changes of its user's rows
        self._user: ConnectedUser | None = None
        self.token_hash = b""
        self._only: frozenset[str] | None = None
        self._sync = 0
        self._live = False  # `ready` was sent: from then on there is a `sync` to give
        self._busy = 0  # requests not yet answered
        self._waiting: list[tuple[bytes, int]] | None = None  # came while logging in; None: not logging in
        self._drained: asyncio.Future[bool] | None = None
        self._typing: TypingGate | None = None
        self.joining = 0
        # Empty in nearly every session, which then share it.
        self.missed = NOTHING  # conversations whose row changed while logging in
        self.watching = NOTHING
        self.expires = 0.0  # when its token ends, as far as is known here (the loop's clock)

    # --- Subscriber -------------------------------------------------------------
    @property
    def user_id(self) -> str:
        """Whose session it is ("" before the login)."""
        return self._user.id if self._user is not None else ""

    @property
    def away(self) -> bool:
        """The user is not looking: appears offline, is notified."""
        return self._only is not None and not self._only

    def wants(self, conv: str) -> bool:
        """Attached (True), or told only of changes (False)."""
        return self._only is None or conv in self._only

    def push(self, payload: bytes) -> bool:
        """Queue a message to the client; False: the connection is gone."""
        return self._worker.reactor.send(self.conn, payload)

    def push_view(self, view: View, after: int | None) -> None:
        """Push a ``conv``."""
        if self._user is not None and self._user.told is not None:
            # Not all of the user's sessions know the same of it any more; who tells all notes it afterwards.
            self._user.told.pop(view.conv, None)
        self.push(conv_push(view, after))

    async def drained(self) -> bool:
        """Wait until the outbox is below its low-water mark; a client that reads nothing meanwhile is cut off."""
        reactor = self._worker.reactor
        while not self.closed:
            before = reactor.queued(self.conn)
            if reactor.notify_writable(self.conn):
                return True
            if self._drained is None or self._drained.done():
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._drained], timeout=self._worker.settings.timeouts.replay_stall_ms / 1000)
            if not self._drained.done() and reactor.queued(self.conn) >= before:
                self.close(p.CloseCode.TOO_SLOW, "no progress")
                return False
        return False

    def on_writable(self) -> None:
        """The outbox is below its low-water mark."""
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(True)

    # --- life -------------------------------------------------------------------
    @property
    def busy(self) -> bool:
        """Whether a request of the client is not answered yet."""
        return self._busy > 0

    def close(self, code: int, reason: str = "") -> None:
        """Close with a code; what is queued is sent first."""
        self._worker.reactor.close(self.conn, code, reason.encode())

    def revoke(self) -> None:
        """The token is no longer valid."""
        self.close(p.CloseCode.BAD_TOKEN, "token revoked")

    def on_closed(self) -> None:
        """The connection is over: nothing comes from it, nothing goes to it."""
        self.closed = True
        self.ready = False
        self.on_writable()
        self._waiting = None
        self._worker.presence.forget(self)
        self._leave()

    def _gone(self) -> bool:
        """``closed``, asked again after an await."""
        return self.closed

    def _leave(self) -> None:
        if self._user is not None:
            user, self._user = self._user, None
            self._worker.users.remove(self, user)

    # --- what comes in ------------------------------------------------------------
    def on_message(self, data: bytes, wait_ms: int) -> None:
        """One message from the client."""
        if wait_ms:
            self._refuse(p.request_id(data), RateLimited("too many messages", retry_after_ms=wait_ms))
            return
        if self._waiting is not None:
            if len(self._waiting) >= self._worker.settings.limits.outstanding:
                self._refuse(p.request_id(data), RateLimited("log in first", retry_after_ms=BUSY_RETRY_MS))
            else:
                self._waiting.append((data, wait_ms))
            return
        try:
            req = p.decode(data)
        except p.Malformed as exc:
            self.close(p.CloseCode.MALFORMED, str(exc)[:100])
            return
        except p.InvalidRequest as exc:
            if exc.id is not None or b'"id"' in data:
                self.push(p.error(exc.id, exc.code, exc.message))
            return
        if self._busy >= self._worker.settings.limits.outstanding:
            self._refuse(req.id, RateLimited("too many unanswered requests", retry_after_ms=BUSY_RETRY_MS))
            return
        if isinstance(req, p.Auth):
            # From here until the answer, what comes waits (the client need not wait for it).
            self._waiting = []
            self._start(self._auth(req), req.id)
        elif self._user is None:
            self._refuse(req.id, Unauthenticated("log in first"))
        elif isinstance(req, p.Send):
            self._send(self._user.id, req)
        else:
            self._start(self._answer(self._user.id, req), req.id)

    def _refuse(self, id: int | None, exc: ChatError) -> None:
        if id is not None:
            self.push(p.error(id, exc.code, exc.message, exc.retry_after_ms))

    def _start(self, work: Any, id: int | None) -> None:
        self._busy += 1
        self._worker.spawn(self._run(work, id), "session-request")

    async def _run(self, work: Any, id: int | None) -> None:
        try:
            fields = await work
            if id is not None and fields is not None:
                self.push(p.ok(id, fields))
        except ChatError as exc:
            self._refuse(id, exc)
        except Exception:
            log.exception("a request failed")
            self._refuse(id, Internal("internal error"))
        finally:
            self._busy -= 1

    # --- send (hot) ------------------------------------------------------------------
    def _send(self, user: str, req: p.Send) -> None:
        try:
            future = self._worker.chat.send(user, req)
        except ChatError as exc:
            self._refuse(req.id, exc)
            return
        self._busy += 1
        future.add_done_callback(functools.partial(self._sent, req.id))

    def _sent(self, id: int | None, future: asyncio.Future[Appended]) -> None:
        self._busy -= 1
        exc = future.exception()
        if id is None:
            return
        if exc is None:
            done = future.result()
            self.push(p.ok_sent(id, done.seq, done.ts, done.dup))
        elif isinstance(exc, ChatError):
            self._refuse(id, exc)
        else:
            self._refuse(id, Unavailable("the outcome is unknown: repeat it with the same cid"))

    # --- auth -------------------------------------------------------------------------
    async def _auth(self, req: p.Auth) -> dict[str, Any] | None:
        try:
            after_reply = await self._log_in(req)
        except ChatError as exc:
            self._refuse(req.id, exc)
            after_reply = None
        finally:
            waiting, self._waiting = self._waiting, None
        if after_reply is not None:
            self._worker.spawn(after_reply, "session-attach")
        # The reply is out; what waited is dealt with before the replay, which may take long.
        for data, wait_ms in waiting or ():
            if not self.closed:
                self.on_message(data, wait_ms)
        return None

    async def _log_in(self, req: p.Auth) -> Any:
        """Answer ``auth``; returns what is to be done after the reply (None: nothing)."""
        worker, limits = self._worker, self._worker.settings.limits
        if req.v != p.VERSION:
            self.close(p.CloseCode.BAD_VERSION, f"this server speaks version {p.VERSION}")
            return None
        if len(req.have or ()) > limits.have:
            raise TooLarge(f"have: at most {limits.have}")
        if len(req.only or ()) > limits.only:
            raise TooLarge(f"only: at most {limits.only}")
        try:
            who = await worker.accounts.identify(req.token)
        except Unauthenticated as exc:
            self.close(p.CloseCode.BAD_TOKEN, exc.message)
            return None
        if self._gone():
            return None
        if self._user is not None:
            self._renew(who, req)
            return None
        self.token_hash = who.token_hash
        self.expires = worker.users.expiry(who.expires_ms)
        self._only = None if req.only is None else frozenset(req.only)
        self._user = await worker.users.add(self, who.user.id)
        if self._gone():
            worker.users.remove(self, self._user)
            self._user = None
            return None
        have = req.have or {}
        since = self._known_sync(req.sync, who.user.id)
        # Who comes back is attached before the memberships are read, where that is all there is to be read.
        rooms = worker.delivery.expect(self, have) if since is not None and worker.store.global_positions else []
        unchanged: dict[str, int] = {}
        live: list[str] = []
        try:
            mine = await worker.store.memberships(who.user.id, since)
            if since is not None and since <= mine.position:
                unchanged = {conv: rev for conv, rev in mine.revs.items() if rev <= since}
            else:
                since = None
        except BaseException:  # also a mistake of ours: half logged in is worse than not
            self._leave()
            raise
        finally:
            live = worker.delivery.resume(self, rooms, have, unchanged)
        if self._gone():
            return None
        self._sync = mine.position
        worker.reactor.authenticated(self.conn, self._user.number, self._ping_ms(req.ping_ms))
        for oldest in self._user.sessions[: -limits.connections_per_user]:
            oldest.close(p.CloseCode.TOO_MANY_CONNECTIONS, "too many connections of this user")
        if req.id is not None:
            self.push(p.ok(req.id, {**_identity(who), "full": since is None}))
        self.ready = True
        for conv in self.missed:
            worker.users.refresh(who.user.id, conv)
        self.missed = NOTHING
        worker.presence.changed(who.user.id)
        for conv in mine.left if since is not None else ():
            self.push(p.conv_left(conv))
        done = set(live)
        rest = [conv for conv in mine.revs if conv not in done]
        if rest:
            return self._catch_up(rest, have, since)
        self._caught_up()
        return None

    def _renew(self, who: Identity, req: p.Auth) -> None:
        assert self._user is not None
        if who.user.id != self._user.id:
            raise Forbidden("this connection belongs to another user")
        self.token_hash = who.token_hash
        self.expires = self._worker.users.expiry(who.expires_ms)
        if req.id is not None:
            self.push(p.ok(req.id, _identity(who)))

    def _ping_ms(self, asked: int | None) -> int:
        timeouts = self._worker.settings.timeouts
        if asked is None:
            return timeouts.ping_ms
        return max(timeouts.ping_min_ms, min(asked, timeouts.ping_max_ms))

    def _known_sync(self, sync: str | None, user: str) -> int | None:
        """The position of a ``sync``, if this server may have given it to this user."""
        parts = (sync or "").rsplit(".", 2)
        if len(parts) != 3 or parts[0] != self._worker.store.store_id or parts[1] != user:
            return None
        if not (parts[2].isascii() and parts[2].isdigit()) or len(parts[2]) > 16:
            return None
        return int(parts[2])

    def _sync_now(self) -> dict[str, str]:
        """The ``sync`` as of now; none while what it stands for is still being sent."""
        if not self._live:
            return {}
        busy = self.joining or self in self._worker.users.attaching
        if not busy and self._worker.store.global_positions:
            self._sync = max(self._sync, self._worker.delivery.settled)
        return {"sync": self._sync_text()}

    def _sync_text(self) -> str:
        return f"{self._worker.store.store_id}.{self.user_id}.{self._sync}"

    def _caught_up(self) -> None:
        """All that was missed is on its way: ``ready``."""
        self.push(orjson.dumps({"t": "ready", "sync": self._sync_text()}))
        self._live = True

    async def _catch_up(self, convs: list[str], have: dict[str, int], since: int | None) -> None:
        """The ``conv`` pushes, the entries that were missed, and ``ready``."""
        if since is None:
            have = {}

        def changed(view: View) -> bool:
            if since is None or view.rev > since:
                return True
            known = have.get(view.conv)
            return view.head_id > since if known is None else known < view.head

        try:
            async with self.attach_lock():
                await self._worker.delivery.attach(self, convs, have, changed)
                if not self.closed:
                    self._caught_up()
        except ChatError as exc:
            # It has been told `ok`, so it cannot be told `unavailable` any more: it resumes.
            self.close(p.CloseCode.INTERNAL, exc.message[:100])

    def attach_lock(self) -> AbstractAsyncContextManager[None]:
        """One attach after the other."""
        return self._worker.users.attaching.hold(self)

    # --- the other requests ---------------------------------------------------------------
    async def _answer(self, user: str, req: p.AnyRequest) -> dict[str, Any] | None:
        """Do it; the fields of the reply."""
        chat = self._worker.chat
        match req:
            case p.History():
                page = await chat.history(user, req, live=True)
                entries = [orjson.Fragment(e.wire) for e in page.entries]
                return {"entries": entries, "more": page.more, "at": page.head}
            case p.Attach():
                return await self._attach(user, req)
            case p.Read():
                await chat.read(user, req)
            case p.Typing():
                self._typing = self._typing or TypingGate(self._worker.settings.rates.typing_interval_ms)
                self._typing.check(req.c, asyncio.get_running_loop().time())
                await chat.typing(user, req)
            case p.Open():
                return await self._open(user, req)
            case p.Member():
                done = await chat.member(user, req)
                return {"s": done.seq} if done.seq else {}
            case p.Meta():
                done = await chat.meta(user, req)
                return {"s": done.seq, "ts": done.ts, **({"dup": True} if done.dup else {})}
            case p.Notify():
                await chat.notify(user, req.c, req.level)
            case p.Members() | p.Users() | p.Channels() | p.Watch():
                async with self._worker.users.reading.hold(self):
                    return await self._look_up(user, req)
            case p.Block():
                await chat.block(user, req.user, req.on)
            case p.Ping():
                return {"ts": self._worker.now_ms(), **self._sync_now()}
        return {}

    async def _look_up(self, user: str, req: p.Members | p.Users | p.Channels | p.Watch) -> dict[str, Any] | None:
        """Queries whose work a client chooses: one at a time, so that others have their turn in between."""
        chat = self._worker.chat
        match req:
            case p.Members():
                return await chat.members(user, req)
            case p.Users():
                return {"users": await chat.users(req.ids)}
            case p.Channels():
                return await chat.channels(user, req)
            case p.Watch():
                await chat.acquainted(user, req.users)
                if self.closed:
                    return None
                return {"states": await self._worker.presence.watch(self, req.users)}

    async def _attach(self, user: str, req: p.Attach) -> dict[str, Any] | None:
        limits = self._worker.settings.limits
        if len(req.have or ()) > limits.have:
            raise TooLarge(f"have: at most {limits.have}")
        if len(req.only or ()) > limits.only:
            raise TooLarge(f"only: at most {limits.only}")
        async with self.attach_lock():
            convs = list((await self._worker.store.memberships(user)).revs)
            if self.closed:
                return None
            if req.only is not None or req.have is None:
                self._only = None if req.only is None else frozenset(req.only)
                self._worker.presence.changed(user)
            if req.id is not None:
                self.push(p.ok(req.id))  # "then convs and entries"
            try:
                await self._worker.delivery.attach(self, convs, req.have or {}, self._tell_if(req.have or {}))
            except ChatError as exc:
                self.close(p.CloseCode.INTERNAL, exc.message[:100])
        return None

    def _tell_if(self, have: dict[str, int]) -> Callable[[View], bool]:
        """Of an ``attach``: the ``conv`` of what becomes attached, and of what was named."""
        return lambda view: self.wants(view.conv) or view.conv in have

    async def _open(self, user: str, req: p.Open) -> dict[str, Any] | None:
        opened = await self._worker.chat.open(user, req)
        try:
            async with self.attach_lock():  # the reply comes after the `conv`
                if not self.closed:
                    have = {opened.conv: 0} if opened.created else {}
                    await self._worker.delivery.attach(self, [opened.conv], have, _always)
        finally:
            self._worker.chat.tell_opened(user, req, opened)
        return {"c": opened.conv}


def _always(view: View) -> bool:
    return True


def _identity(who: Identity) -> dict[str, Any]:
    return {"user": {"id": who.user.id, "name": who.user.name}, "expires_ms": who.expires_ms}


def conv_push(view: View, after: int | None) -> bytes:
    """A ``conv`` with all that is known of it; ``after`` if it becomes attached."""
    fields: dict[str, Any] = {"t": "conv", "c": view.conv, "kind": view.kind}
    if view.title is not None:
        fields["title"] = view.title
    if view.with_id is not None:
        fields["with"] = {"id": view.with_id, "name": view.with_name}
    fields |= {
        "role": view.role,
        "members": view.members,
        "notify": view.notify,
        "head": view.head,
        "read": view.read,
        "unread": view.unread,
        # No entry of this version mentions anybody (protocol: they come with a later one).
        "mentions": 0,
    }
    if view.last is not None:
        fields["last"] = orjson.Fragment(view.last)
    if after is not None:
        fields["after"] = after
    return orjson.dumps(fields)
