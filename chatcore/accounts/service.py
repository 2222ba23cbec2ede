"""Accounts: registration, login, and the tokens of sessions."""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass

from ..errors import BadRequest, Forbidden, Unauthenticated
from ..settings import Settings
from ..store.base import Store, User
from ..store.names import check_name
from .passwords import Passwords

# A token is extended when this part of its life has gone: one write for many uses.
EXTEND_AFTER = 0.1
TOKEN_BYTES = 32


@dataclass(frozen=True, slots=True)
class Login:
    """A fresh token (shown once: only its hash is kept), for how long, and whose."""

    token: str
    expires_ms: int
    user: User


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a valid token belongs to, and for how long it is valid from now."""

    user: User
    token_hash: bytes
    expires_ms: int


def token_hash(token: str) -> bytes:
    """What the store keeps of a token: it has 256 random bits, so a plain hash is enough."""
    return hashlib.sha256(token.encode()).digest()


def now_ms() -> int:
    """Unix time in ms (what tokens expire by: they outlive processes)."""
    return time.time_ns() // 1_000_000


class Accounts:
    """One per worker."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        accounts = settings.accounts
        self._passwords = Passwords(
            memory_kib=accounts.password_hash_memory_kib,
            time_cost=accounts.password_hash_time,
            parallel=accounts.password_hash_parallel,
            queue=accounts.password_hash_queue,
        )

    def close(self) -> None:
        """End the hashing thread."""
        self._passwords.close()

    def check_password(self, password: str) -> None:
        """:raises BadRequest: too short or too long."""
        limits = self._settings.limits
        if not limits.password_chars_min <= len(password) <= limits.password_chars_max:
            raise BadRequest(f"password: {limits.password_chars_min} to {limits.password_chars_max} characters")

    async def register(self, name: str, password: str) -> Login:
        """Make an account and log it in.

        :raises Forbidden: registration is closed.
        :raises BadRequest: name or password are not usable.
        :raises Conflict: the name is taken.
        """
        if not self._settings.registration_open():
            raise Forbidden("registration is closed: ask the operator for an account")
        name = check_name(name, self._settings.limits.name_chars)
        self.check_password(password)
        hashed = await self._passwords.hash(password)
        return await self._issue(await self._store.add_user(name, hashed), hashed)

    async def login(self, name: str, password: str) -> Login:
        """:raises Unauthenticated: unknown user, wrong password or disabled: one answer, one duration."""
        account = await self._store.account(name[: self._settings.limits.name_chars * 4])
        usable = account is not None and len(password) <= self._settings.limits.password_chars_max
        hashed = account.password if account is not None and usable else None
        right = await self._passwords.verify(hashed, password if usable else "x")
        if account is None or not right or account.disabled:
            raise Unauthenticated("wrong name or password")
        return await self._issue(User(account.id, account.name), account.password)

    async def _issue(self, user: User, hashed: str) -> Login:
        token = secrets.token_urlsafe(TOKEN_BYTES)
        ttl = self._settings.accounts.token_ttl_ms
        await self._store.add_token(token_hash(token), user.id, now_ms() + ttl, hashed)
        return Login(token, ttl, user)

    async def identify(self, token: str) -> Identity:
        """Whose token this is; using it extends it.

        :raises Unauthenticated: it is unknown, expired or revoked, or its user is disabled.
        """
        key = token_hash(token)
        found = await self._store.token(key)
        left = 0 if found is None else found.expires - now_ms()
        if found is None or found.disabled or left <= 0:
            raise Unauthenticated("this token is not valid")
        ttl = self._settings.accounts.token_ttl_ms
        if left < ttl * (1 - EXTEND_AFTER):
            if not await self._store.extend_token(key, now_ms() + ttl):
                raise Unauthenticated("this token is not valid")
            left = ttl
        return Identity(found.user, key, left)

    async def logout(self, identity: Identity) -> None:
        """Revoke the token."""
        await self._store.revoke_token(identity.token_hash)

    async def update(self, identity: Identity, name: str | None, password: str | None, old: str | None) -> User:
        """Change one's name, or one's password (which needs the old one, and logs out everywhere else)."""
        if name is not None:
            name = check_name(name, self._settings.limits.name_chars)
        hashed: str | None = None
        if password is not None:
            self.check_password(password)
            account = await self._store.account_by_id(identity.user.id)
            if account is None or not await self._passwords.verify(account.password, old or ""):
                raise Forbidden("the old password is wrong")
            hashed = await self._passwords.hash(password)
        return await self._store.update_user(identity.user.id, name, hashed, identity.token_hash)
