"""Write transactions on accounts, tokens, read marks and settings."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from ...common.clock import now_ms
from ...errors import Conflict, NotFound, Unauthenticated
from ...protocol import MEMBER_ROLES
from ..base import User
from ..names import name_key
from .ops import Op, Transaction


def add_user(name: str, password: str) -> Op:
    """A new account; ``password`` is its hash."""

    def op(tx: Transaction) -> User:
        _free(tx, name, "")
        user = User(secrets.token_urlsafe(9), name)
        tx.db.execute(
            "INSERT INTO users(id, name, name_key, password, created) VALUES (?, ?, ?, ?, ?)",
            (user.id, name, name_key(name), password, now_ms()),
        )
        return user

    return op


def update_user(user: str, name: str | None, password: str | None, keep: bytes) -> Op:
    """Another name, another password hash, or both. A new password revokes all tokens but ``keep``."""

    def op(tx: Transaction) -> User:
        row = tx.one("SELECT name FROM users WHERE id = ?", (user,))
        if row is None:
            raise NotFound("no such user")
        if name is not None:
            _free(tx, name, user)
            tx.db.execute("UPDATE users SET name = ?, name_key = ? WHERE id = ?", (name, name_key(name), user))
        if password is not None:
            tx.db.execute("UPDATE users SET password = ? WHERE id = ?", (password, user))
            others = tx.db.execute("DELETE FROM tokens WHERE user = ? AND hash <> ? RETURNING hash", (user, keep))
            for (token,) in others.fetchall():
                _revoke(tx, token, None)  # type: ignore[arg-type]
        return User(user, name if name is not None else row[0])

    return op


def _free(tx: Transaction, name: str, but: str) -> None:
    row = tx.one("SELECT id FROM users WHERE name_key = ?", (name_key(name),))
    if row is not None and row[0] != but:
        raise Conflict("this name is taken")


def set_disabled(name: str, disabled: bool) -> Op:
    """Disable an account, which ends its tokens, or enable it again."""

    def op(tx: Transaction) -> None:
        row = tx.one("SELECT id FROM users WHERE name_key = ?", (name_key(name),))
        if row is None:
            raise NotFound(f"no such user: {name}")
        tx.db.execute("UPDATE users SET disabled = ? WHERE id = ?", (int(disabled), row[0]))
        if disabled:
            tx.db.execute("DELETE FROM tokens WHERE user = ?", (row[0],))
            _revoke(tx, None, row[0])

    return op


def _revoke(tx: Transaction, token: bytes | None, user: str | None) -> None:
    tx.db.execute("INSERT INTO revocations VALUES (?, ?, ?)", (tx.tick(), token, user))


def add_token(token_hash: bytes, user: str, expires: int, password: str) -> Op:
    """A new session token; some expired ones, of any users, are swept away with it.

    ``password`` is the hash that was verified: it may have been changed since.
    """

    def op(tx: Transaction) -> None:
        if tx.one("SELECT 1 FROM users WHERE id = ? AND password = ? AND disabled = 0", (user, password)) is None:
            raise Unauthenticated("wrong name or password")
        now = now_ms()
        tx.db.execute("DELETE FROM tokens WHERE hash IN (SELECT hash FROM tokens WHERE expires < ? LIMIT 100)", (now,))
        tx.db.execute("INSERT INTO tokens VALUES (?, ?, ?, ?)", (token_hash, user, now, expires))

    return op


def extend_token(token_hash: bytes, expires: int) -> Op:
    """Tokens slide while they are used."""

    def op(tx: Transaction) -> bool:
        sql = "UPDATE tokens SET expires = max(expires, ?) WHERE hash = ? RETURNING 1"
        return tx.one(sql, (expires, token_hash)) is not None

    return op


def revoke_token(token_hash: bytes) -> Op:
    """End one token; sessions that used it hear of it through the revocations."""

    def op(tx: Transaction) -> None:
        if tx.one("DELETE FROM tokens WHERE hash = ? RETURNING 1", (token_hash,)) is not None:
            _revoke(tx, token_hash, None)

    return op


def mark_seen(users: Sequence[str]) -> Op:
    """They were online until now."""

    def op(tx: Transaction) -> None:
        now = now_ms()
        tx.db.executemany("UPDATE users SET seen = ? WHERE id = ?", [(now, user) for user in users])

    return op


def set_read(user: str, conv: str, upto: int) -> Op:
    """Move a read mark forward (True: it moved)."""

    def op(tx: Transaction) -> bool:
        row = _membership(tx, user, conv, "read")
        entry = tx.one("SELECT msgs FROM entries WHERE conv = ? AND seq = ?", (conv, upto))
        if entry is None and upto > 0:
            raise NotFound("upto is beyond the newest entry")
        if upto <= row[0] or entry is None:
            return False
        tx.db.execute(
            "UPDATE members SET read = ?, read_msgs = ?, rev = ? WHERE conv = ? AND user = ?",
            (upto, entry[0], tx.tick(), conv, user),
        )
        return True

    return op


def set_notify(user: str, conv: str, level: str) -> Op:
    """Which messages notify this user."""

    def op(tx: Transaction) -> None:
        if _membership(tx, user, conv, "notify")[0] != level:
            tx.db.execute(
                "UPDATE members SET notify = ?, rev = ? WHERE conv = ? AND user = ?", (level, tx.tick(), conv, user)
            )

    return op


def block(user: str, other: str, on: bool) -> Op:
    """Refuse direct messages from another user, or allow them again."""

    def op(tx: Transaction) -> None:
        if tx.one("SELECT 1 FROM users WHERE id = ?", (other,)) is None:
            raise NotFound("no such user")
        if on:
            tx.db.execute("INSERT OR IGNORE INTO blocks VALUES (?, ?)", (user, other))
        else:
            tx.db.execute("DELETE FROM blocks WHERE user = ? AND other = ?", (user, other))

    return op


def _membership(tx: Transaction, user: str, conv: str, column: str) -> tuple[Any, ...]:
    row = tx.one(f"SELECT {column}, role FROM members WHERE conv = ? AND user = ?", (conv, user))
    if row is None or row[1] not in MEMBER_ROLES:
        raise NotFound("no such conversation")
    return row
