"""Members of conversations: rows that are the projection of their changes.

An entry decides, its row follows: a worker that applies the entry writes the row, if its
``as_of`` is lower. ``convs.folded`` is the seq of the newest change that is applied to all
rows. A row found behind (its writer died in between) is repaired by the worker that loads
the conversation or comes across the change (docs/log.md, "Members").
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Final

from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

from ...common.clock import now_ms
from ...common.locks import Locks
from ...entries import Change, ConversationChange, NewEntry, RoleChange, change_of
from ...errors import ChatError, Unavailable
from ...protocol import MEMBER_ROLES
from ..append import Head
from ..opening import DM_REQUEST
from .client import Document, Mongo

# Changes that one load applies at a time; a conversation has few that are not applied.
CHANGES_AT_ONCE: Final = 500
# Conversations whose roles this worker keeps, for the entries that it appends itself.
CONVS_MAX: Final = 10_000
# Roles kept of one conversation, those of users who write through this worker; and of all, some 150 B each.
ROLES_PER_CONV: Final = 1_000
ROLES_MAX: Final = 200_000
# Conversations of which is remembered how far their changes are applied.
APPLIED_MAX: Final = 10_000
# A conversation with more members is not counted anew; others after this, when another counting worker is done or dead.
COUNT_MAX: Final = 10_000
RECOUNT_AFTER_S: Final = 10.0
# A row is made once; a writer that lost to another finds it at the second try.
WRITE_TRIES: Final = 3

# A write of a row that takes longer has died.
ROW_WRITE_MS: Final = 60_000
POSITION_FIELDS: Final = {"rev": 1, "open": 1, "at": 1, "settled": 1}

ROLE_IN: Final = {"$in": list(MEMBER_ROLES)}


def row_id(conv: str, user: str) -> str:
    """The key of a member's row."""
    return f"{conv}:{user}"


def written_upto(doc: Document) -> int:
    """A position up to which all rows of this user (POSITION_FIELDS) are written."""
    idle = not doc["open"] or doc["at"] < now_ms() - ROW_WRITE_MS
    return int(doc["rev"] if idle else doc["settled"])


class Roles:
    """What this worker knows of one conversation, as of entry ``valid``: no change up to it is missing.

    A role comes with the seq that it reflects. That of a change stands against a row
    that is older: the change may not be applied yet.
    """

    __slots__ = ("_roles", "a", "b", "blocked", "blocked_until", "held", "kind", "stale", "used", "valid")

    def __init__(self, kind: str | None, a: str | None, b: str | None) -> None:
        self.kind = kind
        self.a = a
        self.b = b
        self.valid = -1
        self._roles: dict[str, tuple[str | None, int]] = {}
        #: Users whose row may have changed without an entry.
        self.stale: set[str] = set()
        #: Of a dm: the users blocked in it, until when that is believed, and when it was last used.
        self.blocked: set[str] = set()
        self.blocked_until = 0.0
        self.used = 0.0
        #: How many roles it was last counted with.
        self.held = 0

    def __len__(self) -> int:
        return len(self._roles)

    def role(self, user: str | None) -> str | None:
        """The role (None: no row, or nothing known)."""
        return self._roles.get(user or "", (None, -1))[0]

    def is_member(self, user: str) -> bool:
        """Known as a member. A user who is not may have joined a channel by a row alone, without an entry."""
        return user not in self.stale and self.role(user) in MEMBER_ROLES

    def note(self, user: str, role: str | None, as_of: int) -> None:
        """A role as of an entry, unless a later one is known."""
        if as_of >= self._roles.get(user, (None, -1))[1]:
            self._roles[user] = (role, as_of)

    def apply(self, seq: int, change: Change | None) -> None:
        """The change of an entry, in the order of the log."""
        if seq > self.valid and isinstance(change, RoleChange):
            self.note(change.user, change.role, seq)


