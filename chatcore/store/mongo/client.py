"""The connection to MongoDB: one client for each worker, made in its loop, after the fork.

The driver's defaults are not for a server that must answer in milliseconds (a wait
for a server of 30 s, retries that docs/log.md, rule 3 does better): every one that
matters is set here, from the settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import pymongo
from bson.codec_options import CodecOptions
from bson.timestamp import Timestamp
from pymongo import AsyncMongoClient, ReadPreference, WriteConcern, monitoring
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import BulkWriteError, ConfigurationError, DuplicateKeyError, OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import SecondaryPreferred

from ...errors import Unavailable
from .outage import Outage

log = logging.getLogger("chatcore.store")

T = TypeVar("T")
Document = dict[str, Any]
Collection = AsyncCollection[Document]

# Promise 1: acknowledged by a majority, each with its journal.
DURABLE: Final = WriteConcern(w="majority", j=True)
MAJORITY: Final = ReadConcern("majority")
# A secondary that is further behind is not asked for history; the least that the driver takes.
MAX_STALENESS_S: Final = 90
DUPLICATE: Final = 11000
# Operations under way may take so long at the end, and ending the sessions after them.
CLOSE_S: Final = 5.0
GOODBYE_S: Final = 0.5
# Pairs of one `$or`. A server without $lookup is no MongoDB, and looks at every document for each pair.
OR_PAIRS: Final = 500
OR_PAIRS_ELSEWHERE: Final = 20


@dataclass(frozen=True, slots=True)
class MongoSettings:
    """How to connect. Times in ms."""

    url: str
    database: str = "chatcore"
    pool_max: int = 25
    pool_min: int = 4
    wait_queue_ms: int = 500
    server_selection_ms: int = 3000
    timeout_ms: int = 4000
    history_from_secondaries: bool = False
    #: From a send to its answer, however many operations that takes.
    append_ms: int = 5000


class Listener(monitoring.CommandListener, monitoring.ConnectionPoolListener):
    """Counts what the driver does. Called synchronously by the driver: counters only.

    ``operation_time`` is the newest moment that any answer was as of (None: a single server,
    which has no older state to read).
    """

    def __init__(self) -> None:
        self.operation_time: Timestamp | None = None
        self.counts: dict[str, int] = {}
        self.commands: dict[str, int] = {}
        self.micros = 0
        self.connections = 0
        self.checked_out = 0
        #: Time that checking out connections took, since the start.
        self.checkout_s = 0.0

    def count(self, what: str) -> None:
        """One more of these."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        self.commands[event.command_name] = self.commands.get(event.command_name, 0) + 1

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        self.micros += event.duration_micros
        moment = event.reply.get("operationTime")
        if moment is not None and (self.operation_time is None or moment > self.operation_time):
            self.operation_time = moment

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        self.micros += event.duration_micros
        self.count("commands_failed")

    def pool_created(self, event: monitoring.PoolCreatedEvent) -> None:
        self.count("pools_created")

    def pool_ready(self, event: monitoring.PoolReadyEvent) -> None:
        self.count("pools_ready")

    def pool_cleared(self, event: monitoring.PoolClearedEvent) -> None:
        self.count("pools_cleared")

    def pool_closed(self, event: monitoring.PoolClosedEvent) -> None:
        self.count("pools_closed")

    def connection_created(self, event: monitoring.ConnectionCreatedEvent) -> None:
        self.connections += 1

    def connection_ready(self, event: monitoring.ConnectionReadyEvent) -> None:
        self.count("connections_ready")

    def connection_closed(self, event: monitoring.ConnectionClosedEvent) -> None:
        self.connections -= 1

    def connection_check_out_started(self, event: monitoring.ConnectionCheckOutStartedEvent) -> None:
        self.count("checkouts")

    def connection_check_out_failed(self, event: monitoring.ConnectionCheckOutFailedEvent) -> None:
        self.count("checkouts_failed")
        self.checkout_s += event.duration or 0.0

    def connection_checked_out(self, event: monitoring.ConnectionCheckedOutEvent) -> None:
        self.checked_out += 1
        self.checkout_s += event.duration or 0.0

    def connection_checked_in(self, event: monitoring.ConnectionCheckedInEvent) -> None:
        self.checked_out -= 1


