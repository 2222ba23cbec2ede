"""Who is connected to this worker: users, their sessions, and what is told to all of one user's."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Final

import orjson

from ..bus.base import Bus
from ..errors import ChatError
from ..protocol import CloseCode
from ..store.base import Store, View
from . import events

if TYPE_CHECKING:
    from ..session import Session
    from .delivery import Delivery

log = logging.getLogger("chatcore.users")

# A user's rows that were told lately; more than change at once, few enough to forget.
TOLD_MAX: Final = 64
# Between two tries to read what changed for a user, while the store does not answer.
REFRESH_PAUSE_S: Final = 0.2
REFRESH_PAUSE_MAX_S: Final = 2.0
# How late the end of a token may be noticed; all sessions are looked at each time.
EXPIRY_SWEEP_S: Final = 2.0

Spawn = Callable[[Coroutine[Any, Any, None], str], object]


class ConnectedUser:
    """One user with at least one session here. ``number`` stands for the user in C."""

    __slots__ = ("id", "name", "number", "sessions", "told")

    def __init__(self, id: str, name: str, number: int) -> None:
        self.id = id
        self.name = name
        self.number = number
        self.sessions: tuple[Session, ...] = ()  # oldest first; nearly always one, and a list has room for four
        # The change counter of rows that all sessions know already: a change is heard of at
        # least twice, from the bus and from the look at the store.
        self.told: dict[str, int] = {}


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
    ) -> None:
        self._store = store
        self._bus = bus
        self._spawn = spawn
        self._on_presence = on_presence
        self._on_row = on_row  # (conversation, user): changed by another worker
        self._on_block = on_block  # somebody with a session here was blocked by another worker
        self._by_id: dict[str, ConnectedUser] = {}
        self._by_token: dict[bytes, tuple[Session, ...]] = {}  # a set would be 216 bytes for the one that there is
        self._numbers = 0
        self.delivery: Delivery  # set once both exist: each needs the other
        self.sessions = 0
        self._refreshing: set[tuple[str, str]] = set()
        self._again: dict[tuple[str, str], int | None] = {}  # changed once more meanwhile
        self._expiry: asyncio.Task[None] | None = None

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

    async def add(self, x: Session, user: str, name: str, token_hash: bytes) -> ConnectedUser:
        """Register a session, and listen to what concerns its user, before anything is read for it."""
        connected = self._by_id.get(user)
        if connected is None:
            self._numbers += 1
            connected = self._by_id[user] = ConnectedUser(user, name, self._numbers)
        connected.name = name
        connected.sessions += (x,)
        self.sessions += 1
        self._hold(token_hash, x)
        await self._bus.subscribe([events.user_channel(user)])
        return connected

    def remove(self, x: Session, connected: ConnectedUser, token_hash: bytes) -> None:
        """The session is over."""
        if x not in connected.sessions:
            return
        connected.sessions = tuple(other for other in connected.sessions if other is not x)
        self.sessions -= 1
        self._let_go(token_hash, x)
        self._bus.unsubscribe([events.user_channel(connected.id)])
        if not connected.sessions:
            self._by_id.pop(connected.id, None)
        self._on_presence(connected.id)

    def retoken(self, x: Session, old: bytes, new: bytes) -> None:
        """The session renewed its token."""
        self._let_go(old, x)
        self._hold(new, x)

    def _hold(self, token_hash: bytes, x: Session) -> None:
        self._by_token[token_hash] = (*self._by_token.get(token_hash, ()), x)

    def _let_go(self, token_hash: bytes, x: Session) -> None:
        left = tuple(other for other in self._by_token.pop(token_hash, ()) if other is not x)
        if left:
            self._by_token[token_hash] = left

    def is_online(self, user: str) -> bool:
        """Whether a session here is not away."""
        connected = self._by_id.get(user)
        return connected is not None and any(not x.away for x in connected.sessions)

    def connected(self) -> list[str]:
        """Users with a session here."""
        return list(self._by_id)

    def tokens(self) -> list[bytes]:
        """The hashes of their tokens."""
        return list(self._by_token)

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
        known = connected.told.get(view.conv) == view.rev
        all_told = True
        for x in connected.sessions:
            if not x.ready:
                x.missed |= {view.conv}  # its own list may be older, or younger
                continue
            if room is None:
                self.delivery.attach_soon(x, view.conv, have)
            elif x in room.attaching:
                # It may be pushed an older view yet: it is told when it is through.
                room.stale.add(x)
                all_told = False
            elif x.conn in room.topic or x.conn in room.quiet:
                if not known:
                    x.push_view(view, None)
            else:
                self.delivery.attach_soon(x, view.conv, have)
        if all_told:
            self._remember(connected, view.conv, view.rev)

    def _tell_out(self, connected: ConnectedUser, conv: str) -> None:
        known = connected.told.get(conv) == -1
        room = self.delivery.rooms.get(conv)
        for x in connected.sessions:
            if room is not None:
                self.delivery.detach(x, room)
            if not x.ready:
                x.missed |= {conv}
            elif not known:
                x.push(b'{"t":"conv","c":"%b","role":"none"}' % conv.encode())
        self._remember(connected, conv, -1)

    @staticmethod
    def _remember(connected: ConnectedUser, conv: str, rev: int) -> None:
        if len(connected.told) >= TOLD_MAX:
            connected.told.clear()
        connected.told[conv] = rev

    async def _expire(self) -> None:
        """A session ends with its token. Tokens slide while used, so the store is asked before."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(EXPIRY_SWEEP_S)
            now = loop.time()
            due = [token for token, holders in self._by_token.items() if any(x.expires <= now for x in holders)]
            for token_hash in due:
                try:
                    found = await self._store.token(token_hash)
                except ChatError as exc:
                    log.warning("expiry of tokens: %s", exc)
                    break
                left_ms = 0 if found is None else found.expires - time.time_ns() // 1_000_000
                for x in list(self._by_token.get(token_hash, ())):
                    if left_ms > 0:
                        x.expires = loop.time() + left_ms / 1000
                    else:
                        x.close(CloseCode.BAD_TOKEN, "token expired")

    def revoked(self, tokens: list[bytes], users: list[str]) -> None:
        """Close the sessions of these tokens and users."""
        for token in tokens:
            for x in list(self._by_token.get(token, ())):
                x.revoke()
        for user in users:
            for x in list(self.sessions_of(user)):
                x.revoke()

    # --- the users' own channels ------------------------------------------------
    def tell_changed(self, user: str, conv: str, have: int | None = None) -> None:
        """Tell every worker that has sessions of the user, this one too."""
        payload = {"k": "row", "c": conv}
        self._bus.publish(events.user_channel(user), orjson.dumps(payload | ({} if have is None else {"have": have})))
        self.refresh(user, conv, have)

    def tell_blocked(self, user: str) -> None:
        """Who blocks a user has changed: the workers where the user writes may have remembered it."""
        self._bus.publish(events.user_channel(user), orjson.dumps({"k": "blocks"}))
        self._on_block()

    def tell_all(self, user: str, wire: bytes) -> None:
        """Push something to all sessions of a user, everywhere."""
        self._bus.publish(events.user_channel(user), orjson.dumps({"k": "push", "wire": wire.decode()}))
        self.push_all(user, wire)

    def push_all(self, user: str, wire: bytes) -> None:
        """Push something to the user's sessions here."""
        for x in self.sessions_of(user):
            if x.ready:
                x.push(wire)

    def tell_revoked(self, user: str, token_hash: bytes) -> None:
        """A token was revoked: its sessions end at once, wherever they are (the store tells it too)."""
        self._bus.publish(events.user_channel(user), orjson.dumps({"k": "revoked", "token": token_hash.hex()}))
        self.revoked([token_hash], [])

    def on_bus(self, user: str, payload: bytes) -> None:
        """A message on a user's own channel."""
        message = orjson.loads(payload)
        match message.get("k"):
            case "row":
                self._on_row(message["c"], user)
                self.refresh(user, message["c"], message.get("have"))
            case "blocks":
                self._on_block()
            case "push":
                self.push_all(user, message["wire"].encode())
            case "revoked":
                self.revoked([bytes.fromhex(message["token"])], [])
            case _:
                log.warning("unknown message on the channel of %s", user)
