"""Reading: pages, views, unread counts, what changed; and no query without its index."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import apsw
import msgspec
import orjson
import pytest

from chatcore.entries import NewEntry
from chatcore.errors import Conflict, NotFound
from chatcore.store.base import Opening, User, View
from chatcore.store.sqlite import accounts, reads
from chatcore.store.sqlite.engine import Engine
from chatcore.store.sqlite.index import attach
from chatcore.store.sqlite.indexer import Indexer
from chatcore.store.sqlite.ops import Append, OpenConversation
from chatcore.store.sqlite.requests import Request
from chatcore.store.sqlite.schema import connect, database_path, prepare
from chatcore.store.sqlite.tail import Snapshot

from .harness import Opened, Place, change, message, run

# Of what is in memory, or in one row; there are a few runs of an index.
KNOWN_SCANS = (
    "json_each",
    "VIRTUAL TABLE",
    "CONSTANT ROW",
    "VALUES CLAUSE",
    "SCAN v",
    "SCAN live",
    "(subquery",
    "stretch",
    "runs",
)


def test_pages_walk_the_log_both_ways(place: Place) -> None:
    async def work(o: Opened) -> None:
        alice, eve = await o.user("alice"), await o.user("eve")
        conv = await o.conversation(alice, title=None)
        for i in range(24):
            await o.store.append(message(conv, alice, str(i)))

        async def page(**bounds: Any) -> tuple[list[int], bool, int]:
            asked = {"before": None, "after": None, "limit": 10, "max_bytes": 10**6} | bounds
            found = await o.store.page(alice.id, conv, **asked)
            return [e.seq for e in found.entries], found.more, found.head

        assert await page() == (list(range(16, 26)), True, 25)
        assert await page(before=16) == (list(range(6, 16)), True, 25)
        assert await page(before=6) == (list(range(1, 6)), False, 25)
        assert await page(before=11) == (list(range(1, 11)), False, 25)
        assert await page(after=0) == (list(range(1, 11)), True, 25)
        assert await page(after=15) == (list(range(16, 26)), False, 25)
        assert await page(after=25) == ([], False, 25)
        assert await page(before=1) == ([], False, 25)
        one = len((await o.log(conv))[-1].wire)
        assert await page(max_bytes=3 * one + 3) == ([23, 24, 25], True, 25), "cut by size, at the far end"
        assert await page(max_bytes=1) == ([25], True, 25), "one at least"
        with pytest.raises(NotFound):
            await o.store.page(eve.id, conv, None, None, 10, 10**6)

    run(place, work)


@pytest.mark.parametrize("seed", range(5))
def test_unread_counts_what_others_sent_after_the_mark(
    place: Place, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The running counters give what counting would."""
    # FerretDB writes whole documents back: what two write at once to one row is not what this is about.
    monkeypatch.setattr("chatcore.store.mongo.store.MARKS_S", 3600.0)
    rng = random.Random(seed)

    async def work(o: Opened) -> None:
        everybody = [await o.user(f"user{i}") for i in range(4)]
        owner, *others = everybody
        conv = await o.conversation(owner, *others)
        marks = {u.id: i + 1 for i, u in enumerate(everybody)}
        out: set[str] = set()
        for _ in range(120 if isinstance(place, Path) else 40):
            user = rng.choice(everybody)
            what = rng.random()
            if user.id in out:
                done = await o.store.append(change(conv, owner, user, "member"))
                out.discard(user.id)
                marks[user.id] = done.seq
            elif what < 0.6:
                marks[user.id] = (await o.store.append(message(conv, user))).seq
            elif what < 0.85:
                head = (await o.store.heads([conv]))[conv]
                upto = rng.randint(0, head)
                moved = await o.store.set_read(user.id, conv, upto)
                assert moved == (upto > marks[user.id])
                marks[user.id] = max(marks[user.id], upto)
            elif user is not owner:
                await o.store.append(change(conv, owner, user, "none"))
                out.add(user.id)
        log = await o.log(conv)
        for user in everybody:
            _, views = await o.store.views(user.id)
            if user.id in out:
                assert views == []
                continue
            view: View = views[0]
            later = [e for e in log if e.seq > marks[user.id] and e.t == "msg"]
            assert (view.read, view.unread) == (marks[user.id], len([e for e in later if e.sender != user.id]))
            assert view.unread == len(later), "one's own messages move the mark"
            assert view.members == 4 - len(out)
            newest = [e for e in log if e.t == "msg"]
            assert view.last == (newest[-1].wire if newest else None)
        with pytest.raises(NotFound):
            await o.store.set_read(owner.id, conv, len(log) + 1)

    run(place, work)


