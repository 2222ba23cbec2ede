"""The writer and the reader when something goes wrong: callers are answered, others get their turn, health recovers."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import apsw
import pytest
import uvloop

from chatcore.entries import NewEntry
from chatcore.errors import Unavailable
from chatcore.store.base import Appended, Entry, Opening, User
from chatcore.store.sqlite.engine import Engine
from chatcore.store.sqlite.folding import Folding
from chatcore.store.sqlite.schema import database_path
from chatcore.store.sqlite.store import SQLiteStore

from .harness import Opened, message, run, stalled
from .hosting import hosted

# Only what fails ever waits so long.
PATIENCE_S = 10.0


def _broken(conv: str, sender: User) -> NewEntry:
    """Not what any client can cause: its text is no text, so the whole transaction fails."""
    return NewEntry(conv, sender.id, "broken", "msg", b'{"body":"\xff"}', b"12345678")


async def _healthy(store: SQLiteStore) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not store.healthy:
            await asyncio.sleep(0.01)


# --- others' turn ------------------------------------------------------------------------------


def test_many_openings_with_many_members_do_not_hold_up_another_worker(tmp_path: Path) -> None:
    """All that waited went into one transaction: 500 openings with 100 members each kept the other workers from
    the write lock for seconds. Now a transaction ends when it has taken long enough, and the rest waits its turn.
    """
    openings = 100

    async def work(o: Opened) -> None:
        alice, bob = await o.user("alice"), await o.user("bob")
        others = tuple([(await o.user(f"u{i}")).id for i in range(100)])
        conv = await o.conversation(bob)
        other = SQLiteStore(tmp_path, lambda entries: None)
        await other.start()
        try:
            await other.append(message(conv, bob))  # its connection is open
            opening = [
                asyncio.ensure_future(o.store.open(Opening(alice.id, f"o{i}", "group", "t", others, b"12345678")))
                for i in range(openings)
            ]
            await asyncio.wait(opening, return_when=asyncio.FIRST_COMPLETED)
            # The rest is in the hands of the writer by now, or soon: one message may come before it.
            for _ in range(3):
                await other.append(message(conv, bob))
            done = sum(future.done() for future in opening)
            assert done < openings, "three messages had to wait for all openings"
            created = await asyncio.gather(*opening)
            assert all(opened.created for opened in created)
            assert len({opened.conv for opened in created}) == openings
        finally:
            await other.close()

    run(tmp_path, work, max_conversations=1000)


def test_what_is_put_back_keeps_its_order(tmp_path: Path) -> None:
    """An interrupted batch goes on where it was: no message overtakes another."""

    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        others = tuple([(await o.user(f"u{i}")).id for i in range(100)])
        conv = await o.conversation(alice, title=None)
        sent: list[asyncio.Future[Appended]] = []
        opened: list[asyncio.Task[Any]] = []
        for i in range(60):
            opening = Opening(alice.id, f"o{i}", "group", "t", others, b"12345678")
            opened.append(asyncio.ensure_future(o.store.open(opening)))
            await asyncio.sleep(0)
            sent.append(o.store.append(message(conv, alice, str(i))))
        assert [done.seq for done in await asyncio.gather(*sent)] == list(range(2, 62))
        await asyncio.gather(*opened)

    run(tmp_path, work, hosting={"batch": 40})  # so that others wait behind what is put back


# --- failures ----------------------------------------------------------------------------------


def test_what_waits_behind_a_failed_batch_fails_with_it(tmp_path: Path) -> None:
    """The next batch was tried although the one before it had failed: a later message of a user was stored and an
    earlier one was not, although the client was to repeat it.
    """

    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice, title=None)
        with stalled(tmp_path):
            futures = [
                o.store.append(entry) for entry in (_broken(conv, alice), message(conv, alice), message(conv, alice))
            ]
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 3
        assert [e.seq for e in await o.log(conv)] == [1]
        assert (await o.store.append(message(conv, alice))).seq == 2, "it goes on"

    run(tmp_path, work, hosting={"batch": 1})


def test_who_waits_is_answered_although_telling_of_the_entries_fails(tmp_path: Path) -> None:
    """An exception of on_commit went to the loop's handler, and the futures of that batch were never resolved."""
    announced: list[Entry] = []

    def deaf(entries: list[Entry]) -> None:
        announced.extend(entries)
        raise RuntimeError("nothing can be announced")

    async def work() -> None:
        store = SQLiteStore(tmp_path, deaf)
        await store.start()
        try:
            o = Opened(store, announced)
            async with asyncio.timeout(PATIENCE_S):
                alice = await o.user("alice")
                conv = await o.conversation(alice, title=None)
                done = await asyncio.gather(*(store.append(message(conv, alice)) for _ in range(5)))
            assert [d.seq for d in done] == [2, 3, 4, 5, 6]
            assert [e.seq for e in announced] == [1, 2, 3, 4, 5, 6]
        finally:
            await store.close()

    with hosted(tmp_path), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work())


