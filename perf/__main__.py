"""``python -m perf NAME [options] [--json FILE]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import cache, send

BENCHES: dict[str, Callable[[list[str]], dict[str, Any]]] = {"cache": cache.main, "send": send.main}


def main(argv: list[str]) -> int:
    """Run one benchmark, print its table, write its JSON."""
    if not argv or argv[0] not in BENCHES:
        print(f"usage: python -m perf {{{','.join(BENCHES)}}} [options] [--json FILE]", file=sys.stderr)
        return 2
    name, rest = argv[0], argv[1:]
    path: str | None = None
    if "--json" in rest:
        at = rest.index("--json")
        path = rest[at + 1]
        del rest[at : at + 2]
    result = BENCHES[name](rest)
    host = result["machine"]
    about = f"{host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB, kernel {host['kernel']}"
    print(f"{name}: {about}, {host['date']}")
    for row in result["rows"]:
        print(f"  {row['case']}")
        for key, value in row.items():
            if key != "case":
                print(f"    {key:18} {value}")
    if path is not None:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
