"""Accounts from the command line: straight to the store, whether a server runs or not.

A running server sees what was done here within its check interval.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw

from ..errors import BadRequest, Unavailable
from ..settings import Settings
from ..store.names import check_name
from ..store.sqlite import accounts, ops
from ..store.sqlite.lock import WriteLock
from ..store.sqlite.schema import BrokenStore, connect, database_path, prepare
from .passwords import Passwords


@contextmanager
def _database(settings: Settings, *, make: bool) -> Iterator[apsw.Connection]:
    data = Path(settings.server.data)
    if not database_path(data).exists():
        if not make:
            raise BadRequest(f"there is no chatcore data in {data}")
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = WriteLock(data)
    try:
        with lock:
            prepare(data)
            db = connect(database_path(data), write=True)
            try:
                yield db
            finally:
                db.close()
    except (BrokenStore, apsw.Error) as exc:
        raise Unavailable(str(exc)) from None
    finally:
        lock.close()


def _write(settings: Settings, op: ops.Op, *, make: bool) -> object:
    with _database(settings, make=make) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            result: object = op(ops.Transaction(db, b""))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return result


def add_user(settings: Settings, name: str, password: str) -> str:
    """Make an account; returns its id.

    :raises BadRequest: name or password are not usable.
    :raises Conflict: the name is taken.
    """
    name = check_name(name, settings.limits.name_chars)
    limits, a = settings.limits, settings.accounts
    if not limits.password_chars_min <= len(password) <= limits.password_chars_max:
        raise BadRequest(f"password: {limits.password_chars_min} to {limits.password_chars_max} characters")
    hasher = Passwords(
        memory_kib=a.password_hash_memory_kib,
        time_cost=a.password_hash_time,
        parallel=a.password_hash_parallel,
        queue=1,
    )
    try:
        hashed = hasher.hash_now(password)
    finally:
        hasher.close()
    user = _write(settings, accounts.add_user(name, hashed), make=True)
    return str(getattr(user, "id", ""))


def list_users(settings: Settings) -> list[tuple[str, str, int, bool]]:
    """All accounts by name: (id, name, created in Unix ms, disabled)."""
    with _database(settings, make=False) as db:
        rows: list[Any] = db.execute("SELECT id, name, created, disabled FROM users ORDER BY name_key").fetchall()
    return [(id, name, created, bool(disabled)) for id, name, created, disabled in rows]


def disable_user(settings: Settings, name: str) -> None:
    """Disable an account and end its sessions.

    :raises NotFound: there is none of this name.
    """
    _write(settings, accounts.set_disabled(name, True), make=False)
