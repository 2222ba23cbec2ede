"""A test that is a coroutine runs in a loop of its own."""

from __future__ import annotations

from .. import coroutines

pytest_pyfunc_call = coroutines.runner()
