"""Is the other side still there? When to ask, and when to give up on the socket."""

from __future__ import annotations

from typing import Final

#: Ask for a sign of life when nothing was heard for this long.
QUIET_S: Final = 30.0
#: Without a sign of life after that, the socket is dropped.
PING_TIMEOUT_S: Final = 5.0
#: The server closes after 10 s without ``auth``; it gets a little longer to answer it.
AUTH_TIMEOUT_S: Final = 15.0
#: When something has happened since the last ``sync``, get a new one after this.
SYNC_EVERY_S: Final = 60.0


class Pulse:
    """The silence on one connection. Any message counts as a sign of life."""

    def __init__(self) -> None:
        #: Spread a little by the owner: clients that one restart brought
        #: together would otherwise ask in step for ever.
        self.quiet_s = QUIET_S
        self.opened(0.0)

    def opened(self, now: float) -> None:
        """A new connection."""
        self._heard_at = now
        self._due_s: float | None = None
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

    def asked(self, now: float, due_s: float) -> None:
        """Something was asked that the server answers within ``due_s``."""
        self._asked_at, self._due_s = now, due_s

    def answered(self) -> None:
        """It did."""
        self._due_s = None

    def synced(self, now: float) -> None:
        """A new ``sync`` came."""
        self._synced_at, self._news = now, False

    @property
    def waiting(self) -> bool:
        """Something was asked and not answered yet."""
        return self._due_s is not None

    def dead(self, now: float) -> bool:
        """Nothing was heard for as long as an answer may take."""
        at = self._dead_at()
        return at is not None and now >= at

    def due(self, now: float) -> bool:
        """It is time to ask for a sign of life, or for a new ``sync``."""
        at = self._due_at()
        return at is not None and now >= at

    def wake_at(self, *, asking: bool) -> float | None:
        """When to look again; ``asking`` if a ping may be sent at all."""
        return min((at for at in (self._dead_at(), self._due_at() if asking else None) if at is not None), default=None)

    def _dead_at(self) -> float | None:
        if self._due_s is None or not self._reading:
            return None
        return max(self._asked_at, self._heard_at) + self._due_s

    def _due_at(self) -> float | None:
        if self._due_s is not None:
            return None
        quiet_at = self._heard_at + self.quiet_s
        return min(quiet_at, self._synced_at + SYNC_EVERY_S) if self._news else quiet_at
