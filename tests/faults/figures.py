"""A run as clients saw it: how available it was, and how long they took to recover from each fault."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .device import BY_ITSELF, Device
from .plan import Fault
from .sender import Sender

#: A send is answered in time within this, from when it was due.
DEADLINE_S = 5.0
#: Trouble so long after a fault was repaired may still be its doing.
AFTER_S = 5.0
#: A send that takes longer than this during a fault was hit by it.
HIT_S = 1.0


@dataclass
class Happened:
    """One fault as it happened, in the loop's seconds."""

    fault: Fault
    began: float
    healed: float = 0.0
    skipped: str = ""
    #: How long each client that was hit took to be served again.
    recoveries: list[float] = field(default_factory=list)
    late: int = 0


@dataclass
class Figures:
    """Of a whole run; shares from 0 to 1."""

    sends: int = 0
    late: int = 0
    available: float = 1.0
    sends_without_hosts: int = 0
    late_without_hosts: int = 0
    available_without_hosts: float = 1.0
    connected: float = 1.0
    connected_without_hosts: float = 1.0
    ack_p50_ms: float = 0.0
    ack_p99_ms: float = 0.0
    #: kind -> (times, hit clients, p50, p99, most), in seconds; times that were skipped, and why
    by_kind: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the file of results."""
        return dataclasses.asdict(self)


def share(values: Sequence[float], part: float) -> float:
    """The value that ``part`` of them do not exceed; 0 if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def figure(
    happened: Sequence[Happened], senders: Sequence[Sender], steady: Sequence[Device], began: float, ended: float
) -> Figures:
    """``steady``: the clients that want to be connected all the time, from ``began`` to ``ended``."""
    result = Figures()
    hosts_away = [
        (one.began, one.healed + AFTER_S) for one in happened if one.fault.kind.takes_host and not one.skipped
    ]
    acks: list[float] = []
    for sender in senders:
        for message in sender.sent:
            took = message.acked - message.due if message.acked else DEADLINE_S + 1
            late = took > DEADLINE_S
            acks.append(took)
            result.sends += 1
            result.late += late
            # Due shortly before a fault, it is waited for during it.
            if not any(a - DEADLINE_S <= message.due <= b for a, b in hosts_away):
                result.sends_without_hosts += 1
                result.late_without_hosts += late
    result.available = 1 - result.late / max(1, result.sends)
    result.available_without_hosts = 1 - result.late_without_hosts / max(1, result.sends_without_hosts)
    result.ack_p50_ms, result.ack_p99_ms = 1000 * share(acks, 0.5), 1000 * share(acks, 0.99)
    result.connected = _connected(steady, [(began, ended)])
    result.connected_without_hosts = _connected(steady, list(_between(hosts_away, began, ended)))
    late_ones = _late_deliveries(senders, steady)
    for one, following in itertools.zip_longest(happened, happened[1:]):
        until = max(one.healed, one.began) + AFTER_S
        if following is not None:
            until = min(until, following.began)
        _recover(one, until, senders, steady, late_ones)
    for kind in dict.fromkeys(one.fault.kind.name for one in happened):
        ones = [one for one in happened if one.fault.kind.name == kind]
        recoveries = [seconds for one in ones for seconds in one.recoveries]
        result.by_kind[kind] = {
            "times": sum(not one.skipped for one in ones),
            "skipped": next((one.skipped for one in ones if one.skipped), ""),
            "hit": len(recoveries),
            "p50_s": share(recoveries, 0.5),
            "p99_s": share(recoveries, 0.99),
            "most_s": max(recoveries, default=0.0),
            "late": sum(one.late for one in ones),
        }
    return result


def _between(windows: Iterable[tuple[float, float]], began: float, ended: float) -> Iterable[tuple[float, float]]:
    """The parts of a time outside these windows."""
    at = began
    for a, b in sorted(windows):
        if a > at:
            yield at, min(a, ended)
        at = max(at, b)
    if at < ended:
        yield at, ended


def _connected(devices: Sequence[Device], windows: Sequence[tuple[float, float]]) -> float:
    wanted = sum(b - a for a, b in windows) * len(devices)
    lost = 0.0
    for device in devices:
        for a, b in windows:
            lost += sum(
                max(0.0, min(b, back) - max(a, gone)) for gone, back, code in device.life.gaps if code != BY_ITSELF
            )
    return 1 - lost / wanted if wanted else 1.0


def _late_deliveries(senders: Sequence[Sender], devices: Sequence[Device]) -> list[tuple[str, float, float]]:
    """Deliveries more than HIT_S after the acknowledgement: the receiver, and both times."""
    acked = {
        (message.conv, message.seq): message.acked for sender in senders for message in sender.sent if message.acked
    }
    late: list[tuple[str, float, float]] = []
    for device in devices:
        for conv, log in device.record.logs.items():
            for i, came in enumerate(log.times, log.start + 1):
                since = acked.get((conv, i))
                if since is not None and came > since + HIT_S:
                    late.append((device.name, since, came))
    return late


def _recover(
    one: Happened,
    until: float,
    senders: Sequence[Sender],
    steady: Sequence[Device],
    late: Sequence[tuple[str, float, float]],
) -> None:
    """From when the fault (or, if that was later, what the client missed) began, until the client is served again.

    Whatever begins after ``until`` is not its doing.
    """
    began = one.began
    hit: dict[str, float] = {}
    for device in steady:
        for gone, back, code in device.life.gaps:
            if code != BY_ITSELF and began <= gone <= until:
                hit[device.name] = max(hit.get(device.name, 0.0), back - gone)
    here = {device.name for device in steady if device.name.endswith("(steady)") or device.name.startswith("s")}
    for name, since, came in late:
        # A client that is away or drops its connection by itself waits for other reasons.
        if name in here and began - HIT_S <= since <= until and came > began:
            hit[name] = max(hit.get(name, 0.0), came - max(began, since))
    for sender in senders:
        for message in sender.sent:
            if began - DEADLINE_S <= message.due <= until and message.acked > began:
                took = message.acked - max(began, message.due)
                one.late += message.acked - message.due > DEADLINE_S
                if took > HIT_S:
                    hit[sender.name] = max(hit.get(sender.name, 0.0), took)
    one.recoveries = list(hit.values())
