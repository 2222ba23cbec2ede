"""Queries. Every one has a limit and an index; those that ask every shard say so.

From the primary, of what a majority has, unless a name says otherwise. A ``batch_size`` brings
all of an answer in one round trip.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ...entries import MESSAGES
from ...errors import NotFound
from ...protocol import MEMBER_ROLES, encode_entry
from ..base import Account, Entry, Page, Peer, Token, User, View
from ..names import name_key
from .client import Collection, Document, Mongo
from .members import ROLE_IN, row_id
from .ops import BY_SEQ, ENTRY_FIELDS, to_entry

# Conversations (or keys) in one query.
CHUNK: Final = 500
# Queries at once where each conversation needs one: less than the pool has connections.
AT_ONCE: Final = 8
ROW_FIELDS: Final = {"_id": 0, "c": 1, "role": 1, "read": 1, "read_n": 1, "notify": 1, "rev": 1, "as_of": 1}
CONV_FIELDS: Final = {"kind": 1, "title": 1, "a": 1, "b": 1, "members": 1, "folded": 1}
#: (conversation, user) -> (seq, messages): marks that are not written yet.
Marks = Mapping[tuple[str, str], tuple[int, int]]
#: Documents carry no position that orders all conversations: whether one without `have` has new
#: entries is not known, so it counts as changed.
UNKNOWN_POSITION: Final = 2**53 - 1


def chunks(values: Sequence[str]) -> list[Sequence[str]]:
    """Pieces of at most CHUNK."""
    return [values[at : at + CHUNK] for at in range(0, len(values), CHUNK)]


class MongoReads:
    """The queries of one store."""

    def __init__(self, mongo: Mongo) -> None:
        self._mongo = mongo

    # --- the log -----------------------------------------------------------------
    async def newest(self, convs: Sequence[str]) -> dict[str, Document]:
        """The newest entry of each (a look at the end of its index range)."""
        if not self._mongo.lookups:
            return await self._newest_one_by_one(convs)
        # Not $sort and $group: whether that reads whole logs is up to the planner.
        newest: list[Document] = [{"$sort": {"s": -1}}, {"$limit": 1}, {"$project": ENTRY_FIELDS}]
        ends: Document = {"from": "entries", "localField": "_id", "foreignField": "c", "pipeline": newest, "as": "e"}
        found: dict[str, Document] = {}
        for some in chunks(convs):
            pipeline: list[Document] = [
                {"$match": {"_id": {"$in": list(some)}}},
                {"$limit": len(some)},
                {"$project": {"_id": 1}},
                {"$lookup": ends},
            ]
            for doc in await self._mongo.do(self._aggregate("convs", pipeline, len(some))):
                if doc["e"]:
                    found[doc["_id"]] = doc["e"][0]
        return found

    async def _aggregate(self, name: str, pipeline: list[Document], most: int) -> list[Document]:
        return await (await self._mongo[name].aggregate(pipeline, batchSize=most)).to_list(most)

    async def _find(self, log: Collection, query: Document, fields: Document, limit: int, **how: Any) -> list[Document]:
        cursor = log.find(query, fields, batch_size=limit, **how)
        return await self._mongo.do(cursor.limit(limit).to_list(limit))

    async def _newest_one_by_one(self, convs: Sequence[str]) -> dict[str, Document]:
        async def one(conv: str) -> Document | None:
            query = self._mongo["entries"].find_one({"c": conv}, ENTRY_FIELDS, sort=[("s", -1)])
            return await self._mongo.do(query)

        found: dict[str, Document] = {}
        for at in range(0, len(convs), AT_ONCE):
            docs = await asyncio.gather(*(one(conv) for conv in convs[at : at + AT_ONCE]))
            found.update({doc["c"]: doc for doc in docs if doc is not None})
        return found

    async def heads(self, convs: Sequence[str]) -> dict[str, int]:
        """The newest seq of each (0: none)."""
        found = await self.newest(convs)
        return {conv: found[conv]["s"] if conv in found else 0 for conv in convs}

    async def entries(self, conv: str, after: int, limit: int, max_bytes: int) -> list[Entry]:
        """Entries after a seq, ascending."""
        query = {"c": conv, "s": {"$gt": after}}
        docs = await self._find(self._mongo["entries"], query, ENTRY_FIELDS, limit, sort=[("s", 1)])
        return _cut(docs, max_bytes)[0]

    async def page(
        self, conv: str, before: int | None, after: int | None, limit: int, max_bytes: int, head: int
    ) -> Page:
        """A page (the caller has checked who may see it), from a secondary if the settings say so."""
        upto = min(head + 1, head + 1 if before is None else before)
        first = 1 if after is None else after + 1
        # Logs are dense: the seqs of a page are known before it is read.
        first, upto = (max(first, upto - limit), upto) if after is None else (first, min(upto, first + limit))
        if first >= upto:
            return Page([], False, head)
        way = -1 if after is None else 1
        query = {"c": conv, "s": {"$gte": first, "$lt": upto}}
        history = self._mongo.history("entries")
        docs = await self._find(history, query, ENTRY_FIELDS, upto - first, sort=[("s", way)])
        if len(docs) < upto - first and self._mongo.settings.history_from_secondaries:
            # The secondary has not got so far.
            docs = await self._find(self._mongo["entries"], query, ENTRY_FIELDS, upto - first, sort=[("s", way)])
        found, cut = _cut(docs, max_bytes)
        if after is None:
            return Page(found[::-1], cut or first > 1, head)
        return Page(found, cut or upto <= (head if before is None else min(head, before - 1)), head)

    async def msgs_at(self, conv: str, seq: int) -> int | None:
        """How many messages there were up to an entry (None: there is no such entry)."""
        doc = await self._mongo.do(self._mongo["entries"].find_one({"c": conv, "s": seq}, {"_id": 0, "n": 1}))
        return None if doc is None else int(doc["n"])

    async def beyond(self, lasts: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """Of conversations and the last seq known of each: those that have a next one."""
        found: list[tuple[str, int]] = []
        step = self._mongo.or_pairs
        for at in range(0, len(lasts), step):
            some = lasts[at : at + step]
            query = {"$or": [{"c": conv, "s": last + 1} for conv, last in some]}
            docs = await self._find(self._mongo["entries"], query, {"_id": 0, "c": 1, "s": 1}, len(some), hint=BY_SEQ)
            found.extend((doc["c"], doc["s"]) for doc in docs)
        return found

    # --- conversations -----------------------------------------------------------
    async def rows(self, user: str, convs: Sequence[str] | None, limit: int) -> list[Document]:
        """The user's rows (all: asks every shard), of the conversations that the user is in."""
        query: Document = {"u": user, "role": ROLE_IN}
        if convs is None:
            return await self._rows(query, limit)
        found: list[Document] = []
        for some in chunks(convs):
            found += await self._rows({"c": {"$in": list(some)}, **query}, len(some))
        return found

    async def _rows(self, query: Document, limit: int) -> list[Document]:
        return await self._find(self._mongo["members"], query, ROW_FIELDS, limit)

    async def left_since(self, user: str, after: int, limit: int) -> list[str]:
        """What the user is no longer in, by changes after a position (asks every shard)."""
        query = {"u": user, "role": {"$nin": list(MEMBER_ROLES)}, "rev": {"$gt": after}}
        return [doc["c"] for doc in await self._find(self._mongo["members"], query, {"_id": 0, "c": 1}, limit)]

    async def changed_since(self, user: str, rev: int, limit: int) -> list[str]:
        """The conversations in which the user's row changed after a position (asks every shard)."""
        query = {"u": user, "rev": {"$gt": rev}}
        return [doc["c"] for doc in await self._find(self._mongo["members"], query, {"_id": 0, "c": 1}, limit)]

    async def convs(self, ids: Sequence[str]) -> dict[str, Document]:
        """What views need of conversations, and how far their rows follow their logs."""
        return await self._by_id("convs", ids, CONV_FIELDS)

    async def views(
        self, user: str, convs: Sequence[str], docs: dict[str, Document], newest: dict[str, Document], marks: Marks
    ) -> list[View]:
        """The user's views, newest first, of these conversations and heads; ``marks`` are laid over the rows."""
        rows = await self.rows(user, convs, len(convs))
        for row in rows:
            mark = marks.get((row["c"], user), (0, 0))
            head = newest.get(row["c"])
            if head is not None and head["t"] in MESSAGES and head["f"] == user:
                mark = (head["s"], head["n"])  # another worker writes this mark soon
            if mark[0] > row["read"]:
                row["read"], row["read_n"] = mark
        lasts = await self._lasts({row["c"]: newest[row["c"]] for row in rows if row["c"] in newest})
        others = {conv: doc["b"] if doc["a"] == user else doc["a"] for conv, doc in docs.items() if doc["kind"] == "dm"}
        names = await self._by_id("users", list(set(others.values())), {"name": 1})
        views: list[View] = []
        for row in rows:
            conv = row["c"]
            doc, head = docs.get(conv), newest.get(conv)
            if doc is None or head is None:
                continue  # it is being opened
            other = others.get(conv)
            views.append(
                View(
                    conv,
                    doc["kind"],
                    doc.get("title"),
                    other,
                    names.get(other or "", {}).get("name"),
                    row["role"],
                    doc["members"],
                    row["notify"],
                    head["s"],
                    row["read"],
                    max(0, head["n"] - row["read_n"]),
                    lasts.get(conv),
                    row["rev"],
                    UNKNOWN_POSITION,
                    row["as_of"],
                )
            )
        views.sort(key=lambda view: newest[view.conv]["ts"], reverse=True)
        return views

    async def _by_id(self, name: str, ids: Sequence[str], fields: Document) -> dict[str, Document]:
        found: dict[str, Document] = {}
        for some in chunks(ids):
            for doc in await self._find(self._mongo[name], {"_id": {"$in": list(some)}}, fields, len(some)):
                found[doc["_id"]] = doc
        return found

    async def among(self, name: str, ids: Sequence[str], fields: Document) -> list[Document]:
        """Those documents of these keys that there are."""
        return list((await self._by_id(name, ids, fields)).values())

    async def _lasts(self, newest: dict[str, Document]) -> dict[str, bytes]:
        """The newest message of each, as it was pushed."""
        lasts = {conv: _wire(doc) for conv, doc in newest.items() if doc["l"] == doc["s"]}
        wanted = [(conv, doc["l"]) for conv, doc in newest.items() if 0 < doc["l"] < doc["s"]]
        step = self._mongo.or_pairs
        for at in range(0, len(wanted), step):
            some = wanted[at : at + step]
            query = {"$or": [{"c": conv, "s": seq} for conv, seq in some]}
            docs = await self._find(self._mongo["entries"], query, ENTRY_FIELDS, len(some), hint=BY_SEQ)
            lasts.update({doc["c"]: _wire(doc) for doc in docs})
        return lasts

    async def member_count(self, conv: str) -> int:
        """How many are in a conversation."""
        doc = await self._mongo.do(self._mongo["convs"].find_one({"_id": conv}, {"members": 1}))
        return 0 if doc is None else int(doc["members"])

    async def members(self, conv: str, after: str | None, limit: int) -> tuple[list[Peer], str | None]:
        """A page of members by user id."""
        query = {"c": conv, "u": {"$gt": after or ""}, "role": ROLE_IN}
        fields = {"_id": 0, "u": 1, "role": 1, "read": 1}
        docs = await self._find(self._mongo["members"], query, fields, limit + 1, sort=[("u", 1)])
        peers = [Peer(doc["u"], doc["role"], doc["read"]) for doc in docs[:limit]]
        return peers, peers[-1].user if len(docs) > limit else None

    async def channels(
        self, user: str, prefix: str | None, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], str | None]:
        """A page of the directory by title (asks every shard)."""
        low = (prefix or "").casefold()
        query: Document = {"kind": "channel", "key": {"$gte": low, "$lt": low + "\U0010ffff"}, "opened": True}
        if after is not None:
            doc = await self._mongo.do(self._mongo["convs"].find_one({"_id": after, "kind": "channel"}, {"key": 1}))
            if doc is None:
                raise NotFound("after: no such channel")
            key = max(low, doc["key"])
            query = {
                **query,
                "key": {"$gte": key, "$lt": low + "\U0010ffff"},
                "$or": [{"key": {"$gt": key}}, {"_id": {"$gt": after}}],
            }
        sort = [("key", 1), ("_id", 1)]
        docs = await self._find(self._mongo["convs"], query, {"title": 1, "members": 1}, limit + 1, sort=sort)
        page = docs[:limit]
        mine = await self._mine(user, [doc["_id"] for doc in page])
        found = [
            {
                "c": doc["_id"],
                "kind": "channel",
                "title": doc["title"],
                "members": doc["members"],
                "role": mine.get(doc["_id"], "none"),
            }
            for doc in page
        ]
        return found, page[-1]["_id"] if len(docs) > limit else None

    async def _mine(self, user: str, convs: Sequence[str]) -> dict[str, str]:
        """The user's roles in these conversations."""
        found: dict[str, str] = {}
        for some in chunks(convs):
            query = {"_id": {"$in": [row_id(conv, user) for conv in some]}, "c": {"$in": list(some)}}
            for doc in await self._find(self._mongo["members"], query, {"_id": 0, "c": 1, "role": 1}, len(some)):
                found[doc["c"]] = doc["role"]
        return found

    async def acquainted(self, user: str, others: Sequence[str], limit: int) -> set[str]:
        """Those of ``others`` who share a conversation with the user (asks every shard for the user's)."""
        mine = [row["c"] for row in await self.rows(user, None, limit)]
        found: set[str] = set()
        for some in chunks(mine):
            left = [other for other in others if other not in found]
            if not left:
                break
            pipeline: list[Document] = [
                {"$match": {"c": {"$in": list(some)}, "u": {"$in": left}, "role": ROLE_IN}},
                {"$group": {"_id": "$u", "n": {"$sum": 1}}},
                {"$limit": len(left)},
            ]
            docs = await self._mongo.do(self._aggregate("members", pipeline, len(left)))
            found.update(doc["_id"] for doc in docs)
        return found

    async def dm_peer(self, user: str, conv: str) -> str | None:
        """The other member of a dm of the user; None: it is no such dm."""
        doc = await self._mongo.do(self._mongo["convs"].find_one({"_id": conv}, {"a": 1, "b": 1}))
        pair = [] if doc is None else [doc.get("a"), doc.get("b")]
        return next((other for other in pair if other != user), None) if user in pair else None

    async def blockers(self, user: str, others: Sequence[str]) -> set[str]:
        """Those of ``others`` who block the user."""
        found: set[str] = set()
        for some in chunks(list(others)):
            keys = [f"{other}:{user}" for other in some]
            cursor = self._mongo["blocks"].find({"_id": {"$in": keys}}, {"_id": 1}, batch_size=len(keys))
            docs = await self._mongo.do(cursor.limit(len(keys)).to_list(len(keys)))
            found.update(doc["_id"].partition(":")[0] for doc in docs)
        return found

    # --- accounts ------------------------------------------------------------------
    async def account(self, name: str | None, user: str | None = None) -> Account | None:
        """An account by name or id."""
        if user is None:
            assert name is not None
            key = await self._mongo.do(self._mongo["names"].find_one({"_id": name_key(name)}, {"u": 1}))
            if key is None:
                return None
            user = key["u"]
        fields = {"name": 1, "password": 1, "disabled": 1}
        doc = await self._mongo.do(self._mongo["users"].find_one({"_id": user}, fields))
        return Account(doc["_id"], doc["name"], doc["password"], doc["disabled"]) if doc is not None else None

    async def users(self, ids: Sequence[str]) -> list[User]:
        """Accounts by id."""
        docs = await self._by_id("users", list(dict.fromkeys(ids)), {"name": 1})
        return [User(id, docs[id]["name"]) for id in ids if id in docs]

    async def seen(self, ids: Sequence[str]) -> dict[str, int]:
        """When each was last online."""
        docs = await self._by_id("users", list(dict.fromkeys(ids)), {"seen": 1})
        return {id: doc["seen"] for id, doc in docs.items() if doc.get("seen")}

    async def token(self, token_hash: bytes) -> Token | None:
        """A token by its hash."""
        doc = await self._mongo.do(self._mongo["tokens"].find_one({"_id": token_hash.hex()}, {"u": 1, "exp": 1}))
        if doc is None:
            return None
        user = await self._mongo.do(self._mongo["users"].find_one({"_id": doc["u"]}, {"name": 1, "disabled": 1}))
        return None if user is None else Token(User(user["_id"], user["name"]), doc["exp"], user["disabled"])


def _wire(doc: Document) -> bytes:
    return encode_entry(doc["t"], doc["c"], doc["s"], doc["f"], doc["ts"], doc["cid"], doc["b"].encode())


def _cut(docs: list[Document], max_bytes: int) -> tuple[list[Entry], bool]:
    """Entries until they are too large together; whether any were left out."""
    taken: list[Entry] = []
    size = 0
    for doc in docs:
        e = to_entry(doc)
        size += len(e.wire) + 1
        if taken and size > max_bytes:
            return taken, True
        taken.append(e)
    return taken, False
