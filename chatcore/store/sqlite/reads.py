"""Queries. They run in the reader thread; those about the log, each on a snapshot of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

import orjson

from ...errors import NotFound
from ...protocol import MEMBER_ROLES, encode_entry
from ..base import Account, Changes, Entry, Memberships, Page, Peer, Token, User, View
from ..names import name_key
from .schema import POSITION
from .tail import Mark, Row, Snapshot, StaleIndex

T = TypeVar("T")
Query = Callable[[Snapshot], T]

_ROLES: Final = "('member', 'admin', 'owner')"
# Rows of one kind that a look at the changes takes at once; the rest is `more`.
CHANGES_ROWS: Final = 2000

_VIEWS: Final = f"""
SELECT json_group_array(m.conv), json_group_array(c.kind), json_group_array(c.title), json_group_array(w.id),
  json_group_array(w.name), json_group_array(m.role), json_group_array(c.members), json_group_array(m.notify),
  json_group_array(m.read), json_group_array(m.read_msgs), json_group_array(m.rev)
FROM members m
JOIN convs c ON c.id = m.conv
LEFT JOIN users w ON w.id = CASE WHEN c.a = m.user THEN c.b ELSE c.a END
WHERE m.user = ?1 AND m.role IN {_ROLES}
"""
_NEWEST: Final = """
SELECT json_group_array(i.id), json_group_array(seq)
FROM (SELECT conv, max(seq) AS seq FROM entries WHERE id > ? AND id <= ? GROUP BY conv) stretch
CROSS JOIN ids i ON i.n = stretch.conv
"""
_ROW_CHANGES: Final = """
SELECT json_group_array(u.id), json_group_array(c.id)
FROM (SELECT DISTINCT conv, user FROM row_changes WHERE id > ? AND id <= ?) stretch
CROSS JOIN ids u ON u.n = stretch.user CROSS JOIN ids c ON c.n = stretch.conv
"""
_REVOCATIONS: Final = "SELECT token, user FROM revocations WHERE rev > ? AND rev <= ?"


def position(snapshot: Snapshot) -> int:
    """The newest value of the change counter."""
    return int(snapshot.all(POSITION)[0][0])


def _wire(conv: str, row: Row) -> bytes:
    _, seq, t, sender, ts, cid, _, _, fields = row
    return encode_entry(t, conv, seq, sender, ts, cid, fields.encode())


def _cut(conv: str, rows: Iterable[Row], max_bytes: int) -> tuple[list[Entry], bool]:
    """Entries of rows until they are too large together; whether any were left out."""
    taken: list[Entry] = []
    size = 0
    for row in rows:
        wire = _wire(conv, row)
        size += len(wire) + 1
        if taken and size > max_bytes:
            return taken, True
        _, seq, t, sender, _, _, msgs, last_msg, _ = row
        taken.append(Entry(conv, seq, t, sender, msgs, last_msg, wire))
    return taken, False


def heads(convs: Sequence[str]) -> Query[dict[str, int]]:
    """Newest seq of each."""

    def query(snapshot: Snapshot) -> dict[str, int]:
        with snapshot:
            return dict.fromkeys(convs, 0) | _heads(snapshot, convs)

    return query


def _heads(snapshot: Snapshot, convs: Sequence[str]) -> dict[str, int]:
    """Of those that there are."""
    numbers = snapshot.numbers(convs)
    seqs = snapshot.head_seqs(list(numbers.values()))
    return {conv: seqs[n] for conv, n in numbers.items() if n in seqs}


def entries(conv: str, after: int, limit: int, max_bytes: int) -> Query[list[Entry]]:
    """Entries after a seq, ascending."""

    def query(snapshot: Snapshot) -> list[Entry]:
        with snapshot:
            n = snapshot.number(conv)
            return _cut(conv, snapshot.rows(n, after + 1, after + limit), max_bytes)[0]

    return query


def page(user: str, conv: str, before: int | None, after: int | None, limit: int, max_bytes: int) -> Query[Page]:
    """A page for a member: from the newest, below ``before``, or above ``after``."""

    def query(snapshot: Snapshot) -> Page:
        with snapshot:
            member(snapshot, user, conv)
            n = snapshot.number(conv)
            head = snapshot.head_seqs([n]).get(n, 0)
            last = head if before is None else min(head, before - 1)
            if after is not None:
                rows = snapshot.rows(n, after + 1, min(last, after + limit + 1))
            else:
                rows = snapshot.rows(n, max(1, last - limit), last, newest_first=True)
            found, cut = _cut(conv, rows, max_bytes)
            more = cut or len(found) > limit
            del found[limit:]
            if after is None:
                found.reverse()
            return Page(found, more, head)

    return query


def member(snapshot: Snapshot, user: str, conv: str) -> str:
    """The role of a member.

    :raises NotFound: the user is none, or there is no such conversation.
    """
    rows = snapshot.all("SELECT role FROM members WHERE conv = ? AND user = ?", (conv, user))
    if not rows or rows[0][0] not in MEMBER_ROLES:
        raise NotFound("no such conversation")
    return str(rows[0][0])


def changes(after: int) -> Query[Changes | None]:
    """What changed after a position of the counter; None: it is so old that this is not known any more (then
    :func:`everything` is the answer)."""

    def query(snapshot: Snapshot) -> Changes | None:
        with snapshot:
            if after < snapshot.all("SELECT value FROM meta WHERE key = 'trimmed'")[0][0]:
                return None
            upto = snapshot.position
            if upto <= after:
                return Changes(upto, [], [], [], [])
            # A bounded stretch of the counter at a time: its values are dense enough over the three tables.
            end = min(upto, after + CHANGES_ROWS)
            newest = snapshot.table(_NEWEST, (after, end))
            rows = snapshot.table(_ROW_CHANGES, (after, end))
            return Changes(end, newest, rows, *_revoked(snapshot, after, end), more=end < upto)

    return query


def everything(after: int, convs: Sequence[str], users: Sequence[str]) -> Query[Changes]:
    """Stands for :func:`changes` after a position: the heads of these conversations and all rows of these users,
    whether or not they changed."""
    keys = orjson.dumps(list(users)).decode()
    rows = (
        "SELECT json_group_array(m.user), json_group_array(m.conv)"
        " FROM json_each(?) j CROSS JOIN members m ON m.user = j.value"
    )

    def query(snapshot: Snapshot) -> Changes:
        with snapshot:
            upto = snapshot.position
            newest = list(_heads(snapshot, convs).items())
            return Changes(upto, newest, snapshot.table(rows, (keys,)), *_revoked(snapshot, after, upto))

    return query


def _revoked(snapshot: Snapshot, after: int, upto: int) -> tuple[list[bytes], list[str]]:
    """The tokens and the users."""
    found = snapshot.all(_REVOCATIONS, (after, upto))
    return [token for token, _ in found if token is not None], [user for _, user in found if user is not None]


def memberships(user: str, since: int | None) -> Query[Memberships]:
    """What the user is in, and what the user left after a position."""
    sql = "SELECT json_group_array(conv), json_group_array(role), json_group_array(rev) FROM members WHERE user = ?"

    def query(snapshot: Snapshot) -> Memberships:
        revs: dict[str, int] = {}
        left: list[str] = []
        with snapshot:
            convs, *columns = snapshot.columns(sql, (user,))
            numbers = snapshot.numbers(convs)
            user_n = snapshot.number(user)
            for conv, role, rev in zip(convs, *columns, strict=True):
                if role in MEMBER_ROLES:
                    revs[conv] = max(rev, snapshot.tail.newest_of(numbers[conv], user_n)[1])
                elif since is not None and rev > since:
                    left.append(conv)
            return Memberships(snapshot.position, revs, left)

    return query


def views(user: str, convs: Sequence[str] | None) -> Query[tuple[int, list[View]]]:
    """The user's views, newest first."""
    some = "" if convs is None else " AND m.conv IN (SELECT value FROM json_each(?2))"
    args = (user,) if convs is None else (user, orjson.dumps(list(convs)).decode())

    def query(snapshot: Snapshot) -> tuple[int, list[View]]:
        with snapshot:
            columns = snapshot.columns(_VIEWS + some, args)
            user_n = snapshot.number(user)
            known = snapshot.numbers(columns[0])
            numbers = [known[conv] for conv in columns[0]]
            ids = snapshot.heads(numbers)
            heads = list(snapshot.rows_of(ids))
            if [head[0] for head in heads] != numbers:
                raise StaleIndex(f"the index has heads of other conversations among {ids}")
            last = {n: head for n, head in zip(numbers, heads, strict=True) if head[1] == head[7]}
            last |= snapshot.rows_at(
                {n: head[7] for n, head in zip(numbers, heads, strict=True) if 0 < head[7] < head[1]}
            )
            marks = snapshot.marks([(n, user_n) for n in numbers])
            rows = zip(*columns, strict=True)
            found = [
                _view(row, id, head, mark, last.get(head[0]))
                for row, id, head, mark in zip(rows, ids, heads, marks, strict=True)
            ]
            found.sort(key=lambda view: view.head_id, reverse=True)
            return snapshot.position, found

    return query


