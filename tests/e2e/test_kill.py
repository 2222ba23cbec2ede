"""Workers die in the middle of traffic: nothing acknowledged is lost, nothing is stored or sent twice."""

from __future__ import annotations

import os
import signal

from .conftest import Serve
from .traffic import Traffic, with_traffic
from .world import World, until

KILLS = 20
TALKERS = 20
CONVERSATIONS = 4
# Acknowledged between two kills: each talker gets its turn a few times, or once where they must be slow.
ACKS = 100


async def test_twenty_kills_of_workers_lose_and_repeat_nothing(serve: Serve) -> None:
    server = serve(errors="died: signal 9")
    acks = TALKERS if server.backend.pace_s else ACKS
    killed: set[int] = set()

    async def kill_workers(traffic: Traffic) -> None:
        for i in range(KILLS):
            slot = i % server.workers
            # Not one that the last kill has not been replaced yet.
            await until(lambda: len(server.pids()) == server.workers, "both workers are ready")
            await traffic.flow(acks)
            pid = server.pids()[slot]
            assert pid not in killed
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)

    traffic = await with_traffic(server, TALKERS, CONVERSATIONS, kill_workers)
    assert len(killed) == KILLS
    assert sum(talker.connects for talker in traffic.talkers) > TALKERS + KILLS, "hardly anybody was hit"


async def test_who_was_on_a_worker_that_died_appears_offline_unless_he_comes_back(serve: Serve) -> None:
    server = serve(errors="died: signal 9")
    world = World(server)
    try:
        _, a = await world.pair(on=0)
        users = [await world.user(name) for name in ("comes-back", "stays-away")]
        await world.group(a, *users)
        states = (await a.request("watch", users=[user.id for user in users]))["states"]
        assert {state["state"] for state in states} == {"offline"}
        for user in users:
            await world.connect(user, on=1)
            await a.expect(t="presence", user=user.id, state="online")
        back = await world.open(on=0)
        os.kill(server.pids()[1], signal.SIGKILL)
        await back.request("auth", v=1, token=users[0].token)
        await back.expect(t="ready", sync=...)
        await a.expect(t="presence", user=users[1].id, state="offline")
        assert not a.got(t="presence", user=users[0].id, state="offline")
        await back.request("ping")
    finally:
        await world.aclose()
