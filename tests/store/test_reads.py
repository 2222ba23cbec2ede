"""Reading: pages, views, unread counts, what changed; and no query without its index."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import apsw
import orjson
import pytest

from chatcore.entries import NewEntry
from chatcore.errors import Conflict, NotFound
from chatcore.store.base import Opening, User, View
from chatcore.store.sqlite import accounts, ops, reads
from chatcore.store.sqlite.schema import connect, database_path, prepare

from .harness import Opened, Place, change, message, run


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

    run(tmp_path, work, batch=1000)


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
    """Every statement that the store's queries and transactions run, by running them."""
    prepare(tmp_path)
    db = connect(database_path(tmp_path), write=True)
    seen: list[str] = []
    db.trace_v2(apsw.SQLITE_TRACE_STMT, lambda event: seen.append(event["sql"]))
    tx = ops.Transaction(db, b"k")

    def do(op: ops.Op) -> Any:
        return op(tx)

    alice: User = do(accounts.add_user("alice", "h"))
    bob: User = do(accounts.add_user("bob", "h"))
    group = do(ops.open_conversation(Opening(alice.id, "c", "group", "t", (bob.id,), b"12345678"))).conv
    dm = do(ops.open_conversation(Opening(alice.id, "e", "dm", None, (bob.id,), b"12345678"))).conv
    channel = do(ops.open_conversation(Opening(alice.id, "d", "channel", "t", (), b"12345678"))).conv
    entry: NewEntry = message(group, alice)
    ops.append_messages(tx, [entry, message(dm, bob)])
    do(ops.append_one(change(group, alice, bob, "admin")))
    do(ops.append_one(change(channel, bob, bob, "member")))
    for op in (
        accounts.update_user(alice.id, "al", "h", b"kept"),
        accounts.add_token(b"x", alice.id, 1, "h"),
        accounts.extend_token(b"x", 2),
        accounts.revoke_token(b"x"),
        accounts.mark_seen([alice.id]),
        accounts.set_read(bob.id, group, 3),
        accounts.set_notify(bob.id, group, "none"),
        accounts.block(bob.id, alice.id, True),
        accounts.block(bob.id, alice.id, False),
        accounts.set_disabled("bob", True),
    ):
        do(op)
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
        query(db)
    db.trace_v2(0, None)
    wanted = [sql for sql in dict.fromkeys(seen) if sql.split()[0] in ("SELECT", "WITH", "UPDATE", "DELETE", "INSERT")]
    assert len(wanted) > 40
    db.close()
    return wanted


def test_every_statement_uses_an_index(tmp_path: Path) -> None:
    """No statement reads a whole table or index: what it costs does not grow with the database."""
    statements = _statements(tmp_path)
    db = connect(database_path(tmp_path), write=True)
    for sql in statements:
        details: list[Any] = db.execute("EXPLAIN QUERY PLAN " + sql, _no_bindings(db, sql)).fetchall()
        for *_, detail in details:
            scans = detail.startswith("SCAN ") and not any(
                known in detail for known in ("json_each", "VIRTUAL TABLE", "CONSTANT ROW", "VALUES CLAUSE", "SCAN v")
            )
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
