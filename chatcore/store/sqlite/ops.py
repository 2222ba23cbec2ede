"""Requests that append to logs, and what an entry changes in rows.

All run in the writer, inside its transaction: they read the newest state, and nobody else writes. Messages that
stand next to each other in a batch are appended together: one INSERT has up to 64 of them, and their facts come from
memory (:class:`~.transaction.LogState`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ..._fast.runs import key_of
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
from ...protocol import MEMBER_ROLES
from ..base import Opened, Opening
from ..opening import DM_REQUEST, conversation_id, first_entries, first_members, request_id
from .requests import Reply, Request
from .transaction import Committed, Found, Log, Transaction, in_bulk

_ROLES: Final = "('member', 'admin', 'owner')"

_INSERT: Final = """
INSERT INTO entries(id, conv, seq, t, sender, msgs, last_msg, cid, digest, ts, fields) VALUES {values}
"""


class Append(Request, frozen=True, gc=False):
    """Append an entry; ``fields`` is the JSON of its fields, ``digest`` that of what was asked for.

    ``most`` is how many conversations a user may be in.
    """

    conv: str
    sender: str
    cid: str
    t: str
    fields: bytes
    digest: bytes
    most: int

    grows = True

    def apply(self, tx: Transaction) -> Reply:
        """The outcome; messages go through :func:`append_messages`."""
        fields = msgspec.json.decode(self.fields, type=ENTRY_TYPES[self.t].fields)
        e = NewEntry(self.conv, self.sender, self.cid, self.t, self.fields, self.digest, fields.change())
        return _append_one(tx, e, self.most)


def append_messages(tx: Transaction, batch: Sequence[Append]) -> list[Reply]:
    """Append messages (:data:`~chatcore.entries.MESSAGES`), in order; each gets its own outcome."""
    replies: list[Reply] = []
    rows: list[tuple[Any, ...]] = []
    keys: list[int] = []
    marks: list[tuple[str, str, int, int, int]] = []
    new: dict[int, list[int]] = {}  # key -> places in `rows`
    ts = now_ms()
    id = tx.position
    # What every message of the server passes through: names are local, and facts are asked for once.
    secret, own_log, member, may_know = tx.key_secret, tx.own_log, tx.member, tx.may_know
    for e in batch:
        conv, user, cid = e.conv, e.sender, e.cid
        log = own_log(conv)
        n, sender = log.n, member(conv, user)
        found = None
        if sender:
            key = key_of(secret, n, sender, cid)
            if may_know(key):
                found = tx.find(key, n, sender, cid)
            if found is None and key in new:
                found = _in(rows, new[key], n, sender, cid)
        else:
            key = 0
            found = _of_former_member(tx, log, e)
        if found is not None:
            replies.append(_repeated(e, found))
            continue
        blocked = log.kind == "dm" and tx.blocks(log.b if log.a == user else log.a, user)  # type: ignore[arg-type]
        refused = None if sender and not blocked else check_message(log.kind, tx.role(conv, user), blocked)
        if refused is not None:
            replies.append(refusal(refused))
            continue
        id += 1
        log.seq = log.last_msg = seq = log.seq + 1
        log.msgs = msgs = log.msgs + 1
        places = new.get(key)
        if places is None:
            new[key] = [len(rows)]
        else:
            places.append(len(rows))
        marks.append((conv, user, seq, msgs, id))
        rows.append((id, n, seq, e.t, sender, msgs, seq, cid, e.digest, ts, e.fields.decode()))
        keys.append(key)
        replies.append(Reply(seq, ts, msgs, False, True))
    if rows:
        tx.tick(len(rows))
        in_bulk(tx.db, _INSERT, rows)
        tx.wrote([(row[0], row[1], row[4], row[2], key) for row, key in zip(rows, keys, strict=True)], marks)
    return replies


def _in(rows: Sequence[tuple[Any, ...]], places: Sequence[int], conv: int, sender: int, cid: str) -> Found | None:
    """The entry with a cid among those that are about to be written."""
    for at in places:
        _, n, seq, _, s, msgs, _, c, digest, ts, _ = rows[at]
        if (n, s, c) == (conv, sender, cid):
            return Found(seq, ts, digest, msgs)
    return None


def _of_former_member(tx: Transaction, log: Log, e: Append) -> Found | None:
    """What a user who is no member now has sent with this cid before."""
    if not log.n:
        return None
    row = tx.one("SELECT n FROM ids WHERE id = ?", (e.sender,))
    return None if row is None else tx.find(tx.key(log.n, row[0], e.cid), log.n, row[0], e.cid)


def refusal(error: ChatError) -> Reply:
    """A request was refused."""
    return Reply(error=(error.code, error.message))


def _repeated(e: Append | NewEntry, found: Found) -> Reply:
    """A cid that is in the log already: the first result again, or a conflict."""
    if found.digest == e.digest or (e.t in MESSAGES and found.digest == _digest_0_1(e)):
        return Reply(found.seq, found.ts, found.msgs, True)
    return refusal(Conflict(f"cid {e.cid} was used for something else"))


def _digest_0_1(e: Append | NewEntry) -> bytes:
    """The digest of a message as version 0.1 stored it: a message sent then may be repeated now."""
    return hashlib.blake2b(e.fields, digest_size=8).digest()


def _append_one(tx: Transaction, e: NewEntry, most: int) -> Reply:
    """Append an entry of any type by the rule of its type, and apply its change."""
    log = tx.log(e.conv)
    if log.n:
        sender = tx.number(e.sender)
        found = tx.find(tx.key(log.n, sender, e.cid), log.n, sender, e.cid)
        if found is not None:
            # With the entry as it is in the log, whose fields only the head knew: it may have to be announced.
            return msgspec.structs.replace(_repeated(e, found), entries=[_committed(tx, e, log, found)])
    standing = _standing(tx, log, e, most)
    rule = ENTRY_TYPES[e.t].rule
    while isinstance(decision := rule(e, standing), Fact):
        _load(tx, decision, e, standing)
    if decision is None:
        return Reply(0, now_ms())
    if isinstance(decision, ChatError):
        return refusal(decision)
    if standing.kind == "channel" and by_oneself(e):
        # The row alone, no entry: the change is as of the newest one.
        apply(tx, e.conv, decision.change, log.seq, log.msgs)
        return Reply(0, now_ms())
    ts = now_ms()
    head = write_entry(tx, decision, ts)
    return Reply(head.seq, ts, head.msgs, False, True)


def _committed(tx: Transaction, e: NewEntry, log: Log, found: Found) -> Committed:
    row = tx.one("SELECT msgs, last_msg, fields FROM entries WHERE id = ?", (tx.id_at(log, found.seq),))
    assert row is not None
    return Committed(e.conv, found.seq, e.t, e.sender, found.ts, e.cid, row[0], row[1], row[2].encode())


def _standing(tx: Transaction, log: Log, e: NewEntry, most: int) -> Standing:
    """The facts that nearly every rule needs."""
    if log.kind is None:
        return Standing(None, None)
    row = tx.one("SELECT members FROM convs WHERE id = ?", (e.conv,))
    assert row is not None
    found = Standing(log.kind, tx.role(e.conv, e.sender), members=row[0], max_conversations=most)
    if log.kind == "dm":
        other = log.b if log.a == e.sender else log.a
        found.blocked = tx.blocks(str(other), e.sender)
    if isinstance(e.change, RoleChange):
        found.user_role = tx.role(e.conv, e.change.user)
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
            standing.user_blocks = tx.blocks(e.change.user, e.sender)


def _conversations_of(tx: Transaction, user: str) -> int:
    row = tx.one(f"SELECT count(*) FROM members WHERE user = ? AND role IN {_ROLES}", (user,))
    assert row is not None
    return int(row[0])


def write_entry(tx: Transaction, e: NewEntry, ts: int) -> Log:
    """Write one entry that was found new, allowed and complete, and apply its change; the head after it."""
    sender = tx.number(e.sender)
    head = tx.own_log(e.conv)
    head.seq += 1
    if e.t in MESSAGES:
        head.msgs += 1
        head.last_msg = head.seq
    id = tx.tick()
    row = (id, head.n, head.seq, e.t, sender, head.msgs, head.last_msg, e.cid, e.digest, ts, e.fields.decode())
    in_bulk(tx.db, _INSERT, [row])
    is_message = e.t in MESSAGES
    tx.wrote(
        [(id, head.n, sender if is_message else 0, head.seq, tx.key(head.n, sender, e.cid))],
        [(e.conv, e.sender, head.seq, head.msgs, id)] if is_message else [],
    )
    tx.appended.append(Committed(e.conv, head.seq, e.t, e.sender, ts, e.cid, head.msgs, head.last_msg, e.fields))
    apply(tx, e.conv, e.change, head.seq, head.msgs)
    return head


def apply(tx: Transaction, conv: str, change: Change | None, as_of: int, msgs: int) -> None:
    """Bring the rows of a conversation up to a change, as of an entry and the number of messages up to it."""
    match change:
        case RoleChange(user=user, role=role):
            set_role(tx, conv, user, role, as_of, msgs)
        case ConversationChange(title=title):
            tx.db.execute("UPDATE convs SET title = ?, title_key = ? WHERE id = ?", (title, title.casefold(), conv))


def set_role(tx: Transaction, conv: str, user: str, role: str, as_of: int, msgs: int) -> None:
    """Write a member's row as of an entry; a user who comes in starts with everything read."""
    before = tx.role(conv, user)
    was, is_ = before in MEMBER_ROLES, role in MEMBER_ROLES
    rev = tx.row_changed(conv, user)
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
    tx.set_role(conv, user, role)
    if was != is_:
        tx.db.execute("UPDATE convs SET members = members + ? WHERE id = ?", (1 if is_ else -1, conv))


