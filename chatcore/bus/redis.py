"""The bus between the workers of all hosts, by way of Redis' pub/sub.

Channels, as Redis calls them (pub/sub ignores database numbers, so the prefix says whose they are)::

    <prefix>:<channel>     messages
    <prefix>!all           what every worker tells of itself: heartbeats, arrivals, subscriptions, goodbyes
    <prefix>!to:<worker>   messages and answers for one worker

Redis forgets: what is published while a connection is away is gone, silently. So whatever may
have been missed is made a doubt, on the side that can know it:

* *This worker* was not connected, or its own heartbeat does not come back through the server:
  a doubt here, when the connection is lost and again when all subscriptions are confirmed.
* *A peer* could not publish (it was not connected, its queue overflowed): its ``losses`` change,
  which is seen in its next heartbeat: a doubt at everybody else.
* A worker that comes, goes, or is silent for three heartbeats is a doubt, too.

What a worker knows of a peer's presence is asked for again in all three cases: ``on_peer_gone``,
then every subscription that is announced (``announce``, those of presence) is told to that peer,
which answers as if it had just been made.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final

from ..common.backoff import Backoff
from ..common.redis_client import RedisAddress, parse_url
from .base import BusListener
from .redis_frames import (
    ANSWER,
    ASK,
    BEAT,
    BYE,
    HELLO,
    SENDER_BYTES,
    Control,
    Malformed,
    packets,
    parse_control,
    parse_records,
    record,
)
from .redis_link import LinkError, Refused
from .redis_outbox import Outbox
from .redis_peers import LOST, Peers
from .redis_place import Place
from .redis_session import RedisBusStats, Session
from .redis_subscriptions import Subscriptions

log = logging.getLogger(__name__)

#: After so many silent heartbeats a worker, or Redis, counts as gone.
SILENT_AFTER_BEATS: Final = 3
#: Sentinels and clusters are asked for their layout every so many heartbeats: an old primary behind
#: a broken network looks well to those who are on its side.
LAYOUT_BEATS: Final = 5
#: Pauses between attempts to connect; the longest bounds how late a worker is back.
RECONNECT_FIRST_S: Final = 0.05
RECONNECT_MOST_S: Final = 1.0
#: Subscriptions in one message to the peers.
ANNOUNCE_CHANNELS: Final = 500
#: Reasons of one outage that are told: it may alternate between some for hours.
REASONS: Final = 5


class RedisBus:
    """A :class:`~chatcore.bus.base.Bus` for the workers of all hosts that use one Redis and one prefix.

    :param url: see :mod:`chatcore.common.redis_client`; Redis 7 if it is a cluster (sharded pub/sub), else 5.
    :param name: ``<host>-<slot>-<nonce>``, never used by two processes.
    :param prefix: of every channel; holds the id of the store.
    :param queue_bytes: bound of what waits for a slow Redis; more is dropped, and the others told.
    :param confirm_timeout_ms: for one attempt to connect, for a subscription, and for `close`.
    :param announce: begin of the channels whose subscription peers are told (``on_peer_subscribed``).
    :raises ValueError: the URL or the name is malformed.
    """

    def __init__(
        self,
        url: str | RedisAddress,
        name: str,
        *,
        prefix: str,
        queue_bytes: int,
        confirm_timeout_ms: int,
        heartbeat_ms: int,
        announce: str = "p:",
    ) -> None:
        if not 0 < len(name.encode()) <= 200 or not name.isprintable() or " " in name:
            raise ValueError(f"bus name {name!r}: 1 to 200 printable bytes without spaces are allowed")
        self.address = parse_url(url) if isinstance(url, str) else url
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
        self._place = Place(self.address, f"chatcore-{name}", self._confirm_s)
        self._peers = Peers(SILENT_AFTER_BEATS)
        self._outbox = Outbox(self._prefix, self._sender, queue_bytes, self.stats, self._flush_soon)
        self._subscriptions = Subscriptions(
            self._prefix, self._confirm_s, announce, self._peers,
            ask_peers=partial(self._ask_peers, self._to_all), doubt=self._doubt, flush_soon=self._flush_soon,
        )  # fmt: skip
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking: asyncio.Task[None] | None = None
        self._closing = False
        self._session: Session | None = None
        self._flush_due = False
        self._proven = False  # the own heartbeat came back, and still does
        self._own_heard = 0.0
        self._receivers = -1  # workers that heard the greeting, this one included; -1: not known yet
        self._why_down: set[str] = set()  # reasons told already; empty while connected
        self._started: asyncio.Future[None]
        self._loop: asyncio.AbstractEventLoop
        self._listener: BusListener

    # --- the interface -----------------------------------------------------
    @property
    def name(self) -> str:
        return self._name

    @property
    def peers(self) -> list[str]:
        """Names of the workers that were heard."""
        return self._peers.names

    @property
    def healthy(self) -> bool:
        """Connected, every subscription confirmed at least once, and the own heartbeat comes back."""
        return self._proven and not self._outbox.overflowed

    async def start(self, listener: BusListener) -> None:
        """Connect, and wait for the workers that are there. Returns after the timeout, or after a first
        attempt that failed, all the same: a worker serves without Redis, and goes on trying."""
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._started = self._loop.create_future()
        self._own_task(self._run())
        self._own_task(self._beat_forever())
        await asyncio.wait((self._started,), timeout=self._confirm_s)

    async def close(self) -> None:
        """Send what is queued and a goodbye, bounded by the confirm timeout, then end everything. Ends every wait."""
        if self._closing or not self._tasks:
            return
        self._say(self._to_all, BYE)
        self._closing = True
        session = self._session
        if session is not None:
            self._flush()
            try:
                async with asyncio.timeout(self._confirm_s):
                    await session.settled()
            except TimeoutError:
                pass
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._disconnected()

    async def subscribe(self, channels: list[str]) -> None:
        """See :meth:`Bus.subscribe`. Without a connection it returns at once: the doubt comes with the
        connection. One that Redis does not confirm in time, or a peer does not answer, is a doubt.
        A cancelled call subscribed to nothing.

        :raises ValueError: a channel of no or of more than 200 bytes.
        """
        if not self._closing:
            await self._subscriptions.add(channels)

    def unsubscribe(self, channels: list[str]) -> None:
        """Take back one `subscribe` of each; unknown ones are ignored."""
        self._subscriptions.remove(channels)

    def publish(self, channel: str, payload: bytes) -> None:
        self.stats.published += 1
        self._outbox.publish(channel, payload)

    def send_to(self, peer: str, channel: str, payload: bytes) -> None:
        if peer != self._name:
            self._outbox.send(self._to(peer), channel, payload)

    # --- one write per tick ------------------------------------------------
    def _to(self, peer: str) -> bytes:
        return self._prefix + b"!to:" + peer.encode()

    def _say(self, to: bytes, kind: int, number: int = 0, channels: Sequence[str] = ()) -> None:
        """A control message to one worker or all. None after the goodbye: it would make this a peer again."""
        if not self._closing:
            self._outbox.control(to, self._told(kind, number, channels))

    def _told(self, kind: int, number: int = 0, channels: Sequence[str] = ()) -> bytes:
        """The body of a control message."""
        return Control(
            kind, self._name, self._outbox.losses & 0xFFFFFFFF, self._beat_ms, number, tuple(channels)
        ).pack()  # fmt: skip

    def _ask_peers(self, to: bytes, channels: list[str]) -> int:
        """Tell one peer, or all, of subscriptions; the number that the answer to the last part will have."""
        number = 0
        for i in range(0, len(channels), ANNOUNCE_CHANNELS):
            number = self._peers.number()
            self._say(to, ASK, number, channels[i : i + ANNOUNCE_CHANNELS])
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
            if self._outbox.flush(session):
                self._say(self._to_all, BEAT)

    # --- the connection ----------------------------------------------------
    async def _run(self) -> None:
        """Be connected, as long as the bus lives: not anew after the goodbye."""
        backoff = Backoff(RECONNECT_FIRST_S, RECONNECT_MOST_S)
        while not self._closing:
            try:
                session = await self._connect()
            except (LinkError, Refused, TimeoutError, OSError) as exc:
                self._note_down(str(exc) or "redis does not answer")
                self._set_started()
                await asyncio.sleep(backoff.next())
                continue
            try:
                since = self._loop.time()
                self._connected(session)
                why = await asyncio.shield(session.lost)
                self._disconnected()
                self._note_down(why)
                self._doubt("the connection to redis is lost")
            finally:
                await asyncio.shield(session.close())
            if self._loop.time() - since > SILENT_AFTER_BEATS * self._beat_s:
                backoff.reset()
            await asyncio.sleep(backoff.next())

    async def _connect(self) -> Session:
        """A session in which every subscription is confirmed.

        :raises LinkError: or Refused, TimeoutError, OSError: not now.
        """
        session = Session(
            self.address,
            await self._place.find(),
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

    def _connected(self, session: Session) -> None:
        """From here on messages get through, and what was missed before is looked for."""
        self._session = session
        self.stats.sessions += 1
        self._own_heard = self._loop.time()
        self._outbox.connected(session)
        # What the peers announced meanwhile was missed: all of it is asked for again, when they are heard.
        for name in self._peers.names:
            self._peers.forget(name)
            self._tell(self._listener.on_peer_gone, name)
        self._doubt("connected to redis")
        self._subscriptions.connected(session, {self._to_all, self._to_me})
        self._receivers = -1
        (packet,) = packets(self._sender, [record(b"", self._told(HELLO))])
        session.ask(self._to_all, packet).add_done_callback(self._greeted)
        self._flush()

    def _greeted(self, receivers: asyncio.Future[int]) -> None:
        if not receivers.cancelled():
            self._receivers = receivers.result()
            self._look_at_start()

    def _look_at_start(self) -> None:
        """`start` is done when everybody who heard the greeting has greeted back."""
        if self._proven and 0 <= self._receivers <= len(self._peers) + 1:
            self._set_started()

    def _set_started(self) -> None:
        if not self._started.done():
            self._started.set_result(None)

    def _disconnected(self) -> None:
        self._session = None
        self._proven = False
        self._outbox.disconnected()
        self._subscriptions.disconnected()

    def _note_down(self, why: str) -> None:
        """One line when it goes away, and one for each new reason why it cannot be reached."""
        if why not in self._why_down and len(self._why_down) < REASONS:
            self._why_down.add(why)
            log.warning("redis bus: not connected to %s: %s", self.address, why)

    # --- heartbeats --------------------------------------------------------
    def _on_own(self) -> None:
        """Something of this worker came back through Redis, from its publishing link to its subscribed one."""
        self._own_heard = self._loop.time()
        if not self._proven and self._session is not None:
            self._proven = True
            self._why_down.clear()
            log.info("redis bus: connected to %s", self.address)
            self._look_at_start()

    async def _beat_forever(self) -> None:
        beats = 0
        while True:
            due = self._loop.time() + self._beat_s
            await asyncio.sleep(self._beat_s)
            if self._closing:
                return  # nor is anybody judged by heartbeats that are not sent any more
            session = self._session
            if session is None:
                continue
            session.beat()
            self._say(self._to_all, BEAT)
            beats += 1
            if self._place.moves and beats % LAYOUT_BEATS == 0 and (self._looking is None or self._looking.done()):
                # Beside the heartbeats, which must not wait for a sentinel that is away.
                self._looking = self._own_task(self._look_at_layout(session))
            # If this loop was late itself, what was sent to it is still unread: judge nobody.
            if self._loop.time() - due < self._beat_s:
                self._judge(session)

    def _judge(self, session: Session) -> None:
        now = self._loop.time()
        patience = SILENT_AFTER_BEATS * self._beat_s
        if now - self._own_heard > patience:
            session.fail("the own heartbeat does not come back")
        elif session.silent_for() > patience:
            session.fail("a server is silent")
        else:
            for name in self._peers.silent(now):
                self._gone(name, "is silent")

    async def _look_at_layout(self, session: Session) -> None:
        try:
            if await self._place.find() != session.layout:
                session.fail("other servers are in charge now")
        except (LinkError, Refused, OSError):
            pass  # nobody knows: the heartbeats decide

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
                    self._tell(self._listener.on_bus, name, payload)
        except Malformed as exc:
            self.stats.malformed += 1
            log.debug("redis bus: packet on %r dropped: %s", redis_channel, exc)

    def _on_control(self, control: Control) -> None:
        name = control.name
        if control.kind == BYE:
            self._gone(name, "leaves")
            return
        news = self._peers.hear(control, self._loop.time())
        if news:
            self._look_at_start()
            if news == LOST:
                self._tell(self._listener.on_peer_gone, name)
            self._doubt(f"{name} {news}")
            self._ask_peers(self._to(name), self._subscriptions.announced())
        if control.kind == HELLO:
            self._say(self._to(name), BEAT)
        elif control.kind == ASK:
            for channel in control.channels:
                self._tell(self._listener.on_peer_subscribed, name, channel)
            self._say(self._to(name), ANSWER, control.number)
        elif control.kind == ANSWER:
            self._peers.answered(name, control.number)

    def _gone(self, name: str, why: str) -> None:
        if self._peers.forget(name):
            self._tell(self._listener.on_peer_gone, name)
            self._doubt(f"{name} {why}")

    # --- small things ------------------------------------------------------
    def _doubt(self, why: str) -> None:
        if not self._closing:
            log.debug("redis bus: %s", why)
            self._tell(self._listener.on_doubt, why)

    def _tell(self, method: Callable[..., None], *args: str | bytes) -> None:
        """A bug in the listener must not end the connection."""
        try:
            method(*args)
        except Exception:
            log.exception("%s failed", getattr(method, "__name__", method))

    def _own_task(self, coro: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("redis bus: a task failed", exc_info=task.exception())
