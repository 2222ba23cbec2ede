"""Append to logs that several writers contend for: the loop for stores without a lock (MongoDB).

Any number of writers on any number of hosts append to one conversation; the store's
two unique indexes, on (conv, seq) and on (conv, sender, cid), decide between them.
The numbers in the comments are the rules of docs/log.md.

* A head is what this writer has seen committed: by its own clean acknowledgement or by
  a majority read, never what it heard on the bus (1). Too low costs a retry, too high a hole.
* Anything but clean success is *unknown*: forget the head, read back, decide by the cid (3).
* A request is answered after a clean acknowledgement or a majority read-back, never before (5).
* Whether an entry is allowed is decided again for every head that it is to follow (6), and so are the
  fields that depend on the head (the role that a user had before).

The store gives :class:`LogOps`; a model store drives the same loop in ``tests/model``.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from ..common.tasks import Tasks
from ..entries import MESSAGES, NewEntry, RoleChange
from ..errors import ChatError, Conflict, Unavailable
from ..protocol import encode_entry
from .base import Appended, Entry, OnCommit

log = logging.getLogger("chatcore.append")

#: A loser waits random(0, min(MAX, FIRST * 2^losses)): about a commit first, then long enough for several.
LOSS_FIRST_S: Final = 0.002
LOSS_MAX_S: Final = 0.100
#: From so many losses in a row on, the other hosts are asked to yield.
LOSSES_TO_YIELD: Final = 2
#: A writer that yields pauses so many times its own last commit, twice as long each time it is asked again before
#: another writer got in (the other one must read before it writes, and where that takes longer than a commit, such a
#: pause would always end too soon), and never longer than MAX.
YIELD_COMMITS: Final = 2
YIELD_MAX_S: Final = 1.0
#: How exactly `max_wait_s` is kept: the queues of all conversations are looked at so often.
SWEEP_S: Final = 0.05
#: When to look for entries that were answered `unavailable` after they had been submitted, in s since then.
LATE_LOOKS_S: Final = (1, 2, 4, 8, 16, 32, 60)
#: What an entry is counted with beside its fields: ids, counters, BSON keys.
ENTRY_OVERHEAD_BYTES: Final = 256

Key = tuple[str, str]  # sender, cid


class Unknown(Exception):
    """An operation did not end cleanly: it may have happened, wholly or in part, or may happen yet."""


@dataclass(frozen=True, slots=True)
class Head:
    """The newest committed entry of a conversation (seq 0: none), with its running counters."""

    seq: int = 0
    msgs: int = 0
    last_msg: int = 0
    last_change: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """An entry with its place in the log. ``ts``: Unix ms, a label."""

    new: NewEntry
    seq: int
    ts: int
    msgs: int
    last_msg: int
    last_change: int = 0  # the newest entry that changes members or the conversation

    def entry(self) -> Entry:
        """As it goes to readers."""
        e = self.new
        wire = encode_entry(e.t, e.conv, self.seq, e.sender, self.ts, e.cid, e.fields)
        return Entry(e.conv, self.seq, e.t, e.sender, self.msgs, self.last_msg, wire)


@dataclass(frozen=True, slots=True)
class Found:
    """A committed entry, found by its sender and cid. ``digest``: of the request that it was appended for."""

    cid: str
    digest: bytes
    ts: int
    entry: Entry


#: What becomes of an entry as of a head: append this one, which is complete; refuse it with an error; or
#: ``Appended(0, …)``: what it asks for is so already, and needs no entry.
Decision = NewEntry | Appended | ChatError


@dataclass(frozen=True, slots=True)
class Decisions:
    """One decision for each entry, and as of when: what the store needs to read no earlier state later
    (MongoDB: the operation time of a causally consistent session; with a single server, nothing)."""

    each: Sequence[Decision]
    as_of: object = None


class LogOps(Protocol):
    """What the loop asks of a store. Reads: from the primary, of what a majority has.

    Every operation may raise :class:`Unknown` (or a ChatError, which means the same
    here), and ends by itself within its own time-out: the loop never cancels one.
    """

    async def newest(self, conv: str) -> Head:
        """The newest entry; ``Head()`` if there is none. It may lag."""

    async def decide(self, conv: str, head: Head, entries: Sequence[NewEntry]) -> Decisions:
        """What becomes of each, by a state that holds every change up to ``head`` (or later ones, too)."""

    async def insert(self, conv: str, rows: Sequence[Row]) -> None:
        """One ordered command, stopping at the first error, acknowledged by a majority with its journal;
        never retried by the driver. Returns only if all of it was clean."""

    async def find(self, conv: str, keys: Sequence[Key], as_of: object) -> list[Found]:
        """Those of these that are committed.

        ``as_of``, if not None, is that of decisions. A primary that has not seen as much (it was
        deposed and has not noticed) must not say "not found": the operation raises Unknown.
        """


@dataclass(frozen=True, slots=True)
class AppendLimits:
    """Bounds of the loop. The first two are those of one command (FerretDB takes 100 documents)."""

    batch_entries: int = 100
    batch_bytes: int = 1024 * 1024
    #: What may wait in one conversation, and in all: some seconds of what a store takes.
    queue_entries: int = 1_000
    total_entries: int = 20_000
    #: An entry that waits longer is answered `unavailable`, with all behind it, whatever is under way: an insert
    #: and the look at what became of it may each take as long as an operation may.
    max_wait_s: float = 5.0
    #: Conversations whose head is remembered between sends: some 200 B each.
    heads: int = 10_000
    #: Entries that are looked for after `unavailable`; above, only the rotation finds them.
    late_entries: int = 10_000


class _Item:
    """An entry on its way. ``waiters``: the futures to answer, and the digest that each came with.

    ``new`` is as it was submitted, and each decision starts from it; ``entry`` is as the last one completed it.
    """

    __slots__ = ("entry", "key", "new", "since", "size", "tried", "waiters")

    def __init__(self, new: NewEntry, since: float) -> None:
        self.new = self.entry = new
        self.key: Key = (new.sender, new.cid)
        self.size = len(new.fields) + ENTRY_OVERHEAD_BYTES
        self.since = since
        self.tried = 0  # the highest seq that a command carried it to
        self.waiters: list[tuple[asyncio.Future[Appended], bytes]] = []

    def committed(self, seq: int, ts: int, digest: bytes, dup: bool) -> None:
        """It is in the log, with this digest: `ok` to the waiters that meant that, a conflict to the others."""
        for i, (waiter, meant) in enumerate(self.waiters):
            if meant == digest:
                _resolve(waiter, Appended(seq, ts, dup or i > 0))  # one of them appended it
            else:
                _resolve(waiter, Conflict(f"cid {self.new.cid} was used for something else"))

    def denied(self, decision: Appended | ChatError) -> None:
        """No entry. The decision is about the content of this item: a waiter that meant something else asks again."""
        for waiter, meant in self.waiters:
            same = meant == self.new.digest
            _resolve(waiter, decision if same else Unavailable("the same cid was under way for something else"))


def _resolve(waiter: asyncio.Future[Appended], outcome: Appended | ChatError) -> None:
    if waiter.done():
        return  # cancelled by its caller
    if isinstance(outcome, ChatError):
        waiter.set_exception(outcome)
        waiter.exception()  # an answer, not a bug: no log line if it is never retrieved
    else:
        waiter.set_result(outcome)


class _Log:
    """One conversation, as this writer knows it."""

    __slots__ = ("commit_s", "conv", "head", "losses", "pause_until", "queue", "task", "yields")

    def __init__(self, conv: str) -> None:
        self.conv = conv
        self.head: Head | None = None
        self.queue: dict[Key, _Item] = {}  # in order
        self.losses = 0
        self.commit_s = 0.0
        self.yields = 0  # requests to yield, less one for each entry that another writer got in
        self.pause_until = 0.0
        self.task: asyncio.Task[None] | None = None


class Appender:
    """The append loops of one worker, one task per conversation while it has work.

    :param on_commit: called with committed entries before their senders are answered; at least once, in any order.
    :param publish_yield: asks the other hosts to let this one append to a conversation (:meth:`on_yield`).
    :param now_ms: Unix time in ms, for ``ts``. Deadlines use the running loop's clock.
    :param random: in [0, 1), for the jitter.
    """

    def __init__(
        self,
        ops: LogOps,
        on_commit: OnCommit,
        publish_yield: Callable[[str], None],
        *,
        now_ms: Callable[[], int],
        random: Callable[[], float],
        limits: AppendLimits | None = None,
    ) -> None:
        self._ops = ops
        self._on_commit = on_commit
        self._publish_yield = publish_yield
        self._now_ms = now_ms
        self._random = random
        self._limits = limits or AppendLimits()
        self._loop = asyncio.get_running_loop()
        self._active: dict[str, _Log] = {}  # with a task
        self._idle: dict[str, _Log] = {}  # with a head worth remembering, least recently used first
        self._waiting = 0
        self._late = Tasks()
        self._late_entries = 0
        self._sweeping: asyncio.TimerHandle | None = None  # while anything waits
        self._closing = False

    # --- the interface -----------------------------------------------------
    def submit(self, new: NewEntry) -> asyncio.Future[Appended]:
        """Append an entry. The future fails with Conflict, with what :meth:`LogOps.decide` said,
        or with Unavailable: then the outcome is unknown, and the same cid finds it out."""
        future: asyncio.Future[Appended] = self._loop.create_future()
        state = self._active.get(new.conv) or self._idle.pop(new.conv, None) or _Log(new.conv)
        item = state.queue.get((new.sender, new.cid))
        if item is None:
            full = len(state.queue) >= self._limits.queue_entries or self._waiting >= self._limits.total_entries
            if full or self._closing:
                _resolve(future, Unavailable("too much is waiting" if full else "the server is stopping"))
                self._keep_head(state)
                return future
            item = _Item(new, self._loop.time())
            state.queue[item.key] = item
            self._waiting += 1
        item.waiters.append((future, new.digest))
        if state.task is None:
            self._active[new.conv] = state
            if self._sweeping is None:
                self._sweeping = self._loop.call_later(SWEEP_S, self._sweep)
            state.task = self._loop.create_task(self._run(state), name=f"append-{new.conv}")
        return future

    def on_yield(self, conv: str) -> None:
        """Another host's batches keep losing in a conversation: pause, unless this one's lose, too."""
        state = self._active.get(conv) or self._idle.get(conv)
        if state is not None and not state.losses:
            pause = YIELD_COMMITS * state.commit_s * 2**state.yields
            if pause < YIELD_MAX_S:
                state.yields += 1
            state.pause_until = self._loop.time() + min(YIELD_MAX_S, pause)

    def heard(self, conv: str, seq: int) -> None:
        """The bus brought an entry of another writer. A lower head would lose: it is read anew instead.
        (It is not moved: the bus proves nothing.)"""
        state = self._active.get(conv) or self._idle.get(conv)
        if state is not None and state.head is not None and state.head.seq < seq:
            state.head = None
            state.yields = max(0, state.yields - 1)

    async def close(self, deadline_s: float) -> None:
        """Accept no more, finish what is queued, answer the rest `unavailable` at the deadline."""
        self._closing = True
        self._late.cancel()
        tasks = [state.task for state in self._active.values() if state.task is not None]
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=deadline_s)
            for task in pending:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._late.close()
        if self._sweeping is not None:
            self._sweeping.cancel()

    # --- the loop ----------------------------------------------------------
    async def _run(self, state: _Log) -> None:
        try:
            while state.queue:
                try:
                    await self._round(state)
                except Exception as exc:
                    if not isinstance(exc, Unknown | ChatError):
                        log.exception("append to %s", state.conv)
                    self._fail(state, f"the store does not answer: {exc}")
        finally:
            # Cancelled by `close`, or nothing to do.
            self._fail(state, "the server is stopping")
            state.task = None
            self._active.pop(state.conv, None)
            self._keep_head(state)

    async def _round(self, state: _Log) -> None:
        """Try one batch. Raises what a failed read raises; a failed insert ends in a read."""
        if state.head is None:
            state.head = await self._ops.newest(state.conv)
        head = state.head
        batch = await self._admit(state, head, self._peek(state))
        if not batch:
            return
        pause = state.pause_until - self._loop.time()
        if pause > 0:
            await asyncio.sleep(pause)
            if state.head is not head:
                return  # another writer got in, as was meant
        # Entries that were answered meanwhile are looked for no longer, so they must not land any more.
        batch = [item for item in batch if state.queue.get(item.key) is item]
        if not batch:
            return
        rows = self._rows(batch, head)
        began = self._loop.time()
        for item, row in zip(batch, rows, strict=True):
            item.tried = max(item.tried, row.seq)
        try:
            await self._ops.insert(state.conv, rows)
        except Exception as exc:  # (3)
            state.head = None
            if not isinstance(exc, Unknown | ChatError):
                log.exception("insert into %s", state.conv)
        else:
            last = rows[-1]
            state.head = Head(last.seq, last.msgs, last.last_msg, last.last_change)
            state.commit_s = self._loop.time() - began
            state.losses = 0
            new = [Found(row.new.cid, row.new.digest, row.ts, row.entry()) for row in rows]
            self._answer(state, new, dup=False)
            return
        found = await self._ops.find(state.conv, [item.key for item in batch], None)
        self._answer(state, found, dup=True)
        if not state.queue:
            return
        if found:
            state.losses = 0  # some of it is in: this writer does not starve
            return
        state.losses += 1
        await asyncio.sleep(self._random() * min(LOSS_MAX_S, LOSS_FIRST_S * 2**state.losses))
        if state.losses >= LOSSES_TO_YIELD:
            # Only now: they pause for a few commits, which the next try is to fall into.
            self._publish_yield(state.conv)

    def _sweep(self) -> None:
        """Answer queues that have waited too long, even while an operation is under way: what was
        submitted goes on, and is found and announced later."""
        self._sweeping = self._loop.call_later(SWEEP_S, self._sweep) if self._active else None
        late = self._loop.time() - self._limits.max_wait_s + SWEEP_S
        for state in list(self._active.values()):
            if state.queue and next(iter(state.queue.values())).since < late:
                self._fail(state, "the store takes too long")

    def _peek(self, state: _Log) -> list[_Item]:
        """The entries that may go into one command, in order.

        All of a batch are decided as of one head, so nothing is in it that an entry
        before it could forbid, allow or complete: the entries of a user whose role changes
        in this batch, and further changes of roles, wait for the next one (6).
        """
        batch: list[_Item] = []
        size = 0
        changed: set[str] = set()  # users
        for item in itertools.islice(state.queue.values(), self._limits.batch_entries):
            size += item.size
            change = item.new.change
            user = change.user if isinstance(change, RoleChange) else None
            if batch and (size > self._limits.batch_bytes or item.new.sender in changed or (user and changed)):
                break
            if user:
                changed.add(user)
            batch.append(item)
        return batch

    async def _admit(self, state: _Log, head: Head, batch: list[_Item]) -> list[_Item]:
        """Answer the entries that are not to be appended as of this head; complete and return the others.

        An earlier try may have appended one of them while it was allowed, and may do so
        yet, if the seq that it was to have is still free: then nothing is known.
        """
        decisions = await self._ops.decide(state.conv, head, [item.new for item in batch])
        denied: dict[Key, Appended | ChatError] = {}
        for item, decision in zip(batch, decisions.each, strict=True):
            if isinstance(decision, NewEntry):
                item.entry = decision
            else:
                denied[item.key] = decision
        if denied:
            self._answer(state, await self._ops.find(state.conv, list(denied), decisions.as_of), dup=True)
            for key, outcome in denied.items():
                denied_item = state.queue.get(key)
                if denied_item is None:
                    continue  # found
                if denied_item.tried > head.seq:
                    raise Unknown("refused now, but tried before")
                self._remove(state, key)
                denied_item.denied(outcome)
        return [item for item in batch if item.key not in denied]

    def _rows(self, batch: Iterable[_Item], head: Head) -> list[Row]:
        seq, msgs, last_msg, last_change = head.seq, head.msgs, head.last_msg, head.last_change
        ts = self._now_ms()
        rows: list[Row] = []
        for item in batch:
            seq += 1
            entry = item.entry
            if entry.t in MESSAGES:
                msgs += 1
                last_msg = seq
            elif entry.change is not None:
                last_change = seq
            rows.append(Row(entry, seq, ts, msgs, last_msg, last_change))
        return rows

    # --- answers -----------------------------------------------------------
    def _answer(self, state: _Log, committed: list[Found], dup: bool) -> None:
        """Committed entries: take them out of the queue, announce, answer, in this order. Those that were read
        back are announced, too: their writer may have died before it did."""
        entries = sorted(committed, key=lambda f: f.entry.seq)
        items = [self._remove(state, (f.entry.sender, f.cid)) for f in entries]
        if entries:
            self._announce([f.entry for f in entries])
        for f, item in zip(entries, items, strict=True):
            if item is not None:
                item.committed(f.entry.seq, f.ts, f.digest, dup)

    def _announce(self, entries: list[Entry]) -> None:
        try:
            self._on_commit(entries)
        except Exception:
            log.exception("on_commit failed")  # the entries are durable whatever happens there

    def _remove(self, state: _Log, key: Key) -> _Item | None:
        item = state.queue.pop(key, None)
        if item is not None:
            self._waiting -= 1
        return item

    def _fail(self, state: _Log, why: str) -> None:
        """The whole queue is `unavailable`: no entry overtakes one that failed. Submitted ones are looked for later."""
        items = list(state.queue.values())
        for item in items:
            self._remove(state, item.key)
            for waiter, _ in item.waiters:
                _resolve(waiter, Unavailable(why))
        state.losses = 0
        late = [item.key for item in items if item.tried]
        if late and not self._closing and self._late_entries + len(late) <= self._limits.late_entries:
            self._late_entries += len(late)
            self._late.spawn(self._look_late(state.conv, late), f"append-late-{state.conv}")

    async def _look_late(self, conv: str, keys: list[Key]) -> None:
        """Find entries that landed after they were answered `unavailable`, and announce them."""
        began = self._loop.time()
        left = set(keys)
        try:
            for at in LATE_LOOKS_S:
                await asyncio.sleep(began + at - self._loop.time())
                try:
                    found = await self._ops.find(conv, sorted(left), None)
                except Exception as exc:
                    log.info("looking for late entries of %s: %s", conv, exc)
                    continue
                if found:
                    self._announce([f.entry for f in sorted(found, key=lambda f: f.entry.seq)])
                    left.difference_update((f.entry.sender, f.cid) for f in found)
                if not left:
                    return
        finally:
            self._late_entries -= len(keys)

    # --- small things ------------------------------------------------------
    def _keep_head(self, state: _Log) -> None:
        """Remember a log without a task if its head is known."""
        if state.task is None and state.head is not None:
            self._idle[state.conv] = state
            if len(self._idle) > self._limits.heads:
                del self._idle[next(iter(self._idle))]
