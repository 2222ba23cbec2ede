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
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from ..breaker import Backoff
from ..redis_client import RedisAddress, parse_url
from .base import BusListener
from .redis_frames import (
    ANSWER,
    ASK,
    BEAT,
    BYE,
    HELLO,
    MAX_CHANNEL_BYTES,
    MAX_PAYLOAD_BYTES,
    ONE,
    SENDER_BYTES,
    Control,
    Malformed,
    packets,
    parse_control,
    parse_records,
    record,
)
from .redis_link import LinkError, Refused
from .redis_peers import LOST, Peers
from .redis_place import Place
from .redis_session import RedisBusStats, Session

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
#: What a message weighs in the queue besides its payload.
MESSAGE_BYTES: Final = 100


class _Asking:
    """Calls of `subscribe` that wait: for confirmations of Redis, then for the answers of the peers."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.done: asyncio.Future[None] = loop.create_future()
        self.announced: list[str] = []
        self.number = 0  # of the question to the peers; 0: not asked
        self.timer: asyncio.TimerHandle | None = None
        self.late = ""  # nobody waits any longer: its confirmation is a doubt, and this says why


class RedisBus:
    """A :class:`~chatcore.bus.base.Bus` for the workers of all hosts that use one Redis and one prefix.

    :param url: see :mod:`chatcore.redis_client`; Redis 7 if it is a cluster (sharded pub/sub), else 5.
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
        #: Times at which something that this worker published may have got lost on its side.
        self.losses = 0
        self._name = name
        self._prefix = prefix.encode()
        self._queue_bytes = queue_bytes
        self._confirm_s = confirm_timeout_ms / 1000
        self._beat_ms = heartbeat_ms
        self._beat_s = heartbeat_ms / 1000
        self._announce = announce
        self._sender = os.urandom(SENDER_BYTES)
        self._to_all = self._prefix + b"!all"
        self._to_me = self._to(name)
        self._place = Place(self.address, f"chatcore-{name}", self._confirm_s)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._session: Session | None = None
        self._proven = False  # the own heartbeat came back, and still does
        self._own_heard = 0.0
        self._why_down: set[str] = set()  # reasons told already; empty while connected
        self._peers = Peers(SILENT_AFTER_BEATS)
        # Subscriptions:
        self._counts: dict[str, int] = {}
        self._channels: dict[bytes, str] = {}  # those of `_counts`, as Redis calls them
        self._touched: dict[bytes, None] = {}  # to be looked at by the next flush
        self._asking: _Asking | None = None  # of this tick
        self._unconfirmed: dict[_Asking, None] = {}
        # What is to be published at the end of the tick:
        self._messages: dict[str, list[bytes]] = {}
        self._records: dict[bytes, list[bytes]] = {}
        self._queued = 0  # bytes in `_messages`, `_records`, and, when last looked, in the links
        self._unsent = 0  # the part of it in the links
        self._limit = -1  # while there is no session, or it overflowed: one comparison on the hot path
        self._flush_due = False
        self._overflowed = False
        self._started: asyncio.Future[None]
        self._receivers = -1  # workers that heard the greeting, this one included; -1: not known yet
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
        return self._proven and not self._overflowed

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
        self._closing = True
        session = self._session
        if session is not None:
            self._control(BYE)
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
        if self._closing:
            return
        encoded = [channel.encode() for channel in channels]
        for raw in encoded:
            if not 0 < len(raw) <= MAX_CHANNEL_BYTES:
                raise ValueError(f"channel of {len(raw)} bytes: 1 to {MAX_CHANNEL_BYTES} are allowed")
        for channel, raw in zip(channels, encoded, strict=True):
            count = self._counts.get(channel, 0)
            self._counts[channel] = count + 1
            if not count:
                redis_channel = self._prefix + b":" + raw
                self._channels[redis_channel] = channel
                self._touched[redis_channel] = None
                if self._session is not None:
                    if self._asking is None:
                        self._asking = self._ask_later()
                    if channel.startswith(self._announce):
                        self._asking.announced.append(channel)
        try:
            # What is known already may still be unconfirmed: so all that is.
            for asking in list(self._unconfirmed):
                await asyncio.shield(asking.done)
        except asyncio.CancelledError:
            self.unsubscribe(channels)
            raise

    def unsubscribe(self, channels: list[str]) -> None:
        """Take back one `subscribe` of each; unknown ones are ignored."""
        for channel in channels:
            count = self._counts.get(channel, 0)
            if count > 1:
                self._counts[channel] = count - 1
            elif count:
                del self._counts[channel]
                redis_channel = self._prefix + b":" + channel.encode()
                del self._channels[redis_channel]
                self._touched[redis_channel] = None
                self._flush_soon()

    def publish(self, channel: str, payload: bytes) -> None:
        self.stats.published += 1
        queued = self._queued + len(payload) + MESSAGE_BYTES
        if queued > self._limit or len(payload) > MAX_PAYLOAD_BYTES:
            if not self._has_room(channel, payload):
                return
            queued = self._queued + len(payload) + MESSAGE_BYTES
        self._queued = queued
        messages = self._messages.get(channel)
        if messages is None:
            self._messages[channel] = [payload]
        else:
            messages.append(payload)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def send_to(self, peer: str, channel: str, payload: bytes) -> None:
        raw = channel.encode()
        if peer == self._name or not self._has_room(channel, payload):
            return
        self._queued += len(payload) + MESSAGE_BYTES
        self._records.setdefault(self._to(peer), []).append(record(raw, payload))
        self._flush_soon()

    # --- one write per tick ------------------------------------------------
    def _to(self, peer: str) -> bytes:
        return self._prefix + b"!to:" + peer.encode()

    def _has_room(self, channel: str, payload: bytes) -> bool:
        """The slow look: Redis may have taken something since the last one. False: dropped."""
        session = self._session
        if len(payload) > MAX_PAYLOAD_BYTES or len(channel.encode()) > MAX_CHANNEL_BYTES:
            log.error("a message of %d bytes for channel %.40s is over the limit", len(payload), channel)
            self.losses += 1
        elif session is not None and not self._overflowed:
            self._queued -= self._unsent
            self._unsent = session.unsent
            self._queued += self._unsent
            if self._queued + len(payload) + MESSAGE_BYTES <= self._queue_bytes:
                return True
            self._overflowed = True
            self._limit = -1
            self._flush_soon()
            log.warning("redis bus: redis takes nothing, messages of this worker are dropped")
        self.stats.dropped += 1
        return False

    def _control(self, kind: int, peer: str = "", number: int = 0, channels: tuple[str, ...] = ()) -> None:
        """Tell one worker, or all, something of this one. Not bounded by the queue, which it is to unlock."""
        control = Control(kind, self._name, self.losses & 0xFFFFFFFF, self._beat_ms, number, channels)
        to = self._to(peer) if peer else self._to_all
        self._records.setdefault(to, []).append(record(b"", control.pack()))
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        session = self._session
        if session is None:
            return
        self._flush_subscriptions(session)
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
        if self._overflowed and self._queued <= self._queue_bytes // 2:
            self._overflowed = False
            self._limit = self._queue_bytes
            self.losses += 1
            self._control(BEAT)

    # --- subscriptions -----------------------------------------------------
    def _ask_later(self) -> _Asking:
        """For the subscriptions of this tick."""
        asking = _Asking(self._loop)
        asking.timer = self._loop.call_later(self._confirm_s, self._too_late, asking)
        self._unconfirmed[asking] = None
        self._flush_soon()
        return asking

    def _flush_subscriptions(self, session: Session) -> None:
        asking, self._asking = self._asking, None
        if self._touched:
            touched = list(self._touched)
            self._touched.clear()
            session.unsubscribe(channel for channel in touched if channel not in self._channels)
            wanted = (channel for channel in touched if channel in self._channels)
            session.subscribe(wanted, partial(self._confirmed, session, asking))
        elif asking is not None:
            self._confirmed(session, asking)

    def _confirmed(self, session: Session, asking: _Asking | None) -> None:
        """Redis confirmed the subscriptions of a tick."""
        if session is not self._session or asking is None:
            return
        if asking.late:
            self._doubt(asking.late)
        announced = [channel for channel in asking.announced if channel in self._counts]
        if announced and len(self._peers):
            asking.number = self._ask_peers("", announced)
            self._peers.owe(asking.number, self._peers.names, partial(self._release, asking))
        else:
            self._release(asking)

    def _ask_peers(self, peer: str, channels: list[str]) -> int:
        """Tell one peer, or all, of subscriptions; the number that the answer to the last part will have."""
        number = 0
        for i in range(0, len(channels), ANNOUNCE_CHANNELS):
            number = self._peers.number()
            self._control(ASK, peer, number, tuple(channels[i : i + ANNOUNCE_CHANNELS]))
        return number

    def _too_late(self, asking: _Asking) -> None:
        if asking.number:
            self._doubt(f"no answer to subscriptions from {', '.join(self._peers.excuse(asking.number))}")
        else:
            asking.late = "subscriptions were confirmed late"
            self._doubt("subscriptions are not confirmed in time")
        self._release(asking)

    def _release(self, asking: _Asking) -> None:
        self._unconfirmed.pop(asking, None)
        if asking.timer is not None:
            asking.timer.cancel()
        if not asking.done.done():
            asking.done.set_result(None)

    # --- the connection ----------------------------------------------------
    async def _run(self) -> None:
        """Be connected, as long as the bus lives."""
        backoff = Backoff(RECONNECT_FIRST_S, RECONNECT_MOST_S)
        while True:
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
            channels=self._channels,
            on_bus=self._listener.on_bus,
            on_packet=self._on_packet,
            on_own=self._on_own,
            on_drained=self._flush,
        )
        try:
            async with asyncio.timeout(self._confirm_s):
                await session.open(f"chatcore-{self._name}", self._queue_bytes)
            await session.confirm([self._to_all, self._to_me, *self._channels], self._confirm_s)
        except BaseException:
            await asyncio.shield(session.close())
            raise
        return session

    def _connected(self, session: Session) -> None:
        """From here on messages get through, and what was missed before is looked for."""
        self._session = session
        self.stats.sessions += 1
        self._limit = self._queue_bytes
        self._own_heard = self._loop.time()
        # What the peers announced meanwhile was missed: all of it is asked for again, when they are heard.
        for name in self._peers.names:
            self._peers.forget(name)
            self._tell(self._listener.on_peer_gone, name)
        self._doubt("connected to redis")
        # Subscriptions that came while the others were confirmed.
        changed = self._channels.keys() ^ (session.subscribed - {self._to_all, self._to_me})
        if changed:
            self._touched.update(dict.fromkeys(changed))
            self._asking = self._ask_later()
            self._asking.late = "subscriptions made while connecting are confirmed"
        self._receivers = -1
        hello = Control(HELLO, self._name, self.losses & 0xFFFFFFFF, self._beat_ms)
        (packet,) = packets(self._sender, [record(b"", hello.pack())])
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
        self._proven = self._overflowed = False
        self._limit = -1
        self.stats.dropped += sum(map(len, self._messages.values()))
        self._messages.clear()
        self._records.clear()
        self._touched.clear()
        self._queued = self._unsent = 0
        # Whatever was sent and not answered, and whatever is published until the next session.
        self.losses += 1
        self._asking = None
        for asking in list(self._unconfirmed):
            self._peers.excuse(asking.number)
            self._release(asking)

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
            session = self._session
            if session is None:
                continue
            session.beat()
            self._control(BEAT)
            beats += 1
            if self._place.moves and beats % LAYOUT_BEATS == 0:
                await self._look_at_layout(session)
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
        except (LinkError, Refused):
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
                name = self._channels.get(self._prefix + b":" + channel if ours else redis_channel)
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
            self._ask_peers(name, [channel for channel in self._counts if channel.startswith(self._announce)])
        if control.kind == HELLO:
            self._control(BEAT, name)
        elif control.kind == ASK:
            for channel in control.channels:
                self._tell(self._listener.on_peer_subscribed, name, channel)
            self._control(ANSWER, name, control.number)
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

    def _own_task(self, coro: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("redis bus: a task failed", exc_info=task.exception())
