"""The bytes of the Redis bus: what is published, and how a command is written.

A packet is what one ``PUBLISH`` carries: the id of the worker that sends it (8 random bytes,
so that one's own are dropped by one comparison), a kind, and a body::

    ONE   the payload, for the channel of Redis that it came on
    MANY  records, each: length of the payload (u32), length of the channel (u8), channel, payload

A record without a channel is for the channel that it came on; on a worker's own channel and
on that of all workers it is a control message (:class:`Control`), so that those keep their
order among the messages.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

#: Limits of the interface (base.py).
MAX_CHANNEL_BYTES: Final = 200
MAX_PAYLOAD_BYTES: Final = 512 * 1024
#: Records of one tick for one channel share a packet up to this size.
PACKET_BYTES: Final = 64 * 1024
SENDER_BYTES: Final = 8

ONE: Final = 0
MANY: Final = 1

_RECORD: Final = struct.Struct("<IB")
RECORD_BYTES: Final = _RECORD.size
# kind, losses, interval of heartbeats in ms, number, length of the name; then the name, then channels
_CONTROL: Final = struct.Struct("<BIIIB")

BEAT: Final = 1  # I am there; to all
HELLO: Final = 2  # the same, and tell me that you are
BYE: Final = 3  # I leave
ASK: Final = 4  # I subscribed to these channels: tell me what you know, then send ANSWER with my number
ANSWER: Final = 5
_KINDS: Final = frozenset((BEAT, HELLO, BYE, ASK, ANSWER))


class Malformed(Exception):
    """Not a packet of ours: it is dropped and counted."""


@dataclass(frozen=True, slots=True)
class Control:
    """What a worker tells of itself. ``losses`` is a generation: it changes whenever something that
    this worker published may have got lost on its side, which makes a doubt of every receiver."""

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

    :raises Malformed: no such body.
    """
    try:
        kind, losses, interval_ms, number, size = _CONTROL.unpack_from(body)
        at = _CONTROL.size + size
        name = body[_CONTROL.size : at].decode()
        channels: list[str] = []
        while at < len(body):
            end = at + 1 + body[at]
            if end > len(body):
                raise Malformed("channels")
            channels.append(body[at + 1 : end].decode())
            at = end
    except (struct.error, UnicodeDecodeError) as exc:
        raise Malformed(str(exc)) from None
    if kind not in _KINDS or not name or not interval_ms:
        raise Malformed(f"control message {kind}")
    return Control(kind, name, losses, interval_ms, number, tuple(channels))


def record(channel: bytes, payload: bytes) -> bytes:
    """One record of a packet of :data:`MANY`."""
    return _RECORD.pack(len(payload), len(channel)) + channel + payload


def parse_records(packet: bytes) -> list[tuple[bytes, bytes]]:
    """(channel, payload) of each record of a packet of :data:`MANY`.

    :raises Malformed: another kind, or a record is longer than the packet.
    """
    if packet[SENDER_BYTES : SENDER_BYTES + 1] != b"\1":
        raise Malformed("kind of packet")
    records: list[tuple[bytes, bytes]] = []
    at = SENDER_BYTES + 1
    end = len(packet)
    try:
        while at < end:
            size, channel_bytes = _RECORD.unpack_from(packet, at)
            body = at + RECORD_BYTES + channel_bytes
            at = body + size
            if at > end:
                raise Malformed("a record longer than its packet")
            records.append((packet[body - channel_bytes : body], packet[body:at]))
    except struct.error:
        raise Malformed("a record without a head") from None
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


def command(*args: bytes) -> bytes:
    """A command as Redis reads it."""
    return b"*%d\r\n%b" % (len(args), b"".join([b"$%d\r\n%b\r\n" % (len(a), a) for a in args]))
