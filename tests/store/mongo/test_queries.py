"""What the store asks: every query has a limit, a projection and an index, and the hot path one command.

FerretDB's ``explain`` says nothing about MongoDB's plans, so the shape of each command is held
against the indexes that the store makes.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest

from chatcore.cache.store import SharedCachedStore
from chatcore.chat.service import Chat
from chatcore.errors import NotFound
from chatcore.protocol import Typing
from chatcore.settings import CacheSettings, Settings
from chatcore.store.base import Opening, Store
from chatcore.store.mongo import schema
from chatcore.store.mongo.ops import BLOCK_TTL_S
from chatcore.store.mongo.reads import CHUNK

from ..harness import Database, change, message
from .parts import Worker, run, workers
from .test_rows import Holding

Filter = dict[str, Any]

#: Commands that read or write no documents of ours.
OTHER = {"hello", "ping", "listIndexes", "createIndexes", "endSessions", "getMore", "killCursors"}
INDEXES = {
    name: [(("_id", 1),), *(index.keys for index in schema.INDEXES if index.collection == name)]
    for name in ("entries", "members", "convs", "users", "names", "tokens", "blocks", "meta")
}
SHARD_KEYS = {name: keys[0][0] for name, keys in schema.SHARD_KEYS.items()}


async def _use_everything(a: Worker, b: Worker) -> None:
    """Call every method of the store, in every way that makes it ask something else."""
    alice, bob, eve = await a.user("alice"), await a.user("bob"), await a.user("eve")
    store = a.store
    group = await a.conversation(alice, bob, eve)
    dm = await a.conversation(alice, bob, kind="dm", title=None)
    channel = await a.conversation(alice, kind="channel", title="one")
    await a.conversation(alice, kind="channel", title="one")
    await store.open(Opening(alice.id, "again", "group", None, (), b"12345678"))
    await store.open(Opening(alice.id, "again", "group", None, (), b"12345678"))
    sends = [message(group, user, cid="x") for user in (alice, bob)]
    await asyncio.gather(
        *map(a.store.append, sends), *map(b.store.append, sends)
    )  # they contend: one of them reads back
    await asyncio.gather(*map(a.store.append, sends), *map(b.store.append, sends))
    await store.append(message(dm, bob))
    await store.append(change(group, alice, bob, "admin"))
    await store.append(change(channel, bob, bob, "member"))
    await store.append(change(channel, bob, bob, "none"))
    await store.append(change(group, eve, eve, "none"))
    await b.store.append(message(group, bob))  # it catches up
    refused = [store.append(change(group, alice, alice, "member")), store.append(message(group, eve))]
    await asyncio.gather(*refused, return_exceptions=True)
    convs = [group, dm, channel]
    await store.heads(convs)
    await store.entries(group, 0, 10, 10**6)
    for before, after in ((None, None), (3, None), (None, 1), (5, 1)):
        await store.page(alice.id, group, before, after, 2, 10**6)
    await store.position()
    mine = list((await store.memberships(alice.id)).revs)
    await store.memberships(bob.id, 0)
    await store.views(alice.id)
    await store.views(alice.id, mine)
    await store.role(alice.id, group)
    await store.member_count(group)
    await store.members(alice.id, group, None, 1)
    await store.members(alice.id, group, bob.id, 1)
    _, more = await store.channels(bob.id, "o", None, 1)
    await store.channels(bob.id, None, more, 1)
    await store.set_read(bob.id, group, 2)
    await store.set_notify(bob.id, group, "none")
    await store.acquainted(alice.id, [bob.id, eve.id])
    await store.blockers(alice.id, [bob.id, eve.id])
    await store.dm_peer(alice.id, group)
    await store.block(eve.id, alice.id, True)
    await store.blockers(alice.id, [bob.id, eve.id])
    await store.block(eve.id, alice.id, False)
    await store.account("alice")
    await store.account_by_id(alice.id)
    await store.users([alice.id])
    await store.mark_seen([alice.id])
    await store.seen([alice.id])
    for token in (b"1", b"2"):
        await store.add_token(token, alice.id, 2**50, "hash")
    await store.token(b"1")
    await store.extend_token(b"1", 2**50 + 1)
    await store.extend_token(b"1", 2**50)
    holding = Holding(dict.fromkeys(convs, 1), [alice.id, bob.id], [b"1", b"2"])
    for _ in range(2):
        await store.changes(0, holding)
        await store.append(change(group, alice, eve, "member"))
        await store.append(change(group, alice, eve, "none"))
    await store.revoke_token(b"2")
    await store.update_user(alice.id, "al", "other", b"1")
    await store.set_disabled("bob", True)
    # The background work.
    await store._sweep()
    await store._flush_marks()
    await store._ops.refresh_blocks()
    b.store.heard((await store.entries(group, 0, 1, 10**6))[0])
    await asyncio.sleep(2.2)
    a.store._members._recounts[group] = 0.0
    await store._apply_left_over()


class Counted:
    """A store, and which of its methods were called."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.called: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.called.add(name)
        return getattr(self.inner, name)


