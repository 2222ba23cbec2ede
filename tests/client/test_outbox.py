"""Unacknowledged messages: their order, when they go out, and what is repeated."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chatcore.client.outbox import UNANSWERED_DEFAULT as FREE
from chatcore.client.outbox import Draft, MessageOutbox, Pending, new_cid


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
    box = MessageOutbox()
    for conv in ("a", "b"):
        for n in (1, 2):
            box.add(pending(conv, n))
    first = box.take(0.0, FREE)
    assert cids(first) == ["a-1", "b-1"]
    assert box.take(0.0, FREE) == []
    box.finish(first[0])
    assert cids(box.take(0.0, FREE)) == ["a-2"]


def test_a_retryable_refusal_holds_its_conversation_until_its_time() -> None:
    box = MessageOutbox()
    for conv in ("a", "b"):
        for n in (1, 2):
            box.add(pending(conv, n))
    a, b = box.take(0.0, FREE)
    box.retry(a, 5.0, over_rate=False)
    box.finish(b)
    assert cids(box.take(0.0, FREE)) == ["b-2"]
    assert box.next_at(0.0) == 5.0
    assert cids(box.take(5.0, FREE)) == ["a-1"]


def test_a_rate_limit_holds_everything() -> None:
    box = MessageOutbox()
    box.add(pending("a", 1))
    box.add(pending("b", 1))
    a, _ = box.take(0.0, FREE)
    box.retry(a, 2.0, over_rate=True)
    box.add(pending("c", 1))
    assert box.take(1.0, FREE) == []
    assert box.next_at(1.0) == 2.0
    assert cids(box.take(2.0, FREE)) == ["a-1", "c-1"]


def test_each_message_that_was_over_the_rate_goes_out_at_its_own_time_and_before_new_ones() -> None:
    box = MessageOutbox()
    for conv in ("a", "b", "c", "d"):
        box.add(pending(conv, 1))
    a, b, c = box.take(0.0, 3)
    for at, one in ((3.0, b), (1.0, a), (2.0, c)):
        box.retry(one, at, over_rate=True)
    sent: list[tuple[float, list[str]]] = []
    now = 0.0
    while (at := box.next_at(now)) is not None:
        now = at
        sent.append((now, cids(box.take(now, FREE))))
    assert sent == [(1.0, ["a-1"]), (2.0, ["c-1"]), (3.0, ["b-1", "d-1"])]


def test_after_a_promise_that_did_not_hold_all_wait_for_the_last_time_and_go_out_one_at_a_time() -> None:
    box = MessageOutbox()
    for conv in ("a", "b", "c"):
        box.add(pending(conv, 1))
    for at, one in enumerate(box.take(0.0, FREE), 1):
        box.retry(one, float(at), over_rate=True)
    (a,) = box.take(1.0, FREE)
    box.retry(a, 4.0, over_rate=True)
    assert box.take(3.0, FREE) == []
    assert box.next_at(3.0) == 4.0
    (b,) = box.take(4.0, FREE)
    assert cids([b]) == ["b-1"]
    assert box.take(4.0, FREE) == []
    box.finish(b)
    assert cids(box.take(4.0, FREE)) == ["c-1", "a-1"]


def test_of_one_conversation_nothing_overtakes_a_message_that_waits_for_a_later_time() -> None:
    box = MessageOutbox(window=3)
    for n in (1, 2, 3):
        box.add(pending("a", n))
    first, second, third = box.take(0.0, FREE)
    box.retry(first, 3.0, over_rate=True)
    box.retry(second, 1.0, over_rate=True)
    box.retry(third, 2.0, over_rate=False)
    assert box.take(1.0, FREE) == []
    assert box.take(2.0, FREE) == []
    assert cids(box.take(3.0, FREE)) == ["a-1", "a-2", "a-3"]


def test_no_more_go_out_than_are_free_and_the_rest_keeps_its_place() -> None:
    box = MessageOutbox(window=2)
    for conv in ("a", "b"):
        for n in (1, 2):
            box.add(pending(conv, n))
    assert cids(box.take(0.0, 3)) == ["a-1", "b-1", "a-2"]
    assert box.take(0.0, 0) == []
    assert box.take(0.0, -1) == []
    assert cids(box.take(0.0, 3)) == ["b-2"]


def test_a_new_connection_has_no_promises_but_a_refused_message_keeps_its_time() -> None:
    box = MessageOutbox()
    for conv in ("a", "b"):
        box.add(pending(conv, 1))
    (a,) = box.take(0.0, 1)
    box.retry(a, 2.0, over_rate=True)
    assert box.take(0.0, FREE) == []
    assert box.disconnected(bad_message=False, others=0) is None
    assert cids(box.take(0.0, FREE)) == ["b-1"]
    assert box.take(1.9, FREE) == []
    assert cids(box.take(2.0, FREE)) == ["a-1"]


def test_a_message_that_is_not_stored_yet_holds_back_those_after_it() -> None:
    box = MessageOutbox(window=2)
    first = pending("a", 1, stored=False)
    box.add(first)
    box.add(pending("a", 2))
    assert box.take(0.0, FREE) == []
    box.stored(first)
    assert cids(box.take(0.0, FREE)) == ["a-1", "a-2"]


def test_after_a_lost_connection_the_same_go_out_again_in_order() -> None:
    box = MessageOutbox(window=3)
    for n in (1, 2, 3):
        box.add(pending("a", n))
    assert len(box.take(0.0, FREE)) == 3
    assert box.disconnected(bad_message=False, others=0) is None
    assert cids(box.take(0.0, FREE)) == ["a-1", "a-2", "a-3"]


def test_the_only_message_that_can_have_caused_a_close_is_returned() -> None:
    box = MessageOutbox()
    box.add(pending("a", 1))
    (only,) = box.take(0.0, FREE)
    assert box.disconnected(bad_message=True, others=0) is only


def test_suspects_go_out_one_at_a_time_until_the_next_close_names_one() -> None:
    box = MessageOutbox()
    for conv in ("a", "b", "c"):
        box.add(pending(conv, 1))
    assert len(box.take(0.0, FREE)) == 3
    assert box.disconnected(bad_message=True, others=0) is None
    (suspect,) = box.take(0.0, FREE)
    box.finish(suspect)
    (next_one,) = box.take(0.0, FREE)
    assert box.disconnected(bad_message=True, others=0) is next_one
    box.finish(next_one)
    (last,) = box.take(0.0, FREE)
    box.finish(last)
    box.add(pending("d", 1))
    box.add(pending("e", 1))
    assert len(box.take(0.0, FREE)) == 2


def test_busy_conversations_do_not_starve_the_others() -> None:
    box = MessageOutbox()
    for n in range(FREE):
        box.add(pending(f"busy{n}", 1))
        box.add(pending(f"busy{n}", 2))
    box.add(pending("late", 1))
    busy = box.take(0.0, FREE)
    box.finish(busy[0])
    assert cids(box.take(0.0, 1)) == ["late-1"]


@given(st.integers(1, 3), st.lists(st.tuples(st.sampled_from(["ok", "retry", "lost"]), st.integers(0, 5)), max_size=60))
def test_whatever_happens_each_conversation_is_acknowledged_in_order(window: int, steps: list[tuple[str, int]]) -> None:
    """With one message at a time. With more, nothing is sent before its time, and all are acknowledged."""
    box = MessageOutbox(window)
    for conv in ("a", "b", "c"):
        for n in range(4):
            box.add(pending(conv, n))
    flying: list[Pending] = []
    acked: list[str] = []
    not_before: dict[str, float] = {}
    now = 0.0

    def take() -> None:
        taken = box.take(now, FREE - len(flying))
        assert all(not_before.get(one.draft.cid, 0.0) <= now for one in taken)
        flying.extend(taken)

    for what, which in [*steps, *[("ok", 0)] * 20]:
        now += 1.0
        take()
        if what == "lost":
            box.disconnected(bad_message=False, others=0)
            flying.clear()
        elif flying:
            one = flying.pop(which % len(flying))
            if what == "ok":
                box.finish(one)
                acked.append(one.draft.cid)
            else:
                not_before[one.draft.cid] = now + 0.5 * which
                box.retry(one, now + 0.5 * which, over_rate=which % 2 == 0)
    while len(box):
        now += 1.0
        take()
        for one in flying:
            box.finish(one)
            acked.append(one.draft.cid)
        flying.clear()
    for conv in ("a", "b", "c"):
        mine = [cid for cid in acked if cid.startswith(conv)]
        assert (mine if window == 1 else sorted(mine)) == [f"{conv}-{n}" for n in range(4)]
