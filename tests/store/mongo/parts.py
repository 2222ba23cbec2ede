"""Several stores on one database, what they send, and a server that may go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import orjson
import uvloop
from pymongo import monitoring

from chatcore.entries import NewEntry
from chatcore.errors import Unavailable
from chatcore.store.append import Head, Row
from chatcore.store.base import Appended, Entry, User
from chatcore.store.mongo.ops import to_document
from chatcore.store.mongo.store import MongoStore

from ..harness import Database, Opened

T = TypeVar("T")

#: For tests in which the server goes away: operations give up soon.
QUICK: dict[str, Any] = {"timeout_ms": 1500, "server_selection_ms": 1500}


class Recorder(monitoring.CommandListener):
    """Every command that a store sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        self.sent.append((event.command_name, dict(event.command)))

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        pass

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        pass

    def of(self, *names: str) -> list[dict[str, Any]]:
        """The commands of these names."""
        return [command for name, command in self.sent if name in names]


class Worker(Opened):
    """One store of several, as a worker has it; ``yields``: the conversations of which it asked for."""

    store: MongoStore

    def __init__(self, database: Database, settings: dict[str, Any], options: dict[str, Any]) -> None:
        self.yields: list[str] = []
        self.sent = Recorder()
        announced: list[Entry] = []
        store = MongoStore(
            database.settings(**settings), announced.extend, self.yields.append, listeners=[self.sent], **options
        )
        super().__init__(store, announced)

    async def row(self, conv: str, user: User) -> dict[str, Any] | None:
        """A member's row, as it is in the database."""
        return await self.store.mongo["members"].find_one({"_id": f"{conv}:{user.id}"})

    async def until(self, what: Callable[[], Awaitable[bool]], limit_s: float = 10.0) -> float:
        """Wait until something is so; how long that took."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not await what():
            assert loop.time() - began < limit_s, "it never came to be so"
            await asyncio.sleep(0.05)
        return loop.time() - began

    async def write_entry_alone(self, entry: NewEntry) -> Entry:
        """What is left of a change when its writer dies before it has written the rows."""
        doc = await self.store.mongo["entries"].find_one({"c": entry.conv}, sort=[("s", -1)])
        head = Head() if doc is None else Head(doc["s"], doc["n"], doc["l"], doc["k"])
        row = Row(entry, head.seq + 1, 0, head.msgs, head.last_msg, head.seq + 1)
        await self.store.mongo["entries"].insert_one(to_document(row))
        return row.entry()


@asynccontextmanager
async def workers(
    database: Database, count: int, settings: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[list[Worker]]:
    """Stores of several workers, which get nothing from each other unless a test passes it on."""
    found = [Worker(database, settings or {}, options) for _ in range(count)]
    started: list[Worker] = []
    try:
        for worker in found:
            await worker.store.start()
            started.append(worker)
        yield found
    finally:
        for worker in started:
            await worker.store.close()


def run(work: Awaitable[Any]) -> Any:
    """On the loop that workers use."""

    async def main() -> Any:
        return await work

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


async def until_answered(ask: Callable[[], Awaitable[T]]) -> T:
    """Ask again until the store is there."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await ask()
            except Unavailable:
                await asyncio.sleep(0.05)


async def insist(worker: Worker, entry: NewEntry) -> Appended:
    """As a client does: again with the same cid until it is answered."""
    return await until_answered(lambda: worker.store.append(entry))


def assert_dense_and_once(log: Sequence[Entry], answers: dict[str, Appended]) -> None:
    """Seqs without a hole, each cid once, and each entry at the seq that its sender got."""
    assert [e.seq for e in log] == list(range(1, len(log) + 1))
    cids = [orjson.loads(e.wire)["cid"] for e in log]
    assert len(set(cids)) == len(cids)
    where = {cid: e.seq for cid, e in zip(cids, log, strict=True)}
    assert {cid: answer.seq for cid, answer in answers.items()} == {cid: where.get(cid) for cid in answers}
