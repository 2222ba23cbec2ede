"""Warming and prefetch at log-in: which conversations are loaded, within which bounds, and how it is switched off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from chatcore.settings import CacheSettings
from chatcore.store.base import User

from .parts import SETTINGS, Clock, Worker, seqs, within, workers

WARM = replace(SETTINGS, warm_conversations=3)
PREFETCH = replace(SETTINGS, prefetch_conversations=2)


async def conversations(w: Worker, ann: User, count: int) -> list[str]:
    """Some conversations, the last written to last."""
    convs = [await w.conversation(ann) for _ in range(count)]
    for conv in convs:
        await w.fill(conv, ann, 5)
    return convs


async def test_a_new_worker_warms_the_most_active_conversations(tmp_path: Path, redis_url: str) -> None:
    async with workers(tmp_path, redis=redis_url) as (w,):
        ann = await w.user("ann")
        convs = await conversations(w, ann, 6)
        await w.cache.activity.send()
        for conv in convs[:3] * 5:  # the older ones are read often
            await w.last(conv, ann)
    async with workers(tmp_path, redis=redis_url, settings=WARM) as (w,):
        assert w.cache.stats()["prefetch"]["warmed"] == 3
        for conv in convs[:3]:
            assert len(seqs(await w.last(conv, ann))) == 7
        assert w.calls["entries"] == 0
        assert w.cache.recent.counts.l1 == 3
        w.calls.clear()
    async with workers(tmp_path, redis=redis_url, settings=SETTINGS) as (w,):
        assert w.cache.stats()["prefetch"]["warmed"] == 0, "switched off"
        await w.last(convs[0], ann)
        assert w.cache.recent.counts.l1 == 0


async def test_older_activity_counts_for_less(tmp_path: Path, redis_url: str) -> None:
    clock = Clock()
    async with workers(tmp_path, redis=redis_url, clock=clock) as (w,):
        for _ in range(10):
            w.cache.activity.note("old")
        await w.cache.activity.send()
        clock.move(2 * 1800)
        for _ in range(3):
            w.cache.activity.note("new")
        await w.cache.activity.send()
        assert await w.cache.activity.hottest(10) == ["new", "old"]  # 3 and 10/4
        assert await w.cache.activity.hottest(1) == ["new"]
        clock.move(4 * 1800)
        assert await w.cache.activity.hottest(10) == []


async def test_without_redis_the_conversations_last_written_to_are_warmed(tmp_path: Path) -> None:
    async with workers(tmp_path) as (w,):
        ann = await w.user("ann")
        convs = await conversations(w, ann, 6)
    async with workers(tmp_path, settings=replace(WARM, warm_conversations=100)) as (w,):
        assert w.cache.stats()["prefetch"]["warmed"] == 6
        await w.last(convs[5], ann)
        assert w.calls["entries"] == 0


@pytest.mark.parametrize("settings", [replace(WARM, warm_budget_ms=0)])
async def test_warming_ends_with_its_budget(tmp_path: Path, settings: CacheSettings) -> None:
    async with workers(tmp_path) as (w,):
        ann = await w.user("ann")
        await conversations(w, ann, 3)
    async with workers(tmp_path, settings=settings) as (w,):
        assert w.cache.stats()["prefetch"]["warmed"] == 0


async def test_a_store_that_does_not_answer_ends_the_warming(tmp_path: Path) -> None:
    async with workers(tmp_path, settings=WARM) as (w,):
        await conversations(w, await w.user("ann"), 3)
        w.slow.down = True
        w.cache.on_resync_needed()
        w.cache.prefetcher.warm.clear()
        await w.cache.prefetcher.warm_up()
        assert w.cache.prefetcher.warm.is_set()


async def test_a_log_in_prefetches_the_newest_conversations(tmp_path: Path) -> None:
    async with workers(tmp_path, settings=PREFETCH) as (w,):
        ann = await w.user("ann")
        convs = await conversations(w, ann, 5)
        w.cache.on_resync_needed()
        w.calls.clear()
        mine = list((await w.cache.memberships(ann.id)).revs)
        await w.cache.views(ann.id, mine)
        await within(w.cache.prefetcher.idle.wait(), "the end of the prefetch")
        assert w.cache.stats()["prefetch"]["prefetched"] == 2
        assert w.calls["entries"] == 2
        for conv in convs[-2:]:
            await w.last(conv, ann)
        assert w.calls["entries"] == 2
        assert w.calls["role"] == 0, "the views brought the roles"
        await w.last(convs[0], ann)
        assert w.calls["entries"] == 3
        # Views that are read at any other time start no prefetch.
        w.cache.on_resync_needed()
        w.calls.clear()
        await w.cache.views(ann.id, mine)
        assert w.cache.prefetcher.idle.is_set()
        assert w.calls["entries"] == 0


async def test_a_log_in_prefetches_nothing_that_is_cached(tmp_path: Path) -> None:
    async with workers(tmp_path, settings=PREFETCH) as (w,):
        ann = await w.user("ann")
        await conversations(w, ann, 3)
        w.calls.clear()
        for _ in range(3):
            mine = list((await w.cache.memberships(ann.id)).revs)
            await w.cache.views(ann.id, mine)
            await within(w.cache.prefetcher.idle.wait(), "the end of the prefetch")
        assert w.calls["entries"] == 0
        assert w.cache.stats()["prefetch"]["prefetched"] == 0


async def test_prefetch_can_be_switched_off(tmp_path: Path) -> None:
    async with workers(tmp_path) as (w,):
        ann = await w.user("ann")
        await conversations(w, ann, 3)
        w.cache.on_resync_needed()
        w.calls.clear()
        mine = list((await w.cache.memberships(ann.id)).revs)
        await w.cache.views(ann.id, mine)
        assert w.calls["entries"] == 0
