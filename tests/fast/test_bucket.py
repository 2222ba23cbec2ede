"""The token bucket, without a clock or a socket: what is refused costs nothing and is promised its own time."""

from __future__ import annotations

import heapq
import itertools
import random

import pytest

from chatcore._fast.bucket import Bucket

S = 1_000_000_000
MS = 1_000_000
TOKEN = 20 * MS  # at 50 per second


def full(rate: float = 50, burst: int = 200, refused: int = 10_000) -> Bucket:
    return Bucket(rate, burst, refused)


def spend(bucket: Bucket, now: int) -> int:
    """Take what there is; how much that was."""
    return next(n for n in itertools.count() if not bucket.take(now))


def test_a_full_bucket_has_its_burst_and_grows_back_at_its_rate() -> None:
    bucket = full()
    assert spend(bucket, 0) == 200
    assert not bucket.take(TOKEN - 1)
    assert bucket.take(TOKEN)
    assert not bucket.take(TOKEN)
    assert spend(bucket, TOKEN + S) == 50
    assert spend(bucket, 3600 * S) == 200, "no more than the burst"


def test_no_rate_is_no_limit() -> None:
    bucket = full(rate=0)
    assert all(bucket.take(0) for _ in range(10_000))
    assert bucket.give_back(0) > 0


def test_what_is_refused_costs_nothing() -> None:
    """It did: whoever asked a thousand times in the first second got nothing in the next twenty."""
    bucket = full()
    spend(bucket, 0)
    for _ in range(1000):
        assert not bucket.take(0)
        bucket.refuse(0)
    assert spend(bucket, S) == 50


