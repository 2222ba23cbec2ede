"""Deliver: every attached session gets every entry of its conversations, once, in order.

The loop of ``log.md``. The rules that it rests on:

* A room's ``last`` moves by one, ever; a hole is never stepped over.
* Everybody in ``room.topic`` has been given exactly the entries up to ``last``:
  who is behind is in ``room.attaching`` and gets there by its own replay.
* The bus is a hint. After every doubt, and in rotation without any, the store
  is asked what is newest (:meth:`Delivery.check`).

Between ``await``s nothing else runs on the loop; where a step relies on that,
it says "same tick".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import orjson

from ..errors import ChatError, Unavailable
from ..protocol import MEMBER_ROLES
from ..store.base import Entry, View
from . import events
from .room import NO_TOPIC, Directory, Reads, Room, Subscriber, Subscriptions, TopicLike

log = logging.getLogger("chatcore.delivery")

# A reordered bus message overtakes its predecessor by less than this; asking the
# store sooner would make every reordering cost a query.
GAP_WAIT_S: Final = 0.010
# Rows that a pump and a replay read at once; a replay's rows are all in the outbox
# of one session at the same time, so fewer.
PUMP_ROWS: Final = 200
REPLAY_ROWS: Final = 100
READ_BYTES: Final = 512 * 1024
# How long the pump waits before it asks again when the store had less than announced, or failed.
BACKOFF_S: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# Conversations that nobody is attached to any more are forgotten after two sweeps:
# reconnecting clients find them warm.
SWEEP_S: Final = 10.0
# Changes of conversations that a session is not attached to are merged over this time.
QUIET_MERGE_S: Final = 2.0


#: (conversation, after, upto, limit, max_bytes): entries after one, dense; ``upto`` is known to be committed.
Replay = Callable[[str, int, int, int, int], Awaitable[list[Entry]]]


class Delivery:
    """All rooms of one worker. Owns their pumps and the check, sweep and merge loops."""

    def __init__(
        self,
        store: Reads,
        bus: Subscriptions,
        directory: Directory,
        make_topic: Callable[[Room], TopicLike],
        make_frame: Callable[[bytes], Any],
        *,
        ring: int = 64,
        ring_bytes: int = 262_144,
        replay_bytes: int = 262_144,
        backlog: int = 500,
        check_interval_s: float = 1.0,
        replay: Replay | None = None,
    ) -> None:
        """``replay``: reads entries that were delivered here already, from nearer than the store, if it can."""
        self._store = store
        self._replay = replay or self._read
        self._bus = bus
        self._directory = directory
        self._make_topic = make_topic
        self._make_frame = make_frame
        self._ring = ring
        self._ring_bytes = ring_bytes
        self._replay_bytes = replay_bytes
        self._backlog = backlog
        self._check_interval_s = check_interval_s
        self.rooms: dict[str, Room] = {}
        self._behind: set[Room] = set()
        self._dirty: set[Room] = set()
        self.refreshing = 0
        self._merged = 0  # position up to which those who are told of changes only were told
        # What did not fit into one merge, or could not be read; `joining` counts who is in it.
        self._left: dict[Subscriber, list[str]] = {}
        self.seen = 0
        #: Position up to which all that concerns the live sessions here was queued to them.
        self.settled = 0
        self.deliveries = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._check_now = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    # --- Known: what a store may have to look at ---------------------------------
    def lasts(self) -> dict[str, int]:
        """The rooms, and the newest seq that is known of each."""
        return {room.conv: max(room.last, room.want) for room in self.rooms.values() if room.last >= 0}

    def users(self) -> list[str]:
        """Who is connected."""
        return self._directory.connected()

    def tokens(self) -> list[bytes]:
        """The tokens in use."""
        return self._directory.tokens()

    # --- life ---------------------------------------------------------------
    async def start(self) -> None:
        """Learn the newest position and start the loops."""
        self.seen = self.settled = await self._store.position()
        self._spawn(self._check_loop(), "delivery-check")
        self._spawn(self._sweep_loop(), "delivery-sweep")
        self._spawn(self._merge_loop(), "delivery-merge")

    async def close(self) -> None:
        """Cancel and await every task."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spawn(self, work: Awaitable[Any], name: str) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("task %s failed", task.get_name(), exc_info=exc)

    # --- what comes in --------------------------------------------------------
    def on_entry(self, e: Entry) -> None:
        """An entry was committed, here or elsewhere (at least once, in any order)."""
        room = self.rooms.get(e.conv)
        if room is None:
            return
        if e.seq > room.want:
            room.want = e.seq
        if room.last < 0:
            return  # still loading: `want` starts the pump once `last` is known
        if e.seq == room.last + 1:
            self._deliver(room, e)
            if room.want > room.last:
                self._start_pump(room, GAP_WAIT_S)
        elif e.seq > room.last:
            self._start_pump(room, GAP_WAIT_S)

    def on_bus(self, conv: str, payload: bytes) -> None:
        """A bus message on the channel of a conversation."""
        if payload[:1] == events.ENTRY:
            self.on_entry(events.unpack_entry(conv, payload))
        elif payload[:1] == events.STATE:
            skip_user, wire = events.unpack_state(payload)
            self.push_state(conv, skip_user, wire)

    def push_state(self, conv: str, skip_user: str, wire: bytes) -> None:
        """Fan a state push out to those attached here, except one user's sessions."""
        room = self.rooms.get(conv)
        if room is not None and len(room.topic):
            skip = self._directory.owner_of(skip_user) if skip_user else 0
            room.topic.fan_out(self._make_frame(wire), skip)

    def _deliver(self, room: Room, e: Entry) -> None:
        """The next entry, to all in the topic. No await inside: same tick."""
        room.last = e.seq
        room.ring.append(e)
        room.ring_bytes += len(e.wire)
        while len(room.ring) > self._ring or room.ring_bytes > self._ring_bytes:
            room.ring_bytes -= len(room.ring.pop(0).wire)
        if len(room.topic):
            self.deliveries += room.topic.fan_out(self._make_frame(e.wire))
        if len(room.quiet):
            room.dirty = True
            self._dirty.add(room)
        if e.t == "member":
            self._fold_member(room, e)

    def _fold_member(self, room: Room, e: Entry) -> None:
        """Somebody joined or left by this entry: so do the sessions that are here."""
        change = orjson.loads(e.wire)
        user = change["user"]
        if change["role"] in MEMBER_ROLES:
            room.let_in(user)
            for x in self._directory.sessions_of(user):
                self.attach_soon(x, room.conv, e.seq - 1)
            return
        room.put_out(user, e.seq)
        told = True
        for x in list(self._directory.sessions_of(user)):
            told = told and x.conn in room.topic
            self.detach(x, room)
        if not told:
            # Not all of the user's sessions were given the entry: tell them by a `conv`.
            self._directory.refresh(user, room.conv)

    def detach(self, x: Subscriber, room: Room) -> None:
        """Take a session out of a room."""
        room.arrived(x)
        room.topic.discard(x.conn)
        room.quiet.discard(x.conn)

    # --- the pump ---------------------------------------------------------------
    def _start_pump(self, room: Room, delay: float, recheck: bool = False) -> None:
        if recheck:
            room.recheck = True
        self._behind.add(room)
        if room.pump is None:
            room.pump = self._spawn(self._run_pump(room, delay), "delivery-pump")

    async def _run_pump(self, room: Room, delay: float) -> None:
        try:
            await asyncio.sleep(delay)
            tries = 0
            while room.recheck or room.want > room.last:
                room.recheck = False
                before = room.last
                try:
                    rows = await self._store.entries(room.conv, room.last, PUMP_ROWS, READ_BYTES)
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
                    if len(rows) == PUMP_ROWS:
                        room.recheck = True
                    continue
                if room.recheck or room.want > room.last:
                    await asyncio.sleep(BACKOFF_S[min(tries, len(BACKOFF_S) - 1)])
                    tries += 1
        finally:
            room.pump = None
            self._behind.discard(room)
            self._settle()

    async def _caught_up(self, room: Room) -> None:
        """Ask the store now, and wait until the pump has delivered what it had."""
        self._start_pump(room, 0, recheck=True)
        if room.pump is not None:
            await asyncio.wait([room.pump])

    # --- rooms ----------------------------------------------------------------
    async def acquire(self, convs: Sequence[str]) -> list[Room]:
        """The rooms of these conversations, subscribed and with ``last`` known; each is pinned
        until :meth:`release`. Single flight: who comes second waits for the first.

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
            # Shielded by a task of its own: a caller that is cancelled must not take
            # down those who wait for the same rooms.
            self._spawn(self._load(fresh), "delivery-load")
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
                ready.exception()  # nobody may be waiting
            if not isinstance(exc, ChatError):
                raise
            return
        for room in fresh:
            room.last = heads.get(room.conv, 0)
            room.want = max(room.want, room.last)
            if room.want > room.last:
                self._start_pump(room, 0)
            assert room.ready is not None
            room.ready.set_result(None)
            room.ready = None

    def release(self, rooms: Iterable[Room]) -> None:
        """Undo the pins of :meth:`acquire`."""
        for room in rooms:
            room.pins -= 1

    # --- attaching --------------------------------------------------------------
    def attach_soon(self, x: Subscriber, conv: str, have: int | None) -> None:
        """Attach in a task of its own (somebody was added to a conversation by entry ``have`` + 1, if known)."""
        if x.ready and not self._is_in(x, conv):
            x.joining += 1  # until it is attached, its `sync` stands still
            self._spawn(self._attach_one(x, conv, have), "delivery-attach")

    def _is_in(self, x: Subscriber, conv: str) -> bool:
        room = self.rooms.get(conv)
        return room is not None and (x.conn in room.topic or x in room.attaching or x.conn in room.quiet)

    async def _attach_one(self, x: Subscriber, conv: str, have: int | None) -> None:
        try:
            async with x.attach_lock():
                if not x.closed and not self._is_in(x, conv):
                    await self.attach(x, [conv], {} if have is None else {conv: have}, lambda view: True)
        except ChatError as exc:
            log.warning("attaching %s to %s: %s", x.user_id, conv, exc)
            if not x.closed:
                self._directory.refresh(x.user_id, conv)
        finally:
            x.joining -= 1

    def expect(self, x: Subscriber, convs: Iterable[str]) -> list[Room]:
        """Begin to attach a session that comes back to rooms that are live here, before its memberships are read.

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
            # Whoever was removed since `expect` is no longer in `attaching` (log.md, Deliver).
            sure = x in room.attaching and x not in room.stale and room.conv in revs
            if sure and have[room.conv] == room.last and not x.closed:
                room.topic.add(x.conn)
                live.append(room.conv)
            room.arrived(x)
            room.forget_stale(x)
        self.release(rooms)
        return live

    async def attach(
        self,
        x: Subscriber,
        convs: Sequence[str],
        have: Mapping[str, int],
        tell: Callable[[View], bool],
    ) -> None:
        """Attach a session: its ``conv`` pushes, the entries that it misses, then live.

        ``tell`` decides whether the ``conv`` of a view is pushed (it always is when
        ``after`` is not what the session named). Conversations that the user is not
        in are passed over. Returns when the session is live in all of them. The caller
        holds the session's attach lock.

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
                    if room.quiet is NO_TOPIC:
                        room.quiet = self._make_topic(room)
                    room.quiet.add(x.conn)
            # Only now is membership read: whoever is removed after this read is taken out of
            # `attaching` by the entry that removes him (log.md, Deliver).
            _, views = await self._store.views(x.user_id, [room.conv for room in rooms])
            by_conv = {room.conv: room for room in rooms}
            for view in views:
                room = by_conv[view.conv]
                if room.outdated(x.user_id, view):
                    continue
                del by_conv[view.conv]
                if view.head > room.want:
                    room.want = view.head
                    self._start_pump(room, 0)
                # As fast as it is read: a log-in tells of many conversations.
                if not await x.drained():
                    return
                if x in room.attaching and x.conn in room.quiet:
                    await self._tell_quiet(x, room, view, tell)
                elif x in room.attaching:
                    await self._attach_room(x, room, view, have.get(room.conv), tell)
                    if room.forget_stale(x):
                        self._directory.refresh(x.user_id, room.conv)
                if x.closed:
                    return
            for room in by_conv.values():
                self.detach(x, room)
                # Answers of a store may overtake each other: what is read now is newer.
                self._directory.refresh(x.user_id, room.conv)
        finally:
            for room in rooms:
                room.arrived(x)
                room.forget_stale(x)
            self.release(rooms)

    async def _tell_quiet(self, x: Subscriber, room: Room, view: View, tell: Callable[[View], bool]) -> None:
        """The ``conv`` of a room that is not to be attached; as it is now, if it changed while others were told."""
        room.arrived(x)
        stale = room.forget_stale(x)
        if stale or (tell(view) and room.last > view.head):
            await self._push_views(x, [room.conv])
        elif tell(view):
            x.push_view(view, None)

    async def _attach_room(
        self, x: Subscriber, room: Room, view: View, have: int | None, tell: Callable[[View], bool]
    ) -> None:
        if have is not None and have > room.last:
            await self._caught_up(room)
            if x not in room.attaching:
                return  # removed meanwhile
        # Never believe a client about the head; and who is too far behind pages (promise 4).
        if have is None or have > room.last or room.last - have > self._backlog:
            after = min(room.last, view.head)
        else:
            after = have
        if tell(view) or (have is not None and after != have):
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
        """Entries cur+1 … min(last, cur + 100), from the ring if it has them."""
        upto = min(room.last, cur + REPLAY_ROWS)
        first = room.last - len(room.ring) + 1
        if cur + 1 >= first:
            return self._cut(e for e in room.ring if cur < e.seq <= upto)
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

    # --- looking ------------------------------------------------------------------
    def check(self) -> None:
        """Look at the heads now: there is a doubt."""
        self._check_now.set()

    async def _check_loop(self) -> None:
        tries = 0
        while True:
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._check_interval_s):
                    await self._check_now.wait()
            # Without the bus there is nothing but looking; otherwise a part at a time (log.md, "check").
            everything = self._check_now.is_set() or not self._bus.healthy
            self._check_now.clear()
            try:
                await self._look(everything)
                tries = 0
            except ChatError as exc:
                log.warning("check: %s", exc)
                await asyncio.sleep(BACKOFF_S[min(tries, len(BACKOFF_S) - 1)])
                tries += 1
                self._check_now.set()

    async def _look(self, everything: bool) -> None:
        more = True
        while more:
            changes = await self._store.changes(self.seen, self, everything)
            for conv, seq in changes.heads:
                room = self.rooms.get(conv)
                if room is None:
                    continue
                room.want = max(room.want, seq)
                if 0 <= room.last < room.want:
                    self._start_pump(room, 0)
            for user, conv in changes.rows:
                self._directory.refresh(user, conv)
            if changes.revoked_tokens or changes.revoked_users:
                self._directory.revoked(changes.revoked_tokens, changes.revoked_users)
            self.seen = changes.position
            more = changes.more
        self._settle()

    def _settle(self) -> None:
        if not self._behind and not self.refreshing:
            self.settled = max(self.settled, self._merged if self._dirty else self.seen)

    def refreshed(self) -> None:
        """A refresh ended (``refreshing`` counts them)."""
        self.refreshing -= 1
        self._settle()

    async def _sweep_loop(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            gone: list[str] = []
            for room in list(self.rooms.values()):
                if room.last < 0 or not room.unused:
                    room.idle_sweeps = 0
                    continue
                room.idle_sweeps += 1
                if room.idle_sweeps >= 2 and room.pump is None:
                    del self.rooms[room.conv]
                    self._dirty.discard(room)
                    gone.append(events.conv_channel(room.conv))
            if gone:
                self._bus.unsubscribe(gone)

    async def _merge_loop(self) -> None:
        """Tell those who are not attached what changed, merged over seconds.

        A ``conv`` holds the reader's own unread count, so each is made for one user;
        this is not the delivery path, and it is bounded by the merge interval.
        """
        while True:
            await asyncio.sleep(QUIET_MERGE_S)
            if not (self._dirty or self._left):
                continue
            left, self._left = self._left, {}
            wanted: dict[Subscriber, list[str]] = {x: list(convs) for x, convs in left.items()}
            for room in self._dirty:
                room.dirty = False
                for x in room.quiet.sessions():
                    wanted.setdefault(x, []).append(room.conv)
            self._dirty.clear()
            # All up to here was delivered, so what it made dirty is in `wanted`.
            upto = self._merged if self._behind else self.seen
            self.refreshing += 1
            try:
                for x, convs in wanted.items():
                    if not x.closed:
                        await self._push_views(x, convs)
                    if x in left:
                        x.joining -= 1
                self._merged = upto
            finally:
                self.refreshed()

    async def _push_views(self, x: Subscriber, convs: list[str]) -> None:
        """The ``conv`` of each, newest first, as many as may be in an outbox at once; the others come with the next
        merge, since nobody is cut off for what others wrote in conversations that he did not attach to.
        """
        try:
            _, views = await self._store.views(x.user_id, convs)
        except ChatError as exc:
            log.warning("conv for %s: %s", x.user_id, exc)
            self._tell_later(x, convs)
            return
        size = 0
        for i, view in enumerate(views):
            size += len(view.last or b"")
            if i and size > self._replay_bytes:
                self._tell_later(x, [late.conv for late in views[i:]])
                return
            if not x.closed:
                x.push_view(view, None)

    def _tell_later(self, x: Subscriber, convs: list[str]) -> None:
        if x not in self._left:
            x.joining += 1  # its `sync` does not cover what it was not told
            self._left[x] = []
        self._left[x] += convs
