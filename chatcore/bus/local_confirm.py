"""Who has confirmed which subscriptions: the waits of the local bus for its peers.

Confirmations are numbered: that of one ASK stands for all before it. What is no
longer waited for when its confirmation comes (it was late, or the peer was silent)
is a doubt, since messages may have passed in between; so is the confirmation of a
complete set of subscriptions, which a new or overflowed link begins with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .local_link import Malformed, Peer


class Wait:
    """Subscriptions that wait together; ``peers``: the ASK that each of these still has to confirm."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.peers: dict[Peer, int] = {}
        self.done: asyncio.Future[None] = loop.create_future()
        self.timer: asyncio.TimerHandle | None = None


class Waits:
    """All open waits of one bus, oldest first."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout_s: float, doubt: Callable[[str], None]) -> None:
        self._loop = loop
        self._timeout_s = timeout_s
        self._doubt = doubt
        self._open: list[Wait] = []
        self._asks = 0

    def next_ask(self) -> int:
        """The number of the next ASK, to whichever peer."""
        self._asks += 1
        return self._asks

    def newest(self) -> Wait | None:
        """The wait that ends last, if there is any."""
        return self._open[-1] if self._open else None

    def begin(self, wait: Wait, peers: dict[Peer, int]) -> None:
        """Wait for these, at most for the timeout; nobody: it is over at once."""
        wait.peers = peers
        self._open.append(wait)
        if peers:
            wait.timer = self._loop.call_later(self._timeout_s, self._too_late, wait)
        else:
            self._end(wait)

    def confirmed(self, peer: Peer, id: int) -> None:
        """A confirmation came.

        :raises Malformed: nobody asked for it.
        """
        if id > peer.asked:
            raise Malformed("a confirmation that nobody asked for")
        if peer.greeted and id >= peer.greeted:
            peer.greeted = 0
            peer.late = 0 if peer.late <= id else peer.late
            peer.up = True
            self._doubt(f"the link to {peer.name} is up")
        elif peer.late and id >= peer.late:
            peer.late = 0
            self._doubt(f"{peer.name} confirmed late")
        self.settle(peer, id)

    def settle(self, peer: Peer, upto: int) -> None:
        """Nobody waits any longer for what this peer was asked up to here."""
        for wait in list(self._open):
            if wait.peers.get(peer, upto + 1) <= upto:
                del wait.peers[peer]
                if not wait.peers:
                    self._end(wait)

    def end_all(self) -> None:
        """The bus closes."""
        for wait in list(self._open):
            self._end(wait)

    def _too_late(self, wait: Wait) -> None:
        for peer, id in wait.peers.items():
            peer.late = max(peer.late, id)
        names = ", ".join(peer.name for peer in wait.peers)
        self._end(wait)
        self._doubt(f"not confirmed in time by {names}")

    def _end(self, wait: Wait) -> None:
        self._open.remove(wait)
        if wait.timer is not None:
            wait.timer.cancel()
        if not wait.done.done():
            wait.done.set_result(None)
