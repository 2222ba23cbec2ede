"""Redis slow, down, back, emptied, restored: no caller waits for it twice, and no outdated value is returned."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from chatcore.cache.l2 import MAX_PENDING_DELETIONS

from ..services.redis import RedisCluster, RedisServer
from .parts import SETTINGS, Worker, seqs, until, within, workers

HASH = b"t" * 32
FOR_EVER = 2**50
TIMEOUT_S = 0.3
QUICK = replace(SETTINGS, l2_timeout_ms=int(TIMEOUT_S * 1000))


async def back(*some: Worker) -> None:
    """Wait until these use level 2 again."""
    for w in some:
        assert w.cache.l2 is not None
        await within(w.cache.l2.until_ready(), "the return of level 2")


async def away(*some: Worker) -> None:
    """Wait until these have noticed that level 2 is down."""
    for w in some:
        await until(lambda w=w: not w.cache.l2.ready, "an outage")  # type: ignore[misc]


async def test_a_frozen_redis_costs_one_time_out(tmp_path: Path, redis_server: RedisServer) -> None:
    stall_s = 3.0  # longer than the steps below take without waiting for it
    settings = replace(SETTINGS, l2_timeout_ms=int(stall_s * 1000))
    async with workers(tmp_path, redis=redis_server.url, settings=settings) as (w,):
        ann = await w.user("ann")
        conv = await w.conversation(ann)
        await w.fill(conv, ann, 20)
        w.cache.on_resync_needed()
        loop = asyncio.get_running_loop()
        redis_server.freeze()
        began = loop.time()
        assert await w.cache.role(ann.id, conv) == "owner"
        assert loop.time() - began < 2 * stall_s
        for i in range(20):
            began = loop.time()
            w.cache.on_resync_needed()
            assert len(seqs(await w.last(conv, ann))) == 22 + i
            await w.cache.update_user(ann.id, "ann", None)
            assert await w.cache.users([ann.id]) == [ann]
            await w.change(conv, ann, ann, "owner")
            await w.send(conv, ann)
            assert loop.time() - began < stall_s, "only the first call waits for it"
        redis_server.thaw()
        await back(w)
        assert w.cache.stats()["l2"]["outages"] >= 1


async def test_a_redis_that_was_emptied_matches_nothing_from_before(tmp_path: Path, redis_server: RedisServer) -> None:
    """A reader that had the right to write before Redis was killed has it no longer."""
    async with workers(tmp_path, 2, redis=redis_server.url, settings=SETTINGS) as (reader, writer):
        ann = await writer.user("ann")
        for w in (reader, writer):
            w.cache.on_resync_needed()
        gate = reader.slow.gate("users")
        asked = asyncio.create_task(reader.cache.users([ann.id]))
        await within(gate.reached.wait(), "the read")
        reader.hub.lossy = True
        redis_server.kill(lose_data=True)
        await writer.cache.update_user(ann.id, "anna", None)
        await away(writer, reader)
        redis_server.start()
        await back(writer, reader)
        gate.open.set()
        await asked
        assert reader.cache.l2 is not None
        await reader.cache.l2.flush()
        reader.hub.resync()
        for w in (writer, reader):
            assert (await w.cache.users([ann.id]))[0].name == "anna"


async def test_everything_goes_on_while_redis_is_dead_and_is_used_again_without_a_restart(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    async with workers(tmp_path, 2, redis=redis_server.url, settings=SETTINGS) as (a, b):
        ann = await a.user("ann")
        conv = await a.conversation(ann)
        await a.fill(conv, ann, 60)
        redis_server.kill(lose_data=True)
        for i in range(5):
            done = await a.send(conv, ann, f"while it is dead {i}")
            a.hub.resync()
            assert seqs(await b.last(conv, ann))[-1] == done.seq
        await away(a, b)
        redis_server.start()
        await back(a, b)
        a.hub.resync()
        done = await a.send(conv, ann)
        page = await a.last(conv, ann)
        for w in (a, b):
            assert w.cache.l2 is not None
            await w.cache.l2.flush()
        a.hub.resync()
        b.calls.clear()
        assert await b.last(conv, ann) == page
        assert b.calls["entries"] == 0, "it is used again: what the other worker read is known"


async def test_a_pending_deletion_is_sent_before_anything_is_read(tmp_path: Path, redis_server: RedisServer) -> None:
    async with workers(tmp_path, 2, redis=redis_server.url, settings=QUICK) as (a, b):
        ann, bob = await a.user("ann"), await a.user("bob")
        conv = await a.conversation(ann, bob)
        await a.cache.add_token(HASH, ann.id, FOR_EVER, "hash")
        for w in (a, b):
            w.cache.on_resync_needed()
            await w.cache.role(bob.id, conv)
            assert await w.cache.token(HASH) is not None
            assert w.cache.l2 is not None
            await w.cache.l2.flush()
        a.hub.lossy = True
        redis_server.freeze()
        await a.cache.revoke_token(HASH)
        await a.change(conv, ann, bob, "none")
        await away(a)
        redis_server.thaw()
        await back(a)
        await back(b)
        b.cache.on_resync_needed()
        assert await b.cache.token(HASH) is None
        assert await b.cache.role(bob.id, conv) is None


async def test_too_many_pending_deletions_make_their_kinds_unknown(tmp_path: Path, redis_server: RedisServer) -> None:
    async with workers(tmp_path, 2, redis=redis_server.url, settings=QUICK) as (a, b):
        ann = await a.user("ann")
        assert await b.cache.users([ann.id]) == [ann]
        assert a.cache.l2 is not None
        assert b.cache.l2 is not None
        await b.cache.l2.flush()
        await a.sqlite.update_user(ann.id, "anna", None)
        redis_server.freeze()
        assert not await a.cache.l2.delete([("t", "x")])
        assert not await a.cache.l2.delete([("u", f"other{i}") for i in range(MAX_PENDING_DELETIONS + 1)])
        redis_server.thaw()
        await back(a, b)
        b.cache.on_resync_needed()
        assert (await b.cache.users([ann.id]))[0].name == "anna", "all values of this kind are unknown"


async def test_the_data_of_a_restarted_redis_is_not_used(tmp_path: Path, redis_server: RedisServer) -> None:
    """It may have lost the last deletions: a snapshot restored, a replica promoted."""
    async with workers(tmp_path, 2, redis=redis_server.url, settings=QUICK) as (a, b):
        ann = await a.user("ann")
        conv = await a.conversation(ann)
        head = await a.fill(conv, ann, 10)
        await b.cache.users([ann.id])
        await b.last(conv, ann)
        for w in (a, b):
            assert w.cache.l2 is not None
            await w.cache.l2.flush()
        await a.sqlite.update_user(ann.id, "anna", None)  # not announced, as if the deletion had been lost
        redis_server.restart()
        assert redis_server.command("DBSIZE") > 0
        b.cache.on_resync_needed()
        assert (await b.cache.users([ann.id]))[0].name == "anna"
        await back(a, b)
        b.cache.on_resync_needed()
        b.calls.clear()
        assert seqs(await b.last(conv, ann))[-1] == head
        assert b.calls["entries"] == 1


async def test_a_cluster_is_used_as_well(tmp_path: Path) -> None:
    with RedisCluster(tmp_path / "cluster") as cluster:
        async with workers(tmp_path, 2, redis=cluster.url) as (a, b):
            ann, bob = await a.user("ann"), await a.user("bob")
            convs = [await a.conversation(ann, bob) for _ in range(5)]
            await a.cache.add_token(HASH, ann.id, FOR_EVER, "hash")
            for conv in convs:
                await a.fill(conv, ann, 60)
            for w in (a, b):
                w.hub.resync()
                for conv in convs:
                    await w.last(conv, bob)
                await w.cache.users([ann.id, bob.id])
                assert await w.cache.token(HASH) is not None
                assert w.cache.l2 is not None
                await w.cache.l2.flush()
            assert b.calls["entries"] == b.calls["role"] == b.calls["users"] == b.calls["token"] == 0
            a.hub.lossy = True
            await a.cache.update_user(ann.id, "anna", "new hash")
            await a.change(convs[0], ann, bob, "none")
            b.cache.on_resync_needed()
            assert await b.cache.token(HASH) is None
            assert (await b.cache.users([ann.id]))[0].name == "anna"
            assert await b.cache.role(bob.id, convs[0]) is None
            await a.cache.activity.send()
            await b.cache.activity.send()
            assert set(await b.cache.activity.hottest(10)) == set(convs)
