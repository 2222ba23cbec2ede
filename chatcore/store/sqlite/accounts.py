"""Requests on accounts, tokens, read marks and settings."""

from __future__ import annotations

from typing import Any

from ...common.clock import now_ms
from ...errors import Conflict, NotFound, Unauthenticated
from ...protocol import MEMBER_ROLES
from ..base import User
from ..names import name_key
from .requests import Request
from .transaction import Transaction


class Ping(Request, frozen=True, gc=False):
    """A transaction that only shows that there can be one."""

    def apply(self, tx: Transaction) -> None:
        return None


class AddUser(Request, frozen=True, gc=False):
    """A new account; ``id`` is a new one, ``password`` the hash."""

    id: str
    name: str
    password: str

    result = User

    def apply(self, tx: Transaction) -> User:
        if tx.one("SELECT 1 FROM users WHERE id = ? AND name = ?", (self.id, self.name)) is not None:
            return User(self.id, self.name)  # a repetition
        _check_free(tx, self.name, "")
        tx.db.execute(
            "INSERT INTO users(id, name, name_key, password, created) VALUES (?, ?, ?, ?, ?)",
            (self.id, self.name, name_key(self.name), self.password, now_ms()),
        )
        return User(self.id, self.name)


class UpdateUser(Request, frozen=True, gc=False):
    """Another name, another password hash, or both. A new password revokes all tokens but ``keep``."""

    user: str
    name: str | None
    password: str | None
    keep: bytes

    result = User

    def apply(self, tx: Transaction) -> User:
        row = tx.one("SELECT name FROM users WHERE id = ?", (self.user,))
        if row is None:
            raise NotFound("no such user")
        if self.name is not None:
            _check_free(tx, self.name, self.user)
            tx.db.execute(
                "UPDATE users SET name = ?, name_key = ? WHERE id = ?", (self.name, name_key(self.name), self.user)
            )
        if self.password is not None:
            tx.db.execute("UPDATE users SET password = ? WHERE id = ?", (self.password, self.user))
            others = tx.db.execute(
                "DELETE FROM tokens WHERE user = ? AND hash <> ? RETURNING hash", (self.user, self.keep)
            )
            for (token,) in others.fetchall():
                _revoke(tx, bytes(token), None)  # type: ignore[arg-type]
        return User(self.user, self.name if self.name is not None else row[0])


def _check_free(tx: Transaction, name: str, but: str) -> None:
    row = tx.one("SELECT id FROM users WHERE name_key = ?", (name_key(name),))
    if row is not None and row[0] != but:
        raise Conflict("this name is taken")


class SetDisabled(Request, frozen=True, gc=False):
    """Disable an account, which ends its tokens, or enable it again."""

    name: str
    disabled: bool

    def apply(self, tx: Transaction) -> None:
        row = tx.one("SELECT id FROM users WHERE name_key = ?", (name_key(self.name),))
        if row is None:
            raise NotFound(f"no such user: {self.name}")
        tx.db.execute("UPDATE users SET disabled = ? WHERE id = ?", (int(self.disabled), row[0]))
        if self.disabled:
            tx.db.execute("DELETE FROM tokens WHERE user = ?", (row[0],))
            _revoke(tx, None, row[0])


def _revoke(tx: Transaction, token: bytes | None, user: str | None) -> None:
    tx.db.execute("INSERT INTO revocations VALUES (?, ?, ?)", (tx.tick(), token, user))


class AddToken(Request, frozen=True, gc=False):
    """A new session token; some expired ones, of any users, are swept away with it.

    ``password`` is the hash that was verified: it may have been changed since.
    """

    hash: bytes
    user: str
    expires: int
    password: str

    def apply(self, tx: Transaction) -> None:
        same = "SELECT 1 FROM users WHERE id = ? AND password = ? AND disabled = 0"
        if tx.one(same, (self.user, self.password)) is None:
            raise Unauthenticated("wrong name or password")
        now = now_ms()
        tx.db.execute("DELETE FROM tokens WHERE hash IN (SELECT hash FROM tokens WHERE expires < ? LIMIT 100)", (now,))
        # A repetition finds it there.
        tx.db.execute("INSERT OR IGNORE INTO tokens VALUES (?, ?, ?, ?)", (self.hash, self.user, now, self.expires))


class ExtendToken(Request, frozen=True, gc=False):
    """Tokens slide while they are used. False: it has been revoked."""

    hash: bytes
    expires: int

    result = bool

    def apply(self, tx: Transaction) -> bool:
        sql = "UPDATE tokens SET expires = max(expires, ?) WHERE hash = ? RETURNING 1"
        return tx.one(sql, (self.expires, self.hash)) is not None


class RevokeToken(Request, frozen=True, gc=False):
    """End one token; sessions that used it hear of it through the revocations."""

    hash: bytes

    def apply(self, tx: Transaction) -> None:
        if tx.one("DELETE FROM tokens WHERE hash = ? RETURNING 1", (self.hash,)) is not None:
            _revoke(tx, self.hash, None)


class MarkSeen(Request, frozen=True, gc=False):
    """They were online until now."""

    users: tuple[str, ...]

    def apply(self, tx: Transaction) -> None:
        now = now_ms()
        tx.db.executemany("UPDATE users SET seen = ? WHERE id = ?", [(now, user) for user in self.users])


class SetRead(Request, frozen=True, gc=False):
    """Move a read mark forward (True: it moved)."""

    user: str
    conv: str
    upto: int

    result = bool
    grows = True

    def apply(self, tx: Transaction) -> bool:
        row = _membership(tx, self.user, self.conv, "read")
        log = tx.log(self.conv)
        msgs = tx.msgs_at(log, self.upto)
        if msgs is None and self.upto > 0:
            raise NotFound("upto is beyond the newest entry")
        if msgs is None or self.upto <= tx.mark(self.conv, self.user, row[0]):
            return False
        tx.set_mark(self.conv, self.user, self.upto, msgs)
        return True


class SetNotify(Request, frozen=True, gc=False):
    """Which messages notify this user."""

    user: str
    conv: str
    level: str

    grows = True

    def apply(self, tx: Transaction) -> None:
        if _membership(tx, self.user, self.conv, "notify")[0] != self.level:
            rev = tx.row_changed(self.conv, self.user)
            tx.db.execute(
                "UPDATE members SET notify = ?, rev = ? WHERE conv = ? AND user = ?",
                (self.level, rev, self.conv, self.user),
            )


class Block(Request, frozen=True, gc=False):
    """Refuse direct messages from another user, or allow them again."""

    user: str
    other: str
    on: bool

    def apply(self, tx: Transaction) -> None:
        if tx.one("SELECT 1 FROM users WHERE id = ?", (self.other,)) is None:
            raise NotFound("no such user")
        if self.on:
            tx.db.execute("INSERT OR IGNORE INTO blocks VALUES (?, ?)", (self.user, self.other))
        else:
            tx.db.execute("DELETE FROM blocks WHERE user = ? AND other = ?", (self.user, self.other))
        tx.set_block(self.user, self.other, self.on)


def _membership(tx: Transaction, user: str, conv: str, column: str) -> tuple[Any, ...]:
    row = tx.one(f"SELECT {column}, role FROM members WHERE conv = ? AND user = ?", (conv, user))
    if row is None or row[1] not in MEMBER_ROLES:
        raise NotFound("no such conversation")
    return row
