"""Writes on accounts, tokens, marks and settings: each is one document, or safe to repeat."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from typing import Final

from bson.datetime_ms import DatetimeMS
from pymongo import UpdateOne
from pymongo.errors import DuplicateKeyError

from ...common.clock import now_ms
from ...errors import Conflict, NotFound, Unauthenticated
from ...protocol import MEMBER_ROLES
from ..base import User
from ..names import name_key
from .client import Document, Mongo
from .members import MemberRows, row_id
from .reads import CHUNK, Marks, MongoReads

# Updates in one command. More would hold more connections of a FerretDB than it has, for ever;
# and a command that takes long keeps others waiting.
UPDATES: Final = 20
# Tries to take a name that other users take and leave meanwhile.
NAME_TRIES: Final = 3


class Accounts:
    """One per store."""

    def __init__(self, mongo: Mongo, members: MemberRows, reads: MongoReads) -> None:
        self._mongo = mongo
        self._members = members
        self._reads = reads

    async def _reserve(self, name: str, user: str) -> None:
        """Take a name for a user; names are unique by being keys.

        :raises Conflict: another user has it.
        """
        key = name_key(name)
        for _ in range(NAME_TRIES):
            try:
                await self._mongo.do(self._mongo["names"].insert_one({"_id": key, "u": user}))
                return
            except DuplicateKeyError:
                holder = await self._mongo.do(self._mongo["names"].find_one({"_id": key}, {"u": 1}))
            if holder is not None and holder["u"] == user:
                return
        raise Conflict("this name is taken")

    async def add_user(self, name: str, password: str) -> User:
        """A new account."""
        user = User(secrets.token_urlsafe(9), name)
        doc: Document = {
            "_id": user.id,
            "name": name,
            "key": name_key(name),
            "password": password,
            "created": now_ms(),
            "disabled": False,
            "rev": 0,
            "open": 0,
            "at": 0,
            "settled": 0,
        }
        # The account before its name: without a name it is not found, and no name is ever without an account.
        await self._mongo.do(self._mongo["users"].insert_one(doc))
        try:
            await self._reserve(name, user.id)
        except Conflict:
            await self._mongo.do(self._mongo["users"].delete_one({"_id": user.id}))
            raise
        return user

    async def update_user(self, user: str, name: str | None, password: str | None, keep: bytes) -> User:
        """Another name, another password, or both."""
        before = await self._mongo.do(self._mongo["users"].find_one({"_id": user}, {"name": 1, "key": 1}))
        if before is None:
            raise NotFound("no such user")
        fields: Document = {}
        if name is not None:
            await self._reserve(name, user)
            fields |= {"name": name, "key": name_key(name)}
        if password is not None:
            fields["password"] = password
            # Before it, so that none is left if this worker dies before it comes to the second time; and after
            # it, for tokens that were made with the old password meanwhile.
            await self._end_tokens(user, keep)
        if fields:
            await self._mongo.do(self._mongo["users"].update_one({"_id": user}, {"$set": fields}))
        if name is not None and name_key(name) != before["key"]:
            await self._mongo.do(self._mongo["names"].delete_one({"_id": before["key"], "u": user}))
        if password is not None:
            await self._end_tokens(user, keep)
        return User(user, name if name is not None else before["name"])

    async def _end_tokens(self, user: str, keep: bytes = b"") -> None:
        """All of a user's tokens but one (asks every shard)."""
        await self._mongo.do(self._mongo["tokens"].delete_many({"u": user, "_id": {"$ne": keep.hex()}}))

    async def set_disabled(self, name: str, disabled: bool) -> str:
        """Disable an account, which ends its tokens, or enable it again; returns its id."""
        account = await self._reads.account(name)
        if account is None:
            raise NotFound(f"no such user: {name}")
        await self._mongo.do(self._mongo["users"].update_one({"_id": account.id}, {"$set": {"disabled": disabled}}))
        if disabled:
            await self._end_tokens(account.id)
        return account.id

    async def add_token(self, token_hash: bytes, user: str, expires: int, password: str) -> None:
        """A new session token, unless the password was changed since it was verified."""
        # The token first: a change of the password after the check below finds it, and deletes it.
        gone = DatetimeMS(expires)
        doc = {"_id": token_hash.hex(), "u": user, "exp": expires, "gone": gone}
        await self._mongo.do(self._mongo["tokens"].insert_one(doc))
        query = {"_id": user, "password": password, "disabled": False}
        if await self._mongo.do(self._mongo["users"].find_one(query, {"_id": 1})) is None:
            await self.revoke_token(token_hash)
            raise Unauthenticated("wrong name or password")

    async def extend_token(self, token_hash: bytes, expires: int) -> bool:
        """Tokens slide while they are used (False: it was revoked)."""
        gone = DatetimeMS(expires)
        done = await self._mongo.do(
            self._mongo["tokens"].update_one(
                {"_id": token_hash.hex(), "exp": {"$lt": expires}}, {"$set": {"exp": expires, "gone": gone}}
            )
        )
        if done.matched_count:
            return True
        return await self._mongo.do(self._mongo["tokens"].find_one({"_id": token_hash.hex()}, {"_id": 1})) is not None

    async def revoke_token(self, token_hash: bytes) -> None:
        """End one token."""
        await self._mongo.do(self._mongo["tokens"].delete_one({"_id": token_hash.hex()}))

    async def sweep_tokens(self, limit: int) -> None:
        """Remove expired tokens, where the database does not do it by itself (asks every shard)."""
        cursor = self._mongo["tokens"].find({"gone": {"$lt": DatetimeMS(now_ms())}}, {"_id": 1}, batch_size=limit)
        ids = [doc["_id"] for doc in await self._mongo.do(cursor.limit(limit).to_list(limit))]
        if ids:
            await self._mongo.do(self._mongo["tokens"].delete_many({"_id": {"$in": ids}}))

    async def mark_seen(self, users: Sequence[str]) -> None:
        """They were online until now."""
        for at in range(0, len(users), CHUNK):
            some = {"_id": {"$in": list(users[at : at + CHUNK])}}
            await self._mongo.do(self._mongo["users"].update_many(some, {"$set": {"seen": now_ms()}}))

    # --- rows of members that no entry decides --------------------------------------
    async def set_read(self, user: str, conv: str, upto: int) -> bool:
        """Move a read mark forward (True: it moved)."""
        await self._member(conv, user)
        if upto == 0:
            return False
        msgs = await self._reads.msgs_at(conv, upto)
        if msgs is None:
            raise NotFound("upto is beyond the newest entry")
        query = {"_id": row_id(conv, user), "c": conv, "read": {"$lt": upto}}
        if await self._mongo.do(self._mongo["members"].find_one(query, {"_id": 1})) is None:
            return False
        async with self._members.row_write(user) as rev:
            fields = {"read": upto, "read_n": msgs, "rev": rev}
            done = await self._mongo.do(self._mongo["members"].update_one(query, {"$set": fields}))
        return bool(done.matched_count)

    async def sent(self, marks: Marks) -> None:
        """Sending moved these marks. Nothing announces that: the entries are announced."""
        updates = [
            UpdateOne(
                {"_id": row_id(conv, user), "c": conv, "read": {"$lt": seq}}, {"$set": {"read": seq, "read_n": msgs}}
            )
            for (conv, user), (seq, msgs) in marks.items()
        ]
        for at in range(0, len(updates), UPDATES):
            await self._mongo.do(self._mongo["members"].bulk_write(updates[at : at + UPDATES], ordered=False))

    async def set_notify(self, user: str, conv: str, level: str) -> None:
        """Which messages notify the user."""
        await self._member(conv, user)
        query = {"_id": row_id(conv, user), "c": conv, "notify": {"$ne": level}}
        if await self._mongo.do(self._mongo["members"].find_one(query, {"_id": 1})) is not None:
            async with self._members.row_write(user) as rev:
                update = {"$set": {"notify": level, "rev": rev}}
                await self._mongo.do(self._mongo["members"].update_one(query, update))

    async def block(self, user: str, other: str, on: bool) -> None:
        """Refuse direct messages from another user, or allow them again."""
        if await self._mongo.do(self._mongo["users"].find_one({"_id": other}, {"_id": 1})) is None:
            raise NotFound("no such user")
        key = {"_id": f"{user}:{other}"}
        if on:
            with contextlib.suppress(DuplicateKeyError):  # it is there, or came at the same moment
                await self._mongo.do(self._mongo["blocks"].insert_one({**key, "at": now_ms()}))
        else:
            await self._mongo.do(self._mongo["blocks"].delete_one(key))

    async def _member(self, conv: str, user: str) -> None:
        if await self._members.role(conv, user) not in MEMBER_ROLES:
            raise NotFound("no such conversation")
