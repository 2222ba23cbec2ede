"""``python -m perf.peers.setup``: install and build what the peers need, into this environment and ``.cache/peers``.

What is there already stays, so a second run takes a moment. What cannot be had is left out: one line says what and
why, and the benchmarks go on without it.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .base import find_peers
from .installed import CACHE, CENTRIFUGE, FLOOR, HERE, NODE, Artifact, package, uwebsockets, uwebsockets_library

CFLAGS = ("-O2", "-Wall", "-Wextra")
GO = ("go", "/usr/local/go/bin/go")


class Failed(Exception):
    """It cannot be had; the text is one line."""


def run(command: Sequence[str | Path], folder: Path = HERE, env: dict[str, str] | None = None) -> None:
    """Run a program; `Failed` has the last line that it wrote."""
    ran = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if ran.returncode != 0:
        lines = [line.strip() for line in ran.stdout.splitlines() if line.strip()]
        raise Failed(lines[-1] if lines else f"{command[0]} failed without a word")


def tool(advice: str, *names: str) -> str:
    """The first of these programs that there is."""
    for name in names:
        if (found := shutil.which(name)) is not None:
            return found
    raise Failed(f"{names[0]} is missing: {advice}")


def make(artifact: Artifact, build: Callable[[Path], None]) -> None:
    """Have ``build`` fill a new folder, unless there is one; it appears whole or not at all."""
    if artifact.missing() is None:
        return
    say(f"building {artifact.name}")
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-") as folder:
        new = Path(folder) / "new"
        new.mkdir()
        build(new)
        new.rename(artifact.folder)


def python_packages(requirements: Iterable[str]) -> None:
    """Install what is not there in that very version, each for itself: one that fails spoils no other."""
    failed: list[str] = []
    for requirement in requirements:
        name, _, version = requirement.partition("==")
        if package(name) == version:
            continue
        say(f"installing {requirement}")
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", requirement]
        try:
            run(pip)
        except Failed as error:
            failed.append(f"{requirement}: {error}")
    importlib.invalidate_caches()
    if failed:
        raise Failed("; ".join(failed))


def node_packages(new: Path) -> None:
    """As locked; no package's own install script is run (bufferutil ships what its script would build)."""
    npm = tool("apt install nodejs npm", "npm")
    for source in NODE.sources:
        shutil.copy(source, new)
    run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], new)


def build_centrifuge(new: Path) -> None:
    """With Go, which fetches what go.sum names."""
    go = tool("install Go as go.mod in perf/peers/servers/centrifuge asks for", *GO)
    env = {"CGO_ENABLED": "0", "GOWORK": "off", "GOFLAGS": "-mod=readonly"}
    flags = ["-trimpath", "-buildvcs=false", "-ldflags=-s -w"]
    run([go, "build", *flags, "-o", new / CENTRIFUGE.name, "."], CENTRIFUGE.sources[0].parent, env)


def compile_c(artifact: Artifact, *libraries: Path) -> Callable[[Path], None]:
    """A program of one file."""

    def build(new: Path) -> None:
        cc = tool("apt install build-essential", os.environ.get("CC", "cc"), "cc")
        run([cc, *CFLAGS, "-o", new / artifact.name, *artifact.sources, *libraries])

    return build


def build_uwebsockets() -> None:
    """Linked with the library that socketify ships."""
    library = uwebsockets_library()
    if library is None:
        raise Failed("socketify has no library for this machine")
    make(uwebsockets(), compile_c(uwebsockets(), library))


def services() -> None:
    """MongoDB or its stand-in, and Redis, as the tests use them."""
    try:
        from tests.services.mongodb import URL_VARIABLE, Unavailable, program
        from tests.services.redis import binary
    except ImportError as error:
        raise Failed(f"{error}: pip install -e '.[dev]'") from error
    try:
        if URL_VARIABLE not in os.environ:
            program()
        binary("redis-server")
    except (Unavailable, RuntimeError) as error:
        raise Failed(str(error)) from error


def say(line: str) -> None:
    """Print a line of progress."""
    print(f"  {line}", flush=True)


def main() -> None:
    """Do all steps, then list the peers."""
    lines = (HERE / "requirements.txt").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    steps: list[tuple[str, Callable[[], None]]] = [
        ("Python packages", lambda: python_packages(requirements)),
        ("floor", lambda: make(FLOOR, compile_c(FLOOR))),
        ("uWebSockets", build_uwebsockets),
        ("npm packages", lambda: make(NODE, node_packages)),
        ("Centrifuge", lambda: make(CENTRIFUGE, build_centrifuge)),
        ("MongoDB and Redis for socketio-app", services),
    ]
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for what, step in steps:
            try:
                step()
            except Failed as error:
                say(f"{what} cannot be installed: {error}")
    missing = {name: peer.missing() for name, peer in find_peers().items()}
    print("peers:", ", ".join(name for name, reason in missing.items() if reason is None))
    for name, reason in missing.items():
        if reason is not None:
            print(f"left out: {name}: {reason}")


if __name__ == "__main__":
    main()
