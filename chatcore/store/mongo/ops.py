"""What the append loop asks of MongoDB (:class:`~chatcore.store.append.LogOps`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from pymongo.errors import BulkWriteError

from ...entries import ENTRY_TYPES, MESSAGES, Fact, NewEntry, RoleChange, Standing, check_message
from ...errors import Unavailable
from ...protocol import MEMBER_ROLES, encode_entry
from ..append import Decision, Decisions, Found, Head, Key, Row, Unknown
from ..base import Appended, Entry
from .client import Document, Mongo
from .members import ROLE_IN, MemberRows, Roles

#: How long it may take until a worker that the bus did not reach sees a block of a dm.
BLOCK_TTL_S: Final = 5.0
# Blocks of so many dms are read at once.
BLOCK_DMS: Final = 250
# A first entry of a conversation that is being opened: (conversation, sender, cid, digest).
FirstEntry = tuple[str, str, str, bytes]

# Which index a query with alternatives is for: then each of them need not be planned.
BY_SEQ: Final = [("c", 1), ("s", 1)]
BY_CID: Final = [("c", 1), ("f", 1), ("cid", 1)]

ENTRY_FIELDS: Final = {"_id": 0, "c": 1, "s": 1, "t": 1, "f": 1, "cid": 1, "ts": 1, "n": 1, "l": 1, "k": 1, "b": 1}


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
        "k": row.last_change,
        "b": e.fields.decode(),
    }
    if e.change is not None:
        doc["x"] = row.seq
    return doc


def to_entry(doc: Document) -> Entry:
    """A stored entry, as it goes to readers."""
    wire = encode_entry(doc["t"], doc["c"], doc["s"], doc["f"], doc["ts"], doc["cid"], doc["b"].encode())
    return Entry(doc["c"], doc["s"], doc["t"], doc["f"], doc["n"], doc["l"], wire)


class MongoOps:
    """One per worker; the loop owns the order of its calls."""

    def __init__(self, mongo: Mongo, members: MemberRows, max_conversations: int, now_ms: Callable[[], int]) -> None:
        self._mongo = mongo
        self._members = members
        self._max_conversations = max_conversations
        self._now_ms = now_ms
        #: First entries of conversations that are being opened here: allowed before there is a member.
        self.opening: set[FirstEntry] = set()

    async def newest(self, conv: str) -> Head:
        """The newest entry that a majority has."""
        async with self._mongo.caught_up() as session:
            doc = await self._mongo.do(
                self._mongo["entries"].find_one(
                    {"c": conv}, {"_id": 0, "s": 1, "n": 1, "l": 1, "k": 1}, sort=[("s", -1)], session=session
                )
            )
        return Head() if doc is None else Head(doc["s"], doc["n"], doc["l"], doc["k"])

    async def insert(self, conv: str, rows: Sequence[Row]) -> None:
        """One ordered insert of the batch; anything but clean success is unknown."""
        try:
            result = await self._mongo.do(
                self._mongo["entries"].insert_many([to_document(row) for row in rows], ordered=True)
            )
        except (BulkWriteError, Unavailable) as exc:
            raise Unknown(str(exc)) from None
        if not result.acknowledged:
            raise Unknown("it was not acknowledged")
        self._members.appended(conv, rows[0].seq, [row.new for row in rows], rows[-1].seq)

    async def find(self, conv: str, keys: Sequence[Key], as_of: object) -> list[Found]:
        """Those that a majority has, by sender and cid."""
        cids: dict[str, list[str]] = {}
        for sender, cid in keys:
            cids.setdefault(sender, []).append(cid)
        senders = list(cids.items())
        found: list[Found] = []
        for at in range(0, len(senders), self._mongo.or_pairs):
            some = senders[at : at + self._mongo.or_pairs]
            which = [{"c": conv, "f": sender, "cid": {"$in": theirs}} for sender, theirs in some]
            most = sum(len(theirs) for _, theirs in some)
            async with self._mongo.caught_up(as_of) as session:
                cursor = self._mongo["entries"].find(
                    which[0] if len(which) == 1 else {"$or": which},
                    {**ENTRY_FIELDS, "d": 1},
                    hint=BY_CID,
                    batch_size=most,
                    session=session,
                )
                docs = await self._mongo.do(cursor.limit(most).to_list(most))
            found += [Found(doc["cid"], bytes.fromhex(doc["d"]), doc["ts"], to_entry(doc)) for doc in docs]
        return found

    async def decide(self, conv: str, head: Head, entries: Sequence[NewEntry]) -> Decisions:
        """What becomes of each, by what this worker knows as of ``head``; it queries what it does not know."""
        users = {e.sender for e in entries if not self._opens(e)}
        users |= {e.change.user for e in entries if isinstance(e.change, RoleChange)}
        known = await self._members.as_of(conv, head, users)
        each = [await self._decide(known, e) for e in entries]
        return Decisions(each, self._mongo.listener.operation_time)

    def _opens(self, e: NewEntry) -> bool:
        return (e.conv, e.sender, e.cid, e.digest) in self.opening

    async def _decide(self, known: Roles, e: NewEntry) -> Decision:
        change = e.change
        if self._opens(e):
            # Of a dm that both open at once the second finds the first's entries.
            there = isinstance(change, RoleChange) and known.role(change.user) == change.role
            return Appended(0, self._now_ms()) if there else e
        mine = known.role(e.sender)
        blocked = known.kind == "dm" and mine in MEMBER_ROLES and await self._blocked(known, e)
        if e.t in MESSAGES:
            return check_message(known.kind, mine, blocked) or e
        standing = Standing(known.kind, mine, blocked, max_conversations=self._max_conversations)
        if isinstance(change, RoleChange):
            standing.user_role = known.role(change.user)
        rule = ENTRY_TYPES[e.t].rule
        while isinstance(decision := rule(e, standing), Fact):
            await self._load(decision, e, standing)
        return Appended(0, self._now_ms()) if decision is None else decision

    async def _load(self, fact: Fact, e: NewEntry, standing: Standing) -> None:
        """A fact that the rule asked for."""
        assert isinstance(e.change, RoleChange)
        match fact:
            case Fact.COUNTS:
                # The rows are counted: they must not be behind the head.
                await self._members.apply_changes(e.conv)
                standing.owners, standing.members = await self._members.counts(e.conv)
            case Fact.USER:
                users = self._mongo["users"]
                found = await self._mongo.do(users.find_one({"_id": e.change.user}, {"_id": 1}))
                standing.user_exists = found is not None
            case Fact.CONVERSATIONS:
                standing.user_conversations = await self.conversations_of(e.change.user)
            case Fact.BLOCKS:
                block = {"_id": f"{e.change.user}:{e.sender}"}
                found = await self._mongo.do(self._mongo["blocks"].find_one(block, {"_id": 1}))
                standing.user_blocks = found is not None

    async def conversations_of(self, user: str) -> int:
        """How many conversations the user is in, up to the limit (asks every shard)."""
        query: Document = {"u": user, "role": ROLE_IN}
        return await self._mongo.do(self._mongo["members"].count_documents(query, limit=self._max_conversations))

    # --- blocks ------------------------------------------------------------------
    async def _blocked(self, known: Roles, e: NewEntry) -> bool:
        known.used = asyncio.get_running_loop().time()
        if known.used > known.blocked_until:
            await self._read_blocks([known])
        return e.sender in known.blocked

    async def refresh_blocks(self) -> None:
        """Read the blocks of the dms in use before they are too old, so that no message waits for it."""
        now = asyncio.get_running_loop().time()
        dms = [known for known in self._members.dms(now - BLOCK_TTL_S) if known.blocked_until < now + BLOCK_TTL_S / 2]
        for at in range(0, len(dms), BLOCK_DMS):
            await self._read_blocks(dms[at : at + BLOCK_DMS])

    async def _read_blocks(self, dms: Sequence[Roles]) -> None:
        until = asyncio.get_running_loop().time() + BLOCK_TTL_S
        for known in dms:
            known.blocked_until = until  # now: a change that comes meanwhile sets it back
        pairs = [pair for known in dms for pair in (f"{known.a}:{known.b}", f"{known.b}:{known.a}")]
        try:
            cursor = self._mongo["blocks"].find({"_id": {"$in": pairs}}, {"_id": 1}, batch_size=len(pairs))
            docs = await self._mongo.do(cursor.limit(len(pairs)).to_list(len(pairs)))
        except BaseException:
            for known in dms:
                known.blocked_until = 0.0
            raise
        found = {doc["_id"] for doc in docs}
        for known in dms:
            ways = ((known.a, known.b), (known.b, known.a))
            known.blocked = {other for user, other in ways if other is not None and f"{user}:{other}" in found}
