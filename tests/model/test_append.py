"""The append loop keeps its promises on a store where everything goes wrong (docs/log.md, Append)."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from .append_world import Action, play
from .strategies import bounded, climates, same_member, scripts, seeds
from .weather import Climate


@bounded(300)
@given(script=scripts, seed=seeds, climate=climates, writers=st.integers(1, 3))
def test_every_promise_in_any_weather(script: Sequence[Action], seed: int, climate: Climate, writers: int) -> None:
    play(script, seed, climate, writers)


@bounded(100)
@given(script=same_member, seed=seeds, climate=climates, writers=st.integers(2, 3))
def test_writers_that_change_one_member_each_know_the_role_before(
    script: Sequence[Action], seed: int, climate: Climate, writers: int
) -> None:
    """`was` of a `member` entry is the role that the log gave the user before it."""
    play(script, seed, climate, writers)
