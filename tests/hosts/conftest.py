"""Two hosts on services of their own: for all tests of a module that leave them well, or for one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..e2e.conftest import pytest_pyfunc_call, pytest_runtest_makereport
from .parts import Pair, Site

__all__ = ["pytest_pyfunc_call", "pytest_runtest_makereport"]


@pytest.fixture(scope="module")
def common_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Hosts that no test harms."""
    site = Site(tmp_path_factory.mktemp("hosts"))
    try:
        yield site.start()
    finally:
        site.end()


@pytest.fixture
def pair(common_site: Site) -> Pair:
    """Users and clients on the common hosts."""
    return Pair(common_site)


@pytest.fixture
def make_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Makes hosts of this test's own; they are stopped, and looked at, when it is over."""
    sites: list[Site] = []

    def make(*, redis: bool = True, **options: Any) -> Site:
        site = Site(tmp_path / f"site{len(sites)}", **options)
        sites.append(site)
        return site.start(redis=redis)

    yield make
    for site in sites:
        site.end()


@pytest.fixture
def figures(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints what was measured even if the test is well."""

    def show(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {text}", end="", flush=True)

    return show