def test_changes_tell_everything_after_a_position_once(tmp_path: Path) -> None:
    async def work(o: Opened) -> None:
        alice, bob = await o.user("alice"), await o.user("bob")
        start = await o.store.position()
        a = await o.conversation(alice, bob, title=None)
        b = await o.conversation(alice, title=None)
        found = await o.store.changes(start)
        assert dict(found.heads) == {a: 2, b: 1}
        assert sorted(found.rows) == sorted([(alice.id, a), (bob.id, a), (alice.id, b)])
        assert (await o.store.changes(found.position)).heads == []
        await o.store.append(message(a, bob))
        await o.store.set_read(alice.id, a, 3)
        await o.store.add_token(b"hash", bob.id, 2**50, "hash")
        await o.store.revoke_token(b"hash")
        await o.store.set_disabled("alice", True)
        more = await o.store.changes(found.position)
        assert (more.heads, more.rows) == ([(a, 3)], [(alice.id, a)])
        assert (more.revoked_tokens, more.revoked_users) == ([b"hash"], [alice.id])
        assert await o.store.position() == more.position

    run(tmp_path, work)


def test_many_changes_come_in_stretches(tmp_path: Path) -> None:
    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice, title=None)
        await asyncio.gather(*(o.store.append(message(conv, alice)) for _ in range(reads.CHANGES_ROWS + 500)))
        first = await o.store.changes(0)
        assert first.more
        second = await o.store.changes(first.position)
        assert not second.more
        assert second.heads == [(conv, reads.CHANGES_ROWS + 501)]

    run(tmp_path, work)


def test_the_directory_of_channels_is_paged_by_title(place: Place) -> None:
    async def work(o: Opened) -> None:
        alice, bob = await o.user("alice"), await o.user("bob")
        titles = ["Zoo", "alpha", "Alpine", "beta", "alpha"]
        for title in titles:
            await o.conversation(alice, kind="channel", title=title)
        await o.conversation(alice, kind="group", title="alps")
        first, after = await o.store.channels(bob.id, "AL", None, 2)
        assert after is not None
        second, end = await o.store.channels(bob.id, "AL", after, 2)
        assert [c["title"] for c in first + second] == ["alpha", "alpha", "Alpine"]
        assert end is None
        assert {c["role"] for c in first + second} == {"none"}
        everything, _ = await o.store.channels(alice.id, None, None, 10)
        assert [c["title"] for c in everything] == ["alpha", "alpha", "Alpine", "beta", "Zoo"]
        assert {c["role"] for c in everything} == {"owner"}

    run(place, work)


def test_names_are_taken_whatever_their_case(place: Place) -> None:
    async def work(o: Opened) -> None:
        alice = await o.user("Alice")
        found = await o.store.account("aLICE")
        assert found is not None
        assert found.id == alice.id
        with pytest.raises(Conflict):
            await o.user("ALICE")
        bob = await o.user("bob")
        with pytest.raises(Conflict):
            await o.store.update_user(bob.id, "ALICE", None)
        assert (await o.store.update_user(alice.id, "ALICE", None)).name == "ALICE"
        assert await o.store.acquainted(alice.id, [bob.id]) == set()
        await o.conversation(alice, bob)
        assert await o.store.acquainted(alice.id, [bob.id, "nobody"]) == {bob.id}

    run(place, work)


