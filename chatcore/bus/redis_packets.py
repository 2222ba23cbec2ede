"""What the Redis bus publishes: the bytes of a packet, and the buffer that collects the messages of a tick.

A packet is what one ``PUBLISH`` carries: the id of the worker that sends it (8 random bytes, so that one
comparison finds a worker's own), a kind, and a body::

    ONE   the payload, for the channel of Redis that it came on
    MANY  records, each: length of the payload (u32), length of the channel (u8), channel, payload

A record without a channel is for the channel that it came on. On a worker's own channel and on that of all
workers it is a control message (:class:`Control`), which so keeps its order among the messages.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from .base import MAX_CHANNEL_BYTES, MAX_PAYLOAD_BYTES, BusFormatError
from .redis_connection import RedisBusStats, RedisSession

log = logging.getLogger(__name__)

#: Records of one tick for one channel share a packet up to this size.
PACKET_BYTES: Final = 64 * 1024
SENDER_BYTES: Final = 8
#: What a message counts in the queue besides its payload.
MESSAGE_BYTES: Final = 100

ONE: Final = 0
MANY: Final = 1

_RECORD: Final = struct.Struct("<IB")
RECORD_BYTES: Final = _RECORD.size
# kind, losses, interval of heartbeats in ms, number, length of the name; then the name, then channels
_CONTROL: Final = struct.Struct("<BIIIB")

BEAT: Final = 1  # I am up; to all
HELLO: Final = 2  # the same, and answer with BEAT
BYE: Final = 3  # I leave
ASK: Final = 4  # I subscribed to these channels: send me your states of them, then ANSWER with my number
ANSWER: Final = 5
_KINDS: Final = frozenset((BEAT, HELLO, BYE, ASK, ANSWER))


@dataclass(frozen=True, slots=True)
class Control:
    """A worker's message about itself. ``losses`` is a generation: it changes whenever something that this
    worker published may have been lost on its side. Every receiver that sees it change resyncs."""

    kind: int
    name: str
    losses: int
    interval_ms: int
    number: int = 0
    channels: tuple[str, ...] = ()

    def pack(self) -> bytes:
        """For :func:`record`, without a channel."""
        name = self.name.encode()
        head = _CONTROL.pack(self.kind, self.losses, self.interval_ms, self.number, len(name))
        parts = [head, name]
        for channel in self.channels:
            raw = channel.encode()
            parts += (bytes((len(raw),)), raw)
        return b"".join(parts)


def parse_control(body: bytes) -> Control:
    """The inverse of :meth:`Control.pack`.

    :raises BusFormatError: no such body.
    """
    try:
        kind, losses, interval_ms, number, size = _CONTROL.unpack_from(body)
        at = _CONTROL.size + size
        name = body[_CONTROL.size : at].decode()
        channels: list[str] = []
        while at < len(body):
            end = at + 1 + body[at]
            if end > len(body):
                raise BusFormatError("channels")
            channels.append(body[at + 1 : end].decode())
            at = end
    except (struct.error, UnicodeDecodeError) as exc:
        raise BusFormatError(str(exc)) from None
    if kind not in _KINDS or not name or not interval_ms:
        raise BusFormatError(f"control message {kind}")
    return Control(kind, name, losses, interval_ms, number, tuple(channels))


def record(channel: bytes, payload: bytes) -> bytes:
    """One record of a packet of :data:`MANY`."""
    return _RECORD.pack(len(payload), len(channel)) + channel + payload


def parse_records(packet: bytes) -> list[tuple[bytes, bytes]]:
    """(channel, payload) of each record of a packet of :data:`MANY`.

    :raises BusFormatError: another kind, or a record is longer than the packet.
    """
    if packet[SENDER_BYTES : SENDER_BYTES + 1] != b"\1":
        raise BusFormatError("kind of packet")
    records: list[tuple[bytes, bytes]] = []
    at = SENDER_BYTES + 1
    end = len(packet)
    try:
        while at < end:
            size, channel_bytes = _RECORD.unpack_from(packet, at)
            body = at + RECORD_BYTES + channel_bytes
            at = body + size
            if at > end:
                raise BusFormatError("a record longer than its packet")
            records.append((packet[body - channel_bytes : body], packet[body:at]))
    except struct.error:
        raise BusFormatError("a record without a head") from None
    return records


def packets(sender: bytes, records: Iterable[bytes]) -> list[bytes]:
    """Pack records into as few packets as their size allows."""
    made: list[bytes] = []
    head = b"%b%c" % (sender, MANY)
    parts = [head]
    size = 0
    for one in records:
        if size and size + len(one) > PACKET_BYTES:
            made.append(b"".join(parts))
            parts, size = [head], 0
        parts.append(one)
        size += len(one)
    if size:
        made.append(b"".join(parts))
    return made


class PublishBuffer:
    """The messages of one tick. The bound counts them, and what the kernel has not taken of earlier ones.

    Over the bound it drops everything until half of the bound is free again. So receivers get what had fitted,
    in order, and then learn (by :attr:`losses`) that something is missing.

    :param sender: the prefix of this worker's packets.
    :param flush_soon: asks for one call of :meth:`flush` at the end of the tick.
    """

    def __init__(
        self, prefix: bytes, sender: bytes, queue_bytes: int, stats: RedisBusStats, flush_soon: Callable[[], None]
    ) -> None:
        #: Times at which something that this worker published may have been lost on its side.
        self.losses = 0
        self.overflowed = False
        self._prefix = prefix
        self._sender = sender
        self._queue_bytes = queue_bytes
        self._stats = stats
        self._flush_soon = flush_soon
        self._session: RedisSession | None = None
        self._messages: dict[str, list[bytes]] = {}
        self._records: dict[bytes, list[bytes]] = {}  # for channels of workers, by Redis' name
        self._queued = 0  # bytes in both, and, when last looked, in the links
        self._unsent = 0  # the part of it in the links
        self._limit = -1  # without a session, or while overflowed: one comparison on the hot path

    def connected(self, session: RedisSession) -> None:
        """Take messages from now on."""
        self._session = session
        self._limit = self._queue_bytes

    def disconnected(self) -> None:
        """Drop everything, now and until the next session. Commands without a reply may be lost as well."""
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
        """A message for all subscribers. Hot."""
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
        """A control message. The bound does not apply: it is what ends an overflow. Nothing without a session."""
        if self._session is not None:
            self._add(to, record(b"", body))

    def _add(self, to: bytes, one: bytes) -> None:
        self._records.setdefault(to, []).append(one)
        self._flush_soon()

    def _has_room(self, channel: str, payload: bytes) -> bool:
        """The slow check: Redis may have taken something since the last one. False: dropped."""
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
            log.warning("redis bus: redis accepts no data; messages of this worker are dropped")
        self._stats.dropped += 1
        return False

    # --- what goes out ----------------------------------------------------------
    def flush(self, session: RedisSession) -> bool:
        """Hand everything to the session's links. True: an overflow is over, and a heartbeat has to say so."""
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
