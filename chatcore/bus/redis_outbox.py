"""What a worker publishes in a tick: collected, bounded, and written at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from .redis_frames import MAX_CHANNEL_BYTES, MAX_PAYLOAD_BYTES, ONE, packets, record
from .redis_session import RedisBusStats, Session

log = logging.getLogger(__name__)

#: What a message weighs in the queue besides its payload.
MESSAGE_BYTES: Final = 100


class Outbox:
    """Messages of one tick. The bound counts them, and what the kernel has not taken of earlier ones.

    Over the bound everything is dropped until half of it is free again, so that receivers get what
    had fitted, in order, and then learn (by :attr:`losses`) that something is missing.

    :param sender: what packets of this worker begin with.
    :param flush_soon: asks for one call of :meth:`flush` at the end of the tick.
    """

    def __init__(
        self, prefix: bytes, sender: bytes, queue_bytes: int, stats: RedisBusStats, flush_soon: Callable[[], None]
    ) -> None:
        #: Times at which something that this worker published may have got lost on its side.
        self.losses = 0
        self.overflowed = False
        self._prefix = prefix
        self._sender = sender
        self._queue_bytes = queue_bytes
        self._stats = stats
        self._flush_soon = flush_soon
        self._session: Session | None = None
        self._messages: dict[str, list[bytes]] = {}
        self._records: dict[bytes, list[bytes]] = {}  # for channels of workers, as Redis calls them
        self._queued = 0  # bytes in both, and, when last looked, in the links
        self._unsent = 0  # the part of it in the links
        self._limit = -1  # without a session, or while overflowed: one comparison on the hot path

    def connected(self, session: Session) -> None:
        """From now on messages are taken."""
        self._session = session
        self._limit = self._queue_bytes

    def disconnected(self) -> None:
        """Drop everything, from now on, too. What was sent and not answered may be lost as well."""
        self._stats.dropped += sum(map(len, self._messages.values()))
        self._messages.clear()
        self._records.clear()
        self._session = None
        self._queued = self._unsent = 0
        self._limit = -1
        self.overflowed = False
        self.losses += 1

    # --- what goes in ---------------------------------------------------------
    def publish(self, channel: str, payload: bytes) -> None:
        """A message for all who subscribed. Hot."""
        queued = self._queued + len(payload) + MESSAGE_BYTES
        if queued > self._limit or len(payload) > MAX_PAYLOAD_BYTES:
            if not self._has_room(channel, payload):
                return
            queued = self._queued + len(payload) + MESSAGE_BYTES
        self._queued = queued
        messages = self._messages.get(channel)
        if messages is None:
            self._messages[channel] = [payload]
            self._flush_soon()
        else:
            messages.append(payload)

    def send(self, to: bytes, channel: str, payload: bytes) -> None:
        """A message by the channel of a worker."""
        if self._has_room(channel, payload):
            self._queued += len(payload) + MESSAGE_BYTES
            self._add(to, record(channel.encode(), payload))

    def control(self, to: bytes, body: bytes) -> None:
        """A control message. Not bounded by the queue, which it is to unlock; nothing without a session."""
        if self._session is not None:
            self._add(to, record(b"", body))

    def _add(self, to: bytes, one: bytes) -> None:
        self._records.setdefault(to, []).append(one)
        self._flush_soon()

    def _has_room(self, channel: str, payload: bytes) -> bool:
        """The slow look: Redis may have taken something since the last one. False: dropped."""
        session = self._session
        if len(payload) > MAX_PAYLOAD_BYTES or len(channel.encode()) > MAX_CHANNEL_BYTES:
            log.error("a message of %d bytes for channel %.40s is over the limit", len(payload), channel)
            self.losses += 1
        elif session is not None and not self.overflowed:
            self._queued -= self._unsent
            self._unsent = session.unsent
            self._queued += self._unsent
            if self._queued + len(payload) + MESSAGE_BYTES <= self._queue_bytes:
                return True
            self.overflowed = True
            self._limit = -1
            self._flush_soon()
            log.warning("redis bus: redis takes nothing, messages of this worker are dropped")
        self._stats.dropped += 1
        return False

    # --- what goes out ----------------------------------------------------------
    def flush(self, session: Session) -> bool:
        """Hand everything to the session's links. True: an overflow is over, and the receivers are to be told."""
        sender = self._sender
        for channel, payloads in self._messages.items():
            redis_channel = b"%b:%b" % (self._prefix, channel.encode())
            if len(payloads) == 1:
                session.publish(redis_channel, b"%b%c%b" % (sender, ONE, payloads[0]))
            else:
                for packet in packets(sender, [record(b"", payload) for payload in payloads]):
                    session.publish(redis_channel, packet)
        self._messages.clear()
        for redis_channel, records in self._records.items():
            for packet in packets(sender, records):
                session.publish(redis_channel, packet)
        self._records.clear()
        session.flush()
        self._queued = self._unsent = session.unsent
        if not self.overflowed or self._queued > self._queue_bytes // 2:
            return False
        self.overflowed = False
        self._limit = self._queue_bytes
        self.losses += 1
        return True
