"""The store of several hosts: MongoDB. Implements :class:`~chatcore.store.base.Store`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from pymongo.errors import DuplicateKeyError

from ...errors import ChatError, Conflict, Forbidden, NotFound, Unavailable
from ...protocol import MEMBER_ROLES
from ..append import Appender
from ..base import Account, Appended, Changes, Entry, Known, NewEntry, Opened, Opening, Page, Peer, Token, User, View
from ..entries import conversation_id, first_entries
from ..rules import check_room_for
from . import schema
from .accounts import Accounts, now_ms
from .client import Document, Mongo, MongoSettings
from .members import Members
from .ops import CHANGES, MongoOps
from .reads import Reads

log = logging.getLogger("chatcore.store")

# Rows whose change counter is so near to the newest may have been written after a later one: they
# are told once more rather than missed.
REV_SLACK: Final = 16
# The counter is raised before the row is written: after it moved, the rows are looked at so often, a
# rotation apart, which is longer than an operation may take.
LOOKS_AFTER: Final = 2
# Marks that sending moved are written together after this.
MARKS_S: Final = 1.0
# A rotation through all that is attached takes so many looks.
ROTATION_LOOKS: Final = 5
EXPIRED_AT_ONCE: Final = 500
CLOSE_S: Final = 5.0


class MongoStore:
    """One per worker, made in its loop after the fork.

    ``publish_yield`` asks the other hosts to let this one append to a conversation;
    :meth:`on_yield` and :meth:`heard` are what they are told (log.md).
    """

    name = "mongodb"
    #: No position orders the changes of all conversations: a ``sync`` is of one user.
    global_positions = False

    def __init__(
        self,
        settings: MongoSettings,
        on_commit: Callable[[list[Entry]], None],
        publish_yield: Callable[[str], None],
        *,
        max_conversations: int = 1000,
    ) -> None:
        self._settings = settings
        self._tell = on_commit
        self._publish_yield = publish_yield
        self._max_conversations = max_conversations
        self._store_id = ""
        self._secret = b""
        self.mongo: Mongo
        self._members: Members
        self._reads: Reads
        self._accounts: Accounts
        self._ops: MongoOps
        self._appender: Appender
        self._marks: dict[tuple[str, str], tuple[int, int]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._folds: set[asyncio.Task[None]] = set()
        self._turn = 0
        self._revs: dict[str, tuple[int, int]] = {}  # counter, and how many looks are due after it moved

    @property
    def store_id(self) -> str:
        return self._store_id

    @property
    def healthy(self) -> bool:
        return self.mongo.healthy

    async def start(self) -> None:
        """Connect, verify the indexes (making them in an empty database), learn the store's id.

        :raises Unavailable: the server does not answer.
        :raises BrokenSchema: an index is missing in a database that is in use.
        """
        self.mongo = Mongo(self._settings)
        await self.mongo.start()
        self._store_id, self._secret = await prepare(self.mongo)
        self._members = Members(self.mongo)
        self._reads = Reads(self.mongo)
        self._accounts = Accounts(self.mongo, self._members, self._reads)
        self._ops = MongoOps(self.mongo, self._members, self._max_conversations, now_ms)
        self._appender = Appender(self._ops, self._committed, self._publish_yield, now_ms=now_ms, random=random.random)
        self._tasks = [
            asyncio.create_task(self._write_marks(), name="store-marks"),
            asyncio.create_task(self._probe(), name="store-probe"),
        ]

    async def close(self) -> None:
        await self._appender.close(CLOSE_S)
        for task in [*self._tasks, *self._folds]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._folds, return_exceptions=True)
        with contextlib.suppress(ChatError):
            await self._flush_marks()
        await self.mongo.close()

    # --- what runs beside ----------------------------------------------------------
    def _committed(self, entries: list[Entry]) -> None:
        for e in entries:
            if e.t == "msg":
                self._marks[(e.conv, e.sender)] = (e.seq, e.msgs)
        self._tell(entries)

    async def _write_marks(self) -> None:
        while True:
            await asyncio.sleep(MARKS_S)
            try:
                await self._flush_marks()
            except ChatError as exc:
                log.warning("read marks: %s", exc)

    async def _flush_marks(self) -> None:
        marks, self._marks = self._marks, {}
        if marks:
            await self._accounts.sent(marks)

    async def _probe(self) -> None:
        """Find out that the server is back without waiting for somebody to ask for something."""
        looks = 0
        while True:
            await asyncio.sleep(1.0)
            looks += 1
            try:
                if not self.mongo.healthy:
                    await self.mongo.ping()
                elif looks % 60 == 0:
                    await self._accounts.sweep_tokens(EXPIRED_AT_ONCE)
            except ChatError as exc:
                log.debug("probe: %s", exc)

    # --- other hosts ---------------------------------------------------------------
    def on_yield(self, conv: str) -> None:
        """Another host loses every race for a conversation."""
        self._appender.on_yield(conv)

    def heard(self, entry: Entry) -> None:
        """An entry of another worker was heard of."""
        self._appender.heard(entry.conv, entry.seq)

    def row_changed(self, conv: str, user: str) -> None:
        """A member's row changed without an entry, on another worker."""
        self._members.forget(conv, user)

    # --- the log -------------------------------------------------------------------
    def append(self, entry: NewEntry) -> asyncio.Future[Appended]:
        if entry.t not in CHANGES:
            return self._appender.submit(entry)
        return asyncio.ensure_future(self._change(entry))

    async def _change(self, entry: NewEntry) -> Appended:
        """A change is answered when its rows reflect it: the asker looks at them next."""
        if entry.t == "member" and entry.user == entry.sender and entry.role in ("member", "none"):
            done = await self._own_row(entry)
            if done is not None:
                return done
        done = await self._appender.submit(entry)
        if done.seq:
            await self._fold(entry.conv)
        return done

    async def _fold(self, conv: str) -> None:
        doc = await self.mongo.do(self.mongo["convs"].find_one({"_id": conv}, {"folded": 1}))
        if doc is not None:
            await self._members.repair(conv, int(doc.get("folded", 0)))

    async def _own_row(self, e: NewEntry) -> Appended | None:
        """Joining or leaving a channel by oneself makes no entry (None: it is no channel)."""
        doc = await self.mongo.do(self.mongo["convs"].find_one({"_id": e.conv}, {"kind": 1, "members": 1}))
        if doc is None or doc["kind"] != "channel":
            return None
        head = await self._ops.newest(e.conv)
        self._members.forget(e.conv, e.sender)
        ruling = await self._ops.allowed(e.conv, head, [e])
        verdict = ruling.verdicts[0]
        if isinstance(verdict, Appended):
            return verdict
        if verdict is not None:
            raise verdict
        assert e.role is not None
        # Who joins a channel that everybody left owns it.
        role = "owner" if e.role == "member" and doc["members"] <= 0 else e.role
        await self._members.set_own_row(e.conv, e.sender, role, head.seq, head.msgs)
        return Appended(0, now_ms())

    async def open(self, conv: Opening) -> Opened:
        o = conv
        id = conversation_id(self._secret, o)
        everybody = [o.creator, *(u for u in dict.fromkeys(o.members) if u != o.creator)]
        entries = first_entries(id, o, everybody)
        there = await self.mongo.do(self.mongo["convs"].find_one({"_id": id}, {"opened": 1, "digest": 1}))
        if there is None or not there.get("opened"):
            if there is not None and o.kind != "dm" and there["digest"] != o.digest.hex():
                raise Conflict(f"cid {o.cid} was used for something else")
            await self._may_open(o, everybody)
            await self._make(id, o)
            # From here everything is repeated by whoever asks again, until it is complete.
            keys = {(id, e.cid) for e in entries}
            self._ops.opening |= keys
            try:
                for e in entries:
                    with contextlib.suppress(Conflict):  # of a dm that both open at once
                        await self._appender.submit(e)
            finally:
                self._ops.opening -= keys
            await self._fold(id)
            done = await self.mongo.do(
                self.mongo["convs"].update_one({"_id": id, "opened": False}, {"$set": {"opened": True}})
            )
            return Opened(id, bool(done.matched_count))
        if o.kind != "dm" and there["digest"] != o.digest.hex():
            raise Conflict(f"cid {o.cid} was used for something else")
        return Opened(id, False)

    async def _may_open(self, o: Opening, everybody: Sequence[str]) -> None:
        cursor = self.mongo["users"].find({"_id": {"$in": list(everybody)}, "disabled": False}, {"_id": 1})
        found = {doc["_id"] for doc in await self.mongo.do(cursor.limit(len(everybody)).to_list(len(everybody)))}
        for user in everybody:
            if user not in found:
                raise NotFound(f"no such user: {user}")
            inside = await self.mongo.do(
                self.mongo["members"].count_documents(
                    {"u": user, "role": {"$in": list(MEMBER_ROLES)}}, limit=self._max_conversations
                )
            )
            if (refused := check_room_for(user, inside, self._max_conversations)) is not None:
                raise refused
        if o.kind == "dm":
            block = {"_id": f"{o.members[0]}:{o.creator}"}
            if await self.mongo.do(self.mongo["blocks"].find_one(block, {"_id": 1})) is not None:
                raise Forbidden("this user takes no direct messages from you")

    async def _make(self, id: str, o: Opening) -> None:
        a, b = sorted((o.creator, o.members[0])) if o.kind == "dm" else (None, None)
        doc: Document = {
            "_id": id,
            "kind": o.kind,
            "title": o.title,
            "key": None if o.title is None else o.title.casefold(),
            "title_as_of": 0,
            "a": a,
            "b": b,
            "created": now_ms(),
            "digest": o.digest.hex(),
            "folded": 0,
            "members": 0,
            "opened": False,
        }
        with contextlib.suppress(DuplicateKeyError):
            await self.mongo.do(self.mongo["convs"].insert_one(doc))

    async def heads(self, convs: Sequence[str]) -> dict[str, int]:
        return await self._reads.heads(convs)

    async def entries(self, conv: str, after: int, limit: int, max_bytes: int) -> list[Entry]:
        return await self._reads.entries(conv, after, limit, max_bytes)

    async def page(
        self, user: str, conv: str, before: int | None, after: int | None, limit: int, max_bytes: int
    ) -> Page:
        if await self._members.role(conv, user) not in MEMBER_ROLES:
            raise NotFound("no such conversation")
        head = (await self._ops.newest(conv)).seq
        return await self._reads.page(conv, before, after, limit, max_bytes, head)

    async def position(self) -> int:
        return 0

    async def changes(self, after: int, known: Known | None = None, everything: bool = True) -> Changes:
        """What is attached, and who is connected, is looked at in rotation; all of it after a doubt."""
        if known is None:
            return Changes(0, [], [], [], [])
        self._turn += 1
        part = self._turn % ROTATION_LOOKS

        def mine(keys: Sequence[Any]) -> list[Any]:
            return [key for i, key in enumerate(keys) if everything or i % ROTATION_LOOKS == part]

        heads = await self._reads.beyond(mine(list(known.lasts().items())))
        rows: list[tuple[str, str]] = []
        users = mine(known.users())
        revoked_users: list[str] = []
        for at in range(0, len(users), 500):
            some = users[at : at + 500]
            cursor = self.mongo["users"].find({"_id": {"$in": some}}, {"rev": 1, "disabled": 1})
            for doc in await self.mongo.do(cursor.limit(len(some)).to_list(len(some))):
                if doc["disabled"]:
                    revoked_users.append(doc["_id"])
                rows += await self._rows_since(doc["_id"], int(doc["rev"]))
        gone = set(self._revs) - set(known.users())
        for user in gone:
            del self._revs[user]
        tokens = mine(known.tokens())
        revoked: list[bytes] = []
        for at in range(0, len(tokens), 500):
            hashes = {token.hex(): token for token in tokens[at : at + 500]}
            cursor = self.mongo["tokens"].find({"_id": {"$in": list(hashes)}}, {"_id": 1})
            left = {doc["_id"] for doc in await self.mongo.do(cursor.limit(len(hashes)).to_list(len(hashes)))}
            revoked += [token for key, token in hashes.items() if key not in left]
        return Changes(0, heads, rows, revoked, revoked_users)

    async def _rows_since(self, user: str, rev: int) -> list[tuple[str, str]]:
        """The user's rows that changed since the last look (the first look only notes where it stands)."""
        before, again = self._revs.get(user, (rev, 0))
        if rev > before:
            again = LOOKS_AFTER
        self._revs[user] = (rev, max(0, again - 1))
        if not again:
            return []
        query = {"u": user, "rev": {"$gt": max(0, before - REV_SLACK)}}
        cursor = self.mongo["members"].find(query, {"_id": 0, "c": 1})
        most = self._max_conversations
        return [(user, doc["c"]) for doc in await self.mongo.do(cursor.limit(most).to_list(most))]

    # --- conversations -----------------------------------------------------------
    async def conversations(self, user: str) -> tuple[int, list[str]]:
        doc = await self.mongo.do(self.mongo["users"].find_one({"_id": user}, {"rev": 1}))
        rev = 0 if doc is None else int(doc["rev"])
        self._revs.setdefault(user, (rev, LOOKS_AFTER))
        rows = await self._reads.rows(user, None, self._max_conversations)
        return max(0, rev - REV_SLACK), [row["c"] for row in rows]

    async def left_since(self, user: str, after: int) -> list[str]:
        return await self._reads.left_since(user, after, self._max_conversations)

    async def views(self, user: str, convs: Sequence[str] | None = None) -> tuple[int, list[View]]:
        ids = convs
        if ids is None:
            ids = [row["c"] for row in await self._reads.rows(user, None, self._max_conversations)]
        # A row never shows less than the head beside it: who is removed by an entry that a session
        # has been given must not be attached again by a row that follows later.
        for conv, folded in await self._reads.behind(ids):
            await self._members.repair(conv, folded)
        return 0, await self._reads.views(user, ids, self._max_conversations)

    async def role(self, user: str, conv: str) -> str | None:
        return await self._members.role(conv, user)

    async def member_count(self, conv: str) -> int:
        return await self._reads.member_count(conv)

    async def members(self, user: str, conv: str, after: str | None, limit: int) -> tuple[list[Peer], str | None]:
        if await self._members.role(conv, user) not in MEMBER_ROLES:
            raise NotFound("no such conversation")
        return await self._reads.members(conv, after, limit)

    async def channels(
        self, user: str, prefix: str | None, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], str | None]:
        return await self._reads.channels(user, prefix, after, limit)

    async def set_read(self, user: str, conv: str, upto: int) -> bool:
        return await self._accounts.set_read(user, conv, upto)

    async def set_notify(self, user: str, conv: str, level: str) -> None:
        await self._accounts.set_notify(user, conv, level)

    async def block(self, user: str, other: str, on: bool) -> None:
        await self._accounts.block(user, other, on)

    async def acquainted(self, user: str, others: Sequence[str]) -> set[str]:
        return await self._reads.acquainted(user, others, self._max_conversations)

    # --- accounts ------------------------------------------------------------------
    async def add_user(self, name: str, password: str) -> User:
        return await self._accounts.add_user(name, password)

    async def update_user(self, user: str, name: str | None, password: str | None, keep: bytes = b"") -> User:
        return await self._accounts.update_user(user, name, password, keep)

    async def set_disabled(self, name: str, disabled: bool) -> None:
        await self._accounts.set_disabled(name, disabled)

    async def account(self, name: str) -> Account | None:
        return await self._reads.account(name)

    async def account_by_id(self, user: str) -> Account | None:
        return await self._reads.account(None, user)

    async def users(self, ids: Sequence[str]) -> list[User]:
        return await self._reads.users(ids)

    async def seen(self, ids: Sequence[str]) -> dict[str, int]:
        return await self._reads.seen(ids)

    async def mark_seen(self, users: Sequence[str]) -> None:
        await self._accounts.mark_seen(users)

    async def add_token(self, token_hash: bytes, user: str, expires: int, password: str) -> None:
        await self._accounts.add_token(token_hash, user, expires, password)

    async def token(self, token_hash: bytes) -> Token | None:
        return await self._reads.token(token_hash)

    async def extend_token(self, token_hash: bytes, expires: int) -> bool:
        return await self._accounts.extend_token(token_hash, expires)

    async def revoke_token(self, token_hash: bytes) -> None:
        await self._accounts.revoke_token(token_hash)


