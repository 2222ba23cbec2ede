"""Redis stands still, dies, loses everything, or comes later: sends, acknowledgements and history never stop.

Entries that cross between the hosts meanwhile go through the store. When Redis is back all clients have
everything without another send, and the parts are well again without a restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..e2e.world import until
from .parts import CONVERGE_S, PRESENCE_S, HostTraffic, Pair, Reader, Site, crosses, run, says, settled

TALKERS = 8
CONVERSATIONS = 2
PAUSE_S = 0.3
#: How long Redis stands still (the promise is about just that).
AWAY_S = 10.0
#: The longest time without any acknowledgement; what a busy machine needs for its looks at the store, at most.
GAP_S = 3.0
#: The longest that a page of history takes, and that one talker waits for an acknowledgement and its pause.
WAIT_S = 10.0


class Watched:
    """A client on each host that watches users who come and go on the other while Redis is away."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    async def begin(self) -> None:
        pair = self.pair
        _, self.a = await pair.a.pair("alice", on=0)
        bob = await pair.b.user("bob")
        self.b = await pair.b.connect(bob, on=1)
        self.goes, self.comes, self.ends = [await pair.a.user(name) for name in ("goes", "comes", "ends")]
        self.conv = await pair.a.group(self.a, bob, self.goes, self.comes, self.ends)
        self.leaver = await pair.a.connect(self.goes)
        self.revoked = await pair.a.connect(self.ends)
        await self.b.request("watch", users=[self.goes.id, self.comes.id])
        await settled(self.b, self.goes.id, "online")
        await settled(self.b, self.comes.id, "offline")

    async def change(self) -> None:
        """While Redis is away: one goes, one comes, one is thrown out, all on one host, by the other."""
        await self.leaver.close()
        self.comer = await self.pair.a.connect(self.comes)
        response = await self.pair.b.http("DELETE", "/v1/sessions/current", token=self.ends.token)
        assert response.status in (200, 204)
        assert (await self.revoked.end()).code == 4101
        sent = await self.pair.a.send(self.a, self.conv, "through the store")
        await self.b.expect(t="msg", c=self.conv, s=sent["s"])

    async def see(self) -> None:
        """Redis is back: pushes that are sent at most once cross in both directions, and each user's state is right."""
        await crosses(self.a, self.b, self.conv)
        await crosses(self.b, self.a, self.conv)
        async with asyncio.timeout(PRESENCE_S):
            await settled(self.b, self.comes.id, "online")
            await settled(self.b, self.goes.id, "offline")
        # A watcher that comes now is sent the same.
        states = (await (await self.pair.b.connect(self.comes)).request("watch", users=[self.goes.id]))["states"]
        assert [state["state"] for state in states] == ["offline"]


async def _through_an_outage(
    site: Site, go: Callable[[], None], come: Callable[[], None], least_s: float, show: Callable[[str], None]
) -> None:
    pair = Pair(site)
    loop = asyncio.get_running_loop()
    watched = Watched(pair)
    readers: list[Reader] = []

    async def outage(traffic: HostTraffic) -> None:
        await watched.begin()
        clients = [await world.connect(traffic.talkers[0].user) for world in (pair.a, pair.b)]
        readers.extend(Reader(client, traffic.convs[0]) for client in clients)
        await traffic.flow(TALKERS)
        began = loop.time()
        go()
        noticed = await says(site.servers, bus="down", store="ok")
        await says(site.servers, bus="down", cache="down", queue="down", store="ok")
        printed = await asyncio.to_thread(site.servers[0].ctl, "status")
        assert "bus down, cache down, queue down" in printed.stdout, printed
        if least_s:
            await until(lambda: "not asked for now: " in site.servers[0].ctl("status").stdout, "an open breaker")
        await watched.change()
        # Not only until it was noticed: all the time.
        await traffic.flow(TALKERS)
        await asyncio.sleep(began + least_s - loop.time())
        ended = loop.time()
        gap, wait = traffic.longest_gap(began, ended), traffic.longest_wait(began, ended)
        page = max([await reader.end() for reader in readers])
        # From here on no talker sends.
        await traffic.hush()
        come()
        converged, well = await asyncio.gather(
            traffic.converge(), says(site.servers, CONVERGE_S, bus="ok", store="ok", cache="ok", queue="ok")
        )
        show(
            f"redis away for {ended - began:.1f} s, noticed after {noticed:.1f} s; longest gap between acks"
            f" {gap:.2f} s, for one talker {wait:.2f} s, longest page {page:.2f} s; then all converged in"
            f" {converged:.2f} s, all parts well in {well:.2f} s"
        )
        assert converged < CONVERGE_S
        assert gap < GAP_S
        assert max(wait, page) < WAIT_S
        await watched.see()

    try:
        await run(pair, TALKERS, CONVERSATIONS, PAUSE_S, outage)
    finally:
        for reader in readers:
            await reader.end()
        await pair.aclose()


async def test_redis_standing_still_for_ten_seconds_stops_nothing(
    make_site: Callable[..., Site], figures: Callable[[str], None]
) -> None:
    site = make_site()
    await _through_an_outage(site, site.redis.freeze, site.redis.thaw, AWAY_S, figures)


async def test_redis_killed_and_restarted_empty_stops_nothing(
    make_site: Callable[..., Site], figures: Callable[[str], None]
) -> None:
    site = make_site()

    def come() -> None:
        site.redis.start()

    await _through_an_outage(site, lambda: site.redis.kill(lose_data=True), come, 0, figures)


async def test_redis_that_comes_after_the_hosts_is_used(make_site: Callable[..., Site]) -> None:
    site = make_site(redis=False)
    pair = Pair(site)
    try:
        await says(site.servers, bus="down", store="ok")
        _, a = await pair.a.pair("alice")
        bob = await pair.b.user("bob")
        b = await pair.b.connect(bob)
        conv = await pair.a.group(a, bob)
        for one, other, world in ((a, b, pair.a), (b, a, pair.b)):
            sent = await world.send(one, conv, "without redis")
            await other.expect(t="msg", c=conv, s=sent["s"])
        await a.request("watch", users=[bob.id])
        site.redis.start()
        await says(site.servers, CONVERGE_S, bus="ok", store="ok")
        await crosses(a, b, conv)
        await crosses(b, a, conv)
        async with asyncio.timeout(PRESENCE_S):
            await settled(a, bob.id, "online")
    finally:
        await pair.aclose()
