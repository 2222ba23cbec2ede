"""Whether a data folder is whole: the log, the rows that follow from it, and the index, each against the others.

All is read in one state of the database, so that it may be done beside a running server. Memory is bounded by the
members of one conversation: the log is sorted by conversation in temporary files.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import apsw
import msgspec

from ..._fast.runs import key_of
from ...entries import CHANGING, ENTRY_TYPES, MESSAGES, ConversationChange, RoleChange, change_of
from ...protocol import MEMBER_ROLES
from ..opening import DM_REQUEST
from . import index
from .index import cid_secret, rows
from .indexer import digest_at
from .schema import POSITION, SCHEMA_VERSION, BrokenStore, connect, database_path

#: Problems of one kind that are told; a damaged file has millions.
SHOWN: Final = 20
#: What the sorter may keep in memory before it writes to a temporary file.
SORT_KIB: Final = 64 * 1024
#: Ids of a conversation that are compared with the index at once.
IDS_AT_ONCE: Final = 1000
#: The kinds of findings, in the order in which they are told.
KINDS: Final = ("files", "log", "cids", "members", "read marks", "titles", "index")

_ROLES: Final = "('member', 'admin', 'owner')"
_ENTRIES: Final = f"""
SELECT conv, seq, id, sender, t, msgs, last_msg, cid,
  CASE WHEN t IN ({", ".join(repr(t) for t in sorted(CHANGING))}) THEN fields END