class MemberRows:
    """Rows of one store, and the roles that its append loop goes by."""

    def __init__(self, mongo: Mongo, recount_after_s: float = RECOUNT_AFTER_S) -> None:
        self._mongo = mongo
        self._recount_after_s = recount_after_s
        self._known: OrderedDict[str, Roles] = OrderedDict()
        self._held = 0
        self._applied: OrderedDict[str, int] = OrderedDict()
        self._recounts: dict[str, float] = {}
        # This worker applies the changes of a conversation once at a time: a second task would do the same again (and
        # a server whose updates are not atomic, FerretDB, would let an older change overwrite a later).
        self._applying: Locks[str] = Locks()

    # --- rows ------------------------------------------------------------------
    @contextlib.asynccontextmanager
    async def row_write(self, user: str) -> AsyncIterator[int]:
        """The time of a write to one of the user's rows; gives the number to write into it.

        The user's counter ``rev`` is raised before the row is written. So that the counter is not
        taken for a position up to which all rows are written, ``open`` counts the writes in
        between, and ``settled`` is a counter at which there was none. A worker that dies in between
        holds ``settled`` back for ROW_WRITE_MS: its last write has landed by then.
        """
        users = self._mongo["users"]
        step = {"$inc": {"rev": 1, "open": 1}, "$set": {"at": now_ms()}}
        doc = await self._mongo.do(users.find_one_and_update({"_id": user}, step, return_document=ReturnDocument.AFTER))
        if doc is None:
            yield 0
            return
        rev = int(doc["rev"])
        yield rev
        with contextlib.suppress(ChatError):
            closing = {"$set": {"open": 0, "settled": rev}}
            alone = await self._mongo.do(users.update_one({"_id": user, "rev": rev, "open": 1}, closing))
            if not alone.matched_count:
                await self._mongo.do(users.update_one({"_id": user}, {"$inc": {"open": -1}}))

    async def position(self, user: str) -> int:
        """A position up to which all of the user's rows are written. It never falls."""
        users = self._mongo["users"]
        doc = await self._mongo.do(users.find_one({"_id": user}, POSITION_FIELDS))
        if doc is None:
            return 0
        position, settled = written_upto(doc), int(doc["settled"])
        if position == settled:
            return settled
        # Noted before it is given out, unless a row is being written again.
        query = {"_id": user, "rev": position, "open": doc["open"]}
        noted = await self._mongo.do(users.update_one(query, {"$set": {"open": 0, "settled": position}}))
        return position if noted.matched_count else settled

    async def role(self, conv: str, user: str) -> str | None:
        """The role in the row (None: there is no row)."""
        row = await self._mongo.do(self._mongo["members"].find_one({"_id": row_id(conv, user), "c": conv}, {"role": 1}))
        return None if row is None else str(row["role"])

    async def _rows(self, conv: str, users: Sequence[str]) -> dict[str, tuple[str, int]]:
        """The roles in these rows, and what they are as of."""
        ids = [row_id(conv, user) for user in users]
        query: Document = {"_id": ids[0] if len(ids) == 1 else {"$in": ids}, "c": conv}
        async with self._mongo.caught_up() as session:
            cursor = self._mongo["members"].find(query, {"_id": 0, "u": 1, "role": 1, "as_of": 1}, session=session)
            docs = await self._mongo.do(cursor.limit(len(ids)).to_list(len(ids)))
        return {doc["u"]: (doc["role"], doc["as_of"]) for doc in docs}

    async def counts(self, conv: str) -> tuple[int, int]:
        """Owners and members, up to two of each: none, the last, or several."""
        members = self._mongo["members"]
        query: Document = {"c": conv, "role": "owner"}
        async with self._mongo.caught_up() as session:
            owners = await self._mongo.do(members.count_documents(query, limit=2, session=session))
            query = {"c": conv, "role": ROLE_IN}
            inside = await self._mongo.do(members.count_documents(query, limit=2, session=session))
        return owners, inside

    async def _set_role(self, conv: str, user: str, role: str, as_of: int, msgs: int) -> None:
        """Write a row as of an entry, unless it reflects a later one; a user who comes in has read everything."""
        members = self._mongo["members"]
        key = {"_id": row_id(conv, user), "c": conv}
        for _ in range(WRITE_TRIES):
            before = await self._mongo.do(members.find_one(key, {"role": 1, "as_of": 1}))
            if before is not None and before["as_of"] >= as_of:
                return
            comes_in = role in MEMBER_ROLES and (before is None or before["role"] not in MEMBER_ROLES)
            if await self._write({**key, "as_of": {"$lt": as_of}}, conv, user, role, as_of, msgs, comes_in):
                return
            # Another worker made the row meanwhile, of an earlier entry as likely as of a later one.
        raise Unavailable("this member is being changed by others")  # not applied: the next change does it

    async def set_own_row(self, conv: str, user: str, role: str, as_of: int, msgs: int) -> bool:
        """Joining or leaving a channel by oneself: the row alone, by the rules as of an entry
        (False: it reflects a later one meanwhile, by which this may be forbidden)."""
        query = {"_id": row_id(conv, user), "c": conv, "as_of": {"$lte": as_of}}
        return await self._write(query, conv, user, role, as_of, msgs, role in MEMBER_ROLES)

    async def _write(
        self, query: Document, conv: str, user: str, role: str, as_of: int, msgs: int, comes_in: bool
    ) -> bool:
        mark = {"read": as_of, "read_n": msgs}
        new: Document = {"notify": "all"}
        async with self.row_write(user) as rev:
            fields: Document = {"role": role, "as_of": as_of, "rev": rev, "u": user}
            (fields if comes_in else new).update(mark)
            update = {"$set": fields, "$setOnInsert": new}
            try:
                before = await self._mongo.do(
                    self._mongo["members"].find_one_and_update(
                        query, update, upsert=True, return_document=ReturnDocument.BEFORE
                    )
                )
                written = True
            except DuplicateKeyError:
                written = False  # there is a row, but of a later entry
        if not written:
            return False
        # The number of members is kept with the conversation: it is shown, and decides nothing.
        step = (role in MEMBER_ROLES) - (before is not None and before["role"] in MEMBER_ROLES)
        if step:
            await self._mongo.do(self._mongo["convs"].update_one({"_id": conv}, {"$inc": {"members": step}}))
        return True

    async def recount(self) -> None:
        """Count the members where a worker may have died between writing a row and the number."""
        now = asyncio.get_running_loop().time()
        for conv in [conv for conv, due in self._recounts.items() if due <= now]:
            there = await self._mongo.do(self._mongo["convs"].find_one({"_id": conv}, {"members": 1, "folded": 1}))
            inside = await self._mongo.do(
                self._mongo["members"].count_documents({"c": conv, "role": ROLE_IN}, limit=COUNT_MAX)
            )
            if there is not None and inside < COUNT_MAX:
                # As it was before: otherwise another worker is counting.
                await self._mongo.do(self._mongo["convs"].update_one(there, {"$set": {"members": inside}}))
            self._recounts.pop(conv, None)

    # --- applying changes ----------------------------------------------------------
    async def apply(self, conv: str, changes: Iterable[Document]) -> None:
        """Bring the rows and the title up to these changes (documents of ``entries``, ascending)."""
        newest = 0
        for doc in changes:
            seq = doc["s"]
            match change_of(doc["t"], doc["b"]):
                case RoleChange(user=user, role=role):
                    await self._set_role(conv, user, role, seq, doc["n"])
                case ConversationChange(title=title):
                    update = {"$set": {"title": title, "key": title.casefold(), "title_as_of": seq}}
                    query: Document = {"_id": conv, "title_as_of": {"$lt": seq}}
                    await self._mongo.do(self._mongo["convs"].update_one(query, update))
            newest = seq
        if newest:
            await self._mongo.do(self._mongo["convs"].update_one({"_id": conv}, {"$max": {"folded": newest}}))

    async def changes(self, conv: str, after: int) -> list[Document]:
        """The next changes of a conversation after a seq, by a state that holds all that this worker has seen."""
        async with self._mongo.caught_up() as session:
            cursor = self._mongo["entries"].find(
                {"c": conv, "x": {"$gt": after}},
                {"_id": 0, "s": 1, "t": 1, "n": 1, "b": 1},
                sort=[("x", 1)],
                batch_size=CHANGES_AT_ONCE,
                session=session,
            )
            return await self._mongo.do(cursor.limit(CHANGES_AT_ONCE).to_list(CHANGES_AT_ONCE))

    async def _apply_after(self, conv: str, applied: int, late: bool) -> int:
        """Apply the changes after a seq; returns the newest one that the rows reflect then."""
        began = applied
        while found := await self.changes(conv, applied):
            await self.apply(conv, found)
            applied = found[-1]["s"]
            if len(found) < CHANGES_AT_ONCE:
                break
        if late and applied > began:
            self._recounts[conv] = asyncio.get_running_loop().time() + self._recount_after_s
        self._applied[conv] = max(applied, self._applied.pop(conv, 0))
        if len(self._applied) > APPLIED_MAX:
            self._applied.popitem(last=False)
        return applied

    async def apply_changes(self, conv: str, *, late: bool = False) -> None:
        """Bring the rows of a conversation up to its log.

        :param late: the worker whose task it was has had the time: if the rows are behind, it may be dead.
        """
        async with self._applying.hold(conv):
            doc = await self._mongo.do(self._mongo["convs"].find_one({"_id": conv}, {"folded": 1}))
            if doc is not None:
                await self._apply_after(conv, int(doc.get("folded", 0)), late)

    def applied_upto(self, conv: str) -> int:
        """A change up to which the rows are known to reflect all (0: not known)."""
        return self._applied.get(conv, 0)

    # --- roles as of a head ----------------------------------------------------------
    async def as_of(self, conv: str, head: Head, users: Iterable[str]) -> Roles:
        """The roles of these users by a state that holds every change up to ``head``, or later ones."""
        known = self._known.get(conv)
        if known is not None and len(known) >= ROLES_PER_CONV:
            # All of them: the row behind a dropped role may not reflect it yet, and a load applies the changes.
            self._drop(conv)
            known = None
        if known is None:
            known = await self._load(conv)
            if known is None:
                return Roles(None, None, None)  # not kept: it may be opened
        while known.valid < head.seq:
            found = await self.changes(conv, known.valid) if head.last_change > known.valid else []
            for doc in found:
                known.apply(doc["s"], change_of(doc["t"], doc["b"]))
            known.valid = max(known.valid, head.seq if len(found) < CHANGES_AT_ONCE else found[-1]["s"])
        asked = [user for user in dict.fromkeys(users) if not known.is_member(user)]
        if asked:
            known.stale.difference_update(asked)  # now: a row that changes meanwhile is read again
            rows = await self._rows(conv, asked)
            for user in asked:
                known.note(user, *rows.get(user, (None, -1)))
        self._keep(conv, known)
        return known

    def _keep(self, conv: str, known: Roles) -> None:
        if self._known.setdefault(conv, known) is not known:
            return  # loaded twice at once: one is enough
        self._held += len(known) - known.held
        known.held = len(known)
        self._known.move_to_end(conv)
        while len(self._known) > CONVS_MAX or (self._held > ROLES_MAX and len(self._known) > 1):
            self._drop(next(iter(self._known)))

    def _drop(self, conv: str) -> None:
        known = self._known.pop(conv, None)
        if known is not None:
            self._held -= known.held
            known.held = 0

    async def _load(self, conv: str) -> Roles | None:
        async with self._mongo.caught_up() as session:
            doc = await self._mongo.do(
                self._mongo["convs"].find_one({"_id": conv}, {"kind": 1, "a": 1, "b": 1, "folded": 1}, session=session)
            )
        if doc is None or doc["kind"] == DM_REQUEST:
            return None
        known = Roles(doc["kind"], doc.get("a"), doc.get("b"))
        async with self._applying.hold(conv):
            known.valid = await self._apply_after(conv, int(doc.get("folded", 0)), late=True)
        return known

    def appended(self, conv: str, first: int, entries: Iterable[NewEntry], last: int) -> None:
        """This worker appended entries ``first`` … ``last``, so no other changed anything in between."""
        known = self._known.get(conv)
        if known is None or known.valid < first - 1:
            return  # the missing ones are read as changes
        for seq, e in enumerate(entries, first):
            if e.change is not None:
                known.apply(seq, e.change)
        known.valid = max(known.valid, last)
        self._keep(conv, known)

    def mark_stale(self, conv: str, user: str) -> None:
        """A row, or a block, changed without an entry: read it again."""
        known = self._known.get(conv)
        if known is not None:
            known.stale.add(user)
            known.blocked_until = 0.0

    def mark_blocks_stale(self) -> None:
        """A user blocked another, or no longer does: read the blocks of every dm again."""
        for known in self._known.values():
            known.blocked_until = 0.0

    def dms(self, used_after: float) -> list[Roles]:
        """The dms that were written to lately, through this worker."""
        return [known for known in self._known.values() if known.kind == "dm" and known.used > used_after]
