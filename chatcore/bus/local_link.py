"""The two ends of a link of the local bus: frames, the queue of a peer, the parser.

A link is a Unix stream socket used in one direction. Its writing end is a
:class:`Peer`, its reading end an :class:`Inbound`; what the frames mean for the
whole is decided by their :class:`Hub` (``local.py``, where the scheme is told).
"""

from __future__ import annotations

import asyncio
import logging
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

log = logging.getLogger(__name__)

#: Limits of the interface (base.py).
MAX_CHANNEL_BYTES: Final = 200
MAX_PAYLOAD_BYTES: Final = 512 * 1024
#: Keeps ``/proc/self/fd/<n>/.bus-<name>.sock`` within the 107 bytes of a socket's address.
NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9_.-]{1,72}")
#: Subscriptions are told in frames of about this size.
SUBSCRIBE_FRAME_BYTES: Final = 64 * 1024

# A frame: length of the body (u32), type (u8), length of the channel that begins it (u8; MSG only); body.
_HEADER: Final = struct.Struct("<IBB")
_HEADER_BYTES: Final = _HEADER.size
_ID: Final = struct.Struct("<Q")
_MAX_BODY: Final = MAX_PAYLOAD_BYTES + MAX_CHANNEL_BYTES
_MAGIC: Final = b"chatcore-bus/1 "

HELLO: Final = 1  # body: _MAGIC and the sender's name; first, and once
RESET: Final = 2  # forget my subscriptions: the complete set follows
SUBSCRIBE: Final = 3  # body: channels, each behind its length (u8)
UNSUBSCRIBE: Final = 4  # the same
ASK: Final = 5  # body: id; confirm what I told you up to here
CONFIRM: Final = 6  # body: id; everything up to that ASK is in force
MSG: Final = 7  # body: channel, payload
LOST: Final = 8  # my queue for you overflowed
BEAT: Final = 9


class Malformed(Exception):
    """The bytes on a link are no frames of ours: it is closed."""


def frame(kind: int, body: bytes = b"") -> bytes:
    return _HEADER.pack(len(body), kind, 0) + body


def message_frame(channel: bytes, payload: bytes) -> bytes:
    """Made once per message, whoever it goes to."""
    return _HEADER.pack(len(channel) + len(payload), MSG, len(channel)) + channel + payload


def hello_frame(name: str) -> bytes:
    return frame(HELLO, _MAGIC + name.encode())


def channel_frames(kind: int, channels: Iterable[bytes]) -> list[bytes]:
    """Frames that name these channels, each of a bounded size."""
    frames: list[bytes] = []
    body = bytearray()
    for channel in channels:
        body.append(len(channel))
        body += channel
        if len(body) >= SUBSCRIBE_FRAME_BYTES:
            frames.append(frame(kind, bytes(body)))
            body.clear()
    if body:
        frames.append(frame(kind, bytes(body)))
    return frames


def parse_channels(body: bytes) -> list[str]:
    """The reverse of :func:`channel_frames`, for one body.

    :raises Malformed: not a list of channels.
    """
    channels: list[str] = []
    at = 0
    while at < len(body):
        end = at + 1 + body[at]
        if end > len(body) or not 0 < body[at] <= MAX_CHANNEL_BYTES:
            raise Malformed("channel list")
        try:
            channels.append(body[at + 1 : end].decode())
        except UnicodeDecodeError:
            raise Malformed("channel name") from None
        at = end
    return channels


_BEAT_FRAME: Final = frame(BEAT)
_LOST_FRAME: Final = frame(LOST)
_RESET_FRAME: Final = frame(RESET)


@dataclass(slots=True)
class LocalBusStats:
    """Counters since the start, for metrics. ``dropped``: messages that a full queue did not take."""

    published: int = 0
    sent: int = 0
    received: int = 0
    dropped: int = 0
    malformed: int = 0


