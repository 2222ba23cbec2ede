"""The checker: what clients hold and were promised, against the log as it is stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .device import Device
from .record import Broken, Message, digest
from .sender import Sender
from .stored import Row

Logs = Mapping[str, Sequence[Row]]


def logs_are_dense(logs: Logs, broken: Broken) -> None:
    """Each log is 1, 2, 3 … N, and has each (sender, cid) once."""
    for conv, log in logs.items():
        seqs = [row.seq for row in log]
        if seqs != list(range(1, len(log) + 1)):
            twice = len(seqs) - len(set(seqs))
            kind = "doubled" if twice else "lost"
            broken.add(kind, f"{conv} has {len(seqs)} entries, {twice} seqs twice, and ends with {seqs[-1]}")
        sent = {(row.sender, row.cid) for row in log}
        if len(sent) != len(log):
            broken.add(
                "doubled", f"{conv}: {len(log) - len(sent)} entries have a cid that another has", len(log) - len(sent)
            )


def sends_are_kept(logs: Logs, senders: Iterable[Sender], broken: Broken) -> tuple[int, int]:
    """Acknowledged messages are there at their seqs, once; others at most once; a sender's order holds.

    Returns how many were acknowledged, and how many of the others are there.
    """
    acked = landed = 0
    known: set[tuple[str, str, str]] = set()
    by_cid: dict[tuple[str, str, str], list[Row]] = {}
    for conv, log in logs.items():
        for row in log:
            by_cid.setdefault((conv, row.sender, row.cid), []).append(row)
    for sender in senders:
        last: dict[str, int] = {}
        for message in sender.sent:
            key = (message.conv, sender.user, message.cid)
            known.add(key)
            rows = by_cid.get(key, [])
            what = f"{sender.name}: {message.cid} in {message.conv}"
            if len(rows) > 1:
                broken.add("doubled", f"{what} is there {len(rows)} times")
            if not message.acked:
                landed += len(rows)
            else:
                acked += 1
                if not rows:
                    broken.add("lost", f"{what} was acknowledged as {message.seq} and is not there")
                elif rows[0].seq != message.seq:
                    broken.add("order", f"{what} was acknowledged as {message.seq} and is {rows[0].seq}")
                elif rows[0].entry.get("body") != message.body:
                    broken.add("lost", f"{what} has another body")
            if rows:
                if rows[0].seq <= last.get(message.conv, 0):
                    broken.add("order", f"{what} is {rows[0].seq}, the one sent before it {last[message.conv]}")
                last[message.conv] = rows[0].seq
    for key, rows in by_cid.items():
        if rows[0].entry["t"] == "msg" and key not in known:
            broken.add("phantom", f"nobody sent {key}")
    return acked, landed


def records_are_the_log(logs: Logs, devices: Iterable[Device], broken: Broken) -> int:
    """The entries that each client holds are the log from where it began. Returns how many entries were compared."""
    compared = 0
    digests = {conv: [digest(row.entry) for row in log] for conv, log in logs.items()}
    for device in devices:
        for conv, held in device.record.logs.items():
            log = digests.get(conv, [])
            compared += len(held.digests)
            if held.held > len(log):
                broken.add("phantom", f"{device.name} holds {conv} up to {held.held}, stored are {len(log)}")
            told = held.digests.tolist()
            expected = log[held.start : held.held]
            if told[: len(expected)] != expected:
                at = next(i for i, (one, other) in enumerate(zip(told, expected, strict=False)) if one != other)
                broken.add("order", f"{device.name}: entry {held.start + at + 1} of {conv} is not the stored one")
    return compared


def pages_are_the_log(logs: Logs, where: str, pages: Mapping[str, Sequence[Message]], broken: Broken) -> None:
    """Newest pages that a worker gave, from its cache, end where the stored log ends."""
    for conv, page in pages.items():
        expected = [row.entry for row in logs.get(conv, [])[-len(page) :]] if page else []
        if not page or list(page) != expected:
            seqs = [entry["s"] for entry in page]
            told = f"{seqs[0]} to {seqs[-1]}" if seqs else "nothing"
            broken.add("stale", f"{where} tells {told} of {conv}; stored are {len(logs.get(conv, []))}")


def nothing_is_ahead(heads: Mapping[str, int], held: Mapping[str, int], when: str, broken: Broken) -> None:
    """No client was sent, or acknowledged, an entry that is not stored: ``held`` was read before ``heads``."""
    for conv, seq in held.items():
        if seq > heads.get(conv, 0):
            broken.add(
                "phantom", f"{when}: somebody was told of entry {seq} of {conv}, stored are {heads.get(conv, 0)}"
            )
