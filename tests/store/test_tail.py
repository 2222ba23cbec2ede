"""Snapshots of the log, its index and the tail between them: whatever is indexed so far, every query has one answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

from chatcore.errors import NotFound
from chatcore.protocol import MEMBER_ROLES
from chatcore.store.base import Changes
from chatcore.store.sqlite import reads, tail
from chatcore.store.sqlite.index import Index
from chatcore.store.sqlite.indexer import Indexer
from chatcore.store.sqlite.tail import Snapshot, StaleIndex

from .log_world import World

ANY_SIZE = 10**9


@contextmanager
def files(data: Path, seed: int = 0, portion: int = 8, **options: int) -> Iterator[tuple[World, Indexer, Snapshot]]:
    """A world, its indexer with tiny portions and slices, and a reader that follows from the beginning."""
    world = World(data, seed, **options)
    indexer = Indexer(data, portion=portion, fan_in=2, slice_rows=3)
    indexer.open()
    snapshot = Snapshot(data)
    try:
        yield world, indexer, snapshot
    finally:
        snapshot.close()
        indexer.close()
        world.close()


def index_all(indexer: Indexer) -> None:
    while indexer.step():
        pass


def all_changes(snapshot: Snapshot, after: int) -> Changes:
    """Until there is no more, in one."""
    heads: dict[str, int] = {}
    rows: set[tuple[str, str]] = set()
    while True:
        found = reads.changes(after)(snapshot)
        assert found is not None
        heads.update(found.heads)
        rows.update(found.rows)
        after = found.position
        if not found.more:
            return Changes(after, sorted(heads.items()), sorted(rows), [], [])


def check(world: World, snapshot: Snapshot) -> None:
    """Each query has the answer that the world has."""
    assert reads.position(snapshot) == world.position
    assert reads.heads([*world.logs, "nowhere"])(snapshot) == {
        **{conv: len(log.entries) for conv, log in world.logs.items()},
        "nowhere": 0,
    }
    for conv, log in world.logs.items():
        after, limit = world.random.randint(0, len(log.entries)), world.random.randint(1, 30)
        assert reads.entries(conv, after, limit, ANY_SIZE)(snapshot) == log.entries[after : after + limit]
        bounds = [None, world.random.randint(1, len(log.entries) + 2)]
        for before in bounds:
            for lowest in bounds:
                found = reads.page(world.users[0], conv, before, lowest, limit, ANY_SIZE)
                if world.rows[conv, world.users[0]].role in MEMBER_ROLES:
                    assert found(snapshot) == world.page(conv, before, lowest, limit)
                else:
                    with pytest.raises(NotFound):
                        found(snapshot)
        peers = world.members(conv)
        for peer in peers[:1]:
            assert reads.members(peer.user, conv, None, 2)(snapshot) == (
                peers[:2],
                peers[1].user if len(peers) > 2 else None,
            )
            assert reads.members(peer.user, conv, peer.user, 100)(snapshot) == (peers[1:], None)
    since = world.random.randint(0, world.position)
    for user in world.users:
        assert reads.views(user, None)(snapshot) == (world.position, world.views(user))
        some = list(world.logs)[1:3]
        assert reads.views(user, some)(snapshot)[1] == [view for view in world.views(user) if view.conv in some]
        known, truth = reads.memberships(user, since)(snapshot), world.memberships(user, since)
        assert (known.position, known.revs, sorted(known.left)) == (
            world.position,
            truth.revs,
            truth.left,
        )
    assert all_changes(snapshot, since) == world.changes(since)


@pytest.mark.parametrize("seed", range(8))
def test_answers_are_the_same_whatever_is_indexed(tmp_path: Path, seed: int) -> None:
    """Random changes, read marks brought into rows now and then, and the indexer at any slice of its work."""
    with files(tmp_path, seed) as (world, indexer, snapshot):
        steps = 0
        for _ in range(250):
            match world.random.randrange(10):
                case 0:
                    world.fold(world.random.randint(world.folded, world.position))
                case 1 | 2 | 3 | 4:
                    steps += indexer.step()
                case _:
                    world.something()
            if world.random.randrange(4):
                check(world, snapshot)  # otherwise it finds several changes at once
        assert steps > 50 and snapshot.mark > 30
        fresh = Snapshot(tmp_path)
        check(world, fresh)
        fresh.close()
        world.fold()
        index_all(indexer)
        check(world, snapshot)
        assert world.position - snapshot.mark < 8


def test_a_tail_of_many_blocks_and_generations(tmp_path: Path) -> None:
    """More rows than one statement of the follower reads, over many generations, in one opening."""
    with files(tmp_path, portion=700, convs=3) as (world, indexer, snapshot):
        with world.db:  # one transaction, as nobody looks meanwhile
            for _ in range(3 * tail.FOLLOW_ROWS):
                world.append(world.random.choice(list(world.logs)), world.random.choice(world.users))
                if not world.random.randrange(3):
                    world.set_read(world.random.choice(list(world.logs)), world.random.choice(world.users))
        check(world, snapshot)
        assert len(snapshot.tail.generations) == world.position // 700 + 1
        world.fold()
        while indexer.step():
            if not world.random.randrange(10):
                check(world, snapshot)
        check(world, snapshot)
        assert len(snapshot.tail.generations) == 1


def test_a_follower_that_is_broken_off_goes_on_where_it_was(tmp_path: Path) -> None:
    """A query has half a second. What the follower has read by then stays, so that a slow machine gets there at last,
    and nothing of it is read twice."""
    with files(tmp_path, portion=700) as (world, _, snapshot):
        with world.db:
            for _ in range(5 * tail.FOLLOW_ROWS):
                world.append(world.random.choice(list(world.logs)), world.random.choice(world.users))
                world.set_read(world.random.choice(list(world.logs)), world.random.choice(world.users))
        # Some times in each block of rows.
        snapshot.db.set_progress_handler(lambda: world.random.random() < 0.2, 5_000)
        broken_off = 0
        while True:
            try:
                with snapshot:
                    break
            except apsw.InterruptError:
                broken_off += 1
                assert not snapshot.db.in_transaction
        assert broken_off > 3
        snapshot.db.set_progress_handler(None)
        check(world, snapshot)


def test_what_is_indexed_is_dropped_and_freed(tmp_path: Path) -> None:
    with files(tmp_path) as (world, indexer, snapshot):
        for _ in range(40):
            world.something()
        with snapshot:
            before = list(snapshot.tail.generations)
        assert len(before) > 5
        world.fold(before[2].high)
        index_all(indexer)
        with snapshot:
            assert snapshot.mark == before[2].high
            assert snapshot.tail.generations == before[3:], "the others are not read again"
        world.fold()
        index_all(indexer)
        with snapshot:
            assert snapshot.tail.generations[0].high == snapshot.mark + 8
            assert len(snapshot.tail.generations) == 1
            assert snapshot.tail._indexed == []


def test_a_tail_is_read_again_when_the_mark_rises_by_another_portion(tmp_path: Path) -> None:
    """A server that is started again with other settings: the readers have learnt the portion when they opened."""
    with files(tmp_path) as (world, indexer, snapshot):
        for _ in range(60):
            world.something()
        check(world, snapshot)
        world.fold()
        indexer.close()
        other = Indexer(tmp_path, portion=13, fan_in=2, slice_rows=5)
        other.open()
        while other.step():
            world.something()
            world.fold()
            check(world, snapshot)
            if snapshot.mark > 60:
                break
        other.close()
        assert snapshot.mark % 13 == 0 and snapshot.mark > 26


def test_an_index_that_is_made_anew_is_followed_from_nothing(tmp_path: Path) -> None:
    with files(tmp_path) as (world, indexer, snapshot):
        for _ in range(60):
            world.something()
        world.fold()
        index_all(indexer)
        check(world, snapshot)
        indexer.close()
        db = apsw.Connection(str(tmp_path / "index.db"))
        db.execute("UPDATE meta SET value = 'another' WHERE key = 'store_id'")
        db.close()
        indexer.open()
        check(world, snapshot)
        assert snapshot.mark == 0
        index_all(indexer)
        check(world, snapshot)
        assert snapshot.mark > 50


def test_a_snapshot_holds_one_state_while_others_write(tmp_path: Path) -> None:
    """Between two questions of a query, entries are committed, indexed, and their runs merged and deleted."""
    with files(tmp_path) as (world, indexer, snapshot):
        for _ in range(50):
            world.something()
        heads = {conv: len(log.entries) for conv, log in world.logs.items()}
        ids = {log.n: list(log.ids) for log in world.logs.values()}
        views = world.views("user0")
        with snapshot:
            for _ in range(40):
                world.something()
                world.fold()
                index_all(indexer)
                numbers = snapshot.numbers(list(world.logs))
                assert {conv: snapshot.head_seqs([n])[n] for conv, n in numbers.items()} == heads
                assert {n: snapshot.ids(n, 1, 1000) for n in numbers.values()} == ids
        assert views != world.views("user0")
        check(world, snapshot)


class Hurried(Index):
    """Others write just before and just after it looks."""

    def __init__(self, db: apsw.Connection, write: Callable[[], None]) -> None:
        super().__init__(db)
        self.write = write

    def refresh(self) -> int:
        self.write()
        mark = super().refresh()
        self.write()
        return mark


def test_the_log_is_never_older_than_the_index(tmp_path: Path) -> None:
    """An index that is newer than the log names entries that the log has not. The index is looked at first."""
    with files(tmp_path) as (world, indexer, snapshot):

        def write() -> None:
            for _ in range(20):
                world.append("conv0", "user0")
            world.fold()
            index_all(indexer)

        snapshot.index = Hurried(snapshot.db, write)
        for _ in range(3):
            newest = len(world.logs["conv0"].entries) + 40
            found = reads.entries("conv0", 0, 1000, ANY_SIZE)(snapshot)
            assert found == world.logs["conv0"].entries and len(found) == newest


def test_many_readers_beside_a_writer_see_dense_logs(tmp_path: Path) -> None:
    """Threads that read while entries are appended and indexed: each answer is of one state, and none is older than
    the one before it."""
    with files(tmp_path) as (world, indexer, _):
        world.set_role("conv0", "user0", "member")
        failed: list[BaseException] = []
        done = threading.Event()

        def read() -> None:
            snapshot = Snapshot(tmp_path)
            newest = 0
            try:
                while not done.is_set():
                    page = reads.page("user0", "conv0", None, None, 20, ANY_SIZE)(snapshot)
                    assert page.head >= newest
                    newest = page.head
                    assert [e.seq for e in page.entries] == list(range(max(1, newest - 19), newest + 1))
                    for view in reads.views("user0", None)(snapshot)[1]:
                        assert view.unread >= 0
            except BaseException as exc:
                failed.append(exc)
            finally:
                snapshot.close()

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for i in range(600):
            world.append("conv0", "user0")
            if i % 5 == 0:
                world.fold()
            indexer.step()
        done.set()
        for thread in threads:
            thread.join()
        assert failed == []


def test_a_log_that_went_back_is_read_again(tmp_path: Path) -> None:
    """The file was put back to an earlier state under a running server: nothing of the later one is left in memory,
    neither entries nor the small integers of conversations."""
    with files(tmp_path) as (world, _, snapshot):
        before, numbers = world.position, dict(world._numbers)
        world.open("lost")
        world.append("lost", "user0")
        world.set_read("lost", "user1")
        check(world, snapshot)
        with world.db:
            world.db.execute("DELETE FROM entries WHERE id > ?", (before,))
            world.db.execute("DELETE FROM row_changes WHERE id > ?", (before,))
            world.db.execute("DELETE FROM members WHERE rev > ?", (before,))
            world.db.execute("DELETE FROM convs WHERE id = 'lost'")
            world.db.execute("DELETE FROM ids WHERE id = 'lost'")
        del world.logs["lost"]
        world.rows = {key: row for key, row in world.rows.items() if key[0] != "lost"}
        world.changed = [change for change in world.changed if change[0] <= before]
        world.position, world._numbers = before, numbers
        check(world, snapshot)
        world.open("found")
        check(world, snapshot)


def test_changes_that_are_not_known_any_more_are_everything(tmp_path: Path) -> None:
    """A worker that was stopped for long looks at more than a million changes: the rows that changed are forgotten."""
    with files(tmp_path) as (world, _, snapshot):
        after = world.position
        world.set_role("conv1", "user1", "none")
        world.append("conv2", "user2")
        world.db.execute("INSERT INTO revocations VALUES (?, x'01', 'user2')", (world.tick(),))
        world.fold()
        world.trim(after + 1)
        assert reads.changes(after)(snapshot) is None
        assert reads.changes(after + 1)(snapshot) is not None
        found = reads.everything(after, ["conv2", "nowhere"], ["user1", "user3"])(snapshot)
        assert found.position == world.position and not found.more
        assert found.heads == [("conv2", len(world.logs["conv2"].entries))]
        assert sorted(found.rows) == [("user1", f"conv{i}") for i in range(4)], "also the one that the user has left"
        assert (found.revoked_tokens, found.revoked_users) == ([b"\x01"], ["user2"])


def test_an_index_that_is_far_behind_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that has an index file open that was deleted would gather the whole log in memory."""
    with files(tmp_path) as (world, indexer, snapshot):
        monkeypatch.setattr(tail, "TAIL_LIMIT", 30)
        for _ in range(30):
            world.append("conv0", "user0")
        with pytest.raises(StaleIndex), snapshot:
            pass
        world.fold()
        index_all(indexer)
        check(world, snapshot)


