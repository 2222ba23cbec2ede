"""What is built from a clean source tree works in an empty environment that has only the base dependencies."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from ..server import PATIENCE_S, environment

ROOT = Path(__file__).parents[2]
#: What a source tree needs for a build, beside the folder `chatcore`.
PROJECT_FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")
#: On an idle machine it takes half a minute to compile the native modules and to install the dependencies.
BUILD_TIMEOUT_S = 400

pytestmark = pytest.mark.timeout(2 * BUILD_TIMEOUT_S)


def run(*command: str | Path, cwd: Path, stdin: str = "", timeout_s: float = BUILD_TIMEOUT_S, **env: str) -> str:
    """The output of a command that must succeed; it cannot import chatcore from this source tree."""
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=_clean_environment() | env,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in environment().items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree without anything that a build has left in it."""
    tree = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("*.so", "*.c", "*.html", "__pycache__")
    shutil.copytree(ROOT / "chatcore", tree / "chatcore", ignore=ignored)
    for name in PROJECT_FILES:
        shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist that ``python -m build`` makes, and the wheel, which it builds from the sdist alone.

    It saves time to compile with the Cython of this environment; ``pip install .`` below gets its own, as declared.
    """
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def _native_sources() -> set[str]:
    found = [path for path in (ROOT / "chatcore/_fast").iterdir() if path.suffix in (".pyx", ".pxd", ".pxi", ".h")]
    return {str(path.relative_to(ROOT)) for path in found}


def _python_sources() -> set[str]:
    return {str(path.relative_to(ROOT)) for suffix in ("py", "pyi") for path in ROOT.glob(f"chatcore/**/*.{suffix}")}


def test_the_sdist_has_all_sources_and_nothing_built(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert _native_sources() | _python_sources() | set(PROJECT_FILES) | {"chatcore/py.typed"} <= names
    assert not [name for name in names if name.endswith((".c", ".so", ".pyc"))]
    assert not [name for name in names if name.startswith(("tests", "perf"))]


def test_the_wheel_has_all_modules_and_only_the_package(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    assert _python_sources() | {"chatcore/py.typed"} <= names
    modules = {Path(name).name.partition(".")[0] for name in names if name.endswith(".so")}
    assert modules == {path.stem for path in (ROOT / "chatcore/_fast").glob("*.pyx")}
    assert not [name for name in names if name.endswith(".c")]
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"chatcore"}


def _imported() -> Iterator[str]:
    """The top-level modules that chatcore imports."""
    for path in (ROOT / "chatcore").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


def test_chatcore_imports_each_base_dependency() -> None:
    """A package that only the tests or perf/ use belongs to an extra."""
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[^\w-]", line)[0].lower().replace("_", "-") for line in required}
    providers = packages_distributions()
    used = {name.lower().replace("_", "-") for module in _imported() for name in providers.get(module, ())}
    assert names - used == set()


@pytest.mark.parametrize("what", ["source tree", "wheel"])
def test_it_serves_and_chats_in_an_empty_environment(
    what: str, source: Path, built: tuple[Path, Path], tmp_path: Path
) -> None:
    """``pip install .``, and the wheel; installing the sdist makes the very wheel that ``built`` has made of it."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    bin_ = tmp_path / "venv" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", bin_ / "python")
    run(*pip, "install", built[1] if what == "wheel" else ".", cwd=source)
    run(*pip, "check", cwd=tmp_path)
    installed = run(bin_ / "python", "-c", "import chatcore; print(chatcore.__file__)", cwd=tmp_path)
    assert Path(installed.strip()).is_relative_to(tmp_path / "venv")
    with serving(bin_ / "chatcore", tmp_path) as url:
        for user, history in (("alice", "alice: hello\n"), ("bob", "alice: hello\nbob: hello\n")):
            chat = (bin_ / "chatcore", "chat", "--url", url, "--register", "--user", user, "#lobby")
            state = str(tmp_path / "state" / user)
            said = run(
                *chat,
                cwd=tmp_path,
                stdin="hello\n",
                timeout_s=PATIENCE_S,
                CHATCORE_PASSWORD="correct horse",
                XDG_STATE_HOME=state,
            )
            assert said == history
        listed = run(bin_ / "chatcore", "user", "list", "--data", "data", cwd=tmp_path)
        assert [line.split()[1] for line in listed.splitlines()[1:]] == ["alice", "bob"]


@contextlib.contextmanager
def serving(chatcore: Path, directory: Path) -> Iterator[str]:
    """``chatcore serve`` on data in the directory; yields its URL, and sees that it stops as it should."""
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(
            [chatcore, "serve", "--port", "0", "--workers", "2", "--data", "data"],
            cwd=directory,
            env=_clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            process_group=0,
        )
    try:
        assert server.stdout is not None
        # The first line says where it listens; if the server dies, reading ends, too.
        readable, _, _ = select.select([server.stdout], [], [], PATIENCE_S)
        ready = re.search(r"is ready: 2 workers on (http://\S+)", server.stdout.readline() if readable else "")
        assert ready, (directory / "log").read_text()
        yield ready[1]
        server.terminate()
        assert server.wait(PATIENCE_S) == 0, (directory / "log").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        server.communicate()