class Hub(Protocol):
    """What a link needs of the bus that it belongs to."""

    loop: asyncio.AbstractEventLoop
    queue_bytes: int
    stats: LocalBusStats
    #: Own subscriptions, encoded to decoded.
    own: dict[bytes, str]
    #: ``listener.on_bus``.
    on_bus: Callable[[str, bytes], Any]

    def link_up(self, link: Peer | Inbound) -> None: ...
    def out_lost(self, peer: Peer) -> None: ...
    def inbound_lost(self, inbound: Inbound) -> None: ...
    def malformed(self, peer: Peer | None, why: str) -> None: ...

    def hello(self, inbound: Inbound, name: str) -> None:
        """:raises Malformed: nobody that there can be a session with."""

    def heard_again(self, peer: Peer) -> None: ...
    def peer_subscribes(self, peer: Peer, channels: list[str]) -> None: ...
    def peer_unsubscribes(self, peer: Peer, channels: list[str]) -> None: ...
    def peer_forgets(self, peer: Peer) -> None: ...

    def confirmed(self, peer: Peer, id: int) -> None:
        """:raises Malformed: nobody asked for that."""

    def doubt(self, why: str) -> None: ...
    def next_ask(self) -> int: ...
    def flush_later(self, peer: Peer) -> None: ...


