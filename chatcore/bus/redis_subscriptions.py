"""What a worker is subscribed to on the Redis bus, and who waits for it to be confirmed.

Counted; changed in Redis at the end of a tick, by what is wanted then. Subscriptions of
announced channels (presence) are told to the peers once Redis has confirmed them, and are
complete when every peer has answered: whoever subscribed then knows what they know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from .redis_frames import MAX_CHANNEL_BYTES
from .redis_peers import Peers
from .redis_session import Session


class _Asking:
    """The subscriptions of one tick, and whoever waits for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.done: asyncio.Future[None] = loop.create_future()
        self.announced: list[str] = []
        self.number = 0  # of the question to the peers; 0: not asked
        self.timer: asyncio.TimerHandle | None = None
        self.late = ""  # nobody waits any longer: its confirmation is a doubt, and this says why


class Subscriptions:
    """Of one worker.

    :param confirm_s: how long anybody waits.
    :param announce: begin of the channels that peers are told of.
    :param ask_peers: tells all peers of subscriptions; the number that their answers will have.
    :param doubt: something may have been missed, and why.
    :param flush_soon: asks for one call of :meth:`flush` at the end of the tick.
    """

    def __init__(
        self,
        prefix: bytes,
        confirm_s: float,
        announce: str,
        peers: Peers,
        *,
        ask_peers: Callable[[list[str]], int],
        doubt: Callable[[str], None],
        flush_soon: Callable[[], None],
    ) -> None:
        #: What is wanted, as Redis calls it, and its name.
        self.channels: dict[bytes, str] = {}
        self._prefix = prefix
        self._confirm_s = confirm_s
        self._announce = announce
        self._peers = peers
        self._ask_peers = ask_peers
        self._doubt = doubt
        self._flush_soon = flush_soon
        self._session: Session | None = None
        self._counts: dict[str, int] = {}
        self._touched: dict[bytes, None] = {}  # to be looked at by the next flush
        self._asking: _Asking | None = None  # of this tick
        self._unconfirmed: dict[_Asking, None] = {}

    def announced(self) -> list[str]:
        """Every subscription that peers are to know."""
        return [channel for channel in self._counts if channel.startswith(self._announce)]

    # --- what is wanted -----------------------------------------------------------
    async def add(self, channels: list[str]) -> None:
        """Subscribe once more to each, and wait; without a session for nothing. If cancelled: not subscribed.

        :raises ValueError: a channel of no or of more than 200 bytes.
        """
        encoded = [channel.encode() for channel in channels]
        for raw in encoded:
            if not 0 < len(raw) <= MAX_CHANNEL_BYTES:
                raise ValueError(f"channel of {len(raw)} bytes: 1 to {MAX_CHANNEL_BYTES} are allowed")
        for channel, raw in zip(channels, encoded, strict=True):
            count = self._counts.get(channel, 0)
            self._counts[channel] = count + 1
            if not count:
                self._want(channel, b"%b:%b" % (self._prefix, raw))
        try:
            # What is known already may still be unconfirmed: so all that is.
            for asking in list(self._unconfirmed):
                await asyncio.shield(asking.done)
        except asyncio.CancelledError:
            self.remove(channels)
            raise

    def _want(self, channel: str, redis_channel: bytes) -> None:
        self.channels[redis_channel] = channel
        if self._session is not None:
            self._touched[redis_channel] = None
            if self._asking is None:
                self._asking = self._ask_later(self._session.loop)
            if channel.startswith(self._announce):
                self._asking.announced.append(channel)

    def remove(self, channels: list[str]) -> None:
        """Take back one subscription of each; unknown ones are ignored."""
        for channel in channels:
            count = self._counts.get(channel, 0)
            if count > 1:
                self._counts[channel] = count - 1
            elif count:
                del self._counts[channel]
                redis_channel = b"%b:%b" % (self._prefix, channel.encode())
                del self.channels[redis_channel]
                if self._session is not None:
                    self._touched[redis_channel] = None
                    self._flush_soon()

    # --- the connection -------------------------------------------------------------
    def connected(self, session: Session, besides: set[bytes]) -> None:
        """A session in which what was wanted when it was made is confirmed; and some channels ``besides``."""
        self._session = session
        changed = self.channels.keys() ^ (session.subscribed - besides)
        if changed:
            self._touched.update(dict.fromkeys(changed))
            self._asking = self._ask_later(session.loop)
            self._asking.late = "subscriptions made while connecting are confirmed"

    def disconnected(self) -> None:
        """Nobody waits any longer: the doubt comes with the next session."""
        self._session = self._asking = None
        self._touched.clear()
        for asking in list(self._unconfirmed):
            self._peers.excuse(asking.number)
            self._release(asking)

    def flush(self, session: Session) -> None:
        """Tell Redis what changed in this tick."""
        asking, self._asking = self._asking, None
        if self._touched:
            touched = list(self._touched)
            self._touched.clear()
            session.unsubscribe(channel for channel in touched if channel not in self.channels)
            wanted = (channel for channel in touched if channel in self.channels)
            session.subscribe(wanted, partial(self._confirmed, session, asking))
        elif asking is not None:
            self._confirmed(session, asking)

    # --- who waits -------------------------------------------------------------------
    def _ask_later(self, loop: asyncio.AbstractEventLoop) -> _Asking:
        asking = _Asking(loop)
        asking.timer = loop.call_later(self._confirm_s, self._too_late, asking)
        self._unconfirmed[asking] = None
        self._flush_soon()
        return asking

    def _confirmed(self, session: Session, asking: _Asking | None) -> None:
        """Redis confirmed the subscriptions of a tick."""
        if session is not self._session or asking is None:
            return
        if asking.late:
            self._doubt(asking.late)
        announced = [channel for channel in asking.announced if channel in self._counts]
        if announced and len(self._peers):
            asking.number = self._ask_peers(announced)
            self._peers.owe(asking.number, self._peers.names, partial(self._release, asking))
        else:
            self._release(asking)

    def _too_late(self, asking: _Asking) -> None:
        if asking.number:
            self._doubt(f"no answer to subscriptions from {', '.join(self._peers.excuse(asking.number))}")
        else:
            asking.late = "subscriptions are confirmed late"
            self._doubt("subscriptions are not confirmed in time")
        self._release(asking)

    def _release(self, asking: _Asking) -> None:
        self._unconfirmed.pop(asking, None)
        if asking.timer is not None:
            asking.timer.cancel()
        if not asking.done.done():
            asking.done.set_result(None)
