"""One session asks for much: its requests wait for each other, nobody else's wait for them."""

from __future__ import annotations

import asyncio

import pytest

from chatcore.errors import Forbidden
from chatcore.store.base import Memberships

from .parts import Desk, Shelf, until


def _acquainted(shelf: Shelf) -> list[tuple[str, ...]]:
    return [asked[1:] for asked in shelf.asked if asked[0] == "acquainted"]


async def test_a_stranger_named_500_times_is_looked_up_once() -> None:
    """Each look-up goes through all conversations of the stranger: one `watch` held the reader up for seconds."""
    shelf = Shelf()
    async with Desk(shelf) as desk:
        with pytest.raises(Forbidden):
            await desk.chat.acquainted("alice", ["mallory"] * 500)
        assert _acquainted(shelf) == [("mallory",)]


async def test_500_strangers_are_refused_after_the_first_few() -> None:
    """All 500 were looked up in one query, with everybody's reads behind it, to be refused for the first."""
    shelf = Shelf()
    async with Desk(shelf) as desk:
        with pytest.raises(Forbidden):
            await desk.chat.acquainted("alice", [f"u{i}" for i in range(500)])
        assert len(_acquainted(shelf)) == 1
        assert len(_acquainted(shelf)[0]) <= 25


async def test_500_acquaintances_are_looked_up_in_parts_so_that_others_have_their_turn() -> None:
    shelf = Shelf()
    everybody = [f"u{i}" for i in range(500)]
    shelf.acquaintances = set(everybody)
    async with Desk(shelf) as desk:
        await desk.chat.acquainted("alice", everybody)
        assert sorted(user for part in _acquainted(shelf) for user in part) == sorted(everybody)
        assert max(map(len, _acquainted(shelf))) <= 25


async def test_look_ups_of_one_session_wait_for_each_other_and_not_those_of_others() -> None:
    """60 `watch` at once were 60 queries at once in the queue of the one reader, and all others behind them."""
    shelf = Shelf()
    shelf.gate = asyncio.Event()
    async with Desk(shelf) as desk:
        greedy, other = await desk.log_in("mallory"), await desk.log_in("alice")
        watches = [desk.begin(greedy, "watch", users=["u1"]) for _ in range(60)]
        await until(lambda: _acquainted(shelf), "the first look-up")
        reply = await desk.answer(other, desk.begin(other, "users", ids=["u1"]))
        assert reply["users"] == [{"id": "u1", "name": "u1"}]
        assert len(_acquainted(shelf)) == 1
        shelf.gate.set()
        replies = [await desk.answer(greedy, id) for id in watches]
        assert {reply["code"] for reply in replies} == {"forbidden"}


async def test_what_waits_behind_a_failing_log_in_is_answered() -> None:
    """The error of `auth` was answered, and the requests behind it were dropped without a word."""
    shelf = Shelf()
    async with Desk(shelf) as desk:
        x = desk.connect()
        shelf.down = True
        auth = desk.begin(x, "auth", v=1, token="alice")
        ping = desk.begin(x, "ping")
        assert (await desk.answer(x, auth))["code"] == "unavailable"
        assert (await desk.answer(x, ping))["code"] == "unauthenticated"
        shelf.down = False
        assert (await desk.answer(x, desk.begin(x, "auth", v=1, token="alice")))["t"] == "ok"


async def test_a_log_in_that_fails_by_a_mistake_leaves_nobody_half_logged_in() -> None:
    """Only refusals were undone: after any other exception the session counted as its user's, and was told nothing."""

    class Mistaken(Shelf):
        mistaken = True

        async def memberships(self, user: str, since: int | None = None) -> Memberships:
            if self.mistaken:
                raise RuntimeError("a mistake")
            return await super().memberships(user, since)

    shelf = Mistaken()
    shelf.conversation("a")
    async with Desk(shelf) as desk:
        x = desk.connect()
        reply = await desk.answer(x, desk.begin(x, "auth", v=1, token="alice"))
        assert (reply["t"], reply["code"]) == ("error", "internal")
        assert not desk.directory.is_online("alice")
        reply = await desk.answer(x, desk.begin(x, "history", c="a"))
        assert reply["code"] == "unauthenticated"
        shelf.mistaken = False
        reply = await desk.answer(x, desk.begin(x, "auth", v=1, token="alice"))
        assert reply["t"] == "ok"
        await until(lambda: desk.got(x, t="ready"), "ready")
        assert desk.got(x, t="conv", c="a")
