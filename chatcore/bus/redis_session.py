"""One life of the connections to Redis: subscriptions and their confirmations, commands and their replies.

To every server there are two links, one that is subscribed and one that publishes (in RESP2 a
subscribed connection can do nothing else). Whatever goes wrong with any of them ends the session
as a whole, and the next one begins with everything anew: a session that is up has heard each of
its subscriptions confirmed, in the order in which it asked, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from ..common.redis_client import RedisAddress
from .redis_frames import command
from .redis_link import NOTHING, Link, LinkError, Refused
from .redis_place import Layout

log = logging.getLogger(__name__)

#: Channels in one SUBSCRIBE: Redis does nothing else until it has worked through a command.
SUBSCRIBE_CHANNELS: Final = 500


@dataclass(slots=True)
class RedisBusStats:
    """Counters since the start, for metrics.

    ``sent``: packets, each of one or more messages of a tick for one channel. ``own``: packets of this
    worker that came back. ``dropped``: messages that a full queue or the lack of a connection did not
    take. ``sessions``: how often it was connected.
    """

    published: int = 0
    sent: int = 0
    received: int = 0
    own: int = 0
    dropped: int = 0
    malformed: int = 0
    sessions: int = 0


class Wait:
    """For some subscriptions to be confirmed. ``on_done`` is called once, when all of them are."""

    __slots__ = ("left", "on_done")

    def __init__(self, left: int, on_done: Callable[[], None]) -> None:
        self.left = left
        self.on_done = on_done


class _Server:
    """The two links to one server."""

    def __init__(self, sub: Link, pub: Link) -> None:
        self.sub = sub
        self.pub = pub
        self.out: list[bytes] = []  # commands of this tick for `pub`
        self.sent = 0  # commands to `pub`, and replies from it
        self.answered = 0
        self.expected: deque[tuple[bytes, bytes, Wait]] = deque()  # verb, channel: confirmations to come
        self.asked: deque[tuple[int, asyncio.Future[int]]] = deque()  # number of a command: wants its reply


class Session:
    """See the module. Errors end it: :attr:`lost` is then set to the reason.

    :param sender: what packets of this worker begin with.
    :param beat_channel: the channel on which own packets are told to ``on_own``.
    :param channels: own subscriptions, as Redis calls them, and their names; read at every message.
    :param on_bus: takes the name and the payload of a simple packet for one of them.
    :param on_packet: takes (channel as Redis calls it, packet) of every other packet.
    """

    def __init__(
        self,
        address: RedisAddress,
        layout: Layout,
        stats: RedisBusStats,
        *,
        sender: bytes,
        beat_channel: bytes,
        channels: dict[bytes, str],
        on_bus: Callable[[str, bytes], Any],
        on_packet: Callable[[bytes, bytes], None],
        on_own: Callable[[], None],
        on_drained: Callable[[], None],
    ) -> None:
        self.address = address
        self.layout = layout
        self.stats = stats
        self.loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[str] = self.loop.create_future()
        self.subscribed: set[bytes] = set()  # or asked for
        self._sender = sender
        self._beat_channel = beat_channel
        self._channels = channels
        self._on_bus = on_bus
        self._on_packet = on_packet
        self._on_own = on_own
        self._on_drained = on_drained
        sharded = b"S" if address.cluster else b""
        self._subscribe = sharded + b"SUBSCRIBE"
        self._unsubscribe = sharded + b"UNSUBSCRIBE"
        self._publish = b"*3\r\n$%d\r\n%bPUBLISH\r\n" % (7 + len(sharded), sharded)
        self._message = b"smessage" if sharded else b"message"
        # A cluster takes channels of one slot in one command.
        self._at_once = 1 if sharded else SUBSCRIBE_CHANNELS
        self._servers: list[_Server] = []

    # --- life ------------------------------------------------------------------
    async def open(self, name: str, queue_bytes: int) -> None:
        """Connect all links. The caller bounds the time, and closes in any case.

        :raises LinkError: one cannot be made.
        :raises Refused: the server does not let this user in.
        """
        links: list[tuple[Link, tuple[str, int]]] = []
        for address in self.layout.servers:
            server = _Server(Link(self.loop, self.fail), Link(self.loop, self.fail))
            self._servers.append(server)
            links += ((server.sub, address), (server.pub, address))
        auth = (self.address.username, self.address.password)
        await asyncio.gather(*(link.open(self.address, where, name, auth) for link, where in links))
        for server in self._servers:
            server.sub.consume = self._consume_pushed(server)
            server.pub.consume = self._consume_replies(server)
            server.pub.on_drained = self._on_drained
            if server.pub.transport is not None:
                half = queue_bytes // 2
                server.pub.transport.set_write_buffer_limits(half, half)

    async def close(self) -> None:
        """End every link now."""
        self.fail("closed")
        for server in self._servers:
            server.sub.drop()
            server.pub.drop()
        for server in self._servers:
            await server.sub.gone()
            await server.pub.gone()

    async def settled(self) -> None:
        """Wait until every command was answered, or the session is lost."""
        for server in self._servers:
            if server.answered < server.sent and not self.lost.done():
                future: asyncio.Future[int] = self.loop.create_future()
                server.asked.append((server.sent, future))
                await asyncio.wait((future, self.lost), return_when=asyncio.FIRST_COMPLETED)

    def fail(self, why: str) -> None:
        """Something is wrong: whoever owns the session ends it."""
        if not self.lost.done():
            self.lost.set_result(why)

    # --- subscriptions -------------------------------------------------------------
    def subscribe(self, channels: Iterable[bytes], on_done: Callable[[], None]) -> None:
        """Ask for channels that are not subscribed; ``on_done`` when the last one is confirmed (at once if there
        are none)."""
        fresh = [channel for channel in channels if channel not in self.subscribed]
        if not fresh:
            on_done()
            return
        self.subscribed.update(fresh)
        self._tell(self._subscribe, fresh, Wait(len(fresh), on_done))

    async def confirm(self, channels: Iterable[bytes], patience_s: float) -> None:
        """Subscribe, and wait as long as confirmations keep coming.

        :raises LinkError: none came for that long, or the session is lost.
        """
        done: asyncio.Future[None] = self.loop.create_future()
        self.subscribe(channels, lambda: done.set_result(None))
        left = -1
        while not done.done():
            await asyncio.wait((done, self.lost), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            if self.lost.done():
                raise LinkError(self.lost.result())
            before, left = left, sum(len(server.expected) for server in self._servers)
            if left and left == before:
                raise LinkError("redis does not confirm subscriptions")

    def unsubscribe(self, channels: Iterable[bytes]) -> None:
        """Give subscribed channels up."""
        gone = [channel for channel in channels if channel in self.subscribed]
        self.subscribed.difference_update(gone)
        self._tell(self._unsubscribe, gone, Wait(len(gone), lambda: None))

    def _tell(self, verb: bytes, channels: list[bytes], wait: Wait) -> None:
        confirmed_by = verb.lower()
        by_server: dict[int, list[bytes]] = {}
        for channel in channels:
            by_server.setdefault(self.layout.index(channel), []).append(channel)
        for index, mine in by_server.items():
            server = self._servers[index]
            server.expected.extend((confirmed_by, channel, wait) for channel in mine)
            some = self._at_once
            server.sub.write(b"".join(command(verb, *mine[i : i + some]) for i in range(0, len(mine), some)))

    def _confirmed(self, server: _Server, verb: bytes, channel: bytes) -> None:
        if not server.expected or server.expected[0][:2] != (verb, channel):
            # A cluster takes a channel away when its slot moves; anything else has no reason to happen.
            self.fail(f"unexpected {verb.decode(errors='replace')} of {channel.decode(errors='replace')}")
            return
        wait = server.expected.popleft()[2]
        wait.left -= 1
        if not wait.left:
            wait.on_done()

    # --- publishing ------------------------------------------------------------------
    def publish(self, channel: bytes, packet: bytes) -> None:
        """Queue a packet for :meth:`flush`."""
        server = self._servers[self.layout.index(channel)]
        server.out.append(b"%b$%d\r\n%b\r\n$%d\r\n%b\r\n" % (self._publish, len(channel), channel, len(packet), packet))

    def ask(self, channel: bytes, packet: bytes) -> asyncio.Future[int]:
        """Queue a packet; how many got it (in a cluster: of its server's clients)."""
        future: asyncio.Future[int] = self.loop.create_future()
        server = self._servers[self.layout.index(channel)]
        self.publish(channel, packet)
        server.asked.append((server.sent + len(server.out), future))
        return future

    def flush(self) -> None:
        """One write per server for all that was queued; nothing waits for a reply."""
        for server in self._servers:
            out = server.out
            if out:
                server.sent += len(out)
                self.stats.sent += len(out)
                server.pub.write(out[0] if len(out) == 1 else b"".join(out))
                out.clear()

    @property
    def unsent(self) -> int:
        """Bytes of commands that the kernel has not taken."""
        return sum(server.pub.unsent for server in self._servers)

    # --- heartbeats --------------------------------------------------------------------
    def beat(self) -> None:
        """Make every link be heard that the bus' own heartbeat does not."""
        own = self.layout.index(self._beat_channel)
        for index, server in enumerate(self._servers):
            if index != own:
                server.sub.write(command(b"PING"))
                server.out.append(command(b"PING"))

    def silent_for(self) -> float:
        """For how many seconds the most silent link has been silent."""
        return self.loop.time() - min(min(server.sub.heard, server.pub.heard) for server in self._servers)

    # --- what comes in ------------------------------------------------------------------
    def _consume_replies(self, server: _Server) -> Callable[[Callable[[], Any]], None]:
        def consume(gets: Callable[[], Any]) -> None:
            while (reply := gets()) is not NOTHING:
                server.answered += 1
                if isinstance(reply, Refused):
                    self.fail(f"redis refuses to publish: {reply}")
                while server.asked and server.asked[0][0] <= server.answered:
                    future = server.asked.popleft()[1]
                    if not future.done():
                        future.set_result(reply if isinstance(reply, int) else 0)

        return consume

    def _consume_pushed(self, server: _Server) -> Callable[[Callable[[], Any]], None]:
        """Hot: every message of every subscribed channel passes here."""
        message = self._message
        sender = self._sender
        channel_of = self._channels.get
        on_bus = self._on_bus
        stats = self.stats

        def consume(gets: Callable[[], Any]) -> None:
            while (item := gets()) is not NOTHING:
                if not isinstance(item, list):
                    if isinstance(item, Refused):
                        self.fail(f"redis refuses to subscribe: {item}")
                    elif item != b"PONG":
                        raise LinkError("neither message nor confirmation")
                elif item[0] == message:
                    packet = item[2]
                    if packet.startswith(sender):
                        stats.own += 1
                        if item[1] == self._beat_channel:
                            self._on_own()
                        continue
                    channel = channel_of(item[1])
                    # 0: redis_frames.ONE, behind the 8 bytes of the sender.
                    if channel is not None and packet[8:9] == b"\0":
                        stats.received += 1
                        try:
                            on_bus(channel, packet[9:])
                        except Exception:
                            log.exception("on_bus failed on channel %s", channel)
                    else:
                        self._on_packet(item[1], packet)
                elif item[0] != b"pong":
                    self._confirmed(server, item[0], item[1])

        return consume
