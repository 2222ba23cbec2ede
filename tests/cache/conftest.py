"""Coroutines among the tests run on the loop that workers use; real Redis servers."""

from __future__ import annotations

import uvloop

from .. import coroutines
from ..services.redis import redis_server, redis_url

__all__ = ["redis_server", "redis_url"]


pytest_pyfunc_call = coroutines.runner(uvloop.new_event_loop)
