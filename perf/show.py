"""Results as a table on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .results import METRICS

#: Columns that a table needs, also where output goes to a file.
WIDTH = 170


def heading(result: dict[str, Any]) -> str:
    """The bench, the machine, the date."""
    host = result["machine"]
    about = f"{host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB, kernel {host['kernel']}"
    return f"{result['bench']}: {about}, {host['date']}"


def columns(rows: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """The metrics that occur."""
    return [metric for metric in METRICS if any(metric[0] in row for row in rows)]


def figure(row: dict[str, Any], key: str, decimals: int) -> tuple[str, str]:
    """A median, and its range (empty if there was one round)."""
    if key not in row:
        return "", ""
    low, high = row["range"][key]
    spread = f"{low:,.{decimals}f}-{high:,.{decimals}f}" if row["rounds"] > 1 else ""
    return f"{row[key]:,.{decimals}f}", spread


def show(result: dict[str, Any]) -> None:
    """Print it."""
    console = Console()
    console = Console(width=max(console.width, WIDTH))
    console.print(heading(result), highlight=False)
    rows = result["rows"]
    if rows and "server" not in rows[0]:
        for row in rows:
            console.print(f"  {row['case']}", highlight=False)
            for key, value in row.items():
                if key != "case":
                    console.print(f"    {key:22} {value}", highlight=False, markup=False)
        return
    shown = columns(rows)
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        used = [metric for metric in shown if any(metric[0] in row for row in own)]
        table = Table(title=f"{case}  (per {own[0]['unit']})", title_justify="left", box=None, pad_edge=False)
        table.add_column("server", min_width=16)
        for _, head, _ in used:
            table.add_column(head, justify="right", no_wrap=True)
        table.add_column("to best peer", justify="right")
        for row in own:
            cells = [figure(row, key, decimals) for key, _, decimals in used]
            ratio = row.get("ratio_to_best_peer")
            table.add_row(row["server"], *(c for c, _ in cells), "" if ratio is None else f"{ratio:.2f}")
            if any(spread for _, spread in cells):
                table.add_row("", *(spread for _, spread in cells), "", style="dim")
        console.print(table)
    for server, found in result["versions"].items():
        if isinstance(found, dict):
            console.print(f"{server}: " + ", ".join(f"{k} {v}" for k, v in found.items()), highlight=False)
    for server, raised in result.get("settings", {}).items():
        console.print(f"{server} with " + ", ".join(f"{k} = {v}" for k, v in raised.items()), highlight=False)
    for note in result.get("notes", ()):
        console.print(f"note: {note}", highlight=False, markup=False)
