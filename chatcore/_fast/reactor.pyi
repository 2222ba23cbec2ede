"""Client sockets, in C under the uvloop loop: the contract.

The :class:`Reactor` owns one epoll instance whose descriptor the loop watches
(``loop.add_reader(reactor.fileno(), reactor.poll)``). Connections are C
structs; Python knows one by an integer *handle* (slot | generation << 32, never
0), so a handle that outlived its connection is refused and can harm nothing.
"""

from collections.abc import Callable
from typing import Any, Protocol

class Handler(Protocol):
    """What the reactor calls. Nothing here may block; exceptions are reported to
    ``sys.unraisablehook`` style logging and close that one connection with 4000."""

    def on_http(self, conn: int, data: bytes) -> None:
        """Bytes of a connection that has not been upgraded (in order, as they came)."""
    def on_http_closed(self, conn: int) -> None:
        """A connection that was never upgraded is gone (only if on_http was called for it)."""
    def on_message(self, session: Any, data: bytes, wait_ms: int) -> None:
        """One complete text message, UTF-8 checked. ``wait_ms`` > 0: the connection is
        over its rate; answer `rate_limited` with it and do nothing else."""
    def on_writable(self, session: Any) -> None:
        """The outbox fell below its low-water mark after `notify_writable` was called (once per call)."""
    def on_closed(self, session: Any, code: int) -> None:
        """An upgraded connection is over: the last call about it, exactly once, as soon as no more
        messages will be delivered from it (not after the 2 s linger). ``code``: the close code that
        this side sent or, if the peer closed first, the one received (1005 none given, 1006 the
        connection broke)."""

class Frame:
    """An outbound WebSocket frame, built once and shared by reference (C refcount) by all outboxes."""
    def __init__(self, payload: bytes) -> None: ...
    def __len__(self) -> int: ...  # bytes on the wire

class Topic:
    """A set of connections to fan out to. Members are C pointers with back references:
    add and discard are O(1), a closing connection leaves all its topics by itself.
    Holds ``key`` (any object: the conversation) for `topics_of`."""
    key: Any
    def __init__(self, reactor: Reactor, key: Any) -> None: ...
    def __len__(self) -> int: ...
    def add(self, conn: int) -> bool: ...       # False: already in, or conn is gone
    def discard(self, conn: int) -> bool: ...
    def __contains__(self, conn: int) -> bool: ...
    def fan_out(self, frame: Frame, skip_owner: int = 0) -> int:
        """Queue the frame on every member (except those whose owner is `skip_owner`); returns how many."""
    def sessions(self) -> list[Any]: ...        # for rare administrative walks, not for delivery

class Reactor:
    def __init__(
        self,
        handler: Handler,
        call_soon: Callable[[Callable[[], None]], object],  # loop.call_soon: to schedule flush() once per tick
        *,
        recv_buffer_bytes: int = 262144,     # one per worker
        max_message_bytes: int = 65536,      # whole message, fragments together (1009)
        outbox_limit_bytes: int = 1048576,   # queued and unsent (4002)
        outbox_low_water_bytes: int = 65536,
        rate_per_s: float = 50.0,            # token bucket: frames per second, control frames included
        rate_burst: int = 200,               # below 0: wait_ms > 0; below -burst: close 4004
        handshake_timeout_ms: int = 10000,   # from accept to upgrade, in all; also an idle keep-alive HTTP connection
        close_timeout_ms: int = 2000,        # from our close frame / SHUT_WR to the end
        max_connections: int = 15000,        # accepted and at once closed beyond (fd exhaustion safe)
        allow_binary: bool = False,          # for conformance suites: on_message gets str for text, bytes for binary
    ) -> None: ...
    # -- loop side
    def fileno(self) -> int: ...
    def poll(self) -> None:
        """Accept, read, parse, dispatch, write what was blocked. Bounded: at most 64 accepts per
        listener, one read per ready connection, and a time budget (named constant); what remains is
        reported again (level-triggered)."""
    def tick(self) -> None:
        """Advance the timer wheel to the monotonic clock (call every TICK_MS = 100 ms)."""
    def flush(self) -> None:
        """Write out every dirty connection: one send per connection, GIL released around the system calls."""
    # -- listening
    def listen(self, fd: int) -> None:
        """Take connections from a bound, listening, non-blocking socket (not owned: never closed here)."""
    def unlisten(self) -> None:
        """Take no more (idempotent). `accept_pending()` first, to empty the queues."""
    def accept_pending(self) -> int: ...
    # -- a connection before its upgrade
    def peer(self, conn: int) -> str: ...        # "127.0.0.1:53412" or "[::1]:…"; "" if gone
    def write(self, conn: int, data: bytes, close: bool = False) -> bool:
        """Raw bytes (HTTP). With ``close``: flush, SHUT_WR, read to the end (at most close_timeout), then close."""
    def http_deadline(self, conn: int, ms: int) -> None: ...  # re-arm the deadline (a body is coming, keep-alive)
    def upgrade(self, conn: int, session: Any, response: bytes, leftover: bytes, auth_timeout_ms: int) -> bool:
        """Switch to WebSocket: queues the raw 101 response, keeps a reference to `session`, starts the
        auth deadline (close 4005; 0: none), then parses `leftover`. May only be called from `on_http`
        of that connection or later. The session may be handed messages from inside this very call."""
    # -- a WebSocket connection
    def authenticated(self, conn: int, owner: int, ping_interval_ms: int) -> None:
        """End the auth deadline, set the owner number (user), ping every interval (± 10 % jitter): a
        WebSocket ping; two whole intervals without any byte received: close 4003. 0: no pings."""
    def send(self, conn: int, payload: bytes) -> bool: ...       # one text frame; False if gone or closing
    def send_binary(self, conn: int, payload: bytes) -> bool: ...
    def send_frame(self, conn: int, frame: Frame) -> bool: ...
    def queued(self, conn: int) -> int: ...                      # bytes in the outbox; 0 if gone
    def notify_writable(self, conn: int) -> bool:
        """Ask for one on_writable; True if it is below the mark already (then none will come)."""
    def close(self, conn: int, code: int, reason: bytes = b"") -> None:
        """After what is queued: a close frame; wait for the peer's (close_timeout), SHUT_WR, read to the end, close."""
    def abort(self, conn: int) -> None: ...                      # RST, now
    def topics_of(self, conn: int) -> list[Topic]: ...
    # -- all
    def connections(self) -> int: ...                            # sockets held, lingering ones included
    def websockets(self) -> int: ...                             # upgraded and open
    def stats(self) -> dict[str, int]:
        """Counters since the start: accepted, refused, closed, bytes_in, bytes_out, messages_in,
        frames_in, frames_queued, sends (system calls), too_slow, flooding, no_pong, protocol_errors."""
    def shutdown(self) -> None:
        """Abort everything and free it (end of the worker). No handler is called."""

TICK_MS: int
