"""The load generator's program: compiled when it is first used."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent
#: Ignored by git, removed by ``make clean``.
BUILD = SOURCE.parents[1] / "build" / "perf"
FLAGS = ["-O2", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra"]


def compiler() -> str:
    """The C compiler: ``CC``, or the one that Python was built with."""
    configured = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    return str(configured).split()[0]


def build(sources: list[Path], name: str, flags: list[str] | None = None) -> Path:
    """Compile C sources to a program; one that exists for the same text is taken.

    :raises RuntimeError: with what the compiler says.
    """
    headers = sorted(sources[0].parent.glob("*.h"))
    key = hashlib.sha256(repr(flags or FLAGS).encode())
    for path in [*sources, *headers]:
        key.update(path.read_bytes())
    program = BUILD / f"{name}-{key.hexdigest()[:12]}"
    if program.exists():
        return program
    BUILD.mkdir(parents=True, exist_ok=True)
    # Others may build the same at this moment: the name appears when it is whole.
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        made = Path(folder) / name
        done = subprocess.run(
            [compiler(), *(flags or FLAGS), "-o", made, *sources], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{name} cannot be compiled:\n{done.stderr}")
        made.replace(program)
    return program


def load_program() -> Path:
    """The load generator."""
    return build(sorted(SOURCE.glob("*.c")), "load")
