"""One client on one WebSocket connection: states, dispatch, limits.

States: connected (only ``auth`` is answered) → logging in (requests that arrive meanwhile
wait) → live. A session owns its state, and nothing that outlives its connection; the worker
owns its tasks, which find ``closed`` set when they come back from an await.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import orjson

from .. import protocol as p
from ..accounts.service import Accounts, Identity
from ..chat.delivery import Delivery
from ..chat.directory import ConnectedUser, Directory
from ..chat.presence import Presence
from ..chat.service import Chat, TypingGate
from ..common.backoff import Backoff
from ..common.clock import now_ms
from ..common.locks import Locks
from ..common.tasks import Tasks
from ..common.text import cut
from ..errors import ChatError, Forbidden, Internal, RateLimited, TooLarge, Unauthenticated, Unavailable
from ..settings import Settings
from ..store.base import Appended, Store, View

log = logging.getLogger("chatcore.session")

# An empty set of its own would be 216 bytes.
NOTHING: Final[frozenset[str]] = frozenset()


# RFC 6455, 5.5: a control frame holds 125 bytes, of which the code takes two.
REASON_BYTES: Final = 123


class Connection(Protocol):
    """The part of :class:`~chatcore._fast.reactor.Reactor` that is used here; ``conn`` numbers its connections."""

    def send(self, conn: int, payload: bytes, /) -> bool: ...
    def close(self, conn: int, code: int, reason: bytes, /) -> object: ...
    def queued(self, conn: int, /) -> int: ...
    def notify_writable(self, conn: int, /) -> bool: ...
    def authenticated(self, conn: int, owner: int, ping_ms: int, /) -> object: ...
    def defer(self, conn: int, /) -> int: ...


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of a worker that its sessions use; all sessions share one."""

    settings: Settings
    store_id: str
    reactor: Connection
    store: Store
    accounts: Accounts
    directory: Directory
    delivery: Delivery
    presence: Presence
    chat: Chat
    tasks: Tasks
    #: One query at a time for each session, of those whose cost the client chooses.
    queries: Locks[Session] = field(default_factory=Locks)


