"""The check of the writer is itself checked: each fault planted in it must be found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest

from chatcore.store.sqlite import engine as engine_module
from chatcore.store.sqlite import folding, transaction
from chatcore.store.sqlite.engine import Failed, Superseded
from chatcore.store.sqlite.folding import Folding
from chatcore.store.sqlite.index import Filters, Index
from chatcore.store.sqlite.requests import Reply, Request
from chatcore.store.sqlite.tail import StaleIndex
from chatcore.store.sqlite.transaction import LogState, Portion, Transaction

from .engine_world import Flaky, FlakyEngine, play


class Unchecked(FlakyEngine):
    """Does not look whether the log is as it left it."""

    def _check_alone(self, db: apsw.Connection) -> None:
        pass


class KeepsItsState(FlakyEngine):
    """After an error it believes in what it knew before."""

    _known: LogState | None = None

    def _read(self) -> None:
        super()._read()
        if self._known is not None:
            self._known.snapshot = self._state.snapshot
            self._state = self._known
            self._folding = Folding(self._state, self._meta("folded"), self._meta("trimmed"))
        self._known = self._state


class KeepsItsStateUnchecked(KeepsItsState):
    """The same, and does not look whether it knows the newest entry."""

    def _check_alone(self, db: apsw.Connection) -> None:
        if self._meta("epoch") != self._epoch:
            raise Superseded


class TakenOver(Transaction):
    """A transaction that is taken over when COMMIT begins."""

    newest: TakenOver | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        TakenOver.newest = self
        self._kept = False

    def keep(self) -> None:
        if not self._kept:
            self._kept = True
            super().keep()


class TakingOver(Flaky):
    """See :class:`TakenOver`."""

    def execute(self, sql: str, args: Any = ()) -> Any:
        if sql == "COMMIT" and TakenOver.newest is not None:
            TakenOver.newest.keep()
        return super().execute(sql, args)


class TakesOverBeforeCommit(KeepsItsStateUnchecked):
    """Heads, keys and roles change before COMMIT returned, and stay."""

    parts = ((engine_module, "Transaction", TakenOver),)

    def _open_file(self) -> apsw.Connection:
        db = super()._open_file()
        db.__class__ = TakingOver  # type: ignore[assignment]
        return db


class KeepsItsPosition(FlakyEngine):
    """The change counter is not read anew."""

    _known = -1

    def _read(self) -> None:
        super()._read()
        if self._known >= 0:
            self._state.position = self._known

    def close(self) -> None:
        if self._db is not None:
            self._known = self._state.position
        super().close()


class TakesUnknownForFailed(FlakyEngine):
    """What may be committed is done as if for the first time."""

    def _commit(self, batch: Sequence[Request], again: int) -> list[Reply]:
        return super()._commit(batch, 0)


class TellsNobodyOfRepetitions(FlakyEngine):
    """What was committed with an error is found, and not announced."""

    def commit(self, batch: Sequence[Request]) -> list[Reply]:
        return [msgspec.structs.replace(r, announce=False) if r.dup else r for r in super().commit(batch)]


class LooksBeforeItTakesOver(FlakyEngine):
    """The log is read before the writer before can commit no more."""

    def open(self) -> None:
        super().open()
        self._state.position -= 1


class PartsOfFilters(Filters):
    """A filter is asked before it is loaded."""

    def refresh(self, index: Index) -> None:
        super().refresh(index)
        for run, (own, *_) in self._loading.items():
            self._known[run] = [own]
        self._all = [keys for filters in self._known.values() for keys in filters]
        self._unknown = False


class DropsKeysEarly(FlakyEngine):
    """The keys of a portion are dropped before the filter that stands for them is loaded."""

    parts = ((transaction, "Filters", PartsOfFilters),)


class OldRuns(LogState):
    """A candidate is looked for in the runs that the filters knew."""

    def with_key(self, key: int) -> Sequence[int]:
        found: list[int] = []
        for portion in self.portions:
            ids = portion.keys.get(key)
            if ids is not None:
                found += ids if isinstance(ids, list) else [ids]
        if key in self._filters:
            with self.snapshot as snapshot:
                found += snapshot.index.candidates(key, self._filters.runs(key))
        return found


class AsksRunsThatWereMerged(FlakyEngine):
    """The filters lag behind the index, and what they say is taken for where to look."""

    parts = ((engine_module, "LogState", OldRuns),)


class Ahead(Folding):
    """Folds a portion that is not complete."""

    def _complete(self) -> int:
        return next((portion.high for portion in self._state.portions if self._folded < portion.high), 0)


class FoldsAhead(FlakyEngine):
    """Marks that come into a portion which is folded already never get into rows."""

    parts = ((engine_module, "Folding", Ahead),)


def half_of(portions: Sequence[Portion]) -> Iterator[list[tuple[Any, ...]]]:
    yield next(marks_of(portions))


marks_of = folding._marks_of


class FoldsHalf(FlakyEngine):
    """Says that a portion is folded after its first marks."""

    parts = ((folding, "_marks_of", half_of),)


class ForgetsRoles(Transaction):
    """A role that was changed is remembered as it was."""

    def set_role(self, conv: str, user: str, role: str) -> None:
        pass


class BelievesInOldRoles(FlakyEngine):
    """See :class:`ForgetsRoles`."""

    parts = ((engine_module, "Transaction", ForgetsRoles),)


class ForgetsOwnKeys(Transaction):
    """A cid is not looked for in the open transaction."""

    def wrote(self, entries: Any, marks: Any) -> None:
        super().wrote(entries, marks)
        self._own.clear()


class RepeatsWithinABatch(FlakyEngine):
    """See :class:`ForgetsOwnKeys`."""

    parts = ((engine_module, "Transaction", ForgetsOwnKeys),)


FAULTS = [
    Unchecked,
    KeepsItsState,
    KeepsItsStateUnchecked,
    TakesOverBeforeCommit,
    KeepsItsPosition,
    TakesUnknownForFailed,
    TellsNobodyOfRepetitions,
    LooksBeforeItTakesOver,
    DropsKeysEarly,
    AsksRunsThatWereMerged,
    FoldsAhead,
    FoldsHalf,
    BelievesInOldRoles,
    RepeatsWithinABatch,
]
#: Histories that are tried, at most.
TRIES = 20


@pytest.mark.parametrize("kind", FAULTS)
def test_a_planted_fault_is_found(
    tmp_path: Path, kind: type[FlakyEngine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL")
    with pytest.raises((AssertionError, Superseded, Failed, StaleIndex, apsw.Error)):
        for seed in range(TRIES):
            data = tmp_path / str(seed)
            data.mkdir()
            play(data, seed, monkeypatch, kind)
