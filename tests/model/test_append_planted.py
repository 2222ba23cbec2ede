"""The checker of the append loop is itself checked: each fault planted here must be found.

A fault is a variant of the loop, or of what the store gives it, that breaks one rule
of docs/log.md (its number is in the name where it has one).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatcore.entries import NewEntry, RoleChange
from chatcore.errors import Unavailable
from chatcore.store.append import Appender, Decision, Decisions, Found, Head, Key, LogOps, Row, Unknown, _Item, _Log
from chatcore.store.base import Appended, Entry, OnCommit

from .append_world import play
from .replica import Client, Node
from .strategies import bounded, climates, put_out, same_member, scripts, seeds, while_deposed
from .weather import Climate

EXAMPLES = 1000


# --- faults of the loop ------------------------------------------------------
class AnswersBeforeCommit(Appender):
    """5: `ok` when the command is sent."""

    def _rows(self, batch: Any, head: Head) -> list[Row]:
        rows = super()._rows(batch, head)
        for item, row in zip(batch, rows, strict=True):
            item.committed(row.seq, row.ts, row.new.digest, dup=False)
        return rows


class AnswersBeforeTelling(Appender):
    """On_commit comes first: a client that got an `ok` must find the entry on its way to all."""

    def _answer(self, state: _Log, committed: list[Found], dup: bool) -> None:
        for f in committed:
            item = self._remove(state, (f.entry.sender, f.cid))
            if item is not None:
                item.committed(f.entry.seq, f.ts, f.digest, dup)
        self._loop.call_later(0.001, super()._answer, state, committed, dup)


class Ops:
    """Stands between the loop and its store."""

    def __init__(self, ops: LogOps) -> None:
        self.ops = ops

    async def newest(self, conv: str) -> Head:
        return await self.ops.newest(conv)

    async def decide(self, conv: str, head: Head, entries: Sequence[NewEntry]) -> Decisions:
        return await self.ops.decide(conv, head, entries)

    async def insert(self, conv: str, rows: Sequence[Row]) -> None:
        await self.ops.insert(conv, rows)

    async def find(self, conv: str, keys: Sequence[Key], as_of: object) -> list[Found]:
        return await self.ops.find(conv, keys, as_of)


class WrappedAppender(Appender):
    """A loop over faulty operations."""

    wrap: type[Ops] = Ops

    def __init__(self, ops: LogOps, on_commit: OnCommit, *args: Any, **kwargs: Any) -> None:
        super().__init__(self.wrap(ops), on_commit, *args, **kwargs)


class BelievesInItsHead(WrappedAppender):
    """1, 3: after an unknown outcome, the head is where it would be if all had gone well."""

    class wrap(Ops):
        async def decide(self, conv: str, head: Head, entries: Sequence[NewEntry]) -> Decisions:
            return await self.ops.decide(conv, Head(), entries)

        async def insert(self, conv: str, rows: Sequence[Row]) -> None:
            try:
                await self.ops.insert(conv, rows)
            except Unknown:
                self.guess = (conv, Head(rows[-1].seq, rows[-1].msgs, rows[-1].last_msg))
                raise

        async def newest(self, conv: str) -> Head:
            head = await self.ops.newest(conv)
            guess = self.__dict__.pop("guess", None)
            return guess[1] if guess and guess[0] == conv and guess[1].seq > head.seq else head


class BelievesInTheBus(Appender):
    """1: the head is moved to what is heard, its counters are not known."""

    def heard(self, conv: str, seq: int) -> None:
        state = self._active.get(conv) or self._idle.get(conv)
        if state is not None and state.head is not None and state.head.seq < seq:
            state.head = Head(seq, state.head.msgs, state.head.last_msg)


class TakesUnknownForDone(WrappedAppender):
    """3: a time-out is taken for success."""

    class wrap(Ops):
        async def insert(self, conv: str, rows: Sequence[Row]) -> None:
            try:
                await self.ops.insert(conv, rows)
            except Unknown as exc:
                if str(exc) != "timed out":
                    raise


class TakesUnknownForFailed(WrappedAppender):
    """3, 4: nothing is looked up, and what may have happened is tried again under a new cid."""

    class wrap(Ops):
        n = 0

        async def insert(self, conv: str, rows: Sequence[Row]) -> None:
            if self.n:
                rows = [
                    Row(msgspec.structs.replace(r.new, cid=f"{r.new.cid}-{self.n}"), r.seq, r.ts, r.msgs, r.last_msg)
                    for r in rows
                ]
            try:
                await self.ops.insert(conv, rows)
                self.n = 0
            except Unknown:
                self.n += 1
                raise

        async def find(self, conv: str, keys: Sequence[Key], as_of: object) -> list[Found]:
            return []


class AsksOnceWhatIsAllowed(WrappedAppender):
    """6: membership is asked when the entry comes, and not again for the head that it is to follow."""

    class wrap(Ops):
        def __init__(self, ops: LogOps) -> None:
            super().__init__(ops)
            self.known: dict[tuple[str, str, str], Decision] = {}

        async def decide(self, conv: str, head: Head, entries: Sequence[NewEntry]) -> Decisions:
            fresh = [e for e in entries if (conv, e.sender, e.cid) not in self.known]
            if fresh:
                for e, d in zip(fresh, (await self.ops.decide(conv, head, fresh)).each, strict=True):
                    self.known[conv, e.sender, e.cid] = d
            return Decisions([self.known[conv, e.sender, e.cid] for e in entries])


class CompletesOnce(WrappedAppender):
    """6: the role before is that of the first head that the entry was to follow, not of the one that it follows."""

    class wrap(Ops):
        def __init__(self, ops: LogOps) -> None:
            super().__init__(ops)
            self.first: dict[tuple[str, str, str], NewEntry] = {}

        async def decide(self, conv: str, head: Head, entries: Sequence[NewEntry]) -> Decisions:
            decisions = await self.ops.decide(conv, head, entries)
            each = [
                self.first.setdefault((conv, d.sender, d.cid), d)
                if isinstance(d, NewEntry) and isinstance(d.change, RoleChange)
                else d
                for d in decisions.each
            ]
            return Decisions(each, decisions.as_of)


class AsksForTheWholeBatchAtOnce(Appender):
    """6: an entry in the same command as the removal of its sender, behind it."""

    def _peek(self, state: _Log) -> list[_Item]:
        return list(state.queue.values())[: self._limits.batch_entries]


class RefusesWhatMayStillLand(Appender):
    """A refusal while a place that an earlier try could take is still free."""

    async def _admit(self, state: _Log, head: Head, batch: list[_Item]) -> list[_Item]:
        tried = [item.tried for item in batch]
        for item in batch:
            item.tried = 0
        try:
            return await super()._admit(state, head, batch)
        finally:
            for item, t in zip(batch, tried, strict=True):
                item.tried = t


class RefusesWithoutLooking(WrappedAppender):
    """What is not allowed any more may have been appended while it was."""

    class wrap(Ops):
        async def find(self, conv: str, keys: Sequence[Key], as_of: object) -> list[Found]:
            # In the loop, only the look before a refusal comes with nothing inserted before it.
            return await self.ops.find(conv, keys, as_of) if self.__dict__.pop("inserted", False) else []

        async def insert(self, conv: str, rows: Sequence[Row]) -> None:
            self.inserted = True
            await self.ops.insert(conv, rows)


class FailsOneByOne(Appender):
    """Only the oldest is `unavailable`; what stood behind it overtakes it."""

    def _fail(self, state: _Log, why: str) -> None:
        if self._closing or not state.queue:
            return super()._fail(state, why)
        item = next(iter(state.queue.values()))
        self._remove(state, item.key)
        item.denied(Unavailable(why))
        return None


class NeverLooksLate(Appender):
    """An entry that lands after `unavailable` is never announced."""

    async def _look_late(self, conv: str, keys: list[Key]) -> None: ...


class TellsWhatWasFoundToNobody(Appender):
    """An entry that is read back is answered, but not announced."""

    def _announce(self, entries: list[Entry]) -> None:
        if asyncio.current_task() is None:
            super()._announce(entries)


class IgnoresTheDigest(WrappedAppender):
    """4: a cid that is used again for something else is taken for a repetition."""

    class wrap(Ops):
        async def find(self, conv: str, keys: Sequence[Key], as_of: object) -> list[Found]:
            found = await self.ops.find(conv, keys, as_of)
            return [Found(f.cid, self.digests[f.entry.sender, f.cid], f.ts, f.entry) for f in found]

        digests: ClassVar[dict[Key, bytes]] = {}

        async def insert(self, conv: str, rows: Sequence[Row]) -> None:
            self.digests.update({(r.new.sender, r.new.cid): r.new.digest for r in rows})
            await self.ops.insert(conv, rows)


class SameDigest(Appender):
    """4: of two with one cid in the queue, the second gets the answer of the first."""

    def submit(self, new: NewEntry) -> asyncio.Future[Appended]:
        future = super().submit(new)
        for state in self._active.values():
            for item in state.queue.values():
                item.waiters = [(f, item.new.digest) for f, _ in item.waiters]
        return future


class GivesUpSilently(Appender):
    """A failure ends the task, and no caller is answered."""

    def _fail(self, state: _Log, why: str) -> None:
        for item in list(state.queue.values()):
            self._remove(state, item.key)


# --- faults of what a store gives ----------------------------------------------
class AcknowledgesAlone(Client):
    """w:1: the primary acknowledges what no majority has."""

    async def wait_for_majority(self, node: Node, place: int) -> None: ...


class ReadsItsOwn(Client):
    """readConcern local: the head may be rolled back, and leaves a hole."""

    def visible(self, node: Node, conv: str) -> dict[int, Row]:
        return {r.seq: r for r in node.oplog if r.new.conv == conv}

    async def decide(self, conv: str, head: Head, entries: Sequence[NewEntry]) -> Decisions:
        return await super().decide(conv, Head(), entries)


class Unordered(Client):
    """2: after a duplicate the rest of the command goes on."""

    def write(self, node: Node, row: Row) -> int | None:
        written = super().write(node, row)
        return len(node.oplog) if written is None else written


class FindsOnAnyPrimary(Client):
    """`find` believes a primary that was deposed."""

    async def find(self, conv: str, keys: Sequence[Key], as_of: object) -> list[Found]:
        return await super().find(conv, keys, None)


class AllowsAsOfAnything(Client):
    """6: membership from a primary that was deposed."""

    async def decide(self, conv: str, head: Head, entries: Sequence[NewEntry]) -> Decisions:
        return await super().decide(conv, Head(), entries)


APPENDERS = [
    AnswersBeforeCommit, AnswersBeforeTelling, BelievesInItsHead, BelievesInTheBus, TakesUnknownForDone,
    TakesUnknownForFailed, AsksOnceWhatIsAllowed, CompletesOnce, AsksForTheWholeBatchAtOnce, RefusesWhatMayStillLand,
    RefusesWithoutLooking, FailsOneByOne, NeverLooksLate, TellsWhatWasFoundToNobody, IgnoresTheDigest, SameDigest,
    GivesUpSilently,
]  # fmt: skip
CLIENTS = [AcknowledgesAlone, ReadsItsOwn, Unordered, FindsOnAnyPrimary, AllowsAsOfAnything]


#: Where a fault shows only in a rare course of events, that is what is looked at.
RARE: dict[Any, tuple[Any, Any]] = {
    RefusesWhatMayStillLand: (put_out, st.builds(Climate, lagging_majority=st.just(0.3))),
    CompletesOnce: (same_member, climates),
    FindsOnAnyPrimary: (while_deposed, st.builds(Climate, stale_read=st.just(0.5))),
}


@pytest.mark.parametrize("fault", [*APPENDERS, *CLIENTS], ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found(fault: Any) -> None:
    parts = {"make_appender" if issubclass(fault, Appender) else "make_client": fault}
    some_scripts, some_climates = RARE.get(fault, (scripts, climates))

    @bounded(EXAMPLES, shrink=False)
    @given(script=some_scripts, seed=seeds, climate=some_climates, writers=st.integers(1, 3))
    def property(script: Any, seed: int, climate: Any, writers: int) -> None:
        play(script, seed, climate, writers, **parts)

    with pytest.raises(AssertionError):
        property()
