"""The log as it is stored, read past the server: from the SQLite file, or from the database itself."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import apsw
import orjson
from pymongo import MongoClient

from .record import Message
from .site import Site

READ_S = 60.0


class Row(NamedTuple):
    """One stored entry."""

    seq: int
    sender: str
    cid: str
    entry: Message  # as it is pushed


def read(site: Site) -> dict[str, list[Row]]:
    """All conversations, each by seq."""
    logs: dict[str, list[Row]] = {}
    rows = _sqlite(site) if site.backend == "sqlite-local" else _mongodb(site)
    for t, conv, seq, sender, ts, cid, fields in rows:
        entry = {"t": t, "c": conv, "s": seq, "from": sender, "ts": ts, "cid": cid, **orjson.loads(fields)}
        logs.setdefault(conv, []).append(Row(seq, sender, cid, entry))
    for log in logs.values():
        log.sort(key=lambda row: row.seq)
    return logs


def heads(site: Site, convs: list[str]) -> dict[str, int]:
    """The newest seq of each, which is much cheaper."""
    if site.backend == "sqlite-local":
        db = _open(site)
        try:
            newest = "SELECT c.id, max(e.seq) FROM entries e JOIN ids c ON c.n = e.conv GROUP BY e.conv"
            found = dict(cast(list[tuple[str, int]], db.execute(newest).fetchall()))
            return {conv: found.get(conv, 0) for conv in convs}
        finally:
            db.close()
    found = dict.fromkeys(convs, 0)
    for _, conv, seq, *_ in _mongodb(site):
        found[conv] = max(found.get(conv, 0), seq)
    return found


Stored = tuple[str, str, int, str, int, str, str]


def _open(site: Site) -> apsw.Connection:
    db = apsw.Connection(str(site.hosts[0].data / "chatcore.db"), flags=apsw.SQLITE_OPEN_READONLY)
    db.set_busy_timeout(int(READ_S * 1000))
    return db


def _sqlite(site: Site) -> list[Stored]:
    db = _open(site)
    try:
        rows = db.execute(
            "SELECT t, c.id, seq, s.id, ts, cid, fields FROM entries e"
            " JOIN ids c ON c.n = e.conv JOIN ids s ON s.n = e.sender"
        ).fetchall()
    finally:
        db.close()
    return cast(list[Stored], rows)


def _mongodb(site: Site) -> list[Stored]:
    assert site.mongo is not None
    with MongoClient[dict[str, Any]](site.mongo.url, timeoutMS=int(READ_S * 1000)) as client:
        documents = client[site.database]["entries"].find({}, {"_id": 0})
        return [(d["t"], d["c"], d["s"], d["f"], d["ts"], d["cid"], d["b"]) for d in documents]
