"""A wall clock of our own for the processes under test: the machine's, which all processes share, stays as it is."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("clock.c")


class Clock:
    """``environment`` makes a process obey it; ``jump`` moves it for all of them at once."""

    def __init__(self, folder: Path) -> None:
        """:raises RuntimeError: there is no C compiler."""
        self._library = folder / "clock.so"
        compiler = os.environ.get("CC", "cc")
        try:
            subprocess.run(
                [compiler, "-shared", "-fPIC", "-O1", "-o", str(self._library), str(SOURCE), "-ldl"],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
        except (OSError, subprocess.CalledProcessError) as exc:
            raise RuntimeError(f"the clock of the faults cannot be compiled with {compiler}: {exc}") from exc
        self._path = folder / "clock"
        self._path.write_bytes(bytes(8))
        with self._path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 8)
        self.ahead_s = 0.0

    @property
    def environment(self) -> dict[str, str]:
        """To be added to that of a process."""
        return {"LD_PRELOAD": str(self._library), "FAULTS_CLOCK": str(self._path)}

    def jump(self, seconds: float) -> None:
        """Forwards, or back."""
        self.ahead_s += seconds
        self._page[:8] = struct.pack("=q", int(self.ahead_s * 1e6))

    def close(self) -> None:
        """The processes that obey it must be gone."""
        self._page.close()
