"""The users that are connected to this worker, and the sessions of each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from ..common.clock import now_ms
from ..common.tasks import Tasks
from ..errors import ChatError
from ..protocol import CloseCode
from ..store.base import Token
from .interfaces import Subscriber, Subscriptions

log = logging.getLogger("chatcore.directory")

# Views remembered of one user; more than change at once, few enough to forget.
KNOWN_VIEWS_MAX: Final = 64
#: In place of a view: the user is out of the conversation.
OUT: Final = (-1, 0)
# How late the end of a token may be noticed; all sessions are looked at each time.
EXPIRY_SWEEP_S: Final = 2.0
# Tokens that end within this are looked up together, at its beginning.
EXPIRY_STEP_S: Final = 10.0

#: What the names of these channels begin with.
USER_CHANNEL: Final = "u:"
#: One channel for the events of all users (no user id is "*").
SHARED_USER_CHANNEL: Final = USER_CHANNEL + "*"


def user_channel(user: str) -> str:
    """The channel of the events of one user."""
    return USER_CHANNEL + user


class TokenReads(Protocol):
    """The part of the store that is used here."""

    async def token(self, token_hash: bytes) -> Token | None: ...


class ConnectedUser:
    """One user with at least one session on this worker. ``number`` stands for the user in C."""

    __slots__ = ("_known_views", "id", "number", "sessions")

    def __init__(self, id: str, number: int) -> None:
        self.id = id
        self.number = number
        self.sessions: tuple[Subscriber, ...] = ()  # oldest first; nearly always one, and a list has room for four
        # Conversation -> (change counter of the row, number of members) that all sessions have been sent: a change
        # arrives at least twice, from the bus and from the check of the store. None: of no change yet.
        self._known_views: dict[str, tuple[int, int]] | None = None

    def knows_view(self, conv: str, view: tuple[int, int]) -> bool:
        """Whether all sessions have been sent just this."""
        return self._known_views is not None and self._known_views.get(conv) == view

    def learned_view(self, conv: str, view: tuple[int, int] | None) -> None:
        """All sessions have been sent this; None: not all have been sent the same."""
        if view is None:
            if self._known_views is not None:
                self._known_views.pop(conv, None)
            return
        if self._known_views is None or len(self._known_views) >= KNOWN_VIEWS_MAX:
            self._known_views = {}
        self._known_views[conv] = view


class Directory:
    """One per worker. Owns the task that closes sessions whose token has ended."""

    def __init__(
        self, store: TokenReads, bus: Subscriptions, on_presence: Callable[[str], None], *, one_channel: bool = False
    ) -> None:
        """:param on_presence: called with a user of whom a session ended.
        :param one_channel: the users share one channel of the bus; otherwise each has its own.
        """
        self._store = store
        self._bus = bus
        self._on_presence = on_presence
        self._one_channel = one_channel
        self._by_id: dict[str, ConnectedUser] = {}
        self._numbers = 0
        self.sessions = 0
        self._tasks = Tasks()
        self._expiry_at = 0.0

    async def start(self) -> None:
        """Subscribe to a shared channel, and start the task that closes sessions whose token has ended."""
        if self._one_channel:
            await self._bus.subscribe([SHARED_USER_CHANNEL])
        self._tasks.spawn(self._expire(), "directory-expiry")

    async def close(self) -> None:
        """End the task."""
        await self._tasks.close()

    # --- registering ------------------------------------------------------------
    async def add(self, x: Subscriber, user: str) -> ConnectedUser:
        """Register a session before anything is read for it: it misses no event of its user from here on."""
        connected = self._by_id.get(user)
        if connected is None:
            self._numbers += 1
            connected = self._by_id[user] = ConnectedUser(user, self._numbers)
        connected.sessions += (x,)
        self.sessions += 1
        if not self._one_channel:
            await self._bus.subscribe([user_channel(user)])
        return connected

    def remove(self, x: Subscriber, connected: ConnectedUser) -> None:
        """The session is over."""
        if x not in connected.sessions:
            return
        connected.sessions = tuple(other for other in connected.sessions if other is not x)
        self.sessions -= 1
        if not self._one_channel:
            self._bus.unsubscribe([user_channel(connected.id)])
        if not connected.sessions:
            self._by_id.pop(connected.id, None)
        self._on_presence(connected.id)

    # --- looking up -------------------------------------------------------------
    def get(self, user: str) -> ConnectedUser | None:
        """The user, if connected here."""
        return self._by_id.get(user)

    def connected(self) -> list[str]:
        """Users with a session here."""
        return list(self._by_id)

    def all_sessions(self) -> list[Subscriber]:
        """Every authenticated session."""
        return [x for user in self._by_id.values() for x in user.sessions]

    def sessions_of(self, user: str) -> Iterable[Subscriber]:
        """The user's sessions here."""
        connected = self._by_id.get(user)
        return connected.sessions if connected is not None else ()

    def owner_of(self, user: str) -> int:
        """The user's number here (0: not connected)."""
        connected = self._by_id.get(user)
        return connected.number if connected is not None else 0

    def is_online(self, user: str) -> bool:
        """Whether a session here is not away."""
        connected = self._by_id.get(user)
        return connected is not None and any(not x.away for x in connected.sessions)

    def tokens(self) -> list[bytes]:
        """The hashes of the tokens in use."""
        return list({x.token_hash for x in self.all_sessions()})

    # --- tokens -----------------------------------------------------------------
    def expiry(self, left_ms: int) -> float:
        """When to look up whether a token has ended, by the loop's clock: not after its time.

        Tokens of about the same time share one number object, which would be 24 bytes for each session.
        """
        at = (asyncio.get_running_loop().time() + left_ms / 1000) // EXPIRY_STEP_S * EXPIRY_STEP_S
        if at != self._expiry_at:
            self._expiry_at = at
        return self._expiry_at

    async def _expire(self) -> None:
        """A session ends with its token. Tokens slide while used, so the store is asked before."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(EXPIRY_SWEEP_S)
            now = loop.time()
            due: dict[bytes, list[Subscriber]] = {}
            for x in self.all_sessions():
                if x.expires <= now:
                    due.setdefault(x.token_hash, []).append(x)
            for token_hash, holders in due.items():
                try:
                    found = await self._store.token(token_hash)
                except ChatError as exc:
                    log.warning("the expiry of tokens cannot be checked: %s", exc)
                    break
                left_ms = 0 if found is None else found.expires - now_ms()
                for x in holders:
                    if left_ms > 0:
                        x.extend(loop.time() + left_ms / 1000)
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

    def revoke_token(self, user: str, token_hash: bytes) -> None:
        """Close the user's sessions with this token."""
        for x in self.sessions_of(user):
            if x.token_hash == token_hash:
                x.revoke()

    # --- blocks -----------------------------------------------------------------
    def blocks_changed(self, user: str) -> None:
        """Another user blocked this one, or allows it again."""
        for x in self.sessions_of(user):
            x.blocks_changed()

    # --- pushing ----------------------------------------------------------------
    def push_all(self, user: str, wire: bytes) -> None:
        """Push something to the user's sessions here."""
        for x in self.sessions_of(user):
            if x.ready:
                x.push(wire)
