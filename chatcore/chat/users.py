"""Who is connected to this worker: users, their sessions, and what is told to all of one user's."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Final

import orjson

from ..bus.base import Bus
from ..common.locks import Locks
from ..errors import ChatError
from ..protocol import CloseCode, conv_left
from ..store.base import Store, View
from . import events

if TYPE_CHECKING:
    from ..server.session import Session
    from .delivery import Delivery

log = logging.getLogger("chatcore.users")

# A user's rows that were told lately; more than change at once, few enough to forget.
TOLD_MAX: Final = 64
# What is remembered of a conversation that the user was told to be out of.
OUT: Final = (-1, 0)
# Between two tries to read what changed for a user, while the store does not answer.
REFRESH_PAUSE_S: Final = 0.2
REFRESH_PAUSE_MAX_S: Final = 2.0
# How late the end of a token may be noticed; all sessions are looked at each time.
EXPIRY_SWEEP_S: Final = 2.0
# Tokens that end within this are asked for together, at its beginning.
EXPIRY_STEP_S: Final = 10.0

Spawn = Callable[[Coroutine[Any, Any, None], str], object]


class ConnectedUser:
    """One user with at least one session here. ``number`` stands for the user in C."""

    __slots__ = ("id", "number", "sessions", "told")

    def __init__(self, id: str, number: int) -> None:
        self.id = id
        self.number = number
        self.sessions: tuple[Session, ...] = ()  # oldest first; nearly always one, and a list has room for four
        # The change counter of rows that all sessions know already: a change is heard of at
        # least twice, from the bus and from the look at the store. None: of no change yet.
        # With the number of members, which may follow the row a moment later.
        self.told: dict[str, tuple[int, int]] | None = None


class Users:
    """Implements :class:`~.delivery.Directory`."""

    def __init__(
        self,
        store: Store,
        bus: Bus,
        spawn: Spawn,
        on_presence: Callable[[str], None],
        on_row: Callable[[str, str], None] = lambda conv, user: None,
        on_block: Callable[[], None] = lambda: None,
        *,
        channels: int = 0,
    ) -> None:
        """``channels``: how many the users share on the bus; 0: each has one of its own."""
        self._store = store
        self._bus = bus
        self._spawn = spawn
        self._on_presence = on_presence
        self._on_row = on_row  # (conversation, user): changed by another worker
        self._on_block = on_block  # somebody with a session here was blocked by another worker
        self._by_id: dict[str, ConnectedUser] = {}
        self._channels = channels
        self._numbers = 0
        self.delivery: Delivery  # set once both exist: each needs the other
        self.sessions = 0
        self._refreshing: set[tuple[str, str]] = set()
        self._again: dict[tuple[str, str], int | None] = {}  # changed once more meanwhile
        self._expiry: asyncio.Task[None] | None = None
        self._expiry_at = 0.0
        #: One attach of a session after the other, and one expensive query.
        self.attaching: Locks[Session] = Locks()
        self.reading: Locks[Session] = Locks()

    def start(self) -> None:
        """Start the task that ends sessions with their tokens."""
        self._expiry = asyncio.create_task(self._expire(), name="users-expiry")

    async def close(self) -> None:
        """End the task."""
        if self._expiry is not None:
            self._expiry.cancel()
            await asyncio.gather(self._expiry, return_exceptions=True)

    def get(self, user: str) -> ConnectedUser | None:
        """The user, if connected here."""
        return self._by_id.get(user)

    def all_sessions(self) -> list[Session]:
        """Every authenticated session."""
        return [x for user in self._by_id.values() for x in user.sessions]

    def expiry(self, left_ms: int) -> float:
        """When to ask the store whether a token has ended, by the loop's clock: not after its time.

        Those of about the same time share one number, which would be 24 bytes for each session.
        """
        at = (asyncio.get_running_loop().time() + left_ms / 1000) // EXPIRY_STEP_S * EXPIRY_STEP_S
        if at != self._expiry_at:
            self._expiry_at = at
        return self._expiry_at

    async def add(self, x: Session, user: str) -> ConnectedUser:
        """Register a session, and listen to what concerns its user, before anything is read for it."""
        connected = self._by_id.get(user)
        if connected is None:
            self._numbers += 1
            connected = self._by_id[user] = ConnectedUser(user, self._numbers)
        connected.sessions += (x,)
        self.sessions += 1
        await self._bus.subscribe([self._channel(user)])
        return connected

    def remove(self, x: Session, connected: ConnectedUser) -> None:
        """The session is over."""
        if x not in connected.sessions:
            return
        connected.sessions = tuple(other for other in connected.sessions if other is not x)
        self.sessions -= 1
        self._bus.unsubscribe([self._channel(connected.id)])
        if not connected.sessions:
            self._by_id.pop(connected.id, None)
        self._on_presence(connected.id)

    def _channel(self, user: str) -> str:
        """The channel on which what concerns the user is told."""
        return events.user_channel(user, self._channels)

    def is_online(self, user: str) -> bool:
        """Whether a session here is not away."""
        connected = self._by_id.get(user)
        return connected is not None and any(not x.away for x in connected.sessions)

    def connected(self) -> list[str]:
        """Users with a session here."""
        return list(self._by_id)

    def tokens(self) -> list[bytes]:
        """The hashes of their tokens."""
        return list({x.token_hash for x in self.all_sessions()})

    # --- Directory ------------------------------------------------------------
    def sessions_of(self, user: str) -> Iterable[Session]:
        """The user's sessions here."""
        connected = self._by_id.get(user)
        return connected.sessions if connected is not None else ()

    def owner_of(self, user: str) -> int:
        """The user's number here (0: not connected)."""
        connected = self._by_id.get(user)
        return connected.number if connected is not None else 0

    def refresh(self, user: str, conv: str, have: int | None = None) -> None:
        """The user's row of a conversation changed: bring the sessions here up to date.

        ``have``: the seq before the entry that brought the user in, if it was one.
        """
        if user not in self._by_id:
            return
        if (user, conv) in self._refreshing:
            # One after the other: what was read first must not be told last.
            self._again[(user, conv)] = have if have is not None else self._again.get((user, conv))
            return
        self._refreshing.add((user, conv))
        self.delivery.refreshing += 1
        self._spawn(self._refresh(user, conv, have), "users-refresh")

    async def _refresh(self, user: str, conv: str, have: int | None) -> None:
        try:
            pause = REFRESH_PAUSE_S
            while (connected := self._by_id.get(user)) is not None:
                try:
                    _, views = await self._store.views(user, [conv])
                except ChatError as exc:
                    # Nobody would look at this change again: it is told when the store is back.
                    log.warning("refresh of %s: %s", user, exc)
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, REFRESH_PAUSE_MAX_S)
                    continue
                room = self.delivery.rooms.get(conv)
                if views and (room is None or not room.outdated(user, views[0])):
                    self._tell(connected, views[0], have)
                else:
                    self._tell_out(connected, conv)
                if (user, conv) not in self._again:
                    return
                have = self._again.pop((user, conv))
        finally:
            self._refreshing.discard((user, conv))
            self._again.pop((user, conv), None)
            self.delivery.refreshed()

    def _tell(self, connected: ConnectedUser, view: View, have: int | None) -> None:
        room = self.delivery.rooms.get(view.conv)
        known = connected.told is not None and connected.told.get(view.conv) == (view.rev, view.members)
        all_told = True
        for x in connected.sessions:
            if not x.ready:
                x.missed |= {view.conv}  # its own list may be older, or younger
                all_told = False
                continue
            if room is None:
                self.delivery.attach_soon(x, view.conv, have)
            elif x in room.attaching:
                # It may be pushed an older view yet: it is told when it is through.
                room.stale |= {x}
                all_told = False
            elif x.conn in room.topic or x.conn in room.quiet:
                if not known:
                    x.push_view(view, None)
            else:
                self.delivery.attach_soon(x, view.conv, have)
        self._remember(connected, view.conv, (view.rev, view.members) if all_told else None)

    def _tell_out(self, connected: ConnectedUser, conv: str) -> None:
        known = connected.told is not None and connected.told.get(conv) == OUT
        room = self.delivery.rooms.get(conv)
        all_told = True
        for x in connected.sessions:
            if room is not None:
                self.delivery.detach(x, room)
            if not x.ready:
                x.missed |= {conv}
                all_told = False
            elif not known:
                x.push(conv_left(conv))
        self._remember(connected, conv, OUT if all_told else None)

    @staticmethod
    def _remember(connected: ConnectedUser, conv: str, what: tuple[int, int] | None) -> None:
        """What all sessions know of it now; None: not all know the same."""
        if what is None:
            if connected.told is not None:
                connected.told.pop(conv, None)
            return
        if connected.told is None or len(connected.told) >= TOLD_MAX:
            connected.told = {}
        connected.told[conv] = what

    async def _expire(self) -> None:
        """A session ends with its token. Tokens slide while used, so the store is asked before."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(EXPIRY_SWEEP_S)
            now = loop.time()
            due: dict[bytes, list[Session]] = {}
            for x in self.all_sessions():
                if x.expires <= now:
                    due.setdefault(x.token_hash, []).append(x)
            for token_hash, holders in due.items():
                try:
                    found = await self._store.token(token_hash)
                except ChatError as exc:
                    log.warning("expiry of tokens: %s", exc)
                    break
                left_ms = 0 if found is None else found.expires - time.time_ns() // 1_000_000
                for x in holders:
                    if left_ms > 0:
                        x.expires = loop.time() + left_ms / 1000
                    else:
                        x.close(CloseCode.BAD_TOKEN, "token expired")

    def revoked(self, tokens: list[bytes], users: list[str]) -> None:
        """Close the sessions of these tokens and users."""
        if tokens:
            # Rare, and then for many at once: an index would cost each session more than this costs all.
            gone = set(tokens)
            for x in self.all_sessions():
                if x.token_hash in gone:
                    x.revoke()
        for user in users:
            for x in list(self.sessions_of(user)):
                x.revoke()

    # --- the users' own channels ------------------------------------------------
    def tell_changed(self, user: str, conv: str, have: int | None = None) -> None:
        """Tell every worker that has sessions of the user, this one too."""
        self._publish(user, {"k": "row", "c": conv} | ({} if have is None else {"have": have}))
        self.refresh(user, conv, have)

    def tell_blocked(self, user: str) -> None:
        """Who blocks a user has changed: the workers where the user writes may have remembered it."""
        self._publish(user, {"k": "blocks"})
        self._on_block()

    def tell_all(self, user: str, wire: bytes) -> None:
        """Push something to all sessions of a user, everywhere."""
        self._publish(user, {"k": "push", "wire": wire.decode()})
        self.push_all(user, wire)

    def push_all(self, user: str, wire: bytes) -> None:
        """Push something to the user's sessions here."""
        for x in self.sessions_of(user):
            if x.ready:
                x.push(wire)

    def tell_revoked(self, user: str, token_hash: bytes) -> None:
        """A token was revoked: its sessions end at once, wherever they are (the store tells it too)."""
        self._publish(user, {"k": "revoked", "token": token_hash.hex()})
        self._revoked(user, token_hash)

    def _publish(self, user: str, message: dict[str, Any]) -> None:
        self._bus.publish(self._channel(user), orjson.dumps({"u": user, **message}))

    def _revoked(self, user: str, token_hash: bytes) -> None:
        for x in self.sessions_of(user):
            if x.token_hash == token_hash:
                x.revoke()

    def on_bus(self, payload: bytes) -> None:
        """A message on a user's channel, or on one that the user shares with others."""
        message = orjson.loads(payload)
        user = message["u"]
        match message.get("k"):
            case "row":
                self._on_row(message["c"], user)
                self.refresh(user, message["c"], message.get("have"))
            case "blocks":
                self._on_block()
            case "push":
                self.push_all(user, message["wire"].encode())
            case "revoked":
                self._revoked(user, bytes.fromhex(message["token"]))
            case _:
                log.warning("unknown message on the channel of %s", user)
