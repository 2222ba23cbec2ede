"""What changes while the store fails, or while a client catches up, is told to it in the end, and told right."""

from __future__ import annotations

import asyncio

import orjson

from .parts import Desk, Shelf, message, until

LARGE = "\x01" * 8192  # six bytes each in JSON


def _tries(shelf: Shelf, query: str) -> int:
    return sum(asked[0] == query for asked in shelf.asked)


async def test_a_change_heard_while_the_store_fails_is_told_when_it_works_again() -> None:
    """The read of the changed row failed once; it was logged, and nobody ever looked at that row again."""
    shelf = Shelf()
    async with Desk(shelf) as desk:
        x = await desk.log_in("alice")
        shelf.conversation("new")
        shelf.down = True
        before = _tries(shelf, "views")
        desk.delivery.refresh("alice", "new")
        await until(lambda: _tries(shelf, "views") > before, "a look at the row")
        assert not desk.got(x, t="conv", c="new")
        shelf.down = False
        await until(lambda: desk.got(x, t="conv", c="new"), "the conversation")
        desk.delivery.on_entry(message("new", 2))
        assert [m["s"] for m in desk.got(x, t="msg", c="new")] == [2], "it is attached, too"


async def test_no_sync_stands_for_a_change_that_could_not_be_read_yet() -> None:
    """The position went past the row that could not be read, so a client that came back was not told either."""
    shelf = Shelf()
    async with Desk(shelf) as desk:
        x = await desk.log_in("alice")
        shelf.conversation("new")
        changed_at = shelf.at
        shelf.down = True
        desk.delivery.refresh("alice", "new")
        before = _tries(shelf, "views")
        await until(lambda: _tries(shelf, "views") > before, "a look at the row")
        looks = _tries(shelf, "changes")
        shelf.down = False
        await until(lambda: _tries(shelf, "changes") > looks + 1, "a look that works")
        while not desk.got(x, t="conv", c="new"):
            sync = (await desk.answer(x, desk.begin(x, "ping")))["sync"]
            assert desk.got(x, t="conv", c="new") or int(sync.rsplit(".")[-1]) < changed_at
        await until(lambda: desk.delivery.synced >= changed_at, "the position to move on")


async def test_a_mark_moved_during_a_long_catch_up_ends_up_right_at_the_client() -> None:
    """The `conv` with the new mark was pushed at once, and the older one, read before, after it."""
    shelf = Shelf()
    shelf.conversation("a")
    shelf.conversation("b")
    async with Desk(shelf) as desk:
        x = await desk.log_in("alice", stuck=True)
        shelf.change("b", read=57)  # on another device
        before = _tries(shelf, "views")
        desk.delivery.refresh("alice", "b")
        await until(lambda: _tries(shelf, "views") > before, "a look at the row")
        desk.reactor.reads_on(x.conn)
        await until(lambda: desk.got(x, t="ready"), "ready")
        await until(lambda: desk.got(x, t="conv", c="b", read=57), "the new mark")
        assert [m["read"] for m in desk.got(x, t="conv", c="b")][-1] == 57


async def test_a_mark_moved_during_a_long_catch_up_is_right_where_one_is_not_attached_either() -> None:
    """The same for a conversation that is not in `only`."""
    shelf = Shelf()
    shelf.conversation("a")
    shelf.conversation("b")
    async with Desk(shelf) as desk:
        x = await desk.log_in("alice", stuck=True, only=["a"])
        shelf.change("b", read=57)
        before = _tries(shelf, "views")
        desk.delivery.refresh("alice", "b")
        await until(lambda: _tries(shelf, "views") > before, "a look at the row")
        desk.reactor.reads_on(x.conn)
        await until(lambda: desk.got(x, t="ready"), "ready")
        assert [m["read"] for m in desk.got(x, t="conv", c="b")][-1] == 57


async def test_what_was_sent_during_a_long_catch_up_is_in_the_view_of_who_is_not_attached() -> None:
    """An old `conv` after a newer one would take back the head, until somebody writes again."""
    shelf = Shelf()
    shelf.conversation("a")
    shelf.conversation("b")
    async with Desk(shelf) as desk:
        x = await desk.log_in("alice", stuck=True, only=["a"])
        entry = message("b", 2)
        shelf.logs["b"].append(entry)
        desk.delivery.on_entry(entry)
        desk.reactor.reads_on(x.conn)
        await until(lambda: desk.got(x, t="ready"), "ready")
        assert [m["head"] for m in desk.got(x, t="conv", c="b")][-1] == 2


