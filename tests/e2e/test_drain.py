"""Draining, reloading and scaling while clients are connected: their close asks them to come back, nothing is lost."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections import Counter
from pathlib import Path

from .conftest import Serve
from .raw import CLOSE, TEXT, Raw, frame
from .traffic import Traffic, with_traffic
from .world import World, new_cid, until


def _wait_ms(reason: str) -> int:
    """The least wait that a close reason sets."""
    match = re.fullmatch(r"restart (\d+)", reason)
    assert match, reason
    return int(match[1])


async def test_1012_tells_when_to_come_back_after_all_that_was_outstanding_is_answered(serve: Serve) -> None:
    server = serve(settings={"server.reconnect_spread_ms": 1500})
    world = World(server)
    try:
        users = [await world.user() for _ in range(6)]
        raws = []
        for i, user in enumerate(users):
            raw = await world.raw(on=i % 2)
            await raw.log_in(user.token)
            raws.append(raw)
        owner = await world.connect(users[0])
        conv = await world.group(owner, *users[1:])
        for raw in raws:
            while (await raw.message("conv"))["c"] != conv:
                pass
        # Each has many requests on the way when the server begins to drain.
        cids = [[new_cid() for _ in range(50)] for _ in users]
        for raw, mine in zip(raws, cids, strict=True):
            sends = [{"t": "send", "id": i + 2, "c": conv, "cid": cid, "body": "x"} for i, cid in enumerate(mine)]
            await raw.send(b"".join(frame(TEXT, json.dumps(send).encode()) for send in sends))
            assert (await raw.frame()).opcode == TEXT  # the first answer or entry: it is at work
        server.signal(signal.SIGTERM)
        acked: dict[str, int] = {}
        waits: list[int] = []
        for raw, mine in zip(raws, cids, strict=True):
            answered: set[int] = set()
            while (received := await raw.frame()).opcode != CLOSE:
                message = received.json
                if message["t"] in ("ok", "error"):
                    answered.add(message["id"])
                    assert message["t"] == "ok", message
                    acked[mine[message["id"] - 2]] = message["s"]
            assert int.from_bytes(received.payload[:2], "big") == 1012
            waits.append(_wait_ms(received.payload[2:].decode()))
            # At most the first answer was read above.
            assert len(answered) >= 49, f"closed with {50 - len(answered)} requests unanswered"
        assert all(0 <= wait <= 1500 for wait in waits)
        assert len(set(waits)) > 1, "they would all come back at once"
        assert (await owner.end()).code == 1012
        assert await asyncio.to_thread(server.wait) == 0
        await asyncio.to_thread(server.start)
        log = await world.whole_log(await world.connect(users[0]), conv)
        stored = {entry["cid"]: entry["s"] for entry in log if entry["t"] == "msg"}
        assert acked.items() <= stored.items()
    finally:
        await world.aclose()


async def test_a_client_that_says_nothing_more_does_not_hold_up_the_drain(serve: Serve) -> None:
    server = serve(settings={"timeouts.close_ms": 300})
    world = World(server)
    try:
        user = await world.user()
        raws = [await world.raw(on=slot) for slot in (0, 1)]
        for raw in raws:
            await raw.log_in(user.token)
        strangers = [await world.raw(on=slot) for slot in (0, 1)]
        begin = asyncio.get_running_loop().time()
        server.signal(signal.SIGTERM)
        for raw in raws + strangers:
            assert (await raw.closing()).code == 1012
            await raw.ended()
        assert await asyncio.to_thread(server.wait) == 0
        assert asyncio.get_running_loop().time() - begin < 10
    finally:
        await world.aclose()


async def test_ctl_drain_stops_the_server_and_its_clients_are_told(serve: Serve) -> None:
    server = serve()
    world = World(server)
    try:
        clients = await world.both_workers(await world.user())
        done = await asyncio.to_thread(server.ctl, "drain")
        assert (done.returncode, done.stderr) == (0, "")
        for client in clients:
            code, reason = await client.end()
            assert code == 1012
            # The faults found it: a client that was one of a few on a worker had to be away for up to 5 s all the
            # same, and its messages waited. There is one client on each worker here.
            assert _wait_ms(reason) <= 50
        assert await asyncio.to_thread(server.wait) == 0
    finally:
        await world.aclose()


async def test_a_reload_under_traffic_loses_nothing_and_tells_everybody_to_come_back(serve: Serve) -> None:
    server = serve()
    before = server.pids()

    async def reload(traffic: Traffic) -> None:
        done = await asyncio.to_thread(server.ctl, "reload")
        assert (done.returncode, done.stderr) == (0, "")

    traffic = await with_traffic(server, 10, 3, reload)
    after = server.pids()
    assert set(after) == set(before)
    assert not set(after.values()) & set(before.values()), "all workers are new"
    closes = [close for talker in traffic.talkers for close in talker.closes]
    assert closes
    assert {code for code, _ in closes} == {1012}, closes
    for _, reason in closes:
        _wait_ms(reason)


async def test_no_connection_is_reset_while_workers_are_replaced(serve: Serve) -> None:
    server = serve()
    world = World(server)
    outcomes: Counter[str] = Counter()
    reloading = True

    async def come_and_go() -> None:
        while reloading:
            raw = await Raw.open(server.address)
            try:
                await raw.upgrade()
                first = await raw.frame()
                if first.opcode == CLOSE:
                    assert int.from_bytes(first.payload[:2], "big") == 1012
                    outcomes["told to come back"] += 1
                else:
                    assert first.json["t"] == "hello"
                    outcomes["welcome"] += 1
            finally:
                raw.close()

    clients = [asyncio.create_task(come_and_go()) for _ in range(8)]
    try:
        for _ in range(2):
            done = await asyncio.to_thread(server.ctl, "reload")
            assert (done.returncode, done.stderr) == (0, "")
        reloading = False
        await asyncio.gather(*clients)
        assert outcomes["welcome"] > 50, outcomes
    finally:
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        await world.aclose()


async def test_a_reload_takes_new_settings(serve: Serve, tmp_path: Path) -> None:
    config = tmp_path / "chatcore.toml"
    config.write_text("[limits]\nhistory = 7\n")
    server = serve(config=config)
    world = World(server)
    try:
        client = await world.open()
        assert client.got(t="hello")[0]["limits"]["history"] == 7
        config.write_text("[limits]\nhistory = 9\n")
        server.signal(signal.SIGHUP)
        assert (await client.end()).code == 1012
        # Both old workers left after both new ones were ready.
        await until(lambda: server.log().count("has left") == 2, "the end of the reload")
        for slot in (0, 1):
            fresh = await world.open(on=slot)
            assert fresh.got(t="hello")[0]["limits"]["history"] == 9
    finally:
        await world.aclose()


async def test_scaling_under_traffic_loses_nothing(serve: Serve) -> None:
    server = serve()

    async def scale(traffic: Traffic) -> None:
        for workers in (4, 1, 2):
            done = await asyncio.to_thread(server.ctl, "scale", workers)
            assert (done.returncode, done.stdout) == (0, f"{workers} workers\n"), done.stderr
            await until(lambda n=workers: len(server.pids()) == n, f"{workers} workers")
            await traffic.flow(50)

    traffic = await with_traffic(server, 10, 3, scale)
    codes = {code for talker in traffic.talkers for code, _ in talker.closes}
    assert codes == {1012}


async def test_status_tells_version_store_bus_and_every_worker(serve: Serve) -> None:
    server = serve()
    world = World(server)
    try:
        user = await world.user()
        for slot in (0, 0, 1):
            await world.connect(user, on=slot)

        async def status() -> dict[str, object]:
            done = await asyncio.to_thread(server.ctl, "status", "--json")
            assert (done.returncode, done.stderr) == (0, "")
            return json.loads(done.stdout)

        async def counted() -> dict[str, object] | None:
            now = await status()
            return now if [w["connections"] for w in now["workers"]] == [2, 1] else None

        now = await until(counted, "both workers' connections are shown")
        assert re.fullmatch(r"\d+\.\d+\.\d+.*", now["version"])
        assert (now["store"], now["bus"]) == ("ok", "ok")
        pids = server.pids()
        for slot, worker in enumerate(now["workers"]):
            assert {"slot", "pid", "state", "connections", "uptime_s"} <= set(worker)
            assert (worker["slot"], worker["pid"], worker["state"]) == (slot, pids[slot], "ready")
            assert worker["uptime_s"] >= 0
        text = await asyncio.to_thread(server.ctl, "status")
        assert text.returncode == 0
        assert str(pids[1]) in text.stdout
    finally:
        await world.aclose()


def test_ctl_without_a_server_is_one_line_and_an_exit_code(serve: Serve) -> None:
    server = serve(start=False)
    for action in (("status",), ("drain",), ("reload",), ("scale", "3")):
        done = server.ctl(*action)
        assert done.returncode != 0
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert str(server.data) in done.stderr
    assert not server.data.exists()
