"""Presence is told although the store fails: nobody stays online for ever."""

from __future__ import annotations

import pytest

from .parts import Desk, Shelf, until


def _told_others(desk: Desk, user: str) -> list[bool]:
    return [message["on"] for channel, message in desk.bus.published if channel == f"p:{user}"]


async def test_who_leaves_while_last_seen_cannot_be_noted_is_offline_for_the_other_workers() -> None:
    """The exception of mark_seen came before the announcement: the others kept the user online until a restart."""
    shelf = Shelf()
    async with Desk(shelf) as desk:
        x = await desk.log_in("alice")
        assert _told_others(desk, "alice") == [True]
        shelf.failing = {"mark_seen"}
        x.close(1000)
        await until(lambda: _told_others(desk, "alice")[-1] is False, "offline")
        assert ("mark_seen", "alice") in shelf.asked


async def test_a_watcher_is_told_of_a_change_that_the_store_knew_nothing_of_at_first() -> None:
    """The changes were forgotten before since when was asked for, and the watcher saw the user online for good."""
    shelf = Shelf()
    shelf.acquaintances = {"alice"}
    async with Desk(shelf) as desk:
        x, watcher = await desk.log_in("alice"), await desk.log_in("bob")
        states = (await desk.answer(watcher, desk.begin(watcher, "watch", users=["alice"])))["states"]
        assert [state["state"] for state in states] == ["online"]
        shelf.failing = {"seen"}
        x.close(1000)
        await until(lambda: ("seen", "alice") in shelf.asked, "the question since when")
        shelf.failing = set()
        await until(lambda: desk.got(watcher, t="presence"), "offline")
        assert desk.got(watcher, t="presence") == [{"t": "presence", "user": "alice", "state": "offline", "seen": 1}]


@pytest.mark.parametrize("failing", ["blockers", "seen"])
async def test_a_block_is_looked_up_again_until_the_store_answers(failing: str) -> None:
    """One failed read, and who was blocked went on seeing the other online until the next `watch`."""
    shelf = Shelf()
    shelf.acquaintances = {"alice", "carol"}
    async with Desk(shelf) as desk:
        await desk.log_in("alice")
        watcher = await desk.log_in("bob")
        reply = await desk.answer(watcher, desk.begin(watcher, "watch", users=["alice", "carol"]))
        assert [state["state"] for state in reply["states"]] == ["online", "offline"]
        asked = len(shelf.asked)
        shelf.blocking, shelf.failing = {"alice"}, {failing}
        desk.user_events.blocks_changed("bob")
        await until(lambda: any(what[0] == failing for what in shelf.asked[asked:]), "a read that fails")
        shelf.failing = set()
        await until(lambda: desk.got(watcher, t="presence"), "offline")
        assert desk.got(watcher, t="presence") == [{"t": "presence", "user": "alice", "state": "offline"}]
        shelf.blocking = set()
        desk.user_events.blocks_changed("bob")
        await until(lambda: desk.got(watcher, t="presence", state="online"), "online again")


async def test_many_changes_of_blocks_are_one_more_look() -> None:
    """Each was a task with two reads, and the session's own queries waited behind all of them."""
    shelf = Shelf()
    shelf.acquaintances = {"alice"}
    async with Desk(shelf) as desk:
        watcher = await desk.log_in("bob")
        await desk.answer(watcher, desk.begin(watcher, "watch", users=["alice"]))
        looks = _looks(shelf)
        for _ in range(1000):
            desk.user_events.blocks_changed("bob")
        await desk.answer(watcher, desk.begin(watcher, "watch", users=["alice"]))
        await until(lambda: _looks(shelf) >= looks + 2, "the look, and that of the request")
        await desk.answer(watcher, desk.begin(watcher, "users", ids=["alice"]))
        assert _looks(shelf) <= looks + 3


def _looks(shelf: Shelf) -> int:
    return sum(what[0] == "blockers" for what in shelf.asked)