class BrokenSchema(Exception):
    """The database lacks an index that correctness rests on; the message is one line for the operator."""


async def prepare(mongo: Mongo) -> tuple[str, bytes]:
    """The store's id and secret; an empty database is set up, one in use is verified.

    :raises BrokenSchema: an index is missing: ``chatcore db migrate`` makes it.
    """
    meta = mongo["meta"]
    doc = await mongo.do(meta.find_one({"_id": "store"}))
    if doc is None:
        for line in await schema.migrate(mongo):
            log.info("database %s: %s", mongo.settings.database, line)
        fresh: Document = {
            "_id": "store",
            "store_id": secrets.token_urlsafe(9),
            "secret": secrets.token_bytes(32),
            "version": schema.SCHEMA_VERSION,
            "at": time.time_ns() // 1_000_000,
        }
        with contextlib.suppress(DuplicateKeyError):
            await mongo.do(meta.insert_one(fresh))
        doc = await mongo.do(meta.find_one({"_id": "store"}))
        if doc is None:
            raise Unavailable("the database does not keep what was written")
    if doc["version"] != schema.SCHEMA_VERSION:
        raise BrokenSchema(
            f"the database {mongo.settings.database} has schema version {doc['version']};"
            f" this program needs {schema.SCHEMA_VERSION}"
        )
    lacking = schema.missing(await schema.check(mongo))
    if lacking:
        names = ", ".join(f"{one.index.collection}.{one.index.name} ({one.state})" for one in lacking)
        raise BrokenSchema(f"the database {mongo.settings.database} lacks indexes: {names}; run chatcore db migrate")
    return doc["store_id"], bytes(doc["secret"])
