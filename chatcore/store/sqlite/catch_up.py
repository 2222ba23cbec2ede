"""What comes before a writer: the index is so far up to the log that the writer can keep the rest in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import apsw

from .indexer import IndexAlarm, Indexer
from .lock import IndexerLock
from .schema import BrokenStore


def catch_up(
    data: Path,
    *,
    portion: int = 65_536,
    most: int = 200_000,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Index the log until the index lacks ``most`` entries at most; make the index if there is none.

    There is much to do after a migration, or if the file was deleted. Nothing is done if an indexer runs already: it
    was started when there was nothing to do, or does it itself.

    :param portion: see :class:`~.indexer.Indexer`.
    :param progress: called with (done, total), several times a second; may raise to end this.
    :raises BrokenStore: the index cannot be built, in one line.
    """
    lock = IndexerLock(data)
    if not lock.acquire(0):
        return
    indexer = Indexer(data, portion=portion)
    try:
        indexer.open()
        first = behind = indexer.behind()
        while behind > most:
            if not indexer.step():
                break  # read marks have to be brought into rows first, which the writer does
            behind = indexer.behind()
            progress(first - behind, first)
    except (apsw.Error, IndexAlarm) as exc:
        raise BrokenStore(f"the index of the store in {data} cannot be built: {exc}") from None
    finally:
        indexer.close()
        lock.release()
