"""The reader thread: queries that take too long, and files that fail."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import apsw
import pytest

from chatcore.errors import NotFound, Unavailable
from chatcore.store.sqlite import reads
from chatcore.store.sqlite.index import index_path
from chatcore.store.sqlite.indexer import Indexer
from chatcore.store.sqlite.reader import Reader
from chatcore.store.sqlite.schema import connect, database_path
from chatcore.store.sqlite.tail import Snapshot

from .log_world import World

PATIENCE_S = 30.0
ENDLESS = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c) SELECT max(i) FROM c"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A log and its index."""
    world = World(tmp_path)
    indexer = Indexer(tmp_path)
    indexer.open()
    indexer.close()
    yield world
    world.close()


@contextlib.asynccontextmanager
async def reading(data: Path) -> AsyncIterator[Reader]:
    reader = Reader(data, asyncio.get_running_loop())
    reader.start()
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield reader
    finally:
        await reader.stop()


def test_a_query_that_takes_too_long_is_broken_off(tmp_path: Path, world: World) -> None:
    """It would keep deleted text in the write-ahead log. The reader itself goes on, and is as healthy as before."""

    async def work() -> None:
        async with reading(tmp_path) as reader:
            endless = reader.read_db(lambda db: db.execute(ENDLESS).fetchall())
            behind = reader.put(reads.heads(["conv0"]))
            with pytest.raises(Unavailable):
                await endless
            assert await behind == {"conv0": 1}
            assert reader.healthy

            def inside(snapshot: Snapshot) -> None:
                with snapshot:
                    snapshot.all(ENDLESS)

            with pytest.raises(Unavailable):
                await reader.put(inside)
            # No snapshot is left open: the write-ahead log can be emptied.
            world.append("conv0", "user0")
            world.db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            assert await reader.put(reads.heads(["conv0"])) == {"conv0": 2}

    asyncio.run(work())


def test_a_reader_without_an_index_answers_as_soon_as_there_is_one(tmp_path: Path, world: World) -> None:
    """The indexer makes the index, at its own time."""
    index_path(tmp_path).rename(tmp_path / "aside")

    async def work() -> None:
        async with reading(tmp_path) as reader:
            with pytest.raises(Unavailable):
                await reader.put(reads.position)
            assert not reader.healthy
            (tmp_path / "aside").rename(index_path(tmp_path))
            assert await reader.put(reads.position) == world.position
            assert reader.healthy

    asyncio.run(work())


def test_an_index_that_was_replaced_is_opened_anew(tmp_path: Path, world: World) -> None:
    """The old file lags further and further, or says what is not so: after one failure the reader has the new one."""

    async def work() -> None:
        async with reading(tmp_path) as reader:
            assert await reader.put(reads.heads(["conv0"])) == {"conv0": 1}
            await reader.put(_at_the_limit)
            with pytest.raises(Unavailable):
                await reader.put(reads.heads(["conv0"]))
            assert not reader.healthy
            assert await reader.put(reads.heads(["conv0"])) == {"conv0": 1}
            assert reader.healthy

    def _at_the_limit(snapshot: Snapshot) -> None:
        # What the old file would look like after a while.
        snapshot.index.refresh = lambda: -1_000_000  # type: ignore[method-assign]

    asyncio.run(work())


def test_refusals_are_no_failures(tmp_path: Path, world: World) -> None:
    async def work() -> None:
        async with reading(tmp_path) as reader:
            with pytest.raises(NotFound):
                await reader.put(reads.page("nobody", "conv0", None, None, 10, 1000))
            assert reader.healthy

    asyncio.run(work())


def test_the_reader_only_reads(tmp_path: Path, world: World) -> None:
    snapshot = Snapshot(tmp_path)
    for table in ("entries", "idx.runs"):
        with pytest.raises(apsw.ReadOnlyError):
            snapshot.db.execute(f"DELETE FROM {table}")
    snapshot.close()
    other = connect(database_path(tmp_path), write=True)
    assert other.execute("SELECT count(*) FROM entries").fetchall() == [(4,)]
    other.close()