def _statements(tmp_path: Path) -> list[str]:
    """Every statement that the store's queries and requests run, by running them."""
    prepare(tmp_path)
    indexer = Indexer(tmp_path, portion=40)
    indexer.open()
    seen: list[str] = []
    traced = apsw.SQLITE_TRACE_STMT, lambda event: seen.append(event["sql"])

    def trace(db: apsw.Connection) -> None:
        db.trace_v2(*traced)

    apsw.connection_hooks.append(trace)
    try:
        engine = Engine(tmp_path)
        engine.open()
        snapshot = Snapshot(tmp_path)

        def do(request: Request) -> Any:
            reply = engine.commit([request])[0]
            assert reply.error is None, reply
            return None if reply.value is None else msgspec.msgpack.decode(reply.value, type=type(request).result)

        def append(e: NewEntry) -> Append:
            return Append(e.conv, e.sender, e.cid, e.t, e.fields, e.digest, 1000)

        def opened(*of: Any) -> str:
            return str(do(OpenConversation(Opening(*of, b"12345678"), 1000)).conv)

        alice: User = do(accounts.AddUser("alice-id", "alice", "h"))
        bob: User = do(accounts.AddUser("bob-id", "bob", "h"))
        group = opened(alice.id, "c", "group", "t", (bob.id,))
        dm = opened(alice.id, "e", "dm", None, (bob.id,))
        channel = opened(alice.id, "d", "channel", "t", ())
        engine.commit([append(message(group, alice)), append(message(dm, bob))])
        do(append(change(group, alice, bob, "admin")))
        do(append(change(channel, bob, bob, "member")))
        do(accounts.AddToken(b"x", alice.id, 1, "h"))
        do(accounts.ExtendToken(b"x", 2))
        for request in (
            accounts.UpdateUser(alice.id, "al", "h", b"x"),
            accounts.RevokeToken(b"x"),
            accounts.MarkSeen((alice.id,)),
            accounts.SetRead(bob.id, group, 3),
            accounts.SetNotify(bob.id, group, "none"),
            accounts.Block(bob.id, alice.id, True),
            accounts.Block(bob.id, alice.id, False),
        ):
            do(request)
        last = append(message(group, alice))
        # A portion is complete: its marks go into rows, and it goes into the index.
        while engine.behind < 50:
            do(append(message(group, bob)))
        while indexer.behind() > 40:
            engine.commit([])
            indexer.step()
        assert engine.commit([last, last])[1].dup
        engine.close()  # what is remembered is read anew
        engine.commit([last])
        do(accounts.SetRead(bob.id, group, 4))
        for query in (
            reads.position,
            reads.heads([group]),
            reads.entries(group, 0, 10, 10**6),
            reads.page(alice.id, group, None, None, 10, 10**6),
            reads.page(alice.id, group, 5, None, 10, 10**6),
            reads.page(alice.id, group, None, 2, 10, 10**6),
            reads.changes(0),
            reads.memberships(alice.id, None),
            reads.memberships(alice.id, 0),
            reads.views(alice.id, None),
            reads.views(alice.id, [group]),
            reads.member_count(group),
            reads.members(alice.id, group, None, 10),
            reads.channels(alice.id, "t", None, 10),
            reads.channels(alice.id, None, channel, 10),
            reads.acquainted(alice.id, [bob.id]),
            reads.account("alice"),
            reads.account(None, alice.id),
            reads.users([alice.id]),
            reads.seen([alice.id]),
            reads.token(b"x"),
        ):
            query(snapshot)
        do(accounts.SetDisabled("bob", True))
        snapshot.close()
        engine.close()
    finally:
        apsw.connection_hooks.remove(trace)
        indexer.close()
    wanted = [sql for sql in dict.fromkeys(seen) if sql.split()[0] in ("SELECT", "WITH", "UPDATE", "DELETE", "INSERT")]
    assert len(wanted) > 40
    return wanted


def test_every_statement_uses_an_index(tmp_path: Path) -> None:
    """No statement reads a whole table or index: what it costs does not grow with the database."""
    statements = _statements(tmp_path)
    db = connect(database_path(tmp_path), write=True)
    attach(db, tmp_path)
    for sql in statements:
        details: list[Any] = db.execute("EXPLAIN QUERY PLAN " + sql, _no_bindings(db, sql)).fetchall()
        for *_, detail in details:
            scans = detail.startswith("SCAN ") and not any(known in detail for known in KNOWN_SCANS)
            assert not scans, f"{detail}\nin {orjson.dumps(sql).decode()}"
    db.close()


def _no_bindings(db: apsw.Connection, sql: str) -> list[None]:
    """As many NULLs as the statement has parameters (a plan does not depend on them)."""
    return [None] * max([0, *(_positions(sql))])


def _positions(sql: str) -> list[int]:
    count, positions = 0, []
    for i, ch in enumerate(sql):
        if ch == "?":
            digits = ""
            for following in sql[i + 1 :]:
                if not following.isdigit():
                    break
                digits += following
            count = int(digits) if digits else count + 1
            positions.append(count)
    return positions
