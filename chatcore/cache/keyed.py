"""What is cached by key beside recent entries: accounts (tokens, profiles) and members (roles, how many there are).

Each part answers the methods of :class:`~chatcore.store.base.Store` of its name; a composition (``store.py``) chooses
whether to have it.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from ..entries import RoleChange, change_of
from ..protocol import MEMBER_ROLES
from ..settings import CacheSettings
from ..store.base import Appended, Entry, Opened, Opening, Store, Token, User, View
from .invalidations import Invalidations
from .l2 import L2
from .l2_format import ALL, PROFILE, ROLE, TOKEN, Key, role_key
from .lookup import Lookup, Spawn, ValuesL1

V = TypeVar("V")

#: The kind of numbers of members, which are neither in level 2 nor announced.
COUNT: Final = "n"
#: Roles taken from one list of conversations; more would evict those of other users.
MAX_SEEN: Final = 200


# --- what the parts share -----------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class CacheContext:
    """What all cached kinds of a worker share.

    :param clock: monotonic, in seconds; ``wall`` Unix time in seconds, as tokens expire by it.
    :param chance: returns a number in [0, 1), for the jitter of lives.
    """

    settings: CacheSettings
    l2: L2 | None
    invalidations: Invalidations
    spawn: Spawn
    clock: Callable[[], float]
    wall: Callable[[], float]
    chance: Callable[[], float]

    def lookup(
        self,
        kind: str,
        ttl_ms: int,
        load: Callable[[Sequence[str]], Awaitable[Mapping[str, V]]],
        pack: Callable[[V], bytes],
        unpack: Callable[[bytes], V],
        *,
        shared: bool = True,
    ) -> Lookup[V]:
        """A :class:`Lookup` that is dropped by invalidations. ``shared``: in level 2, too."""
        l1: ValuesL1[V] = ValuesL1(
            self.settings.l1_entries,
            ttl_s=ttl_ms / 1000,
            negative_ttl_s=self.settings.negative_ttl_ms / 1000,
            clock=self.clock,
            chance=self.chance,
        )
        lookup = Lookup(
            kind, l1, self.l2 if shared else None, load, pack, unpack,
            spawn=self.spawn,
            clock=self.clock,
            max_life_s=self.invalidations.max_life_s,
            refresh=self.settings.refresh,
        )  # fmt: skip
        self.invalidations.register(kind, lookup)
        return lookup


# --- accounts -----------------------------------------------------------------------------
# expires, disabled
_TOKEN: Final = struct.Struct("<QB")


@dataclass(frozen=True, slots=True)
class CachedToken:
    """What a session token stands for. Not the name of the user, which may change: it is a value of its own."""

    user: str
    expires: int
    disabled: bool


def pack_token(token: CachedToken) -> bytes:
    """A token, for level 2."""
    return _TOKEN.pack(token.expires, token.disabled) + token.user.encode()


def unpack_token(data: bytes) -> CachedToken:
    """The inverse of :func:`pack_token`.

    :raises ValueError: not a token.
    """
    try:
        expires, disabled = _TOKEN.unpack_from(data)
    except struct.error as exc:
        raise ValueError(f"not a token: {exc}") from None
    return CachedToken(data[_TOKEN.size :].decode(), expires, bool(disabled))


class CachedAccounts:
    """Tokens and profiles. Accounts themselves are not cached: they have the hash of the password, and are read at
    log-in only."""

    def __init__(self, store: Store, context: CacheContext) -> None:
        self._store = store
        self._wall = context.wall
        self._invalidations = context.invalidations
        settings = context.settings
        self.tokens: Lookup[CachedToken] = context.lookup(
            TOKEN, settings.session_ttl_ms, self._load_tokens, pack_token, unpack_token
        )
        self.profiles: Lookup[str] = context.lookup(
            PROFILE, settings.profile_ttl_ms, self._load_profiles, str.encode, bytes.decode
        )

    async def _load_tokens(self, keys: Sequence[str]) -> dict[str, CachedToken]:
        found: dict[str, CachedToken] = {}
        for key in keys:
            ticket = self.profiles.l1.ticket()
            token = await self._store.token(bytes.fromhex(key))
            if token is not None:
                self.profiles.put_seen(token.user.id, token.user.name, ticket)
                found[key] = CachedToken(token.user.id, token.expires, token.disabled)
        return found

    async def _load_profiles(self, keys: Sequence[str]) -> dict[str, str]:
        return {user.id: user.name for user in await self._store.users(keys)}

    async def token(self, token_hash: bytes) -> Token | None:
        key = token_hash.hex()
        token = await self.tokens.get(key)
        if token is not None and token.expires <= self._wall() * 1000:
            # A token in use is extended, so this one may have been: ask the store.
            self.tokens.suspect(key)
            token = await self.tokens.get(key)
        if token is None:
            return None
        name = await self.profiles.get(token.user)
        if name is None:
            return None
        return Token(User(token.user, name), token.expires, token.disabled)

    async def add_token(self, token_hash: bytes, user: str, expires: int, password: str) -> None:
        key = token_hash.hex()
        in_l2 = await self.tokens.prepare_write(key)
        ticket = self.tokens.l1.ticket()
        await self._store.add_token(token_hash, user, expires, password)
        self.tokens.put_written(key, CachedToken(user, expires, False), ticket, in_l2)

    async def extend_token(self, token_hash: bytes, expires: int) -> bool:
        extended = self._store.extend_token(token_hash, expires)
        return await self._invalidations.around(extended, [(TOKEN, token_hash.hex())])

    async def revoke_token(self, token_hash: bytes) -> None:
        await self._invalidations.around(self._store.revoke_token(token_hash), [(TOKEN, token_hash.hex())])

    async def users(self, ids: Sequence[str]) -> list[User]:
        names = await self.profiles.get_many(ids)
        return [User(id, names[id]) for id in ids if id in names]

    async def add_user(self, name: str, password: str) -> User:
        ticket = self.profiles.l1.ticket()
        user = await self._store.add_user(name, password)
        self.profiles.put_seen(user.id, user.name, ticket)
        return user

    async def update_user(self, user: str, name: str | None, password: str | None, keep: bytes = b"") -> User:
        keys: list[Key] = [(PROFILE, user)]
        if password is not None:
            # Only the store knows which tokens this revoked; it happens rarely.
            keys.append((TOKEN, ALL))
        return await self._invalidations.around(self._store.update_user(user, name, password, keep), keys)

    async def set_disabled(self, name: str, disabled: bool) -> None:
        await self._invalidations.around(self._store.set_disabled(name, disabled), [(TOKEN, ALL)])

    async def drop_revoked(self, tokens: Sequence[bytes], users: Sequence[str]) -> None:
        """Drop tokens that the store says are revoked, by themselves or with all those of a user."""
        keys = [(TOKEN, ALL)] if users else [(TOKEN, token.hex()) for token in tokens]
        if keys:
            await self._invalidations.drop(keys)


# --- members ------------------------------------------------------------------------------
class CachedMembers:
    """Roles, and how many members a conversation has."""

    def __init__(self, store: Store, context: CacheContext) -> None:
        self._store = store
        self._invalidations = context.invalidations
        settings = context.settings
        self.roles: Lookup[str] = context.lookup(ROLE, settings.role_ttl_ms, self._load_roles, str.encode, bytes.decode)
        # In level 1 only: joining a channel is not announced, so the number is some seconds old in any case.
        self.counts: Lookup[int] = context.lookup(
            COUNT, settings.count_ttl_ms, self._load_counts, lambda n: b"%d" % n, int, shared=False
        )

    async def _load_roles(self, keys: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for key in keys:
            conv, _, user = key.partition(":")
            role = await self._store.role(user, conv)
            if role in MEMBER_ROLES:
                found[key] = role
        return found

    async def _load_counts(self, keys: Sequence[str]) -> dict[str, int]:
        return {conv: await self._store.member_count(conv) for conv in keys}

    async def views(self, user: str, convs: Sequence[str] | None = None) -> tuple[int, list[View]]:
        """The store's; the roles and the numbers of members in them are kept."""
        ticket, counts_ticket = self.roles.l1.ticket(), self.counts.l1.ticket()
        position, views = await self._store.views(user, convs)
        for view in views[:MAX_SEEN]:
            self.roles.put_seen(role_key(user, view.conv), view.role, ticket)
            self.counts.put_seen(view.conv, view.members, counts_ticket)
        return position, views

    async def open(self, conv: Opening) -> Opened:
        opened = await self._store.open(conv)
        if opened.created:
            users = (conv.creator, *conv.members)
            await self._invalidations.invalidate([(ROLE, role_key(user, opened.conv)) for user in users])
        return opened

    def appended(self, user: str, conv: str, future: asyncio.Future[Appended]) -> asyncio.Future[Appended]:
        """The outcome of an append that changes the role of a user, once the role is invalidated."""
        key = (ROLE, role_key(user, conv))

        async def after() -> Appended:
            # The append itself is not awaited: a caller that is cancelled must not cancel it.
            await asyncio.wait([future])
            return await self._invalidations.around(future, [key])

        return asyncio.ensure_future(after())

    def on_role_change(self, e: Entry) -> None:
        """An entry that changes a role was committed. The worker that made it invalidates the role, too, when the row
        reflects the entry, which may be later."""
        self.counts.drop(e.conv)
        change = change_of(e.t, e.wire)
        if isinstance(change, RoleChange):
            self.roles.drop(role_key(change.user, e.conv))