async def test_a_ping_covers_no_conversation_that_is_still_on_its_way_to_the_client() -> None:
    """Between the look that found a new conversation and its attach, which is a task of its own, there was a moment
    in which nothing seemed to be going on: a `sync` of just then covered what the client had not been told.
    """
    shelf = Shelf()
    async with Desk(shelf) as desk:
        x = await desk.log_in("alice")
        before = _tries(shelf, "views")
        shelf.conversation("new")
        added_at = shelf.at
        shelf.changed = [("alice", "new")]
        while _tries(shelf, "views") == before:
            await asyncio.sleep(0)  # the next turn of the loop, in which the row is read
        sync = (await desk.answer(x, desk.begin(x, "ping")))["sync"]
        assert int(sync.rsplit(".")[-1]) < added_at
        await until(lambda: desk.got(x, t="conv", c="new"), "the new conversation")
        sent = [(m["t"], m.get("c")) for m in desk.reactor.received[x.conn]]
        assert sent.index(("conv", "new")) > sent.index(("ok", None), 1), "this shows nothing: it was pushed before"
        # Then it moves on.
        while int(sync.rsplit(".")[-1]) < added_at:
            sync = (await desk.answer(x, desk.begin(x, "ping")))["sync"]


async def test_large_messages_in_many_conversations_do_not_flood_who_is_not_attached_to_them() -> None:
    """All that had changed was told in one turn of the loop: who was away and in many groups was cut off for what
    others wrote there, and each time that he came back.
    """
    shelf = Shelf()
    convs = [f"c{i}" for i in range(8)]
    for conv in convs:
        shelf.conversation(conv)
    async with Desk(shelf, replay_bytes=262_144) as desk:
        x = await desk.log_in("alice", only=[])
        before = len(desk.got(x, t="conv"))
        for conv in convs:
            shelf.logs[conv].append(message(conv, 2, LARGE))
            desk.delivery.on_entry(shelf.logs[conv][-1])
        shelf.at += 1
        told_at = shelf.at
        await until(lambda: len(desk.got(x, t="conv")) > before, "a merge")
        first = desk.got(x, t="conv")[before:]
        assert sum(len(orjson.dumps(m)) for m in first) <= 300_000
        assert len(first) < len(convs)
        # What was not told yet is in no `sync`.
        sync = (await desk.answer(x, desk.begin(x, "ping")))["sync"]
        assert int(sync.rsplit(".")[-1]) < told_at
        await until(lambda: len(desk.got(x, t="conv")) >= before + len(convs), "the rest")
        assert sorted(m["c"] for m in desk.got(x, t="conv", head=2)) == convs
        while int(sync.rsplit(".")[-1]) < told_at:
            sync = (await desk.answer(x, desk.begin(x, "ping")))["sync"]


async def test_a_merge_for_which_the_store_fails_is_told_with_the_next_and_in_no_sync_before() -> None:
    """It was told with the next, but a client that was cut off in between came back with a `sync` that covered it."""
    shelf = Shelf()
    shelf.conversation("c")
    async with Desk(shelf) as desk:
        x = await desk.log_in("alice", only=[])
        entry = message("c", 2)
        shelf.logs["c"].append(entry)
        shelf.at += 1
        told_at, tries = shelf.at, _tries(shelf, "views")
        shelf.failing = {"views"}
        desk.delivery.on_entry(entry)
        await until(lambda: _tries(shelf, "views") > tries, "a merge")
        shelf.failing = set()
        await until(lambda: desk.delivery.synced >= told_at, "the position to move on")
        sync = (await desk.answer(x, desk.begin(x, "ping")))["sync"]
        assert not desk.got(x, t="conv", head=2)
        assert int(sync.rsplit(".")[-1]) < told_at
        await until(lambda: desk.got(x, t="conv", head=2), "the next merge")
        while int(sync.rsplit(".")[-1]) < told_at:
            sync = (await desk.answer(x, desk.begin(x, "ping")))["sync"]


async def test_the_recent_entries_hold_no_more_bytes_than_it_may_however_large_the_messages() -> None:
    """A ring held 64 entries of any size: three megabytes for each conversation that one user cared to open."""
    shelf = Shelf()
    shelf.conversation("c")
    async with Desk(shelf, recent_bytes=262_144) as desk:
        x = await desk.log_in("alice")
        for seq in range(2, 66):
            entry = message("c", seq, LARGE)
            shelf.logs["c"].append(entry)
            desk.delivery.on_entry(entry)
        recent = desk.delivery.rooms["c"].recent
        assert 0 < sum(len(e.wire) for e in recent) <= 262_144
        assert [e.seq for e in recent] == list(range(66 - len(recent), 66))
        # What fell out of it comes from the store.
        y = await desk.log_in("alice", sync=desk.got(x, t="ready")[0]["sync"], have={"c": 1})
        assert [m["s"] for m in desk.got(y, t="msg")] == list(range(2, 66))


async def test_small_messages_fill_the_recent_entries_by_their_number() -> None:
    shelf = Shelf()
    shelf.conversation("c")
    async with Desk(shelf, recent=8) as desk:
        await desk.log_in("alice")
        for seq in range(2, 40):
            desk.delivery.on_entry(message("c", seq))
        room = desk.delivery.rooms["c"]
        assert [e.seq for e in room.recent] == list(range(32, 40))
        assert room.recent_bytes == sum(len(e.wire) for e in room.recent)