def _everything(database: Database) -> list[tuple[str, Filter]]:
    async def work() -> list[tuple[str, Filter]]:
        async with workers(database, 2) as [a, b]:
            counted: Any = Counted(a.store)
            a.store = counted
            await _use_everything(a, b)
            wanted = {name for name, _ in inspect.getmembers(Store, inspect.isfunction) if name[0] != "_"}
            assert wanted - counted.called <= {"start", "close", "store_id", "healthy"}
            a.store = counted.inner
        return [*a.sent.sent, *b.sent.sent]

    found: list[tuple[str, Filter]] = run(work())
    return found


def _filters(name: str, command: Filter) -> Iterator[tuple[Filter, Sequence[tuple[str, int]]]]:
    """What a command looks documents up by, and how it sorts them."""
    match name:
        case "find":
            yield command["filter"], list(command.get("sort", {}).items())
        case "findAndModify":
            yield command["query"], []
        case "update":
            yield from ((update["q"], []) for update in command["updates"])
        case "delete":
            yield from ((delete["q"], []) for delete in command["deletes"])
        case "aggregate":
            yield command["pipeline"][0].get("$match", {}), []
        case "insert":
            return
        case _:
            raise AssertionError(f"{name}: {command}")


def _branches(query: Filter) -> list[Filter]:
    """The alternatives of a query, each with what is common to all; what only excludes leads to nothing."""
    excludes = [key for key, value in query.items() if isinstance(value, dict) and value.keys() <= {"$ne", "$nin"}]
    rest = {key: value for key, value in query.items() if key not in ("$or", *excludes)}
    return [{**rest, **branch} for branch in query.get("$or", [{}])]


def _is_range(value: Any) -> bool:
    return isinstance(value, dict) and not (value.keys() <= {"$in"})


def _index_of(collection: str, query: Filter, sort: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...] | None:
    """An index that leads straight to what is asked for, in the order in which it is asked for: values for
    its first fields, then at most one range, and the rest as it is sorted."""
    for keys in INDEXES[collection]:
        names = [key for key, _ in keys]
        fixed = 0
        while fixed < len(names) and names[fixed] in query and not _is_range(query[names[fixed]]):
            fixed += 1
        ranged = fixed < len(names) and names[fixed] in query
        if not (fixed or ranged):
            continue
        order = [key for key, _ in sort]
        if not order or order == names[fixed : fixed + len(order)]:
            return keys
    return None


def test_every_query_has_an_index_a_limit_a_projection_and_its_shard(database: Database) -> None:
    commands = [(name, command) for name, command in _everything(database) if name not in OTHER]
    assert len(commands) > 200
    leading: set[tuple[str, str]] = set()
    across: set[tuple[str, str]] = set()
    for name, command in commands:
        collection = command[name]
        assert collection in INDEXES, command
        if name == "find":
            assert 0 < command["limit"] <= 1000, command
            assert command.get("projection"), command
            fields = command["projection"]
            assert any(value == 1 for key, value in fields.items()), f"what is asked for is named: {command}"
            assert command.get("singleBatch") or command.get("batchSize", 101) >= command["limit"], command
        if name == "aggregate" and {"$indexStats": {}} not in command["pipeline"]:
            assert any("$limit" in stage for stage in command["pipeline"]), command
        for whole, sort in _filters(name, command):
            for query in _branches(whole):
                if name == "aggregate" and collection == "meta":
                    continue  # whether it knows a stage
                if not query:
                    assert command["limit"] == 1 and (collection, "") in schema.EVERY_SHARD, command
                    across.add((collection, ""))
                    continue
                index = _index_of(collection, query, sort)
                assert index is not None, f"no index for {query}, sorted by {sort}, in {collection}"
                leading.add((collection, index[0][0]))
                key = SHARD_KEYS.get(collection, index[0][0])
                if key not in query or _is_range(query[key]):
                    across.add((collection, index[0][0]))
        if "hint" in command:
            assert tuple(command["hint"].items()) in INDEXES[collection], command
    assert across == set(schema.EVERY_SHARD), "those that ask every shard are named, with their bounds"
    unused = {(name, keys[0][0]) for name, all in INDEXES.items() for keys in all} - leading
    assert unused <= {("entries", "_id")}, "and there is no index for nothing"


