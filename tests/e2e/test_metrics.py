"""Metrics that operators see of the parts: hit ratios, pools, breakers, the health of each."""

from __future__ import annotations

import asyncio
from typing import Any

from .world import World, until


async def test_status_shows_what_the_cache_the_store_and_the_bus_did(world: World) -> None:
    alice, bob = await world.user("alice"), await world.user("bob")
    a = await world.connect(alice, on=0)
    await world.connect(bob, on=1)
    conv = await world.group(a, bob)
    for _ in range(5):
        assert (await a.request("history", c=conv))["t"] == "ok"
    for _ in range(5):
        assert (await world.http("GET", "/v1/me", token=alice.token)).status == 200

    # SQLite is in the same process: what it reads by a key is not remembered a second time.
    shared = world.server.backend.file is None
    kinds = {"last_entries"} | ({"sessions", "profiles", "roles", "member_counts"} if shared else set())

    async def shown() -> dict[str, Any] | None:
        status = await asyncio.to_thread(world.server.ask, "status")
        reads = status["reads"]
        return status if all(reads[kind]["l1"] >= 3 for kind in kinds - {"profiles", "member_counts"}) else None

    status = await until(shown, "the metrics of what was read")
    assert {kind: set(counts) for kind, counts in status["reads"].items()} == {
        kind: {"l1", "l2", "missed", "refreshed", "ratio"} for kind in kinds
    }
    assert (status["store"], status["bus"], status["queue"]) == ("ok", "ok", "ok")
    assert status["cache"] == ("ok" if shared else "none")
    assert sum(worker["metrics"]["bus"]["published"] for worker in status["workers"]) > 0
    for worker in status["workers"]:
        metrics = worker["metrics"]
        assert metrics["bus"]["peers"] == 1
        assert metrics["store"]["name"] == ("mongodb" if shared else "sqlite")
        if shared:
            assert metrics["store"]["pool"]["connections"] > 0
            assert metrics["store"]["commands"]["find"] > 0
            assert {name: breaker["state"] for name, breaker in metrics["breakers"].items()} == {
                "cache": "closed",
                "queue": "closed",
            }
    printed = (await asyncio.to_thread(world.server.ctl, "status")).stdout
    assert f"reads from the cache: {'sessions' if shared else 'last entries'} " in printed
    assert ("connections busy" in printed) is shared
