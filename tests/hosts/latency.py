"""How much longer a delivery takes across two hosts than within one: `python -m tests.hosts.latency`.

A script and no test: it measures, and a busy machine measures itself. Two hosts of two workers each, on
one MongoDB-wire server and one Redis, anew for each round: FerretDB needs the longer the more it holds.
Two conversations have the same number of receivers, spread over the two workers of a host; their sender is
on the first host; the receivers of one are on that host, too, those of the other on the second. Messages go
to them in turn, so that what disturbs one disturbs the other.

A latency is from before the `send` is written until the entry is read by a receiver. Clients and both
hosts share the machine's cores, and FerretDB's time for an append is in it, which is most of it; so what
counts is the difference. "After ok" is from when the sender reads its `ok`: without the append.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from pathlib import Path

from ..e2e.client import Client, Message
from ..e2e.world import World, new_cid
from .parts import Pair, Site

ONE, TWO = "one host ", "two hosts"
#: Messages of a round that do not count.
WARM_UP = 5


class Receiver(Client):
    """Notes when each message came, by its body."""

    came: dict[str, float]

    def _take(self, message: Message) -> None:
        if message["t"] == "msg":
            self.came[message["body"]] = asyncio.get_running_loop().time()
        super()._take(message)


def percentile(values: list[float], p: float) -> float:
    """In ms."""
    return 1000 * sorted(values)[min(len(values) - 1, int(p / 100 * len(values)))]


async def _receivers(world: World, count: int) -> list[Receiver]:
    users = [await world.user(f"r{i}") for i in range(count)]
    receivers: list[Receiver] = []
    for i, user in enumerate(users):
        slot = i % world.server.workers
        while True:
            client = await Receiver.open(world.server.address)
            client.came = {}
            await client.expect(t="hello")
            if world.server.slot_of(client.port) == slot:
                break
            await client.close()
        await client.request("auth", v=1, token=user.token)
        await client.expect(t="ready", sync=...)
        client.user = user.id
        world.clients.append(client)
        receivers.append(client)
    return receivers


async def measure(pair: Pair, receivers: int, messages: int, pause_s: float) -> dict[str, list[tuple[float, float]]]:
    """The latencies of one round, in seconds: from the send, and from its `ok`."""
    loop = asyncio.get_running_loop()
    _, sender = await pair.a.pair("sender", on=0)
    groups = {ONE: await _receivers(pair.a, receivers), TWO: await _receivers(pair.b, receivers)}
    convs: dict[str, str] = {}
    for name, clients in groups.items():
        fields = {"kind": "group", "cid": new_cid(), "members": [client.user for client in clients], "title": name}
        conv = convs[name] = (await sender.request("open", **fields))["c"]
        for client in clients:
            await client.until(lambda client=client, conv=conv: client.got(t="conv", c=conv, after=...), "a conv")
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in groups}
    for i in range(WARM_UP + messages):
        for name, conv in convs.items():
            body = f"{name} {i}"
            began = loop.time()
            await sender.request("send", c=conv, cid=new_cid(), body=body)
            acked = loop.time()
            for client in groups[name]:
                await client.until(lambda client=client, body=body: body in client.came, body)
            if i >= WARM_UP:
                took[name] += [(client.came[body] - began, client.came[body] - acked) for client in groups[name]]
            await asyncio.sleep(pause_s)
    return took


def _line(took: list[tuple[float, float]]) -> str:
    whole, after = [both[0] for both in took], [both[1] for both in took]
    return (
        f"p50 {percentile(whole, 50):6.2f} ms, p90 {percentile(whole, 90):6.2f}, p99 {percentile(whole, 99):6.2f};"
        f" after ok: p50 {percentile(after, 50):6.2f}, p99 {percentile(after, 99):6.2f}"
    )


def report(rounds: list[dict[str, list[tuple[float, float]]]]) -> None:
    """Print what all rounds say together."""
    for name in (ONE, TWO):
        together = [both for took in rounds for both in took[name]]
        print(f"all, {name}: {_line(together)} ({len(together)} deliveries)")
    for which, what in enumerate(("p99", "p99 after ok")):
        p99 = {name: [percentile([both[which] for both in took[name]], 99) for took in rounds] for name in (ONE, TWO)}
        differences = sorted(b - a for a, b in zip(p99[ONE], p99[TWO], strict=True))
        print(
            f"{what}, two hosts minus one, by round: median {statistics.median(differences):+.2f} ms,"
            f" {differences[0]:+.2f} to {differences[-1]:+.2f} (promised: within 10 ms)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--receivers", type=int, default=10, help="of each conversation (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--messages", type=int, default=100, help="of each kind in a round (%(default)s)")
    parser.add_argument("--pause-ms", type=float, default=5, help="between two messages (%(default)s)")
    options = parser.parse_args()

    async def one(site: Site) -> dict[str, list[tuple[float, float]]]:
        pair = Pair(site)
        try:
            return await measure(pair, options.receivers, options.messages, options.pause_ms / 1000)
        finally:
            await pair.aclose()

    rounds: list[dict[str, list[tuple[float, float]]]] = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="chatcore-hosts-") as directory:
            site = Site(Path(directory))
            try:
                site.start()
                rounds.append(asyncio.run(one(site)))
            finally:
                site.end()
        for name, took in rounds[-1].items():
            print(f"round {number + 1}, {name}: {_line(took)}", flush=True)
    report(rounds)


if __name__ == "__main__":
    main()
