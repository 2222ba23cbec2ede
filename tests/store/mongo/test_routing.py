"""A replica set, simulated on the wire: which member gets which command, and what the store makes of the answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from chatcore.errors import Unavailable
from chatcore.store.append import Row
from chatcore.store.base import User
from chatcore.store.mongo.ops import to_document

from ..harness import Database, message
from .parts import run, workers
from .replica import HANG_UP, NO_MAJORITY, NOT_PRIMARY, Document, Replicas, cursor, replicas

ALICE = User("alice", "Alice")
SETTINGS: dict[str, Any] = {"timeout_ms": 2000, "server_selection_ms": 2000}


@pytest.fixture(scope="module")
def running() -> Iterator[Replicas]:
    """Stopping it takes two seconds."""
    with replicas() as found:
        yield found


@pytest.fixture
def rs(running: Replicas) -> Replicas:
    running.reset()
    return running


def _database(rs: Replicas) -> Database:
    return Database(rs.url, "db")


def _entries(first: int, last: int) -> list[Document]:
    return [to_document(Row(message("conv", ALICE, cid=f"cid-{s}"), s, 0, s, s)) for s in range(first, last + 1)]


def _inserts(rs: Replicas) -> list[Document]:
    return rs.primary.of("insert", "entries")


def _read_backs(rs: Replicas) -> list[Document]:
    """Entries looked for by their cids."""
    return [find for find in rs.primary.of("find", "entries") if "cid" in find["filter"]]


def test_writes_are_acknowledged_by_a_majority_with_its_journal_and_never_sent_again(rs: Replicas) -> None:
    async def work() -> None:
        async with workers(_database(rs), 1, SETTINGS) as [a]:
            await a.store.append(message("conv", ALICE))
            await a.store.mark_seen(["alice"])
        writes = [c for c in rs.primary.sent if next(iter(c)) in ("insert", "update", "delete", "findAndModify")]
        assert len(writes) >= 2
        for command in writes:
            assert command["writeConcern"] == {"w": "majority", "j": True}
            assert "txnNumber" not in command, "the driver would send it again"
            assert command["maxTimeMS"] > 0
        assert all(command["ordered"] for command in _inserts(rs))
        assert not any(next(iter(c)) in ("insert", "update") for c in rs.secondary.sent)

    run(work())


def test_reads_are_of_what_a_majority_has_and_from_the_primary(rs: Replicas) -> None:
    async def work() -> None:
        async with workers(_database(rs), 1, SETTINGS) as [a]:
            await a.store.append(message("conv", ALICE))
            rs.docs["entries"] = _entries(1, 2)[::-1]
            await a.store.heads(["conv"])
            await a.store.entries("conv", 0, 10, 10**6)
            await a.store.page("alice", "conv", None, None, 2, 10**6)
            await a.store.memberships("alice")
            await a.store.account_by_id("alice")
        reads = [c for c in rs.primary.sent if next(iter(c)) in ("find", "aggregate") and "$indexStats" not in str(c)]
        assert len(reads) > 8
        for command in reads:
            assert command["readConcern"]["level"] == "majority", command
            assert command.get("$readPreference", {"mode": "primary"}) == {"mode": "primary"}
        assert [c for c in rs.secondary.sent if next(iter(c)) in ("find", "aggregate")] == []

    run(work())


def test_many_ends_are_one_query_that_reads_no_log(rs: Replicas) -> None:
    async def work() -> None:
        async with workers(_database(rs), 1, SETTINGS) as [a]:
            rs.script = lambda c: (
                cursor({"_id": "conv", "e": _entries(7, 7)}, {"_id": "empty", "e": []}) if "aggregate" in c else None
            )
            assert await a.store.heads(["conv", "empty", "none"]) == {"conv": 7, "empty": 0, "none": 0}
            [query] = rs.primary.of("aggregate", "convs")
            match, limit, project, lookup = query["pipeline"]
            assert match == {"$match": {"_id": {"$in": ["conv", "empty", "none"]}}}
            assert (limit, project) == ({"$limit": 3}, {"$project": {"_id": 1}})
            assert (lookup["$lookup"]["localField"], lookup["$lookup"]["foreignField"]) == ("_id", "c")
            assert lookup["$lookup"]["pipeline"][:2] == [{"$sort": {"s": -1}}, {"$limit": 1}]

    run(work())


@pytest.mark.parametrize("allowed", [False, True])
def test_history_comes_from_a_secondary_only_if_the_setting_says_so(rs: Replicas, allowed: bool) -> None:
    async def work() -> None:
        settings = {**SETTINGS, "history_from_secondaries": allowed}
        async with workers(_database(rs), 1, settings) as [a]:
            rs.docs["entries"] = _entries(1, 5)[::-1]
            page = await a.store.page("alice", "conv", None, None, 5, 10**6)
            assert [e.seq for e in page.entries] == [1, 2, 3, 4, 5]
            await a.store.entries("conv", 0, 5, 10**6)
            await a.store.heads(["conv"])
        asked = rs.secondary.of("find", "entries")
        assert len(asked) == allowed
        for command in asked:
            assert command["filter"] == {"c": "conv", "s": {"$gte": 1, "$lt": 6}}
            assert command["$readPreference"] == {"mode": "secondaryPreferred", "maxStalenessSeconds": 90}
            assert command["readConcern"] == {"level": "majority"}
        # The head, and the membership, come from the primary.
        assert rs.secondary.of("find", "members") == []

    run(work())


def test_what_a_secondary_has_not_yet_is_read_from_the_primary(rs: Replicas) -> None:
    async def work() -> None:
        async with workers(_database(rs), 1, {**SETTINGS, "history_from_secondaries": True}) as [a]:
            everything = _entries(1, 5)[::-1]

            def script(command: Document) -> Document | None:
                if command.get("find") != "entries":
                    return None
                behind = command.get("$readPreference", {}).get("mode") == "secondaryPreferred"
                return cursor(*(everything[2:] if behind else everything)[: command["limit"]])

            rs.script = script
            page = await a.store.page("alice", "conv", None, None, 5, 10**6)
            assert [e.seq for e in page.entries] == [1, 2, 3, 4, 5]
            assert len(rs.secondary.of("find", "entries")) == 1

    run(work())


def _failing_once(rs: Replicas, failure: Document, landed: bool) -> None:
    """The next insert fails; whether it has landed all the same."""
    entries: list[Document] = _entries(1, 1)
    left = [failure]

    def script(command: Document) -> Document | None:
        if command.get("insert") == "entries":
            if not left:
                entries.extend(command["documents"])
                return None
            if landed:
                entries.extend(command["documents"])
            return left.pop()
        if command.get("find") == "entries":
            query = command["filter"]
            wanted = query.get("cid", {}).get("$in")
            found = [doc for doc in entries[::-1] if wanted is None or doc["cid"] in wanted]
            return cursor(*([] if "x" in query else found)[: command["limit"]])
        return None

    rs.script = script


FAILURES = {
    "not the primary": NOT_PRIMARY,
    "no majority in time": NO_MAJORITY,
    "too slow": {"ok": 0, "code": 50, "codeName": "MaxTimeMSExpired", "errmsg": "operation exceeded time limit"},
    "lost connection": HANG_UP,
}


@pytest.mark.parametrize("landed", [True, False], ids=["landed", "did not land"])
@pytest.mark.parametrize("failure", FAILURES)
def test_an_insert_that_failed_is_looked_for_and_not_sent_again_blindly(
    rs: Replicas, failure: str, landed: bool
) -> None:
    async def work() -> None:
        async with workers(_database(rs), 1, SETTINGS) as [a]:
            await a.store.append(message("conv", ALICE, cid="before"))
            before = len(_inserts(rs))
            _failing_once(rs, FAILURES[failure], landed)
            done = await a.store.append(message("conv", ALICE, cid="unsure"))
            assert (done.seq, done.dup) == (2, landed)
            assert len(_inserts(rs)) - before == (1 if landed else 2)
            [looked] = _read_backs(rs)
            assert looked["filter"] == {"c": "conv", "f": "alice", "cid": {"$in": ["unsure"]}}
            assert looked["hint"] == {"c": 1, "f": 1, "cid": 1}
            # It was read back before anything was sent again.
            order = [next(iter(c)) for c in rs.primary.sent if c is looked or c in _inserts(rs)[before:]]
            assert order == (["insert", "find"] if landed else ["insert", "find", "insert"])
            assert [e.seq for e in a.announced][-1] == 2

    run(work())


def test_who_was_told_unavailable_is_found_when_there_is_a_primary_again(rs: Replicas) -> None:
    async def work() -> None:
        async with workers(_database(rs), 1, {"timeout_ms": 1500, "server_selection_ms": 1500}) as [a]:
            await a.store.append(message("conv", ALICE, cid="before"))
            rs.script = lambda c: NOT_PRIMARY if next(iter(c)) in ("insert", "find") else None
            with pytest.raises(Unavailable):
                await a.store.append(message("conv", ALICE, cid="unsure"))
            assert not a.store.healthy
            rs.primary, rs.secondary = rs.secondary, rs.primary
            _failing_once(rs, NOT_PRIMARY, True)
            rs.docs["entries"] = []

            async def sent() -> bool:
                try:
                    return (await a.store.append(message("conv", ALICE, cid="unsure"))).seq == 2
                except Unavailable:
                    return False

            await a.until(sent, 15.0)

    run(work())


def test_what_decides_is_read_no_older_than_all_that_was_seen(rs: Replicas) -> None:
    """A majority read may go back in time over an election: a refusal must not rest on that."""

    async def work() -> None:
        async with workers(_database(rs), 1, SETTINGS) as [a]:
            seen = rs.now()
            await a.store.append(message("conv", ALICE, cid="before"))
            _failing_once(rs, NO_MAJORITY, False)
            await a.store.append(message("conv", ALICE, cid="unsure"))
            finds = [c for c in rs.primary.of("find", "entries") if "sort" in c or "cid" in c["filter"]]
            assert len(finds) >= 3  # heads, changes, the entry itself
            for command in finds:
                assert command["readConcern"]["level"] == "majority"
                assert command["readConcern"]["afterClusterTime"] >= seen
            [looked] = _read_backs(rs)
            [failed] = _inserts(rs)[1:2]
            assert rs.primary.sent.index(failed) < rs.primary.sent.index(looked)
            assert a.store.mongo.listener.operation_time is not None

    run(work())
