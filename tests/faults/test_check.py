"""Each check of the checker, on small logs that are right and wrong."""

from __future__ import annotations

import itertools
import random

import pytest

from . import check
from .plan import BOTH, KINDS, plan
from .record import Broken, Message, Record
from .sender import Sender, Sent
from .stored import Row


def entry(seq: int, cid: str = "", body: str = "") -> Message:
    return {
        "t": "msg", "c": "c", "s": seq, "from": "alice", "ts": 1, "cid": cid or f"cid{seq}", "body": body or f"b{seq}",
    }  # fmt: skip


def rows(*entries: Message) -> dict[str, list[Row]]:
    return {"c": [Row(e["s"], e["from"], e["cid"], e) for e in entries]}


LOG = rows(*(entry(seq) for seq in range(1, 6)))


@pytest.mark.parametrize(
    ("log", "kinds"),
    [
        (LOG, set()),
        (rows(entry(1), entry(3)), {"lost"}),
        (rows(entry(2), entry(3)), {"lost"}),
        (rows(entry(1), entry(2), entry(2, "other")), {"doubled"}),
        (rows(entry(1), entry(2, "cid1")), {"doubled"}),
    ],
)
def test_a_log_is_dense_and_has_each_cid_once(log: dict[str, list[Row]], kinds: set[str]) -> None:
    broken = Broken()
    check.logs_are_dense(log, broken)
    assert set(broken.counts) == kinds


def device() -> Sender:
    """A client that is not connected."""
    return Sender("s0", "alice", "token", list, Broken(), random.Random(0))


async def test_what_was_acknowledged_is_where_it_was_said_to_be() -> None:
    for sent, kinds in (
        ([Sent("c", "cid1", "b1", 0, acked=1, seq=1), Sent("c", "cid2", "b2", 0, acked=1, seq=2)], set()),
        ([Sent("c", "cid9", "b9", 0, acked=1, seq=9)], {"lost"}),
        ([Sent("c", "cid9", "b9", 0)], set()),  # not acknowledged: it may be there, or not
        ([Sent("c", "cid1", "b1", 0, acked=1, seq=2)], {"order"}),
        ([Sent("c", "cid1", "another", 0, acked=1, seq=1)], {"lost"}),
        ([Sent("c", "cid2", "b2", 0, acked=1, seq=2), Sent("c", "cid1", "b1", 0, acked=1, seq=1)], {"order"}),
    ):
        sender, broken = device(), Broken()
        # Messages of the other senders are not looked for here.
        sender.sent = sent
        known = {message.cid for message in sent}
        log = {"c": [row for row in LOG["c"] if row.cid in known]}
        check.sends_are_kept(log, [sender], broken)
        assert set(broken.counts) == kinds, (sent, broken.lines())


async def test_what_nobody_sent_is_seen() -> None:
    broken = Broken()
    check.sends_are_kept(LOG, [device()], broken)
    assert broken.counts["phantom"] == len(LOG["c"])


async def test_a_record_is_the_log_from_where_it_began() -> None:
    for told, kinds in (
        ([entry(3), entry(4), entry(5)], set()),
        ([entry(3), entry(4)], set()),  # that all clients hold everything is checked while they are connected
        ([entry(3), entry(4, body="another")], {"order"}),
        ([entry(3), entry(4), entry(5), entry(6)], {"phantom"}),
    ):
        client, broken = device(), Broken()
        client.record.attached("c", 2)
        for message in told:
            client.record.pushed(message)
        check.records_are_the_log(LOG, [client], broken)
        assert set(broken.counts) == kinds, broken.lines()


def record(after: int = 0) -> Record:
    made = Record("r0", Broken())
    made.attached("c", after)
    return made


def test_an_entry_that_is_not_the_next_is_seen_when_it_comes() -> None:
    for seqs, kinds in (((1, 2, 3), set()), ((1, 1), {"doubled"}), ((1, 3), {"lost"}), ((2,), {"lost"})):
        made = record()
        fine = [made.pushed(entry(seq)) for seq in seqs]
        assert set(made.broken.counts) == kinds
        assert all(fine) is not bool(kinds)


def test_who_resumes_is_told_of_no_less_than_he_holds_and_fills_holes_with_pages() -> None:
    made = record()
    for seq in (1, 2):
        made.pushed(entry(seq))
    assert not made.attached("c", 2)
    assert made.attached("c", 5)  # there is a hole
    made.pushed(entry(6))
    assert not made.page("c", [entry(3), entry(4)])
    assert made.page("c", [entry(5), entry(6)])
    assert made.logs["c"].held == 6
    made.pushed(entry(7))
    assert not made.broken
    made.attached("c", 6)
    assert made.broken.counts["lost"]


def test_a_newest_page_has_what_was_told_before() -> None:
    for page, at, stale in (
        ([4, 5], 5, False),
        ([4, 5, 6], 6, False),
        ([3, 4], 4, True),
        ([3, 5], 5, True),
        ([], 0, True),
    ):
        made = record()
        for seq in range(1, 6):
            made.pushed(entry(seq))
        made.looked("c", 5, [entry(seq) for seq in page], at)
        assert bool(made.broken.counts["stale"]) is stale, (page, at)


def test_a_worker_whose_page_is_not_the_end_of_the_log_is_seen() -> None:
    for page, stale in (([4, 5], False), ([3, 4], True), ([], True)):
        broken = Broken()
        check.pages_are_the_log(LOG, "worker 0", {"c": [entry(seq) for seq in page]}, broken)
        assert bool(broken.counts["stale"]) is stale, page


def test_nobody_may_know_more_than_is_stored() -> None:
    broken = Broken()
    check.nothing_is_ahead({"c": 5}, {"c": 5}, "now", broken)
    assert not broken
    check.nothing_is_ahead({"c": 5}, {"c": 6}, "now", broken)
    assert broken.counts["phantom"]


@pytest.mark.parametrize("backend", BOTH)
def test_a_plan_is_the_same_for_the_same_seed_and_has_every_kind(backend: str) -> None:
    one = plan(backend, 1, 600)
    assert one == plan(backend, 1, 600)
    assert one != plan(backend, 2, 600)
    assert {fault.kind.name for fault in one} == {kind.name for kind in KINDS.values() if backend in kind.backends}
    assert all(later.at > fault.at + fault.kind.lasts_s for fault, later in itertools.pairwise(one))
