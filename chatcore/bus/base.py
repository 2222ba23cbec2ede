"""The bus between workers: a hint, never the truth.

It may lose, repeat and reorder. Whoever uses it looks at the log after every
doubt (``BusListener.on_doubt``) and in rotation without any.
"""

from __future__ import annotations

from typing import Protocol


class BusListener(Protocol):
    """What a worker is told. Called on the loop, synchronously; must not block."""

    def on_bus(self, channel: str, payload: bytes) -> None:
        """A message that somebody else published on a channel this worker subscribed to."""

    def on_doubt(self, why: str) -> None:
        """Something may have been missed: a peer came or went, a link broke, a queue overflowed,
        a resubscription was confirmed, a heartbeat is missing."""

    def on_peer_gone(self, peer: str) -> None:
        """A worker is gone (its name); forget the presence it announced."""

    def on_peer_subscribed(self, peer: str, channel: str) -> None:
        """A peer subscribed to `channel`: answer with `send_to` if this worker has a state to tell."""


class Bus(Protocol):
    """One per worker. Channels are strings of at most 200 bytes, payloads at most 512 KiB."""

    @property
    def name(self) -> str:
        """This worker's name on the bus, unique for its lifetime (host, slot, nonce)."""

    @property
    def healthy(self) -> bool:
        """Whether messages are expected to get through now (shown in readyz and ctl status)."""

    async def start(self, listener: BusListener) -> None: ...

    async def close(self) -> None:
        """Send what is queued (bounded by a deadline), then end every task and socket."""

    async def subscribe(self, channels: list[str]) -> None:
        """Return when every peer that is up has confirmed, so that what anybody publishes from
        now on comes here (or a doubt is raised). Counted: subscribing twice needs two unsubscribes."""

    def unsubscribe(self, channels: list[str]) -> None: ...

    def publish(self, channel: str, payload: bytes) -> None:
        """To every other subscribed worker, at most once; never blocks and never raises. Not to self.
        Messages of one tick leave in one write per peer. A peer's full queue drops, and that peer is
        told (a doubt on its side)."""

    def send_to(self, peer: str, channel: str, payload: bytes) -> None:
        """To one worker, as if published on `channel`."""
