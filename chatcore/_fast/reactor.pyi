"""Client sockets, in C under the uvloop loop: the contract.

The :class:`Reactor` owns one epoll instance whose descriptor the loop watches
(``loop.add_reader(reactor.fileno(), reactor.poll)``). Connections are C
structs; Python knows one by an integer *handle* (slot | generation << 32, never
0), so a handle that outlived its connection is refused and can harm nothing.

Everything here belongs to the loop's thread. Handlers are called from inside
`poll`, `flush` and `upgrade` only, never from inside `send`, `close`, `abort`,
`fan_out` and the rest: a handler may call any of these, for any connection,
and is not entered again. ``on_closed``, ``on_http_closed`` and ``on_writable``
come from `flush`, which the reactor schedules itself, in the same turn of the
loop in which their cause came up.
"""

from collections.abc import Callable
from typing import Any, Final, Protocol

from .conns import Core
from .frames import Frame as Frame
from .topics import Topic as Topic

TICK_MS: Final[int]

class Handler(Protocol):
    """The calls that the reactor makes. None may block. An exception is logged to
    ``chatcore.reactor`` and closes that one connection with 4000; another BaseException
    (KeyboardInterrupt) leaves `poll` or `flush` once all received bytes have been handed out.

    The methods are looked up once, when the Reactor is made."""

    def on_http(self, conn: int, data: bytes) -> None:
        """Bytes of a connection that has not been upgraded (in order, as they came)."""
    def on_http_closed(self, conn: int) -> None:
        """The last call about a connection that was never upgraded (only if on_http was called for
        it): it is gone, or its last answer is still being sent. Other methods may refuse ``conn``
        already."""
    def on_message(self, session: Any, data: bytes, wait_ms: int) -> None:
        """One complete text message, UTF-8 checked. ``wait_ms`` > 0: the connection is
        over its rate; answer `rate_limited` with it and do nothing else. The time is this message's
        own: repeated then, it finds a token, unless another message took it."""
    def on_writable(self, session: Any) -> None:
        """The outbox fell to its low-water mark after `notify_writable` was called (once per call)."""
    def on_closed(self, session: Any, code: int) -> None:
        """An upgraded connection is over: the last call about it, exactly once, as soon as no more
        messages will be delivered from it (not after the 2 s linger). ``code``: the close code that
        this side sent or, if the peer closed first, the one received (1005 none given, 1006 the
        connection broke)."""

