"""Where the set-up (setup.py) puts what peers need, and whether it is there."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
SERVERS: Final = HERE / "servers"
CACHE: Final = ROOT / ".cache" / "peers"
NOT_SET_UP: Final = "not set up (make bench-setup)"

#: Kinds of processors, as socketify names its libraries.
_MACHINES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder that is made from some files, and made again when they change."""

    name: str
    sources: tuple[Path, ...]
    #: Its other dependencies.
    beside: str = ""

    @property
    def folder(self) -> Path:
        """Named by what it is made from."""
        digest = hashlib.sha256(f"{platform.machine()} {self.beside}".encode())
        for source in self.sources:
            digest.update(source.read_bytes())
        return CACHE / f"{self.name}-{digest.hexdigest()[:12]}"

    @property
    def program(self) -> Path:
        """The program in it, if it is one."""
        return self.folder / self.name

    def missing(self) -> str | None:
        """As `Peer.missing`."""
        return None if self.folder.is_dir() else NOT_SET_UP


FLOOR: Final = Artifact("floor", (SERVERS / "floor.c",))
CENTRIFUGE: Final = Artifact("centrifuge", tuple(SERVERS / "centrifuge" / f for f in ("go.mod", "go.sum", "main.go")))
NODE: Final = Artifact("node", (HERE / "package.json", HERE / "package-lock.json"))


def uwebsockets() -> Artifact:
    """The program that is linked with `uwebsockets_library`."""
    return Artifact("uwebsockets", (SERVERS / "uwebsockets.c",), str(uwebsockets_library()))


def uwebsockets_library() -> Path | None:
    """The library in socketify; None: it is not installed, or has none for this machine."""
    spec = importlib.util.find_spec("socketify")
    if spec is None or spec.origin is None:
        return None
    library = Path(spec.origin).with_name(f"libsocketify_linux_{_MACHINES.get(platform.machine())}.so")
    return library if library.exists() else None


def package(name: str) -> str | None:
    """The version of a Python distribution; None: it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def node_package(name: str) -> Path:
    """The folder of an npm package."""
    return NODE.folder / "node_modules" / name
