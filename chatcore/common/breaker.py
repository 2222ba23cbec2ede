"""When to stop asking a part that does not answer, and when to ask it again.

A part that is down costs every caller its whole timeout. A :class:`Breaker` notices after some
failures in a row, refuses at once from then on (open), and after a pause lets a single call try
(half open): if that succeeds everybody may call again, else the pause doubles, up to a bound.
The cache and the queue use it for Redis.
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
    """What a breaker does with a call: let it pass, refuse it, or let one try."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Of one part, in one worker. Whoever is allowed to call reports the end of that call, exactly once::

        if not breaker.allow():
            raise Unavailable(..., retry_after_ms=breaker.retry_after_ms)
        ... breaker.succeeded() / breaker.failed() / breaker.abandoned()

    :param name: of the part, for health and metrics.
    :param failures: in a row, until it opens.
    :param clock: monotonic, in seconds.
    :param on_change: told the new state, once per change.
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
        """Whether to call now. True makes the caller owe a report."""
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
        """A call got its answer. One that began before the breaker opened closes it, too: the part answers."""
        self._in_a_row = 0
        if self.state is not BreakerState.CLOSED:
            self._probing = False
            self._backoff.reset()
            self._change(BreakerState.CLOSED)

    def failed(self) -> None:
        """A call got no answer. While it is open that is old news, and opens it no longer."""
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
        """A call ended without telling anything about the part (it never reached it)."""
        self._probing = False

    @property
    def retry_after_ms(self) -> int:
        """Until the next try, at least 1; for ``Unavailable``."""
        return max(1, int((self._until - self._clock()) * 1000)) if self.state is BreakerState.OPEN else 1

    def shown(self) -> dict[str, Any]:
        """For JSON."""
        return {"state": self.state.value, "failures": self.failures, "refused": self.refused, "opened": self.opened}

    def _change(self, state: BreakerState) -> None:
        self.state = state
        if self._on_change is not None:
            self._on_change(state)
