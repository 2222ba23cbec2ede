"""Every citation resolves: documents, rules, links, tests and paths that a comment or a document names are there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from chatcore.protocol import CloseCode
from chatcore.settings import Settings

ROOT: Final = Path(__file__).parents[1]
#: Where our text is: folders, and files of the root by their endings.
FOLDERS: Final = ("chatcore", "tests", "perf", "docs", "examples", ".github")
SOURCES: Final = frozenset({".py", ".pyx", ".pxd", ".pyi", ".c", ".h", ".js", ".toml", ".yml", ".yaml", ".md", ".sh"})
SKIPPED: Final = frozenset({"node_modules", "__pycache__", "build"})
#: Documents that were cited once and are no part of the project; the log is in ``docs/``.
FOREIGN: Final = re.compile(r"\b(?:facts|design|roadmap|style)\.md|(?<![/\w])log\.md")
#: Files with such a citation still. An entry that is needed no longer fails the test.
UNFINISHED: Final[frozenset[str]] = frozenset()


@cache
def texts() -> dict[str, str]:
    """All files with text of ours but this one, by their paths."""
    found = [path for path in ROOT.iterdir() if path.is_file() and (path.suffix in SOURCES or path.name == "Makefile")]
    for folder in FOLDERS:
        inside = [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SOURCES and path.is_file()]
        found += [path for path in inside if not SKIPPED & set(path.relative_to(ROOT).parts)]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in found if path != Path(__file__)}


def documents() -> list[str]:
    return [path for path in texts() if path.endswith(".md")]


def cited(pattern: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Where a pattern occurs, a line's end counting as a space (a citation may be broken)."""
    for path, text in texts().items():
        # Without the beginnings of comments.
        flat = re.sub(r"\s*\n\s*(?:#:?|//|\*)?\s*", " ", text)
        for match in re.finditer(pattern, flat):
            yield path, match


@cache
def anchors(document: str) -> frozenset[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```", "", texts()[document], flags=re.M | re.S)
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.M):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return frozenset(found)


def test_there_are_texts() -> None:
    assert {"README.md", "docs/log.md", "chatcore/errors.py", "tests/test_imports.py"} <= set(texts())


def test_every_document_that_is_named_is_there() -> None:
    for path, match in cited(r"\bdocs/[\w./-]+\.md\b"):
        assert (ROOT / match.group()).exists(), f"{path} cites {match.group()}"


def test_no_document_from_elsewhere_is_cited() -> None:
    found = {path for path, _ in cited(FOREIGN.pattern) if path.partition("/")[0] in ("chatcore", "tests", "perf")}
    assert found <= UNFINISHED, f"cite what is not in the repository: {sorted(found - UNFINISHED)}"
    assert found >= UNFINISHED, f"cite nothing of the kind any more: {sorted(UNFINISHED - found)}"


def rules() -> list[str]:
    """The numbers of the rules, as they are in docs/log.md."""
    chapter = texts()["docs/log.md"].partition("\n## Rules\n")[2].partition("\n## ")[0]
    return re.findall(r"^(\d+)\. \*\*", chapter, flags=re.M)


def test_every_rule_that_is_cited_is_there() -> None:
    assert rules() == [str(n) for n in range(1, 9)], "comments cite the rules by these numbers"
    for path, match in cited(r"\b[Rr]ules? (\d+)((?:,? (?:and|to) \d+)*)"):
        # A file that cites several says once whose they are.
        assert path in UNFINISHED or "docs/log.md" in texts()[path] or path == "docs/log.md", f"{path}: whose rule?"
        for number in (match.group(1), *re.findall(r"\d+", match.group(2))):
            assert number in rules(), f"{path} cites rule {number}"


def test_every_promise_that_is_cited_is_there() -> None:
    chapter = texts()["README.md"].partition("\n## What it promises\n")[2].partition("\n## ")[0]
    promises = re.findall(r"^(\d+)\. \*\*", chapter, flags=re.M)
    for path, match in cited(r"\b[Pp]romises? (\d+)"):
        assert match.group(1) in promises, f"{path} cites promise {match.group(1)}"


@pytest.mark.parametrize("document", documents())
def test_every_link_leads_somewhere(document: str) -> None:
    text = re.sub(r"^```.*?^```", "", texts()[document], flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`", lambda code: "" if "](" in code.group() else code.group(), text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / document).parent / file if file else ROOT / document
        assert path.exists(), f"{document}: {target} is not there"
        if anchor:
            name = path.resolve().relative_to(ROOT.resolve()).as_posix()
            assert anchor in anchors(name), f"{document}: {target} leads to no heading"


@pytest.mark.parametrize("document", [path for path in documents() if "/" not in path or path.startswith("docs/")])
def test_every_path_in_a_document_is_there(document: str) -> None:
    if document == "CHANGELOG.md":
        return  # it says what there was
    for path in re.findall(r"`((?:chatcore|tests|perf|examples|docs)/[\w./-]*)", texts()[document]):
        assert (ROOT / path).exists(), f"{document} names {path}"


def test_every_test_that_the_log_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", texts()["docs/log.md"])
    assert len(named) > 30
    for file, name in named:
        assert file in texts(), f"docs/log.md names {file}"
        if name:
            there = re.search(rf"^ *(?:async )?(?:def|class) {name}\b", texts()[file], flags=re.M)
            assert there, f"docs/log.md names {file}::{name}"


def test_every_rule_and_invariant_has_its_tests() -> None:
    _, _, table = texts()["docs/log.md"].partition("\n## Which test shows what\n")
    shown = {row.split("|")[1].strip(): row for row in table.splitlines() if row.startswith("| ")}
    for number in rules():
        assert "::" in shown[f"rule {number}"].split("|")[2], f"no test shows rule {number}"
    invariants = re.findall(r"^- \*\*([^*]+)\.\*\*", texts()["docs/log.md"], flags=re.M)
    assert len(invariants) > 5
    for invariant in invariants:
        named = [row for name, row in shown.items() if invariant.lower() in name.lower()]
        assert named and "::" in named[0].split("|")[2], f"no test shows: {invariant}"


@pytest.mark.parametrize("document", [path for path in documents() if "/" not in path or path.startswith("docs/")])
def test_every_setting_and_close_code_in_a_document_is_there(document: str) -> None:
    if document == "CHANGELOG.md":
        return
    settings = Settings.default()
    groups = "|".join(vars_of(settings))
    for group, name in re.findall(rf"`({groups})\.(\w+)`", texts()[document]):
        # There, `limits.` also begins fields of `hello`; the test of that document knows both.
        if name != "py" and document != "docs/protocol.md":
            assert name in vars_of(getattr(settings, group)), f"{document} names the setting {group}.{name}"
    codes = {int(code) for code in CloseCode} | {1000, 1006}
    for code in re.findall(r"\bwith (\d{4})\b", texts()[document]):
        assert int(code) in codes, f"{document} names the close code {code}"


def vars_of(settings: object) -> list[str]:
    """The names of the groups, or of the settings of one."""
    return [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
