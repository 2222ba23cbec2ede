"""What a write transaction does: appends in bulk, everything else one by one.

All run in the writer thread, inside ``BEGIN IMMEDIATE``: they read the newest
state, and no other process writes. Appends of messages that stand next to each
other in the batch share their statements, whose values are bound, up to 64 rows in
each: per row they cost half of what ``json_each`` over one parameter costs, and a
statement gives up the interpreter lock, which under load is slow to come back.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

import apsw

from ...common.clock import now_ms
from ...entries import (
    ENTRY_TYPES,
    MESSAGES,
    Change,
    ConversationChange,
    Fact,
    NewEntry,
    RoleChange,
    Standing,
    by_oneself,
    check_message,
    check_room_for,
    takes_no_invitations,
    takes_no_messages,
)
from ...errors import ChatError, Conflict, NotFound
from ...protocol import MEMBER_ROLES, encode_entry
from ..base import Appended, Entry, Opened, Opening
from ..opening import DM_REQUEST, conversation_id, first_entries, first_members, request_id
from .schema import POSITION

_ROLES: Final = "('member', 'admin', 'owner')"

#: The facts about each message: the entry that its cid has already; the standing of its sender; and, where `first`
#: (the first message of a conversation in the batch), the newest entry.
_KNOWN: Final = """
WITH v(i, conv, sender, cid, first) AS (VALUES {values})
SELECT v.i, e.seq, e.ts, e.digest, c.kind, m.role,
  c.kind = 'dm' AND EXISTS(SELECT 1 FROM blocks b
    WHERE b.user = CASE WHEN c.a = v.sender THEN c.b ELSE c.a END AND b.other = v.sender),
  h.seq, h.msgs
FROM v LEFT JOIN entries e ON e.conv = v.conv AND e.sender = v.sender AND e.cid = v.cid
LEFT JOIN convs c ON c.id = v.conv
LEFT JOIN members m ON m.conv = v.conv AND m.user = v.sender
LEFT JOIN entries h
  ON h.id = CASE WHEN v.first THEN (SELECT id FROM entries WHERE conv = v.conv ORDER BY seq DESC LIMIT 1) END
"""
_INSERT: Final = """
INSERT INTO entries(id, conv, seq, t, sender, cid, digest, ts, msgs, last_msg, fields) VALUES {values}
"""
# Sending moves the sender's mark, without a push of its own: the entry itself is pushed.
_MARKS: Final = """
WITH v(conv, user, seq, msgs) AS (VALUES {values})
UPDATE members SET read = v.seq, read_msgs = v.msgs FROM v
WHERE members.conv = v.conv AND members.user = v.user AND members.read < v.seq
"""
#: Rows of one statement, at most. Each number of rows is a statement of its own to SQLite, so numbers are powers of
#: two, and all of them stay prepared.
_ROWS: Final = 64


@functools.cache
def _with_rows(sql: str, rows: int, columns: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return sql.format(values=", ".join([row] * rows))


def _in_bulk(db: apsw.Connection, sql: str, rows: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Run a statement with VALUES of these rows, in as few parts as there can be; what they return together."""
    found: list[tuple[Any, ...]] = []
    at = 0
    while at < len(rows):
        n = min(_ROWS, 1 << ((len(rows) - at).bit_length() - 1))
        values = list(itertools.chain.from_iterable(rows[at : at + n]))
        found += db.execute(_with_rows(sql, n, len(rows[at])), values)
        at += n
    return found


