"""Queries. They run in the reader thread, each on a snapshot of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import apsw
import orjson

from ...errors import NotFound
from ...protocol import MEMBER_ROLES, encode_entry
from ..base import Account, Changes, Entry, Memberships, Page, Peer, Token, User, View
from ..names import name_key
from .schema import POSITION

T = TypeVar("T")
Query = Callable[[apsw.Connection], T]

_ROLES: Final = "('member', 'admin', 'owner')"
# Rows of one kind that a look at the changes takes at once; the rest is `more`.
CHANGES_ROWS: Final = 2000

_ENTRY: Final = "conv, seq, t, sender, ts, cid, msgs, last_msg, fields"

_VIEWS: Final = f"""
SELECT m.conv, c.kind, c.title, CASE WHEN c.a = m.user THEN c.b ELSE c.a END, w.name, m.role, c.members, m.notify,
  e.seq, m.read, e.msgs - m.read_msgs, l.conv, l.seq, l.t, l.sender, l.ts, l.cid, l.fields, m.rev, e.id
FROM members m
JOIN convs c ON c.id = m.conv
JOIN entries e ON e.id = (SELECT id FROM entries WHERE conv = m.conv ORDER BY seq DESC LIMIT 1)
LEFT JOIN entries l ON l.conv = m.conv AND l.seq = e.last_msg
LEFT JOIN users w ON w.id = CASE WHEN c.a = m.user THEN c.b ELSE c.a END
WHERE m.user = ?1 AND m.role IN {_ROLES}
"""


def position(db: apsw.Connection) -> int:
    """The newest value of the change counter."""
    row = db.execute(POSITION).fetchone()
    assert row is not None
    return int(row[0])


def _entry(row: tuple[Any, ...]) -> Entry:
    conv, seq, t, sender, ts, cid, msgs, last_msg, fields = row
    return Entry(conv, seq, t, sender, msgs, last_msg, encode_entry(t, conv, seq, sender, ts, cid, fields.encode()))


def _all(db: apsw.Connection, sql: str, args: Sequence[Any]) -> list[Any]:
    """All rows; the schema has their types."""
    return db.execute(sql, args).fetchall()


def _in_snapshot(db: apsw.Connection, work: Callable[[], T]) -> T:
    """Several statements on one state of the database."""
    db.execute("BEGIN")
    try:
        return work()
    finally:
        db.execute("COMMIT")


def heads(convs: Sequence[str]) -> Query[dict[str, int]]:
    """Newest seq of each."""
    keys = orjson.dumps(list(convs)).decode()
    sql = "SELECT j.value, (SELECT seq FROM entries WHERE conv = j.value ORDER BY seq DESC LIMIT 1) FROM json_each(?) j"
    return lambda db: {conv: seq or 0 for conv, seq in db.execute(sql, (keys,))}


def entries(conv: str, after: int, limit: int, max_bytes: int) -> Query[list[Entry]]:
    """Entries after a seq, ascending."""
    sql = f"SELECT {_ENTRY} FROM entries WHERE conv = ? AND seq > ? ORDER BY seq LIMIT ?"

    def query(db: apsw.Connection) -> list[Entry]:
        return _cut(db.execute(sql, (conv, after, limit)), max_bytes)[0]

    return query


def _cut(rows: Any, max_bytes: int) -> tuple[list[Entry], bool]:
    """Entries of rows until they are too large together; whether any were left out."""
    taken: list[Entry] = []
    size = 0
    for row in rows:
        e = _entry(row)
        size += len(e.wire) + 1
        if taken and size > max_bytes:
            return taken, True
        taken.append(e)
    return taken, False


def page(user: str, conv: str, before: int | None, after: int | None, limit: int, max_bytes: int) -> Query[Page]:
    """A page for a member: from the newest, below ``before``, or above ``after``."""

    def query(db: apsw.Connection) -> Page:
        def work() -> Page:
            member(db, user, conv)
            row = db.execute("SELECT seq FROM entries WHERE conv = ? ORDER BY seq DESC LIMIT 1", (conv,)).fetchone()
            head = row[0] if row else 0
            if after is not None:
                upto = before if before is not None else head + 1
                sql = f"SELECT {_ENTRY} FROM entries WHERE conv = ? AND seq > ? AND seq < ? ORDER BY seq LIMIT ?"
                found, cut = _cut(db.execute(sql, (conv, after, upto, limit + 1)), max_bytes)
                return Page(found[:limit], cut or len(found) > limit, head)
            sql = f"SELECT {_ENTRY} FROM entries WHERE conv = ? AND seq < ? ORDER BY seq DESC LIMIT ?"
            found, cut = _cut(db.execute(sql, (conv, head + 1 if before is None else before, limit + 1)), max_bytes)
            return Page(found[:limit][::-1], cut or len(found) > limit, head)

        return _in_snapshot(db, work)

    return query


def member(db: apsw.Connection, user: str, conv: str) -> str:
    """The role of a member.

    :raises NotFound: the user is none, or there is no such conversation.
    """
    row = db.execute("SELECT role FROM members WHERE conv = ? AND user = ?", (conv, user)).fetchone()
    if row is None or row[0] not in MEMBER_ROLES:
        raise NotFound("no such conversation")
    return str(row[0])


def changes(after: int) -> Query[Changes]:
    """What changed after a position of the counter."""

    def query(db: apsw.Connection) -> Changes:
        def work() -> Changes:
            upto = position(db)
            if upto <= after:
                return Changes(upto, [], [], [], [])
            # A bounded stretch of the counter at a time: its values are dense enough over the three tables.
            end = min(upto, after + CHANGES_ROWS)
            newest = _all(db, "SELECT conv, max(seq) FROM entries WHERE id > ? AND id <= ? GROUP BY conv", (after, end))
            rows = _all(db, "SELECT user, conv FROM members WHERE rev > ? AND rev <= ?", (after, end))
            revoked = _all(db, "SELECT token, user FROM revocations WHERE rev > ? AND rev <= ?", (after, end))
            return Changes(
                end,
                newest,
                rows,
                [token for token, _ in revoked if token is not None],
                [user for _, user in revoked if user is not None],
                more=end < upto,
            )

        return _in_snapshot(db, work)

    return query


def memberships(user: str, since: int | None) -> Query[Memberships]:
    """What the user is in, and what the user left after a position."""
    sql = "SELECT conv, role, rev FROM members WHERE user = ?"

    def query(db: apsw.Connection) -> Memberships:
        # The position first: what changes in between is looked at twice, not missed.
        now = position(db)
        revs: dict[str, int] = {}
        left: list[str] = []
        for conv, role, rev in db.execute(sql, (user,)):
            if role in MEMBER_ROLES:
                revs[conv] = rev
            elif since is not None and rev > since:
                left.append(conv)
        return Memberships(now, revs, left)

    return query


def views(user: str, convs: Sequence[str] | None) -> Query[tuple[int, list[View]]]:
    """The user's views, newest first."""

    def query(db: apsw.Connection) -> tuple[int, list[View]]:
        def work() -> tuple[int, list[View]]:
            if convs is None:
                rows = db.execute(_VIEWS, (user,))
            else:
                keys = orjson.dumps(list(convs)).decode()
                rows = db.execute(_VIEWS + " AND m.conv IN (SELECT value FROM json_each(?2))", (user, keys))
            found = [_view(row) for row in rows]
            found.sort(key=lambda view: view.head_id, reverse=True)
            return position(db), found

        return _in_snapshot(db, work)

    return query


