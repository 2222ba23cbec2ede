"""A replica set on the wire (mockupdb): one primary, one secondary, and documents to answer with.

It shows what the store asks of whom, and what it does with what a real set answers; it
stores nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from bson.timestamp import Timestamp
from mockupdb import MockupDB

from chatcore.store.mongo import schema

Document = dict[str, Any]
Answer = Callable[[Document], "Document | None"]

HANG_UP: Document = {}
NOT_PRIMARY: Document = {"ok": 0, "code": 10107, "codeName": "NotWritablePrimary", "errmsg": "not primary"}
NO_MAJORITY: Document = {
    "ok": 1,
    "n": 1,
    "writeConcernError": {"code": 64, "codeName": "WriteConcernFailed", "errmsg": "waiting for replication timed out"},
}


def cursor(*docs: Document) -> Document:
    """An answer to find, aggregate and listIndexes."""
    return {"ok": 1, "cursor": {"id": 0, "ns": "db.x", "firstBatch": list(docs)}}


class Member:
    """One member of the set, and every command that it was sent."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._server = MockupDB(auto_ismaster=False)
        self._server.autoresponds(self._answer)
        self.sent: list[Document] = []

    @property
    def address(self) -> str:
        return f"{self._server.host}:{self._server.port}"

    def start(self) -> None:
        self._server.run()

    def stop(self) -> None:
        self._server.stop()

    def of(self, name: str, collection: str) -> list[Document]:
        """The commands of this name on a collection."""
        return [command for command in self.sent if command.get(name) == collection]

    def _answer(self, request: Any) -> bool:
        command: Document = dict(request.doc)
        if request.command_name.lower() in ("hello", "ismaster"):
            request.reply(self._hello())
        elif (answer := self._replicas.answer(self, command)) is None:
            request.hangup()
        else:
            request.reply(answer)
        return True

    def _hello(self) -> Document:
        primary = self is self._replicas.primary
        return {
            "ok": 1,
            "helloOk": True,
            "isWritablePrimary": primary,
            "ismaster": primary,
            "secondary": not primary,
            "setName": "rs",
            "setVersion": 1,
            "hosts": [member.address for member in self._replicas.members],
            "primary": self._replicas.primary.address,
            "me": self.address,
            "minWireVersion": 0,
            "maxWireVersion": 21,
            "maxBsonObjectSize": 16 * 1024 * 1024,
            "maxMessageSizeBytes": 48_000_000,
            "maxWriteBatchSize": 100_000,
            "logicalSessionTimeoutMinutes": 30,
            "lastWrite": {"lastWriteDate": datetime.now(UTC), "opTime": {"ts": Timestamp(1, 1), "t": 1}},
        }


class Replicas:
    """The set. ``script``: asked first for each command; what it answers None to is answered as if all were well.

    A command that is answered :data:`HANG_UP` finds its connection closed.
    """

    def __init__(self) -> None:
        self.members = [Member(self), Member(self)]
        self._clock = 100
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """As if it had just been started."""
        for member in self.members:
            member.sent = []
        self.primary, self.secondary = self.members
        self.script: Answer = lambda command: None
        self.docs: dict[str, list[Document]] = {
            "meta": [{"_id": "store", "store_id": "id", "secret": b"s" * 32, "version": schema.SCHEMA_VERSION}],
            "convs": [{"_id": "conv", "kind": "group", "a": None, "b": None, "folded": 1, "members": 1}],
            "members": [{"_id": "conv:alice", "u": "alice", "c": "conv", "role": "owner", "as_of": 1}],
            "entries": [],
        }

    @property
    def url(self) -> str:
        return f"mongodb://{','.join(member.address for member in self.members)}/?replicaSet=rs"

    def now(self) -> Timestamp:
        """The operation time of the last answer."""
        return Timestamp(self._clock, 1)

    def answer(self, member: Member, command: Document) -> Document | None:
        with self._lock:
            member.sent.append(command)
            self._clock += 1
        given = self.script(command)
        if given is HANG_UP:
            return None
        found = dict(self._well(command) if given is None else given)
        time = self.now()
        signature = {"hash": b"\0" * 20, "keyId": 0}
        return {**found, "operationTime": time, "$clusterTime": {"clusterTime": time, "signature": signature}}

    def _well(self, command: Document) -> Document:
        name = next(iter(command))
        match name:
            case "insert":
                return {"ok": 1, "n": len(command["documents"])}
            case "find":
                return cursor(*self.docs.get(command["find"], [])[: command["limit"]])
            case "aggregate":
                return cursor()
            case "listIndexes":
                indexes = [index for index in schema.INDEXES if index.collection == command[name]]
                return cursor(
                    *(
                        {"v": 2, "key": dict(index.keys), "name": index.name, "unique": index.unique}
                        for index in indexes
                    )
                )
            case "update":
                return {"ok": 1, "n": 1, "nModified": 1}
            case _:
                return {"ok": 1}


@contextmanager
def replicas() -> Iterator[Replicas]:
    """A set that runs."""
    found = Replicas()
    for member in found.members:
        member.start()
    try:
        yield found
    finally:
        for member in found.members:
            member.stop()
