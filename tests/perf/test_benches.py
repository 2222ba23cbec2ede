"""Each bench works, and writes what its users read. What it measures here says nothing: it is over in a moment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perf.__main__ import BENCHES

ROOT = Path(__file__).parents[2]
PATIENCE_S = 100
#: What each has to say of chatcore, per row.
FIGURES = {
    "fanout": {"units_per_s", "cpu_us_per_unit", "cpu_user_us_per_unit", "cpu_kernel_us_per_unit", "p50_ms", "p99_ms"},
    "send": {"units_per_s", "cpu_us_per_unit", "p50_ms", "p99_ms", "p999_ms", "units_per_cpu_s"},
    "idle": {"rss_bytes_per_conn"},
    "storm": {"cpu_us_per_unit", "p99_ms", "seconds"},
    "history": {"p50_ms", "p99_ms"},
    "users": {"p50_ms", "p80_ms", "p99_ms", "errors", "cpu_cores", "rss_mib"},
    "echo": {"units_per_s", "cpu_us_per_unit", "p50_ms"},
}


def perf(*arguments: object) -> subprocess.CompletedProcess[str]:
    """``python -m perf`` with only chatcore."""
    return subprocess.run(
        [sys.executable, "-m", "perf", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.mark.parametrize("name", FIGURES)
def test_bench(name: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = perf(name, "--tiny", "--peers", "none", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(file.read_text())
    assert result["bench"] == name
    assert result["machine"].keys() >= {"cpu", "cores", "memory_gib", "kernel", "date"}
    assert "chatcore" in result["versions"]
    assert result["rows"]
    for row in result["rows"]:
        assert row.keys() >= {"server", "case", "unit", *FIGURES[name]}, row
        assert row["server"].startswith("chatcore")
        assert row["case"] in done.stdout
        # Memory may shrink, and a short moment may cost less than what is counted in.
        assert all(row[key] >= 0 for key in FIGURES[name] if key != "rss_bytes_per_conn"), row
        assert row.get("errors", 0) == 0, result["notes"]
    assert not [note for note in result["notes"] if "arrived" in note or "came back" in note]


def test_store(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = perf("store", "--tiny", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert {row["server"] for row in rows} == {"chatcore"}
    assert all(row["case"] in done.stdout for row in rows)
    found = {row["case"]: row for row in rows}
    assert found["size, 500 entries"]["file_bytes_per_unit"] > 0
    for batch in (64, 500):
        row = found[f"batches of {batch}, 2,000 entries"]
        # Each message is in the log, and the log is written.
        assert row["write_bytes_per_unit"] > 128
        assert min(row[key] for key in ("units_per_s", "cpu_us_per_unit", "workers_us_per_unit", "p99_ms")) > 0
        assert row["errors"] == 0
    for kind in ("newest page", "page in the middle", "resume after 100 missed", "one message at a time"):
        assert 0 < found[f"{kind}, 500 entries"]["p50_ms"] <= found[f"{kind}, 500 entries"]["p99_ms"]


def test_cache(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = perf("cache", "--tiny", "--json", file)
    if "redis-server is missing" in done.stderr:
        pytest.skip("redis-server is missing")
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["rows"]


@pytest.mark.skipif(shutil.which("vgdb") is None, reason="valgrind is missing")
def test_instructions(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = perf("instructions", "--tiny", "--json", file)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["unit"] for row in rows] == ["send", "send", "delivery"]
    # The kernel may cut a batch in two, but one by one is one by one.
    alone, *together = (row["messages_per_commit"][0] for row in rows)
    assert alone == 1
    assert min(together) > 1
    one, many, delivery = (row["instructions"] for row in rows)
    # A commit is shared, and a delivery is the cheapest.
    assert one > many > delivery > 0
    assert all(row["case"] in done.stdout for row in rows)


def test_all_are_tested() -> None:
    assert set(BENCHES) == {*FIGURES, "cache", "store", "instructions", "report"}


def test_usage() -> None:
    done = perf("nothing")
    assert done.returncode == 2
    assert "usage" in done.stdout
    assert "no peer 'nobody'" in perf("fanout", "--peers", "nobody").stderr