def _view(row: tuple[Any, ...]) -> View:
    conv, kind, title, other, other_name, role, members, notify, head, read, unread = row[:11]
    last: bytes | None = None
    if row[11] is not None:
        l_conv, l_seq, l_t, l_sender, l_ts, l_cid, l_fields = row[11:18]
        last = encode_entry(l_t, l_conv, l_seq, l_sender, l_ts, l_cid, l_fields.encode())
    dm = kind == "dm"
    return View(
        conv,
        kind,
        title,
        other if dm else None,
        other_name if dm else None,
        role,
        members,
        notify,
        head,
        read,
        unread,
        last,
        row[18],
        row[19],
    )


def members(user: str, conv: str, after: str | None, limit: int) -> Query[tuple[list[Peer], str | None]]:
    """A page of members by user id, and where the next begins."""

    def query(db: apsw.Connection) -> tuple[list[Peer], str | None]:
        def work() -> tuple[list[Peer], str | None]:
            member(db, user, conv)
            rows = _all(
                db,
                f"SELECT user, role, read FROM members WHERE conv = ? AND user > ? AND role IN {_ROLES}"
                " ORDER BY user LIMIT ?",
                (conv, after or "", limit + 1),
            )
            peers = [Peer(*row) for row in rows[:limit]]
            return peers, peers[-1].user if len(rows) > limit else None

        return _in_snapshot(db, work)

    return query


def role(user: str, conv: str) -> Query[str | None]:
    """The role in a row (None: there is no row)."""

    def query(db: apsw.Connection) -> str | None:
        row = db.execute("SELECT role FROM members WHERE conv = ? AND user = ?", (conv, user)).fetchone()
        return str(row[0]) if row else None

    return query


def member_count(conv: str) -> Query[int]:
    """How many are in a conversation (0: there is none)."""

    def query(db: apsw.Connection) -> int:
        row = db.execute("SELECT members FROM convs WHERE id = ?", (conv,)).fetchone()
        return int(row[0]) if row else 0

    return query