def _view(row: tuple[Any, ...], head_id: int, head: Row, mark: Mark, last: Row | None) -> View:
    conv, kind, title, other, other_name, role, members, notify, read, read_msgs, rev = row
    _, seq, _, _, _, _, msgs, _, _ = head
    read, read_msgs = max((read, read_msgs), mark[:2])
    return View(
        conv,
        kind,
        title,
        other,
        other_name,
        role,
        members,
        notify,
        seq,
        read,
        msgs - read_msgs,
        _wire(conv, last) if last is not None else None,
        max(rev, mark[2]),
        head_id,
    )


def members(user: str, conv: str, after: str | None, limit: int) -> Query[tuple[list[Peer], str | None]]:
    """A page of members by user id, and where the next begins."""
    sql = (
        "SELECT json_group_array(user), json_group_array(role), json_group_array(read) FROM ("
        f"SELECT user, role, read FROM members WHERE conv = ? AND user > ? AND role IN {_ROLES} ORDER BY user LIMIT ?)"
    )

    def query(snapshot: Snapshot) -> tuple[list[Peer], str | None]:
        with snapshot:
            member(snapshot, user, conv)
            n = snapshot.number(conv)
            rows = snapshot.table(sql, (conv, after or "", limit + 1))
            more = len(rows) > limit
            del rows[limit:]
            numbers = snapshot.numbers([id for id, _, _ in rows])
            marks = snapshot.marks([(n, numbers.get(id, 0)) for id, _, _ in rows])
            peers = [Peer(id, role, max(read, mark[0])) for (id, role, read), mark in zip(rows, marks, strict=True)]
            return peers, peers[-1].user if more else None

    return query