def test_each_refusal_in_a_row_is_promised_the_next_token() -> None:
    bucket = full()
    spend(bucket, 0)
    assert [bucket.refuse(0) for _ in range(5)] == [TOKEN, 2 * TOKEN, 3 * TOKEN, 4 * TOKEN, 5 * TOKEN]
    # Time passes: the line moves on with it.
    assert bucket.refuse(3 * TOKEN // 2) == 6 * TOKEN - 3 * TOKEN // 2


def test_promises_that_nobody_came_for_lapse() -> None:
    bucket = full()
    spend(bucket, 0)
    for _ in range(50):
        bucket.refuse(0)
    assert spend(bucket, 2 * S) == 100
    assert bucket.refuse(2 * S) == TOKEN


@pytest.mark.parametrize("late", [0, 1, 7 * MS, 300 * MS])
def test_whoever_comes_at_the_promised_time_or_later_finds_a_token(late: int) -> None:
    bucket = full()
    spend(bucket, 0)
    for at in [bucket.refuse(0) for _ in range(500)]:
        assert bucket.take(at + late)


def test_a_token_that_another_took_is_missed_by_the_last_alone() -> None:
    bucket = full()
    spend(bucket, 0)
    *first, last = [bucket.refuse(0) for _ in range(10)]
    assert bucket.take(TOKEN), "a message that nobody had promised anything"
    late = TOKEN + 1
    assert all(bucket.take(at + late) for at in first)
    assert not bucket.take(last)
    assert 0 < bucket.refuse(last) <= TOKEN


@pytest.mark.parametrize(("rate", "burst"), [(50, 200), (1, 1), (100_000, 100), (0.1, 3), (33.3, 7)])
def test_an_outbox_that_is_sent_at_once_drains_at_the_full_rate(rate: float, burst: int) -> None:
    """Each repeats exactly when it was told to, in whole milliseconds. It never ended: refused ones cost tokens, and
    all came back together.
    """
    count = 10_000
    bucket = full(rate, burst)
    token = int(S / rate)
    waiting = [(0, i) for i in range(count)]
    sent = 0
    now = 0
    while waiting:
        now, i = heapq.heappop(waiting)
        sent += 1
        if not bucket.take(now):
            wait = bucket.refuse(now)
            assert wait > 0, "it is no flood"
            heapq.heappush(waiting, (now + -(-wait // MS) * MS, i))
    assert now <= (count - burst) * token + 2 * MS
    assert sent <= 2 * count, "one repetition is enough"


def test_a_client_that_comes_late_and_sends_other_things_meanwhile_drains_all_the_same() -> None:
    rng = random.Random(5)
    bucket = full()
    waiting = [(0, i) for i in range(2000)]
    # One in ten of all tokens goes to messages that are new.
    waiting += [(rng.randrange(40 * S), 2000 + i) for i in range(200)]
    heapq.heapify(waiting)
    now = 0
    while waiting:
        now, i = heapq.heappop(waiting)
        if not bucket.take(now):
            wait = bucket.refuse(now)
            assert wait > 0
            heapq.heappush(waiting, (now + wait + rng.randrange(200 * MS), i))
    assert now <= (2200 - 200) * TOKEN + S


# --- what is refused though there is a token --------------------------------------------------------------------


def test_a_token_that_is_given_back_is_there_again() -> None:
    bucket = full()
    for _ in range(1000):
        assert bucket.take(0)
        assert bucket.give_back(0) > 0
    assert spend(bucket, 0) == 200


def test_those_that_are_deferred_come_back_one_after_the_other() -> None:
    """All came back after half a second, together: as many as before were refused again."""
    bucket = full()
    for _ in range(64):
        assert bucket.take(0)
    waits = []
    for _ in range(136 + 100):
        assert bucket.take(0)
        waits.append(bucket.give_back(0))
    gaps = [b - a for a, b in itertools.pairwise(waits)]
    assert waits[0] == TOKEN // 4
    assert set(gaps[:136]) == {TOKEN // 4}, "while there are tokens: four times as fast"
    assert set(gaps[-50:]) == {TOKEN}, "when they are used up: at the rate"
    # As soon as there are tokens for all of them.
    assert waits[-1] == 100 * TOKEN
    assert all(bucket.take(at) for at in waits)


def test_a_store_that_hangs_is_asked_at_the_rate_at_most() -> None:
    """Nothing is answered for a minute, and whoever waits comes back again and again."""
    bucket = full()
    waiting = [(0, i) for i in range(300)]
    asked = [0] * 61
    while waiting[0][0] < 60 * S:
        now, i = heapq.heappop(waiting)
        asked[now // S] += 1
        assert bucket.take(now)
        wait = bucket.give_back(now)
        assert wait > 0, "it is no flood"
        heapq.heappush(waiting, (now + wait, i))
    assert max(asked[10:60]) <= 51


# --- floods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 10, 10_000])
def test_so_many_are_promised_a_time_and_one_more_is_a_flood(limit: int) -> None:
    bucket = full(refused=limit)
    spend(bucket, 0)
    assert all(bucket.refuse(0) > 0 for _ in range(limit))
    assert bucket.refuse(0) == -1
    assert bucket.refuse(TOKEN // 2) == -1
    # A time has come: there is room for another.
    assert bucket.take(TOKEN)
    assert bucket.refuse(TOKEN) > 0
    assert bucket.refuse(TOKEN) == -1


def test_deferred_ones_count_as_well() -> None:
    bucket = full(refused=10)
    waits = []
    for _ in range(11):
        assert bucket.take(0)
        waits.append(bucket.give_back(0))
    assert all(wait > 0 for wait in waits[:10])
    assert waits[10] == -1


def test_who_ignores_what_it_is_told_is_a_flood_soon() -> None:
    """Ten times the rate: 450 are refused each second, and only 50 have their time."""
    bucket = full(refused=1000)
    refused = 0
    for now in range(0, 60 * S, TOKEN // 10):
        if not bucket.take(now):
            wait = bucket.refuse(now)
            if wait == -1:
                break
            refused += 1
    else:
        pytest.fail("it goes on for ever")
    assert now < 4 * S
    assert refused <= 1200


def test_who_sends_twice_the_rate_gets_the_rate() -> None:
    bucket = full(refused=1000)
    taken = 0
    for now in range(0, 600 * S, TOKEN // 2):
        if bucket.take(now):
            taken += 1
        else:
            assert bucket.refuse(now) > 0
    assert taken >= 600 * 50
