"""The database from the command line: what ``chatcore db`` does, whether a server runs or not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from ...config import ConfigError
from ...settings import Settings
from . import schema
from .client import Document, Mongo, MongoSettings
from .schema import Finding

T = TypeVar("T")

# An index of a large collection takes hours, and goes on in the database if the operator interrupts it.
INDEX_LIMIT_S: Final = 86_400.0


def database_of(settings: Settings) -> str:
    """The name of the database.

    :raises ConfigError: the settings name none.
    """
    if not settings.store.mongodb_url:
        raise ConfigError("store.mongodb_url is empty: the embedded database looks after itself")
    return settings.store.mongodb_database


def _with_database(settings: Settings, work: Callable[[Mongo], Awaitable[T]]) -> T:
    store = settings.store
    how = MongoSettings(
        store.mongodb_url,
        database_of(settings),
        pool_min=0,
        server_selection_ms=store.server_selection_ms,
        timeout_ms=store.operation_ms,
    )

    async def main() -> T:
        try:
            mongo = Mongo(how)
        except ValueError as exc:
            raise ConfigError(str(exc)) from None
        try:
            await mongo.ping()
            return await work(mongo)
        finally:
            await mongo.close()

    return asyncio.run(main())


def check(settings: Settings) -> list[Finding]:
    """Each index: whether it is there, why, and what :func:`migrate` would do.

    :raises ConfigError: the settings name no database, or not one that can be.
    :raises Unavailable: it does not answer.
    """
    return _with_database(settings, schema.check)


def migrate(settings: Settings, tell: Callable[[str], None]) -> list[Finding]:
    """Make what is missing; returns what is wrong after that.

    :param tell: called with a line of text before and after each index is made.
    :raises ConfigError: the settings name no database, or not one that can be.
    :raises Unavailable: it does not answer, or refuses an index that must be.
    """

    async def work(mongo: Mongo) -> list[Finding]:
        await schema.migrate(mongo, tell, INDEX_LIMIT_S)
        return [one for one in await schema.check(mongo, usage=False) if one.broken]

    return _with_database(settings, work)


def accounts(settings: Settings) -> list[tuple[str, str, int, bool]]:
    """All accounts by name: (id, name, created in Unix ms, disabled). Asks every shard.

    :raises Unavailable: the database does not answer.
    """

    async def work(mongo: Mongo) -> list[tuple[str, str, int, bool]]:
        fields = {"name": 1, "key": 1, "created": 1, "disabled": 1}
        docs: list[Document] = await mongo.do(mongo["users"].find({}, fields).to_list(None))
        docs.sort(key=lambda doc: doc["key"])
        return [(doc["_id"], doc["name"], doc["created"], doc["disabled"]) for doc in docs]

    return _with_database(settings, work)
