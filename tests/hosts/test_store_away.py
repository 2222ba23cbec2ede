"""The store stands still or is killed: sends are refused for now, never acknowledged; nothing is lost or twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from ..e2e.client import Client, Message
from ..e2e.world import new_cid
from .parts import CONVERGE_S, HostTraffic, Pair, Site, crosses, run, says

TALKERS = 6
PAUSE_S = 0.2
#: Short, since every test waits for them.
QUICK = {"store.operation_ms": 1000, "store.server_selection_ms": 1000}
#: How long one waits for the refusal at most: `timeouts.store_ms`.
REFUSED_S = 5.0


@pytest.mark.parametrize("how", ["standing-still", "killed"])
async def test_a_store_that_is_away_acknowledges_nothing_and_loses_nothing(
    make_site: Callable[..., Site], figures: Callable[[str], None], how: str
) -> None:
    site = make_site(settings=QUICK)
    site.need_own_store()
    pair = Pair(site)
    loop = asyncio.get_running_loop()

    async def outage(traffic: HostTraffic) -> None:
        alice, a = await pair.a.pair("alice", on=0)
        bob = await pair.b.user("bob")
        b = await pair.b.connect(bob, on=0)
        # Each worker has a client: see the test below for workers without any.
        await pair.a.connect(alice, on=1)
        await pair.b.connect(bob, on=1)
        conv = await pair.a.group(a, bob)
        await traffic.flow(TALKERS)
        (site.freeze_store if how == "standing-still" else site.mongo.kill)()
        began = loop.time()
        before = traffic.acks
        sends = [(client, {"c": conv, "cid": new_cid(), "body": f"{i}"}) for client in (a, b) for i in range(3)]
        futures = [await client.begin("send", **fields) for client, fields in sends]
        noticed = asyncio.create_task(says(site.servers, store="down", bus="ok"))
        for (client, fields), future in zip(sends, futures, strict=True):
            reply = await client.answer(future)
            assert reply["t"] == "error" and reply["code"] == "unavailable", f"{fields}: {reply}"
            assert reply["retry_after_ms"] > 0
        refused_s = loop.time() - began
        noticed_s = await noticed
        for client in (a, b):
            # Cached pages are still answered; others cannot be.
            reply = await client.answer(await client.begin("history", c=conv))
            assert reply["t"] == "ok" or reply["code"] == "unavailable", reply
        acks = traffic.acks - before
        away = loop.time() - began
        (site.mongo.resume if how == "standing-still" else site.mongo.start)()
        well = await says(site.servers, CONVERGE_S, store="ok", bus="ok")

        async def retry(client: Client, fields: Message) -> int:
            while True:
                reply = await client.answer(await client.begin("send", **fields))
                if reply["t"] == "ok":
                    return int(reply["s"])
                assert reply["code"] == "unavailable", reply
                await asyncio.sleep(reply["retry_after_ms"] / 1000)

        seqs = [await retry(client, fields) for client, fields in sends]
        assert len(set(seqs)) == len(seqs)
        for client in (a, b):
            await client.reach(conv, max(seqs))
        log = await pair.a.whole_log(a, conv)
        stored = {e["cid"]: e["s"] for e in log if e["t"] == "msg"}
        assert stored == {fields["cid"]: seq for (_, fields), seq in zip(sends, seqs, strict=True)}
        for client in (a, b):
            assert client.log(conv) == log[-len(client.log(conv)) :]
        await crosses(a, b, conv)
        await traffic.flow(TALKERS)
        figures(
            f"store {how} for {away:.1f} s: sends refused after {refused_s:.1f} s, all workers say so after"
            f" {noticed_s:.1f} s, {acks} late acks; all parts well in {well:.2f} s"
        )
        assert refused_s < REFUSED_S

    try:
        await run(pair, TALKERS, 2, PAUSE_S, outage)
    finally:
        await pair.aclose()


async def test_a_worker_that_nobody_uses_notices_that_the_store_is_away(make_site: Callable[..., Site]) -> None:
    site = make_site(settings=QUICK)
    site.need_own_store()
    site.freeze_store()
    await says(site.servers, 6.0, store="down", bus="ok")
    site.mongo.resume()
    await says(site.servers, CONVERGE_S, store="ok", bus="ok")
