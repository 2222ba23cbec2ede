"""Presence is told although the store fails: nobody stays online for ever."""

from __future__ import annotations

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
