"""The circuit breaker, on a clock of the test."""

from __future__ import annotations

import pytest

from chatcore.common.backoff import Backoff
from chatcore.common.breaker import Breaker, BreakerState


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def changes() -> list[BreakerState]:
    return []


@pytest.fixture
def breaker(clock: Clock, changes: list[BreakerState]) -> Breaker:
    """Opens at the third failure; pauses of 1, 2, 4, 4 ... seconds without chance."""
    backoff = Backoff(1.0, 4.0, chance=lambda: 0.0)
    return Breaker("part", failures=3, backoff=backoff, clock=clock, on_change=changes.append)


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        assert breaker.allow()
        breaker.failed()


def test_it_opens_after_failures_in_a_row_only(breaker: Breaker, changes: list[BreakerState]) -> None:
    for _ in range(5):
        fail(breaker, 2)
        assert breaker.allow()
        breaker.succeeded()
    assert breaker.state is BreakerState.CLOSED
    fail(breaker, 3)
    assert not breaker.allow()
    assert changes == [BreakerState.OPEN]
    assert (breaker.failures, breaker.opened, breaker.refused) == (13, 1, 1)


def test_one_probe_at_a_time_decides(breaker: Breaker, clock: Clock, changes: list[BreakerState]) -> None:
    fail(breaker, 3)
    clock.now += 0.999
    assert not breaker.allow()
    assert breaker.retry_after_ms == 1
    clock.now += 0.002
    assert breaker.allow(), "after the pause one may try"
    assert not any(breaker.allow() for _ in range(10)), "and only one"
    breaker.failed()
    assert breaker.retry_after_ms == 2000
    clock.now += 1.5
    assert not breaker.allow(), "the pause has doubled"
    clock.now += 0.5
    assert breaker.allow()
    breaker.succeeded()
    assert breaker.allow() and breaker.allow()
    assert changes == [
        BreakerState.OPEN, BreakerState.HALF_OPEN, BreakerState.OPEN, BreakerState.HALF_OPEN, BreakerState.CLOSED,
    ]  # fmt: skip


def test_the_pause_is_bounded_and_short_again_after_a_success(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    for pause in (1, 2, 4, 4, 4):
        assert breaker.retry_after_ms == pause * 1000
        clock.now += pause
        assert breaker.allow()
        breaker.failed()
    clock.now += 4
    assert breaker.allow()
    breaker.succeeded()
    fail(breaker, 3)
    assert breaker.retry_after_ms == 1000


def test_a_probe_that_never_reached_the_part_leaves_the_place_to_another(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 1
    assert breaker.allow()
    breaker.abandoned()
    assert breaker.state is BreakerState.HALF_OPEN
    assert breaker.allow()


def test_late_reports_of_calls_from_before_it_opened(breaker: Breaker, clock: Clock) -> None:
    """Ten calls are in flight when the part dies; they end one after the other."""
    assert all(breaker.allow() for _ in range(10))
    for _ in range(10):
        breaker.failed()
    assert breaker.opened == 1
    assert breaker.retry_after_ms == 1000, "ten failures at once are one outage, not ten"
    breaker.succeeded()
    assert breaker.state is BreakerState.CLOSED, "an answer is an answer"


def test_pauses_are_shortened_by_chance_so_that_not_all_come_back_at_once() -> None:
    values = iter([0.0, 0.5, 0.999])
    backoff = Backoff(0.1, 10.0, chance=lambda: next(values))
    assert [round(backoff.next(), 3) for _ in range(3)] == [0.1, 0.15, 0.2]
    pauses = {Backoff(1.0, 1.0).next() for _ in range(20)}
    assert len(pauses) > 10
    assert all(0.5 <= pause <= 1.0 for pause in pauses)
