"""What is done about the index before a writer begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatcore.store.sqlite.catch_up import catch_up
from chatcore.store.sqlite.indexer import Indexer
from chatcore.store.sqlite.lock import IndexerLock
from chatcore.store.sqlite.schema import BrokenStore, connect, database_path, prepare

ENTRIES = 200


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A log without an index, as a migration leaves it."""
    prepare(tmp_path)
    db = connect(database_path(tmp_path), write=True)
    with db:
        db.executemany(
            "INSERT INTO entries VALUES (?1, 1, ?1, 'msg', 2, ?1, ?1, 'cid ' || ?1, x'0102030405060708', 0, '{}')",
            [(n,) for n in range(1, ENTRIES + 1)],
        )
        db.execute("UPDATE meta SET value = ? WHERE key = 'folded'", (ENTRIES,))
    db.close()
    return tmp_path


def execute(data: Path, sql: str) -> None:
    db = connect(database_path(data), write=True)
    db.execute(sql)
    db.close()


def behind(data: Path) -> int:
    indexer = Indexer(data, portion=16)
    indexer.open()
    found = indexer.behind()
    indexer.close()
    return found


def test_the_index_is_built_until_the_rest_fits_into_memory(data: Path) -> None:
    told: list[tuple[int, int]] = []
    catch_up(data, portion=16, most=20, progress=lambda done, total: told.append((done, total)))
    assert ENTRIES - 20 <= told[-1][0] <= told[-1][1] == ENTRIES
    assert told == sorted(told)
    assert behind(data) <= 20
    catch_up(data, portion=16, most=20, progress=lambda done, total: pytest.fail("there is nothing to do"))


def test_an_index_that_an_indexer_writes_is_left_to_it(data: Path) -> None:
    lock = IndexerLock(data)
    assert lock.acquire(0)
    catch_up(data, portion=16, most=20)
    lock.release()
    assert behind(data) == ENTRIES


def test_what_only_the_writer_can_go_on_with_is_left_to_it(data: Path) -> None:
    """Otherwise no writer could start that has to bring read marks into rows first."""
    execute(data, "UPDATE meta SET value = 40 WHERE key = 'folded'")
    catch_up(data, portion=16, most=20)
    assert behind(data) == ENTRIES - 32


def test_it_ends_when_whoever_is_told_says_so_and_goes_on_the_next_time(data: Path) -> None:
    def enough(done: int, total: int) -> None:
        if done:
            raise SystemExit

    with pytest.raises(SystemExit):
        catch_up(data, portion=16, most=20, progress=enough)
    assert behind(data) == ENTRIES - 16
    catch_up(data, portion=16, most=20)
    assert behind(data) <= 20


def test_a_log_that_cannot_be_indexed_is_one_line(data: Path) -> None:
    execute(data, "DELETE FROM entries WHERE id = 50")
    with pytest.raises(BrokenStore, match=r"the index of the store in .* cannot be built: ") as refused:
        catch_up(data, portion=16, most=20)
    assert "\n" not in str(refused.value)
