"""The bus between the workers of all hosts, by way of Redis' pub/sub.

Channels by Redis' names (pub/sub ignores database numbers, so the prefix says whose they are)::

    <prefix>:<channel>     messages
    <prefix>!all           every worker's control messages: heartbeats, arrivals, subscriptions, goodbyes
    <prefix>!to:<worker>   messages and answers for one worker

Redis silently drops what is published while a connection is away. So the side that can know of a possible loss
calls for a resync:

* *This worker* was not connected, or its own heartbeat does not come back through the server: it resyncs when
  the connection is lost, and again when all subscriptions are confirmed.
* *A peer* could not publish (it was not connected, its queue overflowed): its ``losses`` change, which the
  others see in its next heartbeat, and then resync.
* A worker comes, leaves, or is silent for three heartbeats: the others resync.

In all three cases the worker learns the presence of its peers anew: ``on_peer_gone``, then it announces to that
peer every subscription of an :data:`ANNOUNCED` channel. The peer answers as if the subscription were new.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import Final

from ..common.backoff import Backoff
from ..common.redis_client import parse_url
from ..common.tasks import Tasks
from .base import SILENT_AFTER_BEATS, BusFormatError, BusListener, notify
from .redis_connection import Discovery, LinkError, RedisBusStats, RedisSession, ReplyError
from .redis_packets import (
    ANSWER,
    ASK,
    BEAT,
    BYE,
    HELLO,
    SENDER_BYTES,
    Control,
    PublishBuffer,
    packets,
    parse_control,
    parse_records,
    record,
)
from .redis_subscriptions import LOST, PeerTable, RedisSubscriptions

log = logging.getLogger(__name__)

#: Sentinels and clusters are asked for their topology every so many heartbeats: an old primary behind a broken
#: network looks well to the workers on its side.
TOPOLOGY_BEATS: Final = 5
#: Pauses between attempts to connect; the longest bounds how late a worker is back.
RECONNECT_FIRST_S: Final = 0.05
RECONNECT_MOST_S: Final = 1.0
#: Prefix of the channels whose subscriptions are announced to the peers (``on_peer_subscribed``): presence. The other
#: channels have no state that a new subscriber would need.
ANNOUNCED: Final = "p:"
#: Subscriptions in one message to the peers.
ANNOUNCE_CHANNELS: Final = 500
#: Different reasons of one outage that are logged: they may alternate for hours.
REASONS: Final = 5


class RedisBus:
    """A :class:`~chatcore.bus.base.Bus` for the workers of all hosts that use one Redis and one prefix.

    :param url: see :mod:`chatcore.common.redis_client`; Redis 7 if it is a cluster (sharded pub/sub), else 5.
    :param name: ``<host>-<slot>-<nonce>``, never used by two processes.
    :param prefix: of every channel; holds the id of the store.
    :param queue_bytes: bound of what waits for a slow Redis; a message above it is dropped, and the peers resync.
    :param confirm_timeout_ms: for one attempt to connect, for a subscription, and for `close`.
    :raises ValueError: the URL or the name is malformed.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        prefix: str,
        queue_bytes: int,
        confirm_timeout_ms: int,
        heartbeat_ms: int,
    ) -> None:
        if not 0 < len(name.encode()) <= 200 or not name.isprintable() or " " in name:
            raise ValueError(f"bus name {name!r}: 1 to 200 printable bytes without spaces are allowed")
        self.address = parse_url(url)
        self.stats = RedisBusStats()
        self._name = name
        self._prefix = prefix.encode()
        self._queue_bytes = queue_bytes
        self._confirm_s = confirm_timeout_ms / 1000
        self._beat_ms = heartbeat_ms
        self._beat_s = heartbeat_ms / 1000
        self._sender = os.urandom(SENDER_BYTES)
        self._to_all = self._prefix + b"!all"
        self._to_me = self._to(name)
        self._discovery = Discovery(self.address, f"chatcore-{name}", self._confirm_s)
        self._peers = PeerTable(SILENT_AFTER_BEATS)
        self._buffer = PublishBuffer(self._prefix, self._sender, queue_bytes, self.stats, self._flush_soon)
        self._subscriptions = RedisSubscriptions(
            self._prefix, self._confirm_s, ANNOUNCED, self._peers,
            ask_peers=partial(self._ask_peers, self._to_all), need_resync=self._need_resync,
            flush_soon=self._flush_soon,
        )  # fmt: skip
        self._tasks = Tasks()
        self._checking: asyncio.Task[None] | None = None
        self._closing = False
        self._session: RedisSession | None = None
        self._flush_due = False
        self._proven = False  # the own heartbeat came back, and still does
        self._own_heard = 0.0
        self._receivers = -1  # workers that received the greeting, this one included; -1: not known yet
        self._logged_reasons: set[str] = set()  # of the present outage; empty while connected
        self._started: asyncio.Future[None]
        self._loop: asyncio.AbstractEventLoop
        self._listener: BusListener

    # --- the interface -----------------------------------------------------
    @property
    def name(self) -> str:
        return self._name

    @property
    def peers(self) -> list[str]:
        """Names of the workers whose heartbeats come."""
        return self._peers.names

    @property
    def healthy(self) -> bool:
        """Connected, every subscription confirmed at least once, and the own heartbeat comes back."""
        return self._proven and not self._buffer.overflowed

    async def start(self, listener: BusListener) -> None:
        """Connect, and wait for the workers that are up. Also returns after the timeout, or when the first
        attempt failed: a worker serves without Redis, and goes on trying."""
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._started = self._loop.create_future()
        self._tasks.spawn(self._run(), "bus-connection")
        self._tasks.spawn(self._beat_forever(), "bus-heartbeat")
        await asyncio.wait((self._started,), timeout=self._confirm_s)

    async def close(self) -> None:
        """Send what is queued and a goodbye, bounded by the confirm timeout, then end everything. Ends every wait."""
        if self._closing or not self._tasks:
            return
        self._send_control(self._to_all, BYE)
        self._closing = True
        session = self._session
        if session is not None:
            self._flush()
            try:
                async with asyncio.timeout(self._confirm_s):
                    await session.wait_replies()
            except TimeoutError:
                pass
        await self._tasks.close()
        self._disconnected()

    async def subscribe(self, channels: list[str]) -> None:
        """See :meth:`Bus.subscribe`. Without a connection it returns at once, and the resync comes with the
        connection. A subscription that Redis does not confirm in time, or a peer does not answer, calls for a
        resync. A cancelled call subscribed to nothing.

        :raises ValueError: a channel of no or of more than 200 bytes.
        """
        if not self._closing:
            await self._subscriptions.add(channels)

    def unsubscribe(self, channels: list[str]) -> None:
        """Take back one `subscribe` of each; unknown ones are ignored."""
        self._subscriptions.remove(channels)

    def publish(self, channel: str, payload: bytes) -> None:
        self.stats.published += 1
        self._buffer.publish(channel, payload)

    def send_to(self, peer: str, channel: str, payload: bytes) -> None:
        if peer != self._name:
            self._buffer.send(self._to(peer), channel, payload)

    # --- one write per tick ------------------------------------------------
    def _to(self, peer: str) -> bytes:
        return self._prefix + b"!to:" + peer.encode()

    def _send_control(self, to: bytes, kind: int, number: int = 0, channels: Sequence[str] = ()) -> None:
        """To one worker or all. Nothing follows the goodbye: it would make this worker a peer again."""
        if not self._closing:
            self._buffer.control(to, self._control(kind, number, channels))

    def _control(self, kind: int, number: int = 0, channels: Sequence[str] = ()) -> bytes:
        """The body of a control message."""
        return Control(
            kind, self._name, self._buffer.losses & 0xFFFFFFFF, self._beat_ms, number, tuple(channels)
        ).pack()  # fmt: skip

    def _ask_peers(self, to: bytes, channels: list[str]) -> int:
        """Announce subscriptions to one peer, or all; the number that the answer to the last part will have."""
        number = 0
        for i in range(0, len(channels), ANNOUNCE_CHANNELS):
            number = self._peers.next_number()
            self._send_control(to, ASK, number, channels[i : i + ANNOUNCE_CHANNELS])
        return number

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        session = self._session
        if session is not None:
            self._subscriptions.flush(session)
            if self._buffer.flush(session):
                self._send_control(self._to_all, BEAT)

    # --- the connection ----------------------------------------------------
    async def _run(self) -> None:
        """Keep the bus connected until it closes; do not reconnect after the goodbye."""
        backoff = Backoff(RECONNECT_FIRST_S, RECONNECT_MOST_S)
        while not self._closing:
            try:
                session = await self._connect()
            except (LinkError, ReplyError, TimeoutError, OSError) as exc:
                self._log_down(str(exc) or "redis does not answer")
                self._set_started()
                await asyncio.sleep(backoff.next())
                continue
            try:
                since = self._loop.time()
                self._connected(session)
                why = await asyncio.shield(session.lost)
                self._disconnected()
                self._log_down(why)
                self._need_resync("the connection to redis is lost")
            finally:
                await asyncio.shield(session.close())
            if self._loop.time() - since > SILENT_AFTER_BEATS * self._beat_s:
                backoff.reset()
            await asyncio.sleep(backoff.next())

    async def _connect(self) -> RedisSession:
        """A session in which every subscription is confirmed.

        :raises LinkError: or ReplyError, TimeoutError, OSError: not now.
        """
        session = RedisSession(
            self.address,
            await self._discovery.find(),
            self.stats,
            sender=self._sender,
            beat_channel=self._to_all,
            channels=self._subscriptions.channels,
            on_bus=self._listener.on_bus,
            on_packet=self._on_packet,
            on_own=self._on_own,
            on_drained=self._flush,
        )
        try:
            async with asyncio.timeout(self._confirm_s):
                await session.open(f"chatcore-{self._name}", self._queue_bytes)
            await session.confirm([self._to_all, self._to_me, *self._subscriptions.channels], self._confirm_s)
        except BaseException:
            await asyncio.shield(session.close())
            raise
        return session

    def _connected(self, session: RedisSession) -> None:
        """From here on messages get through, and the listener looks for what was missed before."""
        self._session = session
        self.stats.sessions += 1
        self._own_heard = self._loop.time()
        self._buffer.connected(session)
        # The announcements of the peers were missed meanwhile: when their heartbeats come, they are asked anew.
        for name in self._peers.names:
            self._peers.forget(name)
            notify(self._listener.on_peer_gone, name)
        self._need_resync("connected to redis")
        self._subscriptions.connected(session, {self._to_all, self._to_me})
        self._receivers = -1
        (packet,) = packets(self._sender, [record(b"", self._control(HELLO))])
        session.ask(self._to_all, packet).add_done_callback(self._greeted)
        self._flush()

    def _greeted(self, receivers: asyncio.Future[int]) -> None:
        if not receivers.cancelled():
            self._receivers = receivers.result()
            self._finish_start()

    def _finish_start(self) -> None:
        """End `start` if every worker that received the greeting has greeted back."""
        if self._proven and 0 <= self._receivers <= len(self._peers) + 1:
            self._set_started()

    def _set_started(self) -> None:
        if not self._started.done():
            self._started.set_result(None)

    def _disconnected(self) -> None:
        self._session = None
        self._proven = False
        self._buffer.disconnected()
        self._subscriptions.disconnected()

    def _log_down(self, why: str) -> None:
        """One line when the connection is lost, and one for each new reason why there is none."""
        if why not in self._logged_reasons and len(self._logged_reasons) < REASONS:
            self._logged_reasons.add(why)
            log.warning("redis bus: not connected to %s: %s", self.address, why)

    # --- heartbeats --------------------------------------------------------
    def _on_own(self) -> None:
        """A packet of this worker came back through Redis, from its publishing link to its subscribed one."""
        self._own_heard = self._loop.time()
        if not self._proven and self._session is not None:
            self._proven = True
            self._logged_reasons.clear()
            log.info("redis bus: connected to %s", self.address)
            self._finish_start()

    async def _beat_forever(self) -> None:
        beats = 0
        while True:
            due = self._loop.time() + self._beat_s
            await asyncio.sleep(self._beat_s)
            if self._closing:
                return  # this worker's own heartbeats have ended, so their absence means nothing
            session = self._session
            if session is None:
                continue
            session.beat()
            self._send_control(self._to_all, BEAT)
            beats += 1
            idle = self._checking is None or self._checking.done()
            if self._discovery.can_change and beats % TOPOLOGY_BEATS == 0 and idle:
                # Beside the heartbeats, which must not wait for a sentinel that is away.
                self._checking = self._tasks.spawn(self._check_topology(session), "bus-topology")
            # If this loop was late itself, what was sent to it is still unread: nothing counts as silent.
            if self._loop.time() - due < self._beat_s:
                self._check_liveness(session)

    def _check_liveness(self, session: RedisSession) -> None:
        now = self._loop.time()
        patience = SILENT_AFTER_BEATS * self._beat_s
        if now - self._own_heard > patience:
            session.fail("the own heartbeat does not come back")
        elif session.silent_for() > patience:
            session.fail("a server is silent")
        else:
            for name in self._peers.silent(now):
                self._peer_gone(name, "is silent")

    async def _check_topology(self, session: RedisSession) -> None:
        try:
            if await self._discovery.find() != session.topology:
                session.fail("other servers are in charge now")
        except (LinkError, ReplyError, OSError):
            pass  # unknown: the heartbeats decide

    # --- what comes in -----------------------------------------------------
    def _on_packet(self, redis_channel: bytes, packet: bytes) -> None:
        """Everything but a single message on a subscribed channel."""
        ours = redis_channel in (self._to_all, self._to_me)
        try:
            if packet[SENDER_BYTES : SENDER_BYTES + 1] == b"\0" and not ours:
                return  # unsubscribed meanwhile
            for channel, payload in parse_records(packet):
                if ours and not channel:
                    self._on_control(parse_control(payload))
                    continue
                name = self._subscriptions.channels.get(self._prefix + b":" + channel if ours else redis_channel)
                if name is not None:
                    self.stats.received += 1
                    notify(self._listener.on_bus, name, payload)
        except BusFormatError as exc:
            self.stats.malformed += 1
            log.debug("redis bus: packet on %r dropped: %s", redis_channel, exc)

    def _on_control(self, control: Control) -> None:
        name = control.name
        if control.kind == BYE:
            self._peer_gone(name, "leaves")
            return
        change = self._peers.hear(control, self._loop.time())
        if change:
            self._finish_start()
            if change == LOST:
                notify(self._listener.on_peer_gone, name)
            self._need_resync(f"{name} {change}")
            self._ask_peers(self._to(name), self._subscriptions.announced())
        if control.kind == HELLO:
            self._send_control(self._to(name), BEAT)
        elif control.kind == ASK:
            for channel in control.channels:
                notify(self._listener.on_peer_subscribed, name, channel)
            self._send_control(self._to(name), ANSWER, control.number)
        elif control.kind == ANSWER:
            self._peers.answered(name, control.number)

    def _peer_gone(self, name: str, why: str) -> None:
        if self._peers.forget(name):
            notify(self._listener.on_peer_gone, name)
            self._need_resync(f"{name} {why}")

    def _need_resync(self, why: str) -> None:
        if not self._closing:
            log.debug("redis bus: %s", why)
            notify(self._listener.on_resync_needed, why)
