"""A conversation's cursor: every entry once, in order, and no hole passed in silence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chatcore.client.catchup import HELD_MAX, Cursor
from chatcore.client.events import Entry, Event, Gap


def entry(seq: int) -> Entry:
    return Entry(conv="c1", seq=seq)


def seqs(events: list[Event]) -> list[int]:
    return [e.seq for e in events if isinstance(e, Entry)]


def test_contiguous_entries_are_given_out_at_once() -> None:
    cursor = Cursor("c1", 10)
    assert seqs(cursor.push(entry(11))) == [11]
    assert seqs(cursor.push(entry(12))) == [12]
    assert not cursor.behind


def test_entries_at_or_below_have_are_dropped() -> None:
    cursor = Cursor("c1", 10)
    assert cursor.push(entry(10)) == []
    assert cursor.push(entry(3)) == []
    assert cursor.have == 10


def test_a_hole_holds_back_what_follows_until_a_page_fills_it() -> None:
    cursor = Cursor("c1", 10)
    assert cursor.push(entry(13)) == []
    assert cursor.behind
    assert seqs(cursor.page([entry(11), entry(12)], at=12)) == [11, 12, 13]
    assert not cursor.behind


def test_what_is_held_back_is_bounded_and_what_did_not_fit_is_paged() -> None:
    cursor = Cursor("c1", 0)
    for seq in range(2, 2 * HELD_MAX):
        cursor.push(entry(seq))
    assert cursor.held == HELD_MAX
    assert seqs(cursor.page([entry(1)], at=1)) == list(range(1, HELD_MAX + 2))
    assert cursor.behind
    assert cursor.want == 2 * HELD_MAX - 1


def test_without_accept_nothing_is_given_out_and_all_is_to_be_paged() -> None:
    cursor = Cursor("c1", 0)
    assert cursor.push(entry(1), accept=False) == []
    assert cursor.behind
    assert seqs(cursor.page([entry(1)], at=1)) == [1]


def test_a_page_that_says_there_is_nothing_more_leaves_a_gap_by_name() -> None:
    cursor = Cursor("c1", 5)
    cursor.push(entry(9))
    assert cursor.page([], at=9) == [Gap(conv="c1", first=6, last=8), entry(9)]
    assert not cursor.behind


def test_a_page_that_lags_changes_nothing() -> None:
    cursor = Cursor("c1", 5)
    cursor.push(entry(9))
    assert cursor.page([], at=7) == []
    assert cursor.behind


def test_a_page_with_a_hole_names_it() -> None:
    cursor = Cursor("c1", 5)
    cursor.push(entry(10))
    out = cursor.page([entry(6), entry(8), entry(9)], at=10)
    assert out == [entry(6), Gap(conv="c1", first=7, last=7), entry(8), entry(9), entry(10)]


def test_a_lost_connection_forgets_what_was_held_and_not_what_was_given_out() -> None:
    cursor = Cursor("c1", 5)
    cursor.push(entry(6))
    cursor.push(entry(9))
    cursor.disconnected()
    assert (cursor.have, cursor.held, cursor.behind) == (6, 0, False)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(1, 40), st.booleans()),
        st.tuples(st.just("page"), st.integers(1, 10), st.booleans()),
        st.tuples(st.just("lost"), st.just(0), st.booleans()),
    ),
    max_size=80,
)


@given(steps)
def test_any_order_of_pushes_pages_and_losses_gives_out_a_prefix_of_the_log(steps: list[tuple[str, int, bool]]) -> None:
    cursor = Cursor("c1", 0)
    got: list[int] = []
    top = 0
    for what, n, room in steps:
        if what == "push":
            top = max(top, n)
            got += seqs(cursor.push(entry(n), accept=room))
        elif what == "page":
            page = [entry(s) for s in range(cursor.have + 1, min(top, cursor.have + n) + 1)]
            got += seqs(cursor.page(page, at=page[-1].seq if page else 0))
        else:
            cursor.disconnected()
        assert got == list(range(1, cursor.have + 1))
    got += seqs(cursor.push(entry(top + 1)))
    while cursor.behind:
        page = [entry(s) for s in range(cursor.have + 1, min(top + 1, cursor.have + 7) + 1)]
        got += seqs(cursor.page(page, at=page[-1].seq))
    assert got == list(range(1, top + 2))
