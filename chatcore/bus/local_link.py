"""The two ends of a link of the local bus: frames, the queue for a peer, the parser, and confirmations.

A link is a Unix stream socket used in one direction. Its writing end is a :class:`LocalPeer`, its reading end an
:class:`Inbound`. The :class:`LinkOwner` (``local.py``, which explains the scheme) decides what the frames mean
for the bus as a whole; :class:`Confirmations` tracks which peers still have to confirm which subscriptions.
"""

from __future__ import annotations

import asyncio
import logging
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

from .base import MAX_CHANNEL_BYTES, MAX_PAYLOAD_BYTES, BusFormatError

log = logging.getLogger(__name__)

#: Keeps ``/proc/self/fd/<n>/.bus-<name>.sock`` within the 107 bytes of a socket's address.
NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9_.-]{1,72}")
#: Frames of subscriptions have about this size.
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
ASK: Final = 5  # body: id; confirm every subscription that I sent up to here
CONFIRM: Final = 6  # body: id; everything up to that ASK is in force
MSG: Final = 7  # body: channel, payload
LOST: Final = 8  # my queue for you overflowed
BEAT: Final = 9


# --- frames ----------------------------------------------------------------------
def frame(kind: int, body: bytes = b"") -> bytes:
    return _HEADER.pack(len(body), kind, 0) + body


