"""Level 2 by itself, on a real Redis: which writer may write, and which values are used."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator

import orjson

from chatcore.cache.l2 import L2, QUEUE, L2Entries, L2Value
from chatcore.common.redis_client import RedisClient, parse_url
from chatcore.protocol import encode_entry
from chatcore.store.base import Entry

KEEP = 5
LIVES = {"t": 60_000, "u": 60_000, "r": 60_000, "e": 60_000}


def entry(seq: int, body: str = "hello", conv: str = "c") -> Entry:
    wire = encode_entry("msg", conv, seq, "somebody", 0, f"cid{seq}", orjson.dumps({"body": body}))
    return Entry(conv, seq, "msg", "somebody", seq, seq, wire)


@contextlib.asynccontextmanager
async def levels(url: str, count: int = 2) -> AsyncIterator[list[L2]]:
    """Level 2 as seen by some workers."""
    prefix = f"test-{secrets.token_hex(6)}"
    clients = [RedisClient(parse_url(url), timeout_s=5.0) for _ in range(count)]
    made = [L2(client, lives_ms=LIVES, negative_ms=2_000, keep=KEEP) for client in clients]
    for l2 in made:
        await l2.start(prefix)
        assert l2.ready
    try:
        yield made
    finally:
        for l2 in made:
            await l2.close()


async def look(l2: L2, key: str = "k", kind: str = "u") -> L2Value:
    return (await l2.read_values(kind, [key]))[key]


async def fill(l2: L2, record: L2Value, value: bytes | None, key: str = "k", kind: str = "u") -> None:
    l2.fill(kind, key, record, value)
    await l2.flush()


async def test_one_reader_gets_the_right_to_write(redis_url: str) -> None:
    async with levels(redis_url) as (a, b):
        first, second = await look(a), await look(b)
        assert not first.known
        assert first.seen
        assert not second.known
        assert not second.seen, "another reader has it"
        await fill(b, second, b"unasked")
        assert not (await look(b)).known
        await fill(a, first, b"value")
        assert (await look(b)).data == b"value"
        await fill(a, first, b"again")
        assert (await look(b)).data == b"value", "a right is used once"


async def test_an_absent_value_is_cached_too(redis_url: str) -> None:
    async with levels(redis_url) as (a, b):
        await fill(a, await look(a), None)
        record = await look(b)
        assert record.known
        assert record.data is None
        await fill(a, await look(a, "empty"), b"", "empty")
        assert (await look(b, "empty")).data == b""


async def test_a_deletion_ends_the_right_to_write(redis_url: str) -> None:
    async with levels(redis_url) as (a, b):
        before = await look(a)
        assert await b.delete([("u", "k")])
        await fill(a, before, b"old")
        after = await look(b)
        assert not after.known
        await fill(a, before, b"old")
        await fill(b, after, b"new")
        assert (await look(a)).data == b"new"


async def test_a_value_is_replaced_only_by_a_reader_that_saw_it(redis_url: str) -> None:
    async with levels(redis_url) as (a, b):
        await fill(a, await look(a), b"one")
        seen, also = await look(a), await look(b)
        await fill(a, seen, b"two")
        await fill(b, also, b"late")
        assert (await look(b)).data == b"two"


async def test_a_kind_can_be_made_unknown_at_once(redis_url: str) -> None:
    async with levels(redis_url) as (a, b):
        await fill(a, await look(a), b"value")
        await fill(a, await look(a, kind="t"), b"value", kind="t")
        before = await look(a, "being read")
        assert await b.delete([("u", "*")])
        assert not (await look(a)).known
        assert (await look(a, kind="t")).known
        await fill(a, before, b"old", "being read")
        assert not (await look(b, "being read")).known, "it was read before"
        await fill(a, await look(a), b"value")
        assert (await look(b)).data == b"value"


async def test_foreign_data_is_ignored(redis_url: str) -> None:
    async with levels(redis_url) as (a, _):
        client = a._client
        await client.call("SET", f"{a.prefix}:u:junk", b"x")
        await client.call("SET", f"{a.prefix}:u:long", b"x" * 100)
        await client.call("LPUSH", f"{a.prefix}:u:list", b"x")
        records = await a.read_values("u", ["junk", "long", "list"])
        assert not any(record.known for record in records.values())
        assert a.ready


async def recent(l2: L2, conv: str = "c") -> tuple[L2Entries, list[int]]:
    record = (await l2.read_entries([conv]))[conv]
    return record, sorted(e.seq for e in record.entries)


async def test_committed_entries_are_there_once_for_all_workers_and_trimmed(redis_url: str) -> None:
    async with levels(redis_url) as (a, b):
        for seq in (1, 2, 4, 3, 3):
            a.add_committed([entry(seq)])
            await a.flush()
        record, seqs = await recent(b)
        assert seqs == [1, 2, 3, 4]
        assert record.entries[0] == entry(1)
        a.add_committed([entry(seq) for seq in range(5, 9)])
        await a.flush()
        assert (await recent(b))[1] == [4, 5, 6, 7, 8]
        b.add_committed([entry(2)])  # late
        await b.flush()
        assert (await recent(b))[1] == [4, 5, 6, 7, 8]


async def test_entries_that_were_read_are_added_unless_one_was_overwritten(redis_url: str) -> None:
    async with levels(redis_url) as (a, b):
        before, seqs = await recent(a)
        assert seqs == []
        assert await b.overwrite(entry(2, "gone"))
        a.fill_entries("c", before, [entry(1), entry(2)])
        await a.flush()
        record, seqs = await recent(a)
        assert seqs == [2]
        assert record.entries == [entry(2, "gone")]
        a.fill_entries("c", record, [entry(1), entry(2), entry(3)])
        await a.flush()
        record, seqs = await recent(b)
        assert seqs == [1, 2, 3]
        assert entry(2, "gone") in record.entries, "what is there stays"
        again = record
        assert await b.overwrite(entry(3, "gone too"))
        a.fill_entries("c", again, [entry(3), entry(4)])
        await a.flush()
        record, seqs = await recent(b)
        assert seqs == [1, 2, 3]
        assert entry(3, "gone too") in record.entries


async def test_entries_that_were_deleted_refuse_a_reader_from_before(redis_url: str) -> None:
    async with levels(redis_url) as (a, b):
        a.add_committed([entry(1)])
        await a.flush()
        before, _ = await recent(a)
        assert await b.delete([("e", "c")])
        a.fill_entries("c", before, [entry(1)])
        await a.flush()
        assert (await recent(b))[1] == []
        assert await b.delete([("e", "*")])
        record, _ = await recent(b)
        b.fill_entries("c", record, [entry(1)])
        await b.flush()
        assert (await recent(a))[1] == [1]


async def test_entries_whose_generation_was_evicted_begin_anew(redis_url: str) -> None:
    async with levels(redis_url) as (a, b):
        a.add_committed([entry(1, "of unknown age")])
        await a.flush()
        await a._client.call("DEL", f"{a.prefix}:g:{{c}}")
        assert (await recent(b))[1] == []
        b.add_committed([entry(2)])
        await b.flush()
        assert (await recent(b))[1] == [2]


async def test_writes_beyond_the_queue_are_shed(redis_url: str) -> None:
    async with levels(redis_url) as (a, b):
        a.add_committed([entry(seq) for seq in range(1, QUEUE + 11)])
        assert a.shed == 10, "bounded"
        await a.flush()
        assert (await recent(b))[1] == list(range(QUEUE - KEEP + 1, QUEUE + 1))
