"""Workers die in the middle of traffic: nothing acknowledged is lost, nothing is stored or told twice."""

from __future__ import annotations

import os
import signal

from .conftest import Serve
from .traffic import Traffic, with_traffic
from .world import until

KILLS = 20
TALKERS = 20
CONVERSATIONS = 4
# Acknowledged between two kills: each talker gets its turn a few times.
ACKS = 100


async def test_twenty_kills_of_workers_lose_and_repeat_nothing(serve: Serve) -> None:
    server = serve(errors="died: signal 9")
    killed: set[int] = set()

    async def kill_workers(traffic: Traffic) -> None:
        for i in range(KILLS):
            slot = i % server.workers
            # Not one that the last kill has not been replaced yet.
            await until(lambda: len(server.pids()) == server.workers, "both workers are ready")
            await traffic.flow(ACKS)
            pid = server.pids()[slot]
            assert pid not in killed
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)

    traffic = await with_traffic(server, TALKERS, CONVERSATIONS, kill_workers)
    assert len(killed) == KILLS
    assert sum(talker.connects for talker in traffic.talkers) > TALKERS + KILLS, "hardly anybody was hit"
