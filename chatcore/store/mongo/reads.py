"""Queries. Every one has a limit and an index; those that ask every shard say so.

From the primary, of what a majority has, unless a name says otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from ...errors import NotFound
from ...protocol import MEMBER_ROLES, encode_entry
from ..base import Account, Entry, Page, Peer, Token, User, View
from ..names import name_key
from .client import Document, Mongo
from .members import row_id
from .ops import ENTRY_FIELDS, to_entry

# Conversations (or keys) in one query.
CHUNK: Final = 500
# Ranges in one query of changes that were not folded.
BEHIND_CHUNK: Final = 100
# Queries at once where each conversation needs one: less than the pool has connections.
AT_ONCE: Final = 8
ROLE_IN: Final = {"$in": list(MEMBER_ROLES)}
#: Documents carry no position that orders all conversations: whether one without `have` has new
#: entries cannot be told, so it counts as changed.
UNKNOWN_POSITION: Final = 2**53 - 1


def chunks(values: Sequence[str]) -> list[Sequence[str]]:
    """Pieces of at most CHUNK."""
    return [values[at : at + CHUNK] for at in range(0, len(values), CHUNK)]


class Reads:
    """The queries of one store."""

    def __init__(self, mongo: Mongo) -> None:
        self._mongo = mongo

    # --- the log -----------------------------------------------------------------
    async def newest(self, convs: Sequence[str]) -> dict[str, Document]:
        """The newest entry of each (a look at the end of its index range)."""
        if not self._mongo.groups_first:
            return await self._newest_one_by_one(convs)
        found: dict[str, Document] = {}
        for some in chunks(convs):
            pipeline: list[Document] = [
                {"$match": {"c": {"$in": list(some)}}},
                {"$sort": {"c": 1, "s": -1}},
                {"$group": {"_id": "$c", "e": {"$first": "$$ROOT"}}},
            ]
            cursor = await self._mongo.do(self._mongo["entries"].aggregate(pipeline))
            for doc in await self._mongo.do(cursor.to_list(len(some))):
                found[doc["_id"]] = doc["e"]
        return found

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
        cursor = self._mongo["entries"].find({"c": conv, "s": {"$gt": after}}, ENTRY_FIELDS, sort=[("s", 1)])
        docs = await self._mongo.do(cursor.limit(limit).to_list(limit))
        return _cut(docs, max_bytes)[0]

    async def page(
        self, conv: str, before: int | None, after: int | None, limit: int, max_bytes: int, head: int
    ) -> Page:
        """A page (who may see it is decided before). History may come from a secondary, if a setting says so."""
        log = self._mongo.history("entries")
        if after is not None:
            upto = head + 1 if before is None else before
            query = {"c": conv, "s": {"$gt": after, "$lt": upto}}
            docs = await self._mongo.do(
                log.find(query, ENTRY_FIELDS, sort=[("s", 1)]).limit(limit + 1).to_list(limit + 1)
            )
            found, cut = _cut(docs, max_bytes)
            return Page(found[:limit], cut or len(found) > limit, head)
        query = {"c": conv, "s": {"$lt": head + 1 if before is None else before}}
        docs = await self._mongo.do(log.find(query, ENTRY_FIELDS, sort=[("s", -1)]).limit(limit + 1).to_list(limit + 1))
        found, cut = _cut(docs, max_bytes)
        return Page(found[:limit][::-1], cut or len(found) > limit, head)

    async def msgs_at(self, conv: str, seq: int) -> int | None:
        """How many messages there were up to an entry (None: there is no such entry)."""
        doc = await self._mongo.do(self._mongo["entries"].find_one({"c": conv, "s": seq}, {"_id": 0, "n": 1}))
        return None if doc is None else int(doc["n"])

    async def beyond(self, lasts: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """Of conversations and the last seq known of each: those that have a next one."""
        found: list[tuple[str, int]] = []
        for at in range(0, len(lasts), CHUNK):
            some = lasts[at : at + CHUNK]
            wanted = {(conv, last + 1) for conv, last in some}
            most = len(wanted)
            query: Document = {"$or": [{"c": conv, "s": seq} for conv, seq in wanted]}
            if not self._mongo.groups_first:
                # A server without a planner compares each document with each pair; this way it finds more
                # than was asked for, which is dropped below.
                query = {"c": {"$in": [conv for conv, _ in wanted]}, "s": {"$in": sorted({s for _, s in wanted})}}
                most = most * most
            cursor = self._mongo["entries"].find(query, {"_id": 0, "c": 1, "s": 1})
            docs = await self._mongo.do(cursor.limit(most).to_list(most))
            found.extend(pair for doc in docs if (pair := (doc["c"], doc["s"])) in wanted)
        return found

    async def behind(self, convs: Sequence[str]) -> list[tuple[str, int]]:
        """Of these conversations, those with changes that no row reflects, and up to where rows do."""
        docs = await self._by_id("convs", convs, {"folded": 1})
        folded = {conv: int(doc.get("folded", 0)) for conv, doc in docs.items()}
        found: set[str] = set()
        ids = list(folded)
        for at in range(0, len(ids), BEHIND_CHUNK):
            some = ids[at : at + BEHIND_CHUNK]
            query = {"$or": [{"c": conv, "x": {"$gt": folded[conv]}} for conv in some]}
            cursor = self._mongo["entries"].find(query, {"_id": 0, "c": 1})
            found.update(doc["c"] for doc in await self._mongo.do(cursor.limit(CHUNK).to_list(CHUNK)))
        return [(conv, folded[conv]) for conv in sorted(found)]

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
        return await self._mongo.do(self._mongo["members"].find(query, {"_id": 0}).limit(limit).to_list(limit))

    async def left_since(self, user: str, after: int, limit: int) -> list[str]:
        """What the user is no longer in, by changes after a position (asks every shard)."""
        query = {"u": user, "role": {"$nin": list(MEMBER_ROLES)}, "rev": {"$gt": after}}
        cursor = self._mongo["members"].find(query, {"_id": 0, "c": 1})
        return [doc["c"] for doc in await self._mongo.do(cursor.limit(limit).to_list(limit))]

    async def views(self, user: str, convs: Sequence[str] | None, limit: int) -> list[View]:
        """The user's views, newest first."""
        rows = await self.rows(user, convs, limit)
        ids = [row["c"] for row in rows]
        docs = await self._by_id("convs", ids)
        newest = await self.newest(ids)
        lasts = await self._lasts(newest)
        others = {conv: doc["b"] if doc["a"] == user else doc["a"] for conv, doc in docs.items() if doc["kind"] == "dm"}
        names = await self._by_id("users", list(set(others.values())), {"name": 1})
        views: list[View] = []
        for row in rows:
            conv = row["c"]
            doc, head = docs.get(conv), newest.get(conv)
            if doc is None or head is None:
                continue  # being opened
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

    async def _by_id(self, name: str, ids: Sequence[str], fields: Document | None = None) -> dict[str, Document]:
        found: dict[str, Document] = {}
        for some in chunks(ids):
            cursor = self._mongo[name].find({"_id": {"$in": list(some)}}, fields)
            for doc in await self._mongo.do(cursor.limit(len(some)).to_list(len(some))):
                found[doc["_id"]] = doc
        return found

    async def _lasts(self, newest: dict[str, Document]) -> dict[str, bytes]:
        """The newest message of each, as it was pushed."""
        lasts = {conv: _wire(doc) for conv, doc in newest.items() if doc["l"] == doc["s"]}
        wanted = [(conv, doc["l"]) for conv, doc in newest.items() if 0 < doc["l"] < doc["s"]]
        for at in range(0, len(wanted), CHUNK):
            some = wanted[at : at + CHUNK]
            query = {"$or": [{"c": conv, "s": seq} for conv, seq in some]}
            docs = await self._mongo.do(
                self._mongo["entries"].find(query, ENTRY_FIELDS).limit(len(some)).to_list(len(some))
            )
            lasts.update({doc["c"]: _wire(doc) for doc in docs})
        return lasts

    async def member_count(self, conv: str) -> int:
        """How many are in a conversation."""
        doc = await self._mongo.do(self._mongo["convs"].find_one({"_id": conv}, {"members": 1}))
        return 0 if doc is None else int(doc["members"])

    async def members(self, conv: str, after: str | None, limit: int) -> tuple[list[Peer], str | None]:
        """A page of members by user id."""
        query = {"c": conv, "u": {"$gt": after or ""}, "role": ROLE_IN}
        cursor = self._mongo["members"].find(query, {"_id": 0, "u": 1, "role": 1, "read": 1}, sort=[("u", 1)])
        docs = await self._mongo.do(cursor.limit(limit + 1).to_list(limit + 1))
        peers = [Peer(doc["u"], doc["role"], doc["read"]) for doc in docs[:limit]]
        return peers, peers[-1].user if len(docs) > limit else None

    async def channels(
        self, user: str, prefix: str | None, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], str | None]:
        """A page of the directory by title (asks every shard)."""
        low = (prefix or "").casefold()
        query: Document = {"kind": "channel", "key": {"$gte": low, "$lt": low + "\U0010ffff"}}
        if after is not None:
            doc = await self._mongo.do(self._mongo["convs"].find_one({"_id": after, "kind": "channel"}, {"key": 1}))
            if doc is None:
                raise NotFound("after: no such channel")
            key = max(low, doc["key"])
            query = {
                "kind": "channel",
                "key": {"$gte": key, "$lt": low + "\U0010ffff"},
                "$or": [{"key": {"$gt": key}}, {"_id": {"$gt": after}}],
            }
        cursor = self._mongo["convs"].find(query, {"title": 1, "members": 1}, sort=[("key", 1), ("_id", 1)])
        docs = await self._mongo.do(cursor.limit(limit + 1).to_list(limit + 1))
        page = docs[:limit]
        mine = await self._by_id("members", [row_id(doc["_id"], user) for doc in page], {"role": 1})
        found = [
            {
                "c": doc["_id"],
                "kind": "channel",
                "title": doc["title"],
                "members": doc["members"],
                "role": mine.get(row_id(doc["_id"], user), {}).get("role", "none"),
            }
            for doc in page
        ]
        return found, page[-1]["_id"] if len(docs) > limit else None

    async def acquainted(self, user: str, others: Sequence[str], limit: int) -> set[str]:
        """Those of ``others`` who share a conversation with the user (asks every shard for the user's)."""
        mine = [row["c"] for row in await self.rows(user, None, limit)]
        found: set[str] = set()
        for some in chunks(mine):
            left = [other for other in others if other not in found]
            if not left:
                break
            query = {"c": {"$in": list(some)}, "u": {"$in": left}, "role": ROLE_IN}
            most = len(some) * len(left)
            docs = await self._mongo.do(
                self._mongo["members"].find(query, {"_id": 0, "u": 1}).limit(most).to_list(most)
            )
            found.update(doc["u"] for doc in docs)
        return found

    # --- accounts ------------------------------------------------------------------
    async def account(self, name: str | None, user: str | None = None) -> Account | None:
        """An account by name or id."""
        if user is None:
            assert name is not None
            key = await self._mongo.do(self._mongo["names"].find_one({"_id": name_key(name)}))
            if key is None:
                return None
            user = key["u"]
        doc = await self._mongo.do(self._mongo["users"].find_one({"_id": user}))
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
