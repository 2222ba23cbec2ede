"""Coroutines among the tests run on the loop that workers use; real Redis servers."""

from __future__ import annotations

import asyncio
import inspect

import pytest
import uvloop

from ..services.redis import redis_server, redis_url

__all__ = ["redis_server", "redis_url"]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(pyfuncitem.obj(**arguments))
    return True
