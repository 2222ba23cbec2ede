"""One open write transaction, and what the writer knows of the log while it has none.

:class:`LogState` is what was committed: it changes only after COMMIT returned, and is made anew after any error, so
that nothing in it comes from a transaction of unknown outcome. :class:`Transaction` holds what the open one adds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Final

import apsw
import msgspec
from lru import LRU

from ..._fast.runs import key_of
from ...entries import MESSAGES
from ...protocol import MEMBER_ROLES
from ..opening import DM_REQUEST
from .index import Filters, cid_secret
from .schema import POSITION
from .tail import Snapshot, StaleIndex

#: Conversations, roles, blocks and ids that the writer remembers, each, and members. One takes 150 to 300 bytes.
REMEMBERED: Final = 100_000
REMEMBERED_MEMBERS: Final = 300_000
#: Rows of one statement, at most. Each number of rows is a statement of its own to SQLite, so numbers are powers of
#: two, and all of them stay prepared.
_ROWS: Final = 64

_UNINDEXED: Final = """
SELECT e.id, e.conv, e.sender, e.cid, e.t, e.seq, e.msgs, c.id, s.id
FROM entries e CROSS JOIN ids c ON c.n = e.conv CROSS JOIN ids s ON s.n = e.sender WHERE e.id > ?
"""
_UNINDEXED_MARKS: Final = """
SELECT r.id, c.id, u.id, r.read, r.msgs
FROM row_changes r CROSS JOIN ids c ON c.n = r.conv CROSS JOIN ids u ON u.n = r.user
WHERE r.id > ? AND r.read IS NOT NULL
"""
_FOUND: Final = "SELECT conv, sender, cid, seq, ts, digest, msgs FROM entries WHERE id = ?"


class Log(msgspec.Struct, gc=False):
    """A conversation and the head of its log. ``kind`` None: there is no such conversation."""

    n: int
    kind: str | None
    a: str | None
    b: str | None
    seq: int = 0
    msgs: int = 0
    last_msg: int = 0


class Found(msgspec.Struct, frozen=True, gc=False):
    """An entry that a cid has already."""

    seq: int
    ts: int
    digest: bytes
    msgs: int


class Committed(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """An entry that a request other than a message appended, for the worker to announce."""

    conv: str
    seq: int
    t: str
    sender: str
    ts: int
    cid: str
    msgs: int
    last_msg: int
    fields: bytes


@functools.cache
def _with_rows(sql: str, rows: int, columns: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return sql.format(values=", ".join([row] * rows))


def in_bulk(db: apsw.Connection, sql: str, rows: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Run a statement with VALUES of these rows, in as few parts as there can be; what they return together."""
    found: list[tuple[Any, ...]] = []
    at = 0
    while at < len(rows):
        n = min(_ROWS, 1 << ((len(rows) - at).bit_length() - 1))
        values = list(itertools.chain.from_iterable(rows[at : at + n]))
        found += db.execute(_with_rows(sql, n, len(rows[at])), values)
        at += n
    return found


#: A read mark to bring into a row: seq, messages up to it, and the change counter of the newest that the user set.
Mark = tuple[int, int, int]


class Portion(msgspec.Struct):
    """What the writer remembers of the entries and marks with ids up to ``high``, until the index covers them."""

    high: int
    #: Keys of cids: one id, or several of the same key.
    keys: dict[int, int | list[int]]
    #: The newest mark of each user, by conversation: a message moves its sender's, too.
    marks: dict[str, dict[str, Mark]]

    def add_key(self, key: int, id: int) -> None:
        """Remember the key of an entry's cid."""
        had = self.keys.setdefault(key, id)
        if had != id:
            self.keys[key] = [*had, id] if isinstance(had, list) else [had, id]

    def add_mark(self, conv: str, user: str, seq: int, msgs: int, rev: int) -> None:
        """Remember a mark; of a message (``rev`` 0) or set by its user."""
        marks = self.marks.get(conv)
        if marks is None:
            self.marks[conv] = {user: (seq, msgs, rev)}
            return
        had = marks.get(user)
        if had is None:
            marks[user] = (seq, msgs, rev)
        else:
            marks[user] = (seq, msgs, rev or had[2]) if seq >= had[0] else (had[0], had[1], rev or had[2])


