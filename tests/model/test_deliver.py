"""The deliver loop keeps its promises whatever the bus loses, repeats and reorders (docs/log.md, Deliver)."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given

from .deliver_scripts import climates, scripts, while_attaching, while_replaying
from .deliver_store import RotatingStore
from .deliver_world import Action, Connect, Drop, Post, Role, Wait, deliver
from .strategies import bounded, seeds
from .weather import CALM, Climate


@bounded(200)
@given(script=scripts, seed=seeds, climate=climates)
def test_every_promise_in_any_weather(script: Sequence[Action], seed: int, climate: Climate) -> None:
    deliver(script, seed, climate)


@bounded(100)
@given(script=scripts, seed=seeds, climate=climates)
def test_every_promise_on_a_store_without_positions(script: Sequence[Action], seed: int, climate: Climate) -> None:
    deliver(script, seed, climate, make_store=RotatingStore)


@bounded(300, shrink=False)
@given(script=while_attaching | while_replaying, seed=seeds, climate=climates)
def test_every_promise_where_rows_follow_their_entries(script: Sequence[Action], seed: int, climate: Climate) -> None:
    deliver(script, seed, climate, make_store=RotatingStore, rows_follow=True)


BOB, BOB2 = 1, 2  # devices of user 1
OUT, IN = "none", "member"


def _role(role: str, worker: int = 0) -> Role:
    return Role(worker, 0, 1, role)


def test_views_that_overtake_each_other() -> None:
    """An older view of a row arrives after a newer one, and takes the session out for good."""
    script: list[Action] = [
        Connect(BOB, 0),
        Wait(0.005),
        _role(OUT, 1),
        Wait(0.005),
        Post(0, 0, 0),
        Wait(0.005),
        _role(IN, 1),
    ]
    for seed in range(350, 400):
        deliver(script, seed, Climate(bus_lost=0.5, overtaking_reads=0.5))


def test_removed_while_catching_up() -> None:
    """Removed while an attach waits for the pump: told that he is out, and then that he is in."""
    script: list[Action] = [
        Connect(BOB2, 0), Wait(0.02), _role(OUT), Post(1, 0, 0), Wait(0.0005), _role(IN), Wait(0.0005),
        Connect(BOB, 0), Wait(0.005), _role(OUT), _role(IN), Wait(0.0005), Post(0, 0, 0), Wait(0.0005),
        Post(0, 0, 0), _role(OUT),
    ]  # fmt: skip
    for seed in range(720, 770):
        deliver(script, seed, CALM)


def test_removed_while_away() -> None:
    """Told by the log-in that he is out, although entries up to his removal are still to come."""
    script: list[Action] = [
        Connect(BOB, 1), Post(0, 0, 0, n=2), Wait(0.1), Drop(BOB), Post(0, 0, 0, n=2), Wait(0.0025),
        Connect(BOB, 0), Wait(0.02), Post(0, 0, 0, n=6), _role(OUT),
    ]  # fmt: skip
    for seed in range(30):
        deliver(script, seed, Climate(bus_lost=0.1))
