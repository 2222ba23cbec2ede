"""A host is killed without a word, or its workers are, or it is to stop while a part does not answer."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import pytest

from ..e2e.client import Client
from ..e2e.world import User, until
from .parts import PRESENCE_S, HostTraffic, Pair, Site, last_told, run, settled

TALKERS = 8
PAUSE_S = 0.1
KILLS = 10
#: Acknowledged between two kills: each talker gets its turn.
ACKS = 8


async def test_who_was_on_a_host_that_died_resumes_on_the_other_or_appears_offline(
    make_site: Callable[..., Site], figures: Callable[[str], None]
) -> None:
    site = make_site()
    pair = Pair(site)
    loop = asyncio.get_running_loop()

    async def die(traffic: HostTraffic) -> None:
        watcher_user, watcher = await pair.b.pair("watcher")
        backs, stays = [[await pair.b.user(name) for _ in range(4)] for name in ("back", "stays")]
        conv = await pair.b.group(watcher, *backs, *stays)
        for user in (*backs, *stays):
            await pair.a.connect(user)
        # Some of the traffic's come back at once, on the other host.
        talker = traffic.roamers[0].user
        owner = await pair.a.connect(talker)
        await owner.request("member", c=traffic.convs[0], user=watcher_user.id, role="member")
        await owner.close()
        await watcher.request("watch", users=[user.id for user in (*backs, *stays, talker)])
        for user in (*backs, *stays, talker):
            await settled(watcher, user.id, "online")
        sent = await pair.b.send(watcher, conv, "before")
        held = {}
        for client in pair.a.clients:
            if client.user in {user.id for user in backs}:
                await client.reach(conv, sent["s"])
                held[client.user] = client.got(t="ready")[-1]["sync"]
        opened = [(user, await pair.b.open()) for user in backs]

        async def come_back(user: User, client: Client) -> None:
            have = {conv: sent["s"]}
            reply = await client.request("auth", v=1, token=user.token, sync=held[user.id], have=have)
            assert reply["full"] is False
            assert [e["s"] for e in await client.reach(conv, missed["s"])] == [missed["s"]]

        site.servers[0].kill()
        died = loop.time()
        missed = await pair.b.send(watcher, conv, "while they were away")
        await asyncio.gather(*(come_back(*one) for one in opened))
        async with asyncio.timeout(PRESENCE_S):
            for user in stays:
                await settled(watcher, user.id, "offline")
        offline_s = loop.time() - died
        # A watcher that comes now is sent the same.
        now = await pair.b.connect(watcher_user)
        await now.request("watch", users=[user.id for user in (*backs, *stays)])
        appear = {user.id: "online" for user in backs} | {user.id: "offline" for user in stays}
        for id, state in appear.items():
            await settled(now, id, state)
        await traffic.flow(3 * TALKERS)
        for user in (*backs, talker):
            assert last_told(watcher, user.id) == "online"
            assert not watcher.got(t="presence", user=user.id, state="offline"), "he was back in time"
        # The host comes back, and knows which users are online.
        await asyncio.to_thread(site.servers[0].start)
        here = await pair.a.connect(watcher_user)
        await here.request("watch", users=[user.id for user in (*backs, *stays)])
        for id, state in appear.items():
            await settled(here, id, state)
        figures(f"a host died: its users appear offline after {offline_s:.1f} s")

    try:
        await run(pair, TALKERS, 2, PAUSE_S, die)
    finally:
        await pair.aclose()


async def test_ten_kills_of_workers_on_both_hosts_lose_and_repeat_nothing(make_site: Callable[..., Site]) -> None:
    site = make_site(errors="died: signal 9")
    pair = Pair(site)
    killed: set[int] = set()

    async def kill_workers(traffic: HostTraffic) -> None:
        for i in range(KILLS):
            server = site.servers[i % 2]
            # Not one that the last kill has not been replaced yet.
            await until(lambda server=server: len(server.pids()) == server.workers, "both workers are ready")
            await traffic.flow(ACKS)
            pid = server.pids()[i // 2 % server.workers]
            assert pid not in killed
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        assert sum(talker.connects for talker in traffic.talkers) > TALKERS + KILLS, "hardly anybody was hit"

    try:
        await run(pair, TALKERS, 2, PAUSE_S, kill_workers)
    finally:
        await pair.aclose()
    assert len(killed) == KILLS


@pytest.mark.parametrize("part", ["redis", "store"])
async def test_a_host_stops_in_time_while_a_part_does_not_answer(make_site: Callable[..., Site], part: str) -> None:
    site = make_site(
        settings={"store.operation_ms": 1000, "store.server_selection_ms": 1000, "server.drain_timeout_ms": 5000}
    )
    pair = Pair(site)
    try:
        _, client = await pair.a.pair("alice")
        other = await pair.a.user("bob")
        await pair.a.send(client, await pair.a.group(client, other))
        if part == "store":
            site.need_own_store()
            site.freeze_store()
        else:
            site.redis.freeze()
        ended = asyncio.create_task(asyncio.to_thread(site.servers[0].stop))  # checks that no worker had to be killed
        assert (await client.end()).code == 1012
        await ended
    finally:
        await pair.aclose()
