"""What is in the database: collections, indexes, shard keys; how they are made and checked.

``entries``: one document for each entry of a log::

    {c: conversation, s: seq, t: type, f: sender, cid, d: digest (hex), ts, n: messages so far,
     l: seq of the newest message, k: of the newest change of members or title,
     b: its other fields (JSON), x: s again, in those changes only}

Two unique indexes decide between writers (docs/log.md). They begin with the shard key
``c``: a unique index of a sharded collection must, and hashed keys forbid unique
ones. Conversation ids are random, so ranges of them spread.

``members``: one for each member and conversation, the projection of its changes::

    {_id: "conv:user", c, u, role, as_of, read, read_n, notify, rev}

``convs`` {_id, kind, title, key, title_as_of, a, b, created, digest, folded, members, opened}
(``folded``: the newest change that is applied to the rows of members and to the title),
``users`` {_id, name, key, password, created, disabled, seen, rev, open, at, settled} (the last four:
:meth:`.members.Members.row_write`), ``names`` {_id: key, u}, ``tokens`` {_id: hash, u, exp, gone},
``blocks`` {_id: "user:other"}, ``meta`` {_id: "store", …}.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from .client import Document, Mongo, ServerRefusal

log = logging.getLogger("chatcore.store")

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Index:
    """One index. ``optional`` ones save work; without them the rest is right but slower.

    ``why`` is shown by ``db check``; ``options`` are left out where the server knows no such thing.
    """

    collection: str
    keys: tuple[tuple[str, int], ...]
    why: str
    unique: bool = False
    optional: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As it is called in the database."""
        return "_".join(key for key, _ in self.keys)

    @property
    def label(self) -> str:
        """As people read it."""
        return f"{self.collection}({', '.join(key for key, _ in self.keys)})"

    @property
    def shape(self) -> str:
        """What to make, in a few words."""
        options = [*(["unique"] if self.unique else []), *(f"{key}: {value}" for key, value in self.options.items())]
        return f"index {self.label}" + (f" ({', '.join(options)})" if options else "")


INDEXES: Final = (
    Index("entries", (("c", 1), ("s", 1)), "the order of a log, and its pages", unique=True),
    Index("entries", (("c", 1), ("f", 1), ("cid", 1)), "exactly once", unique=True),
    Index(
        "entries",
        (("c", 1), ("x", 1)),
        "changes of members and titles that are not applied yet",
        options={"partialFilterExpression": {"x": {"$exists": True}}},
    ),
    Index("members", (("u", 1), ("c", 1)), "the conversations of a user (asks every shard)"),
    Index("members", (("c", 1), ("u", 1)), "the members of a conversation"),
    Index(
        "convs",
        (("kind", 1), ("key", 1), ("_id", 1)),
        "the directory of channels",
        options={"partialFilterExpression": {"kind": "channel"}},
    ),
    Index("tokens", (("u", 1),), "the tokens of a user, to revoke them"),
    Index(
        "tokens",
        (("gone", 1),),
        "expired tokens, which the database removes by itself if it can",
        optional=True,
        options={"expireAfterSeconds": 0},
    ),
)

#: Collection -> shard key. The others stay on one shard: they are small, or asked for by _id alone.
SHARD_KEYS: Final = {
    "entries": (("c", 1),),
    "members": (("c", 1),),
    "users": (("_id", "hashed"),),
    "tokens": (("_id", "hashed"),),
}


