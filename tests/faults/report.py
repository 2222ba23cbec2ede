"""The report: what the last runs showed, made from their results."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from .plan import KINDS
from .run import Result

ROOT = Path(__file__).parents[2]
LOSSES = ("lost", "doubled", "order", "phantom")

ABOUT = """\
**Availability** is the share of messages that were acknowledged within 5 s of when they were due; a message that is
due while its sender is not connected waits, and its waiting counts. *Without faults that take a whole host away*
leaves out what was due from 5 s before such a fault until 5 s after its repair (supervisor killed, host drained,
store killed, stalled, full or failing). **Connected** is the share of the time of all clients that want to be
connected in which they were logged in and caught up; the waits that a draining worker asks for (up to 5 s) count as
absence. **Recovery** is counted from the fault, or from when the client lost its connection if that was later, until
it was served again: connected and caught up, its message acknowledged, or sent what others had been acknowledged.
It is of the clients that were hit: lost their connection, or waited for more than a second.

Clients come back as docs/protocol.md says, but wait at most 4 s between attempts and take 1 s without an answer to a
ping for the end. The two hosts of mongodb-redis are two servers with folders of their own on one machine; a data
folder of sqlite-local belongs to one server, so there it is one host of four workers. MongoDB is FerretDB here, which
reads every document for every query: it sets the numbers of clients and messages, and says nothing about MongoDB's.
Full disks and failing syncs of MongoDB are its own affair; chatcore sees its errors, as when it is killed or stalled.
"""


def _git(*arguments: str) -> str:
    ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return ran.stdout.strip()


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}"


class Results:
    """The last result of each backend and seed, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, result: Result, *, keep: bool) -> str:
        """The result as text, for people; ``keep`` it for the report."""
        kept: dict[str, Any] = {
            "backend": result.backend,
            "seed": result.seed,
            "seconds": result.seconds,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": _machine(),
            "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
            "scale": dataclasses.asdict(result.scale),
            "messages": result.messages,
            "per_s": result.per_s,
            "deliveries": result.deliveries,
            "converged_s": result.converged_s,
            "before": str(result.before),
            "after": str(result.after),
            "knocks": result.knocks,
            "resets": result.resets,
            "filled": result.filled,
            "unacked": result.unacked,
            "broken": dict(result.broken.counts),
            "examples": result.broken.lines(),
            "notes": result.notes,
            "faults": [
                str(one.fault) + (f": skipped, {one.skipped}" if one.skipped else "") for one in result.happened
            ],
            "figures": result.figures.as_json(),
        }
        if keep:
            path = self.folder / f"{result.backend}-{result.seed}.json"
            path.write_text(json.dumps(kept, indent=1))
        return "\n".join(_run(kept))

    def write(self, path: Path) -> None:
        """The report of all that there are."""
        runs = [json.loads(file.read_text()) for file in sorted(self.folder.glob("*.json"))]
        lines = ["# What the faults showed", "", "Made by `make faults`; not to be edited.", "", ABOUT]
        lines += ["| run | messages | per s | lost | doubled | out of order | other | availability | without hosts |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        lines += [_row(run) for run in runs] + [""]
        for run in runs:
            lines += _run(run)
        path.write_text("\n".join(lines) + "\n")


def _percent(value: float) -> str:
    return f"{100 * value:.3f} %"


def _row(run: dict[str, Any]) -> str:
    broken, figures = run["broken"], run["figures"]
    other = sum(count for kind, count in broken.items() if kind not in LOSSES)
    lost = broken.get("lost", 0) + broken.get("phantom", 0)
    cells = [f"{run['backend']}, seed {run['seed']}", run["messages"], f"{run['per_s']:.0f}", lost]
    cells += [broken.get("doubled", 0), broken.get("order", 0), other, _percent(figures["available"])]
    return "| " + " | ".join(map(str, [*cells, _percent(figures["available_without_hosts"])])) + " |"


def _run(run: dict[str, Any]) -> list[str]:
    figures, scale = run["figures"], run["scale"]
    lines = [
        f"## {run['backend']}, seed {run['seed']}",
        "",
        f"{run['date']}, commit {run['commit']}, {run['machine']}. "
        f"{run['seconds']:.0f} s, {len(run['faults'])} faults; "
        f"{scale['conversations']} conversations, {scale['senders']} senders, {scale['receivers']} receivers.",
        "",
        f"- {run['messages']} messages ({run['per_s']:.0f}/s), {run['deliveries']} deliveries, all compared with the "
        f"stored log; {run['filled']} holes too long for a replay were filled with pages. Broken: "
        + (", ".join(f"{kind} {count}" for kind, count in run["broken"].items()) or "nothing"),
        f"- availability {_percent(figures['available'])} ({figures['late']} late), without faults that take a host "
        f"{_percent(figures['available_without_hosts'])} ({figures['late_without_hosts']} late of "
        f"{figures['sends_without_hosts']}); connected {_percent(figures['connected'])}, "
        f"{_percent(figures['connected_without_hosts'])}; an acknowledgement takes {figures['ack_p50_ms']:.0f} ms at "
        f"p50, {figures['ack_p99_ms']:.0f} ms at p99",
        f"- everybody held everything {run['converged_s']:.1f} s after the last fault; {run['knocks']} new connections "
        f"during reloads, {run['resets']} reset",
        f"- in use before: {run['before']}; after: {run['after']}",
        "",
        "| fault | times | clients hit | recovery p50 | p99 | most | late sends |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in figures["by_kind"].items():
        kind = KINDS[name]
        what = f"{kind.what}{' (takes a host)' if kind.takes_host else ''}"
        if one["skipped"]:
            lines.append(f"| {what} | skipped: {one['skipped']} | | | | | |")
        else:
            seconds = " | ".join(f"{one[key]:.2f} s" for key in ("p50_s", "p99_s", "most_s"))
            lines.append(f"| {what} | {one['times']} | {one['hit']} | {seconds} | {one['late']} |")
    lines += ["", *(f"- broken: {line}" for line in run["examples"]), *(f"- {note}" for note in run["notes"]), ""]
    return lines