class Reactor(Core):
    def __init__(
        self,
        handler: Handler,
        call_soon: Callable[[Callable[[], None]], object],  # loop.call_soon: to schedule flush() once per tick
        *,
        recv_buffer_bytes: int = 262144,  # one per worker
        max_message_bytes: int = 65536,  # whole message, fragments together (1009)
        outbox_limit_bytes: int = 1048576,  # queued and unsent (4002); a WebSocket's, HTTP answers are not limited
        outbox_low_water_bytes: int = 65536,
        rate_per_s: float = 50.0,  # token bucket: frames per second, control frames included; 0: no limit
        rate_burst: int = 200,  # tokens in a full bucket; without one: wait_ms > 0, and none is taken
        rate_refused: int = 10000,  # refused frames that have not come back, at most; one more: close 4004
        handshake_timeout_ms: int = 10000,  # from accept to upgrade, in all; also an idle keep-alive HTTP connection
        close_timeout_ms: int = 2000,  # from our close frame / SHUT_WR to the end
        slow_timeout_ms: int = 10000,  # the same for a peer that was too slow (4002), to read why
        max_connections: int = 15000,  # accepted and at once closed beyond (fd exhaustion safe)
        io_uring: bool = True,  # many sends in one system call, where the kernel allows it; send() otherwise
        allow_binary: bool = False,  # for conformance suites: on_message gets str for text, bytes for binary
    ) -> None:
        """Raises ValueError for an impossible setting, OSError without descriptors."""
    # -- loop side
    def fileno(self) -> int:
        """To be watched for reading; -1 after `shutdown`, before which the loop must stop watching it."""
    def poll(self) -> None:
        """Accept, read, parse, dispatch, write to sockets that were full. Bounded: at most 64 accepts
        per listener, one read per ready connection, and a time budget (named constant); epoll reports
        the rest again (level-triggered). Called from inside a handler it does nothing."""
    def tick(self) -> None:
        """Advance the timer wheel to the monotonic clock (to be called every TICK_MS = 100 ms).
        Deadlines are never early and at most one tick late."""
    def flush(self) -> None:
        """Write out the dirty connections: one system call each, GIL released around a batch of
        them. Bounded by a time budget; the rest follows in the loop's next turn."""
    # -- listening
    def listen(self, fd: int) -> None:
        """Accept connections from a bound, listening, non-blocking socket (not owned: never closed here).
        Sets TCP_NODELAY on it, which Linux hands on to the accepted sockets."""
    def unlisten(self) -> None:
        """Accept no more (idempotent). `accept_pending()` first, to empty the queues."""
    def shorten_lingering(self) -> None:
        """From now on a connection that was too slow ends after close_timeout, not slow_timeout: for a worker that
        stops."""
    def accept_pending(self) -> int:
        """Empty the queues of all listeners; returns how many were in them."""
    # -- a connection before its upgrade
    def peer(self, conn: int) -> str:
        """``127.0.0.1:53412`` or ``[::1]:53412``; empty if gone."""
    def write(self, conn: int, data: bytes, close: bool = False) -> bool:
        """Raw bytes (HTTP). With ``close``: flush, SHUT_WR, read to the end (at most close_timeout), then close.
        False if gone, upgraded or closing. A peer that has sent its FIN after its request is answered,
        too; then the connection ends when nothing was written for close_timeout."""
    def http_deadline(self, conn: int, ms: int) -> None:
        """Re-arm the deadline (a body is coming, keep-alive)."""
    def upgrade(self, conn: int, session: Any, response: bytes, leftover: bytes, auth_timeout_ms: int) -> bool:
        """Switch to WebSocket: queues the raw 101 response, keeps a reference to `session`, starts the
        auth deadline (close 4005; 0: none), then parses `leftover`. May only be called from `on_http`
        of that connection or later. The session may be handed messages from inside this very call.
        False if gone, upgraded or closing."""
    # -- a WebSocket connection
    def authenticated(self, conn: int, owner: int, ping_interval_ms: int) -> None:
        """End the auth deadline, set the owner number (user), ping every interval (± 10 % jitter): a
        WebSocket ping; two whole intervals without any byte received: close 4003. 0: no pings.
        May be called again, to change owner or interval."""
    def send(self, conn: int, payload: bytes) -> bool:
        """One text frame. False if gone or closing, or if this made it too slow (4002)."""
    def send_binary(self, conn: int, payload: bytes) -> bool:
        """The same as a binary frame (for conformance suites)."""
    def send_frame(self, conn: int, frame: Frame) -> bool: ...
    def queued(self, conn: int) -> int:
        """Bytes in the outbox; 0 if gone."""
    def notify_writable(self, conn: int) -> bool:
        """Ask for one on_writable; True if it is at the mark or below already (then none will come).
        False, and no call will come either, if gone or closing."""
    def close(self, conn: int, code: int, reason: bytes = b"") -> None:
        """Send a close frame after the queued frames; wait for the peer's (close_timeout), SHUT_WR, read to the
        end, close. A reason of over 123 bytes is cut. Before the upgrade: flush, SHUT_WR, read to the end, close.
        With 4002 the peer does not read: drop the queued frames; it has slow_timeout to read on to the reason."""
    def defer(self, conn: int) -> int:
        """Give back the token of a message of this connection that was handed out with ``wait_ms`` 0 and is refused
        all the same, since too many are unanswered. Returns the ms after which to repeat it, its own as with
        ``wait_ms``; 0 if the connection is gone or closing, or is closed with 4004 by this call, since more than
        rate_refused refused messages have not come back."""
    def abort(self, conn: int) -> None:
        """RST, now."""
    def topics_of(self, conn: int) -> list[Topic]: ...
    # -- all
    def connections(self) -> int:
        """Sockets held, lingering ones included."""
    def websockets(self) -> int:
        """Upgraded and open."""
    def sessions(self) -> list[Any]:
        """Of all open WebSockets: for rare administrative walks."""
    def stats(self) -> dict[str, int]:
        """Counters since the start: accepted, refused, closed, bytes_in, bytes_out, messages_in,
        frames_in, frames_queued, sends (of any number of frames), too_slow, flooding, no_pong, protocol_errors."""
    def uses_io_uring(self) -> bool:
        """Whether many sends go out in one system call (asked for, and the kernel allows it)."""
    def sizes(self) -> dict[str, int]:
        """Bytes of C memory, for measurements: ``conn`` (an idle connection), ``rx`` (the state beside
        the payload of an incomplete message)."""
    def shutdown(self) -> None:
        """Abort everything and free it (end of the worker). No handler is called."""
