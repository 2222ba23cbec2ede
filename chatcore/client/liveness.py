"""Whether the server is still there, and when to connect again after a connection was lost.

The rules are those of docs/protocol.md, "Stay alive" and "Come back".
"""

from __future__ import annotations

import random
import re
from typing import Final

#: Ask for a sign of life when nothing was heard for this long.
IDLE_S: Final = 30.0
#: Without a sign of life after that, the socket is dropped.
PING_TIMEOUT_S: Final = 5.0
#: The server closes after 10 s without ``auth``; it gets a little longer to answer it.
AUTH_TIMEOUT_S: Final = 15.0
#: When something has happened since the last ``sync``, get a new one after this.
SYNC_EVERY_S: Final = 60.0

#: The first wait is random between 0 and this, then the range doubles.
RECONNECT_FIRST_S: Final = 1.0
#: No wait is drawn from a larger range.
RECONNECT_MOST_S: Final = 60.0
#: A connection that held this long after ``ready`` resets the count of attempts.
STABLE_S: Final = 60.0
#: The longest wait that a close reason can ask for.
REQUESTED_WAIT_MOST_S: Final = 600.0

_REQUESTED_WAIT: Final = re.compile(r"^\w+ (\d{1,9})$")


class Liveness:
    """The silence on one connection. Any message counts as a sign of life.

    All times are seconds of the core's clock.
    """

    def __init__(self) -> None:
        #: Varied a little by the owner: clients that one restart brought
        #: together would otherwise ask in the same instant for ever.
        self.idle_s = IDLE_S
        self.opened(0.0)

    def opened(self, now: float) -> None:
        """A new connection begins."""
        self._heard_at = now
        self._timeout_s: float | None = None
        self._asked_at = now
        self._reading = True
        self._news = False
        self._synced_at = now

    def heard(self, now: float, *, news: bool) -> None:
        """A message came; ``news`` if the last ``sync`` does not stand for it."""
        self._heard_at = now
        self._news = self._news or news

    def reading(self, yes: bool, now: float) -> None:
        """Whether the socket is being read: silence means nothing while it is not."""
        if yes and not self._reading:
            self._heard_at = now
        self._reading = yes

    def asked(self, now: float, timeout_s: float) -> None:
        """A request went out that a live server answers within ``timeout_s``."""
        self._asked_at, self._timeout_s = now, timeout_s

    def answered(self) -> None:
        """The reply to that request came."""
        self._timeout_s = None

    def synced(self, now: float) -> None:
        """A new ``sync`` came."""
        self._synced_at, self._news = now, False

    @property
    def waiting(self) -> bool:
        """Whether a reply is awaited that shows that the server is there."""
        return self._timeout_s is not None

    def dead(self, now: float) -> bool:
        """Whether nothing was heard for as long as the awaited reply may take."""
        at = self._dead_at()
        return at is not None and now >= at

    def due(self, now: float) -> bool:
        """Whether to send a ping now, for a sign of life or for a new ``sync``."""
        at = self._due_at()
        return at is not None and now >= at

    def wake_at(self, *, may_ping: bool) -> float | None:
        """When to look again; ``may_ping``: whether a ping may be sent at all."""
        due_at = self._due_at() if may_ping else None
        return min((at for at in (self._dead_at(), due_at) if at is not None), default=None)

    def _dead_at(self) -> float | None:
        if self._timeout_s is None or not self._reading:
            return None
        return max(self._asked_at, self._heard_at) + self._timeout_s

    def _due_at(self) -> float | None:
        if self._timeout_s is not None:
            return None
        idle_at = self._heard_at + self.idle_s
        return min(idle_at, self._synced_at + SYNC_EVERY_S) if self._news else idle_at


def requested_wait_s(reason: str) -> float:
    """The wait that a close reason such as ``restart 1500`` (ms) asks for, in seconds; 0 for any other."""
    found = _REQUESTED_WAIT.match(reason)
    return min(int(found[1]) / 1000, REQUESTED_WAIT_MOST_S) if found else 0.0


class ReconnectDelay:
    """Counts failed attempts; each wait is drawn from a range that doubles, down to 0.

    Unlike :class:`chatcore.common.backoff.Backoff` it spreads many clients of one
    server over the whole range, and it starts again only after a stable minute.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.attempt = 0
        self._ready_at: float | None = None

    def ready(self, now: float) -> None:
        """``ready`` came on the connection."""
        self._ready_at = now

    def lost(self, now: float, reason: str) -> float:
        """The connection was lost, or not made: the wait before the next attempt, in seconds.

        The wait that the reason asks for is added to the random one. The larger
        of both would bring all clients back in the same instant whenever it is
        the requested one.
        """
        if self._ready_at is not None and now - self._ready_at >= STABLE_S:
            self.attempt = 0
        self._ready_at = None
        spread = min(RECONNECT_MOST_S, RECONNECT_FIRST_S * 2.0 ** min(self.attempt, 16))
        self.attempt += 1
        return requested_wait_s(reason) + self._rng.uniform(0, spread)
