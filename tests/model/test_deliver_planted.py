"""The checker of the deliver loop is itself checked: each fault planted here must be found."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatcore.chat.delivery import Delivery, Room
from chatcore.chat.interfaces import Subscriber
from chatcore.store.base import Entry, View

from .deliver_scripts import climates, scripts, while_attaching, while_away, while_replaying, while_untold
from .deliver_world import deliver
from .strategies import bounded, seeds
from .weather import Climate

EXAMPLES = 800


class Around:
    """A store that is the other one, but for what a subclass changes."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


class StepsOverHoles(Delivery):
    """A newer entry is delivered whatever came before it."""

    def on_entry(self, e: Entry) -> None:
        room = self.rooms.get(e.conv)
        if room is not None and 0 <= room.last < e.seq:
            self._deliver(room, e)
        else:
            super().on_entry(e)


class DeliversWhatItHad(Delivery):
    """What comes twice is delivered twice."""

    def on_entry(self, e: Entry) -> None:
        room = self.rooms.get(e.conv)
        if room is not None and e.seq == room.last:
            room.last -= 1
            self._deliver(room, e)
        else:
            super().on_entry(e)


class BelievesInTheBus(Delivery):
    """Nobody looks at the store without a message that says so."""

    async def _check(self, *args: Any, **kwargs: Any) -> None: ...


class NeverFetches(Delivery):
    """What the bus lost is not fetched."""

    def _start_backfill(self, room: Room, delay: float, recheck: bool = False) -> None: ...


class FetchesOnce(Delivery):
    """A fetch that fails, or that lags behind what was announced, is not repeated."""

    async def _run_backfill(self, room: Room, delay: float) -> None:
        want, room.newest = room.newest, room.last
        room.recheck = True
        store, self._store = self._store, OneAnswer(self._store)
        try:
            await super()._run_backfill(room, delay)
        finally:
            self._store = store
            room.newest = max(want, room.newest)


class OneAnswer(Around):
    """Says that there is nothing instead of failing."""

    async def entries(self, *args: Any) -> list[Entry]:
        try:
            found: list[Entry] = await self.store.entries(*args)
        except Exception:
            return []
        return found


class AsksBeforeAttaching(Delivery):
    """Membership is read before the session is among those who a removal takes out."""

    async def attach(
        self, x: Subscriber, convs: Sequence[str], have: Mapping[str, int], tell: Callable[[View], bool]
    ) -> None:
        early = await self._store.views(x.user_id, list(convs))
        if not isinstance(self._store, Early):
            self._store = Early(self._store)
        self._store.known[x.user_id, tuple(convs)] = early
        await super().attach(x, convs, have, tell)


