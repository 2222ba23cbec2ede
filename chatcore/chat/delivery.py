"""Deliver: every attached session is sent every entry of its conversations, once, in order.

The loop of ``docs/log.md``, "Deliver". The rules that it rests on:

* The cursor ``last`` of a room moves by one; delivery never steps over a hole (rule 7).
* Each subscriber of ``room.topic`` has been sent exactly the entries up to ``last``:
  a session that is behind is in ``room.attaching`` and gets there by its own replay.
* The bus is a hint (rule 8). After every suspected loss, and in rotation without any, the
  store is asked which entries are newest (:meth:`Delivery.check`).

Between ``await``s nothing else runs on the loop; where a step relies on that,
it says "same tick".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final

from ..common.tasks import Tasks
from ..entries import ROLE_CHANGING, RoleChange, change_of
from ..errors import ChatError, Unavailable
from ..protocol import MEMBER_ROLES, conv_left
from ..store.base import Entry, View
from . import events
from .directory import OUT
from .interfaces import Connected, Sessions, StoreReads, Subscriber, Subscriptions, TopicLike

log = logging.getLogger("chatcore.delivery")

# A reordered bus message overtakes its predecessor by less than this; asking the
# store sooner would make every reordering cost a query.
GAP_WAIT_S: Final = 0.010
# Rows that a backfill and a replay read at once; a replay's rows are all in the outbox
# of one session at the same time, so fewer.
BACKFILL_ROWS: Final = 200
REPLAY_ROWS: Final = 100
READ_BYTES: Final = 512 * 1024
# How long a backfill waits before it asks again when the store had less than announced, or failed.
BACKOFF_S: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# An unused room is forgotten after two sweeps: reconnecting clients find it warm.
SWEEP_S: Final = 10.0
# Changes of conversations to which a session is not attached are merged over this time.
SUMMARIES_S: Final = 2.0
# Between two tries to read a row that changed, while the store does not answer.
REFRESH_PAUSE_S: Final = 0.2
REFRESH_PAUSE_MAX_S: Final = 2.0

# Removals remembered of one room; rows lag behind their entries for moments only.
REMOVALS_MAX: Final = 1000
#: Shared by all rooms to which no session is being attached: a set of their own would be most of what a room costs.
NO_SESSIONS: Final[frozenset[Any]] = frozenset()

#: (conversation, after, upto, limit, max_bytes): entries after one, dense; ``upto`` is known to be committed.
Replay = Callable[[str, int, int, int, int], Awaitable[list[Entry]]]


class EmptyTopic:
    """A topic without subscribers, shared by all rooms that have none of the kind."""

    def __len__(self) -> int:
        return 0

    def __contains__(self, conn: int) -> bool:
        return False

    def add(self, conn: int) -> bool:
        """Never: a room replaces it by a real topic first."""
        raise TypeError("the shared empty topic takes no subscribers")

    def discard(self, conn: int) -> bool:
        """False: there is no such subscriber."""
        return False

    def fan_out(self, frame: Any, skip_owner: int = 0) -> int:
        """Deliver to 0 subscribers."""
        return 0

    def sessions(self) -> list[Any]:
        """An empty list."""
        return []


EMPTY_TOPIC: Final = EmptyTopic()


class Room:
    """A conversation to which at least one session on this worker is attached."""

    __slots__ = (
        "_removals",
        "attaching",
        "backfill",
        "conv",
        "idle_sweeps",
        "last",
        "newest",
        "pins",
        "ready",
        "recent",
        "recent_bytes",
        "recheck",
        "stale",
        "summaries",
        "topic",
    )

    def __init__(self, conv: str, ready: asyncio.Future[None]) -> None:
        self.conv = conv
        self.topic: TopicLike  # attached and live: exactly the entries up to `last` were queued to each subscriber
        self.summaries: TopicLike = EMPTY_TOPIC  # members that are sent changes of their `conv` only
        self.last = -1  # the last entry that was delivered here; -1: not known yet
        self.newest = 0  # the newest entry that this worker has heard of
        # Dense, ends with `last`; bounded by count and bytes. A list: an empty deque is 600 bytes larger.
        self.recent: list[Entry] = []
        self.recent_bytes = 0
        self.backfill: asyncio.Task[None] | None = None
        self.recheck = False  # the backfill is to ask the store even if newest == last
        # Behind `last`, or membership not read yet. Changed by `expect` and `arrived` only.
        self.attaching: AbstractSet[Subscriber] = NO_SESSIONS
        # Those of them that must be sent the row again: it changed after the attach had read it.
        self.stale: frozenset[Subscriber] = NO_SESSIONS
        # User -> the entry that removed this user: a row that reflects an earlier one is not believed.
        self._removals: dict[str, int] | None = None
        self.pins = 0
        self.ready: asyncio.Future[None] | None = ready  # None: `last` is known
        self.idle_sweeps = 0

    def expect(self, x: Subscriber) -> None:
        """A session begins to attach."""
        if isinstance(self.attaching, set):
            self.attaching.add(x)
        else:
            self.attaching = {x}

    def arrived(self, x: Subscriber) -> None:
        """The session is live, or gave up."""
        if isinstance(self.attaching, set):
            self.attaching.discard(x)
            if not self.attaching:
                # Not kept empty: a set stays as large as it ever was.
                self.attaching = NO_SESSIONS

    def mark_stale(self, x: Subscriber) -> None:
        """The row of a session that is attaching changed: the session may yet be sent an older view of it."""
        self.stale |= {x}

    def clear_stale(self, x: Subscriber) -> bool:
        """Whether the session must be sent its row again."""
        if x not in self.stale:
            return False
        self.stale = self.stale - {x} or NO_SESSIONS
        return True

    def outdated(self, user: str, view: View) -> bool:
        """Whether the user's row is older than the removal that was delivered here."""
        return self._removals is not None and view.as_of < self._removals.get(user, 0)

    def removed(self, user: str, seq: int) -> None:
        """An entry that was delivered here removed the user."""
        if self._removals is None or len(self._removals) >= REMOVALS_MAX:
            self._removals = {}
        self._removals[user] = seq

    def readmitted(self, user: str) -> None:
        """A later entry made the user a member again."""
        if self._removals is not None:
            self._removals.pop(user, None)

    @property
    def unused(self) -> bool:
        """No session on this worker needs it any more."""
        return not (self.pins or self.attaching or len(self.topic) or len(self.summaries))


