"""A circuit breaker: when to stop calling a service that does not answer, and when to try again.

A service that is down costs every caller its whole timeout. A :class:`Breaker` opens after some failures in a
row: it refuses calls at once. After a pause it lets a single call try (half open). If that succeeds, all calls
may pass again; else the pause doubles, up to a bound. The cache and the queue use it for Redis.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from typing import Any, Final

from .backoff import Backoff

#: Failures in a row that open a breaker: more than one slow command, fewer than a burst of them.
FAILURES: Final = 5


class BreakerState(enum.Enum):
    """A closed breaker lets calls pass, an open one refuses them, a half-open one lets a single call try."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """For one service, in one worker. A caller that was allowed reports the end of its call, exactly once::

        if not breaker.allow():
            raise Unavailable(..., retry_after_ms=breaker.retry_after_ms)
        ... breaker.succeeded() / breaker.failed() / breaker.abandoned()

    :param name: of the service, for health and metrics.
    :param failures: failures in a row that open it.
    :param clock: monotonic, in seconds.
    :param on_change: called with the new state, once per change.
    """

    def __init__(
        self,
        name: str,
        *,
        failures: int = FAILURES,
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[BreakerState], None] | None = None,
    ) -> None:
        self.name = name
        self.state = BreakerState.CLOSED
        #: Counters since the start: calls that failed, calls that were refused, and how often it opened.
        self.failures = 0
        self.refused = 0
        self.opened = 0
        self._limit = failures
        self._backoff = backoff or Backoff()
        self._clock = clock
        self._on_change = on_change
        self._in_a_row = 0
        self._until = 0.0
        self._probing = False

    def allow(self) -> bool:
        """Whether to call now. If True, the caller has to report the end of the call."""
        if self.state is BreakerState.CLOSED:
            return True
        if self.state is BreakerState.OPEN and self._clock() >= self._until:
            self._change(BreakerState.HALF_OPEN)
        if self.state is BreakerState.HALF_OPEN and not self._probing:
            self._probing = True
            return True
        self.refused += 1
        return False

    def succeeded(self) -> None:
        """A call got its reply. That closes the breaker even if the call began before it opened."""
        self._in_a_row = 0
        if self.state is not BreakerState.CLOSED:
            self._probing = False
            self._backoff.reset()
            self._change(BreakerState.CLOSED)

    def failed(self) -> None:
        """A call got no reply. While the breaker is open, the call began before; it does not prolong the pause."""
        self.failures += 1
        self._in_a_row += 1
        if self.state is BreakerState.HALF_OPEN or (
            self.state is BreakerState.CLOSED and self._in_a_row >= self._limit
        ):
            self._probing = False
            self._until = self._clock() + self._backoff.next()
            self.opened += 1
            self._change(BreakerState.OPEN)

    def abandoned(self) -> None:
        """A call ended without a result that says anything about the service (it never reached it)."""
        self._probing = False

    @property
    def retry_after_ms(self) -> int:
        """Milliseconds until the next try, at least 1; for ``Unavailable``."""
        return max(1, int((self._until - self._clock()) * 1000)) if self.state is BreakerState.OPEN else 1

    def shown(self) -> dict[str, Any]:
        """State and counters, for JSON."""
        return {"state": self.state.value, "failures": self.failures, "refused": self.refused, "opened": self.opened}

    def _change(self, state: BreakerState) -> None:
        self.state = state
        if self._on_change is not None:
            self._on_change(state)
