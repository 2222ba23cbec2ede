"""The local bus: Unix stream sockets between the worker processes of one host.

Every worker listens at ``<run_dir>/bus-<name>.sock`` and connects to every other socket of the folder. So two
workers are connected by two links, each used in one direction only::

    A ==> B   written by A: A's subscriptions, and what A publishes to B
    A <== B   written by B: B's subscriptions, and what B publishes to A

A sends its subscriptions on its own link. B answers on B's link, ahead of everything that B publishes from
then on: that is what a confirmation means. A socket listens before it is visible, and is visible before its
owner lists the folder, so of two workers that start together at least one sees the other; a worker that is
connected to connects back.

The bus never sends anything twice. Whenever messages may have been missed (a link came up or broke, a queue
overflowed, a peer was silent or confirmed late) it asks its listener to resync.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from ..common.tasks import Tasks
from ..common.unix_address import unix_address
from .base import (
    MAX_CHANNEL_BYTES,
    MAX_PAYLOAD_BYTES,
    SILENT_AFTER_BEATS,
    BusFormatError,
    BusListener,
    encode_channels,
    notify,
)
from .local_link import (
    NAME_PATTERN,
    SUBSCRIBE,
    UNSUBSCRIBE,
    Confirmations,
    Inbound,
    LocalBusStats,
    LocalPeer,
    PendingSubscribe,
    channel_frames,
    message_frame,
)

log = logging.getLogger(__name__)

#: Connections that wait to be accepted: more than a host has workers.
BACKLOG: Final = 128

#: Unused shared tuples of peers are dropped when there are so many more tuples than routes.
SPARE_GROUPS: Final = 1000

_SOCKET: Final = re.compile(rf"bus-({NAME_PATTERN.pattern})\.sock")


class LocalBus:
    """A :class:`~chatcore.bus.base.Bus` for the workers of one host.

    :param run_dir: the folder of the sockets; private to the server's user.
    :param name: ``<host>-<slot>-<nonce>``, never used by two processes.
    :param queue_bytes: bound of what waits for one peer; a message above it is dropped, and that peer resyncs.
    :param confirm_timeout_ms: how long `subscribe` waits for a peer; also the deadline of `close`.
    :param heartbeat_ms: between heartbeats, and between scans of the folder.
    :raises ValueError: a name that does not fit into a socket's address.
    """

    def __init__(
        self, run_dir: Path, name: str, *, queue_bytes: int, confirm_timeout_ms: int, heartbeat_ms: int
    ) -> None:
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError(f"bus name {name!r}: 1 to 72 of A-Z a-z 0-9 _ . - are allowed")
        self.run_dir = run_dir
        self.stats = LocalBusStats()
        self._name = name
        self._confirm_s = confirm_timeout_ms / 1000
        self._beat_s = heartbeat_ms / 1000
        self._server: asyncio.Server | None = None
        self._visible = False
        self._closing = False
        self._tasks = Tasks()
        self._beating: asyncio.Task[None] | None = None
        self._peers: dict[str, LocalPeer] = {}
        self._links: set[LocalPeer | Inbound] = set()  # those with a transport
        self._links_gone = asyncio.Event()
        # Every connected user has a channel, so a channel costs little: the peers that subscribed to it are
        # one of a few shared tuples, and only what was subscribed to more than once is counted.
        self._routes: dict[str, tuple[LocalPeer, ...]] = {}
        self._groups: dict[tuple[LocalPeer, ...], tuple[LocalPeer, ...]] = {}
        self._counts: dict[bytes, int] = {}
        self._confirmations: Confirmations
        self._pending: PendingSubscribe | None = None  # the subscriptions of this tick
        self._dirty: list[LocalPeer] = []
        self._flush_due = False
        # For the links (see local_link.LinkOwner):
        self.loop: asyncio.AbstractEventLoop
        self.queue_bytes = queue_bytes
        self.subscribed: dict[bytes, str] = {}
        self.on_bus: Callable[[str, bytes], Any]
        self._listener: BusListener

    # --- the interface -----------------------------------------------------
    @property
    def name(self) -> str:
        return self._name

    @property
    def peers(self) -> list[str]:
        """Names of the workers that this one is connected to, or is connecting to."""
        return list(self._peers)

    @property
    def healthy(self) -> bool:
        """Listening, and no peer is silent, overflowed or late to come up."""
        if not self._visible:
            return False
        patience = self.loop.time() - self._confirm_s
        return not any(
            p.silent or p.broken or p.overflowed or (not p.up and p.since < patience) for p in self._peers.values()
        )

    async def start(self, listener: BusListener) -> None:
        """Listen, then find the others; return when they have confirmed, or after the timeout.

        :raises OSError: the folder or the socket cannot be made.
        """
        self.loop = asyncio.get_running_loop()
        self._listener = listener
        self.on_bus = listener.on_bus
        self._confirmations = Confirmations(self.loop, self._confirm_s, self.need_resync)
        self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        hidden = self.run_dir / f".bus-{self._name}.sock"
        try:
            hidden.unlink(missing_ok=True)
            with unix_address(hidden) as address:
                sock.bind(address)
            hidden.chmod(0o600)
            # Listening before it is visible: a refused connection then means "dead", never "not yet".
            sock.listen(BACKLOG)
            hidden.rename(self._path(self._name))
            self._visible = True
            self._server = await self.loop.create_unix_server(lambda: Inbound(self), sock=sock, backlog=BACKLOG)
        except BaseException:
            self._visible = False
            sock.close()
            raise
        self._scan_folder()
        self._beating = self._tasks.spawn(self._beat_forever(), "bus-heartbeat")
        pending = PendingSubscribe(self.loop)
        self._confirmations.begin(pending, {peer: peer.asked for peer in self._peers.values()})
        await pending.done

    async def close(self) -> None:
        """Send what is queued, bounded by the confirm timeout, then end everything. Ends every wait."""
        if self._closing or self._server is None:
            return
        self._closing = True
        self._visible = False
        self._path(self._name).unlink(missing_ok=True)
        # Links that are being opened are open in a turn or two. They are not cancelled: uvloop would close the
        # transport without calling its protocol, which would then write to it.
        if self._beating is not None:
            self._beating.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._server.close()
        self._flush()
        # This worker's writing ends close after a flush. Each peer, when it has read them to the end, closes
        # its own, behind what it had sent.
        for link in list(self._links):
            if isinstance(link, LocalPeer) and link.transport is not None:
                link.transport.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._confirm_s):
                while self._links:
                    self._links_gone.clear()
                    await self._links_gone.wait()
        for link in list(self._links):
            if link.transport is not None:
                link.transport.abort()
        for peer in list(self._peers.values()):
            self._end(peer)
        self._confirmations.finish_all()
        await asyncio.sleep(0)  # for the aborted transports' callbacks

    async def subscribe(self, channels: list[str]) -> None:
        """See :meth:`Bus.subscribe`. A peer that does not confirm in time calls for a resync, and for another
        one when it does; a peer that is silent already is not waited for. A cancelled call subscribed to nothing.

        :raises ValueError: a channel of no or of more than 200 bytes.
        """
        if self._closing:
            return
        encoded = encode_channels(channels)
        fresh: list[bytes] = []
        for channel, raw in zip(channels, encoded, strict=True):
            if raw in self.subscribed:
                self._counts[raw] = self._counts.get(raw, 1) + 1
            else:
                self.subscribed[raw] = channel
                fresh.append(raw)
        if fresh:
            self._send_channels(SUBSCRIBE, fresh)
            if self._pending is None:
                self._pending = PendingSubscribe(self.loop)
                self._flush_soon()
        # A channel that was subscribed before may still be unconfirmed: the newest wait covers all the older ones.
        pending = self._pending or self._confirmations.newest()
        if pending is None:
            return
        try:
            await asyncio.shield(pending.done)
        except asyncio.CancelledError:
            self.unsubscribe(channels)
            raise

    def unsubscribe(self, channels: list[str]) -> None:
        """Take back one `subscribe` of each; unknown ones are ignored."""
        gone: list[bytes] = []
        for channel in channels:
            raw = channel.encode()
            count = self._counts.get(raw, 1)
            if count > 2:
                self._counts[raw] = count - 1
            elif count == 2:
                del self._counts[raw]
            elif self.subscribed.pop(raw, None) is not None:
                gone.append(raw)
        self._send_channels(UNSUBSCRIBE, gone)

    def publish(self, channel: str, payload: bytes) -> None:
        self.stats.published += 1
        peers = self._routes.get(channel)
        if peers:
            self._send(peers, channel, payload)

    def send_to(self, peer: str, channel: str, payload: bytes) -> None:
        found = self._peers.get(peer)
        if found is not None:
            self._send((found,), channel, payload)

    def _send(self, peers: Iterable[LocalPeer], channel: str, payload: bytes) -> None:
        raw = channel.encode()
        if len(payload) > MAX_PAYLOAD_BYTES or len(raw) > MAX_CHANNEL_BYTES:
            log.error("a message of %d bytes for channel %.40s is over the limit", len(payload), channel)
            for peer in peers:
                self.stats.dropped += 1
                peer.overflow()
            return
        data = message_frame(raw, payload)
        for peer in peers:
            if peer.send(data):
                self.stats.sent += 1
            else:
                self.stats.dropped += 1

    def _send_channels(self, kind: int, channels: list[bytes]) -> None:
        for data in channel_frames(kind, channels):
            for peer in self._peers.values():
                peer.send(data)

    # --- one write per peer and tick ---------------------------------------
    def flush_later(self, peer: LocalPeer) -> None:
        self._dirty.append(peer)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self._pending is not None:
            pending, self._pending = self._pending, None
            id = self.next_ask()
            for peer in self._peers.values():
                peer.ask(id)
                if peer.silent:
                    peer.late_ask = id
            self._confirmations.begin(pending, {p: id for p in self._peers.values() if not (p.silent or p.broken)})
        dirty, self._dirty = self._dirty, []
        for peer in dirty:
            peer.flush()

    # --- confirmations -----------------------------------------------------
    def next_ask(self) -> int:
        return self._confirmations.next_ask()

    def confirmed(self, peer: LocalPeer, id: int) -> None:
        self._confirmations.confirmed(peer, id)

    # --- connections -------------------------------------------------------
    def _path(self, name: str) -> Path:
        return self.run_dir / f"bus-{name}.sock"

    def _scan_folder(self) -> None:
        """Connect to every worker in the folder that there is no connection with."""
        names = [match[1] for match in map(_SOCKET.fullmatch, os.listdir(self.run_dir)) if match]
        if self._visible and self._name not in names:
            self._visible = False
            log.error("this worker's socket was removed from %s: new workers cannot find it", self.run_dir)
        for name in names:
            if name != self._name and name not in self._peers:
                self._connect(name)

    def _connect(self, name: str) -> LocalPeer | None:
        """Connect (between Unix sockets: at once or not at all) and greet. None: the peer cannot be connected to."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        path = self._path(name)
        try:
            with unix_address(path) as address:
                sock.connect(address)
        except OSError as exc:
            sock.close()
            if isinstance(exc, ConnectionRefusedError):
                log.info("removing the socket of %s, which is dead", name)
                with contextlib.suppress(OSError):
                    path.unlink()
            elif not isinstance(exc, FileNotFoundError | BlockingIOError):  # gone; its backlog is full
                log.warning("cannot connect to %s: %s", path, exc)
            return None
        peer = self._peers[name] = LocalPeer(self, name)
        peer.greet(self._name)
        self._tasks.spawn(self._open(peer, sock), f"bus-open-{name}")
        return peer

    async def _open(self, peer: LocalPeer, sock: socket.socket) -> None:
        try:
            await self.loop.create_unix_connection(lambda: peer, sock=sock)
        except BaseException as exc:
            sock.detach()  # closed with the transport, by the loop
            self._end(peer)
            if not isinstance(exc, OSError):
                raise

    def _end(self, peer: LocalPeer) -> None:
        """End a connection: both its links. The next scan of the folder may begin another one."""
        if peer.ended:
            return
        peer.ended = True
        if self._peers.get(peer.name) is peer:
            del self._peers[peer.name]
        self.peer_resets(peer)
        if peer.transport is not None:
            # If this worker is the one that leaves, its peer still needs what is queued.
            peer.transport.close() if self._closing else peer.transport.abort()
        if peer.inbound is not None:
            peer.inbound.close()
        self._confirmations.release(peer, peer.asked)
        if not self._closing and (peer.up or peer.inbound is not None):
            notify(self._listener.on_peer_gone, peer.name)
            self.need_resync(f"the link to {peer.name} is gone")

    def link_up(self, link: LocalPeer | Inbound) -> None:
        self._links.add(link)

    def out_lost(self, peer: LocalPeer) -> None:
        self._links.discard(peer)
        self._links_gone.set()
        if peer.ended:
            return
        peer.broken = True
        self._confirmations.release(peer, peer.asked)
        if peer.inbound is None:
            self._end(peer)
        # Else this worker first reads what the peer sent before it died. The connection ends with that link,
        # or at the next heartbeat.

    def inbound_lost(self, inbound: Inbound) -> None:
        self._links.discard(inbound)
        self._links_gone.set()
        if inbound.peer is not None:
            self._end(inbound.peer)

    def hello(self, inbound: Inbound, name: str) -> None:
        if name == self._name or self._closing:
            raise BusFormatError("hello of this worker itself, or while it closes")
        peer = self._peers.get(name)
        if peer is not None and (peer.inbound is not None or peer.broken):
            self._end(peer)  # the peer reconnected before the end of its old links was seen
            peer = None
        peer = peer or self._connect(name)
        if peer is None:
            raise BusFormatError(f"hello of {name}, which cannot be connected to")
        inbound.peer = peer
        peer.inbound = inbound
        peer.heard = self.loop.time()

    def malformed(self, peer: LocalPeer | None, why: str) -> None:
        self.stats.malformed += 1
        log.warning("closing the link from %s: %s", peer.name if peer is not None else "a stranger", why)

    def peer_subscribes(self, peer: LocalPeer, channels: list[str]) -> None:
        for channel in channels:
            route = self._routes.get(channel, ())
            if peer not in route:
                self._route(channel, (*route, peer))
        for channel in channels:
            notify(self._listener.on_peer_subscribed, peer.name, channel)

    def peer_unsubscribes(self, peer: LocalPeer, channels: list[str]) -> None:
        for channel in channels:
            self._route(channel, tuple(p for p in self._routes.get(channel, ()) if p is not peer))

    def peer_resets(self, peer: LocalPeer) -> None:
        """Drop all subscriptions of a peer (rare: goes through those of all peers)."""
        self.peer_unsubscribes(peer, [channel for channel, route in self._routes.items() if peer in route])
        self._drop_unused_groups()

    def _route(self, channel: str, route: tuple[LocalPeer, ...]) -> None:
        if route:
            self._routes[channel] = self._groups.setdefault(route, route)
            if len(self._groups) > 2 * len(self._routes) + SPARE_GROUPS:
                self._drop_unused_groups()
        else:
            self._routes.pop(channel, None)

    def _drop_unused_groups(self) -> None:
        """Keep only those that a route uses: with many peers nearly every order of them comes up once."""
        self._groups = {route: route for route in self._routes.values()}

    # --- heartbeats --------------------------------------------------------
    async def _beat_forever(self) -> None:
        while True:
            due = self.loop.time() + self._beat_s
            await asyncio.sleep(self._beat_s)
            # If this loop was late itself, what the peers sent is still unread: none of them is called silent.
            on_time = self.loop.time() - due < self._beat_s
            try:
                self._beat(on_time)
            except OSError as exc:
                log.error("local bus: %s", exc)

    def _beat(self, on_time: bool) -> None:
        now = self.loop.time()
        for peer in list(self._peers.values()):
            if peer.broken:
                self._end(peer)
                continue
            peer.beat()
            if on_time and not peer.silent and now - peer.heard > SILENT_AFTER_BEATS * self._beat_s:
                peer.silent = True
                peer.late_ask = peer.asked
                self._confirmations.release(peer, peer.asked)
                self.need_resync(f"{peer.name} is silent")
        for link in list(self._links):
            if isinstance(link, Inbound) and link.peer is None and now - link.since > self._confirm_s:
                link.close()  # connected without saying hello
        self._scan_folder()

    def heard_again(self, peer: LocalPeer) -> None:
        peer.silent = False
        self.need_resync(f"{peer.name} is heard again")

    def need_resync(self, why: str) -> None:
        if not self._closing:
            log.info("local bus: %s", why)
            notify(self._listener.on_resync_needed, why)
