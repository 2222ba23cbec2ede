"""Imports point one way, as CONTRIBUTING.md says in "Where things are", and no modules import each other in a ring.

The table there is the only list of what may import what. Every import counts, also one inside a function and one for
type checkers only: who reads a module has to know what it names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
PACKAGE: Final = "chatcore"

#: (module, part) that are not allowed and are there still. An entry that is needed no longer fails the test.
KNOWN_IMPORTS: Final[frozenset[tuple[str, str]]] = frozenset()
#: Rings that are there still; likewise.
KNOWN_RINGS: Final[frozenset[frozenset[str]]] = frozenset()
#: What a row may allow without using it yet.
SHARED: Final = frozenset({"common/", "config.py", "entries.py", "errors.py", "protocol.py", "settings.py"})


@dataclass(frozen=True)
class Row:
    """A row of the table: some files or folders, and what these may import besides each other."""

    parts: tuple[str, ...]
    allowed: tuple[str, ...]


def _covers(part: str, path: str) -> bool:
    return path == part or (part.endswith("/") and path.startswith(part))


@cache
def table() -> tuple[Row, ...]:
    """The rows, top to bottom."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    _, found, rest = text.partition("| part | may import | what it answers |\n|---|---|---|\n")
    assert found, "CONTRIBUTING.md has no table of parts"
    rows = []
    for line in rest.split("\n\n")[0].splitlines():
        part, allowed, _ = (cell.strip() for cell in line.strip("|").split("|"))
        rows.append(Row(tuple(re.findall(r"`([^`]+)`", part)), tuple(re.findall(r"`([^`]+)`", allowed))))
    return tuple(rows)


@cache
def row_of(path: str) -> int:
    """The row of a module: the one that names most of its path."""
    covering = [
        (max(len(part) for part in row.parts if _covers(part, path)), i)
        for i, row in enumerate(table())
        if any(_covers(part, path) for part in row.parts)
    ]
    assert covering, f"{path} has no row in CONTRIBUTING.md"
    return max(covering)[1]


@cache
def modules() -> Mapping[str, str]:
    """Dotted names of all modules, and their paths below the package's folder."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        names = list(path.relative_to(ROOT).with_suffix("").parts)
        if names[-1] == "__init__":
            names.pop()
        found[".".join(names)] = path.relative_to(ROOT / PACKAGE).as_posix()
    for path in (ROOT / PACKAGE).rglob("*.pyx"):
        found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path.relative_to(ROOT / PACKAGE).as_posix()
    return found


def imported(name: str, path: str) -> Iterator[str]:
    """The modules of ours that the source of one names, wherever it does."""
    if path.endswith(".pyx"):
        return  # no Python to parse; what they import is looked for as text below
    package = name if path.endswith("__init__.py") else name.rpartition(".")[0]
    for node in ast.walk(ast.parse((ROOT / PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from .a import b`: the module a.b, or a name of a.
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names]
        else:
            continue
        yield from (found for found in names if found.partition(".")[0] == PACKAGE)


@cache
def imports() -> Mapping[str, frozenset[str]]:
    """By path: what each module imports. The version, in the package itself, is everybody's."""
    known = modules()
    graph = {}
    for name, path in known.items():
        if name == PACKAGE:
            continue
        found = set()
        for other in imported(name, path):
            assert other in known, f"{path} imports {other}, which is not there"
            found.add(known[other])
        graph[path] = frozenset(found - {"__init__.py", path})
    return graph


def rings(graph: Mapping[str, Iterable[str]]) -> set[frozenset[str]]:
    """Sets of modules each of which leads to each (the strongly connected components of more than one)."""

    def reachable(start: str, edges: Mapping[str, Iterable[str]]) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            for other in edges.get(ahead.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    ahead.append(other)
        return seen

    backwards: dict[str, set[str]] = {}
    for module, others in graph.items():
        for other in others:
            backwards.setdefault(other, set()).add(module)
    found = set()
    for module in graph:
        ring = reachable(module, graph) & reachable(module, backwards)
        if module in ring:
            found.add(frozenset(ring))
    return found


def test_every_part_of_the_table_is_there() -> None:
    for row in table():
        for part in row.parts:
            assert (ROOT / PACKAGE / part).exists(), f"CONTRIBUTING.md has a row for {part}, which is not there"
            assert part.endswith("/") == (ROOT / PACKAGE / part).is_dir(), f"{part}: a folder ends in /, no file does"
    parts = [part for row in table() for part in row.parts]
    assert len(parts) == len(set(parts)), "a part has two rows"


def test_the_table_points_one_way() -> None:
    """What a row may import stands below it."""
    below = [{part for row in table()[i + 1 :] for part in row.parts} for i in range(len(table()))]
    for i, row in enumerate(table()):
        assert set(row.allowed) <= below[i], f"{row.parts} may import what is not below: {set(row.allowed) - below[i]}"


def test_imports_are_those_of_the_table() -> None:
    wrong = set()
    for module, others in imports().items():
        row = table()[row_of(module)]
        for other in others:
            target = table()[row_of(other)]
            if target is not row and not set(target.parts) & set(row.allowed):
                wrong.add((module, target.parts[0]))
    assert wrong <= KNOWN_IMPORTS, f"not allowed by the table in CONTRIBUTING.md: {sorted(wrong - KNOWN_IMPORTS)}"
    assert wrong >= KNOWN_IMPORTS, f"gone, so no longer to be listed here: {sorted(KNOWN_IMPORTS - wrong)}"


def test_no_row_allows_a_part_that_it_does_not_use() -> None:
    """Otherwise the table says less than it could. The words that all share are anybody's to take up."""
    used = {(row_of(module), row_of(other)) for module, others in imports().items() for other in others}
    for i, row in enumerate(table()):
        for part in set(row.allowed) - SHARED:
            target = next(j for j, other in enumerate(table()) if part in other.parts)
            assert (i, target) in used, f"{row.parts} may import {part} and does not"


def test_the_c_parts_import_nothing_of_ours() -> None:
    for path in sorted((ROOT / PACKAGE / "_fast").iterdir()):
        if path.suffix in (".pyx", ".pxd", ".pyi", ".py"):
            for line in re.findall(r"^\s*(?:from|c?import)\s+.*$", path.read_text(), flags=re.M):
                assert not re.search(r"from \.\.|chatcore(?!\._fast)", line), f"{path.name}: {line.strip()}"


def test_there_is_no_ring() -> None:
    found = rings(imports())
    assert found <= KNOWN_RINGS, f"these import each other: {[sorted(ring) for ring in found - KNOWN_RINGS]}"
    assert found >= KNOWN_RINGS, f"gone, so no longer to be listed: {[sorted(ring) for ring in KNOWN_RINGS - found]}"


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": ["b"], "b": ["c"], "c": []}, []),
        ({"a": ["b"], "b": ["a"]}, ["ab"]),
        ({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]}, ["abc"]),
        ({"a": ["b"], "b": ["a", "c"], "c": ["d"], "d": ["c"]}, ["ab", "cd"]),
    ],
)
def test_a_ring_is_found(graph: dict[str, list[str]], expected: list[str]) -> None:
    assert rings(graph) == {frozenset(ring) for ring in expected}
