"""Results as a picture (SVG; needs matplotlib, which is in the extra ``perf``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: The plot of each bench: metric, its name, whether the axis is logarithmic.
SHOWN = {
    "fanout": ("cpu_us_per_unit", "server CPU per delivery (µs)", True),
    "send": ("cpu_us_per_unit", "server CPU per acknowledged message (µs)", True),
    "idle": ("rss_bytes_per_conn", "memory per connection (bytes)", True),
    "storm": ("cpu_us_per_unit", "server CPU per resumed session (µs)", False),
    "history": ("p50_ms", "median time of a page (ms)", True),
    "echo": ("cpu_us_per_unit", "server CPU per round trip (µs)", False),
}
BAR_INCHES = 0.16


def draw(result: dict[str, Any], path: Path) -> None:
    """Write it; a result that has no picture is left alone.

    :raises SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("a plot needs matplotlib: make bench-setup, or pip install 'chatcore[perf]'") from None
    matplotlib.use("svg")
    # Texts stay texts, and the same figures give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "chatcore", "font.size": 9})
    from matplotlib import pyplot

    if result["bench"] == "users":
        figure = _ladder(pyplot, result["rows"])
    elif result["bench"] in SHOWN:
        figure = _bars(pyplot, result["rows"], *SHOWN[result["bench"]])
    else:
        return
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def _bars(pyplot: Any, rows: list[dict[str, Any]], metric: str, label: str, logarithmic: bool) -> Any:
    """A block of bars for each case, with the range of the rounds."""
    rows = [row for row in rows if row.get(metric, 0) > 0]
    servers = list(dict.fromkeys(row["server"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(8, 1 + BAR_INCHES * (len(rows) + len(cases))))
    at, ticks = 0.0, []
    for case in cases:
        own = [row for row in rows if row["case"] == case]
        ticks.append(at + (len(own) - 1) / 2)
        for row in own:
            low, high = row["range"][metric]
            spread = [[max(0.0, row[metric] - low)], [max(0.0, high - row[metric])]]
            first = case == next(r["case"] for r in rows if r["server"] == row["server"])
            axes.barh(
                at,
                row[metric],
                0.9,
                xerr=spread,
                color=f"C{servers.index(row['server'])}" if servers.index(row["server"]) < 10 else "0.5",
                label=row["server"] if first else None,
                error_kw={"lw": 0.7},
            )
            at += 1
        at += 1
    axes.set_yticks(ticks, cases)
    axes.invert_yaxis()
    if logarithmic and rows:
        axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    if len(servers) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _ladder(pyplot: Any, rows: list[dict[str, Any]]) -> Any:
    """Response times and processors over the number of users."""
    figure, (times, cores) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 7), height_ratios=(2, 1))
    for i, server in enumerate(dict.fromkeys(row["server"] for row in rows)):
        own = [row for row in rows if row["server"] == server]
        users = [int(row["case"].split()[0]) for row in own]
        times.plot(users, [row["p80_ms"] for row in own], f"C{i}o-", label=f"{server}, p80")
        times.plot(users, [row["p99_ms"] for row in own], f"C{i}.:", label=f"{server}, p99")
        used = [row for row in own if "cpu_cores" in row]
        cores.plot(
            [int(row["case"].split()[0]) for row in used], [row["cpu_cores"] for row in used], f"C{i}o-", label=server
        )
    times.axhline(200, color="0.6", lw=0.8)
    times.set_xscale("log")
    steps = sorted({int(row["case"].split()[0]) for row in rows})
    times.set_xticks(steps, [f"{n:,}" for n in steps])
    cores.tick_params(axis="x", rotation=45)
    times.minorticks_off()
    times.set_yscale("log")
    times.set_ylabel("response time (ms)")
    cores.set_ylabel("processors used")
    cores.set_xlabel("users")
    for axes in (times, cores):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