@pytest.mark.parametrize(
    ("lie", "ask"),
    [
        (
            "DELETE FROM seqs WHERE conv = :b; UPDATE seqs SET conv = :b WHERE conv = :a",
            reads.page("user0", "conv1", None, None, 10, ANY_SIZE),
        ),
        ("UPDATE heads SET id = (SELECT id FROM heads WHERE conv = :b) WHERE conv = :a", reads.views("user0", None)),
        ("DELETE FROM seqs WHERE conv = :c", reads.entries("conv2", 0, 100, ANY_SIZE)),
        ("UPDATE seqs SET ids = zeroblob(length(ids)) WHERE conv = :c", reads.entries("conv2", 0, 100, ANY_SIZE)),
    ],
    ids=["another conversation", "another head", "a hole below the tail", "no such entries"],
)
def test_an_index_that_lies_is_not_believed(tmp_path: Path, lie: str, ask: reads.Query[Any]) -> None:
    """An entry of one conversation must never be shown in another."""
    with files(tmp_path, convs=3) as (world, indexer, snapshot):
        for _ in range(10):
            for conv in world.logs:
                world.append(conv, "user0")
        world.fold()
        index_all(indexer)
        world.append("conv2", "user0")
        ask(snapshot)
        assert snapshot.mark > world.logs["conv1"].ids[-2], "it is not the tail that answers"
        db = apsw.Connection(str(tmp_path / "index.db"))
        db.execute(lie, {name: world.logs[f"conv{i}"].n for i, name in enumerate("abc")})
        db.close()
        with pytest.raises(StaleIndex):
            ask(snapshot)
