"""Autobahn's cases (through kosoku) against an echo server that is the bare reactor."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 90


def test_autobahn_cases(tmp_path: Path) -> None:
    """All but 9 (performance), 12 and 13 (compression, which is not negotiated)."""
    beside = Path(sys.executable).with_name("kosoku")
    kosoku = str(beside) if beside.exists() else shutil.which("kosoku")
    if kosoku is None:
        pytest.skip("kosoku is not installed")
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.fast.echo", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        done = subprocess.run(
            [kosoku, "-m", "fuzzingclient", address, "-x", "9.*", "-x", "12.*", "-x", "13.*"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "247 cases passed" in done.stdout + done.stderr
        assert server.poll() is None, "the server did not survive"
    finally:
        server.terminate()
        server.wait(PATIENCE_S)
        if server.stdout is not None:
            server.stdout.close()
