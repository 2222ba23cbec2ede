"""The processes of an embedded store, of this tree or another: what a host has, and parts of the bench ``store``.

A store that leaves its writing to one process of the host has to have one, wherever workers are measured without
``chatcore serve``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .processes import Usage, usage

ROOT: Final = Path(__file__).parents[1]
SIDE: Final = Path(__file__).with_name("store_side.py")
STOP_S: Final = 60.0
#: As in the settings of ``serve``.
BATCH: Final = 500
PORTION: Final = 65_536


@dataclass(frozen=True, slots=True)
class Tree:
    """A checkout whose store is measured."""

    path: Path
    name: str

    @property
    def split(self) -> bool:
        """Whether one writer and one indexer serve all workers of a host."""
        return (self.path / "chatcore" / "store" / "sqlite" / "indexer.py").exists()


class Side:
    """A process that runs a part of a tree's store (``store_side.py``)."""

    def __init__(self, tree: Tree, mode: str, plan: Mapping[str, Any]) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("CHATCORE_")}
        self._process = subprocess.Popen(
            # Not as a module of this package: `chatcore` has to be that of the tree.
            [sys.executable, "-P", str(SIDE), mode, json.dumps(plan)],
            cwd=tree.path,
            env=env | {"PYTHONPATH": str(tree.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._what = f"{mode} of {tree.name}"

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def answer(self) -> Any:
        """The next line that it says.

        :raises RuntimeError: it has ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._what} ended with {self._process.wait(STOP_S)}")
        return json.loads(line)

    def go(self) -> None:
        """Let it begin, or go on."""
        assert self._process.stdin is not None
        self._process.stdin.write("true\n")
        self._process.stdin.flush()

    def usage(self) -> Usage:
        """The usage of this process."""
        return usage([self.pid], [])

    def close(self) -> None:
        """End it.

        :raises RuntimeError: it had to be killed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise RuntimeError(f"{self._what} does not end") from None
        finally:
            self._process.stdout.close()


def copy(data: Path, to: Path) -> None:
    """Copy a data folder, but for the sockets of its processes."""
    shutil.copytree(data, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    (to / "run").mkdir(exist_ok=True)


OWN: Final = Tree(ROOT, "chatcore")


@contextlib.contextmanager
def side(tree: Tree, mode: str, plan: Mapping[str, Any]) -> Iterator[Side]:
    """A process that is ready, and is ended behind it."""
    process = Side(tree, mode, plan)
    try:
        process.answer()
        yield process
    finally:
        process.close()


@contextlib.contextmanager
def host(tree: Tree, data: Path, *, batch: int = BATCH, portion: int = PORTION) -> Iterator[tuple[Side, ...]]:
    """The processes that a host has besides its workers: writer and indexer, or none."""
    plan = {"data": str(data), "batch": batch, "portion": portion}
    with contextlib.ExitStack() as stack:
        yield tuple(stack.enter_context(side(tree, mode, plan)) for mode in ("writer", "indexer") if tree.split)
