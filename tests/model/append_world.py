"""Writers, clients and a script: one run of the append loop on the model, and what must hold of it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from chatcore.entries import MemberFields, NewEntry, RoleChange, new_entry
from chatcore.errors import ChatError, Conflict, Forbidden, NotFound, Unavailable
from chatcore.protocol import MEMBER_ROLES
from chatcore.store.append import Appender, AppendLimits, LogOps, Row
from chatcore.store.base import Appended, Entry

from . import loop as virtual
from .replica import Client, ReplicaSet
from .weather import Climate, Weather

ADMIN = "alice"
USERS = (ADMIN, "bob", "carol")
CONVS = ("c1", "c2")
LIMITS = AppendLimits(batch_entries=5, max_wait_s=3.0)
#: Until nothing happens any more: the last late look is 60 s after a failure, and the model delays up to 30 s.
QUIET_S = 130.0

MakeAppender = Callable[..., Appender]
MakeClient = Callable[[ReplicaSet], LogOps]


@dataclass(frozen=True)
class Send:
    """A message; ``again``: the cid of the n-th last send of this sender, with or without the same content."""

    writer: int
    conv: int
    sender: int
    again: int = 0
    same: bool = True
    n: int = 1


@dataclass(frozen=True)
class Member:
    """The admin gives a user a role."""

    writer: int
    conv: int
    user: int
    role: str


@dataclass(frozen=True)
class SameMember:
    """The admin gives one user several roles at once, each through another worker."""

    conv: int
    user: int
    roles: tuple[str, ...]


@dataclass(frozen=True)
class ByRow:
    """A user leaves a channel by oneself, or comes back: without an entry."""

    conv: int
    user: int
    out: bool


@dataclass(frozen=True)
class Failover:
    keep: float
    unnoticed_s: float
    election_s: float


@dataclass(frozen=True)
class Crash:
    """A worker dies; another one replaces it."""

    writer: int


@dataclass(frozen=True)
class Wait:
    seconds: float


Action = Send | Member | SameMember | ByRow | Failover | Crash | Wait


@dataclass
class Sent:
    """One submit, and its answer."""

    number: int
    writer: int
    new: NewEntry
    at: float
    outcome: Appended | ChatError | None = None
    answered_at: float = -1.0
    answered_number: int = -1  # among all answers and submits, in order
    out_by_row: bool = False  # the sender was out, by row, at some time while it was under way

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.new.conv, self.new.sender, self.new.cid)


@dataclass
class World:
    """All of one run. :meth:`play` a script, then :meth:`check`."""

    seed: int
    climate: Climate
    writers: int
    make_appender: MakeAppender = Appender
    make_client: MakeClient = Client
    sent: list[Sent] = field(default_factory=list)
    announced: list[tuple[int, Entry]] = field(default_factory=list)
    crashed: bool = False
    broken: list[str] = field(default_factory=list)

    def play(self, script: Sequence[Action]) -> None:
        """:raises AssertionError: a promise is broken."""
        virtual.run(self._play(script))
        assert not self.broken, self.broken[0]

    def _promise(self, holds: object, broken: str) -> None:
        """To be kept at every moment: a promise broken inside a callback is reported at the end."""
        if not holds:
            self.broken.append(f"at {self.loop.time():.4f}: {broken}")

    async def _play(self, script: Sequence[Action]) -> None:
        self.loop = asyncio.get_running_loop()
        self.weather = Weather(self.seed, self.climate)
        self.cluster = ReplicaSet(self.weather)
        self._order = 0
        self._cids: dict[str, list[NewEntry]] = {}
        for conv in CONVS:
            first = [
                Row(new_role(conv, f"m{i}", user, role).completed(MemberFields(user, role, "none")), i + 1, 0, 0, 0)
                for i, (user, role) in enumerate(zip(USERS, ("admin", "member", "member"), strict=True))
            ]
            self.cluster.preset(first)
        self.workers = [self._worker(i) for i in range(self.writers)]
        for action in script:
            await self._act(action)
        self.weather.calm()
        await asyncio.sleep(5.0)
        self.cluster.left_by_row.clear()
        await self._all_is_well_again()
        await asyncio.sleep(QUIET_S)
        for appender in self.workers:
            await appender.close(1.0)
        for task in list(self.cluster.tasks):
            await asyncio.wait([task])
        self.check()

    def _worker(self, i: int) -> Appender:
        def on_commit(entries: list[Entry]) -> None:
            for e in entries:
                self._must_be_durable(e)
                self.announced.append((i, e))
                for j, other in enumerate(self.workers):
                    if j != i and not self.weather.happens(self.climate.bus_lost):
                        self.loop.call_later(self.weather.latency(), other.heard, e.conv, e.seq)

        def publish_yield(conv: str) -> None:
            for j, other in enumerate(self.workers):
                if j != i and not self.weather.happens(self.climate.bus_lost):
                    self.loop.call_later(self.weather.latency(), other.on_yield, conv)

        return self.make_appender(
            self.make_client(self.cluster), on_commit, publish_yield,
            now_ms=lambda: round(self.loop.time() * 1000), random=self.weather.random.random, limits=LIMITS,
        )  # fmt: skip

    # --- the script --------------------------------------------------------
    async def _act(self, action: Action) -> None:
        match action:
            case Wait(seconds):
                await asyncio.sleep(seconds)
            case Send():
                for _ in range(action.n):
                    self.submit(action.writer % self.writers, self._message(action))
            case Member():
                user = USERS[action.user]
                new = new_role(CONVS[action.conv], f"r{len(self.sent)}", user, action.role)
                self.submit(action.writer % self.writers, new)
            case SameMember():
                # Each of the workers changes the role of one user, at the same time.
                for writer, role in enumerate(action.roles):
                    new = new_role(CONVS[action.conv], f"r{len(self.sent)}", USERS[action.user], role)
                    self.submit(writer % self.writers, new)
            case ByRow():
                place = (CONVS[action.conv], USERS[action.user])
                if action.out:
                    self.cluster.left_by_row.add(place)
                    for s in self.sent:
                        if s.outcome is None and (s.new.conv, s.new.sender) == place:
                            s.out_by_row = True
                else:
                    self.cluster.left_by_row.discard(place)
            case Failover():
                self.cluster.failover(action.keep, action.unnoticed_s, action.election_s)
            case Crash(writer):
                self.crashed = True
                i = writer % self.writers
                await self.workers[i].close(0.0)
                self.workers[i] = self._worker(i)

    def _message(self, a: Send) -> NewEntry:
        conv, sender = CONVS[a.conv], USERS[a.sender]
        cids = self._cids.setdefault(conv + sender, [])
        if a.again and cids:
            old = cids[-min(a.again, len(cids))]
            return old if a.same else entry(conv, sender, old.cid, "msg", b'{"body":"another"}')
        new = entry(conv, sender, f"s{len(self.sent)}", "msg", b'{"body":"%d"}' % len(self.sent))
        cids.append(new)
        return new

    def submit(self, writer: int, new: NewEntry) -> Sent:
        """As a session does; the answer is recorded, and checked at once."""
        self._order += 1
        sent = Sent(self._order, writer, new, self.loop.time())
        sent.out_by_row = (new.conv, new.sender) in self.cluster.left_by_row
        self.sent.append(sent)
        self.workers[writer].submit(new).add_done_callback(lambda f: self._answered(sent, f))
        return sent

    def _answered(self, sent: Sent, future: asyncio.Future[Appended]) -> None:
        error = future.exception()
        if not isinstance(error, Conflict | NotFound | Forbidden | Unavailable | None):
            self.broken.append(f"{sent.key} was answered {error!r}")
            return
        sent.outcome = error if error is not None else future.result()
        sent.answered_at = self.loop.time()
        self._order += 1
        sent.answered_number = self._order
        durable = self.cluster.durable_keys.get(sent.key)
        same = durable is not None and durable.new.digest == sent.new.digest
        match sent.outcome:
            case Appended(seq=0):
                self._promise(sent.new.t == "member", f"{sent.key}: nothing to do, for a message")
            case Appended(seq=seq, ts=ts):
                self._promise(durable is not None, f"ok for {sent.key}, which no majority has")
                if durable is not None:
                    place = (durable.seq, durable.ts)
                    self._promise(place == (seq, ts), f"ok for {sent.key} says {seq}, the log {durable.seq}")
                    self._promise(same, f"ok for {sent.key}, but the log has something else")
                announced = any(w == sent.writer and (e.conv, e.seq) == (sent.new.conv, seq) for w, e in self.announced)
                self._promise(announced, f"{sent.key} was answered before it was announced")
            case Conflict():
                self._promise(durable is not None, f"conflict for {sent.key}, which is not in the log")
                self._promise(not same, f"conflict for {sent.key}, which is the same")
            case NotFound() | Forbidden():
                self._promise(sent.out_by_row or not same, f"{sent.key} was refused, but is in the log")

    def _must_be_durable(self, e: Entry) -> None:
        row = self.cluster.durable.get(e.conv, {}).get(e.seq)
        self._promise(row is not None, f"announced {e.conv} {e.seq}, which no majority has")
        self._promise(row is None or row.entry() == e, f"announced {e}, but the log has {row}")

    async def _all_is_well_again(self) -> None:
        """Liveness: once the trouble is over, every worker appends at once."""
        for writer in range(self.writers):
            for conv in CONVS:
                for _ in range(3):  # what was lost before may cost a try
                    sent = self.submit(writer, entry(conv, ADMIN, f"well{len(self.sent)}", "msg", b"{}"))
                    for _ in range(200):
                        if sent.outcome is not None:
                            break
                        await asyncio.sleep(0.05)
                    if isinstance(sent.outcome, Appended):
                        break
                assert isinstance(sent.outcome, Appended), (
                    f"the trouble is over, and worker {writer} got {sent.outcome}"
                )

    # --- the promises, at the end ------------------------------------------
    def check(self) -> None:
        assert not self.broken, self.broken[0]
        for sent in self.sent:
            assert sent.outcome is not None, f"{sent.key} was never answered"
        for conv in CONVS:
            self._check_log(conv)
        self._check_refusals()
        self._check_order()
        if not self.crashed:
            announced = {(e.conv, e.seq) for _, e in self.announced}
            for conv, log in self.cluster.durable.items():
                missing = [seq for seq in log if seq > len(USERS) and (conv, seq) not in announced]
                assert not missing, f"{conv} {missing}: in the log, but never announced"

    def _check_log(self, conv: str) -> None:
        log = self.cluster.durable[conv]
        assert sorted(log) == list(range(1, len(log) + 1)), f"{conv}: a hole in {sorted(log)}"
        keys = [(r.new.sender, r.new.cid) for r in log.values()]
        assert len(set(keys)) == len(keys), f"{conv}: something is in the log twice"
        msgs = last = 0
        roles: dict[str, str] = {}
        for seq in range(1, len(log) + 1):
            row = log[seq]
            if row.new.t == "msg":
                msgs, last = msgs + 1, seq
            assert (row.msgs, row.last_msg) == (msgs, last), f"{conv} {seq}: counters {row.msgs}, {row.last_msg}"
            if seq > len(USERS):
                role = roles.get(row.new.sender)
                assert role in MEMBER_ROLES, f"{conv} {seq}: {row.new.sender} wrote as {role}"
            if isinstance(row.new.change, RoleChange):
                change, fields = row.new.change, orjson.loads(row.new.fields)
                before = roles.get(change.user, "none")
                assert fields == {"user": change.user, "role": change.role, "was": before}, (
                    f"{conv} {seq}: {fields}, but {change.user} was {before} before"
                )
                roles[change.user] = change.role

    def _check_refusals(self) -> None:
        """What was refused, every time, is not in the log; and it was refused for a reason."""
        by_key: dict[tuple[str, str, str], list[Sent]] = {}
        for sent in self.sent:
            by_key.setdefault(sent.key, []).append(sent)
        for key, all_sent in by_key.items():
            refused = [s for s in all_sent if isinstance(s.outcome, NotFound | Forbidden)]
            # (What only a row forbids has no place in the order of the log: another worker's try may still land.)
            one_worker = len({s.writer for s in all_sent}) == 1 or not any(s.out_by_row for s in all_sent)
            if len(refused) == len(all_sent) and one_worker:
                assert key not in self.cluster.durable_keys, f"{key} was refused, but is in the log"
            for s in refused:
                ever_out = s.out_by_row or any(
                    isinstance(c := r.new.change, RoleChange) and c.user == s.new.sender and c.role not in MEMBER_ROLES
                    for r in self.cluster.durable[s.new.conv].values()
                )
                assert ever_out, f"{key} was refused, but its sender was always a member"

    def _check_order(self) -> None:
        """Per sender, of messages submitted once: the first submitted is first in the log, or failed first."""
        counts: dict[tuple[str, str, str], int] = {}
        for sent in self.sent:
            counts[sent.key] = counts.get(sent.key, 0) + 1
        single = [s for s in self.sent if counts[s.key] == 1 and s.new.t == "msg"]
        seq_of = {s.number: row.seq for s in single if (row := self.cluster.durable_keys.get(s.key)) is not None}
        for i, a in enumerate(single):
            for b in single[i + 1 :]:
                if (a.new.conv, a.new.sender) != (b.new.conv, b.new.sender):
                    continue
                outstanding = a.answered_number > b.number
                sa, sb = seq_of.get(a.number), seq_of.get(b.number)
                if isinstance(a.outcome, Appended) and not outstanding and sb is not None:
                    assert sa is not None, f"ok for {a.key}, but it is not in the log"
                    assert sa < sb, f"{b.key} was sent after the ok of {a.key}, but comes before it"
                if a.writer != b.writer or not outstanding or self.crashed:
                    continue
                if sa is not None and sb is not None:
                    assert sa < sb, f"{b.key} overtook {a.key}"
                if isinstance(a.outcome, Unavailable):
                    assert isinstance(b.outcome, Unavailable | NotFound | Forbidden), (
                        f"{b.key} overtook {a.key}, which failed"
                    )
                    assert sa is not None or sb is None, f"{b.key} is in the log, {a.key} before it is not"


def entry(conv: str, sender: str, cid: str, t: str, fields: bytes) -> NewEntry:
    return NewEntry(conv, sender, cid, t, fields, hashlib.blake2b(fields, digest_size=8).digest())


def new_role(conv: str, cid: str, user: str, role: str) -> NewEntry:
    """The admin gives a user a role."""
    return new_entry(conv, ADMIN, cid, MemberFields(user, role))


def play(script: Sequence[Action], seed: int, climate: Climate, writers: int, **parts: Any) -> World:
    """One run, checked."""
    world = World(seed, climate, writers, **parts)
    world.play(script)
    return world