class Mongo:
    """The collections, and whether the server answers.

    :raises ValueError: the URL is not one that can be.
    """

    def __init__(self, settings: MongoSettings, listeners: Sequence[monitoring.CommandListener] = ()) -> None:
        self.settings = settings
        self.listener = Listener()
        try:
            self.client: AsyncMongoClient[Document] = AsyncMongoClient(
                settings.url,
                maxPoolSize=settings.pool_max,
                minPoolSize=settings.pool_min,
                waitQueueTimeoutMS=settings.wait_queue_ms,
                serverSelectionTimeoutMS=settings.server_selection_ms,
                timeoutMS=settings.timeout_ms,
                retryWrites=False,  # the append loop does it better: it knows the cid (docs/log.md, rule 3)
                retryReads=True,
                appname="chatcore",
                event_listeners=[self.listener, *listeners],
                tz_aware=True,
            )
        except (ConfigurationError, ValueError) as exc:  # InvalidURI is the former
            raise ValueError(f"store.mongodb_url: {exc}") from None
        self.db: AsyncDatabase[Document] = self.client.get_database(
            settings.database,
            codec_options=CodecOptions(document_class=dict),
            read_preference=ReadPreference.PRIMARY,
            write_concern=DURABLE,
            read_concern=MAJORITY,
        )
        #: Whether the last operation was answered.
        self.healthy = True
        nodes = sorted(f"{host}:{port}" for host, port in self.client.topology_description.server_descriptions())
        self.outage = Outage(",".join(nodes))
        self.outage.watch()
        #: ``$lookup`` with a pipeline: the ends of many logs in one query.
        self.lookups = False
        self._permits = asyncio.Semaphore(settings.pool_max)
        self._waiting = 0  # for a permit
        self._running: set[asyncio.Task[Any]] = set()
        #: When the last operation ended, by the loop's clock.
        self.last_s = asyncio.get_running_loop().time()

    @property
    def or_pairs(self) -> int:
        """How many alternatives one query may have."""
        return OR_PAIRS if self.lookups else OR_PAIRS_ELSEWHERE

    async def start(self) -> None:
        """Find out what the server can do.

        :raises Unavailable: it does not answer, or does not let us in.
        """
        probe: list[Document] = [
            {"$match": {"_id": None}},
            {"$lookup": {"from": "entries", "localField": "_id", "foreignField": "c", "pipeline": [], "as": "e"}},
            {"$limit": 1},
        ]
        await self.do(self.client.admin.command("hello"))
        await self.do(self.db["meta"].find_one({"_id": "store"}, {"_id": 1}))
        try:
            await self.do(self._lookup(probe), may_refuse=True)
        except ServerRefusal as exc:
            # Not of a missing right: reading it was allowed just now.
            log.info("this server has no $lookup: the ends of logs are read one by one (%s)", exc)
        else:
            self.lookups = True

    async def _lookup(self, pipeline: list[Document]) -> None:
        await (await self.db["meta"].aggregate(pipeline)).to_list(1)

    async def close(self, limit_s: float = CLOSE_S) -> None:
        """Wait for the operations under way, which end by themselves within their time, and close every connection."""
        until = asyncio.get_running_loop().time() + limit_s
        try:
            await self._close(until)
        finally:
            self.outage.close()

    async def _close(self, until: float) -> None:
        limit_s = max(0.0, until - asyncio.get_running_loop().time())
        if self._running:
            await asyncio.wait(self._running, timeout=limit_s)
        # The driver sends the server the sessions that it ends, and would wait for an answer for ever.
        with pymongo.timeout(GOODBYE_S):
            closing = asyncio.ensure_future(self.client.close())
        left_s = max(0.0, until - asyncio.get_running_loop().time())
        await asyncio.wait([closing], timeout=GOODBYE_S + left_s)
        for task in (closing, *self._running):
            task.cancel()
        await asyncio.gather(closing, *self._running, return_exceptions=True)

    def __getitem__(self, name: str) -> Collection:
        return self.db[name]

    def history(self, name: str) -> Collection:
        """The collection as pages of history may read it."""
        if not self.settings.history_from_secondaries:
            return self.db[name]
        return self.db[name].with_options(read_preference=SecondaryPreferred(max_staleness=MAX_STALENESS_S))

    @contextlib.asynccontextmanager
    async def caught_up(self, since: object = None) -> AsyncIterator[AsyncClientSession | None]:
        """A session that reads no state older than any that this worker has seen (or than ``since``).

        A majority read alone may go back in time: a new primary learns late what its
        predecessor knew to be committed, and one that was deposed may not know it yet.
        """
        seen = self.listener.operation_time
        moment = max((t for t in (seen, since) if isinstance(t, Timestamp)), default=None)
        if moment is None:
            yield None
            return
        async with self.client.start_session(causal_consistency=True) as session:
            session.advance_operation_time(moment)
            yield session

    async def do(
        self, operation: Coroutine[Any, Any, T], limit_s: float | None = None, *, may_refuse: bool = False
    ) -> T:
        """Wait for one operation.

        It is shielded: cancelling an operation closes its connection, and the others
        of the pool pay for it. It ends by itself at ``timeoutMS`` (or ``limit_s``).

        The driver's own limits on the wait for a connection and for a primary are void
        beside ``timeoutMS``, so they are kept here: there are as many permits as
        connections, and an operation that begins while the server is away gives up sooner.

        ``may_refuse``: some servers do not do this, and are well.

        :raises DuplicateKeyError: as the driver does: some callers expect it.
        :raises BulkWriteError: the same, of several documents: there are duplicates, and nothing else is wrong.
        :raises ServerRefusal: the server answered that it does not do this.
        :raises Unavailable: for everything else.
        """
        await self._acquire(operation)
        settings = self.settings
        if limit_s is None:
            ms = settings.timeout_ms if self.healthy else min(settings.timeout_ms, settings.server_selection_ms)
            limit_s = ms / 1000
        with pymongo.timeout(limit_s):
            task = asyncio.ensure_future(operation)
        self._running.add(task)
        task.add_done_callback(self._ended)
        try:
            result = await asyncio.shield(task)
        except (DuplicateKeyError, BulkWriteError) as exc:
            if _only_duplicates(exc):
                self._succeeded()
                raise
            self._failed(type(exc).__name__)
            raise Unavailable(f"the store does not answer: {type(exc).__name__}") from exc
        except OperationFailure as exc:
            if may_refuse:
                self._succeeded()
            else:
                self._failed(f"it refused an operation, code {exc.code}")
            raise ServerRefusal(f"the store refused it: {type(exc).__name__}, code {exc.code}") from exc
        except PyMongoError as exc:
            self._failed(type(exc).__name__)
            raise Unavailable(f"the store does not answer: {type(exc).__name__}") from exc
        self._succeeded()
        return result

    def _succeeded(self) -> None:
        self.healthy = True
        self.outage.succeeded()

    def _failed(self, why: str) -> None:
        self.healthy = False
        self.outage.failed(why)

    async def _acquire(self, operation: Coroutine[Any, Any, T]) -> None:
        try:
            if self._permits.locked():
                self.listener.count("waits")
                self._waiting += 1
                try:
                    async with asyncio.timeout(self.settings.wait_queue_ms / 1000):
                        await self._permits.acquire()
                finally:
                    self._waiting -= 1
            else:
                await self._permits.acquire()  # at once
        except TimeoutError:
            operation.close()
            self.listener.count("waits_failed")
            raise Unavailable("the store is too busy") from None
        except BaseException:
            operation.close()
            raise

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._permits.release()
        self._running.discard(task)
        self.last_s = asyncio.get_running_loop().time()
        if not task.cancelled():
            task.exception()  # its caller may be gone

    def stats(self) -> dict[str, Any]:
        """The pool, the wait for it and the commands, for JSON; counters since the start."""
        seen = self.listener
        counts = seen.counts
        return {
            "pool": {
                "max": self.settings.pool_max,
                "connections": seen.connections,
                "busy": seen.checked_out,
                "checkouts": counts.get("checkouts", 0),
                "checkouts_failed": counts.get("checkouts_failed", 0),
                "checkout_ms": round(seen.checkout_s * 1000, 1),
                "cleared": counts.get("pools_cleared", 0),
            },
            "queue": {
                "waiting": self._waiting,
                "waits": counts.get("waits", 0),
                "given_up": counts.get("waits_failed", 0),
            },
            "background_failed": self.outage.background,
            "commands": dict(seen.commands),
            "commands_failed": counts.get("commands_failed", 0),
            "commands_ms": round(seen.micros / 1000, 1),
        }

    async def ping(self) -> None:
        """Read a small document that a majority has, to find out whether the server is back."""
        await self.do(self.db["meta"].find_one({"_id": "store"}, {"_id": 1}))


class ServerRefusal(Unavailable):
    """The server answered, with an error: it lacks something, or a right, or its majority."""


def _only_duplicates(exc: DuplicateKeyError | BulkWriteError) -> bool:
    """Whether the server is well: another writer was first, nothing else."""
    if isinstance(exc, DuplicateKeyError):
        return True
    details = exc.details
    errors = details.get("writeErrors", [])
    return bool(errors) and not details.get("writeConcernErrors") and all(e["code"] == DUPLICATE for e in errors)
