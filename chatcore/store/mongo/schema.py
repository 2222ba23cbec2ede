"""What is in the database: collections, indexes, shard keys; how they are made and checked.

``entries``: one document for each entry of a log::

    {c: conversation, s: seq, t: type, f: sender, cid, d: digest (hex), ts, n: messages so far,
     l: seq of the newest message, b: its other fields (JSON), x: s again, in changes only}

Two unique indexes decide between writers (log.md). They begin with the shard key
``c``: a unique index of a sharded collection must, and hashed keys forbid unique
ones. Conversation ids are random, so ranges of them spread.

``members``: one for each member and conversation, the projection of its changes::

    {_id: "conv:user", c, u, role, as_of, read, read_n, notify, rev}

``convs`` {_id, kind, title, key, title_as_of, a, b, created, folded}, ``users`` {_id, name, key,
password, created, disabled, seen, rev}, ``names`` {_id: key, u}, ``tokens`` {_id: hash, u, exp, gone},
``blocks`` {_id: "user:other"}, ``meta`` {_id: "store", …}.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pymongo.errors import OperationFailure, PyMongoError

from .client import Mongo

log = logging.getLogger("chatcore.store")

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Index:
    """One index. ``optional`` ones save work; without them the rest is right but slower.

    ``why`` is shown by ``db check``.
    """

    collection: str
    keys: tuple[tuple[str, int], ...]
    why: str
    unique: bool = False
    optional: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    #: What to make where the server knows no such option.
    fallback: bool = True

    @property
    def name(self) -> str:
        """As it is called in the database."""
        return "_".join(key for key, _ in self.keys)


INDEXES: Final = (
    Index("entries", (("c", 1), ("s", 1)), "the order of a log, and its pages", unique=True),
    Index("entries", (("c", 1), ("f", 1), ("cid", 1)), "exactly once", unique=True),
    Index(
        "entries",
        (("c", 1), ("x", 1)),
        "changes of members and titles that are not projected yet",
        options={"partialFilterExpression": {"x": {"$exists": True}}},
    ),
    Index("members", (("u", 1), ("c", 1)), "the conversations of a user (asks every shard)"),
    Index("members", (("c", 1), ("u", 1)), "the members of a conversation"),
    Index(
        "convs",
        (("kind", 1), ("key", 1), ("_id", 1)),
        "the directory of channels (asks every shard)",
        options={"partialFilterExpression": {"kind": "channel"}},
    ),
    Index("tokens", (("u", 1),), "the tokens of a user, to revoke them"),
    Index(
        "tokens",
        (("gone", 1),),
        "expired tokens are removed by the database",
        optional=True,
        options={"expireAfterSeconds": 0},
        fallback=False,
    ),
)

#: Collection -> shard key. The others stay on one shard: they are small, or asked for by _id alone.
SHARD_KEYS: Final = {
    "entries": (("c", 1),),
    "members": (("c", 1),),
    "users": (("_id", "hashed"),),
    "tokens": (("_id", "hashed"),),
}


@dataclass(slots=True)
class Finding:
    """One index, as ``db check`` reports it: ok, missing, different, unused, unknown."""

    index: Index
    state: str
    detail: str = ""


async def existing(mongo: Mongo, collection: str) -> dict[tuple[tuple[str, Any], ...], dict[str, Any]]:
    """The indexes of a collection by their keys."""
    found: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}
    try:
        async for spec in await mongo[collection].list_indexes():
            found[tuple((key, int(way) if not isinstance(way, str) else way) for key, way in spec["key"].items())] = (
                dict(spec)
            )
    except OperationFailure:
        return {}  # there is no such collection yet
    return found


async def check(mongo: Mongo) -> list[Finding]:
    """Which indexes are there, and which the database says nobody has used since it started."""
    findings: list[Finding] = []
    for collection in dict.fromkeys(index.collection for index in INDEXES):
        there = await existing(mongo, collection)
        used = await _used(mongo, collection)
        for index in (one for one in INDEXES if one.collection == collection):
            spec = there.get(index.keys)
            if spec is None:
                findings.append(Finding(index, "optional" if index.optional else "missing"))
            elif bool(spec.get("unique")) != index.unique:
                findings.append(Finding(index, "different", "unique is not what it must be"))
            elif used is not None and not used.get(spec["name"], 0):
                findings.append(Finding(index, "unused", "since the server started"))
            else:
                findings.append(Finding(index, "ok"))
    return findings


async def _used(mongo: Mongo, collection: str) -> dict[str, int] | None:
    try:
        cursor = await mongo[collection].aggregate([{"$indexStats": {}}])
        return {stat["name"]: int(stat["accesses"]["ops"]) async for stat in cursor}
    except PyMongoError:
        return None  # not every server of this protocol tells


async def migrate(mongo: Mongo) -> list[str]:
    """Make what is missing; returns what was done, in words.

    :raises PyMongoError: an index that must be could not be made.
    """
    done: list[str] = []
    for finding in await check(mongo):
        index = finding.index
        if finding.state not in ("missing", "optional"):
            continue
        label = f"{index.collection}({', '.join(key for key, _ in index.keys)})"
        try:
            await mongo[index.collection].create_index(
                list(index.keys), name=index.name, unique=index.unique, **index.options
            )
            done.append(f"made index {label}")
        except OperationFailure as exc:
            if not index.options:
                raise
            if index.fallback:
                await mongo[index.collection].create_index(list(index.keys), name=index.name, unique=index.unique)
                done.append(f"made index {label} without {', '.join(index.options)}: {exc.details and exc.code}")
            else:
                done.append(f"left out index {label}: this server has no {', '.join(index.options)}")
    return done


def missing(findings: list[Finding]) -> list[Finding]:
    """Those without which the server must not start."""
    return [one for one in findings if one.state in ("missing", "different")]


def shard_plan(database: str) -> list[str]:
    """The commands that shard the database, and why these keys."""
    lines = [
        "# A conversation lives on one shard: its order and its exactly-once rest on unique indexes, which",
        "# must begin with the shard key. Conversation ids are random, so ranges of them spread evenly.",
        "# Limits: one conversation cannot be larger or busier than one shard; the conversations of a user",
        "# and the directory of channels ask every shard (bounded: 1,000 and one page).",
        f'sh.enableSharding("{database}")',
    ]
    for collection, keys in SHARD_KEYS.items():
        shape = ", ".join(f"{key}: {way if isinstance(way, int) else repr(way)}" for key, way in keys)
        lines.append(f'sh.shardCollection("{database}.{collection}", {{ {shape} }})')
    return lines
