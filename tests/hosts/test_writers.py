"""Two writers on two hosts hammer one conversation: nothing lost, nothing twice, no hole, and neither starves."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from ..e2e.client import Client
from ..e2e.world import new_cid
from .parts import Pair

#: They write until the slower one has so many messages in.
MESSAGES = 20
#: A writer that gets no more than this share starves (the first race alone may cost one a hundred).
SHARE = 1 / 60


@pytest.mark.parametrize("outstanding", [1, 4])
async def test_two_writers_on_two_hosts_keep_one_dense_log_and_both_get_on(pair: Pair, outstanding: int) -> None:
    _, a = await pair.a.pair("alice")
    bob = await pair.b.user("bob")
    b = await pair.b.connect(bob)
    conv = await pair.a.group(a, bob)
    acked: dict[str, dict[str, int]] = {a.user: {}, b.user: {}}

    def go_on() -> bool:
        counts = [len(sent) for sent in acked.values()]
        return min(counts) < MESSAGES and sum(counts) < MESSAGES / SHARE

    async def hammer(client: Client) -> None:
        while go_on():
            cid = new_cid()
            # Refused after some seconds if it always loses.
            reply = await client.request("send", c=conv, cid=cid, body=f"{client.user} {len(acked[client.user])}")
            acked[client.user][cid] = reply["s"]

    await asyncio.gather(*(hammer(client) for client in (a, b) for _ in range(outstanding)))
    log = await pair.b.whole_log(b, conv)  # sees that the seqs are dense
    stored = [(e["from"], e["cid"], e["s"]) for e in log if e["t"] == "msg"]
    assert sorted(stored) == sorted((user, cid, seq) for user, sent in acked.items() for cid, seq in sent.items())
    for client in (a, b):
        assert await client.reach(conv, log[-1]["s"]) == log[-len(client.log(conv)) :]
    authors = [author for author, _, _ in stored]
    longest = max(len(list(run)) for _, run in itertools.groupby(authors))
    counts = [authors.count(client.user) for client in (a, b)]
    print(f"shares {counts}, longest run of one {longest}")
    assert min(counts) >= MESSAGES, f"one of them starves: {counts}"
