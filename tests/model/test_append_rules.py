"""The append loop, rule by rule: batches, reads, backing off, yielding, looking late, bounds, closing."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from chatcore.entries import MemberFields, NewEntry
from chatcore.errors import ChatError, Conflict, NotFound, Unavailable
from chatcore.store.append import LATE_LOOKS_S, Appender, AppendLimits, Decisions, Found, Head, Key, Row, Unknown
from chatcore.store.base import Appended, Entry

from . import loop as virtual
from .append_world import Send as SendAction
from .append_world import entry, new_role, play
from .weather import CALM


class Ops:
    """A store that takes 10 ms for each operation and fails as it is set to."""

    def __init__(self) -> None:
        self.logs: dict[str, dict[int, Row]] = {"c": {}, "d": {}}
        self.log = self.logs["c"]
        self.calls: list[tuple[float, str, Any]] = []
        self.lose = 0  # so many inserts meet an entry of another writer
        self.down = False
        self.answer_late = False  # inserts happen, and are reported as unknown
        self.denied: set[str] = set()
        self.takes_s: dict[str, float] = {}  # an operation that takes longer

    async def _take(self, what: str, detail: Any = None) -> None:
        self.calls.append((round(asyncio.get_running_loop().time(), 6), what, detail))
        await asyncio.sleep(self.takes_s.get(what, 0.010))
        if self.down:
            raise Unknown("down")

    def did(self) -> list[str]:
        return [what for _, what, _ in self.calls]

    async def newest(self, conv: str) -> Head:
        await self._take("newest")
        log = self.logs[conv]
        if not log:
            return Head()
        last = log[max(log)]
        return Head(last.seq, last.msgs, last.last_msg)

    async def decide(self, conv: str, head: Head, entries: Sequence[NewEntry]) -> Decisions:
        return Decisions([NotFound("no") if e.sender in self.denied else e for e in entries])

    async def insert(self, conv: str, rows: Sequence[Row]) -> None:
        await self._take("insert", [r.new.cid for r in rows])
        log = self.logs[conv]
        if self.lose:
            self.lose -= 1
            seq = len(log) + 1
            log[seq] = Row(entry(conv, "other", f"o{seq}", "msg", b"{}"), seq, 0, seq, seq)
            raise Unknown("duplicate")
        for row in rows:
            if any((r.new.sender, r.new.cid) == (row.new.sender, row.new.cid) for r in log.values()):
                raise Unknown("duplicate")
            assert row.seq == len(log) + 1
            log[row.seq] = row
        if self.answer_late:
            raise Unknown("timed out")

    async def find(self, conv: str, keys: Sequence[Key], as_of: object) -> list[Found]:
        await self._take("find", list(keys))
        return [
            Found(r.new.cid, r.new.digest, r.ts, r.entry())
            for r in self.logs[conv].values()
            if (r.new.sender, r.new.cid) in set(keys)
        ]


class Bench:
    """One appender over such a store."""

    def __init__(self, **limits: Any) -> None:
        self.ops = Ops()
        self.announced: list[tuple[float, list[int]]] = []
        self.yields: list[float] = []
        self.loop = asyncio.get_running_loop()
        self.appender = Appender(
            self.ops, self._on_commit, lambda conv: self.yields.append(self.loop.time()),
            now_ms=lambda: 1_000_000, random=lambda: 0.999, limits=AppendLimits(**limits),
        )  # fmt: skip

    def _on_commit(self, entries: list[Entry]) -> None:
        self.announced.append((round(self.loop.time(), 3), [e.seq for e in entries]))

    def send(self, cid: str, body: bytes = b'{"body":"x"}', sender: str = "bob") -> asyncio.Future[Appended]:
        return self.appender.submit(entry("c", sender, cid, "msg", body))


Case = Callable[[Bench], Coroutine[Any, Any, None]]


def in_virtual_time(**limits: Any) -> Callable[[Case], Callable[[], None]]:
    """Run a case with a bench of its own, which is closed behind it."""

    def decorate(case: Case) -> Callable[[], None]:
        async def main() -> None:
            b = Bench(**limits)
            await case(b)
            await b.appender.close(1.0)

        def test() -> None:
            virtual.run(main())

        test.__name__ = test.__qualname__ = case.__name__
        test.__doc__ = case.__doc__
        return test

    return decorate


async def outcome(future: asyncio.Future[Appended]) -> Appended | ChatError:
    try:
        return await future
    except ChatError as exc:
        return exc


@in_virtual_time()
async def test_the_steady_state_is_one_write_per_batch_and_no_read(b: Bench) -> None:
    first = b.send("a")
    await asyncio.sleep(0.015)  # the first is in flight: what comes now forms the next batch
    rest = [b.send(cid) for cid in "bcd"]
    assert [a.seq for a in await asyncio.gather(first, *rest)] == [1, 2, 3, 4]
    await asyncio.sleep(60)
    assert (await b.send("e")).seq == 5
    assert b.ops.did() == ["newest", "insert", "insert", "insert"]
    assert [cids for _, what, cids in b.ops.calls if what == "insert"] == [["a"], ["b", "c", "d"], ["e"]]
    assert [(r.msgs, r.last_msg, r.ts) for r in b.ops.log.values()] == [(i, i, 1_000_000) for i in range(1, 6)]
    assert [seqs for _, seqs in b.announced] == [[1], [2, 3, 4], [5]]


@in_virtual_time()
async def test_a_head_that_is_known_to_be_low_is_read_again_instead_of_losing(b: Bench) -> None:
    await b.send("a")
    b.ops.log[2] = Row(entry("c", "other", "o", "msg", b"{}"), 2, 0, 2, 2)
    b.appender.heard("c", 2)
    assert (await b.send("b")).seq == 3
    b.appender.heard("c", 3)
    assert (await b.send("c")).seq == 4
    assert b.ops.did() == ["newest", "insert", "newest", "insert", "insert"]


@in_virtual_time(batch_entries=3, batch_bytes=2_000)
async def test_batches_are_bounded_by_entries_and_bytes(b: Bench) -> None:
    futures = [b.send(str(i)) for i in range(7)]
    futures += [b.send(f"big{i}", b"x" * 900) for i in range(3)]
    futures.append(b.send("huge", b"x" * 5_000))  # over the bound by itself: alone
    await asyncio.gather(*futures)
    sizes = [len(cids) for _, what, cids in b.ops.calls if what == "insert"]
    assert sizes == [3, 3, 2, 1, 1, 1]


@in_virtual_time()
async def test_a_loser_backs_off_and_after_two_losses_asks_the_others_to_yield(b: Bench) -> None:
    b.ops.lose = 8
    assert (await b.send("a")).seq == 9
    inserts = [t for t, what, _ in b.ops.calls if what == "insert"]
    # Each try is an insert, a find and a newest of 10 ms; the rest is the wait: 2 ms * 2^losses, at most 100 ms.
    waits = [round(b - a - 0.030, 3) for a, b in itertools.pairwise(inserts)]
    assert waits == pytest.approx([0.004, 0.008, 0.016, 0.032, 0.064, 0.1, 0.1, 0.1], abs=0.001)
    assert len(b.yields) == 7


@in_virtual_time()
async def test_who_is_asked_to_yield_pauses_twice_its_last_commit_once(b: Bench) -> None:
    b.appender.on_yield("c")  # unknown here: nothing to do
    await b.send("a")
    began = b.loop.time()
    b.appender.on_yield("c")
    await b.send("b")
    assert b.ops.calls[-1][0] == pytest.approx(began + 0.020)
    began = b.loop.time()
    await b.send("c")
    assert b.ops.calls[-1][0] == pytest.approx(began)


@in_virtual_time()
async def test_who_is_asked_again_pauses_twice_as_long_until_somebody_got_in(b: Bench) -> None:
    """Where a read takes longer than a commit, twice a commit is over before the other one writes: for ever."""
    await b.send("a")

    async def pause() -> float:
        b.appender.on_yield("c")
        began = b.loop.time()
        await b.send(f"after {began}")
        return b.loop.time() - began - 0.010

    pauses = [await pause() for _ in range(8)]
    assert pauses == pytest.approx([0.020, 0.040, 0.080, 0.160, 0.320, 0.640, 1.0, 1.0])
    # Another writer got in while this one paused: it reads before it writes, and pauses half as long the next time.
    b.appender.on_yield("c")
    future = b.send("b")
    await asyncio.sleep(0.5)
    seq = len(b.ops.log) + 1
    b.ops.log[seq] = Row(entry("c", "other", "o", "msg", b"{}"), seq, 0, seq, seq)
    b.appender.heard("c", seq)
    assert (await future).seq == seq + 1
    assert b.ops.did()[-2:] == ["newest", "insert"]
    assert await pause() == pytest.approx(0.640)


@in_virtual_time()
async def test_the_others_are_asked_to_yield_when_the_next_try_begins(b: Bench) -> None:
    """Asked before the loser waits, they would be through with their pause when it tries."""
    b.ops.lose = 4
    await b.send("a")
    newest = [t for t, what, _ in b.ops.calls if what == "newest"]
    assert b.yields == pytest.approx(newest[2:])


@in_virtual_time()
async def test_who_loses_does_not_yield(b: Bench) -> None:
    b.ops.lose = 1
    future = b.send("a")
    await asyncio.sleep(0.031)  # lost, and waiting for the next try
    b.appender.on_yield("c")
    await future
    inserts = [t for t, what, _ in b.ops.calls if what == "insert"]
    assert inserts[1] - inserts[0] < 0.035


@in_virtual_time()
async def test_unknown_but_done_is_found_told_and_answered_as_a_repetition(b: Bench) -> None:
    b.ops.answer_late = True
    assert await b.send("a") == Appended(1, 1_000_000, dup=True)
    assert [seqs for _, seqs in b.announced] == [[1]]
    b.ops.answer_late = False
    assert await b.send("a") == Appended(1, 1_000_000, dup=True)
    assert isinstance(await outcome(b.send("a", b'{"body":"y"}')), Conflict)


@in_virtual_time()
async def test_the_same_cid_while_it_is_under_way(b: Bench) -> None:
    first, second = b.send("a"), b.send("a")
    other = b.send("a", b'{"body":"y"}')
    first.cancel()  # a session that ends takes no answer of another with it
    assert (await second).seq == 1
    assert isinstance(await outcome(other), Conflict)
    assert len(b.ops.log) == 1


@in_virtual_time(batch_entries=2)
async def test_the_whole_queue_fails_together_and_is_looked_for_at_1_2_4_to_60_s(b: Bench) -> None:
    futures = [b.send(cid) for cid in "abc"]
    await asyncio.sleep(0.015)
    b.ops.down = True
    assert [type(o) for o in await asyncio.gather(*map(outcome, futures))] == [Unavailable] * 3
    failed_at = b.loop.time()
    b.ops.down = False
    b.ops.calls.clear()
    await asyncio.sleep(25)
    b.ops.log[1] = Row(entry("c", "bob", "a", "msg", b'{"body":"x"}'), 1, 0, 1, 1)
    await asyncio.sleep(100)
    looks = [(t - failed_at, keys) for t, _, keys in b.ops.calls]
    assert [t for t, _ in looks] == pytest.approx(list(LATE_LOOKS_S))
    # Only what was part of a command; and no longer what was found.
    assert [keys for _, keys in looks] == [[("bob", "a"), ("bob", "b")]] * 6 + [[("bob", "b")]]
    assert b.announced == [(round(failed_at + 32.01, 3), [1])]


@in_virtual_time(max_wait_s=1.0)
async def test_who_waits_too_long_is_unavailable_and_so_are_those_behind(b: Bench) -> None:
    b.ops.lose = 1_000
    first = b.send("a")
    await asyncio.sleep(0.9)
    second = b.send("b")
    assert isinstance(await outcome(first), Unavailable)
    assert 0.9 < b.loop.time() <= 1.0
    assert isinstance(await outcome(second), Unavailable)
    b.ops.lose = 0
    assert isinstance(await b.send("c"), Appended)


@in_virtual_time(max_wait_s=1.0)
async def test_nobody_waits_longer_for_an_operation_that_takes_longer(b: Bench) -> None:
    """The wait was looked at between operations only: an insert and the look at it could take twice as long."""
    b.ops.takes_s = {"insert": 5.0}
    first = b.send("a")
    await asyncio.sleep(0.5)
    second = b.send("b")
    assert isinstance(await outcome(first), Unavailable)
    assert 0.9 < b.loop.time() <= 1.0
    assert second.done() and isinstance(second.exception(), Unavailable), "nothing overtakes what failed"
    third = b.send("c")
    assert isinstance(await outcome(third), Unavailable)
    assert b.loop.time() <= 2.0
    b.ops.takes_s = {}
    await asyncio.sleep(3.0)
    again = b.send("a")
    assert (await b.send("d")).seq == 2
    assert (await again).seq == 1, "what landed in the end is announced, and found by a repetition"
    assert [row.new.cid for row in b.ops.log.values()] == ["a", "d"], "and nothing of those that had not been sent"
    assert b.announced[0][1] == [1]


@in_virtual_time(max_wait_s=1.0)
async def test_what_was_answered_while_the_head_was_read_is_not_appended_any_more(b: Bench) -> None:
    b.ops.takes_s = {"newest": 3.0}
    assert isinstance(await outcome(b.send("a")), Unavailable)
    again = b.send("b")
    assert isinstance(await outcome(again), Unavailable)
    await asyncio.sleep(5.0)
    assert b.ops.did() == ["newest"]
    b.ops.takes_s = {}
    assert (await b.send("a")).dup is False


@in_virtual_time()
async def test_who_is_refused_holds_nobody_up(b: Bench) -> None:
    b.ops.denied = {"eve"}
    results = await asyncio.gather(
        *(outcome(b.send(c, sender=s)) for c, s in [("1", "bob"), ("2", "eve"), ("3", "bob")])
    )
    assert [r.seq if isinstance(r, Appended) else type(r) for r in results] == [1, NotFound, 2]
    # What was appended while it was allowed is not refused afterwards.
    b.ops.denied = {"bob"}
    assert await outcome(b.send("1")) == Appended(1, 1_000_000, dup=True)


@in_virtual_time()
async def test_each_head_is_decided_from_the_request_not_from_what_an_earlier_head_made_of_it(b: Bench) -> None:
    """To lift a ban of a channel completes the request for `member` as `none`: decided again from that, for a user
    who has joined meanwhile, it would be a removal.
    """
    asked = new_role("c", "a", "bob", "member")
    seen: list[NewEntry] = []

    async def decide(conv: str, head: Head, entries: Sequence[NewEntry]) -> Decisions:
        seen.extend(entries)
        return Decisions([e.completed(MemberFields("bob", f"as of {head.seq}", "banned")) for e in entries])

    b.ops.decide, b.ops.lose = decide, 1  # type: ignore[method-assign]
    assert (await b.appender.submit(asked)).seq == 2
    assert seen == [asked, asked]
    written = b.ops.log[2].new
    assert written.digest == asked.digest
    assert written.fields == b'{"user":"bob","role":"as of 1","was":"banned"}'
    assert b.ops.log[2].last_change == 2
    again = await b.appender.submit(asked)
    assert again == Appended(2, 1_000_000, dup=True)


@in_virtual_time(queue_entries=3, total_entries=4)
async def test_queues_are_bounded_each_and_all_together(b: Bench) -> None:
    futures = [b.send(str(i)) for i in range(4)]
    other = [b.appender.submit(entry("d", "bob", str(i), "msg", b"{}")) for i in range(2)]
    assert isinstance(await outcome(futures[3]), Unavailable)
    assert isinstance(await outcome(other[1]), Unavailable)
    assert [a.seq for a in await asyncio.gather(*futures[:3])] == [1, 2, 3]


@in_virtual_time()
async def test_close_finishes_what_is_queued_and_takes_no_more(b: Bench) -> None:
    future = b.send("a")
    closing = asyncio.ensure_future(b.appender.close(1.0))
    await asyncio.sleep(0)
    assert isinstance(await outcome(b.send("b")), Unavailable)
    await closing
    assert (await future).seq == 1


@in_virtual_time()
async def test_close_answers_everybody_at_its_deadline_and_ends_the_late_looks(b: Bench) -> None:
    b.ops.down = True
    await outcome(b.send("a"))
    b.ops.down = False
    b.ops.lose = 1_000
    future = b.send("b")
    await b.appender.close(0.5)
    assert isinstance(await outcome(future), Unavailable)


@in_virtual_time()
async def test_a_bug_in_the_store_or_in_on_commit_is_never_told_as_internal(b: Bench) -> None:

    def fails(entries: list[Entry]) -> None:
        raise RuntimeError("a bug")

    b.appender._on_commit = fails
    assert (await b.send("a")).seq == 1

    async def broken(conv: str, keys: Sequence[Key], as_of: object) -> list[Found]:
        raise RuntimeError("a bug")

    b.ops.find, b.ops.lose = broken, 1  # type: ignore[method-assign]
    assert isinstance(await outcome(b.send("b")), Unavailable)


@pytest.mark.parametrize("seed", range(5))
def test_three_writers_on_one_conversation_all_get_through(seed: int) -> None:
    """Without trouble, contention alone makes no writer wait until it is `unavailable`."""
    script = [SendAction(writer, 0, sender, n=9) for _ in range(10) for writer, sender in ((0, 0), (1, 1), (2, 2))]
    world = play(script, seed, CALM, 3)
    assert all(isinstance(s.outcome, Appended) for s in world.sent)
