"""Recent entries in level 1: a range is returned whole or not at all, whatever order its entries came in."""

from __future__ import annotations

import random

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from chatcore.cache.recent import EntriesL1, cost
from chatcore.protocol import encode_entry
from chatcore.store.base import Entry

from .parts import Clock

KEEP = 5


def entry(seq: int, body: str = "hello", conv: str = "c") -> Entry:
    wire = encode_entry("msg", conv, seq, "somebody", 0, f"cid{seq}", orjson.dumps({"body": body}))
    return Entry(conv, seq, "msg", "somebody", seq, seq, wire)


def level(clock: Clock | None = None, conversations: int = 100, max_bytes: int = 10**6) -> EntriesL1:
    return EntriesL1(conversations, KEEP, max_bytes, ttl_s=10.0, clock=clock or Clock(), chance=lambda: 0.0)


def held(t: EntriesL1, first: int, last: int, conv: str = "c") -> list[int] | None:
    found = t.dense(conv, first, last)
    return None if found is None else [e.seq for e in found]


def test_a_range_without_gaps_is_returned() -> None:
    t = level()
    for seq in (1, 2, 4):
        t.add(entry(seq))
    assert held(t, 1, 2) == [1, 2]
    assert held(t, 1, 4) is None, "3 is missing"
    assert held(t, 4, 4) == [4]
    assert held(t, 4, 5) is None, "5 is unknown"
    t.add(entry(3))  # reordered
    t.add(entry(3))  # repeated
    assert held(t, 1, 4) == [1, 2, 3, 4]
    assert t.top("c") == 4


def test_only_the_last_are_kept() -> None:
    t = level()
    for seq in range(1, 9):
        t.add(entry(seq))
    assert held(t, 4, 8) == [4, 5, 6, 7, 8]
    assert held(t, 3, 8) is None
    t.add(entry(2))  # too late to matter
    assert len(t.held("c")) == KEEP


def test_a_gap_longer_than_the_window_removes_all_older_entries() -> None:
    t = level()
    for seq in (1, 2, 3, 1_000_000):
        t.add(entry(seq))
    assert set(t.held("c")) == {1_000_000}
    assert t.bytes == cost(entry(1_000_000))


def test_a_window_expires_whatever_is_added() -> None:
    clock = Clock()
    t = level(clock)
    for seq in range(1, 12):
        t.add(entry(seq))
        clock.move(1)
    assert held(t, 7, 10) is None, "it began 11 s ago"
    assert held(t, 11, 11) == [11]


def test_a_body_that_was_overwritten_does_not_come_back() -> None:
    t = level()
    t.add(entry(1))
    before = t.ticket()
    old = [entry(1)]
    t.overwrite(entry(1, "gone"))
    assert not t.merge("c", old, before), "it was read before"
    (now,) = t.dense("c", 1, 1) or []
    assert b"gone" in now.wire
    t.add(entry(1))  # the bus repeats
    (now,) = t.dense("c", 1, 1) or []
    assert b"gone" in now.wire


def test_a_drop_refuses_entries_that_are_being_read() -> None:
    t = level()
    t.add(entry(1))
    before = t.ticket()
    t.drop("c")
    assert held(t, 1, 1) is None
    assert not t.merge("c", [entry(1)], before)
    assert t.merge("d", [entry(1, conv="d")], before)
    t.clear()
    assert not t.merge("c", [entry(1)], before)
    assert not t.replace("c", [entry(1)], before)
    assert t.bytes == 0


def test_a_replaced_window_begins_a_new_life_and_keeps_newer_entries() -> None:
    clock = Clock()
    t = level(clock)
    for seq in (1, 2):
        t.add(entry(seq))
    clock.move(9)
    ticket = t.ticket()
    t.add(entry(3))
    assert t.replace("c", [entry(1), entry(2)], ticket)
    clock.move(9)
    assert held(t, 1, 3) == [1, 2, 3]


def test_bytes_and_conversations_are_bounded() -> None:
    t = level(conversations=3)
    for conv in "abcd":
        t.add(entry(1, conv=conv))
    assert len(t) == 3
    assert t.bytes == 3 * cost(entry(1, conv="a"))
    small = level(max_bytes=4 * cost(entry(1, "x" * 1000)))
    for conv in "abcdefgh":
        small.add(entry(1, "x" * 1000, conv))
    assert small.bytes <= 4 * cost(entry(1, "x" * 1000))
    assert held(small, 1, 1, "h") == [1]
    assert held(small, 1, 1, "a") is None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.booleans()), max_size=60), st.randoms(use_true_random=False))
def test_only_correct_and_complete_ranges_are_returned(steps: list[tuple[int, bool]], chance: random.Random) -> None:
    """Against the plainest model: all that ever came; bytes always add up."""
    t = level()
    truth: dict[int, str] = {}
    for seq, overwritten in steps:
        if overwritten and seq in truth:
            truth[seq] = f"new {chance.random()}"
            t.overwrite(entry(seq, truth[seq]))
        else:
            truth.setdefault(seq, "first")
            if chance.random() < 0.8:
                t.add(entry(seq, truth[seq]))
        assert t.bytes == sum(cost(e) for e in t.held("c").values())
        assert len(t.held("c")) <= KEEP
        top = t.top("c")
        first = chance.randint(1, 20)
        last = chance.randint(first, 20)
        found = t.dense("c", first, last)
        if found is not None:
            assert [e.seq for e in found] == list(range(first, last + 1))
            assert last <= top
            for e in found:
                assert e.wire == entry(e.seq, truth[e.seq]).wire