# --- health ------------------------------------------------------------------------------------


def test_a_writer_that_failed_is_healthy_again_without_anybody_writing(tmp_path: Path) -> None:
    """Health came back with the next write only. A balancer that asks for it sent no clients, so none came."""

    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice)
        with pytest.raises(Unavailable):
            await o.store.append(_broken(conv, alice))
        assert not o.store.healthy
        await _healthy(o.store)
        assert (await o.user("bob")).name == "bob"

    run(tmp_path, work, timeout_ms=2_000)


def test_a_reader_that_failed_is_healthy_again_without_anybody_reading(tmp_path: Path) -> None:
    """The same for the other thread."""

    async def work(o: Opened) -> None:
        path = database_path(tmp_path)
        path.rename(tmp_path / "aside")
        path.write_bytes(b"this is no database\n" * 500)
        with pytest.raises(Unavailable):
            await o.store.position()
        assert not o.store.healthy
        (tmp_path / "aside").rename(path)
        await _healthy(o.store)
        assert await o.store.position() == 0

    run(tmp_path, work, timeout_ms=2_000)


# --- first starts that did not get far ---------------------------------------------------------


def _empty(path: Path) -> None:
    path.touch()


def _header_only(path: Path) -> None:
    db = apsw.Connection(str(path))
    db.execute("PRAGMA journal_mode = WAL")
    db.close()


@pytest.mark.parametrize("leave", [_empty, _header_only])
def test_a_database_left_empty_by_a_first_start_that_was_killed_is_made(tmp_path: Path, leave: Any) -> None:
    """Killed between the making of the file and of its tables, a server refused ever after to start on its data."""
    leave(database_path(tmp_path))

    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice)
        assert len(await o.log(conv)) == 2

    run(tmp_path, work)


# --- work between requests ---------------------------------------------------------------------


def test_changes_of_rows_alone_do_not_keep_the_index_behind(tmp_path: Path) -> None:
    """They take values of the counter without entries or marks: the marks of such a portion were never said to be in
    the rows, so the index waited for them, and in the end messages were refused for ever."""

    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice, title=None)
        for i in range(300):
            await o.store.set_notify(alice.id, conv, ("none", "all")[i % 2])
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    assert (await o.store.append(message(conv, alice))).seq == 2
                    return
                except Unavailable:
                    await asyncio.sleep(0.05)

    run(tmp_path, work, hosting={"portion": 20, "tail_entries": 100})


def test_work_between_requests_that_fails_is_tried_again_after_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was tried without any pause, and each failure cut off all workers."""

    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice, title=None)
        failed = threading.Event()

        def fail(self: Folding, db: apsw.Connection, requests: int) -> None:
            self._after = (self._folded, self._trimmed)  # it is left for later
            if not requests:
                failed.set()
                raise apsw.FullError("no room")

        monkeypatch.setattr(Folding, "step", fail)
        for _ in range(30):
            await o.store.append(message(conv, alice))
        assert await asyncio.to_thread(failed.wait, PATIENCE_S)
        await asyncio.sleep(0.3)  # in which it was tried a hundred times
        assert o.store.healthy
        assert sum("write failed" in record.getMessage() for record in caplog.records) <= 4
        monkeypatch.undo()

    run(tmp_path, work, hosting={"portion": 16})


def test_more_than_a_frame_holds_is_sent_in_several(tmp_path: Path) -> None:
    """After the writer was away, all that waited went into one frame, which was refused for its size, for ever."""
    text = "x" * 16_000

    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice, title=None)
        sent = [o.store.append(message(conv, alice, text)) for _ in range(300)]
        assert [done.seq for done in await asyncio.gather(*sent)] == list(range(2, 302))

    monkey = pytest.MonkeyPatch()
    monkey.setattr("chatcore.store.sqlite.writer.FRAME_MAX_BYTES", 1_500_000)
    try:
        run(tmp_path, work)
    finally:
        monkey.undo()


def test_old_changes_are_not_trimmed_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond so many changes each commit was followed by another one, which deleted one row."""
    monkeypatch.setattr("chatcore.store.sqlite.folding.KEEP_CHANGES", 50)
    monkeypatch.setattr("chatcore.store.sqlite.folding.TRIM_ROWS", 20)
    commits = 0
    commit = Engine._commit

    def counted(self: Engine, batch: Any, again: int) -> Any:
        nonlocal commits
        commits += 1
        return commit(self, batch, again)

    monkeypatch.setattr(Engine, "_commit", counted)

    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        conv = await o.conversation(alice, title=None)
        for _ in range(200):
            await o.store.append(message(conv, alice))

    run(tmp_path, work, hosting={"portion": 10})
    # Each portion takes two more: its marks, and that they are in the rows.
    assert commits < 203 + 2 * 20 + 200 // 20 + 10