class OpenConversation(Request, frozen=True, gc=False):
    """Make a conversation and its first entries, or find what the same request made.

    ``most`` is how many conversations a user may be in.
    """

    opening: Opening
    most: int

    result = Opened
    grows = True

    def apply(self, tx: Transaction) -> Opened | Reply:
        o = self.opening
        conv = conversation_id(tx.secret, o)
        _check_cid(tx, o)
        if tx.one("SELECT 1 FROM convs WHERE id = ?", (conv,)) is not None:
            # With its first entries: who asks again may be the only one who could have announced them.
            made = msgspec.msgpack.encode(Opened(conv, False))
            return Reply(dup=True, value=made, entries=_first_entries(tx, conv, o))
        users = first_members(o)
        for user in users:
            if tx.one("SELECT 1 FROM users WHERE id = ? AND disabled = 0", (user,)) is None:
                raise NotFound(f"no such user: {user}")
            refused = check_room_for(user, _conversations_of(tx, user), self.most)
            if refused is not None:
                raise refused
            if user != o.creator and tx.blocks(user, o.creator):
                raise takes_no_messages() if o.kind == "dm" else takes_no_invitations(user)
        ts = now_ms()
        a, b = sorted(users) if o.kind == "dm" else (None, None)
        _insert_conversation(tx, conv, o.kind, o.title, a, b, ts)
        tx.begin_log(conv, Log(tx.number(conv), o.kind, a, b))
        if o.kind == "dm":
            _insert_conversation(tx, request_id(tx.secret, o), DM_REQUEST, None, a, b, ts)
        for e in first_entries(conv, o, users):
            write_entry(tx, e, ts)
        return Opened(conv, True)