def channels(
    user: str, prefix: str | None, after: str | None, limit: int
) -> Query[tuple[list[dict[str, Any]], str | None]]:
    """A page of the directory, by title; ``after`` is the id of the last channel of the page before."""

    def query(db: apsw.Connection) -> tuple[list[dict[str, Any]], str | None]:
        def work() -> tuple[list[dict[str, Any]], str | None]:
            low = (prefix or "").casefold()
            key, conv = low, ""
            if after is not None:
                row = db.execute("SELECT title_key FROM convs WHERE id = ? AND kind = 'channel'", (after,)).fetchone()
                if row is None:
                    raise NotFound("after: no such channel")
                key, conv = max(low, row[0]), after
            # U+10FFFF sorts after every other character: the end of the range of the prefix.
            rows = _all(
                db,
                "SELECT c.id, c.title, c.members, coalesce(m.role, 'none') FROM convs c"
                " LEFT JOIN members m ON m.conv = c.id AND m.user = ?"
                " WHERE c.kind = 'channel' AND (c.title_key, c.id) > (?, ?) AND c.title_key < ?"
                " ORDER BY c.title_key, c.id LIMIT ?",
                (user, key, conv, low + "\U0010ffff", limit + 1),
            )
            found = [
                {"c": c, "kind": "channel", "title": title, "members": n, "role": role}
                for c, title, n, role in rows[:limit]
            ]
            return found, found[-1]["c"] if len(rows) > limit else None

        return _in_snapshot(db, work)

    return query


def acquainted(user: str, others: Sequence[str]) -> Query[set[str]]:
    """Those of ``others`` who share a conversation with the user."""
    keys = orjson.dumps(list(others)).decode()
    sql = (
        "SELECT j.value FROM json_each(?1) j WHERE EXISTS(SELECT 1 FROM members o CROSS JOIN members m"
        f" ON m.conv = o.conv AND m.user = ?2 AND m.role IN {_ROLES} WHERE o.user = j.value AND o.role IN {_ROLES})"
    )
    return lambda db: {other for (other,) in db.execute(sql, (keys, user))}


def dm_peer(user: str, conv: str) -> Query[str | None]:
    """The other member of a dm of the user; None: it is no such dm."""
    sql = "SELECT CASE a WHEN ?1 THEN b ELSE a END FROM convs WHERE id = ?2 AND ?1 IN (a, b)"

    def query(db: apsw.Connection) -> str | None:
        row = db.execute(sql, (user, conv)).fetchone()
        return row[0] if row else None

    return query


def blockers(user: str, others: Sequence[str]) -> Query[set[str]]:
    """Those of ``others`` who block the user."""
    keys = orjson.dumps(list(others)).decode()
    sql = "SELECT b.user FROM json_each(?) j CROSS JOIN blocks b ON b.user = j.value AND b.other = ?"
    return lambda db: {other for (other,) in db.execute(sql, (keys, user))}


def account(name: str | None, user: str | None = None) -> Query[Account | None]:
    """An account by name or by id."""
    where, value = ("name_key", name_key(name)) if name is not None else ("id", user)
    sql = f"SELECT id, name, password, disabled FROM users WHERE {where} = ?"

    def query(db: apsw.Connection) -> Account | None:
        row = db.execute(sql, (value,)).fetchone()
        return Account(row[0], row[1], row[2], bool(row[3])) if row else None

    return query


def users(ids: Sequence[str]) -> Query[list[User]]:
    """Accounts by id; unknown ones are left out."""
    keys = orjson.dumps(list(ids)).decode()
    sql = "SELECT u.id, u.name FROM json_each(?) j CROSS JOIN users u ON u.id = j.value"
    return lambda db: [User(*row) for row in db.execute(sql, (keys,))]


def seen(ids: Sequence[str]) -> Query[dict[str, int]]:
    """When each was last online."""
    keys = orjson.dumps(list(ids)).decode()
    sql = "SELECT u.id, u.seen FROM json_each(?) j CROSS JOIN users u ON u.id = j.value WHERE u.seen IS NOT NULL"
    return lambda db: dict(_all(db, sql, (keys,)))


def token(token_hash: bytes) -> Query[Token | None]:
    """A token by its hash, with whom it belongs to."""
    sql = "SELECT u.id, u.name, t.expires, u.disabled FROM tokens t JOIN users u ON u.id = t.user WHERE t.hash = ?"

    def query(db: apsw.Connection) -> Token | None:
        row = db.execute(sql, (token_hash,)).fetchone()
        return Token(User(row[0], row[1]), row[2], bool(row[3])) if row else None

    return query
