"""Peers and subscriptions of the Redis bus: the other workers, this worker's channels, and their confirmations.

:class:`PeerTable` knows which other workers there are, by their heartbeats, and which of them still have to
answer. :class:`RedisSubscriptions` counts what this worker is subscribed to, and tells Redis at the end of a tick
what changed. When Redis has confirmed subscriptions of announced channels (presence), they are announced to the
peers; `subscribe` returns when every peer has answered, so its caller then knows what the peers know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final

from .base import encode_channels
from .redis_connection import RedisSession
from .redis_packets import Control

#: What a peer's heartbeat can reveal.
NEW: Final = "is there"
LOST: Final = "lost messages"


@dataclass(slots=True)
class PeerState:
    """What is known of another worker. Times are the loop's."""

    name: str
    losses: int
    interval_s: float
    heard: float


class PeerTable:
    """The other workers, as one worker sees them. It does no I/O.

    :param silent_after: a peer counts as gone after so many of its own heartbeat intervals.
    """

    def __init__(self, silent_after: int) -> None:
        self._silent_after = silent_after
        self._peers: dict[str, PeerState] = {}
        self._awaited: dict[int, tuple[set[str], Callable[[], None]]] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._peers)

    @property
    def names(self) -> list[str]:
        """Those that are up."""
        return list(self._peers)

    def hear(self, control: Control, now: float) -> str:
        """A control message came. What it reveals: :data:`NEW`, :data:`LOST`, or ""."""
        peer = self._peers.get(control.name)
        if peer is None:
            self._peers[control.name] = PeerState(control.name, control.losses, control.interval_ms / 1000, now)
            return NEW
        peer.heard = now
        if peer.losses == control.losses:
            return ""
        peer.losses = control.losses
        # An answer may be among what it lost.
        self._release_all(control.name)
        return LOST

    def silent(self, now: float) -> list[str]:
        """Peers that were silent for too long."""
        return [p.name for p in self._peers.values() if now - p.heard > self._silent_after * p.interval_s]

    def forget(self, name: str) -> bool:
        """A peer is gone; whether it was known."""
        known = self._peers.pop(name, None) is not None
        if known:
            self._release_all(name)
        return known

    # --- answers of the peers ---------------------------------------------------------
    def next_number(self) -> int:
        """A number for the next ASK."""
        self._number = (self._number + 1) & 0xFFFFFFFF
        return self._number

    def await_answers(self, number: int, names: Iterable[str], on_done: Callable[[], None]) -> None:
        """Call ``on_done`` when each of these peers has answered or is gone (at once if there are none)."""
        missing = set(names)
        if missing:
            self._awaited[number] = (missing, on_done)
        else:
            on_done()

    def answered(self, name: str, number: int) -> None:
        """A peer has answered."""
        if (awaited := self._awaited.get(number)) is not None:
            awaited[0].discard(name)
            if not awaited[0]:
                del self._awaited[number]
                awaited[1]()

    def stop_awaiting(self, number: int) -> list[str]:
        """Give up waiting for this ASK; the peers that did not answer."""
        awaited = self._awaited.pop(number, None)
        return sorted(awaited[0]) if awaited is not None else []

    def _release_all(self, name: str) -> None:
        for number in list(self._awaited):
            self.answered(name, number)


