"""The connection of the Redis bus: a link to one server, where the servers are, and a session with all of them.

* :class:`RedisLink` is one connection to one server: bytes out, replies in. It is not a connection of redis-py:
  that one wakes a task per message, resubscribes silently after a reconnect, and trusts a connection that no
  longer answers. This one is a transport and hiredis' parser. It speaks RESP2, which every server knows; it
  also reads what a RESP3 server would push, since the parser gives both as lists.
* :class:`Discovery` finds the :class:`Topology`: one server, the primary that the sentinels name, or the
  primaries of a cluster.
* :class:`RedisSession` is one life of all links: subscriptions and their confirmations, commands and their
  replies. To every server there are two links, one that subscribes and one that publishes (in RESP2 a
  subscribed connection can do nothing else). A failure of any link ends the whole session, and the next one
  starts from nothing: a session that is up has seen each of its subscriptions confirmed, in the order in which
  it asked, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, cast

import hiredis
from redis.crc import key_slot

from ..common.redis_client import RedisAddress

log = logging.getLogger(__name__)

#: The parser's result when there is no complete reply; a reply may be None or False.
NOTHING: Final = object()
#: Hash slots of a cluster, as Redis defines them.
SLOTS: Final = 16384
#: Channels in one SUBSCRIBE: Redis does nothing else until it has worked through a command.
SUBSCRIBE_CHANNELS: Final = 500

ServerAddress = tuple[str, int]


class LinkError(Exception):
    """The connection cannot be made, is gone, or the server refuses it. The message is one line."""


class ReplyError(Exception):
    """The server replied with an error."""


def command(*args: bytes) -> bytes:
    """A command as Redis reads it."""
    return b"*%d\r\n%b" % (len(args), b"".join([b"$%d\r\n%b\r\n" % (len(a), a) for a in args]))


class RedisLink(asyncio.Protocol):
    """One connection. Replies answer the requests in order; once :attr:`consume` is replaced, they go there.

    :param on_lost: called once, with the reason, when the connection ends by itself.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_lost: Callable[[str], None]) -> None:
        self.loop = loop
        self.transport: asyncio.Transport | None = None
        #: When the last bytes came (loop time).
        self.heard = loop.time()
        #: Called with a function that returns the next reply, or `NOTHING`.
        self.consume: Callable[[Callable[[], Any]], None] = self._answer_requests
        #: Called when enough was sent to go on writing.
        self.on_drained: Callable[[], None] | None = None
        self._on_lost: Callable[[str], None] | None = on_lost
        self._reader = hiredis.Reader(protocolError=LinkError, replyError=ReplyError, notEnoughData=NOTHING)
        self._requests: deque[asyncio.Future[Any]] = deque()
        self._closed: asyncio.Future[None] = loop.create_future()

    # --- life ------------------------------------------------------------------
    async def open(self, address: RedisAddress, server: ServerAddress, name: str, auth: tuple[str, str]) -> None:
        """Connect, log in, and set the name that ``CLIENT LIST`` shows. The caller bounds the time.

        There is no SELECT: pub/sub ignores databases.

        :param server: host and port; unused if the address is the path of a socket.
        :param auth: user and password.
        :raises LinkError: it did not work.
        """
        context = address.ssl_context()
        try:
            if address.path:
                await self.loop.create_unix_connection(lambda: self, address.path)
            else:
                host, port = server
                await self.loop.create_connection(
                    lambda: self, host, port, ssl=context, server_hostname=host if context else None
                )
        except OSError as exc:
            where = address.path or f"{server[0]}:{server[1]}"
            raise LinkError(f"cannot connect to {where}: {exc}") from None
        username, password = auth
        if password:
            await self.request(b"AUTH", *([username.encode()] if username else []), password.encode())
        try:
            await self.request(b"CLIENT", b"SETNAME", name.encode())
        except ReplyError:
            pass  # an ACL may forbid it; only people read the name

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast: uvloop's transports are no subclasses of asyncio's.
        self.transport = cast(asyncio.Transport, transport)
        self.heard = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._lost(str(exc) if exc else "the server closed the connection")
        if not self._closed.done():
            self._closed.set_result(None)

    def abort(self) -> None:
        """End it now, without a call of ``on_lost``."""
        self._on_lost = None
        if self.transport is not None:
            self.transport.abort()

    async def wait_closed(self) -> None:
        """Wait until the socket of an aborted connection is closed."""
        if self.transport is not None:
            await self._closed

    def _lost(self, why: str) -> None:
        on_lost, self._on_lost = self._on_lost, None
        for future in self._requests:
            if not future.done():
                future.set_exception(LinkError(why))
                future.exception()  # its owner may be gone
        self._requests.clear()
        if self.transport is not None:
            self.transport.abort()
        if on_lost is not None:
            on_lost(why)

    # --- bytes -------------------------------------------------------------------
    def write(self, data: bytes) -> None:
        """Send; without a connection, nothing (``on_lost`` was called)."""
        if self.transport is not None:
            self.transport.write(data)

    @property
    def unsent(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return self.transport.get_write_buffer_size() if self.transport is not None else 0

    def resume_writing(self) -> None:
        if self.on_drained is not None:
            self.on_drained()

    def data_received(self, data: bytes) -> None:
        self.heard = self.loop.time()
        try:
            self._reader.feed(data)
            self.consume(self._reader.gets)
        except LinkError as exc:
            self._lost(f"unexpected bytes: {exc}")

    # --- requests ------------------------------------------------------------------
    def request(self, *args: bytes) -> asyncio.Future[Any]:
        """Send a command; its reply. Only before :attr:`consume` is replaced.

        The future raises :class:`ReplyError` or :class:`LinkError`.
        """
        future: asyncio.Future[Any] = self.loop.create_future()
        if self.transport is None:
            future.set_exception(LinkError("not connected"))
        else:
            self._requests.append(future)
            self.write(command(*args))
        return future

    def _answer_requests(self, gets: Callable[[], Any]) -> None:
        while (reply := gets()) is not NOTHING:
            if not self._requests:
                raise LinkError("a reply without a request")
            future = self._requests.popleft()
            if future.done():
                continue
            if isinstance(reply, ReplyError):
                future.set_exception(reply)
            else:
                future.set_result(reply)


# --- where the servers are ----------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Topology:
    """The servers, and in a cluster the index of each slot's server."""

    servers: tuple[ServerAddress, ...]
    slots: tuple[int, ...] = ()

    def index(self, channel: bytes) -> int:
        """Of the server that a channel belongs to."""
        return self.slots[key_slot(channel)] if self.slots else 0


class Discovery:
    """Finds the topology, as often as it is asked to. It asks first where it found the last one.

    :param name: of the connections that ask, for ``CLIENT LIST``.
    :param timeout_s: for each server that it asks.
    """

    def __init__(self, address: RedisAddress, name: str, timeout_s: float) -> None:
        self.address = address
        #: Whether the topology can change without the loss of a connection.
        self.can_change = address.kind != "single"
        self._name = name
        self._timeout_s = timeout_s
        self._known = list(address.hosts)

    async def find(self) -> Topology:
        """Ask one server after the other until one knows.

        :raises LinkError: none does; with the reason of the last one.
        """
        if not self.can_change:
            return Topology(self.address.hosts or (("", 0),))
        why = "no address"
        for i, server in enumerate(self._known):
            try:
                async with asyncio.timeout(self._timeout_s):
                    topology = await self._ask(server)
            except TimeoutError:
                why = f"{server[0]}:{server[1]} does not answer"
            except (LinkError, ReplyError) as exc:
                why = str(exc)
            else:
                if self.address.cluster:
                    self._known = [*topology.servers, *(s for s in self.address.hosts if s not in topology.servers)]
                else:
                    self._known.insert(0, self._known.pop(i))
                return topology
        raise LinkError(why)

    async def _ask(self, server: ServerAddress) -> Topology:
        a = self.address
        link = RedisLink(asyncio.get_running_loop(), lambda why: None)
        auth = (a.username, a.password) if a.cluster else (a.sentinel_username, a.sentinel_password)
        try:
            await link.open(a, server, self._name, auth)
            if a.cluster:
                return _cluster_topology(await link.request(b"CLUSTER", b"SLOTS"), server)
            found = await link.request(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", a.service.encode())
            if not found:
                raise LinkError(f"the sentinel knows no service {a.service}")
            return Topology(((found[0].decode(), int(found[1])),))
        except (TypeError, ValueError, IndexError, AttributeError) as exc:
            raise LinkError(f"{server[0]}:{server[1]} sent an unexpected reply: {exc}") from None
        finally:
            link.abort()
            await asyncio.shield(link.wait_closed())


def _cluster_topology(ranges: list[list[object]], asked: ServerAddress) -> Topology:
    """From the reply to CLUSTER SLOTS: [first slot, last slot, [host, port, ...], replicas ...] each.

    :raises LinkError: a slot has no server.
    """
    servers: dict[ServerAddress, int] = {}
    slots = [-1] * SLOTS
    for first, last, primary, *_ in sorted(ranges, key=lambda r: int(str(r[0]))):
        assert isinstance(primary, list)
        # Without a host it is the server that was asked.
        server = (primary[0].decode() if primary[0] else asked[0], int(primary[1]))
        index = servers.setdefault(server, len(servers))
        for slot in range(int(str(first)), int(str(last)) + 1):
            slots[slot] = index
    if -1 in slots:
        raise LinkError("not all slots of the cluster have a server")
    return Topology(tuple(servers), tuple(slots))


# --- a session with all servers --------------------------------------------------------
@dataclass(slots=True)
class RedisBusStats:
    """Counters since the start, for metrics.

    ``sent``: packets, each of one or more messages of a tick for one channel. ``own``: packets of this
    worker that came back. ``dropped``: messages that did not fit into a full queue, or came without a
    connection. ``sessions``: how often it was connected.
    """

    published: int = 0
    sent: int = 0
    received: int = 0
    own: int = 0
    dropped: int = 0
    malformed: int = 0
    sessions: int = 0


class _Countdown:
    """Confirmations of one call that are still to come. ``on_done`` is called once, after the last one."""

    __slots__ = ("left", "on_done")

    def __init__(self, left: int, on_done: Callable[[], None]) -> None:
        self.left = left
        self.on_done = on_done


class _Server:
    """The two links to one server."""

    def __init__(self, sub: RedisLink, pub: RedisLink) -> None:
        self.sub = sub
        self.pub = pub
        self.out: list[bytes] = []  # commands of this tick for `pub`
        self.sent = 0  # commands to `pub`, and replies from it
        self.answered = 0
        self.expected: deque[tuple[bytes, bytes, _Countdown]] = deque()  # verb, channel: confirmations to come
        self.asked: deque[tuple[int, asyncio.Future[int]]] = deque()  # number of a command: wants its reply


class RedisSession:
    """See the module. An error ends it: :attr:`lost` then holds the reason.

    :param sender: the prefix of this worker's packets.
    :param beat_channel: own packets on this channel are reported to ``on_own``.
    :param channels: this worker's subscriptions: Redis' name of each, and ours; read at every message.
    :param on_bus: takes the name and the payload of a single message on one of them.
    :param on_packet: takes (Redis' name of the channel, packet) of every other packet.
    :param on_drained: called when enough was sent to go on writing.
    """

    def __init__(
        self,
        address: RedisAddress,
        topology: Topology,
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
        self.topology = topology
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
        # A cluster takes channels of one slot only in one command.
        self._at_once = 1 if sharded else SUBSCRIBE_CHANNELS
        self._servers: list[_Server] = []

    # --- life ------------------------------------------------------------------
    async def open(self, name: str, queue_bytes: int) -> None:
        """Connect all links. The caller bounds the time, and closes in any case.

        :raises LinkError: one cannot be made.
        :raises ReplyError: the server does not let this user in.
        """
        links: list[tuple[RedisLink, ServerAddress]] = []
        for address in self.topology.servers:
            server = _Server(RedisLink(self.loop, self.fail), RedisLink(self.loop, self.fail))
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
            server.sub.abort()
            server.pub.abort()
        for server in self._servers:
            await server.sub.wait_closed()
            await server.pub.wait_closed()

    async def wait_replies(self) -> None:
        """Wait until every command was answered, or the session is lost."""
        for server in self._servers:
            if server.answered < server.sent and not self.lost.done():
                future: asyncio.Future[int] = self.loop.create_future()
                server.asked.append((server.sent, future))
                await asyncio.wait((future, self.lost), return_when=asyncio.FIRST_COMPLETED)

    def fail(self, why: str) -> None:
        """Something is wrong: the session is lost, and its owner closes it."""
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
        self._write_channels(self._subscribe, fresh, _Countdown(len(fresh), on_done))

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
        """Unsubscribe from those that are subscribed."""
        gone = [channel for channel in channels if channel in self.subscribed]
        self.subscribed.difference_update(gone)
        self._write_channels(self._unsubscribe, gone, _Countdown(len(gone), lambda: None))

    def _write_channels(self, verb: bytes, channels: list[bytes], countdown: _Countdown) -> None:
        confirmed_by = verb.lower()
        by_server: dict[int, list[bytes]] = {}
        for channel in channels:
            by_server.setdefault(self.topology.index(channel), []).append(channel)
        for index, mine in by_server.items():
            server = self._servers[index]
            server.expected.extend((confirmed_by, channel, countdown) for channel in mine)
            some = self._at_once
            server.sub.write(b"".join(command(verb, *mine[i : i + some]) for i in range(0, len(mine), some)))

    def _confirmed(self, server: _Server, verb: bytes, channel: bytes) -> None:
        if not server.expected or server.expected[0][:2] != (verb, channel):
            # A cluster takes a channel away when its slot moves; nothing else should cause this.
            self.fail(f"unexpected {verb.decode(errors='replace')} of {channel.decode(errors='replace')}")
            return
        countdown = server.expected.popleft()[2]
        countdown.left -= 1
        if not countdown.left:
            countdown.on_done()

    # --- publishing ------------------------------------------------------------------
    def publish(self, channel: bytes, packet: bytes) -> None:
        """Queue a packet for :meth:`flush`."""
        server = self._servers[self.topology.index(channel)]
        server.out.append(b"%b$%d\r\n%b\r\n$%d\r\n%b\r\n" % (self._publish, len(channel), channel, len(packet), packet))

    def ask(self, channel: bytes, packet: bytes) -> asyncio.Future[int]:
        """Queue a packet; how many clients received it (in a cluster: of its server)."""
        future: asyncio.Future[int] = self.loop.create_future()
        server = self._servers[self.topology.index(channel)]
        self.publish(channel, packet)
        server.asked.append((server.sent + len(server.out), future))
        return future

    def flush(self) -> None:
        """One write per server for all that was queued; does not wait for replies."""
        for server in self._servers:
            out = server.out
            if out:
                server.sent += len(out)
                self.stats.sent += len(out)
                server.pub.write(out[0] if len(out) == 1 else b"".join(out))
                out.clear()

    @property
    def unsent(self) -> int:
        """Bytes of commands that the kernel has not taken yet."""
        return sum(server.pub.unsent for server in self._servers)

    # --- heartbeats --------------------------------------------------------------------
    def beat(self) -> None:
        """Ping on every link that the heartbeat of the bus does not pass, so that each is heard."""
        own = self.topology.index(self._beat_channel)
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
                if isinstance(reply, ReplyError):
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
                    if isinstance(item, ReplyError):
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
                    # 0: redis_packets.ONE, behind the 8 bytes of the sender.
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
