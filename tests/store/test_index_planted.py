"""The check of the index is itself checked: each fault planted in the indexer must be found.

Some are found by the indexer, which counts what it writes and knows where each conversation ended; the others are the
same ones behind its back.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chatcore.store.sqlite.index import LIVE, Run
from chatcore.store.sqlite.indexer import Head, IndexAlarm, Indexer, Place, Portion, Table

from .index_world import SMALL, Log, Reader, finish

CONVS = [1, 2, 1, 0, 3, 1, 1, 2, 4, 0, 1, 1, 1, 2, 3, 3, 0, 0, 1, 2, 2, 1, 1, 4, 1, 1, 1, 1, 2, 3, 4, 1, 1, 2]


class BelievesItself(Indexer):
    """Does not count what is in the file, nor compare where conversations end."""

    def _count(self, number: int, table: Table) -> Generator[None, None, int]:
        yield from super()._count(number, table)
        return int(self._db.execute("SELECT entries FROM runs WHERE run = ?", (number,)).fetchall()[0][0])

    def _report(self, heads: dict[int, Head]) -> None:
        pass


class LosesASliceOfTheLog(Indexer):
    """One slice of each portion is not read."""

    def _read(self, low: int, high: int) -> Iterable[Any]:
        return () if low % self._portion == self._slice_rows else super()._read(low, high)


class LosesASlice(Indexer):
    """A slice of one conversation's seqs is not written."""

    def _fill(self, run: Run, places: Iterator[Place], cids: Iterator[bytes]) -> Generator[None, None, Run]:
        kept = (place for i, place in enumerate(places) if i != 1)
        return (yield from super()._fill(run, kept, cids))


class LosesASliceUnseen(LosesASlice, BelievesItself):
    """The same, and nobody counts."""


class LosesASliceOfCidsUnseen(BelievesItself):
    """The first slice of the cids is not written."""

    def _cut(self, portion: Portion) -> Iterator[bytes]:
        slices = super()._cut(portion)
        next(slices)
        yield from slices


class LosesAPartUnseen(BelievesItself):
    """A merge forgets one of its sources."""

    def _merged_places(self, parts: list[Run]) -> Iterator[Place]:
        return super()._merged_places(parts[1:])


class LosesARangeUnseen(BelievesItself):
    """A merge forgets the cids of one of its sources."""

    def _merged_cids(self, parts: list[Run], entries: int) -> Iterator[bytes]:
        return super()._merged_cids(parts[1:], entries)


class ReadsASliceTwice(Indexer):
    """One slice of each portion is read again."""

    def _read(self, low: int, high: int) -> Iterable[Any]:
        return super()._read(low - self._slice_rows * (low % self._portion > 0), high)


class WritesASliceTwice(Indexer):
    """The records of a slice are written again."""

    def _cut(self, portion: Portion) -> Iterator[bytes]:
        for records in super()._cut(portion):
            yield records
            yield records


class MarksAhead(Indexer):
    """The mark is moved beyond what is indexed."""

    def _set_mark(self, low: int, high: int) -> None:
        super()._set_mark(low, high + 3)


class MarksBehind(Indexer):
    """The mark is not moved as far as what is indexed: the next portion has some of it again."""

    def _set_mark(self, low: int, high: int) -> None:
        super()._set_mark(low, high - 3)


class ShowsWhatIsBeingMade(Indexer):
    """A run is live from its first slice on."""

    def _fill(self, run: Run, places: Iterator[Place], cids: Iterator[bytes]) -> Generator[None, None, Run]:
        filling = super()._fill(run, places, cids)
        while True:
            try:
                next(filling)
            except StopIteration as stop:
                made: Run = stop.value
                return made
            self._changed("UPDATE runs SET state = ? WHERE run = (SELECT max(run) FROM runs)", (LIVE,))
            self._changed("UPDATE meta SET value = value + 1 WHERE key = 'generation'", ())
            yield


class KeepsOldHeads(Indexer):
    """The newest entry of a conversation is the first of each portion."""

    @staticmethod
    def _places(portion: Portion, heads: dict[int, Head]) -> Iterator[Place]:
        for conv, first, ids in Indexer._places(portion, heads):
            heads[conv] = (conv, int.from_bytes(ids[:8], "little"), *heads[conv][2:])
            yield conv, first, ids


class TellsNobody(Indexer):
    """Readers are not told that there are other runs."""

    def _publish(self, run: Run, parts: Iterable[Run] = ()) -> None:
        super()._publish(run, parts)
        self._changed("UPDATE meta SET value = value - 1 WHERE key = 'generation'", ())


class DeletesWhatIsInUse(Indexer):
    """The newest run is deleted instead of the one that was merged."""

    def _look(self) -> None:
        super()._look()
        if self._dead and self._live:
            self._dead = [self._live[-1].run]


FAULTS = [
    LosesASliceOfTheLog,
    LosesASlice,
    LosesASliceUnseen,
    LosesASliceOfCidsUnseen,
    LosesAPartUnseen,
    LosesARangeUnseen,
    ReadsASliceTwice,
    WritesASliceTwice,
    MarksAhead,
    MarksBehind,
    ShowsWhatIsBeingMade,
    KeepsOldHeads,
    TellsNobody,
    DeletesWhatIsInUse,
]


def play(data: Path, kind: type[Indexer]) -> None:
    """Index a log that grows, and check everything after every step."""
    log = Log(data)
    indexer = kind(log.data, **SMALL)
    indexer.open()
    kept = Reader(log)
    try:
        for _ in range(2):
            log.append(*CONVS)
            finish(log, indexer, kept)
    finally:
        kept.close()
        indexer.close()


@pytest.mark.parametrize("kind", [Indexer, BelievesItself])
def test_without_a_fault_nothing_is_found(tmp_path: Path, kind: type[Indexer]) -> None:
    play(tmp_path, kind)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_planted_fault_is_found(tmp_path: Path, kind: type[Indexer]) -> None:
    with pytest.raises((AssertionError, IndexAlarm)):
        play(tmp_path, kind)