class Early(Around):
    """Answers with what was known before."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self.known: dict[Any, Any] = {}

    async def views(self, user: str, convs: Sequence[str] | None = None) -> Any:
        early = self.known.pop((user, tuple(convs or ())), None)
        await asyncio.sleep(0.01)
        return early if early is not None else await self.store.views(user, convs)


class IgnoresRemovals(Delivery):
    """The sessions of somebody who was removed stay."""

    def _apply_member(self, room: Room, e: Entry) -> None:
        if b'"role":"none"' not in e.wire and b'"role":"banned"' not in e.wire:
            super()._apply_member(room, e)


class IgnoresAdditions(Delivery):
    """And rows that changed are not looked at, either."""

    def attach_soon(self, x: Subscriber, conv: str, have: int | None) -> None: ...


class Attaches(Delivery):
    """The loop of `_attach_room`, with places for faults."""

    def after(self, room: Room, view: View, have: int | None) -> int:
        if have is None or have > room.last or room.last - have > self._backlog:
            return min(room.last, view.head)
        return have

    def is_there(self, room: Room, cur: int) -> bool:
        return cur == room.last

    tells_when_too_far_behind = True
    looks_whether_still_attaching = True

    async def _attach_room(
        self, x: Subscriber, room: Room, view: View, have: int | None, tell: Callable[[View], bool]
    ) -> None:
        after = self.after(room, view, have)
        if tell(view) or (have is not None and after != have and self.tells_when_too_far_behind):
            x.push_view(view, after)
        cur = after
        while (x in room.attaching or not self.looks_whether_still_attaching) and not x.closed:
            if self.is_there(room, cur):
                room.arrived(x)
                room.topic.add(x.conn)
                return
            if not await x.drained():
                return
            rows = await self._missing(room, cur)
            if x not in room.attaching and self.looks_whether_still_attaching:
                return
            for e in rows:
                x.push(e.wire)
                cur = e.seq
            if not rows:
                await asyncio.sleep(0.01)


class BelievesClients(Attaches):
    """A ``have`` beyond the head is taken for the head."""

    def after(self, room: Room, view: View, have: int | None) -> int:
        return have if have is not None and have > room.last else super().after(room, view, have)


class AttachesAtOnce(Attaches):
    """Live before it has everything."""

    def is_there(self, room: Room, cur: int) -> bool:
        return True


class SkipsSilently(Attaches):
    """Who is too far behind is put at the head, and not told."""

    tells_when_too_far_behind = False

    def after(self, room: Room, view: View, have: int | None) -> int:
        return room.last if have is not None else super().after(room, view, have)


class StartsAtTheViewsHead(Attaches):
    """``after`` is a head that this worker has not delivered yet: what is in between comes twice."""

    def after(self, room: Room, view: View, have: int | None) -> int:
        return view.head if have is None else super().after(room, view, have)

    def is_there(self, room: Room, cur: int) -> bool:
        return cur >= room.last


class AttachesWhoWasRemoved(Attaches):
    """A removal in the middle of a replay does not end it."""

    looks_whether_still_attaching = False


class ReplaysTheRing(Delivery):
    """The ring is taken for all that is missing."""

    async def _missing(self, room: Room, cur: int) -> list[Entry]:
        return [e for e in room.recent if cur < e.seq] or await super()._missing(room, cur)


class SettlesTooEarly(Delivery):
    """A `sync` that stands for what was committed, whether it was told or not."""

    def _advance_synced(self) -> None: ...

    @property
    def synced(self) -> int:
        counter: int = self._store.db.counter  # type: ignore[attr-defined]
        return counter

    @synced.setter
    def synced(self, position: int) -> None: ...


class ForgetsRoomsInUse(Delivery):
    """The sweep does not ask who is in the room."""

    async def _sweep_loop(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.rooms.clear()


class NeverForgets(Delivery):
    """Rooms that nobody needs are kept, and stay subscribed."""

    async def _sweep_loop(self) -> None: ...


class LeavesPins(Delivery):
    """A room is pinned for ever."""

    def release(self, rooms: Any) -> None: ...


class NeverPushesChangedRows(Delivery):
    """Changed rows are not read, and not pushed."""

    def refresh(self, user: str, conv: str, have: int | None = None) -> None: ...


FAULTS = [
    StepsOverHoles, DeliversWhatItHad, BelievesInTheBus, NeverFetches, FetchesOnce, AsksBeforeAttaching,
    IgnoresRemovals, IgnoresAdditions, BelievesClients, AttachesAtOnce, SkipsSilently, StartsAtTheViewsHead,
    AttachesWhoWasRemoved, ReplaysTheRing, SettlesTooEarly, ForgetsRoomsInUse, NeverForgets, LeavesPins,
    NeverPushesChangedRows,
]  # fmt: skip


#: Where a fault shows only in a rare course of events, that is what is looked at.
RARE: dict[Any, tuple[Any, Any]] = {
    AsksBeforeAttaching: (while_attaching, st.builds(Climate, bus_lost=st.just(0.5))),
    AttachesWhoWasRemoved: (while_replaying, climates),
    SettlesTooEarly: (while_untold, climates),
    NeverPushesChangedRows: (while_untold, climates),
    IgnoresAdditions: (while_untold, climates),
    IgnoresRemovals: (while_replaying, climates),
    BelievesClients: (while_away, climates),
    SkipsSilently: (while_away, climates),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found(fault: Any) -> None:
    some_scripts, some_climates = RARE.get(fault, (scripts, climates))

    @bounded(EXAMPLES, shrink=False)
    @given(script=some_scripts, seed=seeds, climate=some_climates)
    def property(script: Any, seed: int, climate: Any) -> None:
        deliver(script, seed, climate, make_delivery=fault)

    with pytest.raises(AssertionError):
        property()