FROM entries ORDER BY conv, seq, id
"""
_MARKS: Final = "SELECT conv, id, user, read, msgs FROM row_changes WHERE read IS NOT NULL ORDER BY conv"
_MEMBERS: Final = """
SELECT m.user, i.n, m.role, m.as_of, m.read, m.read_msgs
FROM members m LEFT JOIN ids i ON i.id = m.user WHERE m.conv = ?
"""
#: Questions whose answers are problems: the kind, how one is told, and the query for what is told.
_QUESTIONS: Final = (
    (
        "log",
        "position {} of the change counter was given out twice",
        "SELECT r.id FROM row_changes r JOIN entries e ON e.id = r.id"
        " UNION ALL SELECT rev FROM revocations WHERE rev IN (SELECT id FROM entries)"
        " UNION ALL SELECT rev FROM revocations WHERE rev IN (SELECT id FROM row_changes)",
    ),
    (
        "log",
        "the entry with id {} has the sender number {}, which nobody has",
        "SELECT id, sender FROM entries WHERE sender NOT IN (SELECT n FROM ids)",
    ),
    (
        "log",
        "conversation {} has no entry",
        f"SELECT c.id FROM convs c LEFT JOIN ids i ON i.id = c.id WHERE c.kind <> '{DM_REQUEST}'"
        " AND (i.n IS NULL OR i.n NOT IN (SELECT conv FROM entries))",
    ),
    (
        "read marks",
        "there is a change of a row in conversation number {}, which has no entry, at position {}",
        "SELECT conv, id FROM row_changes WHERE conv NOT IN (SELECT conv FROM entries)",
    ),
    (
        "cids",
        "conversation {} has {} entries with the sender {} and the cid {}",
        "SELECT (SELECT id FROM ids WHERE n = conv), count(*), (SELECT id FROM ids WHERE n = sender), cid"
        " FROM entries GROUP BY conv, sender, cid HAVING count(*) > 1",
    ),
    (
        "members",
        "there is a row of {} in {}, which is no conversation",
        "SELECT user, conv FROM members WHERE conv NOT IN (SELECT id FROM convs)",
    ),
    (
        "members",
        "conversation {} has {} members, by its row {}",
        f"SELECT id, (SELECT count(*) FROM members WHERE conv = c.id AND role IN {_ROLES}) AS n, members FROM convs c"
        " WHERE n <> members",
    ),
    (
        "members",
        "the row of {} in {} has a position that was not given out yet: {}",
        f"SELECT user, conv, rev FROM members WHERE rev > ({POSITION})",
    ),
)

Report = Callable[[str], None]


def verify(data: Path, report: Report) -> list[str]:
    """Check all that is stored in a data folder; returns the problems, which are told to ``report``, too.

    :param report: is given one line for each kind of check, and one for each problem.
    :raises BrokenStore: there is nothing that could be checked.
    """
    path = database_path(data)
    if not path.exists():
        raise BrokenStore(f"there is no chatcore data in {data}")
    try:
        db = connect(path, write=False)
        try:
            version = db.pragma("user_version")
            if version != SCHEMA_VERSION:
                raise BrokenStore(
                    f"{path} has schema version {version}; a start of the server makes it {SCHEMA_VERSION}"
                    if version < SCHEMA_VERSION
                    else f"{path} has schema version {version}; this program knows {SCHEMA_VERSION}"
                )
            db.execute(f"PRAGMA temp_store = FILE; PRAGMA cache_size = -{SORT_KIB}")
            return _Verification(db, report).run(data)
        finally:
            db.close(True)
    except apsw.Error as exc:
        raise BrokenStore(f"the data in {data} cannot be checked: {exc}") from None


class _Conversation:
    """What the entries of one conversation say, as far as they were read, and what its rows say."""

    def __init__(self, db: apsw.Connection, n: int, set_marks: list[tuple[int, int, int, int]]) -> None:
        found = rows(
            db, "SELECT i.id, c.kind, c.title, c.title_key FROM ids i LEFT JOIN convs c USING (id) WHERE n = ?", (n,)
        )
        self.n = n
        self.id: str = found[0][0] if found else f"number {n}"
        #: None: there is no such conversation.
        self.kind: str | None = found[0][1] if found else None
        self.titles: tuple[str | None, str | None] = tuple(found[0][2:]) if found else (None, None)
        self.members = rows(db, _MEMBERS, (self.id,))
        #: Read marks that were not deleted yet, whether they are in rows or not: position, user, seq, and messages.
        self.set_marks = set_marks
        #: Where read marks stand: seq -> whose, and the number of messages that it claims.
        self.marks: dict[int, list[tuple[str, int]]] = {}
        for user, _, _, _, read, read_msgs in self.members:
            self.marks.setdefault(read, []).append((f"the mark of {user}", read_msgs))
        for id, user, read, msgs in set_marks:
            self.marks.setdefault(read, []).append((f"the mark of user number {user} at position {id}", msgs))
        self.seq = self.msgs = self.last_msg = 0
        self.dense = True
        #: By user: seq and role of the newest entry about it.
        self.roles: dict[str, tuple[int, str]] = {}
        self.new_title: str | None = None
        #: By the number of a user: the newest seq that the row of the member must have as read.
        self.read: dict[int, int] = {}
        #: Ids of consecutive entries, to be compared with the index; the first is of the entry `ids_from`.
        self.ids: list[int] = []
        self.ids_from = 1
        self.indexed_head = 0


class _Verification:
    def __init__(self, db: apsw.Connection, report: Report) -> None:
        self._db = db
        self._report = report
        self._problems: list[str] = []
        self._count: Counter[str] = Counter()
        self._index: index.Index | None = None
        self._filters = index.Filters()
        #: The index covers the log up to here.
        self._mark = 0
        self._no_index = "there is none that can be used; the server makes it anew"
        #: The database can be read at all.
        self._readable = True
        self._position = self._folded = self._entries = self._convs = self._indexed = 0
        self._secret = b""

    def run(self, data: Path) -> list[str]:
        # The state of the index first: it may lag behind the log, but not the log behind it.
        found = self._open_index(data)
        self._readable = self._is_sound("main", database_path(data))
        self._tell("files")
        if self._readable:
            known = dict(rows(self._db, "SELECT key, value FROM main.meta"))
            self._folded = known["folded"]
            self._secret = cid_secret(known["secret"])
            self._position = self._number(POSITION)
            if found is not None:
                self._believe(found, known["store_id"])
            self._ask()
            self._read_the_log()
            self._count_the_index()
        self._tell(*KINDS[1:])
        return self._problems

    # --- findings ---------------------------------------------------------------------------
    def _problem(self, kind: str, what: str) -> None:
        self._count[kind] += 1
        if self._count[kind] <= SHOWN:
            self._problems.append(f"{kind}: {what}")

    def _tell(self, *kinds: str) -> None:
        fine = {
            "log": f"ok ({self._entries} entries of {self._convs} conversations)",
            "index": f"ok ({self._indexed} of {self._entries} entries)" if self._index is not None else self._no_index,
        }
        for kind in kinds:
            count = self._count[kind]
            if count:
                self._report(f"{kind}: {count} problem{'s' * (count > 1)}")
            elif self._readable or kind == "files":
                self._report(f"{kind}: {fine.get(kind, 'ok')}")
            else:
                self._report(f"{kind}: not checked")
            for problem in self._problems:
                if problem.startswith(f"{kind}: "):
                    self._report(f"  {problem.removeprefix(f'{kind}: ')}")
            if count > SHOWN:
                self._report(f"  and {count - SHOWN} more")

    def _number(self, sql: str) -> int:
        return int(rows(self._db, sql)[0][0])

    # --- the checks -------------------------------------------------------------------------
    def _is_sound(self, schema: str, path: Path) -> bool:
        """Whether a file is as SQLite wrote it; in one that is not, anything may be read."""
        try:
            lines = [line for (line,) in rows(self._db, f"PRAGMA {schema}.integrity_check({SHOWN})") if line != "ok"]
        except (apsw.CorruptError, apsw.NotADBError) as exc:
            lines = [str(exc)]
        for line in lines:
            self._problem("files", f"{path.name}: {line}")
        return not lines

    def _ask(self) -> None:
        if self._folded > self._position:
            self._problem("read marks", f"folded up to {self._folded}, but the newest position is {self._position}")
        for kind, told, sql in _QUESTIONS:
            for row in self._db.execute(sql):
                self._problem(kind, told.format(*row))

    def _read_the_log(self) -> None:
        """All entries, by conversation and seq."""
        marks = itertools.groupby(self._db.execute(_MARKS), key=_first)
        with_marks, own = next(marks, (None, ()))
        for n, entries in itertools.groupby(self._db.execute(_ENTRIES), key=_first):
            while with_marks is not None and with_marks < n:
                with_marks, own = next(marks, (None, ()))
            conv = _Conversation(self._db, n, [row[1:] for row in own] if with_marks == n else [])
            self._convs += 1
            if conv.kind is None:
                self._problem("log", f"there are entries of {conv.id}, which is no conversation")
            for id, user, read, _ in conv.set_marks:
                if id <= self._folded:
                    conv.read[user] = max(conv.read.get(user, 0), read)
            for row in entries:
                self._check_entry(conv, *row[1:])
            self._compare_rows(conv)
            self._end_of_index(conv)

    def _check_entry(
        self, conv: _Conversation, seq: int, id: int, sender: int, t: str, msgs: int, last_msg: int, cid: str,
        fields: str | None,
    ) -> None:  # fmt: skip
        self._entries += 1
        here = f"entry {seq} of {conv.id}"
        follows = seq == conv.seq + 1
        if not follows:
            self._problem("log", f"{here} (id {id}) comes after entry {conv.seq}")
            conv.dense = False
        plain, message = (conv.msgs, conv.last_msg), (conv.msgs + 1, seq)
        # An unknown type, of a newer program, may be one of messages.
        right = (message,) if t in MESSAGES else (plain,) if t in ENTRY_TYPES else (plain, message)
        if follows and (msgs, last_msg) not in right:
            self._problem("log", f"{here} has msgs {msgs} and last_msg {last_msg}, not {right[0][0]} and {right[0][1]}")
        conv.seq, conv.msgs, conv.last_msg = seq, msgs, last_msg
        for whose, claimed in conv.marks.pop(seq, ()):
            if claimed != msgs:
                self._problem("read marks", f"{whose} in {here} counts {claimed} messages, not {msgs}")
        if t in MESSAGES and id <= self._folded:
            conv.read[sender] = max(conv.read.get(sender, 0), seq)
        if fields is not None:
            self._replay(conv, seq, t, fields, here)
        if self._index is not None and id <= self._mark:
            self._check_key(conv, id, sender, cid, here)
            conv.indexed_head = id
            conv.ids.append(id)
            if len(conv.ids) == IDS_AT_ONCE:
                self._compare_ids(conv)

    def _replay(self, conv: _Conversation, seq: int, t: str, fields: str, here: str) -> None:
        try:
            change = change_of(t, fields)
        except msgspec.ValidationError as exc:
            self._problem("log", f"{here} is no {t}: {exc}")
            return
        match change:
            case RoleChange(user=user, role=role):
                conv.roles[user] = (seq, role)
            case ConversationChange(title=title):
                conv.new_title = title

    def _compare_rows(self, conv: _Conversation) -> None:
        """The whole conversation was read: compare its rows."""
        for whose, claimed in conv.marks.pop(0, ()):
            if claimed:
                self._problem("read marks", f"{whose} in {conv.id} is at 0 and counts {claimed} messages")
        for seq, marks in conv.marks.items():
            for whose, _ in marks:
                self._problem("read marks", f"{whose} in {conv.id} is at {seq}, the newest entry is {conv.seq}")
        if conv.new_title is not None and conv.titles != (conv.new_title, conv.new_title.casefold()):
            self._problem("titles", f"{conv.id} is called {conv.titles[0]!r}, by its entries {conv.new_title!r}")
        for user, n, role, as_of, read, _ in conv.members:
            wrong = contradiction(conv.kind, conv.roles.pop(user, None), role, as_of, conv.seq)
            if wrong:
                self._problem("members", f"the row of {user} in {conv.id} is {role} as of {as_of}: {wrong}")
            if read < conv.read.get(n, 0):
                self._problem("read marks", f"the row of {user} in {conv.id} has read {read}, but read {conv.read[n]}")
        for user, (seq, role) in conv.roles.items():
            self._problem("members", f"there is no row of {user} in {conv.id}, who is {role} by entry {seq}")

    # --- the index --------------------------------------------------------------------------
    def _open_index(self, data: Path) -> index.Index | None:
        """Open it, and the one state of all that is looked at; None: there is none that can be looked at."""
        path = index.index_path(data)
        attached = path.exists()
        try:
            if attached:
                index.attach(self._db, data)
        except (apsw.CorruptError, apsw.NotADBError) as exc:
            self._problem("files", f"{path.name}: {exc}")
            attached = False
        self._db.execute("BEGIN")
        if not attached or not self._is_sound("idx", path):
            return None
        if rows(self._db, "SELECT 1 FROM idx.sqlite_schema WHERE name = 'runs'") and rows(
            self._db, "SELECT value FROM idx.meta WHERE key = 'format'"
        ) == [(index.FORMAT,)]:
            found = index.Index(self._db)
            self._mark = found.refresh()
            # A part of a filter with each call.
            for _ in range(self._number("SELECT count(*) + 1 FROM idx.filters")):
                self._filters.refresh(found)
            return found
        self._no_index = "it is of another version; the server makes it anew"
        return None

    def _believe(self, found: index.Index, store_id: str) -> None:
        """Use the index, if it is of this log."""
        known = dict(rows(self._db, "SELECT key, value FROM idx.meta"))
        if known["store_id"] != store_id:
            self._problem("index", "it is of another store")
        elif self._mark > self._position or known["digest"] != digest_at(self._db, self._mark):
            self._problem("index", f"it is of another state of the log: at its mark, {self._mark}, is another entry")
        else:
            self._index = found

    def _compare_ids(self, conv: _Conversation) -> None:
        """Compare the next ids of a conversation with the index. For a log with holes it has no meaning."""
        if self._index is None or not conv.ids:
            return
        first, last = conv.ids_from, conv.ids_from + len(conv.ids) - 1
        if conv.dense:
            found = self._index.ids(conv.n, first, last)
            for seq, (has, should) in enumerate(itertools.zip_longest(found, conv.ids), first):
                if has != should:
                    self._problem("index", f"it has id {has} for entry {seq} of {conv.id}, which has id {should}")
                    break
        self._indexed += len(conv.ids)
        conv.ids_from, conv.ids = last + 1, []

    def _check_key(self, conv: _Conversation, id: int, sender: int, cid: str, here: str) -> None:
        assert self._index is not None
        key = key_of(self._secret, conv.n, sender, cid)
        if id not in self._index.candidates(key, self._filters.runs(key)):
            whose = "the filter of its run" if id in self._index.candidates(key) else "it"
            self._problem("index", f"{whose} does not have the cid of {here}")

    def _end_of_index(self, conv: _Conversation) -> None:
        """All entries of a conversation were compared: the index has no more."""
        if self._index is None or not conv.dense:
            return
        self._compare_ids(conv)
        more = self._index.ids(conv.n, conv.ids_from, conv.ids_from)
        if more:
            self._problem("index", f"it has id {more[0]} for entry {conv.ids_from} of {conv.id}, which is not there")
        head = self._index.head(conv.n)
        if head != conv.indexed_head:
            self._problem("index", f"it has id {head} as the head of {conv.id}, not {conv.indexed_head}")

    def _count_the_index(self) -> None:
        """What the index has and the log has not."""
        if self._index is None:
            return
        entries = sum(run.entries for run in self._index.runs)
        if entries != self._indexed:
            self._problem("index", f"its runs have {entries} entries, the log has {self._indexed} up to its mark")
        for (run,) in self._db.execute(
            "SELECT run FROM idx.runs WHERE state = ? AND run NOT IN (SELECT run FROM idx.filters)", (index.LIVE,)
        ):
            self._problem("index", f"run {run} has no filter")
        strangers = "SELECT conv FROM idx.heads WHERE conv NOT IN (SELECT conv FROM main.entries)"
        for (n,) in self._db.execute(strangers):
            self._problem("index", f"it has conversation number {n}, which has no entry")


def _first(row: tuple[Any, ...]) -> int:
    n: int = row[0]
    return n


def contradiction(kind: str | None, said: tuple[int, str] | None, role: str, as_of: int, head: int) -> str:
    """What is wrong with the row of a member; empty: nothing.

    In a channel users come and go by themselves, which changes the row alone, as of the newest entry of then.

    :param said: seq and role of the newest entry about the user.
    """
    if as_of > head:
        return f"the newest entry is {head}"
    by_oneself = kind == "channel" and role in ("none", *MEMBER_ROLES) and role != "admin"
    if said is None:
        return "" if by_oneself else "no entry says so"
    seq, said_role = said
    if as_of < seq:
        return f"entry {seq} says {said_role}"
    if role == said_role and (as_of == seq or kind == "channel"):
        return ""
    # No user comes back from a ban alone.
    return "" if by_oneself and said_role != "banned" else f"entry {seq} says {said_role}"