class Peer(asyncio.Protocol):
    """One session with one peer; as a protocol, the writing end of the link to it.

    It begins when the peer is found or says hello, before the link is up: what
    is sent meanwhile is queued. It ends when either link does, and a later one
    is a new object, so that a late callback of an old link touches nothing.
    """

    def __init__(self, hub: Hub, name: str) -> None:
        self.hub = hub
        self.name = name
        self.transport: asyncio.WriteTransport | None = None
        self.inbound: Inbound | None = None
        self.since = self.heard = hub.loop.time()
        #: The last ASK sent, and the one behind the last complete set (its confirmation is a doubt).
        self.asked = 0
        self.greeted = 0
        #: An ASK that nobody waits for any longer: its confirmation is a doubt, too.
        self.late = 0
        #: The peer has confirmed a complete set.
        self.up = False
        self.silent = False
        #: The link to it is gone; what is left on the one from it is still read.
        self.broken = False
        self.ended = False
        self._pending: list[bytes] = []
        self._queued = 0  # bytes in `_pending` and, when last looked, in the transport
        self._limit = hub.queue_bytes  # -1 while overflowed: one comparison on the hot path
        self._dirty = False
        self._owed = 0  # the peer's ASK that an overflow kept from being confirmed

    @property
    def overflowed(self) -> bool:
        return self._limit < 0

    # --- called by the transport -------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast: uvloop's transports are no subclasses of asyncio's.
        out = self.transport = cast(asyncio.WriteTransport, transport)
        self.hub.link_up(self)
        if self.ended:
            out.abort()
            return
        # Both marks at half: whatever is above it after a write is told by `resume_writing` when it is not.
        out.set_write_buffer_limits(self.hub.queue_bytes // 2, self.hub.queue_bytes // 2)
        self.flush()

    def data_received(self, data: bytes) -> None:
        self.hub.malformed(self, "bytes against the direction of the link")
        if self.transport is not None:
            self.transport.abort()

    def resume_writing(self) -> None:
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._limit = -1
        self._pending.clear()
        self.hub.out_lost(self)

    # --- called by the hub -------------------------------------------------
    def greet(self, name: str) -> None:
        """What a new link begins with."""
        self._tell_all([hello_frame(name)])

    def send(self, data: bytes) -> bool:
        """Queue a frame for the end of the tick. False: dropped."""
        queued = self._queued + len(data)
        if queued > self._limit:
            if not self._has_room(len(data)):
                return False
            queued = self._queued + len(data)
        self._queued = queued
        self._pending.append(data)
        if not self._dirty:
            self._dirty = True
            self.hub.flush_later(self)
        return True

    def ask(self, id: int) -> None:
        """Ask for a confirmation. If it is dropped, a later ASK stands for it."""
        self.asked = id
        self.send(frame(ASK, _ID.pack(id)))

    def confirm(self, id: int) -> None:
        if not self.send(frame(CONFIRM, _ID.pack(id))):
            self._owed = id

    def beat(self) -> None:
        """A heartbeat, unless there is something else to send."""
        if not self._queued:
            self.send(_BEAT_FRAME)
        elif not self._pending:
            self.flush()

    def overflow(self) -> None:
        """Send nothing more until half of the queue is gone; then the peer is told."""
        self._limit = -1
        if not self._dirty:
            self._dirty = True
            self.hub.flush_later(self)

    def flush(self) -> None:
        """One write for everything queued; then recover from an overflow if there is room."""
        self._dirty = False
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if self._pending:
            transport.write(self._pending[0] if len(self._pending) == 1 else b"".join(self._pending))
            self._pending.clear()
        self._queued = transport.get_write_buffer_size()
        if self._limit < 0 and self._queued <= self.hub.queue_bytes // 2:
            self._tell_all([_LOST_FRAME])
            self.flush()

    def _has_room(self, size: int) -> bool:
        """The slow look: the transport may have sent something since the last one."""
        if self._limit < 0:
            return False
        buffered = self.transport.get_write_buffer_size() if self.transport is not None else 0
        self._queued = sum(map(len, self._pending)) + buffered
        if self._queued + size > self._limit:
            self.overflow()
            return False
        return True

    def _tell_all(self, first: list[bytes]) -> None:
        """Queue the complete set of subscriptions and ask for a confirmation. It comes on top of the
        queue's limit: a link is worth nothing without it."""
        self.asked = self.greeted = self.hub.next_ask()
        frames = [*first, _RESET_FRAME, *channel_frames(SUBSCRIBE, self.hub.own), frame(ASK, _ID.pack(self.asked))]
        if self._owed:
            frames.append(frame(CONFIRM, _ID.pack(self._owed)))
            self._owed = 0
        size = sum(map(len, frames))
        self._pending += frames
        self._queued += size
        self._limit = self.hub.queue_bytes + size


class Inbound(asyncio.Protocol):
    """The reading end of a peer's link; of nobody's until the hello."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.peer: Peer | None = None
        self.since = hub.loop.time()
        self.transport: asyncio.Transport | None = None
        self._parts: list[bytes] = []  # an incomplete frame; joined once, when `_need` bytes are there
        self._have = 0
        self._need = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.hub.link_up(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.hub.inbound_lost(self)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        peer = self.peer
        if peer is not None:
            peer.heard = self.hub.loop.time()
            if peer.silent:
                self.hub.heard_again(peer)
        if self._parts:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return
            data = b"".join(self._parts)
            self._parts.clear()
        try:
            at = self._parse(data)
        except Malformed as exc:
            self.hub.malformed(self.peer, str(exc))
            self.close()
            return
        if at < len(data):
            self._parts.append(data[at:])
            self._have = len(data) - at

    def _parse(self, data: bytes) -> int:
        """Act on every complete frame; return where the incomplete one begins. Hot for MSG."""
        at = 0
        end = len(data)
        hub = self.hub
        channel_of = hub.own.get
        on_bus = hub.on_bus
        stats = hub.stats
        unpack = _HEADER.unpack_from
        known = self.peer is not None
        while end - at >= _HEADER_BYTES:
            size, kind, channel_bytes = unpack(data, at)
            body = at + _HEADER_BYTES
            stop = body + size
            if stop > end:
                if size > _MAX_BODY:
                    raise Malformed(f"a frame of {size} bytes")
                self._need = stop - at
                return at
            if kind == MSG and known:
                split = body + channel_bytes
                if split > stop:
                    raise Malformed("a channel longer than its frame")
                stats.received += 1
                channel = channel_of(data[body:split])
                if channel is not None:  # else unsubscribed meanwhile
                    try:
                        on_bus(channel, data[split:stop])
                    except Exception:
                        log.exception("on_bus failed on channel %s", channel)
            else:
                self._control(kind, data[body:stop])
                known = True
                if self.transport is None or self.transport.is_closing():
                    return end
            at = stop
        self._need = _HEADER_BYTES
        return at

    def _control(self, kind: int, body: bytes) -> None:
        hub, peer = self.hub, self.peer
        if peer is None:
            name = body[len(_MAGIC) :].decode("ascii", "replace")
            if kind != HELLO or not body.startswith(_MAGIC) or not NAME_PATTERN.fullmatch(name):
                raise Malformed("no hello")
            hub.hello(self, name)
        elif kind == SUBSCRIBE:
            hub.peer_subscribes(peer, parse_channels(body))
        elif kind == UNSUBSCRIBE:
            hub.peer_unsubscribes(peer, parse_channels(body))
        elif kind == ASK:
            peer.confirm(_id(body))
        elif kind == CONFIRM:
            hub.confirmed(peer, _id(body))
        elif kind == RESET:
            hub.peer_forgets(peer)
        elif kind == LOST:
            hub.doubt(f"{peer.name} had to drop messages for this worker")
        elif kind != BEAT:
            raise Malformed(f"frame type {kind}")


def _id(body: bytes) -> int:
    if len(body) != _ID.size:
        raise Malformed("id")
    id: int = _ID.unpack(body)[0]
    return id
