"""Reads of one worker: first from the store, then from memory; never without an acknowledged entry."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from chatcore.errors import NotFound, Unavailable

from .parts import SETTINGS, Clock, seqs, until, within, workers

KEEP = SETTINGS.recent_entries


async def test_the_newest_page_asks_the_store_once(tmp_path: Path) -> None:
    async with workers(tmp_path) as (w,):
        ann = await w.user("ann")
        conv = await w.conversation(ann)
        head = await w.fill(conv, ann, 70)
        w.cache.on_resync_needed()  # level 1 is empty
        w.calls.clear()
        for _ in range(3):
            page = await w.last(conv, ann, hint=head)
            assert seqs(page) == list(range(head - KEEP + 1, head + 1))
            assert page.more
            assert page.head == head
        assert w.calls == {"role": 1, "entries": 1}
        assert w.cache.stats()["kinds"]["last_entries"] == {
            "l1": 2, "l2": 0, "missed": 1, "refreshed": 0, "ratio": 0.6667,
        }  # fmt: skip


async def test_without_a_live_room_the_store_is_asked_for_the_head(tmp_path: Path) -> None:
    async with workers(tmp_path, 2) as (w, other):
        ann = await w.user("ann")
        conv = await w.conversation(ann)
        w.deaf = True
        await w.last(conv, ann)
        done = await other.send(conv, ann)
        w.calls.clear()
        page = await w.last(conv, ann)
        assert page.head == done.seq
        assert seqs(page)[-1] == done.seq, "the newest entry, which this worker has not received"
        assert w.calls["heads"] == 1


async def test_every_page_is_the_one_the_store_would_have_given(tmp_path: Path) -> None:
    async with workers(tmp_path) as (w,):
        ann = await w.user("ann")
        conv = await w.conversation(ann)
        head = await w.fill(conv, ann, 60)
        odd = [None, 0, 1, 2, 12, 13, 14, 40, head - 1, head, head + 1, head + 5]
        compared = 0
        for before in odd:
            for after in odd:
                for limit in (1, 7, KEEP, 100):
                    for size in (1, 700, 10**6):
                        args = (ann.id, conv, before, after, limit, size)
                        assert await w.cache.page(*args) == await w.sqlite.page(*args), args
                        assert await w.cache.page(*args, head) == await w.sqlite.page(*args), args
                        compared += 1
        assert compared > 1000
        short = await w.conversation(ann)
        await w.send(short, ann)
        for limit in (1, 2, 3, 100):
            args = (ann.id, short, None, None, limit, 10**6)
            assert await w.cache.page(*args) == await w.sqlite.page(*args)


async def test_an_acknowledged_entry_is_on_the_next_page(tmp_path: Path) -> None:
    async with workers(tmp_path) as (w,):
        ann = await w.user("ann")
        conv = await w.conversation(ann)
        for i in range(60):
            done = await w.send(conv, ann, f"m{i}")
            page = await w.last(conv, ann, hint=1)  # the room is far behind
            assert seqs(page)[-1] == done.seq


async def test_a_replay_uses_cached_entries_up_to_its_end(tmp_path: Path) -> None:
    async with workers(tmp_path) as (w,):
        ann = await w.user("ann")
        conv = await w.conversation(ann)
        head = await w.fill(conv, ann, 80)
        w.calls.clear()
        found = await w.cache.replay(conv, head - 10, head, 100, 10**6)
        assert [e.seq for e in found] == list(range(head - 9, head + 1))
        assert not w.calls
        found = await w.cache.replay(conv, head - 10, head, 3, 10**6)
        assert [e.seq for e in found] == [head - 9, head - 8, head - 7]
        found = await w.cache.replay(conv, 0, head, 10, 10**6)  # long ago
        assert [e.seq for e in found] == list(range(1, 11))
        assert w.calls == {"entries": 1}
        # A read beyond the end asks the store.
        await w.cache.entries(conv, head, 10, 10**6)
        assert w.calls == {"entries": 2}


async def test_a_user_who_is_no_member_sees_nothing_and_costs_one_read(tmp_path: Path) -> None:
    clock = Clock()
    async with workers(tmp_path, clock=clock) as (w,):
        ann, eve = await w.user("ann"), await w.user("eve")
        conv = await w.conversation(ann)
        for name in (conv, "no-such-one"):
            w.calls.clear()
            for _ in range(3):
                with pytest.raises(NotFound):
                    await w.last(name, eve)
            assert w.calls == {"role": 1}
            clock.move(SETTINGS.negative_ttl_ms / 1000 + 0.1)
            with pytest.raises(NotFound):
                await w.last(name, eve)
            assert w.calls == {"role": 2}, "an absent value expires early"
        assert await w.cache.users(["nobody", ann.id, "nobody", ann.id]) == [ann, ann]
        assert await w.cache.token(b"\0" * 32) is None
        assert await w.cache.token(b"\0" * 32) is None
        assert w.calls["token"] == 1


async def test_concurrent_callers_share_one_read(tmp_path: Path) -> None:
    async with workers(tmp_path) as (w,):
        ann = await w.user("ann")
        conv = await w.conversation(ann)
        head = await w.fill(conv, ann, 60)
        await w.cache.add_token(b"t" * 32, ann.id, 2**50, "hash")
        w.cache.on_resync_needed()
        w.calls.clear()
        gate = w.slow.gate("token")
        asked = [asyncio.create_task(w.cache.token(b"t" * 32)) for _ in range(50)]
        await within(gate.reached.wait(), "the one read")
        asked[0].cancel()  # a caller that gives up does not cancel the others
        gate.open.set()
        tokens = await asyncio.gather(*asked[1:])
        assert {t.user for t in tokens if t is not None} == {ann}
        assert w.calls["token"] == 1
        gate = w.slow.gate("entries")
        pages = [asyncio.create_task(w.last(conv, ann, hint=head)) for _ in range(50)]
        await within(gate.reached.wait(), "the one read")
        gate.open.set()
        assert {tuple(seqs(page)) for page in await asyncio.gather(*pages)} == {tuple(range(head - KEEP + 1, head + 1))}
        assert w.calls["entries"] == 1
        assert w.calls["role"] == 1
        await asyncio.gather(*(w.cache.users([ann.id]) for _ in range(50)))
        assert w.calls["users"] == 0, "the read of the token returned the name, too"


async def test_a_failure_reaches_all_waiting_callers_and_no_later_one(tmp_path: Path) -> None:
    async with workers(tmp_path) as (w,):
        ann = await w.user("ann")
        conv = await w.conversation(ann)
        w.cache.on_resync_needed()
        w.slow.down = True
        results = await asyncio.gather(*(w.cache.role(ann.id, conv) for _ in range(5)), return_exceptions=True)
        assert all(isinstance(r, Unavailable) for r in results)
        with pytest.raises(Unavailable):
            await w.last(conv, ann)
        w.slow.down = False
        assert await w.cache.role(ann.id, conv) == "owner"
        assert seqs(await w.last(conv, ann)) == [1, 2]


async def test_values_with_many_hits_are_refreshed_before_they_expire(tmp_path: Path) -> None:
    clock = Clock()
    settings = replace(SETTINGS, refresh=True, role_ttl_ms=30_000, recent_ttl_ms=60_000)
    async with workers(tmp_path, clock=clock, settings=settings) as (w,):
        ann, bob = await w.user("ann"), await w.user("bob")
        conv = await w.conversation(ann, bob)
        head = await w.fill(conv, ann, 60)
        w.cache.on_resync_needed()
        for _ in range(10):
            await w.last(conv, ann, hint=head)
        await w.last(conv, bob, hint=head)
        counts = w.cache.stats()["kinds"]
        clock.move(28)
        await w.last(conv, ann, hint=head)
        await w.last(conv, bob, hint=head)
        await until(
            lambda: w.cache.cached_members.roles.counts.refreshed == 1,
            "the refresh of the role with many hits, and of no other",
        )
        clock.move(27)
        await w.last(conv, ann, hint=head)  # no caller waited, although the old value has expired
        await until(lambda: w.cache.recent.counts.refreshed == 1, "the refresh of the recent entries")
        after = w.cache.stats()["kinds"]
        assert after["roles"]["missed"] == counts["roles"]["missed"]
        clock.move(50)
        await w.last(conv, ann, hint=head)
        assert w.cache.recent.counts.missed == counts["last_entries"]["missed"]


async def test_a_token_that_seems_to_have_expired_is_read_from_the_store(tmp_path: Path) -> None:
    clock = Clock()
    async with workers(tmp_path, 2, clock=clock) as (w, other):
        ann = await w.user("ann")
        soon = int(clock.unix * 1000) + 5_000
        await w.cache.add_token(b"t" * 32, ann.id, soon, "hash")
        assert (await w.cache.token(b"t" * 32)).expires == soon  # type: ignore[union-attr]
        w.hub.lossy = True
        await other.cache.extend_token(b"t" * 32, soon + 60_000)
        clock.move(6)
        assert (await w.cache.token(b"t" * 32)).expires == soon + 60_000  # type: ignore[union-attr]


async def test_the_number_of_members_is_read_once_and_after_each_change(tmp_path: Path) -> None:
    async with workers(tmp_path, 2) as (w, other):
        ann, bob, eve = [await w.user(name) for name in ("ann", "bob", "eve")]
        conv = await w.conversation(ann, bob)
        w.calls.clear()
        for _ in range(3):
            assert await w.cache.member_count(conv) == 2
            assert await w.cache.role(ann.id, conv) == "owner"
        assert w.calls == {"member_count": 1, "role": 1}
        await other.change(conv, ann, eve, "member")
        assert await w.cache.member_count(conv) == 3
        await w.cache.views(ann.id)
        w.cache.on_resync_needed()
        w.calls.clear()
        await w.cache.views(ann.id)
        assert await w.cache.member_count(conv) == 3, "the views had it, too"
        assert await w.cache.member_count("none") == 0
        assert w.calls == {"views": 1, "member_count": 1}


async def test_a_number_of_members_that_is_not_announced_expires(tmp_path: Path) -> None:
    clock = Clock()
    async with workers(tmp_path, 2, clock=clock) as (w, other):
        ann, bob = await w.user("ann"), await w.user("bob")
        channel = await w.conversation(ann, kind="channel")
        assert await w.cache.member_count(channel) == 1
        await other.change(channel, bob, bob, "member")  # no entry
        clock.move(SETTINGS.count_ttl_ms / 1000)
        assert await w.cache.member_count(channel) == 2
