"""The deliver loop keeps its promises whatever the bus loses, repeats and reorders (log.md, Deliver)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given

from .deliver_scripts import climates, scripts
from .deliver_world import Action, Connect, Drop, Post, Role, Wait, deliver
from .strategies import bounded, seeds
from .weather import CALM, Climate


@bounded(250)
@given(script=scripts, seed=seeds, climate=climates)
def test_every_promise_in_any_weather(script: Sequence[Action], seed: int, climate: Climate) -> None:
    deliver(script, seed, climate)


BOB, BOB2 = 1, 2  # devices of user 1
OUT, IN = "none", "member"


def _role(role: str, worker: int = 0) -> Role:
    return Role(worker, 0, 1, role)


#: What the model found once.
STORIES: dict[str, tuple[list[Action], Climate]] = {
    # An older view of a row arrived after a newer one, and took the session out for good.
    "views that overtake each other": (
        [Connect(BOB, 0), Wait(0.005), _role(OUT, 1), Wait(0.005), Post(0, 0, 0), Wait(0.005), _role(IN, 1)],
        Climate(bus_lost=0.5, overtaking_reads=0.5),
    ),
    # Removed while an attach waited for the pump: told that he is out, and then that he is in.
    "removed while catching up": (
        [
            Connect(BOB2, 0), Wait(0.02), _role(OUT), Post(1, 0, 0), Wait(0.0005), _role(IN), Wait(0.0005),
            Connect(BOB, 0), Wait(0.005), _role(OUT), _role(IN), Wait(0.0005), Post(0, 0, 0), Wait(0.0005),
            Post(0, 0, 0), _role(OUT),
        ],
        CALM,
    ),
    # Removed while away: told so by the log-in, although the entry was still to come.
    "removed while away": (
        [
            Connect(BOB, 1), Post(0, 0, 0, n=2), Wait(0.1), Drop(BOB), Post(0, 0, 0, n=2), Wait(0.0025),
            Connect(BOB, 0), Wait(0.02), Post(0, 0, 0, n=6), _role(OUT),
        ],
        Climate(bus_lost=0.1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("story", STORIES)
def test_what_was_found_once(story: str) -> None:
    script, climate = STORIES[story]
    for seed in range(30):
        deliver(script, seed, climate)
