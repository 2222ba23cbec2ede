"""The store of several hosts: MongoDB. Implements :class:`~chatcore.store.base.Store`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

from pymongo.errors import DuplicateKeyError
from pymongo.monitoring import CommandListener

from ...common.clock import now_ms
from ...common.tasks import Tasks
from ...entries import (
    CHANGING,
    MESSAGES,
    NewEntry,
    RoleChange,
    by_oneself,
    check_room_for,
    takes_no_invitations,
    takes_no_messages,
)
from ...errors import ChatError, Conflict, NotFound, Unavailable
from ...protocol import MEMBER_ROLES
from ..append import Appender, AppendLimits
from ..base import (
    Account,
    Appended,
    Changes,
    Entry,
    Known,
    Memberships,
    Opened,
    Opening,
    Page,
    Peer,
    Token,
    User,
    View,
)
from ..opening import DM_REQUEST, conversation_id, dm_id, first_entries, first_members, request_id
from . import schema
from .accounts import Accounts
from .client import Document, Mongo, MongoSettings
from .members import POSITION_FIELDS, MemberRows, written_upto
from .ops import BLOCK_TTL_S, MongoOps
from .reads import MongoReads

log = logging.getLogger("chatcore.store")

T = TypeVar("T")

# Marks that sending moved are written together after this.
MARKS_S: Final = 1.0
# A rotation through all that is attached takes so many looks.
ROTATION_LOOKS: Final = 5
# A server that was asked nothing for so long is asked whether it is there.
SILENCE_S: Final = 2.0
# Expired tokens are looked for so often, for databases that do not remove them by themselves.
SWEEP_S: Final = 60
EXPIRED_AT_ONCE: Final = 500
# The worker that appended a change has so long to apply it to the rows; then the workers that came across it do,
# so many conversations at a time, at different moments.
APPLY_WAIT_S: Final = 1.0
APPLIED_AT_ONCE: Final = 50
UNAPPLIED_MAX: Final = 10_000
# Joining or leaving a channel while an admin appoints or bans the user there; each try is as of a later entry.
OWN_ROW_TRIES: Final = 5
CLOSE_S: Final = 5.0


class MongoStore:
    """One per worker, made in its loop after the fork.

    ``publish_yield`` asks the other hosts to let this one append to a conversation; :meth:`on_yield` and
    :meth:`heard` take what comes from them (docs/log.md). ``listeners`` see every command.
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
        listeners: Sequence[CommandListener] = (),
    ) -> None:
        self._settings = settings
        self._listeners = listeners
        self._announce = on_commit
        self._publish_yield = publish_yield
        self._max_conversations = max_conversations
        self._store_id = ""
        self._secret = b""
        self._mongo: Mongo | None = None
        self._members: MemberRows
        self._reads: MongoReads
        self._accounts: Accounts
        self._ops: MongoOps
        self._appender: Appender | None = None
        self._marks: dict[tuple[str, str], tuple[int, int]] = {}
        self._periodic = Tasks()
        # Not Tasks: their errors are answers to a caller, no failures to log.
        self._works: set[asyncio.Task[Any]] = set()
        # Conversations with a change that may not be applied to the rows: when to look, and up to which seq.
        self._unapplied: dict[str, tuple[float, int]] = {}
        self._opening: dict[str, asyncio.Task[Opened]] = {}
        self._turn = 0
        self._revs: dict[str, int] = {}  # up to where :meth:`changes` gave out each user's rows

    @property
    def store_id(self) -> str:
        return self._store_id

    @property
    def mongo(self) -> Mongo:
        """The connection; there is one from :meth:`start` on."""
        assert self._mongo is not None
        return self._mongo

    @property
    def healthy(self) -> bool:
        """Whether the last operation was answered."""
        return self._mongo is not None and self._mongo.healthy

    async def start(self) -> None:
        """Connect, verify the indexes (making them in an empty database), learn the store's id.

        :raises Unavailable: the server does not answer.
        :raises BrokenSchema: an index is missing in a database that is in use, or the URL is wrong.
        """
        try:
            self._mongo = mongo = Mongo(self._settings, self._listeners)
        except ValueError as exc:
            raise BrokenSchema(str(exc)) from None
        try:
            await mongo.start()
            self._store_id, self._secret = await prepare(mongo)
        except BaseException:
            await mongo.close()
            raise
        self._members = MemberRows(mongo)
        self._reads = MongoReads(mongo)
        self._accounts = Accounts(mongo, self._members, self._reads)
        self._ops = MongoOps(mongo, self._members, self._max_conversations, now_ms)
        self._appender = Appender(
            self._ops,
            self._committed,
            self._publish_yield,
            now_ms=now_ms,
            random=random.random,
            limits=AppendLimits(max_wait_s=self._settings.append_ms / 1000),
        )
        for pause_s, work in (
            (MARKS_S, self._flush_marks),
            (1.0, self._probe),
            (BLOCK_TTL_S / 3, self._ops.refresh_blocks),
            (APPLY_WAIT_S / 2, self._apply_left_over),
            (SWEEP_S, self._sweep),
        ):
            self._periodic.spawn(self._every(pause_s, work), f"store-{work.__name__.strip('_')}")

    async def close(self) -> None:
        """Finish what is queued, answer it, write the marks, close every connection."""
        if self._appender is None:
            return
        loop = asyncio.get_running_loop()
        until = loop.time() + CLOSE_S
        await self._appender.close(CLOSE_S)
        await self._periodic.close()
        if self._works:
            await asyncio.wait(self._works, timeout=max(0.0, until - loop.time()))
            for task in self._works:
                task.cancel()
        if self.mongo.healthy:
            with contextlib.suppress(ChatError):
                await self._flush_marks()
        await self.mongo.close(max(0.0, until - loop.time()))

    # --- background work ----------------------------------------------------------
    def _committed(self, entries: list[Entry]) -> None:
        for e in entries:
            if e.t in MESSAGES:
                self._mark((e.conv, e.sender), (e.seq, e.msgs))
        self._note_changes(entries)
        self._announce(entries)

    def _mark(self, key: tuple[str, str], mark: tuple[int, int]) -> None:
        self._marks[key] = max(mark, self._marks.get(key, mark))

    async def _every(self, pause_s: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            await asyncio.sleep(pause_s)
            try:
                await work()
            except ChatError as exc:
                log.debug("%s: %s", work.__name__, exc)  # an outage is logged once, elsewhere
            except Exception:
                log.exception("%s failed", work.__name__)

    async def _flush_marks(self) -> None:
        marks = self._marks.copy()
        if marks:
            await self._accounts.sent(marks)
            # Until here they were laid over what is read; those that failed are written the next time.
            for key, mark in marks.items():
                if self._marks.get(key) == mark:
                    del self._marks[key]

    async def _probe(self) -> None:
        """Find out that the server is away, or back, without waiting for a request."""
        silent_s = asyncio.get_running_loop().time() - self.mongo.last_s
        if silent_s > SILENCE_S or not self.mongo.healthy:
            await self.mongo.ping()

    async def _sweep(self) -> None:
        await self._accounts.sweep_tokens(EXPIRED_AT_ONCE)

    def _note_changes(self, entries: Sequence[Entry]) -> None:
        """The workers that appended these changes may have died before they applied them to the rows."""
        for e in entries:
            if e.t in CHANGING and e.seq > self._members.applied_upto(e.conv):
                due = asyncio.get_running_loop().time() + APPLY_WAIT_S * (1 + random.random())
                due, seq = self._unapplied.get(e.conv, (due, 0))
                if seq or len(self._unapplied) < UNAPPLIED_MAX:
                    self._unapplied[e.conv] = (due, max(seq, e.seq))

    async def _apply_left_over(self) -> None:
        now = asyncio.get_running_loop().time()
        due = [(conv, seq) for conv, (at, seq) in self._unapplied.items() if at <= now]
        for conv, seq in due[:APPLIED_AT_ONCE]:
            if seq > self._members.applied_upto(conv):
                await self._members.apply_changes(conv, late=True)
            self._unapplied.pop(conv, None)
        await self._members.recount()

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Work that goes on when its caller is cancelled (the caller shields it)."""
        task = asyncio.ensure_future(work)
        self._works.add(task)
        task.add_done_callback(self._worked)
        return task

    def _worked(self, task: asyncio.Task[Any]) -> None:
        self._works.discard(task)
        if not task.cancelled():
            task.exception()

    # --- other hosts ---------------------------------------------------------------
    def on_yield(self, conv: str) -> None:
        """Another host's batches keep losing in a conversation."""
        self._log().on_yield(conv)

    def heard(self, entry: Entry) -> None:
        """The bus brought an entry of another worker."""
        self._log().heard(entry.conv, entry.seq)
        self._note_changes([entry])

    def row_changed(self, conv: str, user: str) -> None:
        """A member's row changed without an entry, on another worker."""
        self._members.mark_stale(conv, user)

    def blocks_changed(self) -> None:
        """On another worker, a user blocked another, or no longer does."""
        self._members.mark_blocks_stale()

    def _log(self) -> Appender:
        assert self._appender is not None
        return self._appender

    # --- the log -------------------------------------------------------------------
    def append(self, entry: NewEntry) -> asyncio.Future[Appended]:
        if entry.change is None:
            return self._log().submit(entry)
        if by_oneself(entry):
            return asyncio.shield(self._begin(self._join_or_leave(entry)))
        submitted = self._log().submit(entry)  # now: entries are in the order of the calls
        return asyncio.shield(self._begin(self._change(entry, submitted)))

    async def _change(self, entry: NewEntry, submitted: asyncio.Future[Appended]) -> Appended:
        """A change is answered when its rows reflect it: its sender reads them next."""
        done = await submitted
        await self._members.apply_changes(entry.conv)
        return done

    async def _join_or_leave(self, entry: NewEntry) -> Appended:
        done = await self._own_row(entry)
        return done or await self._change(entry, self._log().submit(entry))

    async def _own_row(self, e: NewEntry) -> Appended | None:
        """Joining or leaving a channel by oneself makes no entry (None: it is no channel)."""
        doc = await self.mongo.do(self.mongo["convs"].find_one({"_id": e.conv}, {"kind": 1}))
        if doc is None or doc["kind"] != "channel":
            return None
        for _ in range(OWN_ROW_TRIES):
            head = await self._ops.newest(e.conv)
            self._members.mark_stale(e.conv, e.sender)
            [decision] = (await self._ops.decide(e.conv, head, [e])).each
            if isinstance(decision, Appended):
                return decision
            if isinstance(decision, ChatError):
                raise decision
            change = decision.change
            assert isinstance(change, RoleChange)
            try:
                if await self._members.set_own_row(e.conv, e.sender, change.role, head.seq, head.msgs):
                    return Appended(0, now_ms())
            finally:
                self._members.mark_stale(e.conv, e.sender)
        raise Unavailable("others change the same member")

    async def open(self, conv: Opening) -> Opened:
        id = conversation_id(self._secret, conv)
        task = self._opening[id] = self._begin(self._open_in_turn(conv, id, self._opening.get(id)))
        return await asyncio.shield(task)

    async def _open_in_turn(self, o: Opening, id: str, before: asyncio.Task[Opened] | None) -> Opened:
        """One after the other: then one of them makes it and the next finds it."""
        try:
            if before is not None:
                await asyncio.wait([before])
            return await self._open(o, id)
        finally:
            if self._opening.get(id) is asyncio.current_task():
                del self._opening[id]

    async def _open(self, o: Opening, id: str) -> Opened:
        users = first_members(o)
        there = await self._find_conv(id, o)
        if there is None:
            await self._may_open(o, users)
            if o.kind == "dm":
                await self._make(request_id(self._secret, o), o, DM_REQUEST)
                await self._find_conv(id, o)  # another request of the same cid may have been first
            await self._make(id, o, o.kind)
            there = await self._find_conv(id, o)
        if there is not None and there["opened"]:
            return Opened(id, False)
        # Opening was allowed when it began. The worker that is asked again repeats all from here until it is complete.
        entries = first_entries(id, o, users)
        keys = [(id, e.sender, e.cid, e.digest) for e in entries]
        self._ops.opening.update(keys)
        try:
            for e in entries:
                try:
                    await self._log().submit(e)
                except Conflict:
                    if o.kind != "dm":  # whose users have it, whichever request made it
                        raise
        finally:
            self._ops.opening.difference_update(keys)
        await self._members.apply_changes(id)
        done = await self.mongo.do(
            self.mongo["convs"].update_one({"_id": id, "opened": False}, {"$set": {"opened": True}})
        )
        return Opened(id, bool(done.matched_count))

    async def _find_conv(self, id: str, o: Opening) -> Document | None:
        """The conversation, if it was made already.

        :raises Conflict: the creator's cid made another one.
        """
        request = request_id(self._secret, o)
        ids = list({id, request})
        cursor = self.mongo["convs"].find({"_id": {"$in": ids}}, {"opened": 1, "digest": 1}, batch_size=len(ids))
        docs = {doc["_id"]: doc for doc in await self.mongo.do(cursor.limit(len(ids)).to_list(len(ids)))}
        made = docs.get(request)
        if made is not None and made["digest"] != o.digest.hex():
            raise Conflict(f"cid {o.cid} was used for something else")
        return docs.get(id)

    async def _may_open(self, o: Opening, users: Sequence[str]) -> None:
        found = {doc["_id"] for doc in await self._reads.among("users", users, {"disabled": 1}) if not doc["disabled"]}
        for user in users:
            if user not in found:
                raise NotFound(f"no such user: {user}")
            inside = await self._ops.conversations_of(user)
            if (refused := check_room_for(user, inside, self._max_conversations)) is not None:
                raise refused
        for user in sorted(await self._reads.blockers(o.creator, o.members)):
            raise takes_no_messages() if o.kind == "dm" else takes_no_invitations(user)

    async def _make(self, id: str, o: Opening, kind: str) -> None:
        a, b = sorted((o.creator, o.members[0])) if o.kind == "dm" else (None, None)
        doc: Document = {
            "_id": id,
            "kind": kind,
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
        found = await self._reads.entries(conv, after, limit, max_bytes)
        self._note_changes(found)
        return found

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
        """Looks at the attached conversations and the connected users: all, or the next part of a rotation."""
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
        for doc in await self._reads.among("users", users, {**POSITION_FIELDS, "disabled": 1}):
            if doc["disabled"]:
                revoked_users.append(doc["_id"])
            for conv in await self._rows_since(doc["_id"], doc):
                self._members.mark_stale(conv, doc["_id"])
                rows.append((doc["_id"], conv))
        gone = set(self._revs) - set(known.users())
        for user in gone:
            del self._revs[user]
        tokens = mine(known.tokens())
        hashes = {token.hex(): token for token in tokens}
        left = {doc["_id"] for doc in await self._reads.among("tokens", list(hashes), {"_id": 1})}
        revoked = [token for key, token in hashes.items() if key not in left]
        return Changes(0, heads, rows, revoked, revoked_users)

    async def _rows_since(self, user: str, doc: Document) -> list[str]:
        """The conversations in which the user's row changed since the last look (the first look only notes
        the position); a row that is being written is among them until it is written."""
        written = written_upto(doc)
        before = self._revs.get(user, written)
        self._revs[user] = max(before, written)
        if int(doc["rev"]) <= before:
            return []
        return await self._reads.changed_since(user, before, self._max_conversations)

    # --- conversations -----------------------------------------------------------
    async def memberships(self, user: str, since: int | None = None) -> Memberships:
        position = await self._members.position(user)
        self._revs.setdefault(user, position)
        rows = await self._reads.rows(user, None, self._max_conversations)
        left = [] if since is None else await self._reads.left_since(user, since, self._max_conversations)
        return Memberships(position, {row["c"]: int(row.get("rev", 0)) for row in rows}, left)

    async def views(self, user: str, convs: Sequence[str] | None = None) -> tuple[int, list[View]]:
        ids = convs
        if ids is None:
            ids = [row["c"] for row in await self._reads.rows(user, None, self._max_conversations)]
        # A row never shows less than the head beside it: a user removed by an entry that a session has
        # been sent must not be attached again by a row that follows later. So the heads are read first.
        newest = await self._reads.newest(ids)
        docs = await self._reads.convs(list(newest))
        behind = [conv for conv, doc in docs.items() if newest[conv]["k"] > int(doc["folded"])]
        for conv in behind:
            await self._members.apply_changes(conv)
        if behind:
            docs |= await self._reads.convs(behind)
        return 0, await self._reads.views(user, ids, docs, newest, self._marks)

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
        moved = await self._accounts.set_read(user, conv, upto)
        # The user's own message has moved it already, and is written soon.
        return moved and upto > self._marks.get((conv, user), (0, 0))[0]

    async def set_notify(self, user: str, conv: str, level: str) -> None:
        await self._accounts.set_notify(user, conv, level)

    async def block(self, user: str, other: str, on: bool) -> None:
        await self._accounts.block(user, other, on)
        # Other workers read it again within BLOCK_TTL_S.
        self._members.mark_stale(dm_id(self._secret, user, other), other)

    async def acquainted(self, user: str, others: Sequence[str]) -> set[str]:
        return await self._reads.acquainted(user, others, self._max_conversations)

    async def dm_peer(self, user: str, conv: str) -> str | None:
        return await self._reads.dm_peer(user, conv)

    async def blockers(self, user: str, others: Sequence[str]) -> set[str]:
        return await self._reads.blockers(user, others)

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
    """The database cannot be used, such as for want of an index; the message is one line for the operator."""


async def prepare(mongo: Mongo) -> tuple[str, bytes]:
    """The store's id and secret; an empty database is set up, one in use is verified.

    :raises BrokenSchema: an index is missing: ``chatcore db migrate`` makes it.
    """
    meta = mongo["meta"]
    fields = {"store_id": 1, "secret": 1, "version": 1}
    # In this order: other workers may be setting it up.
    used = await mongo.do(mongo["entries"].find_one({}, {"_id": 1}))
    doc = await mongo.do(meta.find_one({"_id": "store"}, fields))
    if doc is None:
        if used is not None:
            raise BrokenSchema(f"the database {mongo.settings.database} has entries, but lost its id (meta.store)")
        await schema.migrate(mongo, lambda line: log.debug("database %s: %s", mongo.settings.database, line))
        log.info("set up the empty database %s", mongo.settings.database)
        fresh: Document = {
            "_id": "store",
            "store_id": secrets.token_urlsafe(9),
            "secret": secrets.token_bytes(32),
            "version": schema.SCHEMA_VERSION,
            "at": now_ms(),
        }
        with contextlib.suppress(DuplicateKeyError):
            await mongo.do(meta.insert_one(fresh))
        doc = await mongo.do(meta.find_one({"_id": "store"}, fields))
        if doc is None:
            raise Unavailable("the database does not keep what was written")
    if doc["version"] != schema.SCHEMA_VERSION:
        raise BrokenSchema(
            f"the database {mongo.settings.database} has schema version {doc['version']};"
            f" this program needs {schema.SCHEMA_VERSION}"
        )
    lacking = [one for one in await schema.check(mongo, usage=False) if one.broken]
    if lacking:
        names = ", ".join(f"{one.label} ({one.state})" for one in lacking)
        raise BrokenSchema(f"the database {mongo.settings.database} lacks indexes: {names}; run chatcore db migrate")
    return doc["store_id"], bytes(doc["secret"])
