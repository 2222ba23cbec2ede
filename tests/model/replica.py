"""A model of a MongoDB replica set, as far as an append can see it.

One oplog, of which a majority has a prefix. Unique indexes on (conv, seq) and on
(conv, sender, cid) are checked against everything that the primary has, reads see
the majority's part. A failover keeps any part of what no majority had; the old
primary may not notice, serve old reads and take writes that are lost later.

What a majority once had is kept apart in :attr:`ReplicaSet.durable`: the truth
that the promises are about.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from chatcore.entries import MemberFields, NewEntry, RoleChange
from chatcore.errors import Forbidden, NotFound
from chatcore.protocol import MEMBER_ROLES
from chatcore.store.append import Decision, Decisions, Found, Head, Key, Row, Unknown
from chatcore.store.base import Appended

from .weather import Weather

#: A client gives up on an operation after this.
TIMEOUT_S = 1.0


class Gone(Exception):
    """The node is no longer there."""


class Node:
    """A primary, present or former."""

    def __init__(self, cluster: ReplicaSet, oplog: list[Row], committed: int) -> None:
        self.cluster = cluster
        self.oplog = oplog
        self.committed = committed  # length of what a majority has, as far as this node knows
        self.alive = True
        self.by_seq = {(r.new.conv, r.seq) for r in oplog}
        self.by_key = {(r.new.conv, r.new.sender, r.new.cid) for r in oplog}
        self.waiters: list[tuple[int, asyncio.Future[None]]] = []

    def write(self, row: Row) -> int | None:
        """Returns the length of the oplog that contains it; None: a duplicate."""
        if not self.alive:
            raise Gone
        place, key = (row.new.conv, row.seq), (row.new.conv, row.new.sender, row.new.cid)
        if place in self.by_seq or key in self.by_key:
            return None
        self.oplog.append(row)
        self.by_seq.add(place)
        self.by_key.add(key)
        self.replicate(len(self.oplog))
        return len(self.oplog)

    def replicate(self, upto: int) -> None:
        asyncio.get_running_loop().call_later(self.cluster.weather.lag(), self._majority_has, upto)

    def _majority_has(self, upto: int) -> None:
        # Only the present primary can get anything to a majority.
        if not self.alive or self is not self.cluster.primary or upto <= self.committed:
            return
        for row in self.oplog[self.committed : upto]:
            self.cluster.now_durable(row)
        self.committed = upto
        for place, waiter in self.waiters:
            if place <= upto and not waiter.done():
                waiter.set_result(None)

    async def majority(self, place: int) -> None:
        if place > self.committed:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.waiters.append((place, waiter))
            await waiter

    def die(self) -> None:
        self.alive = False
        for _, waiter in self.waiters:
            if not waiter.done():
                waiter.set_exception(Gone())
                waiter.exception()

    def log(self, conv: str) -> dict[int, Row]:
        """What a majority has of a conversation, as far as this node knows."""
        return {r.seq: r for r in self.oplog[: self.committed] if r.new.conv == conv}


class ReplicaSet:
    """The servers. ``durable``: by conversation and seq, what a majority has had."""

    def __init__(self, weather: Weather) -> None:
        self.weather = weather
        self.durable: dict[str, dict[int, Row]] = {}
        self.durable_keys: dict[tuple[str, str, str], Row] = {}
        self.left_by_row: set[tuple[str, str]] = set()  # users who left a channel by themselves: no entry
        self.primary: Node | None = Node(self, [], 0)
        self.former: Node | None = None  # has not noticed that it is not the primary any more
        self.tasks: set[asyncio.Task[None]] = set()

    def now_durable(self, row: Row) -> None:
        log = self.durable.setdefault(row.new.conv, {})
        assert row.seq not in log, "the model let a seq in twice"
        log[row.seq] = row
        self.durable_keys[row.new.conv, row.new.sender, row.new.cid] = row

    def preset(self, rows: Sequence[Row]) -> None:
        """Entries from before the run."""
        assert self.primary is not None
        for row in rows:
            self.primary.oplog.append(row)
            self.primary.by_seq.add((row.new.conv, row.seq))
            self.primary.by_key.add((row.new.conv, row.new.sender, row.new.cid))
            self.now_durable(row)
        self.primary.committed = len(self.primary.oplog)

    def failover(self, keep: float, unnoticed_s: float, election_s: float) -> None:
        """The primary is lost; ``keep``: which part of what no majority had survives."""
        old = self.primary
        if old is None:
            return
        if self.former is not None:
            self.former.die()
            self.former = None
        self.primary = None
        loop = asyncio.get_running_loop()
        cut = old.committed + round(keep * (len(old.oplog) - old.committed))
        elected = Node(self, old.oplog[:cut], old.committed)
        if unnoticed_s:
            self.former = old
            loop.call_later(unnoticed_s, self._noticed, old)
        else:
            old.die()
        loop.call_later(election_s, self._elect, elected)

    def _noticed(self, old: Node) -> None:
        old.die()
        if self.former is old:
            self.former = None

    def _elect(self, node: Node) -> None:
        self.primary = node
        node.replicate(len(node.oplog))

    def node(self) -> Node:
        """Where an operation goes. :raises Unknown: there is no primary."""
        if self.former is not None and self.weather.reads_stale():
            return self.former
        if self.primary is None:
            raise Unknown("no primary")
        return self.primary

    def roles(self, log: dict[int, Row], upto: int | None = None) -> dict[str, str]:
        """The roles that the entries give, in order."""
        roles: dict[str, str] = {}
        for seq in sorted(log):
            change = log[seq].new.change
            if (upto is None or seq <= upto) and isinstance(change, RoleChange):
                roles[change.user] = change.role
        return roles


class Client:
    """One worker's way to the servers: :class:`~chatcore.store.append.LogOps` with all that may go wrong."""

    def __init__(self, cluster: ReplicaSet) -> None:
        self.cluster = cluster
        self.weather = cluster.weather
        self.inserts = 0
        self.reads = 0

    # --- writes ------------------------------------------------------------
    async def insert(self, conv: str, rows: Sequence[Row]) -> None:
        self.inserts += 1
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        # The server goes on whatever becomes of the client.
        task = loop.create_task(self._serve(list(rows), done))
        self.cluster.tasks.add(task)
        task.add_done_callback(self.cluster.tasks.discard)
        await asyncio.wait([done], timeout=TIMEOUT_S)
        if not done.done():
            raise Unknown("timed out")
        done.result()

    async def _serve(self, rows: list[Row], done: asyncio.Future[None]) -> None:
        plan = self.weather.command(len(rows))
        try:
            node = self.cluster.node()
            await asyncio.sleep(plan.delay)
            if not plan.arrives:
                return
            place = 0
            for i, row in enumerate(rows):
                if i == plan.cut_after:
                    raise Unknown("the connection was lost")
                if i and plan.document_delay:
                    await asyncio.sleep(plan.document_delay)
                written = self.write(node, row)
                if written is None:
                    raise Unknown("duplicate key")
                place = written
            await self.wait_for_majority(node, place)
            await asyncio.sleep(self.weather.latency())
            self._reply(plan.reply, done, None)
        except (Unknown, Gone) as exc:
            self._reply(plan.reply, done, Unknown(str(exc)))

    def write(self, node: Node, row: Row) -> int | None:
        return node.write(row)

    async def wait_for_majority(self, node: Node, place: int) -> None:
        await node.majority(place)

    def _reply(self, arrives: bool, done: asyncio.Future[None], error: Unknown | None) -> None:
        if arrives and not done.done():
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)
                done.exception()

    # --- reads -------------------------------------------------------------
    async def _read_at(self, holds: Callable[[Node], bool] = lambda node: True) -> Node:
        """One way to a node; the way back comes with what was read."""
        self.reads += 1
        await asyncio.sleep(self.weather.latency())
        if self.weather.read_fails():
            await asyncio.sleep(self.weather.random.choice((0.0, TIMEOUT_S)))
            raise Unknown("a read failed")
        node = self.cluster.node()
        if not holds(node):
            raise Unknown("a primary that has not seen what is known to be committed")
        return node

    async def newest(self, conv: str) -> Head:
        log = self.visible(await self._read_at(), conv)
        row = log[max(log)] if log else None
        await asyncio.sleep(self.weather.latency())
        return Head() if row is None else Head(row.seq, row.msgs, row.last_msg)

    def visible(self, node: Node, conv: str) -> dict[int, Row]:
        return node.log(conv)

    async def decide(self, conv: str, head: Head, entries: Sequence[NewEntry]) -> Decisions:
        node = await self._read_at(lambda node: not head.seq or head.seq in node.log(conv))
        roles = self.cluster.roles(node.log(conv))
        # The length of what a majority has only grows: it is this model's time of an operation.
        decisions = Decisions([self._decide(roles, e) for e in entries], node.committed)
        await asyncio.sleep(self.weather.latency())
        return decisions

    def _decide(self, roles: dict[str, str], e: NewEntry) -> Decision:
        if roles.get(e.sender) not in MEMBER_ROLES or (e.conv, e.sender) in self.cluster.left_by_row:
            return NotFound("no such conversation")
        if not isinstance(e.change, RoleChange):
            return e
        if roles[e.sender] != "admin":
            return Forbidden("only admins")
        was = roles.get(e.change.user, "none")
        if was == e.change.role:
            return Appended(0, 0)
        return e.completed(MemberFields(e.change.user, e.change.role, was))

    async def find(self, conv: str, keys: Sequence[Key], as_of: object) -> list[Found]:
        node = await self._read_at(lambda node: not isinstance(as_of, int) or node.committed >= as_of)
        found: list[Found] = []
        for sender, cid in keys:
            # A query with many branches yields between them: what lands meanwhile may or may not be seen.
            if self.weather.happens(self.weather.climate.slow_documents):
                await asyncio.sleep(0.001)
            found += [
                Found(cid, row.new.digest, row.ts, row.entry())
                for row in node.log(conv).values()
                if (row.new.sender, row.new.cid) == (sender, cid)
            ]
        await asyncio.sleep(self.weather.latency())
        return found