class Delivery:
    """All rooms of one worker. Owns their backfills, the refreshes of rows, and the check, sweep and summary loops."""

    def __init__(
        self,
        store: StoreReads,
        bus: Subscriptions,
        sessions: Sessions,
        make_topic: Callable[[Room], TopicLike],
        make_frame: Callable[[bytes], Any],
        *,
        recent: int = 64,
        recent_bytes: int = 262_144,
        replay_bytes: int = 262_144,
        backlog: int = 500,
        check_interval_s: float = 1.0,
        replay: Replay | None = None,
    ) -> None:
        """:param recent: entries of each room kept for replays, at most; ``recent_bytes`` of them.
        :param replay_bytes: of one replay or of one round of summaries, that are in the outbox of a session at once.
        :param backlog: a session that is further behind pages through history instead.
        :param replay: reads entries that were delivered here already, from nearer than the store, if it can.
        """
        self._store = store
        self._replay = replay or self._read
        self._bus = bus
        self._sessions = sessions
        self._make_topic = make_topic
        self._make_frame = make_frame
        self._recent = recent
        self._recent_bytes = recent_bytes
        self._replay_bytes = replay_bytes
        self._backlog = backlog
        self._check_interval_s = check_interval_s
        self.rooms: dict[str, Room] = {}
        self._behind: set[Room] = set()  # with a backfill under way
        self._dirty: set[Room] = set()  # with summaries due
        self._refreshing: set[tuple[str, str]] = set()  # (user, conversation) with a refresh under way
        self._refresh_again: dict[tuple[str, str], int | None] = {}  # changed once more meanwhile
        # Positions of the store's change counter. Up to `_checked` changes were looked at, up to
        # `_summarized` the summaries were pushed, up to `synced` all that concerns live sessions here was queued.
        self._checked = 0
        self._summarized = 0
        self._summarizing = False
        self.synced = 0
        # Summaries that did not fit into one round, or could not be read. They hold back the `sync` of the session.
        self._postponed: dict[Subscriber, list[str]] = {}
        self.deliveries = 0
        self._tasks = Tasks()
        self._check_now = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    # --- Known: what a store may have to check ------------------------------------
    def lasts(self) -> dict[str, int]:
        """The rooms, and the newest seq that is known of each."""
        return {room.conv: max(room.last, room.newest) for room in self.rooms.values() if room.last >= 0}

    def users(self) -> list[str]:
        """The users who are connected."""
        return self._sessions.connected()

    def tokens(self) -> list[bytes]:
        """The tokens in use."""
        return self._sessions.tokens()

    # --- life ---------------------------------------------------------------
    async def start(self) -> None:
        """Learn the newest position and start the loops."""
        self._checked = self.synced = await self._store.position()
        self._tasks.spawn(self._check_loop(), "delivery-check")
        self._tasks.spawn(self._sweep_loop(), "delivery-sweep")
        self._tasks.spawn(self._summary_loop(), "delivery-summaries")

    async def close(self) -> None:
        """Cancel and await every task."""
        await self._tasks.close()
        self.rooms.clear()  # an entry that is committed late starts no backfill

    # --- entries and states ----------------------------------------------------
    def on_entry(self, e: Entry) -> None:
        """An entry was committed, here or elsewhere (at least once, in any order)."""
        room = self.rooms.get(e.conv)
        if room is None:
            return
        if e.seq > room.newest:
            room.newest = e.seq
        if room.last < 0:
            return  # still loading: `newest` starts the backfill once `last` is known
        if e.seq == room.last + 1:
            self._deliver(room, e)
            if room.newest > room.last:
                self._start_backfill(room, GAP_WAIT_S)
        elif e.seq > room.last:
            self._start_backfill(room, GAP_WAIT_S)

    def on_bus(self, conv: str, payload: bytes) -> None:
        """A bus message on the channel of a conversation."""
        if payload[:1] == events.ENTRY:
            self.on_entry(events.unpack_entry(conv, payload))
        elif payload[:1] == events.STATE:
            skip_user, wire = events.unpack_state(payload)
            self.push_state(conv, skip_user, wire)

    def push_state(self, conv: str, skip_user: str, wire: bytes) -> None:
        """Fan a state push out to the sessions attached here, except those of one user ("": no exception)."""
        room = self.rooms.get(conv)
        if room is not None and len(room.topic):
            skip = self._sessions.owner_of(skip_user) if skip_user else 0
            room.topic.fan_out(self._make_frame(wire), skip)

    def _deliver(self, room: Room, e: Entry) -> None:
        """Send the next entry to all in the topic. No await inside: same tick."""
        room.last = e.seq
        room.recent.append(e)
        room.recent_bytes += len(e.wire)
        while len(room.recent) > self._recent or room.recent_bytes > self._recent_bytes:
            room.recent_bytes -= len(room.recent.pop(0).wire)
        if len(room.topic):
            self.deliveries += room.topic.fan_out(self._make_frame(e.wire))
        if room.summaries is not EMPTY_TOPIC and len(room.summaries):
            self._dirty.add(room)
        if e.t in ROLE_CHANGING:
            self._apply_member(room, e)

    def _apply_member(self, room: Room, e: Entry) -> None:
        """A user joined or left by this entry: attach or detach the user's sessions here."""
        change = change_of(e.t, e.wire)
        assert isinstance(change, RoleChange)
        user = change.user
        if change.role in MEMBER_ROLES:
            room.readmitted(user)
            for x in self._sessions.sessions_of(user):
                self.attach_soon(x, room.conv, e.seq - 1)
            return
        room.removed(user, e.seq)
        all_sent = True
        for x in list(self._sessions.sessions_of(user)):
            all_sent = all_sent and x.conn in room.topic
            self.detach(x, room)
        if not all_sent:
            # Not all of the user's sessions were sent the entry: the others learn it from a `conv`.
            self.refresh(user, room.conv)

    def detach(self, x: Subscriber, room: Room) -> None:
        """Take a session out of a room."""
        room.arrived(x)
        room.topic.discard(x.conn)
        room.summaries.discard(x.conn)

    # --- backfill ---------------------------------------------------------------
    def _start_backfill(self, room: Room, delay: float, recheck: bool = False) -> None:
        if recheck:
            room.recheck = True
        self._behind.add(room)
        if room.backfill is None:
            room.backfill = self._tasks.spawn(self._run_backfill(room, delay), "delivery-backfill")

    async def _run_backfill(self, room: Room, delay: float) -> None:
        try:
            await asyncio.sleep(delay)
            tries = 0
            while room.recheck or room.newest > room.last:
                room.recheck = False
                before = room.last
                try:
                    rows = await self._store.entries(room.conv, room.last, BACKFILL_ROWS, READ_BYTES)
                except ChatError as exc:
                    log.warning("backfill of %s: %s", room.conv, exc)
                    rows = []
                    room.recheck = True
                for e in rows:
                    if e.seq == room.last + 1:
                        self._deliver(room, e)
                    elif e.seq > room.last:
                        break  # a hole in what was read: read again
                if room.last > before:
                    tries = 0
                    if len(rows) == BACKFILL_ROWS:
                        room.recheck = True
                    continue
                if room.recheck or room.newest > room.last:
                    await asyncio.sleep(BACKOFF_S[min(tries, len(BACKOFF_S) - 1)])
                    tries += 1
        finally:
            room.backfill = None
            self._behind.discard(room)
            self._advance_synced()

    async def _caught_up(self, room: Room) -> None:
        """Ask the store now, and wait until the backfill has delivered what the store had."""
        self._start_backfill(room, 0, recheck=True)
        if room.backfill is not None:
            await asyncio.wait([room.backfill])

    # --- rooms ----------------------------------------------------------------
    async def acquire(self, convs: Sequence[str]) -> list[Room]:
        """The rooms of these conversations, subscribed and with ``last`` known; each is pinned
        until :meth:`release`. Single flight: a second caller waits for the load that the first one started.

        :raises Unavailable: the store does not answer.
        """
        rooms: list[Room] = []
        fresh: list[Room] = []
        for conv in convs:
            room = self.rooms.get(conv)
            if room is None:
                room = self.rooms[conv] = Room(conv, self._loop.create_future())
                room.topic = self._make_topic(room)
                fresh.append(room)
            room.pins += 1
            rooms.append(room)
        if fresh:
            # In a task of its own: the cancellation of one caller must not fail
            # the others that wait for the same rooms.
            self._tasks.spawn(self._load(fresh), "delivery-load")
        try:
            for room in rooms:
                if room.ready is not None:
                    await asyncio.wait([ready := room.ready])
                    ready.result()
        except BaseException:
            self.release(rooms)
            raise
        return rooms

    async def _load(self, fresh: list[Room]) -> None:
        channels = [events.conv_channel(room.conv) for room in fresh]
        try:
            await self._bus.subscribe(channels)
            heads = await self._store.heads([room.conv for room in fresh])
        except BaseException as exc:
            self._bus.unsubscribe(channels)
            for room in fresh:
                self.rooms.pop(room.conv, None)
                ready = room.ready
                assert ready is not None
                ready.set_exception(exc if isinstance(exc, ChatError) else Unavailable("the worker is stopping"))
                ready.exception()  # retrieved: there may be no caller that still waits
            if not isinstance(exc, ChatError):
                raise
            return
        for room in fresh:
            room.last = heads.get(room.conv, 0)
            room.newest = max(room.newest, room.last)
            if room.newest > room.last:
                self._start_backfill(room, 0)
            assert room.ready is not None
            room.ready.set_result(None)
            room.ready = None

    def release(self, rooms: Iterable[Room]) -> None:
        """Undo the pins of :meth:`acquire`."""
        for room in rooms:
            room.pins -= 1

    # --- attaching --------------------------------------------------------------
    def attach_soon(self, x: Subscriber, conv: str, have: int | None) -> None:
        """Attach in a task of its own (entry ``have`` + 1, if known, made the user a member)."""
        if x.ready and not self._is_in(x, conv):
            x.hold_sync()  # until it is attached
            self._tasks.spawn(self._attach_one(x, conv, have), "delivery-attach")

    def _is_in(self, x: Subscriber, conv: str) -> bool:
        room = self.rooms.get(conv)
        return room is not None and (x.conn in room.topic or x in room.attaching or x.conn in room.summaries)

    async def _attach_one(self, x: Subscriber, conv: str, have: int | None) -> None:
        try:
            async with x.attach_lock():
                if not x.closed and not self._is_in(x, conv):
                    await self.attach(x, [conv], {} if have is None else {conv: have}, lambda view: True)
        except ChatError as exc:
            log.warning("attaching %s to %s: %s", x.user_id, conv, exc)
            if not x.closed:
                self.refresh(x.user_id, conv)
        finally:
            x.release_sync()

    def expect(self, x: Subscriber, convs: Iterable[str]) -> list[Room]:
        """Begin to attach a session that reconnects to rooms that are live here, before its memberships are read.

        To be ended by :meth:`resume`. The rooms that it names and that are not live are left out.
        """
        rooms: list[Room] = []
        for conv in convs:
            room = self.rooms.get(conv)
            if room is not None and room.last >= 0 and x.wants(conv):
                room.pins += 1
                room.expect(x)
                rooms.append(room)
        return rooms

    def resume(
        self, x: Subscriber, rooms: Iterable[Room], have: Mapping[str, int], revs: Mapping[str, int]
    ) -> list[str]:
        """Attach it where it missed nothing (same tick), and end what :meth:`expect` began everywhere else.

        ``revs``: its memberships, read meanwhile from a store whose rows follow their entries at once, without
        those that changed since it was here. Returns the conversations in which it is live now.
        """
        live: list[str] = []
        for room in rooms:
            # A user who was removed since `expect` is no longer in `attaching` (docs/log.md, "Deliver").
            sure = x in room.attaching and x not in room.stale and room.conv in revs
            if sure and have[room.conv] == room.last and not x.closed:
                room.topic.add(x.conn)
                live.append(room.conv)
            room.arrived(x)
            room.clear_stale(x)
        self.release(rooms)
        return live

    async def attach(
        self,
        x: Subscriber,
        convs: Sequence[str],
        have: Mapping[str, int],
        announce: Callable[[View], bool],
    ) -> list[str]:
        """Attach a session: its ``conv`` pushes, the entries that it misses, then live.

        ``announce`` decides whether the ``conv`` of a view is pushed (it always is when
        ``after`` is not what the session named). Conversations that the user is not
        in are skipped, and returned. Returns when the session is live in all others, or closed.
        The caller holds the session's attach lock.

        :raises Unavailable: the store does not answer (nothing half done is left).
        """
        rooms = await self.acquire(convs)
        try:
            for room in rooms:
                wanted = x.wants(room.conv)
                if wanted and x.conn in room.topic and room.conv not in have:
                    continue  # live already: it missed nothing
                self.detach(x, room)
                room.expect(x)
                if not wanted:
                    if room.summaries is EMPTY_TOPIC:
                        room.summaries = self._make_topic(room)
                    room.summaries.add(x.conn)
            # Membership is read only now: an entry that removes the user after this read also takes
            # the session out of `attaching` (docs/log.md, "Deliver").
            _, views = await self._store.views(x.user_id, [room.conv for room in rooms])
            by_conv = {room.conv: room for room in rooms}
            for view in views:
                room = by_conv[view.conv]
                if room.outdated(x.user_id, view):
                    continue
                del by_conv[view.conv]
                if view.head > room.newest:
                    room.newest = view.head
                    self._start_backfill(room, 0)
                # As fast as the client reads: a log-in pushes many views.
                if not await x.drained():
                    return []
                if x in room.attaching and x.conn in room.summaries:
                    await self._push_summary(x, room, view, announce)
                elif x in room.attaching:
                    await self._attach_room(x, room, view, have.get(room.conv), announce)
                    if room.clear_stale(x):
                        self.refresh(x.user_id, room.conv)
                if x.closed:
                    return []
            for room in by_conv.values():
                self.detach(x, room)
                # Answers of a store may overtake each other: what is read now is newer.
                self.refresh(x.user_id, room.conv)
            return list(by_conv)
        finally:
            for room in rooms:
                room.arrived(x)
                room.clear_stale(x)
            self.release(rooms)

    async def _push_summary(self, x: Subscriber, room: Room, view: View, announce: Callable[[View], bool]) -> None:
        """The ``conv`` of a room to which the session is not to be attached; as it is now, if it changed meanwhile."""
        room.arrived(x)
        stale = room.clear_stale(x)
        if stale or (announce(view) and room.last > view.head):
            await self._push_views(x, [room.conv])
        elif announce(view):
            x.push_view(view, None)

    async def _attach_room(
        self, x: Subscriber, room: Room, view: View, have: int | None, announce: Callable[[View], bool]
    ) -> None:
        if have is not None and have > room.last:
            await self._caught_up(room)
            if x not in room.attaching:
                return  # removed meanwhile
        # A client is never believed about the head; a client that is too far behind pages through history.
        if have is None or have > room.last or room.last - have > self._backlog:
            after = min(room.last, view.head)
        else:
            after = have
        if announce(view) or (have is not None and after != have):
            x.push_view(view, after)
        cur = after
        while x in room.attaching and not x.closed:
            if cur == room.last:
                room.arrived(x)
                room.topic.add(x.conn)
                return  # same tick: nothing can be delivered in between
            if not await x.drained():
                return
            rows = await self._missing(room, cur)
            if x not in room.attaching:
                return
            for e in rows:
                x.push(e.wire)
                cur = e.seq

    async def _missing(self, room: Room, cur: int) -> list[Entry]:
        """Entries cur+1 … min(last, cur + 100), from the recent ones if they are among them."""
        upto = min(room.last, cur + REPLAY_ROWS)
        first = room.last - len(room.recent) + 1
        if cur + 1 >= first:
            return self._cut(e for e in room.recent if cur < e.seq <= upto)
        rows = await self._replay(room.conv, cur, room.last, upto - cur, self._replay_bytes)
        dense: list[Entry] = []
        for e in rows:
            if e.seq != cur + 1 + len(dense) or e.seq > upto:
                break
            dense.append(e)
        if not dense:
            await asyncio.sleep(BACKOFF_S[0])  # what was delivered must be there: a lagging read
        return dense

    async def _read(self, conv: str, after: int, upto: int, limit: int, max_bytes: int) -> list[Entry]:
        return await self._store.entries(conv, after, limit, max_bytes)

    def _cut(self, entries: Iterable[Entry]) -> list[Entry]:
        """As many as may be in an outbox at once, one at least."""
        taken: list[Entry] = []
        size = 0
        for e in entries:
            size += len(e.wire)
            if taken and size > self._replay_bytes:
                break
            taken.append(e)
        return taken

    # --- rows -----------------------------------------------------------------------
    def refresh(self, user: str, conv: str, have: int | None = None) -> None:
        """The user's row of a conversation changed: bring the user's sessions here up to date.

        ``have``: the seq before the entry that brought the user in, if one did.
        """
        if self._sessions.get(user) is None:
            return
        if (user, conv) in self._refreshing:
            # One after the other: the view that was read first must not be pushed last.
            self._refresh_again[(user, conv)] = have if have is not None else self._refresh_again.get((user, conv))
            return
        self._refreshing.add((user, conv))
        self._tasks.spawn(self._refresh(user, conv, have), "delivery-refresh")

    async def _refresh(self, user: str, conv: str, have: int | None) -> None:
        try:
            pause = REFRESH_PAUSE_S
            while (connected := self._sessions.get(user)) is not None:
                try:
                    _, views = await self._store.views(user, [conv])
                except ChatError as exc:
                    # No later check would find this change again: it is pushed when the store is back.
                    log.warning("refresh of %s: %s", user, exc)
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, REFRESH_PAUSE_MAX_S)
                    continue
                room = self.rooms.get(conv)
                if views and (room is None or not room.outdated(user, views[0])):
                    self._push_refreshed(connected, room, views[0], have)
                else:
                    self._push_out(connected, room, conv)
                if (user, conv) not in self._refresh_again:
                    return
                have = self._refresh_again.pop((user, conv))
        finally:
            self._refreshing.discard((user, conv))
            self._refresh_again.pop((user, conv), None)
            self._advance_synced()

    def _push_refreshed(self, connected: Connected, room: Room | None, view: View, have: int | None) -> None:
        known = connected.knows_view(view.conv, (view.rev, view.members))
        all_sent = True
        for x in connected.sessions:
            if not x.ready:
                x.defer_refresh(view.conv)  # its own list may be older, or younger
                all_sent = False
            elif room is not None and x in room.attaching:
                # It may yet be sent an older view: it is sent this one as soon as it is attached.
                room.mark_stale(x)
                all_sent = False
            elif room is not None and (x.conn in room.topic or x.conn in room.summaries):
                if not known:
                    x.push_view(view, None)
            else:
                self.attach_soon(x, view.conv, have)
        connected.learned_view(view.conv, (view.rev, view.members) if all_sent else None)

    def _push_out(self, connected: Connected, room: Room | None, conv: str) -> None:
        known = connected.knows_view(conv, OUT)
        all_sent = True
        for x in connected.sessions:
            if room is not None:
                self.detach(x, room)
            if not x.ready:
                x.defer_refresh(conv)
                all_sent = False
            elif not known:
                x.push(conv_left(conv))
        connected.learned_view(conv, OUT if all_sent else None)

    # --- checking the store -----------------------------------------------------------
    def check(self) -> None:
        """Compare with the heads in the store now: something may have been lost."""
        self._check_now.set()

    async def _check_loop(self) -> None:
        tries = 0
        while True:
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._check_interval_s):
                    await self._check_now.wait()
            # Without the bus there is nothing but the check; otherwise a part at a time (docs/log.md, "Deliver").
            everything = self._check_now.is_set() or not self._bus.healthy
            self._check_now.clear()
            try:
                await self._check(everything)
                tries = 0
            except ChatError as exc:
                log.warning("check: %s", exc)
                await asyncio.sleep(BACKOFF_S[min(tries, len(BACKOFF_S) - 1)])
                tries += 1
                self._check_now.set()

    async def _check(self, everything: bool) -> None:
        more = True
        while more:
            changes = await self._store.changes(self._checked, self, everything)
            for conv, seq in changes.heads:
                room = self.rooms.get(conv)
                if room is None:
                    continue
                room.newest = max(room.newest, seq)
                if 0 <= room.last < room.newest:
                    self._start_backfill(room, 0)
            for user, conv in changes.rows:
                self.refresh(user, conv)
            if changes.revoked_tokens or changes.revoked_users:
                self._sessions.revoked(changes.revoked_tokens, changes.revoked_users)
            self._checked = changes.position
            more = changes.more
        self._advance_synced()

    def _advance_synced(self) -> None:
        if not self._behind and not self._refreshing and not self._summarizing:
            self.synced = max(self.synced, self._summarized if self._dirty else self._checked)

    async def _sweep_loop(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            gone: list[str] = []
            for room in list(self.rooms.values()):
                if room.last < 0 or not room.unused:
                    room.idle_sweeps = 0
                    continue
                room.idle_sweeps += 1
                if room.idle_sweeps >= 2 and room.backfill is None:
                    del self.rooms[room.conv]
                    self._dirty.discard(room)
                    gone.append(events.conv_channel(room.conv))
            if gone:
                self._bus.unsubscribe(gone)

    # --- summaries --------------------------------------------------------------------
    async def _summary_loop(self) -> None:
        """Push changed ``conv``s to the sessions that are not attached, merged over seconds.

        A ``conv`` holds the reader's own unread count, so each is made for one user;
        this is not the delivery path, and it is bounded by the interval.
        """
        while True:
            await asyncio.sleep(SUMMARIES_S)
            if not (self._dirty or self._postponed):
                continue
            postponed, self._postponed = self._postponed, {}
            due: dict[Subscriber, list[str]] = {x: list(convs) for x, convs in postponed.items()}
            for room in self._dirty:
                for x in room.summaries.sessions():
                    due.setdefault(x, []).append(room.conv)
            self._dirty.clear()
            # All up to here was delivered, so the conversations that it changed are in `due`.
            upto = self._summarized if self._behind else self._checked
            self._summarizing = True
            try:
                for x, convs in due.items():
                    if not x.closed:
                        await self._push_views(x, convs)
                    if x in postponed:
                        x.release_sync()
                self._summarized = upto
            finally:
                self._summarizing = False
                self._advance_synced()

    async def _push_views(self, x: Subscriber, convs: list[str]) -> None:
        """Push the ``conv`` of each, newest first, as many as may be in an outbox at once. The others come with the
        next round: no session is cut off for messages in conversations to which it did not attach.
        """
        try:
            _, views = await self._store.views(x.user_id, convs)
        except ChatError as exc:
            log.warning("conv for %s: %s", x.user_id, exc)
            self._postpone(x, convs)
            return
        size = 0
        for i, view in enumerate(views):
            size += len(view.last or b"")
            if i and size > self._replay_bytes:
                self._postpone(x, [late.conv for late in views[i:]])
                return
            if not x.closed:
                x.push_view(view, None)

    def _postpone(self, x: Subscriber, convs: list[str]) -> None:
        if x not in self._postponed:
            x.hold_sync()  # its `sync` does not cover what it was not sent
            self._postponed[x] = []
        self._postponed[x] += convs