def message_frame(channel: bytes, payload: bytes) -> bytes:
    """Made once per message and shared by all its receivers."""
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

    :raises BusFormatError: not a list of channels.
    """
    channels: list[str] = []
    at = 0
    while at < len(body):
        end = at + 1 + body[at]
        if end > len(body) or not 0 < body[at] <= MAX_CHANNEL_BYTES:
            raise BusFormatError("channel list")
        try:
            channels.append(body[at + 1 : end].decode())
        except UnicodeDecodeError:
            raise BusFormatError("channel name") from None
        at = end
    return channels


def _parse_id(body: bytes) -> int:
    if len(body) != _ID.size:
        raise BusFormatError("id")
    id: int = _ID.unpack(body)[0]
    return id


_BEAT_FRAME: Final = frame(BEAT)
_LOST_FRAME: Final = frame(LOST)
_RESET_FRAME: Final = frame(RESET)


# --- what a link needs -------------------------------------------------------------
@dataclass(slots=True)
class LocalBusStats:
    """Counters since the start, for metrics. ``dropped``: messages that did not fit into a full queue."""

    published: int = 0
    sent: int = 0
    received: int = 0
    dropped: int = 0
    malformed: int = 0


class LinkOwner(Protocol):
    """What a link needs of the bus that it belongs to."""

    loop: asyncio.AbstractEventLoop
    queue_bytes: int
    stats: LocalBusStats
    #: This worker's subscriptions, encoded to decoded.
    subscribed: dict[bytes, str]
    #: ``listener.on_bus``.
    on_bus: Callable[[str, bytes], Any]

    def link_up(self, link: LocalPeer | Inbound) -> None: ...
    def out_lost(self, peer: LocalPeer) -> None: ...
    def inbound_lost(self, inbound: Inbound) -> None: ...
    def malformed(self, peer: LocalPeer | None, why: str) -> None: ...

    def hello(self, inbound: Inbound, name: str) -> None:
        """:raises BusFormatError: there can be no connection with a worker of that name."""

    def heard_again(self, peer: LocalPeer) -> None: ...
    def peer_subscribes(self, peer: LocalPeer, channels: list[str]) -> None: ...
    def peer_unsubscribes(self, peer: LocalPeer, channels: list[str]) -> None: ...
    def peer_resets(self, peer: LocalPeer) -> None: ...

    def confirmed(self, peer: LocalPeer, id: int) -> None:
        """:raises BusFormatError: this worker sent no such ASK."""

    def need_resync(self, why: str) -> None: ...
    def next_ask(self) -> int: ...
    def flush_later(self, peer: LocalPeer) -> None: ...


# --- the writing end ------------------------------------------------------------------
class LocalPeer(asyncio.Protocol):
    """One connection with one peer; as a protocol, the writing end of the link to it.

    It begins when the folder shows the peer or the peer says hello, before the link is up: what is sent
    meanwhile is queued. It ends when either of its two links does. A later connection is a new object, so
    that a late callback of an old link touches nothing.
    """

    def __init__(self, owner: LinkOwner, name: str) -> None:
        self.owner = owner
        self.name = name
        self.transport: asyncio.WriteTransport | None = None
        self.inbound: Inbound | None = None
        self.since = self.heard = owner.loop.time()
        #: The last ASK that was sent.
        self.asked = 0
        #: The ASK behind the last complete set of subscriptions; its confirmation calls for a resync.
        self.full_set_ask = 0
        #: An ASK whose confirmation no subscribe waits for any longer; it calls for a resync, too.
        self.late_ask = 0
        #: The peer has confirmed a complete set.
        self.up = False
        self.silent = False
        #: The link to it is gone; what is left on the one from it is still read.
        self.broken = False
        self.ended = False
        self._pending: list[bytes] = []
        self._queued = 0  # bytes in `_pending` and, when last looked, in the transport
        self._limit = owner.queue_bytes  # -1 while overflowed: one comparison on the hot path
        self._dirty = False
        self._unsent_confirm = 0  # the peer's ASK whose confirmation an overflow dropped

    @property
    def overflowed(self) -> bool:
        return self._limit < 0

    # called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast: uvloop's transports are no subclasses of asyncio's.
        out = self.transport = cast(asyncio.WriteTransport, transport)
        self.owner.link_up(self)
        if self.ended:
            out.abort()
            return
        # Both marks at half: `resume_writing` then follows every write that left more than half in the buffer.
        out.set_write_buffer_limits(self.owner.queue_bytes // 2, self.owner.queue_bytes // 2)
        self.flush()

    def data_received(self, data: bytes) -> None:
        self.owner.malformed(self, "bytes against the direction of the link")
        if self.transport is not None:
            self.transport.abort()

    def resume_writing(self) -> None:
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._limit = -1
        self._pending.clear()
        self.owner.out_lost(self)

    # called by the bus

    def greet(self, name: str) -> None:
        """Begin a new link: hello, then the complete set of subscriptions."""
        self._send_full_set([hello_frame(name)])

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
            self.owner.flush_later(self)
        return True

    def ask(self, id: int) -> None:
        """Ask for a confirmation. If the frame is dropped, a later ASK stands for it."""
        self.asked = id
        self.send(frame(ASK, _ID.pack(id)))

    def confirm(self, id: int) -> None:
        if not self.send(frame(CONFIRM, _ID.pack(id))):
            self._unsent_confirm = id

    def beat(self) -> None:
        """Send a heartbeat, unless there is something else to send."""
        if not self._queued:
            self.send(_BEAT_FRAME)
        elif not self._pending:
            self.flush()

    def overflow(self) -> None:
        """Send nothing more until half of the queue is gone; then send LOST."""
        self._limit = -1
        if not self._dirty:
            self._dirty = True
            self.owner.flush_later(self)

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
        if self._limit < 0 and self._queued <= self.owner.queue_bytes // 2:
            self._send_full_set([_LOST_FRAME])
            self.flush()

    def _has_room(self, size: int) -> bool:
        """The slow check: the transport may have sent something since the last one."""
        if self._limit < 0:
            return False
        buffered = self.transport.get_write_buffer_size() if self.transport is not None else 0
        self._queued = sum(map(len, self._pending)) + buffered
        if self._queued + size > self._limit:
            self.overflow()
            return False
        return True

    def _send_full_set(self, first: list[bytes]) -> None:
        """Queue the complete set of subscriptions and ask for a confirmation. It may exceed the queue's limit:
        a link without it is useless."""
        self.asked = self.full_set_ask = self.owner.next_ask()
        frames = [
            *first,
            _RESET_FRAME,
            *channel_frames(SUBSCRIBE, self.owner.subscribed),
            frame(ASK, _ID.pack(self.asked)),
        ]
        if self._unsent_confirm:
            frames.append(frame(CONFIRM, _ID.pack(self._unsent_confirm)))
            self._unsent_confirm = 0
        size = sum(map(len, frames))
        self._pending += frames
        self._queued += size
        self._limit = self.owner.queue_bytes + size


# --- the reading end ------------------------------------------------------------------
class Inbound(asyncio.Protocol):
    """The reading end of a peer's link. It has no peer until the hello."""

    def __init__(self, owner: LinkOwner) -> None:
        self.owner = owner
        self.peer: LocalPeer | None = None
        self.since = owner.loop.time()
        self.transport: asyncio.Transport | None = None
        self._parts: list[bytes] = []  # an incomplete frame; joined once, when `_need` bytes are there
        self._have = 0
        self._need = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.owner.link_up(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.owner.inbound_lost(self)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        peer = self.peer
        if peer is not None:
            peer.heard = self.owner.loop.time()
            if peer.silent:
                self.owner.heard_again(peer)
        if self._parts:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return
            data = b"".join(self._parts)
            self._parts.clear()
        try:
            at = self._parse(data)
        except BusFormatError as exc:
            self.owner.malformed(self.peer, str(exc))
            self.close()
            return
        if at < len(data):
            self._parts.append(data[at:])
            self._have = len(data) - at

    def _parse(self, data: bytes) -> int:
        """Act on every complete frame; return where the incomplete one begins. Hot for MSG."""
        at = 0
        end = len(data)
        owner = self.owner
        channel_of = owner.subscribed.get
        on_bus = owner.on_bus
        stats = owner.stats
        unpack = _HEADER.unpack_from
        known = self.peer is not None
        while end - at >= _HEADER_BYTES:
            size, kind, channel_bytes = unpack(data, at)
            body = at + _HEADER_BYTES
            stop = body + size
            if stop > end:
                if size > _MAX_BODY:
                    raise BusFormatError(f"a frame of {size} bytes")
                self._need = stop - at
                return at
            if kind == MSG and known:
                split = body + channel_bytes
                if split > stop:
                    raise BusFormatError("a channel longer than its frame")
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
        owner, peer = self.owner, self.peer
        if peer is None:
            name = body[len(_MAGIC) :].decode("ascii", "replace")
            if kind != HELLO or not body.startswith(_MAGIC) or not NAME_PATTERN.fullmatch(name):
                raise BusFormatError("no hello")
            owner.hello(self, name)
        elif kind == SUBSCRIBE:
            owner.peer_subscribes(peer, parse_channels(body))
        elif kind == UNSUBSCRIBE:
            owner.peer_unsubscribes(peer, parse_channels(body))
        elif kind == ASK:
            peer.confirm(_parse_id(body))
        elif kind == CONFIRM:
            owner.confirmed(peer, _parse_id(body))
        elif kind == RESET:
            owner.peer_resets(peer)
        elif kind == LOST:
            owner.need_resync(f"{peer.name} had to drop messages for this worker")
        elif kind != BEAT:
            raise BusFormatError(f"frame type {kind}")


# --- confirmations ------------------------------------------------------------------
class PendingSubscribe:
    """The subscriptions of one tick. ``unconfirmed``: the ASK that each of these peers still has to confirm."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.unconfirmed: dict[LocalPeer, int] = {}
        self.done: asyncio.Future[None] = loop.create_future()
        self.timer: asyncio.TimerHandle | None = None


class Confirmations:
    """All pending subscribes of one bus, oldest first.

    Confirmations are numbered: that of one ASK stands for all before it. A confirmation that comes after its
    subscribe gave up (it was late, or the peer was silent) calls for a resync, since messages may have passed
    in between. So does that of a complete set of subscriptions, with which a new or overflowed link begins.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout_s: float, need_resync: Callable[[str], None]) -> None:
        self._loop = loop
        self._timeout_s = timeout_s
        self._need_resync = need_resync
        self._open: list[PendingSubscribe] = []
        self._asks = 0

    def next_ask(self) -> int:
        """The number of the next ASK, to whichever peer."""
        self._asks += 1
        return self._asks

    def newest(self) -> PendingSubscribe | None:
        """The one that ends last, if there is any."""
        return self._open[-1] if self._open else None

    def begin(self, pending: PendingSubscribe, peers: dict[LocalPeer, int]) -> None:
        """Wait for these peers, at most for the timeout; without peers it is done at once."""
        pending.unconfirmed = peers
        self._open.append(pending)
        if peers:
            pending.timer = self._loop.call_later(self._timeout_s, self._time_out, pending)
        else:
            self._finish(pending)

    def confirmed(self, peer: LocalPeer, id: int) -> None:
        """A peer sent CONFIRM.

        :raises BusFormatError: there was no such ASK.
        """
        if id > peer.asked:
            raise BusFormatError("a confirmation without an ASK")
        if peer.full_set_ask and id >= peer.full_set_ask:
            peer.full_set_ask = 0
            peer.late_ask = 0 if peer.late_ask <= id else peer.late_ask
            peer.up = True
            self._need_resync(f"the link to {peer.name} is up")
        elif peer.late_ask and id >= peer.late_ask:
            peer.late_ask = 0
            self._need_resync(f"{peer.name} confirmed late")
        self.release(peer, id)

    def release(self, peer: LocalPeer, upto: int) -> None:
        """Stop waiting for this peer's confirmation of every ASK up to this one."""
        for pending in list(self._open):
            if pending.unconfirmed.get(peer, upto + 1) <= upto:
                del pending.unconfirmed[peer]
                if not pending.unconfirmed:
                    self._finish(pending)

    def finish_all(self) -> None:
        """The bus closes."""
        for pending in list(self._open):
            self._finish(pending)

    def _time_out(self, pending: PendingSubscribe) -> None:
        for peer, id in pending.unconfirmed.items():
            peer.late_ask = max(peer.late_ask, id)
        names = ", ".join(peer.name for peer in pending.unconfirmed)
        self._finish(pending)
        self._need_resync(f"not confirmed in time by {names}")

    def _finish(self, pending: PendingSubscribe) -> None:
        self._open.remove(pending)
        if pending.timer is not None:
            pending.timer.cancel()
        if not pending.done.done():
            pending.done.set_result(None)
