"""The bus between workers: it carries hints, never the truth.

It may lose, repeat and reorder messages. A worker therefore looks at the store in rotation, and at once
whenever the bus calls :meth:`BusListener.on_resync_needed` (docs/log.md, rule 8).

Here is also what the two implementations share: the limits, and how they call the listener.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Protocol

log = logging.getLogger(__name__)

#: Longest name of a channel, in bytes of UTF-8; the frames have one byte for its length.
MAX_CHANNEL_BYTES: Final = 200
#: Largest payload of a message: an entry of the largest size in its encoding, with room to spare.
MAX_PAYLOAD_BYTES: Final = 512 * 1024
#: Silent heartbeats after which a peer (or Redis) counts as gone; one alone may be late on a busy machine.
SILENT_AFTER_BEATS: Final = 3


class BusListener(Protocol):
    """The callbacks of a worker. The bus calls them on the loop; they must not block."""

    def on_bus(self, channel: str, payload: bytes) -> None:
        """Another worker published a message on a channel that this worker subscribed to."""

    def on_resync_needed(self, why: str) -> None:
        """Messages may have been missed: a peer came or went, a link broke, a queue overflowed,
        subscriptions were confirmed anew, a heartbeat is missing. ``why`` is one of these, for the log."""

    def on_peer_gone(self, peer: str) -> None:
        """A worker is gone (its name); forget the presence it announced."""

    def on_peer_subscribed(self, peer: str, channel: str) -> None:
        """A peer subscribed to ``channel``. A worker that has a state for it answers with ``send_to``."""


class Bus(Protocol):
    """One per worker. Channels have at most :data:`MAX_CHANNEL_BYTES`, payloads :data:`MAX_PAYLOAD_BYTES`."""

    @property
    def name(self) -> str:
        """This worker's name on the bus, unique for its lifetime (host, slot, nonce)."""

    @property
    def healthy(self) -> bool:
        """Whether the bus expects messages to get through now (shown in readyz and ctl status)."""

    async def start(self, listener: BusListener) -> None: ...

    async def close(self) -> None:
        """Send what is queued, bounded by a deadline, then end every task and socket."""

    async def subscribe(self, channels: list[str]) -> None:
        """Return when every peer that is up has confirmed: from then on a message of any peer arrives here,
        or the listener is asked to resync. Counted: subscribing twice needs two unsubscribes."""

    def unsubscribe(self, channels: list[str]) -> None: ...

    def publish(self, channel: str, payload: bytes) -> None:
        """Send to every other subscribed worker, at most once, and not to this one. Never blocks, never raises.
        The messages of one tick leave in one write per peer. A full queue drops the message; its receiver
        is then asked to resync."""

    def send_to(self, peer: str, channel: str, payload: bytes) -> None:
        """Send to one worker, as if published on ``channel``."""


class BusFormatError(Exception):
    """Bytes that are not in the format of the bus."""


def encode_channels(channels: list[str]) -> list[bytes]:
    """The names as bytes.

    :raises ValueError: a channel of no or of more than :data:`MAX_CHANNEL_BYTES` bytes.
    """
    encoded = [channel.encode() for channel in channels]
    for raw in encoded:
        if not 0 < len(raw) <= MAX_CHANNEL_BYTES:
            raise ValueError(f"channel of {len(raw)} bytes: 1 to {MAX_CHANNEL_BYTES} are allowed")
    return encoded


def notify(callback: Callable[..., None], *args: str | bytes) -> None:
    """Call the listener. Its exceptions are logged: a bug there must not end a connection."""
    try:
        callback(*args)
    except Exception:
        log.exception("%s failed", getattr(callback, "__name__", callback))