class Transaction:
    """One open write transaction: the counter, and the entries that it appended."""

    def __init__(self, db: apsw.Connection, secret: bytes, max_conversations: int = 1000) -> None:
        self.db = db
        self.secret = secret
        self.max_conversations = max_conversations
        self.appended: list[Entry] = []
        self._counter = -1

    def tick(self, n: int = 1) -> int:
        """The first of the next ``n`` values of the change counter (fresh for this transaction)."""
        if self._counter < 0:
            row = self.one(POSITION)
            assert row is not None
            self._counter = int(row[0])
        first = self._counter + 1
        self._counter += n
        return first

    def rewind(self) -> None:
        """A savepoint was rolled back: what the counter gave out may be given again or not."""
        self._counter = -1

    def one(self, sql: str, args: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """The first row, or None."""
        return self.db.execute(sql, args).fetchone()


Outcome = Appended | ChatError
Op = Callable[[Transaction], Any]


def append_messages(tx: Transaction, batch: Sequence[NewEntry]) -> list[Outcome]:
    """Append messages (:data:`~chatcore.entries.MESSAGES`), in order; each gets its own outcome."""
    outcomes: list[Outcome | None] = [None] * len(batch)
    convs: set[str] = set()
    asked: list[tuple[Any, ...]] = []
    for i, e in enumerate(batch):
        asked.append((i, e.conv, e.sender, e.cid, e.conv not in convs))
        convs.add(e.conv)
    known = {row[0]: row for row in _in_bulk(tx.db, _KNOWN, asked)}
    heads: dict[str, tuple[int, int]] = {}
    new: dict[tuple[str, str, str], int] = {}  # first of several with one cid in this batch
    rows: list[tuple[Any, ...]] = []
    marks: dict[tuple[str, str], tuple[int, int]] = {}
    ts = now_ms()
    for i, e in enumerate(batch):
        _, at, then, digest, kind, role, blocked, head, msgs = known[i]
        if e.conv not in heads:
            heads[e.conv] = (head or 0, msgs or 0)
        if at is not None:
            outcomes[i] = same_or_conflict(e, at, then, digest)
            continue
        first = new.get((e.conv, e.sender, e.cid))
        if first is not None:
            earlier = outcomes[first]
            assert isinstance(earlier, Appended)
            outcomes[i] = same_or_conflict(e, earlier.seq, earlier.ts, batch[first].digest.hex())
            continue
        refused = check_message(kind, role, blocked)
        if refused is not None:
            outcomes[i] = refused
            continue
        head, msgs = heads[e.conv]
        seq, msgs = head + 1, msgs + 1
        heads[e.conv] = (seq, msgs)
        new[(e.conv, e.sender, e.cid)] = i
        marks[(e.conv, e.sender)] = (seq, msgs)
        outcomes[i] = Appended(seq, ts)
        rows.append((e.conv, seq, e.t, e.sender, e.cid, e.digest.hex(), ts, msgs, seq, e.fields.decode()))
        wire = encode_entry(e.t, e.conv, seq, e.sender, ts, e.cid, e.fields)
        tx.appended.append(Entry(e.conv, seq, e.t, e.sender, msgs, seq, wire))
    if rows:
        first_id = tx.tick(len(rows))
        _in_bulk(tx.db, _INSERT, [(first_id + i, *row) for i, row in enumerate(rows)])
        _in_bulk(tx.db, _MARKS, [(*key, *mark) for key, mark in marks.items()])
    return outcomes  # type: ignore[return-value]


def same_or_conflict(e: NewEntry, seq: int, ts: int, digest: str) -> Outcome:
    """A cid that is in the log already: the first result again, or a conflict."""
    if digest == e.digest.hex() or (e.t in MESSAGES and digest == _digest_0_1(e)):
        return Appended(seq, ts, dup=True)
    return Conflict(f"cid {e.cid} was used for something else")


def _digest_0_1(e: NewEntry) -> str:
    """The digest of a message as version 0.1 stored it: a message sent then may be repeated now."""
    return hashlib.blake2b(e.fields, digest_size=8).hexdigest()


def append_one(e: NewEntry) -> Op:
    """Append an entry of any type by the rule of its type, and apply its change, in the same transaction."""

    def op(tx: Transaction) -> Appended:
        row = tx.one(
            "SELECT seq, ts, digest FROM entries WHERE conv = ? AND sender = ? AND cid = ?", (e.conv, e.sender, e.cid)
        )
        if row is not None:
            outcome = same_or_conflict(e, *row)
            if isinstance(outcome, ChatError):
                raise outcome
            return outcome
        standing = _standing(tx, e)
        rule = ENTRY_TYPES[e.t].rule
        while isinstance(decision := rule(e, standing), Fact):
            _load(tx, decision, e, standing)
        if decision is None:
            return Appended(0, now_ms())
        if isinstance(decision, ChatError):
            raise decision
        if standing.kind == "channel" and by_oneself(e):
            # The row alone, no entry: the change is as of the newest one.
            head = tx.one("SELECT seq, msgs FROM entries WHERE conv = ? ORDER BY seq DESC LIMIT 1", (e.conv,))
            apply(tx, e.conv, decision.change, *(head or (0, 0)))
            return Appended(0, now_ms())
        return write_entry(tx, decision, now_ms())

    return op


def _standing(tx: Transaction, e: NewEntry) -> Standing:
    """The facts that nearly every rule needs."""
    conv = tx.one("SELECT kind, members, a, b FROM convs WHERE id = ?", (e.conv,))
    if conv is None or conv[0] == DM_REQUEST:
        return Standing(None, None)
    kind, members, a, b = conv
    found = Standing(kind, _role(tx, e.conv, e.sender), members=members, max_conversations=tx.max_conversations)
    if kind == "dm":
        other = b if a == e.sender else a
        found.blocked = tx.one("SELECT 1 FROM blocks WHERE user = ? AND other = ?", (other, e.sender)) is not None
    if isinstance(e.change, RoleChange):
        found.user_role = _role(tx, e.conv, e.change.user)
    return found


def _load(tx: Transaction, fact: Fact, e: NewEntry, standing: Standing) -> None:
    """A fact that the rule asked for."""
    assert isinstance(e.change, RoleChange)
    match fact:
        case Fact.COUNTS:
            row = tx.one("SELECT count(*) FROM members WHERE conv = ? AND role = 'owner'", (e.conv,))
            assert row is not None
            standing.owners = row[0]
        case Fact.USER:
            standing.user_exists = tx.one("SELECT 1 FROM users WHERE id = ?", (e.change.user,)) is not None
        case Fact.CONVERSATIONS:
            standing.user_conversations = _conversations_of(tx, e.change.user)
        case Fact.BLOCKS:
            standing.user_blocks = _blocks(tx, e.change.user, e.sender)


def _blocks(tx: Transaction, user: str, other: str) -> bool:
    return tx.one("SELECT 1 FROM blocks WHERE user = ? AND other = ?", (user, other)) is not None


def _conversations_of(tx: Transaction, user: str) -> int:
    row = tx.one(f"SELECT count(*) FROM members WHERE user = ? AND role IN {_ROLES}", (user,))
    assert row is not None
    return int(row[0])


def _role(tx: Transaction, conv: str, user: str) -> str | None:
    row = tx.one("SELECT role FROM members WHERE conv = ? AND user = ?", (conv, user))
    return row[0] if row else None


def write_entry(tx: Transaction, e: NewEntry, ts: int) -> Appended:
    """Write one entry that was found new, allowed and complete, and apply its change."""
    row = tx.one("SELECT seq, msgs, last_msg FROM entries WHERE conv = ? ORDER BY seq DESC LIMIT 1", (e.conv,))
    seq, msgs, last = row or (0, 0, 0)
    seq += 1
    if e.t in MESSAGES:
        msgs, last = msgs + 1, seq
    tx.db.execute(
        "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (tx.tick(), e.conv, seq, e.t, e.sender, e.cid, e.digest.hex(), ts, msgs, last, e.fields.decode()),
    )
    wire = encode_entry(e.t, e.conv, seq, e.sender, ts, e.cid, e.fields)
    tx.appended.append(Entry(e.conv, seq, e.t, e.sender, msgs, last, wire))
    apply(tx, e.conv, e.change, seq, msgs)
    return Appended(seq, ts)


def apply(tx: Transaction, conv: str, change: Change | None, as_of: int, msgs: int) -> None:
    """Bring the rows of a conversation up to a change, as of an entry and the number of messages up to it."""
    match change:
        case RoleChange(user=user, role=role):
            set_role(tx, conv, user, role, as_of, msgs)
        case ConversationChange(title=title):
            tx.db.execute("UPDATE convs SET title = ?, title_key = ? WHERE id = ?", (title, title.casefold(), conv))


def set_role(tx: Transaction, conv: str, user: str, role: str, as_of: int, msgs: int) -> None:
    """Write a member's row as of an entry; a user who comes in starts with everything read."""
    before = _role(tx, conv, user)
    was, is_ = before in MEMBER_ROLES, role in MEMBER_ROLES
    rev = tx.tick()
    if before is None:
        tx.db.execute(
            "INSERT INTO members(conv, user, role, as_of, read, read_msgs, rev) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (conv, user, role, as_of, as_of, msgs, rev),
        )
    elif is_ and not was:
        tx.db.execute(
            "UPDATE members SET role = ?, as_of = ?, read = ?, read_msgs = ?, rev = ? WHERE conv = ? AND user = ?",
            (role, as_of, as_of, msgs, rev, conv, user),
        )
    else:
        tx.db.execute(
            "UPDATE members SET role = ?, as_of = ?, rev = ? WHERE conv = ? AND user = ?",
            (role, as_of, rev, conv, user),
        )
    if was != is_:
        tx.db.execute("UPDATE convs SET members = members + ? WHERE id = ?", (1 if is_ else -1, conv))


def open_conversation(o: Opening) -> Op:
    """Make a conversation and its first entries, or find what the same request made."""

    def op(tx: Transaction) -> Opened:
        conv = conversation_id(tx.secret, o)
        _check_cid(tx, o)
        if tx.one("SELECT 1 FROM convs WHERE id = ?", (conv,)) is not None:
            return Opened(conv, False)
        users = first_members(o)
        for user in users:
            if tx.one("SELECT 1 FROM users WHERE id = ? AND disabled = 0", (user,)) is None:
                raise NotFound(f"no such user: {user}")
            refused = check_room_for(user, _conversations_of(tx, user), tx.max_conversations)
            if refused is not None:
                raise refused
            if user != o.creator and _blocks(tx, user, o.creator):
                raise takes_no_messages() if o.kind == "dm" else takes_no_invitations(user)
        ts = now_ms()
        a, b = sorted(users) if o.kind == "dm" else (None, None)
        _insert_conversation(tx, conv, o.kind, o.title, a, b, ts)
        if o.kind == "dm":
            _insert_conversation(tx, request_id(tx.secret, o), DM_REQUEST, None, a, b, ts)
        for e in first_entries(conv, o, users):
            write_entry(tx, e, ts)
        return Opened(conv, True)

    return op


def _check_cid(tx: Transaction, o: Opening) -> None:
    """:raises Conflict: the creator's cid made another conversation."""
    request = request_id(tx.secret, o)
    made = tx.one("SELECT kind, a, b FROM convs WHERE id = ?", (request,))
    if made is None:
        return
    if o.kind == "dm":
        same = made == (DM_REQUEST, *sorted((o.creator, o.members[0])))
    else:
        first = tx.one("SELECT digest FROM entries WHERE conv = ? AND seq = 1", (request,))
        same = first is not None and first[0] == o.digest.hex()
    if not same:
        raise Conflict(f"cid {o.cid} was used for something else")


def _insert_conversation(
    tx: Transaction, id: str, kind: str, title: str | None, a: str | None, b: str | None, ts: int
) -> None:
    tx.db.execute(
        "INSERT INTO convs(id, kind, title, title_key, a, b, created) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (id, kind, title, None if title is None else title.casefold(), a, b, ts),
    )
