"""Coming back: who missed nothing is live after one read; whoever missed something is told by the long way."""

from __future__ import annotations

import asyncio

import orjson

from chatcore.protocol import encode_entry
from chatcore.server.session import Session
from chatcore.store.base import Entry, Memberships

from .parts import Desk, Shelf, message, until


class Slow(Shelf):
    """Its answers about memberships are of when they were asked, and wait for ``gate``."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = asyncio.Event()
        self.answers = asyncio.Event()
        self.answers.set()

    async def memberships(self, user: str, since: int | None = None) -> Memberships:
        found = await super().memberships(user, since)
        self.reading.set()
        await self.answers.wait()
        return found


def _removal(conv: str, seq: int, user: str) -> Entry:
    wire = encode_entry("member", conv, seq, "owner", 0, f"cid{seq}", orjson.dumps({"user": user, "role": "none"}))
    return Entry(conv, seq, "member", "owner", seq - 1, seq - 1, wire)


def _sync(desk: Desk) -> str:
    return f"shelf.alice.{desk.store.at}"


async def _reading(desk: Desk, shelf: Slow, have: int) -> Session:
    """A session that comes back, whose memberships were read and are not answered yet."""
    shelf.reading.clear()
    shelf.answers.clear()
    x = desk.connect()
    desk.begin(x, "auth", v=1, token="alice", sync=_sync(desk), have={"a": have})
    await shelf.reading.wait()
    return x


async def test_who_missed_nothing_is_live_without_views() -> None:
    shelf = Shelf()
    shelf.conversation("a", 3)
    async with Desk(shelf) as desk:
        await desk.log_in("alice")  # the room is live here
        shelf.asked.clear()
        x = await desk.log_in("alice", sync=_sync(desk), have={"a": 3})
        assert not desk.got(x, t="conv")
        assert not [asked for asked in shelf.asked if asked[0] in ("views", "entries", "heads")]
        desk.delivery.on_entry(message("a", 4))
        assert [m["s"] for m in desk.got(x, t="msg")] == [4]


async def test_what_is_delivered_while_the_memberships_are_read_comes_once_and_in_order() -> None:
    shelf = Slow()
    shelf.conversation("a", 3)
    async with Desk(shelf) as desk:
        await desk.log_in("alice")
        x = await _reading(desk, shelf, have=3)
        shelf.logs["a"].append(message("a", 4))
        desk.delivery.on_entry(message("a", 4))
        shelf.answers.set()
        await until(lambda: desk.got(x, t="ready"), "ready")
        desk.delivery.on_entry(message("a", 5))
        assert [m["s"] for m in desk.got(x, t="msg")] == [4, 5]


async def test_who_is_removed_while_the_memberships_are_read_is_not_attached() -> None:
    """The answer, older than the removal, would have put the session back into the topic for good."""
    shelf = Slow()
    shelf.conversation("a", 3)
    async with Desk(shelf) as desk:
        await desk.log_in("alice")
        # One that says it has the removal already, which others may have told it.
        x = await _reading(desk, shelf, have=4)
        shelf.logs["a"].append(_removal("a", 4, "alice"))
        del shelf.rows["a"]
        desk.delivery.on_entry(shelf.logs["a"][-1])
        shelf.answers.set()
        await until(lambda: desk.got(x, t="ready"), "ready")
        desk.delivery.on_entry(message("a", 5))
        assert not desk.got(x, t="msg"), "nobody who is out is given what is said"
        await until(lambda: desk.got(x, t="conv", role="none"), "being told so")


async def test_a_store_that_does_not_answer_leaves_nothing_behind() -> None:
    shelf = Shelf()
    shelf.conversation("a", 3)
    async with Desk(shelf) as desk:
        await desk.log_in("alice")
        shelf.failing.add("memberships")
        x = desk.connect()
        reply = await desk.answer(x, desk.begin(x, "auth", v=1, token="alice", sync=_sync(desk), have={"a": 3}))
        assert reply["code"] == "unavailable"
        room = desk.delivery.rooms["a"]
        assert not room.attaching
        assert not room.pins
        desk.delivery.on_entry(message("a", 4))
        assert not desk.got(x, t="msg")


async def test_a_row_that_changed_while_the_memberships_were_read_is_told() -> None:
    """It was noted as told to all of the user's sessions, when this one had only been promised it."""
    shelf = Slow()
    shelf.conversation("a", 3)
    async with Desk(shelf) as desk:
        await desk.log_in("alice")
        x = await _reading(desk, shelf, have=3)
        shelf.change("a", read=2)
        desk.delivery.refresh("alice", "a")
        await until(lambda: x._deferred, "the reading of the row")
        shelf.answers.set()
        await until(lambda: desk.got(x, t="conv", c="a", read=2), "the new mark")


async def test_a_removal_heard_while_the_memberships_were_read_is_told() -> None:
    """The same where the answer about the row overtakes that about the memberships."""
    shelf = Slow()
    shelf.conversation("a", 3)
    async with Desk(shelf) as desk:
        await desk.log_in("alice")
        x = await _reading(desk, shelf, have=3)
        shelf.logs["a"].append(_removal("a", 4, "alice"))
        del shelf.rows["a"]
        desk.delivery.on_entry(shelf.logs["a"][-1])
        await until(lambda: x._deferred, "the reading of the row")
        shelf.answers.set()
        await until(lambda: desk.got(x, t="conv", c="a", role="none"), "being told so")
