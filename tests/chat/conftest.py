"""Coroutines among the tests run on the loop that workers use."""

from __future__ import annotations

import uvloop

from .. import coroutines

pytest_pyfunc_call = coroutines.runner(uvloop.new_event_loop)