def _first_entries(tx: Transaction, conv: str, o: Opening) -> list[Committed]:
    """What a conversation began with, as it is in the log."""
    log = tx.log(conv)
    found: list[Committed] = []
    for seq in range(1, len(first_members(o)) + (o.title is not None) + 1):
        row = tx.one(
            "SELECT e.t, s.id, e.ts, e.cid, e.msgs, e.last_msg, e.fields FROM entries e CROSS JOIN ids s"
            " ON s.n = e.sender WHERE e.id = ?",
            (tx.id_at(log, seq),),
        )
        assert row is not None
        t, sender, ts, cid, msgs, last_msg, fields = row
        found.append(Committed(conv, seq, t, sender, ts, cid, msgs, last_msg, fields.encode()))
    return found


def _check_cid(tx: Transaction, o: Opening) -> None:
    """:raises Conflict: the creator's cid made another conversation."""
    request = request_id(tx.secret, o)
    made = tx.one("SELECT kind, a, b FROM convs WHERE id = ?", (request,))
    if made is None:
        return
    if o.kind == "dm":
        same = made == (DM_REQUEST, *sorted((o.creator, o.members[0])))
    else:
        same = made[0] != DM_REQUEST and _first_digest(tx, request) == o.digest
    if not same:
        raise Conflict(f"cid {o.cid} was used for something else")


def _first_digest(tx: Transaction, conv: str) -> bytes | None:
    """The digest of the first entry of a conversation: that of the whole request which made it."""
    id = tx.id_at(tx.log(conv), 1)
    row = None if id is None else tx.one("SELECT digest FROM entries WHERE id = ?", (id,))
    return None if row is None else bytes(row[0])


def _insert_conversation(
    tx: Transaction, id: str, kind: str, title: str | None, a: str | None, b: str | None, ts: int
) -> None:
    tx.db.execute(
        "INSERT INTO convs(id, kind, title, title_key, a, b, created) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (id, kind, title, None if title is None else title.casefold(), a, b, ts),
    )
