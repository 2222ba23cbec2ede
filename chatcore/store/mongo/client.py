"""The connection to MongoDB: one client for each worker, made in its loop, after the fork.

The driver's defaults are not for a server that must answer in milliseconds (a wait
for a server of 30 s, retries that rule 3 of log.md does better): every one that
matters is set here, from the settings.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from bson.codec_options import CodecOptions
from pymongo import AsyncMongoClient, ReadPreference, WriteConcern, monitoring
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import DuplicateKeyError, OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern

from ...errors import Unavailable

log = logging.getLogger("chatcore.store")

T = TypeVar("T")
Document = dict[str, Any]
Collection = AsyncCollection[Document]

# Promise 1: acknowledged by a majority, each with its journal.
DURABLE: Final = WriteConcern(w="majority", j=True)
MAJORITY: Final = ReadConcern("majority")
# A secondary that is further behind is not asked for history; the least that the driver takes.
MAX_STALENESS_S: Final = 90


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


class Listener(monitoring.CommandListener, monitoring.ConnectionPoolListener):
    """Counts what the driver does. Called synchronously by the driver: counters only."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.commands: dict[str, int] = {}
        self.micros = 0
        self.connections = 0
        self.checked_out = 0

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        self.commands[event.command_name] = self.commands.get(event.command_name, 0) + 1

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        self.micros += event.duration_micros

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        self.micros += event.duration_micros
        self._count("commands_failed")

    def pool_created(self, event: monitoring.PoolCreatedEvent) -> None:
        self._count("pools_created")

    def pool_ready(self, event: monitoring.PoolReadyEvent) -> None:
        self._count("pools_ready")

    def pool_cleared(self, event: monitoring.PoolClearedEvent) -> None:
        self._count("pools_cleared")

    def pool_closed(self, event: monitoring.PoolClosedEvent) -> None:
        self._count("pools_closed")

    def connection_created(self, event: monitoring.ConnectionCreatedEvent) -> None:
        self.connections += 1

    def connection_ready(self, event: monitoring.ConnectionReadyEvent) -> None:
        self._count("connections_ready")

    def connection_closed(self, event: monitoring.ConnectionClosedEvent) -> None:
        self.connections -= 1

    def connection_check_out_started(self, event: monitoring.ConnectionCheckOutStartedEvent) -> None:
        self._count("checkouts")

    def connection_check_out_failed(self, event: monitoring.ConnectionCheckOutFailedEvent) -> None:
        self._count("checkouts_failed")

    def connection_checked_out(self, event: monitoring.ConnectionCheckedOutEvent) -> None:
        self.checked_out += 1

    def connection_checked_in(self, event: monitoring.ConnectionCheckedInEvent) -> None:
        self.checked_out -= 1


class Mongo:
    """The collections, and whether the server answers."""

    def __init__(self, settings: MongoSettings) -> None:
        self.settings = settings
        self.listener = Listener()
        self.client: AsyncMongoClient[Document] = AsyncMongoClient(
            settings.url,
            maxPoolSize=settings.pool_max,
            minPoolSize=settings.pool_min,
            waitQueueTimeoutMS=settings.wait_queue_ms,
            serverSelectionTimeoutMS=settings.server_selection_ms,
            timeoutMS=settings.timeout_ms,
            retryWrites=False,  # the append loop does it better: it knows the cid (log.md)
            retryReads=True,
            appname="chatcore",
            event_listeners=[self.listener],
            tz_aware=True,
        )
        self.db: AsyncDatabase[Document] = self.client.get_database(
            settings.database,
            codec_options=CodecOptions(document_class=dict),
            read_preference=ReadPreference.PRIMARY,
            write_concern=DURABLE,
            read_concern=MAJORITY,
        )
        #: Whether the last operation was answered.
        self.healthy = True
        #: A replica set or a sharded cluster: sessions, majority reads, retryable errors.
        self.replicated = False
        #: ``$group`` has ``$first``: the ends of many logs in one query.
        self.groups_first = False

    async def start(self) -> None:
        """Find out what the server is.

        :raises Unavailable: it does not answer.
        """
        hello = await self.do(self.client.admin.command("hello"))
        self.replicated = "setName" in hello or hello.get("msg") == "isdbgrid"
        try:
            probe: list[Document] = [{"$match": {"_id": None}}, {"$group": {"_id": "$c", "e": {"$first": "$$ROOT"}}}]
            await (await self.db["meta"].aggregate(probe)).to_list(1)
            self.groups_first = True
        except OperationFailure as exc:
            log.info("this server has no $first: the ends of logs are read one by one (code %s)", exc.code)
        except PyMongoError as exc:
            raise Unavailable(f"the store does not answer: {type(exc).__name__}") from exc

    async def close(self) -> None:
        """Close every connection."""
        await self.client.close()

    def __getitem__(self, name: str) -> Collection:
        return self.db[name]

    def history(self, name: str) -> Collection:
        """The collection as pages of history may read it."""
        if not self.settings.history_from_secondaries:
            return self.db[name]
        from pymongo.read_preferences import SecondaryPreferred

        return self.db[name].with_options(read_preference=SecondaryPreferred(max_staleness=MAX_STALENESS_S))

    async def do(self, operation: Awaitable[T]) -> T:
        """Wait for one operation.

        It is shielded: cancelling an operation closes its connection, and the others
        of the pool pay for it. It ends by itself at ``timeoutMS``.

        :raises DuplicateKeyError: as the driver does: some expect it.
        :raises Unavailable: for everything else.
        """
        task = asyncio.ensure_future(operation)
        try:
            result = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_retrieved)
            raise
        except DuplicateKeyError:
            self.healthy = True
            raise
        except PyMongoError as exc:
            self.healthy = False
            raise Unavailable(f"the store does not answer: {type(exc).__name__}") from exc
        self.healthy = True
        return result

    async def ping(self) -> None:
        """Ask for a sign of life, to find out that it is back."""
        await self.do(self.client.admin.command("ping"))


def _retrieved(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()
