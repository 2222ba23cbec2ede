"""``python -m perf NAME [options] [--json FILE] [--plot FILE.svg]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from .show import show

#: Each is a module of this package with a `main`.
BENCHES = ("fanout", "send", "store", "idle", "storm", "history", "users", "echo", "cache", "instructions", "report")

Main = Callable[[list[str]], dict[str, Any]]


def _take(argv: list[str], option: str) -> str | None:
    """The value of an option, which is taken out of the list."""
    if option not in argv:
        return None
    at = argv.index(option)
    if at + 1 == len(argv):
        sys.exit(f"{option} needs a file")
    value = argv[at + 1]
    del argv[at : at + 2]
    return value


def main(argv: list[str]) -> int:
    """Run one benchmark, print its table, write its JSON and its plot."""
    if not argv or argv[0] not in BENCHES:
        print(f"usage: python -m perf {{{','.join(BENCHES)}}} [options] [--json FILE] [--plot FILE.svg]")
        return 2
    name, rest = argv[0], argv[1:]
    file, plot = _take(rest, "--json"), _take(rest, "--plot")
    module = import_module(f"perf.{name}")
    run: Main = module.main
    result = run(rest)
    if name == "report":
        return 0
    # A bench whose figures are of its own kind shows them itself.
    getattr(module, "show", show)(result)
    if file is not None:
        Path(file).write_text(json.dumps(result, indent=2) + "\n")
    if plot is not None:
        from .plot import draw

        draw(result, Path(plot))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
