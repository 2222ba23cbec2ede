"""``report``: run all benches and write ``perf/REPORT.md`` with tables and plots.

The results are kept in ``build/perf/results``; with ``--again`` the report is written anew from what is there. With
``--only NAME`` one bench is run, and its section alone is replaced: it says when and on which commit it was measured.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from .bench import CONSOLE
from .goals import Goal, goals
from .load.build import BUILD
from .plot import draw
from .show import columns, figure, heading

HERE = Path(__file__).parent
RESULTS = BUILD / "results"
#: All of it takes less than 50 minutes on two cores.
ALL: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("fanout", ("--seconds", "0.8")),
    ("send", ("--rounds", "2", "--seconds", "1.0")),
    ("store", ()),
    ("idle", ("--rounds", "1")),
    ("storm", ()),
    ("history", ("--rounds", "1")),
    ("echo", ()),
    ("users", ("--seconds", "6")),
    ("cache", ("--seconds", "8")),
)
#: They measure a part of chatcore alone, and know no peers.
ALONE = ("cache", "store")
#: It knows no rounds.
WITHOUT_ROUNDS = "cache"


def main(argv: list[str]) -> dict[str, Any]:
    """Run everything, or read what was measured; write the report."""
    p = argparse.ArgumentParser(prog="python -m perf report", description=__doc__)
    p.add_argument("--again", action="store_true", help="from the results that are there")
    p.add_argument("--quick", action="store_true", help="one round of less, for development")
    p.add_argument("--tiny", action="store_true", help="once and smallest, to see that it works")
    p.add_argument("--only", choices=[name for name, _ in ALL], help="this bench; the rest of the report stays")
    p.add_argument("--peers", default="all", help="as in each bench")
    p.add_argument("--tree", action="append", default=[], help="of other checkouts, as in the bench store")
    p.add_argument("--out", type=Path, default=HERE / "REPORT.md")
    args = p.parse_args(argv)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not args.again:
        began = time.monotonic()
        for name, full in ALL:
            if args.only not in (None, name):
                continue
            CONSOLE.print(f"{name} …")
            result = import_module(f"perf.{name}").main(arguments(name, full, args))
            (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        CONSOLE.print(f"everything took {(time.monotonic() - began) / 60:.1f} minutes")
    measured = {name: json.loads(path.read_text()) for name, _ in ALL if (path := RESULTS / f"{name}.json").exists()}
    if not measured:
        raise SystemExit("there are no results yet")
    if args.only:
        replace_section(args.only, measured[args.only], args.out)
    else:
        write(measured, args.out)
    CONSOLE.print(f"wrote {args.out}")
    return {"bench": "report", "machine": next(iter(measured.values()))["machine"], "versions": {}, "rows": []}


def arguments(name: str, full: tuple[str, ...], args: argparse.Namespace) -> list[str]:
    """The command line of one bench."""
    found = [] if name in ALONE else ["--peers", args.peers]
    if name == "store" and args.tree:
        found = [option for tree in (*args.tree, str(HERE.parent)) for option in ("--tree", tree)]
    if args.tiny:
        return [*found, "--tiny"]
    if args.quick:
        return [*found, *(("--seconds", "3") if name == WITHOUT_ROUNDS else ("--quick",))]
    return [*found, *full]


def write(measured: dict[str, dict[str, Any]], out: Path) -> None:
    """The report, and its plots beside it."""
    first = next(iter(measured.values()))
    lines = [
        "# What chatcore costs",
        "",
        "Made by `make bench` (`python -m perf report`); each bench alone: `python -m perf NAME`. Nothing here was",
        "written by hand.",
        "",
        f"Measured on {heading(first).partition(': ')[2]}. Clients and servers share this machine, over loopback. CPU",
        "time and memory are those of the server's processes, seen from outside; a figure is the median of the rounds,",
        "in which the servers take turns, with the least and the most of them below it. Compare figures of one table:",
        "on another machine, or on another day, all of them differ.",
        "",
        "## Goals",
        "",
        "The best peer is, in each line, the one that is best at it.",
        "",
        *goal_table(goals(measured)),
        "",
        *servers(measured),
    ]
    for name, result in measured.items():
        lines += ["", f"## {name}", "", *about(name), *measurements(name, result, out)]
    out.write_text("\n".join(lines) + "\n")


def measurements(name: str, result: dict[str, Any], out: Path) -> list[str]:
    """The plot, the tables and the notes of one bench."""
    plots = out.parent / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    picture = plots / f"{name}.svg"
    picture.unlink(missing_ok=True)
    draw(result, picture)
    if picture.exists():
        lines += ["", f"![{name}](plots/{name}.svg)"]
    lines += tables(result["rows"])
    notes = result.get("notes", [])
    return [*lines, "", *(f"- {note}" for note in notes)] if notes else lines


def replace_section(name: str, result: dict[str, Any], out: Path) -> None:
    """One bench in a report that is there, with its goals."""
    own = [goal for goal in goals({name: result}) if goal.found is not None]
    section = [
        f"## {name}",
        "",
        *about(name),
        "",
        f"This section was measured by itself, on {heading(result).partition(': ')[2]}: "
        + "; ".join(
            f"{server} ({', '.join(f'{what} {version}' for what, version in of.items())})"
            for server, of in result["versions"].items()
        )
        + ".",
        *(["", *goal_table(own)] if own else []),
        *measurements(name, result, out),
    ]
    before, heading_line, rest = (out.read_text() if out.exists() else "").partition(f"\n## {name}\n")
    after = rest.partition("\n## ")[2] if heading_line else ""
    parts = [before.rstrip(), "", *section, *(["", f"## {after.rstrip()}"] if after else [])]
    out.write_text("\n".join(parts).lstrip() + "\n")


def about(name: str) -> list[str]:
    """The docstring of a bench, as Markdown."""
    doc = (import_module(f"perf.{name}").__doc__ or "").strip().replace("``", "`")
    first, _, rest = doc.partition("\n")
    title = first.partition(": ")[2]
    return [title[:1].upper() + title[1:], *rest.splitlines()]


def quantity(value: float) -> str:
    """Three digits that count, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def goal_table(wanted: list[Goal]) -> list[str]:
    """The goals, and the measured values."""
    lines = ["| goal | wanted | measured | |", "|---|---:|---:|---|"]
    for goal in wanted:
        sign = "≥" if goal.at_least else "≤"
        found = "not measured" if goal.found is None else f"{quantity(goal.found)}{goal.unit}"
        mark = "" if goal.found is None else "reached" if goal.reached else "missed"
        lines.append(f"| {goal.what} | {sign} {quantity(goal.limit)}{goal.unit} | {found} | {mark} |")
    return lines


