"""Tests that are coroutines: each runs in a loop of its own."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable

import pytest


def runner(
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> Callable[[pytest.Function], bool | None]:
    """The hook ``pytest_pyfunc_call`` of a folder; ``loop_factory``: another loop than asyncio's."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
        if not inspect.iscoroutinefunction(pyfuncitem.obj):
            return None
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(pyfuncitem.obj(**arguments))
        return True

    return pytest_pyfunc_call
