"""Members of conversations: rows that are the projection of their changes.

An entry decides, its row follows: whoever folds the entry writes the row, if its
``as_of`` is lower. ``convs.folded`` is the newest change that all rows reflect; a
row found behind (its writer died in between) is repaired when the conversation is
loaded (log.md, "Members").
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Final

import orjson
from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

from ...protocol import MEMBER_ROLES
from ..base import NewEntry
from .client import Document, Mongo

# Changes that one load folds at a time; a conversation has few that nobody folded.
FOLD_ROWS: Final = 500
# Conversations whose roles this worker keeps, for the entries that it appends itself.
ROLES_MAX: Final = 10_000
# Roles kept of one conversation: those who write through this worker.
ROLES_PER_CONV: Final = 1_000


def row_id(conv: str, user: str) -> str:
    """The key of a member's row."""
    return f"{conv}:{user}"


class Roles:
    """What this worker knows of one conversation, as of entry ``valid``: no change up to it is missing."""

    __slots__ = ("a", "b", "blocked", "blocked_until", "kind", "roles", "valid")

    def __init__(self, kind: str | None, a: str | None, b: str | None) -> None:
        self.kind = kind
        self.a = a
        self.b = b
        self.valid = -1
        self.roles: dict[str, str | None] = {}
        self.blocked: set[str] = set()
        self.blocked_until = 0.0

    def note(self, user: str, role: str | None) -> None:
        """A role as of ``valid`` or later."""
        if len(self.roles) >= ROLES_PER_CONV:
            self.roles.clear()
        self.roles[user] = role