#: What asks every shard, by collection and leading field: why, and what bounds it.
EVERY_SHARD: Final = {
    ("members", "u"): "a user's conversations: up to limits.conversations_per_user, at a log-in, an open or a join",
    ("tokens", "u"): "a user's tokens, to revoke them: when a password changes or an account is disabled",
    ("tokens", "gone"): "expired tokens, where the database does not remove them: some hundred a minute",
    ("entries", ""): "whether there is any entry: one, when a worker starts",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One index, as ``db check`` reports it.

    ``state``: ok, missing, different (of the same keys), optional (missing, but not needed), unused
    (since the server started), or foreign (``index`` is None: not one of ours).
    ``plan``: what ``db migrate`` would do; ``remedy``: what it leaves to the operator.
    """

    label: str
    state: str
    why: str
    plan: str = ""
    remedy: str = ""
    index: Index | None = None

    @property
    def broken(self) -> bool:
        """The server must not start like this."""
        return self.state in ("missing", "different")


async def existing(mongo: Mongo, collection: str) -> dict[tuple[tuple[str, Any], ...], Document]:
    """The indexes of a collection by their keys; none, if there is no such collection yet."""
    specs: list[Document] = await mongo.do(_list(mongo, collection))
    return {tuple((key, _way(way)) for key, way in spec["key"].items()): spec for spec in specs}


async def _list(mongo: Mongo, collection: str) -> list[Document]:
    return [dict(spec) async for spec in await mongo[collection].list_indexes()]


def _way(way: Any) -> Any:
    return way if isinstance(way, str) else int(way)


async def check(mongo: Mongo, *, usage: bool = True) -> list[Finding]:
    """Which indexes are there, and (``usage``) which were not used since the server started.

    :raises Unavailable: the server does not answer.
    """
    findings: list[Finding] = []
    for collection in dict.fromkeys(index.collection for index in INDEXES):
        there = await existing(mongo, collection)
        used = await _used(mongo, collection) if usage else None
        ours = [one for one in INDEXES if one.collection == collection]
        findings += [_finding(index, there.get(index.keys), used) for index in ours]
        known = {index.keys for index in ours} | {(("_id", 1),)}
        for keys, spec in there.items():
            if keys not in known and not any(way == "hashed" for _, way in keys):
                label = f"{collection}({', '.join(key for key, _ in keys)})"
                why = f"not of chatcore: every write keeps {spec['name']} up to date, no query needs it"
                findings.append(Finding(label, "foreign", why))
    return findings


def _finding(index: Index, spec: Document | None, used: Mapping[str, int] | None) -> Finding:
    if spec is None:
        state = "optional" if index.optional else "missing"
        return Finding(index.label, state, index.why, f"make {index.shape}", index=index)
    if bool(spec.get("unique")) != index.unique:
        wrong = "not unique, but must be" if index.unique else "unique, but must not be"
        remedy = f"it is {wrong}; drop {index.collection}.{spec['name']} by hand, then migrate makes it"
        return Finding(index.label, "different", index.why, "leave it alone", remedy, index)
    if used is not None and not used.get(spec["name"], 0):
        return Finding(index.label, "unused", index.why, index=index)
    return Finding(index.label, "ok", index.why, index=index)


async def _used(mongo: Mongo, collection: str) -> dict[str, int] | None:
    """How often each index was used, on all shards together; None if the server does not tell."""
    used: dict[str, int] = {}
    try:
        for stat in await mongo.do(_stats(mongo, collection), may_refuse=True):
            used[stat["name"]] = used.get(stat["name"], 0) + int(stat["accesses"]["ops"])
    except ServerRefusal:
        return None
    return used


async def _stats(mongo: Mongo, collection: str) -> list[Document]:
    return await (await mongo[collection].aggregate([{"$indexStats": {}}])).to_list(None)


async def migrate(mongo: Mongo, tell: Callable[[str], None], limit_s: float | None = None) -> None:
    """Make what is missing.

    :param tell: called with a line of text before an index is made (it may take long), and after.
    :param limit_s: for each index; None: as any operation.
    :raises Unavailable: an index that must be could not be made.
    """
    for finding in await check(mongo, usage=False):
        index = finding.index
        if index is None or finding.state not in ("missing", "optional"):
            continue
        tell(f"making {index.shape}")
        try:
            await _make(mongo, index, index.options, limit_s)
            tell(f"made {index.shape}")
        except ServerRefusal as exc:
            if not index.options:
                raise
            await _make(mongo, index, {}, limit_s)
            tell(f"made index {index.label} without {', '.join(index.options)}: {exc.message}")


async def _make(mongo: Mongo, index: Index, options: Mapping[str, Any], limit_s: float | None) -> None:
    collection = mongo[index.collection]
    making = collection.create_index(list(index.keys), name=index.name, unique=index.unique, **options)
    await mongo.do(making, limit_s, may_refuse=bool(options))


def shard_plan(database: str) -> list[str]:
    """The commands that shard the database, and why these keys."""
    lines = [
        "# In the shell, with MongoDB 5.1 or newer, while no worker runs.",
        "# A conversation lives on one shard: its order and its exactly-once rest on unique indexes, which",
        "# must begin with the shard key. Conversation ids are random, so ranges of them spread evenly.",
        "# Limits: one conversation cannot be larger or busier than one shard. What asks every shard:",
        *(f"#   {collection}: {why}" for (collection, _), why in EVERY_SHARD.items()),
        "# convs (with the directory of channels), names, blocks and meta stay on the first shard.",
        f'sh.enableSharding("{database}")',
    ]
    for collection, keys in SHARD_KEYS.items():
        shape = ", ".join(f"{key}: {way if isinstance(way, int) else repr(way)}" for key, way in keys)
        if not any(index.keys[: len(keys)] == keys for index in INDEXES if index.collection == collection):
            # Made by itself only while the collection is empty.
            lines.append(f'db.getSiblingDB("{database}").{collection}.createIndex({{ {shape} }})')
        lines.append(f'sh.shardCollection("{database}.{collection}", {{ {shape} }})')
    return lines
