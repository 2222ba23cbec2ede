"""Unacknowledged messages: their order, when they go out, and what is repeated."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chatcore.client.outbox import IN_FLIGHT_MAX, Draft, Outbox, Pending, new_cid


def pending(conv: str, n: int, *, stored: bool = True) -> Pending:
    return Pending(Draft(conv, f"{conv}-{n}", "hi"), None, stored)


def cids(taken: list[Pending]) -> list[str]:
    return [p.draft.cid for p in taken]


def test_a_cid_has_128_random_bits_in_the_alphabet_of_ids() -> None:
    cid = new_cid()
    assert len(cid) == 22
    assert set(cid) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
    assert len({new_cid() for _ in range(1000)}) == 1000


def test_one_at_a_time_per_conversation_and_several_conversations_at_once() -> None:
    box = Outbox()
    for conv in ("a", "b"):
        for n in (1, 2):
            box.add(pending(conv, n))
    first = box.take(0.0)
    assert cids(first) == ["a-1", "b-1"]
    assert box.take(0.0) == []
    box.finish(first[0])
    assert cids(box.take(0.0)) == ["a-2"]


def test_a_retryable_refusal_holds_its_conversation_until_its_time() -> None:
    box = Outbox()
    for conv in ("a", "b"):
        for n in (1, 2):
            box.add(pending(conv, n))
    a, b = box.take(0.0)
    box.retry(a, 5.0, everything=False)
    box.finish(b)
    assert cids(box.take(0.0)) == ["b-2"]
    assert box.next_at(0.0) == 5.0
    assert cids(box.take(5.0)) == ["a-1"]


def test_a_rate_limit_holds_everything() -> None:
    box = Outbox()
    box.add(pending("a", 1))
    box.add(pending("b", 1))
    a, _ = box.take(0.0)
    box.retry(a, 2.0, everything=True)
    box.add(pending("c", 1))
    assert box.take(1.0) == []
    assert box.next_at(1.0) == 2.0
    assert set(cids(box.take(2.0))) == {"a-1", "c-1"}


def test_a_message_that_is_not_stored_yet_holds_back_those_after_it() -> None:
    box = Outbox(window=2)
    first = pending("a", 1, stored=False)
    box.add(first)
    box.add(pending("a", 2))
    assert box.take(0.0) == []
    first.stored = True
    assert cids(box.take(0.0)) == ["a-1", "a-2"]


def test_after_a_lost_connection_the_same_go_out_again_in_order() -> None:
    box = Outbox(window=3)
    for n in (1, 2, 3):
        box.add(pending("a", n))
    assert len(box.take(0.0)) == 3
    assert box.disconnected(bad_message=False, others=0) is None
    assert cids(box.take(0.0)) == ["a-1", "a-2", "a-3"]


def test_the_only_message_that_can_have_caused_a_close_is_returned() -> None:
    box = Outbox()
    box.add(pending("a", 1))
    (only,) = box.take(0.0)
    assert box.disconnected(bad_message=True, others=0) is only


def test_suspects_go_out_one_at_a_time_until_the_next_close_names_one() -> None:
    box = Outbox()
    for conv in ("a", "b", "c"):
        box.add(pending(conv, 1))
    assert len(box.take(0.0)) == 3
    assert box.disconnected(bad_message=True, others=0) is None
    (suspect,) = box.take(0.0)
    box.finish(suspect)
    (next_one,) = box.take(0.0)
    assert box.disconnected(bad_message=True, others=0) is next_one
    box.finish(next_one)
    (last,) = box.take(0.0)
    box.finish(last)
    box.add(pending("d", 1))
    box.add(pending("e", 1))
    assert len(box.take(0.0)) == 2


def test_busy_conversations_do_not_starve_the_others() -> None:
    box = Outbox()
    for n in range(IN_FLIGHT_MAX):
        box.add(pending(f"busy{n}", 1))
        box.add(pending(f"busy{n}", 2))
    box.add(pending("late", 1))
    busy = box.take(0.0)
    box.finish(busy[0])
    assert cids(box.take(0.0)) == ["late-1"]


@given(st.lists(st.tuples(st.sampled_from(["ok", "retry", "lost"]), st.integers(0, 5)), max_size=60))
def test_whatever_happens_each_conversation_is_acknowledged_in_order(steps: list[tuple[str, int]]) -> None:
    box = Outbox()
    for conv in ("a", "b", "c"):
        for n in range(4):
            box.add(pending(conv, n))
    flying: list[Pending] = []
    acked: list[str] = []
    now = 0.0
    for what, which in [*steps, *[("ok", 0)] * 20]:
        now += 1.0
        flying += box.take(now)
        if what == "lost":
            box.disconnected(bad_message=False, others=0)
            flying.clear()
        elif flying:
            one = flying.pop(which % len(flying))
            if what == "ok":
                box.finish(one)
                acked.append(one.draft.cid)
            else:
                box.retry(one, now + 1.5, everything=which == 0)
    while len(box):
        now += 1.0
        flying += box.take(now)
        for one in flying:
            box.finish(one)
            acked.append(one.draft.cid)
        flying.clear()
    for conv in ("a", "b", "c"):
        assert [cid for cid in acked if cid.startswith(conv)] == [f"{conv}-{n}" for n in range(4)]