class LogState:
    """What is committed: position, heads, cids, and the rows that every message is judged by.

    :param snapshot: of the writer's own.
    :param secret: of the store.
    """

    def __init__(self, snapshot: Snapshot, secret: bytes) -> None:
        self.snapshot = snapshot
        self.secret = secret
        #: Of :func:`~chatcore._fast.runs.key_of`.
        self.key_secret = cid_secret(secret)
        self._filters = Filters()
        #: In order, from the mark on.
        self.portions: list[Portion] = []
        self.logs: LRU[str, Log] = LRU(REMEMBERED)
        self.roles: LRU[tuple[str, str], str | None] = LRU(REMEMBERED)
        #: The small integers of members, by conversation and user: what nearly every message asks for.
        self.members: LRU[tuple[str, str], int] = LRU(REMEMBERED_MEMBERS)
        self.blocks: LRU[tuple[str, str], bool] = LRU(REMEMBERED)
        self.ids: LRU[str, int] = LRU(REMEMBERED)
        #: The newest value of the change counter.
        self.position: int = snapshot.all(POSITION)[0][0]
        #: The id of the newest entry.
        self.newest_id = 0
        #: The highest id that the index covers.
        self.mark = -1
        self.follow()
        while self._filters.loading:  # later, a part with each look
            self.follow()
        self.newest_id = snapshot.newest
        self._read_portions()

    def follow(self) -> None:
        """Look at what the index covers by now.

        :raises StaleIndex: it was made anew. What it lacks has to be read again, with all else.
        """
        with self.snapshot as snapshot:
            if snapshot.mark < self.mark:
                raise StaleIndex(f"the index ends at {snapshot.mark}, and ended at {self.mark}")
            # First the filters, then the keys that they stand for.
            self._filters.refresh(snapshot.index)
            if snapshot.mark != self.mark:
                self.mark = snapshot.mark
                self.portions = [portion for portion in self.portions if portion.high > self.mark]

    def _read_portions(self) -> None:
        for id, n, sender, cid, t, seq, msgs, conv, user in self.snapshot.db.execute(_UNINDEXED, (self.mark,)):
            portion = self.portion_of(id)
            portion.add_key(key_of(self.key_secret, n, sender, cid), id)
            if t in MESSAGES:
                portion.add_mark(conv, user, seq, msgs, 0)
        for id, conv, user, seq, msgs in self.snapshot.db.execute(_UNINDEXED_MARKS, (self.mark,)):
            self.portion_of(id).add_mark(conv, user, seq, msgs, id)

    def portion_of(self, id: int) -> Portion:
        """Where an entry or a mark belongs."""
        size = self.snapshot.portion
        for portion in reversed(self.portions):
            if portion.high - size < id <= portion.high:
                return portion
        portion = Portion(self.mark + ((id - self.mark - 1) // size + 1) * size, {}, {})
        self.portions.append(portion)
        self.portions.sort(key=lambda portion: portion.high)
        return portion

    def mark_of(self, conv: str, user: str) -> int:
        """The newest read mark of a user, of those that may not be in the row (0: there is none)."""
        newest = 0
        for portion in self.portions:
            mark = portion.marks.get(conv, {}).get(user)
            if mark is not None and mark[0] > newest:
                newest = mark[0]
        return newest

    def with_key(self, key: int) -> Sequence[int]:
        """The ids of committed entries that may be the one with this key."""
        found: list[int] = []
        for portion in self.portions:
            ids = portion.keys.get(key)
            if ids is not None:
                found += ids if isinstance(ids, list) else [ids]
        if key in self._filters:
            with self.snapshot as snapshot:  # the runs as they are now: those of the filters may be merged and gone
                index = snapshot.index
                same = index.generation == self._filters.generation
                found += index.candidates(key, self._filters.runs(key) if same else None)
        return found

    def may_know(self, key: int) -> bool:
        """False: no committed entry has this key. Asked for every message, so it costs a fraction of the look-up."""
        for portion in self.portions:
            if key in portion.keys:
                return True
        return key in self._filters

    def newest(self, conv: int) -> int:
        """The id of the newest entry of a conversation (0: there is none)."""
        with self.snapshot as snapshot:
            return snapshot.head(conv)

    def id_at(self, conv: int, seq: int) -> int | None:
        """The id of an entry (None: there is none)."""
        with self.snapshot as snapshot:
            ids = snapshot.ids(conv, seq, seq)
        return ids[0] if ids else None


class Transaction:
    """One open write transaction: the counter, the heads and entries that it adds, and the facts as it sees them."""

    def __init__(self, db: apsw.Connection, state: LogState) -> None:
        self.db = db
        #: Of the store, and of :func:`~chatcore._fast.runs.key_of`.
        self.secret = state.secret
        self.key_secret = state.key_secret
        self._state = state
        #: The newest value of the change counter that is taken.
        self.position = state.position
        self._logs: dict[str, Log] = {}
        self._roles: dict[tuple[str, str], str | None] = {}
        self._blocks: dict[tuple[str, str], bool] = {}
        self._ids: dict[str, int] = {}
        self._members: dict[tuple[str, str], int] = {}
        #: The keys of what it wrote, and for each entry: id, conversation, sender of a message or 0, seq, key.
        self._own: set[int] = set()
        self._entries: list[tuple[int, int, int, int, int]] = []
        #: The marks that messages and users moved: conversation, user, seq, msgs, and the id.
        self._sent: list[tuple[str, str, int, int, int]] = []
        self._read: list[tuple[str, str, int, int, int]] = []
        #: Text was overwritten, and is still in the write-ahead log.
        self.erased = False
        #: Entries that requests other than messages appended, since it was emptied.
        self.appended: list[Committed] = []

    def tick(self, n: int = 1) -> int:
        """The first of the next ``n`` values of the change counter."""
        first = self.position + 1
        self.position += n
        return first

    def one(self, sql: str, args: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """The first row, or None."""
        return self.db.execute(sql, args).fetchone()

    def changes(self) -> int:
        """How many rows were changed so far, new small integers apart."""
        return self.db.total_changes() - len(self._ids)

    def keep(self) -> None:
        """COMMIT has returned: what this transaction added is the state now."""
        state = self._state
        state.position = self.position
        state.ids.update(self._ids)
        state.logs.update(self._logs)
        state.roles.update(self._roles)
        for pair in self._roles:
            if pair in state.members:
                del state.members[pair]
        state.members.update(self._members)
        state.blocks.update(self._blocks)
        if self._entries:
            state.newest_id = self._entries[-1][0]
        portion = Portion(-1, {}, {})
        for id, _, _, _, key in self._entries:  # in the order of the ids
            if id > portion.high:
                portion = state.portion_of(id)
            if portion.keys.setdefault(key, id) != id:
                portion.add_key(key, id)
        portion = Portion(-1, {}, {})
        for conv, user, seq, msgs, id in self._sent:  # likewise
            if id > portion.high:
                portion = state.portion_of(id)
            marks = portion.marks.get(conv)
            if marks is None:
                portion.marks[conv] = {user: (seq, msgs, 0)}
            else:
                had = marks.get(user)
                # A message is newer than whatever its sender has read.
                marks[user] = (seq, msgs, 0 if had is None else had[2])
        for conv, user, seq, msgs, id in self._read:
            state.portion_of(id).add_mark(conv, user, seq, msgs, id)

    # --- facts ----------------------------------------------------------------------------
    def number(self, id: str) -> int:
        """The small integer of a conversation or a user, a new one if it has none."""
        n = self._state.ids.get(id) or self._ids.get(id)
        if n is None:
            row = self.one("SELECT n FROM ids WHERE id = ?", (id,))
            if row is None:
                row = self.one("INSERT INTO ids(id) VALUES (?) RETURNING n", (id,))
                assert row is not None
                n = self._ids[id] = int(row[0])
            else:
                n = self._state.ids[id] = int(row[0])
        return n

    def member(self, conv: str, user: str) -> int:
        """The small integer of a user who is a member of a conversation; 0: the user is none."""
        key = (conv, user)
        n = None if key in self._roles else self._state.members.get(key)
        if n is None:
            if self.role(conv, user) not in MEMBER_ROLES:
                return 0
            n = self._members[key] = self.number(user)
        return n

    def log(self, conv: str) -> Log:
        """A conversation and the head of its log; only :meth:`own_log` is for moving the head."""
        log = self._logs.get(conv) or self._state.logs.get(conv)
        if log is None:
            row = self.one("SELECT kind, a, b FROM convs WHERE id = ?", (conv,))
            if row is None or row[0] == DM_REQUEST:
                return Log(0, None, None, None)
            n = self.number(conv)
            log = Log(n, *row)
            head = self._state.newest(n)
            if head:
                found = self.one("SELECT seq, msgs, last_msg FROM entries WHERE id = ?", (head,))
                assert found is not None
                log.seq, log.msgs, log.last_msg = found
            # Not into the state: it may be a conversation of this very transaction.
            self._logs[conv] = log
        return log

    def role(self, conv: str, user: str) -> str | None:
        """The role in a user's row (None: there is no row)."""
        key = (conv, user)
        if key in self._roles:
            return self._roles[key]
        if key in self._state.roles:
            return self._state.roles[key]
        row = self.one("SELECT role FROM members WHERE conv = ? AND user = ?", key)
        role = self._roles[key] = row[0] if row else None
        return role

    def set_role(self, conv: str, user: str, role: str) -> None:
        """Remember a role that the transaction writes."""
        self._roles[(conv, user)] = role
        self._members.pop((conv, user), None)

    def blocks(self, user: str, other: str) -> bool:
        """Whether ``user`` blocks ``other``."""
        key = (user, other)
        if key in self._blocks:
            return self._blocks[key]
        if key in self._state.blocks:
            return self._state.blocks[key]
        blocked = self._blocks[key] = (
            self.one("SELECT 1 FROM blocks WHERE user = ? AND other = ?", (user, other)) is not None
        )
        return blocked

    def set_block(self, user: str, other: str, on: bool) -> None:
        """Remember a block that the transaction writes."""
        self._blocks[(user, other)] = on

    # --- the log --------------------------------------------------------------------------
    def may_know(self, key: int) -> bool:
        """False: no entry has this key."""
        return key in self._own or self._state.may_know(key)

    def find(self, key: int, conv: int, sender: int, cid: str) -> Found | None:
        """The entry that a sender's cid has in a conversation, whatever its age.

        :param key: that of the cid (:func:`~chatcore._fast.runs.key_of`).
        """
        if not self.may_know(key):
            return None
        ids = self._state.with_key(key)
        if key in self._own:
            ids = [*ids, *(entry[0] for entry in self._entries if entry[4] == key)]
        for id in ids:
            row = self.db.execute(_FOUND, (id,)).fetchone()
            if row is not None and row[:3] == (conv, sender, cid):
                return Found(*row[3:])
        return None

    def key(self, conv: int, sender: int, cid: str) -> int:
        """The key of a cid."""
        return key_of(self.key_secret, conv, sender, cid)

    def own_log(self, conv: str) -> Log:
        """The same as :meth:`log`, to move its head: call :meth:`wrote` with each entry then."""
        log = self._logs.get(conv)
        if log is None:
            log = self.log(conv)
            log = self._logs[conv] = Log(log.n, log.kind, log.a, log.b, log.seq, log.msgs, log.last_msg)
        return log

    def wrote(
        self,
        entries: Sequence[tuple[int, int, int, int, int]],
        marks: Sequence[tuple[str, str, int, int, int]],
    ) -> None:
        """Remember entries that were written.

        :param entries: (id, conversation, sender of a message or 0, seq, key) of each, in the order of ids.
        :param marks: (conversation, sender, seq, msgs, id) of each message.
        """
        self._entries += entries
        self._sent += marks
        self._own.update([entry[4] for entry in entries])

    def rewrite(self, log: Log, seq: int, fields: bytes) -> None:
        """Replace the fields of an entry for good: what they were is overwritten in the file, and out of the
        write-ahead log within a second (:meth:`~.engine.Engine.checkpoint`).

        They are filled up with spaces to the length of what they replace. A row of another size would make SQLite move
        the rows beside it to other pages, and copies of their text would stay in the unused part of a page, where
        nothing overwrites them when their turn comes.

        :param fields: a JSON object that is not longer than the one it replaces.
        """
        id = self.id_at(log, seq)
        row = self.one("SELECT octet_length(fields) FROM entries WHERE id = ?", (id,))
        if row is None or len(fields) > row[0]:
            raise ValueError(f"entry {seq} cannot be replaced by {len(fields)} bytes")
        filled = fields[:-1].ljust(row[0] - 1) + fields[-1:]
        self.db.execute("UPDATE entries SET fields = ? WHERE id = ?", (filled.decode(), id))
        self.erased = True

    def begin_log(self, conv: str, log: Log) -> None:
        """A conversation that the transaction makes."""
        self._logs[conv] = log

    def msgs_at(self, log: Log, seq: int) -> int | None:
        """How many messages there are up to an entry (None: there is no such entry)."""
        if seq == log.seq:
            return log.msgs
        if not 0 < seq < log.seq:
            return None
        row = self.one("SELECT msgs FROM entries WHERE id = ?", (self.id_at(log, seq),))
        return None if row is None else int(row[0])

    def id_at(self, log: Log, seq: int) -> int | None:
        """The id of an entry (None: there is none)."""
        for entry in reversed(self._entries):
            if (entry[1], entry[3]) == (log.n, seq):
                return entry[0]
        return self._state.id_at(log.n, seq)

    def mark(self, conv: str, user: str, row: int) -> int:
        """The read mark of a user, whose row has ``row``."""
        own = [mark[2] for marks in (self._sent, self._read) for mark in marks if mark[:2] == (conv, user)]
        return max([row, self._state.mark_of(conv, user), *own])

    def set_mark(self, conv: str, user: str, seq: int, msgs: int) -> None:
        """Append a read mark; it comes into the row later."""
        id, conv_n, user_n = self.tick(), self.number(conv), self.number(user)
        self._read.append((conv, user, seq, msgs, id))
        self.db.execute("INSERT INTO row_changes VALUES (?, ?, ?, ?, ?)", (id, conv_n, user_n, seq, msgs))

    def row_changed(self, conv: str, user: str) -> int:
        """Say that a row of a member changed; the value of the counter for it."""
        rev = self.tick()
        self.db.execute(
            "INSERT INTO row_changes VALUES (?, ?, ?, NULL, NULL)", (rev, self.number(conv), self.number(user))
        )
        return rev