class _SubscribeBatch:
    """The subscriptions of one tick; the callers of `subscribe` wait for ``done``."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.done: asyncio.Future[None] = loop.create_future()
        self.announced: list[str] = []
        self.number = 0  # of the ASK to the peers; 0: none
        self.timer: asyncio.TimerHandle | None = None
        self.late = ""  # no caller waits any longer: its confirmation calls for a resync, and this says why


class RedisSubscriptions:
    """Of one worker.

    :param confirm_s: how long a caller waits at most.
    :param announce: prefix of the channels whose subscriptions are announced to the peers.
    :param ask_peers: announces subscriptions to all peers; returns the number that their answers will have.
    :param need_resync: messages may have been missed; takes the reason.
    :param flush_soon: asks for one call of :meth:`flush` at the end of the tick.
    """

    def __init__(
        self,
        prefix: bytes,
        confirm_s: float,
        announce: str,
        peers: PeerTable,
        *,
        ask_peers: Callable[[list[str]], int],
        need_resync: Callable[[str], None],
        flush_soon: Callable[[], None],
    ) -> None:
        #: What is wanted: Redis' name of each channel, and ours.
        self.channels: dict[bytes, str] = {}
        self._prefix = prefix
        self._confirm_s = confirm_s
        self._announce = announce
        self._peers = peers
        self._ask_peers = ask_peers
        self._need_resync = need_resync
        self._flush_soon = flush_soon
        self._session: RedisSession | None = None
        self._counts: dict[str, int] = {}
        self._touched: dict[bytes, None] = {}  # for the next flush to compare with what is subscribed
        self._batch: _SubscribeBatch | None = None  # of this tick
        self._unconfirmed: dict[_SubscribeBatch, None] = {}

    def announced(self) -> list[str]:
        """Every subscription that peers have to know."""
        return [channel for channel in self._counts if channel.startswith(self._announce)]

    # --- what is wanted -----------------------------------------------------------
    async def add(self, channels: list[str]) -> None:
        """Subscribe once more to each, and wait for the confirmation; without a session it does not wait.
        A cancelled call subscribed to nothing.

        :raises ValueError: a channel of no or of more than 200 bytes.
        """
        encoded = encode_channels(channels)
        for channel, raw in zip(channels, encoded, strict=True):
            count = self._counts.get(channel, 0)
            self._counts[channel] = count + 1
            if not count:
                self._want(channel, b"%b:%b" % (self._prefix, raw))
        try:
            # A channel that was subscribed before may still be unconfirmed: wait for all batches.
            for batch in list(self._unconfirmed):
                await asyncio.shield(batch.done)
        except asyncio.CancelledError:
            self.remove(channels)
            raise

    def _want(self, channel: str, redis_channel: bytes) -> None:
        self.channels[redis_channel] = channel
        if self._session is not None:
            self._touched[redis_channel] = None
            if self._batch is None:
                self._batch = self._new_batch(self._session.loop)
            if channel.startswith(self._announce):
                self._batch.announced.append(channel)

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
    def connected(self, session: RedisSession, besides: set[bytes]) -> None:
        """A session in which all that was wanted when it began is confirmed, and the channels ``besides``."""
        self._session = session
        changed = self.channels.keys() ^ (session.subscribed - besides)
        if changed:
            self._touched.update(dict.fromkeys(changed))
            self._batch = self._new_batch(session.loop)
            self._batch.late = "subscriptions made while connecting are confirmed"

    def disconnected(self) -> None:
        """End every wait: the next session begins with a resync."""
        self._session = self._batch = None
        self._touched.clear()
        for batch in list(self._unconfirmed):
            self._peers.stop_awaiting(batch.number)
            self._release(batch)

    def flush(self, session: RedisSession) -> None:
        """Tell Redis what changed in this tick."""
        batch, self._batch = self._batch, None
        if self._touched:
            touched = list(self._touched)
            self._touched.clear()
            session.unsubscribe(channel for channel in touched if channel not in self.channels)
            wanted = (channel for channel in touched if channel in self.channels)
            session.subscribe(wanted, partial(self._confirmed, session, batch))
        elif batch is not None:
            self._confirmed(session, batch)

    # --- confirmations -----------------------------------------------------------------
    def _new_batch(self, loop: asyncio.AbstractEventLoop) -> _SubscribeBatch:
        batch = _SubscribeBatch(loop)
        batch.timer = loop.call_later(self._confirm_s, self._time_out, batch)
        self._unconfirmed[batch] = None
        self._flush_soon()
        return batch

    def _confirmed(self, session: RedisSession, batch: _SubscribeBatch | None) -> None:
        """Redis confirmed the subscriptions of a tick."""
        if session is not self._session or batch is None:
            return
        if batch.late:
            self._need_resync(batch.late)
        announced = [channel for channel in batch.announced if channel in self._counts]
        if announced and len(self._peers):
            batch.number = self._ask_peers(announced)
            self._peers.await_answers(batch.number, self._peers.names, partial(self._release, batch))
        else:
            self._release(batch)

    def _time_out(self, batch: _SubscribeBatch) -> None:
        if batch.number:
            names = ", ".join(self._peers.stop_awaiting(batch.number))
            self._need_resync(f"no answer to subscriptions from {names}")
        else:
            batch.late = "subscriptions are confirmed late"
            self._need_resync("subscriptions are not confirmed in time")
        self._release(batch)

    def _release(self, batch: _SubscribeBatch) -> None:
        self._unconfirmed.pop(batch, None)
        if batch.timer is not None:
            batch.timer.cancel()
        if not batch.done.done():
            batch.done.set_result(None)