class Members:
    """Rows of one store, and the roles that its append loop goes by."""

    def __init__(self, mongo: Mongo) -> None:
        self._mongo = mongo
        self._known: OrderedDict[str, Roles] = OrderedDict()

    # --- rows ------------------------------------------------------------------
    async def next_rev(self, user: str) -> int:
        """The next value of the user's change counter."""
        doc = await self._mongo.do(
            self._mongo["users"].find_one_and_update(
                {"_id": user}, {"$inc": {"rev": 1}}, return_document=ReturnDocument.AFTER
            )
        )
        return int(doc["rev"]) if doc is not None else 0

    async def role(self, conv: str, user: str) -> str | None:
        """The role in the row (None: there is no row)."""
        row = await self._mongo.do(self._mongo["members"].find_one({"_id": row_id(conv, user), "c": conv}, {"role": 1}))
        return None if row is None else str(row["role"])

    async def set_role(self, conv: str, user: str, role: str, as_of: int, msgs: int) -> None:
        """Write a row as of an entry, unless it reflects a later one; who comes in has read everything."""
        members = self._mongo["members"]
        key = {"_id": row_id(conv, user), "c": conv}
        before = await self._mongo.do(members.find_one(key, {"role": 1, "as_of": 1}))
        if before is not None and before["as_of"] >= as_of:
            return
        fields: Document = {"role": role, "as_of": as_of, "rev": await self.next_rev(user), "u": user}
        if role in MEMBER_ROLES and (before is None or before["role"] not in MEMBER_ROLES):
            fields |= {"read": as_of, "read_n": msgs}
        new: Document = {"notify": "all"}
        if "read" not in fields:
            new |= {"read": as_of, "read_n": msgs}
        update = {"$set": fields, "$setOnInsert": new}
        try:
            await self._mongo.do(members.update_one({**key, "as_of": {"$lt": as_of}}, update, upsert=True))
        except DuplicateKeyError:
            return  # somebody wrote a later one meanwhile
        await self._count(conv, None if before is None else before["role"], role)

    async def set_own_row(self, conv: str, user: str, role: str, as_of: int, msgs: int) -> None:
        """Joining or leaving a channel by oneself: the row alone. It reflects the same entry as before, or later."""
        members = self._mongo["members"]
        key = {"_id": row_id(conv, user), "c": conv}
        fields: Document = {"role": role, "rev": await self.next_rev(user), "u": user}
        if role in MEMBER_ROLES:
            fields |= {"read": as_of, "read_n": msgs}
        new: Document = {"notify": "all", "as_of": as_of}
        if "read" not in fields:
            new |= {"read": as_of, "read_n": msgs}
        before = await self.role(conv, user)
        # A ban that comes meanwhile stays: it is an entry, and decides.
        query = {**key, "role": {"$ne": "banned"}}
        try:
            await self._mongo.do(members.update_one(query, {"$set": fields, "$setOnInsert": new}, upsert=True))
        except DuplicateKeyError:
            before = role
        await self._count(conv, before, role)
        self.forget(conv, user)

    async def _count(self, conv: str, before: str | None, role: str) -> None:
        """Keep the number of members with the conversation: it is shown, and decides nothing."""
        step = (role in MEMBER_ROLES) - (before in MEMBER_ROLES)
        if step:
            await self._mongo.do(self._mongo["convs"].update_one({"_id": conv}, {"$inc": {"members": step}}))

    # --- folding -----------------------------------------------------------------
    async def fold(self, conv: str, changes: Iterable[Document]) -> None:
        """Bring the rows and the title up to these changes (documents of ``entries``, ascending)."""
        newest = 0
        for doc in changes:
            fields = orjson.loads(doc["b"])
            if doc["t"] == "member":
                await self.set_role(conv, fields["user"], fields["role"], doc["s"], doc["n"])
            elif doc["t"] == "meta":
                title = fields["title"]
                update = {"$set": {"title": title, "key": title.casefold(), "title_as_of": doc["s"]}}
                await self._mongo.do(
                    self._mongo["convs"].update_one({"_id": conv, "title_as_of": {"$lt": doc["s"]}}, update)
                )
            newest = doc["s"]
        if newest:
            await self._mongo.do(self._mongo["convs"].update_one({"_id": conv}, {"$max": {"folded": newest}}))

    async def changes(self, conv: str, after: int) -> list[Document]:
        """Changes of a conversation after a seq."""
        cursor = self._mongo["entries"].find(
            {"c": conv, "x": {"$gt": after}}, {"_id": 0, "s": 1, "t": 1, "n": 1, "b": 1}, sort=[("x", 1)]
        )
        return await self._mongo.do(cursor.limit(FOLD_ROWS).to_list(FOLD_ROWS))

    async def repair(self, conv: str, folded: int) -> int:
        """Fold what nobody folded; returns the newest change that the rows reflect then."""
        while found := await self.changes(conv, folded):
            await self.fold(conv, found)
            folded = found[-1]["s"]
        return folded

    # --- roles as of a head ----------------------------------------------------------
    async def as_of(self, conv: str, head: int, users: Iterable[str]) -> Roles:
        """The roles of these users by a state that holds every change up to ``head``, or later ones."""
        known = self._known.get(conv)
        if known is None:
            known = await self._load(conv)
        elif known.valid < head:
            for doc in await self.changes(conv, known.valid):
                self._apply(known, doc["t"], orjson.loads(doc["b"]))
        known.valid = max(known.valid, head)
        for user in users:
            if known.roles.get(user) not in MEMBER_ROLES:
                # Not known, or known as no member: who joined a channel by oneself has no entry that told.
                known.note(user, await self.role(conv, user))
        self._known[conv] = known
        self._known.move_to_end(conv)
        if len(self._known) > ROLES_MAX:
            self._known.popitem(last=False)
        return known

    async def _load(self, conv: str) -> Roles:
        doc = await self._mongo.do(
            self._mongo["convs"].find_one({"_id": conv}, {"kind": 1, "a": 1, "b": 1, "folded": 1})
        )
        if doc is None:
            return Roles(None, None, None)
        known = Roles(doc["kind"], doc.get("a"), doc.get("b"))
        known.valid = await self.repair(conv, int(doc.get("folded", 0)))
        return known

    @staticmethod
    def _apply(known: Roles, t: str, fields: dict[str, Any]) -> None:
        if t == "member":
            known.note(fields["user"], fields["role"])

    def appended(self, conv: str, first: int, entries: Iterable[NewEntry], last: int) -> None:
        """This worker appended entries ``first`` … ``last``, so nobody else changed anything in between."""
        known = self._known.get(conv)
        if known is None:
            return
        if known.valid != first - 1:
            del self._known[conv]
            return
        for e in entries:
            if e.t == "member" and e.user is not None:
                known.note(e.user, e.role)
        known.valid = last

    def forget(self, conv: str, user: str | None = None) -> None:
        """A row changed without an entry, or something is in doubt: read it again."""
        if user is None:
            self._known.pop(conv, None)
        elif (known := self._known.get(conv)) is not None:
            known.roles.pop(user, None)
            known.blocked_until = 0.0
