"""Values in level 1: how long they are kept, and which are refused."""

from __future__ import annotations

from chatcore.cache.l2 import JITTER
from chatcore.cache.lookup import ABSENT_PART, DROPS, REFRESH_HITS, Generations, ValuesL1

from .parts import Clock


def level(clock: Clock, entries: int = 100, chance: float = 0.0) -> ValuesL1[str]:
    return ValuesL1(entries, ttl_s=10.0, negative_ttl_s=1.0, clock=clock, chance=lambda: chance)


def value(l1: ValuesL1[str], key: str) -> str | None:
    line = l1.get(key)
    return line.value if line is not None else "unknown"


def test_a_value_is_kept_until_it_expires() -> None:
    clock = Clock()
    l1 = level(clock)
    assert value(l1, "a") == "unknown"
    assert l1.put("a", "x", l1.ticket())
    clock.move(9.9)
    assert value(l1, "a") == "x"
    clock.move(0.2)
    assert value(l1, "a") == "unknown"


def test_lives_are_shortened_at_random() -> None:
    clock = Clock()
    l1 = level(clock, chance=0.999)
    l1.put("a", "x", l1.ticket())
    clock.move(10 * (1 - JITTER) - 0.1)
    assert value(l1, "a") == "x"
    clock.move(0.2)
    assert value(l1, "a") == "unknown"


def test_an_absent_value_expires_earlier() -> None:
    clock = Clock()
    l1 = level(clock)
    l1.put("a", None, l1.ticket())
    assert value(l1, "a") is None
    clock.move(1.1)
    assert value(l1, "a") == "unknown"
    l1.put("a", None, l1.ticket())
    l1.put("a", "x", l1.ticket())
    assert value(l1, "a") == "x"
    l1.put("a", None, l1.ticket())
    assert value(l1, "a") is None


def test_a_caller_can_ask_for_a_shorter_life() -> None:
    clock = Clock()
    l1 = level(clock)
    l1.put("a", "x", l1.ticket(), 2.0)
    clock.move(2.1)
    assert value(l1, "a") == "unknown"


def test_a_value_that_was_read_before_a_drop_is_refused() -> None:
    l1 = level(Clock())
    before = l1.ticket()
    l1.drop("a")
    assert not l1.put("a", "old", before)
    assert value(l1, "a") == "unknown"
    assert l1.put("b", "x", before)  # it was not dropped
    assert l1.put("a", "new", l1.ticket())


def test_a_value_that_was_read_before_a_clear_is_refused() -> None:
    l1 = level(Clock())
    before = l1.ticket()
    l1.put("b", "x", before)
    l1.clear()
    assert not l1.put("a", "old", before)
    assert value(l1, "b") == "unknown"
    assert l1.put("a", "new", l1.ticket())


def test_a_ticket_older_than_all_drops_remembered_is_refused() -> None:
    generations = Generations()
    generations.drop("first")
    before = generations.ticket()
    for i in range(DROPS):
        generations.drop(f"k{i}")
    assert generations.valid("other", before)  # all drops since are known: none is of this key
    generations.drop("one more")
    assert not generations.valid("other", before - 1)
    assert not generations.valid("k0", before)  # its drop is forgotten, and so are tickets from before it


def test_absent_values_evict_no_present_ones() -> None:
    l1 = level(Clock(), entries=16 * ABSENT_PART)
    l1.put("a", "x", l1.ticket())
    for i in range(1000):
        l1.put(f"junk{i}", None, l1.ticket())
    assert value(l1, "a") == "x"
    assert len(l1) == 1 + 16


def test_the_least_recently_used_value_is_evicted_first() -> None:
    l1 = level(Clock(), entries=2)
    for key in "ab":
        l1.put(key, key, l1.ticket())
    l1.get("a")
    l1.put("c", "c", l1.ticket())
    assert [value(l1, key) for key in "abc"] == ["a", "unknown", "c"]


def test_a_value_with_many_hits_is_due_once_before_its_end() -> None:
    clock = Clock()
    l1 = level(clock)
    l1.put("a", "x", l1.ticket())
    line = l1.get("a")
    assert line is not None
    for _ in range(REFRESH_HITS):
        l1.get("a")
    assert not line.refresh_due(clock.now), "most of its life is left"
    clock.move(9)
    assert line.refresh_due(clock.now)
    assert not line.refresh_due(clock.now)
    l1.put("rare", "x", l1.ticket())
    clock.move(9)
    rare = l1.get("rare")
    assert rare is not None
    assert not rare.refresh_due(clock.now)