def servers(measured: dict[str, dict[str, Any]]) -> list[str]:
    """The servers that were measured: each one, its versions, and limits that were raised for it."""
    about: dict[str, str] = {}
    found: dict[str, dict[str, str]] = {}
    raised: dict[str, dict[str, str]] = {}
    for name, result in measured.items():
        if name not in (*ALONE, "echo"):
            about |= result.get("about", {})
            found |= result["versions"]
            raised |= result.get("settings", {})
    lines = ["## Servers", "", "| server | what it is | versions | raised limits |", "|---|---|---|---|"]
    for server, text in about.items():
        versions = ", ".join(f"{k} {v}" for k, v in found[server].items())
        limits = ", ".join(f"{k} = {v}" for k, v in raised.get(server, {}).items())
        lines.append(f"| {server} | {text} | {versions} | {limits} |")
    return lines


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """One table for each case."""
    lines: list[str] = []
    if rows and "server" not in rows[0]:
        return _listed(rows)
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        shown = columns(own)
        ratio = any("ratio_to_best_peer" in row for row in own)
        head = ["server", *(name for _, name, _ in shown), *(["to best peer"] if ratio else [])]
        lines += ["", f"**{case}** (per {own[0]['unit']})", "", "| " + " | ".join(head) + " |"]
        lines.append("|---|" + "---:|" * (len(head) - 1))
        for row in own:
            cells = [row["server"]]
            for key, _, decimals in shown:
                middle, spread = figure(row, key, decimals)
                cells.append(f"{middle}<br><sub>{spread}</sub>" if spread else middle)
            cells += [f"{row['ratio_to_best_peer']:.2f}" if "ratio_to_best_peer" in row else ""] if ratio else []
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _listed(rows: list[dict[str, Any]]) -> list[str]:
    """Rows that are not of servers: a table with a column for each."""
    keys = [key for key in rows[0] if key not in ("case", "unit") and not key.endswith("_ratio")]
    lines = ["", "| | " + " | ".join(row["case"] for row in rows) + " |", "|---|" + "---|" * len(rows)]
    lines += [f"| {key} | " + " | ".join(str(row.get(key, "")) for row in rows) + " |" for key in keys]
    return lines