def role(user: str, conv: str) -> Query[str | None]:
    """The role in a row (None: there is no row)."""

    def query(snapshot: Snapshot) -> str | None:
        rows = snapshot.all("SELECT role FROM members WHERE conv = ? AND user = ?", (conv, user))
        return str(rows[0][0]) if rows else None

    return query


def member_count(conv: str) -> Query[int]:
    """How many are in a conversation (0: there is none)."""

    def query(snapshot: Snapshot) -> int:
        rows = snapshot.all("SELECT members FROM convs WHERE id = ?", (conv,))
        return int(rows[0][0]) if rows else 0

    return query


def channels(
    user: str, prefix: str | None, after: str | None, limit: int
) -> Query[tuple[list[dict[str, Any]], str | None]]:
    """A page of the directory, by title; ``after`` is the id of the last channel of the page before."""

    def query(snapshot: Snapshot) -> tuple[list[dict[str, Any]], str | None]:
        low = (prefix or "").casefold()
        key, conv = low, ""
        if after is not None:
            titles = snapshot.all("SELECT title_key FROM convs WHERE id = ? AND kind = 'channel'", (after,))
            if not titles:
                raise NotFound("after: no such channel")
            key, conv = max(low, titles[0][0]), after
        # U+10FFFF sorts after every other character: the end of the range of the prefix.
        rows = snapshot.all(
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

    return query


def acquainted(user: str, others: Sequence[str]) -> Query[set[str]]:
    """Those of ``others`` who share a conversation with the user."""
    keys = orjson.dumps(list(others)).decode()
    sql = (
        "SELECT j.value FROM json_each(?1) j WHERE EXISTS(SELECT 1 FROM members o CROSS JOIN members m"
        f" ON m.conv = o.conv AND m.user = ?2 AND m.role IN {_ROLES} WHERE o.user = j.value AND o.role IN {_ROLES})"
    )
    return lambda snapshot: {other for (other,) in snapshot.all(sql, (keys, user))}


def dm_peer(user: str, conv: str) -> Query[str | None]:
    """The other member of a dm of the user; None: it is no such dm."""
    sql = "SELECT CASE a WHEN ?1 THEN b ELSE a END FROM convs WHERE id = ?2 AND ?1 IN (a, b)"

    def query(snapshot: Snapshot) -> str | None:
        rows = snapshot.all(sql, (user, conv))
        return rows[0][0] if rows else None

    return query


def blockers(user: str, others: Sequence[str]) -> Query[set[str]]:
    """Those of ``others`` who block the user."""
    keys = orjson.dumps(list(others)).decode()
    sql = "SELECT b.user FROM json_each(?) j CROSS JOIN blocks b ON b.user = j.value AND b.other = ?"
    return lambda snapshot: {other for (other,) in snapshot.all(sql, (keys, user))}


def account(name: str | None, user: str | None = None) -> Query[Account | None]:
    """An account by name or by id."""
    where, value = ("name_key", name_key(name)) if name is not None else ("id", user)
    sql = f"SELECT id, name, password, disabled FROM users WHERE {where} = ?"

    def query(snapshot: Snapshot) -> Account | None:
        rows = snapshot.all(sql, (value,))
        return next((Account(id, name, hash, bool(disabled)) for id, name, hash, disabled in rows), None)

    return query


def users(ids: Sequence[str]) -> Query[list[User]]:
    """Accounts by id; unknown ones are left out."""
    keys = orjson.dumps(list(ids)).decode()
    sql = "SELECT u.id, u.name FROM json_each(?) j CROSS JOIN users u ON u.id = j.value"
    return lambda snapshot: [User(*row) for row in snapshot.all(sql, (keys,))]


def seen(ids: Sequence[str]) -> Query[dict[str, int]]:
    """When each was last online."""
    keys = orjson.dumps(list(ids)).decode()
    sql = "SELECT u.id, u.seen FROM json_each(?) j CROSS JOIN users u ON u.id = j.value WHERE u.seen IS NOT NULL"
    return lambda snapshot: dict(snapshot.all(sql, (keys,)))


def token(token_hash: bytes) -> Query[Token | None]:
    """A token by its hash, with whom it belongs to."""
    sql = "SELECT u.id, u.name, t.expires, u.disabled FROM tokens t JOIN users u ON u.id = t.user WHERE t.hash = ?"

    def query(snapshot: Snapshot) -> Token | None:
        rows = snapshot.all(sql, (token_hash,))
        return next((Token(User(id, name), expires, bool(disabled)) for id, name, expires, disabled in rows), None)

    return query