def test_the_checks_above_find_what_is_wrong() -> None:
    assert _index_of("entries", {"c": "x"}, [("s", -1)])
    assert _index_of("entries", {"c": "x", "x": {"$gt": 1}}, [("x", 1)])
    assert _index_of("entries", {"c": "x"}, [("ts", 1)]) is None
    assert _index_of("entries", {"s": 1}, []) is None
    assert _index_of("entries", {"f": "x", "cid": "y"}, []) is None
    assert _index_of("members", {"role": "owner"}, []) is None
    assert _index_of("tokens", {"exp": {"$lt": 1}}, []) is None
    assert _index_of("convs", {"kind": "channel", "key": {"$gte": "a"}}, [("key", 1), ("_id", 1)])
    assert _index_of("convs", {"kind": "channel"}, [("title", 1)]) is None


def test_a_send_in_the_steady_state_is_one_insert_for_each_batch_and_no_read(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 1) as [a]:
            alice, bob = await a.user("alice"), await a.user("bob")
            group = await a.conversation(alice, bob)
            dm = await a.conversation(alice, bob, kind="dm", title=None)
            channel = await a.conversation(alice, kind="channel")
            await a.store.append(change(channel, bob, bob, "member"))
            convs = [group, dm, channel]
            for conv in convs:
                for user in (alice, bob):
                    await a.store.append(message(conv, user))
            began = len(a.sent.sent)
            rounds = 0
            until = asyncio.get_running_loop().time() + BLOCK_TTL_S + 0.5
            while asyncio.get_running_loop().time() < until:
                # Some hundred at once are one batch of each conversation; a change of theirs comes with them.
                sends = [message(conv, user) for conv in convs for user in (alice, bob) for _ in range(5)]
                await asyncio.gather(*map(a.store.append, sends))
                rounds += 1
                await asyncio.sleep(0.25)
            sent = a.sent.sent[began:]
            inserts = [command for name, command in sent if name == "insert"]
            assert len(inserts) == rounds * len(convs)
            assert all(len(command["documents"]) == 10 for command in inserts)
            # Beside it, and for all conversations together: marks, and the blocks of the dms in use.
            beside = [(name, command[name]) for name, command in sent if name != "insert"]
            assert set(beside) <= {("update", "members"), ("find", "blocks"), ("find", "meta")}
            assert len(beside) <= 2 * (BLOCK_TTL_S + 2)

    run(work())


def test_a_typing_signal_asks_nothing_and_the_first_one_for_two_fields(database: Database) -> None:
    """Each asked for the whole view of its conversation, in five to seven commands."""

    async def work() -> None:
        async with workers(database, 1) as [a]:
            alice, bob, carol = await a.user("alice"), await a.user("bob"), await a.user("carol")
            # Of three: where there are two, it might be a dm, in which one may have blocked the other.
            conv = await a.conversation(alice, bob, carol)
            cache = SharedCachedStore(a.store, CacheSettings(refresh=False))
            told: list[Any] = []
            settings = Settings.default()
            chat = Chat(settings, cache, cast(Any, Told(told)), cast(Any, Told(told)), cast(Any, None))
            began = len(a.sent.sent)
            for _ in range(20):
                await chat.typing(alice.id, Typing(conv))
            asked = [(command[name], command["projection"]) for name, command in a.sent.sent[began:] if name == "find"]
            assert asked == [("members", {"role": 1}), ("convs", {"members": 1})]
            assert len(told) == 40, "here and to the other workers"
            with pytest.raises(NotFound):
                await chat.typing((await a.user("eve")).id, Typing(conv))
            assert len(told) == 40

    run(work())


class Told:
    """The attached sessions, and the bus: what each was given."""

    def __init__(self, told: list[Any]) -> None:
        self.push_state = self.publish = lambda *what: told.append(what)


def test_a_hundred_entries_are_one_command_and_more_are_several(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 1) as [a]:
            alice = await a.user("alice")
            conv = await a.conversation(alice, title=None)
            await a.store.append(message(conv, alice))
            began = len(a.sent.of("insert"))
            await asyncio.gather(*(a.store.append(message(conv, alice)) for _ in range(250)))
            assert [len(command["documents"]) for command in a.sent.of("insert")[began:]] == [100, 100, 50]
            for command in a.sent.of("insert")[began:]:
                assert command["ordered"] is True
                assert command["writeConcern"] == {"w": "majority", "j": True}

    run(work())


def test_many_conversations_are_asked_for_in_lots(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 1) as [a]:
            lasts = {f"conv{i}": 1 for i in range(CHUNK + 1)}
            began = len(a.sent.sent)
            assert (await a.store.changes(0, Holding(lasts))).heads == []
            step = a.store.mongo.or_pairs
            assert len(a.sent.sent) - began == -(-len(lasts) // step)
            assert all(len(command["filter"]["$or"]) <= step for command in a.sent.of("find")[-20:])

    run(work())
