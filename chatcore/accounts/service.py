"""Accounts: registration, log-in, and session tokens."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Final

from ..common.clock import now_ms
from ..errors import Forbidden, Unauthenticated
from ..settings import Settings
from ..store.base import Store, User
from ..store.names import check_name
from .passwords import Passwords, check_password

#: A token is extended after this part of its life, so that many uses cost one write.
EXTEND_AFTER: Final = 0.1
#: 256 random bits cannot be guessed.
TOKEN_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Login:
    """A fresh token (the store keeps only its hash), its life from now in ms, and its user."""

    token: str
    expires_ms: int
    user: User


@dataclass(frozen=True, slots=True)
class Identity:
    """The user of a valid token, and the rest of the token's life in ms."""

    user: User
    token_hash: bytes
    expires_ms: int


def token_hash(token: str) -> bytes:
    """The hash of a token that the store keeps; a token has 256 random bits, so one round of SHA-256 is enough."""
    return hashlib.sha256(token.encode()).digest()


class Accounts:
    """The accounts service; there is one per worker.

    Tokens expire by the wall clock, since they outlive processes.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._passwords = Passwords.configured(settings)

    def close(self) -> None:
        """End the hashing thread."""
        self._passwords.close()

    async def register(self, name: str, password: str) -> Login:
        """Create an account and log it in.

        :raises Forbidden: registration is closed.
        :raises BadRequest: the name or the password is not allowed.
        :raises Conflict: the name is taken.
        """
        if not self._settings.registration_open():
            raise Forbidden("registration is closed: ask the operator for an account")
        name = check_name(name, self._settings.limits.name_chars)
        check_password(password, self._settings)
        hashed = await self._passwords.hash(password)
        return await self._issue(await self._store.add_user(name, hashed), hashed)

    async def login(self, name: str, password: str) -> Login:
        """Log in with name and password.

        :raises Unauthenticated: the user is unknown or disabled, or the password is wrong; the answer and the time
            that it takes are the same.
        """
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
        """The user of a token. Using a token extends it.

        :raises Unauthenticated: the token is unknown, expired or revoked, or its user is disabled.
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
        """Change the user's name, password or both. A new password needs the `old` one and revokes all other tokens.

        :raises Forbidden: the old password is wrong.
        :raises BadRequest: the name or the password is not allowed.
        :raises Conflict: the name is taken.
        """
        if name is not None:
            name = check_name(name, self._settings.limits.name_chars)
        hashed: str | None = None
        if password is not None:
            check_password(password, self._settings)
            account = await self._store.account_by_id(identity.user.id)
            if account is None or not await self._passwords.verify(account.password, old or ""):
                raise Forbidden("the old password is wrong")
            hashed = await self._passwords.hash(password)
        return await self._store.update_user(identity.user.id, name, hashed, identity.token_hash)