class Session:
    """Implements :class:`~chatcore.chat.interfaces.Subscriber`."""

    __slots__ = (
        "_attaches",
        "_attaching",
        "_blocks_stale",
        "_busy",
        "_deferred",
        "_drained",
        "_held",
        "_live",
        "_only",
        "_rechecking",
        "_services",
        "_sync",
        "_typing",
        "_user",
        "_visible",
        "_waiting",
        "_watched",
        "closed",
        "conn",
        "expires",
        "ready",
        "token_hash",
    )

    def __init__(self, services: Services, conn: int) -> None:
        self._services = services
        self.conn = conn
        self.closed = False
        self.ready = False  # live: it is sent changes of its user's rows
        self._user: ConnectedUser | None = None
        self.token_hash = b""
        self._only: frozenset[str] | None = None
        self._sync = 0
        self._live = False  # `ready` was sent: from then on there is a `sync` to give
        self._busy = 0  # requests not yet answered
        self._waiting: list[tuple[bytes, int]] | None = None  # arrived while logging in; None: not logging in
        self._drained: asyncio.Future[bool] | None = None
        self._typing: TypingGate | None = None
        self._held = 0  # reasons for which `sync` stands still
        # The lock exists only while it is in use, since a lock is larger than most of the session.
        self._attaching: asyncio.Lock | None = None
        self._attaches = 0  # that hold the lock or wait for it
        # Empty in nearly every session; these then share one set.
        self._deferred = NOTHING  # conversations whose row changed while logging in
        self._watched: tuple[str, ...] = ()  # the users whose presence the client asked for
        self._visible = NOTHING  # of these, the users who do not block it
        self._blocks_stale = False  # the blocks changed since they were looked up
        self._rechecking = False  # a task looks them up again
        self.expires = 0.0  # when its token ends, as far as is known here (the loop's clock)

    # --- Subscriber -------------------------------------------------------------
    @property
    def user_id(self) -> str:
        """The user of the session ("" before the login)."""
        return self._user.id if self._user is not None else ""

    @property
    def away(self) -> bool:
        """The user is not looking: appears offline, is notified."""
        return self._only is not None and not self._only

    def wants(self, conv: str) -> bool:
        """Attached (True), or sent changes of the ``conv`` only (False)."""
        return self._only is None or conv in self._only

    def push(self, payload: bytes) -> bool:
        """Queue a message to the client; False: the connection is gone."""
        return self._services.reactor.send(self.conn, payload)

    def push_view(self, view: View, after: int | None) -> None:
        """Push a ``conv``."""
        if self._user is not None:
            # The user's sessions may differ in what they know of it; a push to all of them notes it afterwards.
            self._user.learned_view(view.conv, None)
        self.push(conv_push(view, after))

    async def drained(self) -> bool:
        """Wait until the outbox is below its low-water mark; a client that reads nothing meanwhile is cut off."""
        reactor = self._services.reactor
        while not self.closed:
            before = reactor.queued(self.conn)
            if reactor.notify_writable(self.conn):
                return True
            if self._drained is None or self._drained.done():
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._drained], timeout=self._services.settings.timeouts.replay_stall_ms / 1000)
            if not self._drained.done() and reactor.queued(self.conn) >= before:
                self.close(p.CloseCode.TOO_SLOW, "too slow: nothing was read while catching up")
                return False
        return False

    def on_writable(self) -> None:
        """The outbox is below its low-water mark."""
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(True)

    @contextlib.asynccontextmanager
    async def attach_lock(self) -> AsyncIterator[None]:
        """One attach after the other."""
        lock = self._attaching = self._attaching or asyncio.Lock()
        self._attaches += 1
        try:
            async with lock:
                yield
        finally:
            self._attaches -= 1
            if not self._attaches:
                self._attaching = None

    def hold_sync(self) -> None:
        """Keep ``sync`` where it is: a push that it would cover is still due. Calls nest."""
        self._held += 1

    def release_sync(self) -> None:
        """Undo one :meth:`hold_sync`."""
        self._held -= 1

    def defer_refresh(self, conv: str) -> None:
        """A row changed before the session was ``ready``: refresh it as soon as it is."""
        self._deferred |= {conv}

    def blocks_changed(self) -> None:
        """A user blocked this one, or allows it again: what it may watch changed."""
        if self._watched:
            self._blocks_stale = True
            if not self._rechecking:  # however many blocks change: one task, one more look
                self._rechecking = True
                self._services.tasks.spawn(self._watch_again(), "session-watch")

    def extend(self, expires: float) -> None:
        """The token was found to be valid for longer."""
        self.expires = expires

    # --- life -------------------------------------------------------------------
    @property
    def busy(self) -> bool:
        """Whether a request of the client is not answered yet."""
        return self._busy > 0

    def close(self, code: int, reason: str = "") -> None:
        """Close with a code; what is queued is sent first."""
        self._services.reactor.close(self.conn, code, cut(reason, REASON_BYTES))

    def revoke(self) -> None:
        """The token is no longer valid."""
        self.close(p.CloseCode.BAD_TOKEN, "token revoked")

    def on_closed(self) -> None:
        """The connection is over: no message arrives any more, and pushes are dropped."""
        self.closed = True
        self.ready = False
        self.on_writable()
        self._waiting = None
        visible, self._visible = self._visible, NOTHING
        self._services.presence.forget(self, visible)
        self._leave()

    def _gone(self) -> bool:
        """``closed``, asked again after an await."""
        return self.closed

    def _leave(self) -> None:
        if self._user is not None:
            user, self._user = self._user, None
            self._services.directory.remove(self, user)

    # --- requests -----------------------------------------------------------
    def on_message(self, data: bytes, wait_ms: int) -> None:
        """One message from the client."""
        if wait_ms:
            self._refuse(p.request_id(data), RateLimited("too many messages", retry_after_ms=wait_ms))
            return
        if self._waiting is not None:
            if len(self._waiting) >= self._services.settings.limits.outstanding:
                self._defer(p.request_id(data))
            else:
                self._waiting.append((data, wait_ms))
            return
        try:
            req = p.decode(data)
        except p.Malformed as exc:
            self.close(p.CloseCode.MALFORMED, str(exc))
            return
        except p.InvalidRequest as exc:
            if exc.id is not None or b'"id"' in data:
                self.push(p.error(exc.id, exc.code, exc.message))
            return
        if self._busy >= self._services.settings.limits.outstanding:
            self._defer(req.id)
            return
        if isinstance(req, p.Auth):
            # From here until the answer, requests that arrive wait (the client need not wait for it).
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

    def _defer(self, id: int | None) -> None:
        """Refuse the message that came last: too many are unanswered. It costs nothing of the rate."""
        wait_ms = self._services.reactor.defer(self.conn)
        if wait_ms:
            self._refuse(id, RateLimited("too many unanswered requests", retry_after_ms=wait_ms))

    def _start(self, work: Coroutine[Any, Any, dict[str, Any] | None], id: int | None) -> None:
        self._busy += 1
        self._services.tasks.spawn(self._run(work, id), "session-request")

    async def _run(self, work: Coroutine[Any, Any, dict[str, Any] | None], id: int | None) -> None:
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
            future = self._services.chat.send(user, req)
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
            self._services.tasks.spawn(after_reply, "session-attach")
        # The reply is out; requests that waited are answered before the replay, which may take long.
        for data, wait_ms in waiting or ():
            if not self.closed:
                self.on_message(data, wait_ms)
        return None

    async def _log_in(self, req: p.Auth) -> Coroutine[Any, Any, None] | None:
        """Answer ``auth``; returns the work that follows the reply, if there is any."""
        services, limits = self._services, self._services.settings.limits
        if req.v != p.VERSION:
            self.close(p.CloseCode.BAD_VERSION, f"this server speaks version {p.VERSION}")
            return None
        if len(req.have or ()) > limits.have:
            raise TooLarge(f"have: at most {limits.have}")
        if len(req.only or ()) > limits.only:
            raise TooLarge(f"only: at most {limits.only}")
        try:
            who = await services.accounts.identify(req.token)
        except Unauthenticated as exc:
            self.close(p.CloseCode.BAD_TOKEN, exc.message)
            return None
        if self._gone():
            return None
        if self._user is not None:
            self._renew(who, req)
            return None
        self.token_hash = who.token_hash
        self.expires = services.directory.expiry(who.expires_ms)
        self._only = None if req.only is None else frozenset(req.only)
        self._user = await services.directory.add(self, who.user.id)
        if self._gone():
            services.directory.remove(self, self._user)
            self._user = None
            return None
        have = req.have or {}
        since = self._known_sync(req.sync, who.user.id)
        # A client that resumes is attached before its memberships are read, where nothing else must be read.
        rooms = services.delivery.expect(self, have) if since is not None and services.store.global_positions else []
        unchanged: dict[str, int] = {}
        live: list[str] = []
        try:
            mine = await services.store.memberships(who.user.id, since)
            if since is not None and since <= mine.position:
                unchanged = {conv: rev for conv, rev in mine.revs.items() if rev <= since}
            else:
                since = None
        except BaseException:  # also a mistake of ours: half logged in is worse than not
            self._leave()
            raise
        finally:
            live = services.delivery.resume(self, rooms, have, unchanged)
        if self._gone():
            return None
        self._sync = mine.position
        services.reactor.authenticated(self.conn, self._user.number, self._ping_ms(req.ping_ms))
        for oldest in self._user.sessions[: -limits.connections_per_user]:
            oldest.close(p.CloseCode.TOO_MANY_CONNECTIONS, "too many connections of this user")
        if req.id is not None:
            self.push(p.ok(req.id, {**_identity(who), "full": since is None}))
        self.ready = True
        deferred, self._deferred = self._deferred, NOTHING
        for conv in deferred:
            services.delivery.refresh(who.user.id, conv)
        services.presence.changed(who.user.id)
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
        self.expires = self._services.directory.expiry(who.expires_ms)
        if req.id is not None:
            self.push(p.ok(req.id, _identity(who)))

    def _ping_ms(self, asked: int | None) -> int:
        timeouts = self._services.settings.timeouts
        if asked is None:
            return timeouts.ping_ms
        return max(timeouts.ping_min_ms, min(asked, timeouts.ping_max_ms))

    def _known_sync(self, sync: str | None, user: str) -> int | None:
        """The position in a ``sync``, if this server may have given it to this user."""
        parts = (sync or "").rsplit(".", 2)
        if len(parts) != 3 or parts[0] != self._services.store_id or parts[1] != user:
            return None
        if not (parts[2].isascii() and parts[2].isdigit()) or len(parts[2]) > 16:
            return None
        return int(parts[2])

    def _sync_now(self) -> dict[str, str]:
        """The ``sync`` as of now; none while the pushes that it covers are still being sent."""
        if not self._live:
            return {}
        if not (self._held or self._attaches) and self._services.store.global_positions:
            self._sync = max(self._sync, self._services.delivery.synced)
        return {"sync": self._sync_text()}

    def _sync_text(self) -> str:
        return f"{self._services.store_id}.{self.user_id}.{self._sync}"

    def _caught_up(self) -> None:
        """All entries that the client missed were queued: ``ready``."""
        self.push(orjson.dumps({"t": "ready", "sync": self._sync_text()}))
        self._live = True

    async def _catch_up(self, convs: list[str], have: dict[str, int], since: int | None) -> None:
        """Push the ``conv``s, the entries that the client missed, and ``ready``."""
        if since is None:
            have = {}

        def changed(view: View) -> bool:
            if since is None or view.rev > since:
                return True
            known = have.get(view.conv)
            return view.head_id > since if known is None else known < view.head

        try:
            async with self.attach_lock():
                await self._services.delivery.attach(self, convs, have, changed)
                if not self.closed:
                    self._caught_up()
        except ChatError as exc:
            # `ok` was sent, so `unavailable` cannot be sent any more: the client reconnects and resumes.
            self.close(p.CloseCode.INTERNAL, exc.message)

    # --- the other requests ---------------------------------------------------------------
    async def _answer(self, user: str, req: p.AnyRequest) -> dict[str, Any] | None:
        """Carry out a request; the fields of its reply (None: it was sent already)."""
        chat = self._services.chat
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
                self._typing = self._typing or TypingGate(self._services.settings.rates.typing_interval_ms)
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
                async with self._services.queries.hold(self):
                    return await self._look_up(user, req)
            case p.Block():
                await chat.block(user, req.user, req.on)
            case p.Ping():
                return {"ts": now_ms(), **self._sync_now()}
        return {}

    async def _look_up(self, user: str, req: p.Members | p.Users | p.Channels | p.Watch) -> dict[str, Any] | None:
        """Queries whose cost a client chooses: one at a time, so that other clients have their turn in between."""
        chat = self._services.chat
        match req:
            case p.Members():
                return await chat.members(user, req)
            case p.Users():
                return {"users": await chat.users(req.ids)}
            case p.Channels():
                return await chat.channels(user, req)
            case p.Watch():
                await chat.acquainted(user, req.users)
                self._watched = tuple(dict.fromkeys(req.users))
                return {"states": await self._watch(user)}

    async def _watch(self, user: str) -> list[dict[str, Any]]:
        """Watch the users that the client named, without those who block it: these appear offline to it."""
        users = self._watched
        hidden = await self._services.chat.blockers(user, users)
        if self.closed:
            return []  # nothing may be registered for it any more
        visible = [other for other in users if other not in hidden]
        before, self._visible = self._visible, frozenset(visible)
        states = {state["user"]: state for state in await self._services.presence.watch(self, before, visible)}
        return [states.get(other) or {"user": other, "state": "offline"} for other in users]

    async def _watch_again(self) -> None:
        """Look up the blocks again until that has succeeded: no later check would find the change."""
        before, backoff = self._visible, Backoff()
        try:
            while self._blocks_stale and not self.closed:
                async with self._services.queries.hold(self):
                    self._blocks_stale = False
                    try:
                        states = await self._watch(self.user_id)
                    except ChatError as exc:
                        log.warning("presence for %s: %s", self.user_id, exc)
                        self._blocks_stale = True
                    else:
                        for state in states:
                            if (state["user"] in before) != (state["user"] in self._visible):
                                self.push(orjson.dumps({"t": "presence", **state}))
                        before = self._visible
                        backoff.reset()
                if self._blocks_stale:
                    await asyncio.sleep(backoff.next())
        finally:
            self._rechecking = False

    async def _attach(self, user: str, req: p.Attach) -> dict[str, Any] | None:
        limits = self._services.settings.limits
        if len(req.have or ()) > limits.have:
            raise TooLarge(f"have: at most {limits.have}")
        if len(req.only or ()) > limits.only:
            raise TooLarge(f"only: at most {limits.only}")
        have = req.have or {}
        async with self.attach_lock():
            convs = list((await self._services.store.memberships(user)).revs)
            if self.closed:
                return None
            if req.only is not None or req.have is None:
                self._only = None if req.only is None else frozenset(req.only)
                self._services.presence.changed(user)
            if req.id is not None:
                self.push(p.ok(req.id))  # "then convs and entries"
            try:
                await self._services.delivery.attach(
                    self, convs, have, lambda view: self.wants(view.conv) or view.conv in have
                )
            except ChatError as exc:
                self.close(p.CloseCode.INTERNAL, exc.message)
        return None

    async def _open(self, user: str, req: p.Open) -> dict[str, Any] | None:
        opened = await self._services.chat.open(user, req)
        try:
            async with self.attach_lock():  # the reply comes after the `conv`
                if not self.closed:
                    have = {opened.conv: 0} if opened.created else {}
                    for conv in await self._services.delivery.attach(self, [opened.conv], have, lambda view: True):
                        self.push(p.conv_left(conv))  # opened long ago, and left since then
        finally:
            self._services.chat.announce_opened(user, req, opened)
        return {"c": opened.conv}


def _identity(who: Identity) -> dict[str, Any]:
    return {"user": {"id": who.user.id, "name": who.user.name}, "expires_ms": who.expires_ms}


def conv_push(view: View, after: int | None) -> bytes:
    """A ``conv`` push with every field of the view; ``after`` if the conversation becomes attached."""
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
        # No entry of this version mentions users (protocol: those of a later version do).
        "mentions": 0,
    }
    if view.last is not None:
        fields["last"] = orjson.Fragment(view.last)
    if after is not None:
        fields["after"] = after
    return orjson.dumps(fields)
