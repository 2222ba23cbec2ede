"""What the append loop asks of MongoDB (:class:`~chatcore.chat.append.LogOps`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import PyMongoError

from ...errors import ChatError, Unavailable
from ...protocol import MEMBER_ROLES, encode_entry
from .. import rules
from ..append import Found, Head, Key, Row, Ruling, Unknown, Verdict
from ..base import Appended, Entry, NewEntry
from .client import Document, Mongo
from .members import Members, Roles

#: Types of entries that change members or the conversation: they have ``x``, and rows to follow.
CHANGES: Final = ("member", "meta")
#: How long it may take until a block of a dm is seen by a worker that has not heard of it.
BLOCK_TTL_S: Final = 5.0

ENTRY_FIELDS: Final = {"_id": 0, "c": 1, "s": 1, "t": 1, "f": 1, "cid": 1, "ts": 1, "n": 1, "l": 1, "b": 1}


def to_document(row: Row) -> Document:
    """An entry as it is stored."""
    e = row.new
    doc: Document = {
        "c": e.conv,
        "s": row.seq,
        "t": e.t,
        "f": e.sender,
        "cid": e.cid,
        "d": e.digest.hex(),
        "ts": row.ts,
        "n": row.msgs,
        "l": row.last_msg,
        "b": e.fields.decode(),
    }
    if e.t in CHANGES:
        doc["x"] = row.seq
    return doc


def to_entry(doc: Document) -> Entry:
    """A stored entry, as it goes to readers."""
    wire = encode_entry(doc["t"], doc["c"], doc["s"], doc["f"], doc["ts"], doc["cid"], doc["b"].encode())
    return Entry(doc["c"], doc["s"], doc["t"], doc["f"], doc["n"], doc["l"], wire)


class MongoOps:
    """One per worker; the loop owns the order of its calls."""

    def __init__(self, mongo: Mongo, members: Members, max_conversations: int, now_ms: Callable[[], int]) -> None:
        self._mongo = mongo
        self._members = members
        self._max_conversations = max_conversations
        self._now_ms = now_ms
        #: First entries of conversations that are being opened here: allowed before there is a member.
        self.opening: set[tuple[str, str]] = set()

    async def newest(self, conv: str) -> Head:
        """The newest entry that a majority has."""
        doc = await self._mongo.do(
            self._mongo["entries"].find_one({"c": conv}, {"_id": 0, "s": 1, "n": 1, "l": 1}, sort=[("s", -1)])
        )
        return Head() if doc is None else Head(doc["s"], doc["n"], doc["l"])

    async def insert(self, conv: str, rows: Sequence[Row]) -> None:
        """One ordered insert of the batch; anything but clean success is unknown."""
        try:
            result = await self._mongo.do(
                self._mongo["entries"].insert_many([to_document(row) for row in rows], ordered=True)
            )
        except (PyMongoError, Unavailable) as exc:
            self._members.forget(conv)
            raise Unknown(str(exc)) from None
        if not result.acknowledged or len(result.inserted_ids) != len(rows):
            self._members.forget(conv)
            raise Unknown("not all of it was acknowledged")
        self._members.appended(conv, rows[0].seq, [row.new for row in rows], rows[-1].seq)

    async def find(self, conv: str, keys: Sequence[Key], as_of: object) -> list[Found]:
        """Those that a majority has, by sender and cid."""
        query = {"c": conv, "$or": [{"f": sender, "cid": cid} for sender, cid in keys]}
        session = await self._session(as_of)
        try:
            cursor = self._mongo["entries"].find(query, {**ENTRY_FIELDS, "d": 1}, session=session)
            docs = await self._mongo.do(cursor.limit(len(keys)).to_list(len(keys)))
        finally:
            if session is not None:
                await session.end_session()
        return [Found(doc["cid"], bytes.fromhex(doc["d"]), doc["ts"], to_entry(doc)) for doc in docs]

    async def _session(self, as_of: object) -> AsyncClientSession | None:
        """A session that reads no earlier state than ``as_of`` (a single server has no earlier one)."""
        if not isinstance(as_of, tuple) or not self._mongo.replicated:
            return None
        session = self._mongo.client.start_session(causal_consistency=True)
        cluster_time, operation_time = as_of
        if cluster_time is not None:
            session.advance_cluster_time(cluster_time)
        if operation_time is not None:
            session.advance_operation_time(operation_time)
        return session

    async def allowed(self, conv: str, head: Head, entries: Sequence[NewEntry]) -> Ruling:
        """What becomes of each, by what this worker knows as of ``head``; it asks where it does not know."""
        users = {e.sender for e in entries if (e.conv, e.cid) not in self.opening}
        users |= {e.user for e in entries if e.t == "member" and e.user is not None}
        known = await self._members.as_of(conv, head.seq, users)
        verdicts = [await self._verdict(known, e) for e in entries]
        return Ruling(verdicts, await self._operation_time() if any(verdicts) else None)

    async def _operation_time(self) -> object:
        """A moment that is not before any of the reads that the verdicts rest on."""
        if not self._mongo.replicated:
            return None
        async with self._mongo.client.start_session(causal_consistency=True) as session:
            await self._mongo.do(self._mongo["meta"].find_one({"_id": "store"}, {"_id": 1}, session=session))
            return (session.cluster_time, session.operation_time)

    async def _verdict(self, known: Roles, e: NewEntry) -> Verdict:
        mine = known.roles.get(e.sender)
        if (e.conv, e.cid) in self.opening:
            return None
        if e.t == "member":
            return await self._member_verdict(known, e, mine)
        if e.t == "meta":
            return rules.check_meta(known.kind, mine)
        blocked = known.kind == "dm" and mine in MEMBER_ROLES and await self._blocked(known, e)
        return rules.check_send(known.kind, mine, blocked)

    async def _blocked(self, known: Roles, e: NewEntry) -> bool:
        now = asyncio.get_running_loop().time()
        if now > known.blocked_until:
            pair = [f"{known.a}:{known.b}", f"{known.b}:{known.a}"]
            cursor = self._mongo["blocks"].find({"_id": {"$in": pair}}, {"_id": 1})
            found = await self._mongo.do(cursor.limit(2).to_list(2))
            known.blocked = {doc["_id"].partition(":")[2] for doc in found}
            known.blocked_until = now + BLOCK_TTL_S
        return e.sender in known.blocked

    async def _member_verdict(self, known: Roles, e: NewEntry, mine: str | None) -> Verdict:
        assert e.user is not None
        assert e.role is not None
        theirs = known.roles.get(e.user)
        owners, members = await self._counts(e.conv) if e.sender == e.user else (0, 0)
        refused: ChatError | None = rules.check_member(
            known.kind, e.sender, mine, e.user, theirs, e.role, owners, members
        )
        if refused is not None:
            return refused
        if (theirs or "none") == e.role:
            return Appended(0, self._now_ms())
        if e.role in MEMBER_ROLES and theirs not in MEMBER_ROLES:
            return await self._check_room_for(e.user)
        return None

    async def _counts(self, conv: str) -> tuple[int, int]:
        members = self._mongo["members"]
        owners = await self._mongo.do(members.count_documents({"c": conv, "role": "owner"}, limit=2))
        inside = await self._mongo.do(members.count_documents({"c": conv, "role": {"$in": MEMBER_ROLES}}, limit=2))
        return owners, inside

    async def _check_room_for(self, user: str) -> ChatError | None:
        docs: Any = await self._mongo.do(self._mongo["users"].find_one({"_id": user}, {"_id": 1}))
        if docs is None:
            return rules.no_such_user()
        query = {"u": user, "role": {"$in": MEMBER_ROLES}}
        inside = await self._mongo.do(self._mongo["members"].count_documents(query, limit=self._max_conversations))
        return rules.check_room_for(user, inside, self._max_conversations)
