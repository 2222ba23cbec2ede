"""Client sockets, in C under the uvloop loop. reactor.pyi is the contract; this is how it works.

One call of poll: harvest events, then for up to BATCH ready connections at a time receive into
the one buffer (without the GIL), then parse and dispatch (with it). One call of flush: for up to
RING_SENDS dirty connections at a time send (without the GIL; one system call where there is
io_uring), then account for it and make the calls to Python that are due (with it). Python is called
from poll, from flush and from upgrade (for bytes that came with the request); never from inside
send, close, fan_out and the like, so a handler may call any of these at any point without being
entered again.
"""

import logging
import os
import sys

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.ref cimport Py_INCREF, Py_XDECREF, PyObject
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from chatcore._fast.bucket cimport (
    BUCKET_FLOOD, bucket_ms, bucket_rate, bucket_refuse, bucket_return, bucket_take,
)
from chatcore._fast.conns cimport (
    ARMED_OUT, AUTHED, BLOCKED, CHUNK_CONNS, CHUNK_SHIFT, CLOSE_TOO_SLOW, CLOSING, DEAD, DIRTY, EOF_SEEN, FREE,
    HTTP, HTTP_ASKED, HTTP_SEEN, LINGER, NO_IN, OPEN, PINGED, TICK_NS, NOTIFY_CLOSED, NOTIFY_WRITABLE, Conn,
    Core, Hub, conn_close, conn_close_because, conn_ended, conn_free, conn_get, conn_handle, conn_interest, conn_kill,
    conn_linger, conn_new, conn_queue, conn_reset, conn_send, conn_drained, conn_current,
    conn_promised, conn_too_slow, conn_touch, hub_ms, hub_flush_topics, members_drop, timer_set, timer_stop, topics_members, wheel_turn,
)
from chatcore._fast.frames cimport (
    CLOSE_BROKEN, CLOSE_NO_STATUS, CLOSE_TOO_BIG, EV_BINARY, EV_CLOSE, EV_FAIL, EV_NONE, EV_PING, EV_TEXT,
    OP_BINARY, OP_PING, OP_PONG, OP_TEXT, RAW, Event, Frame as CFrame, FrameBuf, Rx, frame_drop,
    frame_new, rx_done, rx_parse,
)
from chatcore._fast.outbox cimport SCRATCH_BYTES, Send, outbox_written
from chatcore._fast.sys cimport (
    AF_INET, AF_INET6, EAGAIN, ECONNABORTED, EINTR, EMFILE, ENFILE, ENOBUFS, ENOMEM, EBADF, EINVAL,
    ENOTSOCK, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, EPOLLERR, EPOLLHUP,
    EPOLLIN, EPOLLOUT, IPPROTO_TCP, MSG_DONTWAIT, O_CLOEXEC, O_RDONLY, SOCK_CLOEXEC, SOCK_NONBLOCK,
    TCP_NODELAY, accept4, c_close, c_open, cc_now_ns, epoll_create1, epoll_ctl, epoll_event,
    epoll_wait, errno, getpeername, inet_ntop, ntohs, recv, setsockopt, sockaddr, sockaddr_in,
    sockaddr_in6, sockaddr_storage, socklen_t,
)

from chatcore._fast.uring cimport RING_SENDS, ring_close, ring_open, ring_send_batch

from chatcore._fast.frames import Frame
from chatcore._fast.topics import Topic

__all__ = ["TICK_MS", "Frame", "Reactor", "Topic"]

TICK_MS = TICK_NS // 1000000

log = logging.getLogger("chatcore.reactor")

cdef enum:
    ACCEPTS = 64                # of one listener in one poll
    # One read gets at least this much space and at most READ_MAX, so that several connections
    # share the buffer in one batch and no one of them fills it alone.
    READ_MIN = 16384
    READ_MAX = 65536
    # How long one poll or flush may go on before the loop's other callbacks get their turn.
    # Checked after each batch.
    BUDGET_NS = 4000000
    CLOSE_HANDLER_FAILED = 4000
    CLOSE_FLOODING = 4004
    LISTENER = 0                # the generation in the epoll data of a listener


cdef inline bint listener_event(const epoll_event *e) noexcept nogil:
    return e.data.u64 >> 32 == LISTENER


cdef int receive_batch(Read *reads, int n, uint8_t *buffer, size_t size) noexcept nogil:
    """Receive from `n` sockets one behind the other into the buffer; for how many it had space."""
    cdef size_t used = 0, space
    cdef ssize_t r
    cdef int i
    for i in range(n):
        if size - used < READ_MIN and i:
            return i
        space = size - used if size - used < READ_MAX else READ_MAX
        r = recv(reads[i].fd, buffer + used, space, MSG_DONTWAIT)
        reads[i].data = buffer + used
        reads[i].result = <int>r if r >= 0 else -errno
        if r > 0:
            used += (<size_t>r + 63) & ~<size_t>63
            if used > size:
                used = size
    return n


cdef uint32_t milliseconds(name, value) except? 0xFFFFFFFF:
    if not 0 <= value < 1 << 30:
        raise ValueError(f"{name} must be from 0 to {(1 << 30) - 1}, not {value}")
    return value


@cython.final
cdef class Reactor(Core):
    """Owns the epoll instance, the receive buffer, the scratch buffer, the reserve descriptor,
    every connection struct and one reference to each session. Does not own the listeners.

    Belongs to one thread: the loop's. `depth` counts the calls in progress that may hold a
    `Conn *` (poll, flush, upgrade); structs are freed when it returns to 0. Sessions are
    invisible to the garbage collector while the reactor holds them: on_closed or shutdown ends
    that.
    """

    def __cinit__(self, *args, **kwargs):
        self.hub.epfd = -1
        self.ring.fd = -1
        self.reserve_fd = -1
        self.stopped = True

    def __init__(
        self,
        handler,
        call_soon,
        *,
        size_t recv_buffer_bytes=262144,
        max_message_bytes=65536,
        outbox_limit_bytes=1048576,
        outbox_low_water_bytes=65536,
        double rate_per_s=50.0,
        int rate_burst=200,
        int rate_refused=10000,
        handshake_timeout_ms=10000,
        close_timeout_ms=2000,
        slow_timeout_ms=10000,
        uint32_t max_connections=15000,
        bint allow_binary=False,
        bint io_uring=True,
    ):
        cdef Hub *h = &self.hub
        if not self.stopped or self.freed or self.recv_buffer != NULL:
            raise RuntimeError("a reactor is made once")
        if recv_buffer_bytes < READ_MIN:
            raise ValueError(f"recv_buffer_bytes must be at least {READ_MIN}")
        if not 125 <= max_message_bytes < 1 << 30:
            raise ValueError("max_message_bytes must be from 125 to 2^30 - 1")
        if not 1024 <= outbox_limit_bytes < 1 << 30:
            raise ValueError("outbox_limit_bytes must be from 1024 to 2^30 - 1")
        if not 0 <= outbox_low_water_bytes < 1 << 30:
            raise ValueError("outbox_low_water_bytes must be from 0 to 2^30 - 1")
        if rate_per_s < 0 or rate_burst < 1 or rate_refused < 1:
            raise ValueError("rate_per_s must not be negative, rate_burst and rate_refused at least 1")
        h.max_message = max_message_bytes
        h.outbox_limit = outbox_limit_bytes
        h.low_water = outbox_low_water_bytes
        h.handshake_ms = milliseconds("handshake_timeout_ms", handshake_timeout_ms)
        h.close_ms = milliseconds("close_timeout_ms", close_timeout_ms)
        h.slow_ms = milliseconds("slow_timeout_ms", slow_timeout_ms)
        h.max_connections = max_connections
        h.allow_binary = allow_binary
        h.rate = bucket_rate(rate_per_s, rate_burst, rate_refused)
        h.start_ns = cc_now_ns()
        h.now_ns = h.start_ns
        h.random = int.from_bytes(os.urandom(8), "little") | 1
        self.handler = handler
        self.on_http = handler.on_http
        self.on_http_closed = handler.on_http_closed
        self.on_message = handler.on_message
        self.on_writable = handler.on_writable
        self.on_closed = handler.on_closed
        self.call_soon = call_soon
        self.flush_callback = self.flush
        self.recv_size = recv_buffer_bytes
        self.recv_buffer = <uint8_t *>malloc(recv_buffer_bytes)
        self.scratch = <uint8_t *>malloc(SCRATCH_BYTES)
        h.ping = frame_new(OP_PING, NULL, 0)
        h.pong = frame_new(OP_PONG, NULL, 0)
        if self.recv_buffer == NULL or self.scratch == NULL or h.ping == NULL or h.pong == NULL:
            raise MemoryError
        self.reserve_fd = c_open(b"/dev/null", O_RDONLY | O_CLOEXEC)
        h.epfd = epoll_create1(EPOLL_CLOEXEC)
        if self.reserve_fd < 0 or h.epfd < 0:
            raise OSError(errno, os.strerror(errno))
        if io_uring:
            ring_open(&self.ring)
        self.stopped = False

    def __dealloc__(self):
        self.free_everything()

    # -- the loop's side ------------------------------------------------------------------------

    cdef int enter(self) except -1:
        self.hub.depth += 1
        return 0

    cdef int leave(self) except -1:
        """The end of a call that may have run Python: free the connections that died in it."""
        cdef Hub *h = &self.hub
        cdef Conn *c
        h.depth -= 1
        if h.depth == 0:
            while h.dead != NULL:
                c = h.dead
                h.dead = c.next
                conn_free(h, c)
            if self.stopped:
                self.free_everything()
                return 0
        if self.escaped is not None:
            escaped, self.escaped = self.escaped, None
            raise escaped
        if not self.flushing:
            self.schedule()
        return 0

    def fileno(self):
        return self.hub.epfd

    def poll(self):
        if self.polling or self.stopped:
            return
        self.polling = True
        self.enter()
        try:
            self.poll_events()
        finally:
            self.polling = False
            self.leave()

    cdef int poll_events(self) except -1:
        cdef Hub *h = &self.hub
        cdef Read reads[BATCH]
        cdef epoll_event *e
        cdef Conn *c
        cdef int n, got, at, i
        cdef int64_t until
        h.now_ns = cc_now_ns()
        until = h.now_ns + BUDGET_NS
        if self.event_at == self.event_count:
            # Only when all events of the last call were handled: else those at its end would never
            # get their turn under a load that uses up the budget.
            with nogil:
                n = epoll_wait(h.epfd, self.events, EVENTS_MAX, 0)
            self.event_at = 0
            self.event_count = n if n > 0 else 0
        while self.event_at < self.event_count:
            n = 0
            while n < BATCH and self.event_at < self.event_count:
                e = &self.events[self.event_at]
                self.event_at += 1
                if listener_event(e):
                    if <int>e.data.u64 < self.listener_count:
                        self.accept_from(<int>e.data.u64)
                    continue
                c = conn_get(h, e.data.u64)
                if c == NULL:
                    continue
                if e.events & EPOLLOUT and c.flags & BLOCKED:
                    c.flags &= ~<uint16_t>BLOCKED
                    conn_touch(h, c)
                if e.events & (EPOLLIN | EPOLLHUP | EPOLLERR):
                    if not c.flags & EOF_SEEN:
                        reads[n].conn = c
                        reads[n].fd = c.fd
                        n += 1
                    elif e.events & (EPOLLHUP | EPOLLERR):
                        conn_kill(h, c, CLOSE_BROKEN)
            at = 0
            while at < n:
                with nogil:
                    got = receive_batch(&reads[at], n - at, self.recv_buffer, self.recv_size)
                for i in range(at, at + got):
                    # A callback for an earlier one may have closed it, or the reactor.
                    if reads[i].conn.fd == reads[i].fd and not self.stopped:
                        self.received(reads[i].conn, reads[i].data, reads[i].result)
                at += got
                if self.stopped:
                    return 0
            if cc_now_ns() > until:
                break
        return 0

    def tick(self):
        if self.stopped:
            return
        wheel_turn(&self.hub)
        if self.listeners_paused:
            self.pause_listeners(False)
        self.schedule()

    def flush(self):
        cdef int64_t until
        self.scheduled = False
        if self.flushing or self.stopped:
            return
        self.flushing = True
        self.enter()
        try:
            until = cc_now_ns() + BUDGET_NS
            hub_flush_topics(&self.hub)
            while self.hub.dirty_first != NULL:
                self.flush_batch()
                if cc_now_ns() > until or self.stopped:
                    break
        finally:
            self.flushing = False
            self.leave()

    cdef int flush_batch(self) except -1:
        cdef Hub *h = &self.hub
        cdef Conn *batch[RING_SENDS]
        cdef Conn *senders[RING_SENDS]
        cdef Send sends[RING_SENDS]
        cdef Conn *c
        cdef int n = 0, m = 0, i
        while n < RING_SENDS and h.dirty_first != NULL:
            c = h.dirty_first
            h.dirty_first = c.next
            if h.dirty_first == NULL:
                h.dirty_last = NULL
            c.next = NULL
            c.flags &= ~<uint16_t>DIRTY
            batch[n] = c
            n += 1
            if c.out.count and not c.flags & BLOCKED:
                senders[m] = c
                sends[m].out = &c.out
                sends[m].fd = c.fd
                m += 1
        if m:
            with nogil:
                ring_send_batch(&self.ring, sends, m, self.scratch)
            for i in range(m):
                self.wrote(&sends[i], senders[i])
        for i in range(n):
            c = batch[i]
            if c.out.count == 0 and c.state != DEAD:
                conn_drained(h, c)
            if c.flags & (NOTIFY_CLOSED | NOTIFY_WRITABLE):
                self.notify(c)
                if self.stopped:
                    return 0
            if c.state == DEAD and not c.flags & (DIRTY | NOTIFY_CLOSED):
                c.next = h.dead
                h.dead = c
        return 0

    cdef int wrote(self, Send *s, Conn *c) except -1:
        """Account for the result of a send."""
        cdef Hub *h = &self.hub
        h.stats.sends += 1
        if s.result >= 0:
            h.stats.bytes_out += s.result
            outbox_written(&c.out, s.result)
            if <uint32_t>s.result == s.tried:
                if c.out.count:
                    conn_touch(h, c)
                elif c.flags & ARMED_OUT:
                    c.flags &= ~<uint16_t>ARMED_OUT
                    conn_interest(h, c)
                return 0
        elif s.result != -EAGAIN and s.result != -EINTR and s.result != -ENOBUFS:
            conn_kill(h, c, CLOSE_BROKEN)
            return 0
        c.flags |= BLOCKED
        if not c.flags & ARMED_OUT:
            c.flags |= ARMED_OUT
            conn_interest(h, c)
        return 0

    cdef int notify(self, Conn *c) except -1:
        """Make the calls to the handler that are due."""
        cdef PyObject *session = c.session
        if c.flags & NOTIFY_CLOSED:
            c.flags &= ~<uint16_t>NOTIFY_CLOSED
            try:
                if session != NULL:
                    self.on_closed(<object>session, c.code)
                else:
                    self.on_http_closed(conn_handle(c))
            except BaseException:
                self.failed("on_closed", NULL)
            c.session = NULL
            Py_XDECREF(session)
        elif c.state == OPEN and c.out.bytes <= self.hub.low_water:
            c.flags &= ~<uint16_t>NOTIFY_WRITABLE
            try:
                self.on_writable(<object>session)
            except BaseException:
                self.failed("on_writable", c)
        return 0

    cdef int failed(self, str where, Conn *c) except -1:
        """A handler raised: log it and close that connection. Another BaseException
        (KeyboardInterrupt, SystemExit) is raised again once all received bytes are handed out."""
        exc = sys.exc_info()[1]
        if isinstance(exc, Exception):
            log.exception("%s failed", where)
        else:
            self.escaped = exc
        if c == NULL:
            return 0
        if c.state == OPEN:
            conn_close_because(&self.hub, c, CLOSE_HANDLER_FAILED, b"a fault in the server")
        elif c.state == HTTP:
            conn_kill(&self.hub, c, CLOSE_BROKEN)
        return 0

    # -- accepting ------------------------------------------------------------------------------

    def listen(self, int fd):
        cdef epoll_event ev
        cdef int one = 1
        if self.stopped:
            raise RuntimeError("the reactor was shut down")
        if self.listener_count == LISTENERS_MAX:
            raise ValueError(f"more than {LISTENERS_MAX} listeners")
        # Linux hands this option on to the accepted sockets: one system call less for each.
        # (A listener that is no TCP socket refuses the option and does not need it.)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))
        ev.events = 0 if self.listeners_paused else EPOLLIN
        ev.data.u64 = <uint64_t>LISTENER << 32 | <uint32_t>self.listener_count
        if epoll_ctl(self.hub.epfd, EPOLL_CTL_ADD, fd, &ev) < 0:
            raise OSError(errno, os.strerror(errno))
        self.listeners[self.listener_count] = fd
        self.listener_count += 1

    def unlisten(self):
        cdef epoll_event ev
        cdef int i
        for i in range(self.listener_count):
            epoll_ctl(self.hub.epfd, EPOLL_CTL_DEL, self.listeners[i], &ev)
        self.listener_count = 0

    def shorten_lingering(self):
        cdef Hub *h = &self.hub
        cdef Conn *c
        cdef uint32_t i
        if h.slow_ms <= h.close_ms:
            return
        h.slow_ms = h.close_ms
        for i in range(h.slot_count):
            c = &h.chunks[i >> CHUNK_SHIFT][i & (CHUNK_CONNS - 1)]
            if c.state == LINGER and c.due > h.tick + h.close_ms // (TICK_NS // 1000000) + 1:
                timer_set(h, c, h.close_ms)

    def accept_pending(self):
        cdef int i, n, total = 0
        for i in range(self.listener_count):
            while True:
                n = self.accept_from(i)
                total += n
                if n < ACCEPTS:
                    break
        return total

    cdef int accept_from(self, int index):
        """Accept up to ACCEPTS connections; returns how many were in the queue."""
        cdef int listener = self.listeners[index]
        cdef int fds[ACCEPTS]
        cdef int n = 0, fd, err = 0, i
        with nogil:
            while n < ACCEPTS:
                fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
                if fd >= 0:
                    fds[n] = fd
                    n += 1
                elif errno != EINTR and errno != ECONNABORTED:
                    err = errno
                    break
        for i in range(n):
            self.adopt(fds[i])
        if err == EMFILE or err == ENFILE:
            while n < ACCEPTS and self.refuse(listener):
                n += 1
        elif err == ENOMEM or err == ENOBUFS:
            self.pause_listeners(True)
        elif err == EBADF or err == EINVAL or err == ENOTSOCK:
            # Its owner has shut it down; epoll would report it for ever.
            epoll_ctl(self.hub.epfd, EPOLL_CTL_DEL, listener, NULL)
        return n

    cdef int adopt(self, int fd):
        cdef Hub *h = &self.hub
        cdef epoll_event ev
        cdef Conn *c = NULL
        if h.open < h.max_connections:
            c = conn_new(h, fd)
        if c == NULL:
            h.stats.refused += 1
            c_close(fd)
            return 0
        h.stats.accepted += 1
        ev.events = EPOLLIN
        ev.data.u64 = conn_handle(c)
        if epoll_ctl(h.epfd, EPOLL_CTL_ADD, fd, &ev) < 0:
            conn_kill(h, c, CLOSE_BROKEN)
            return 0
        timer_set(h, c, h.handshake_ms)
        return 1

    cdef int refuse(self, int listener):
        """No descriptors are left: give up the reserve, accept one connection with it and close that,
        so that the peer does not wait and the listener does not stay readable for ever."""
        cdef int fd
        if self.reserve_fd < 0:
            self.reserve_fd = c_open(b"/dev/null", O_RDONLY | O_CLOEXEC)
            if self.reserve_fd < 0:
                self.pause_listeners(True)
                return 0
        c_close(self.reserve_fd)
        fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd >= 0:
            self.hub.stats.refused += 1
            c_close(fd)
        self.reserve_fd = c_open(b"/dev/null", O_RDONLY | O_CLOEXEC)
        return fd >= 0

    cdef int pause_listeners(self, bint pause):
        cdef epoll_event ev
        cdef int i
        for i in range(self.listener_count):
            ev.events = 0 if pause else EPOLLIN
            ev.data.u64 = <uint64_t>LISTENER << 32 | <uint32_t>i
            epoll_ctl(self.hub.epfd, EPOLL_CTL_MOD, self.listeners[i], &ev)
        self.listeners_paused = pause
        return 0

    # -- receiving ------------------------------------------------------------------------------

    cdef int received(self, Conn *c, uint8_t *data, int n) except -1:
        cdef Hub *h = &self.hub
        if n < 0:
            if n != -EAGAIN and n != -EINTR:
                conn_kill(h, c, CLOSE_BROKEN)
            return 0
        if n == 0:
            return self.received_end(c)
        h.stats.bytes_in += n
        if c.state == OPEN or c.state == CLOSING:
            return self.feed(c, data, n)
        if c.state == HTTP:
            c.flags |= HTTP_SEEN | HTTP_ASKED
            try:
                self.on_http(conn_handle(c), PyBytes_FromStringAndSize(<char *>data, n))
            except BaseException:
                self.failed("on_http", c)
        return 0

    cdef int received_end(self, Conn *c) except -1:
        """The peer's FIN: nothing more will come, but it may still read."""
        cdef Hub *h = &self.hub
        c.flags |= EOF_SEEN
        if c.state == OPEN:
            conn_ended(h, c, CLOSE_BROKEN)
            conn_linger(h, c)
        elif c.state == CLOSING:
            conn_linger(h, c)
        elif c.state == HTTP and not c.flags & HTTP_ASKED and c.out.count == 0:
            conn_kill(h, c, CLOSE_BROKEN)
            return 0
        if c.state == LINGER and c.out.count == 0:
            conn_kill(h, c, CLOSE_BROKEN)
            return 0
        c.flags |= NO_IN                # epoll would report the end for ever
        conn_interest(h, c)
        return 0

    cdef int feed(self, Conn *c, uint8_t *data, size_t n) except -1:
        """Parse and handle bytes of a WebSocket. The connection may die in any callback."""
        cdef Hub *h = &self.hub
        cdef Event ev
        cdef size_t used
        c.flags &= ~<uint16_t>PINGED
        c.heard_ms = <uint32_t>((h.now_ns - h.start_ns) // 1000000)
        while n and (c.state == OPEN or c.state == CLOSING) and not self.stopped:
            used = rx_parse(&c.rx, data, n, h.max_message, h.allow_binary, &ev)
            data += used
            n -= used
            if ev.kind == EV_NONE:
                return 0
            self.handle_event(c, &ev)
        return 0

    cdef int handle_event(self, Conn *c, Event *ev) except -1:
        cdef Hub *h = &self.hub
        cdef FrameBuf *f
        cdef int64_t wait = 0
        cdef const char *why = b""
        h.stats.frames_in += 1
        if ev.kind == EV_FAIL:
            # The rest of the stream cannot be parsed: say why and read no more.
            h.stats.protocol_errors += 1
            if ev.code == CLOSE_TOO_BIG:
                why = b"the message is too large"
            if c.state == OPEN:
                conn_close_because(h, c, ev.code, why)
            if c.state == CLOSING:
                conn_linger(h, c)
            return 0
        if ev.kind == EV_CLOSE:
            # Section 5.5.1: answer with the same code, unless ours went first.
            if c.state == OPEN:
                conn_close(h, c, ev.code, NULL, 0)
            if c.state == CLOSING:
                conn_linger(h, c)
            return 0
        if c.state == CLOSING:
            rx_done(&c.rx)
            return 0
        if not bucket_take(&c.bucket, &h.rate, h.now_ns):
            # The time of this poll may lie before the time at which the token came.
            h.now_ns = cc_now_ns()
            if not bucket_take(&c.bucket, &h.rate, h.now_ns):
                wait = bucket_refuse(&c.bucket, conn_promised(h, c), &h.rate, h.now_ns, 0)
                if wait == BUCKET_FLOOD:
                    self.flooded(c)
                    return 0
        if ev.kind == EV_TEXT or ev.kind == EV_BINARY:
            return self.deliver(c, ev, wait)
        if ev.kind == EV_PING and wait == 0:
            # Over its rate a ping goes unanswered; section 5.5.3 lets us answer only the last.
            if ev.size == 0:
                f = h.pong
                f.refs += 1
            else:
                f = frame_new(OP_PONG, ev.data, ev.size)
            if f == NULL:
                conn_kill(h, c, CLOSE_BROKEN)
            else:
                conn_send(h, c, f)
        rx_done(&c.rx)
        return 0

    cdef int flooded(self, Conn *c):
        """The peer goes on though more than enough of what it sent was refused."""
        cdef Hub *h = &self.hub
        h.stats.flooding += 1
        conn_close_because(h, c, CLOSE_FLOODING, b"flooding: too many messages over the rate")
        if c.state == CLOSING:
            conn_linger(h, c)
        return 0

    cdef int deliver(self, Conn *c, Event *ev, int64_t wait) except -1:
        cdef object payload
        if self.hub.allow_binary and ev.kind == EV_TEXT:
            payload = PyUnicode_DecodeUTF8(<char *>ev.data, ev.size, NULL)
        else:
            payload = PyBytes_FromStringAndSize(<char *>ev.data, ev.size)
        rx_done(&c.rx)
        self.hub.stats.messages_in += 1
        try:
            self.on_message(<object>c.session, payload, bucket_ms(wait) if wait else 0)
        except BaseException:
            self.failed("on_message", c)
        return 0

    # -- a connection before its upgrade --------------------------------------------------------

    def peer(self, uint64_t conn):
        cdef Conn *c = conn_get(&self.hub, conn)
        cdef sockaddr_storage address
        cdef socklen_t size = sizeof(address)
        cdef char text[64]
        if c == NULL or getpeername(c.fd, <sockaddr *>&address, &size) < 0:
            return ""
        if address.ss_family == AF_INET:
            inet_ntop(AF_INET, &(<sockaddr_in *>&address).sin_addr, text, sizeof(text))
            return f"{text.decode()}:{ntohs((<sockaddr_in *>&address).sin_port)}"
        if address.ss_family == AF_INET6:
            inet_ntop(AF_INET6, &(<sockaddr_in6 *>&address).sin6_addr, text, sizeof(text))
            return f"[{text.decode()}]:{ntohs((<sockaddr_in6 *>&address).sin6_port)}"
        return ""

    def write(self, uint64_t conn, bytes data not None, bint close=False):
        cdef Hub *h = &self.hub
        cdef Conn *c = conn_get(h, conn)
        cdef FrameBuf *f
        if c == NULL or c.state != HTTP:
            return False
        c.flags &= ~<uint16_t>HTTP_ASKED
        if len(data):
            f = frame_new(RAW, <const uint8_t *><char *>data, len(data))
            if f == NULL:
                raise MemoryError
            if not conn_queue(h, c, f):
                raise MemoryError
        if close:
            conn_ended(h, c, CLOSE_NO_STATUS)
            conn_linger(h, c)
        self.schedule()
        return True

    def http_deadline(self, uint64_t conn, ms):
        cdef Conn *c = conn_get(&self.hub, conn)
        cdef uint32_t wait = milliseconds("ms", ms)
        if c != NULL and c.state == HTTP:
            timer_set(&self.hub, c, wait)

    def upgrade(self, uint64_t conn, session, bytes response not None, bytes leftover not None,
                auth_timeout_ms):
        cdef Hub *h = &self.hub
        cdef Conn *c = conn_get(h, conn)
        cdef uint32_t wait = milliseconds("auth_timeout_ms", auth_timeout_ms)
        cdef FrameBuf *f
        cdef uint8_t *copy
        cdef size_t n = len(leftover)
        if c == NULL or c.state != HTTP:
            return False
        if c.flags & EOF_SEEN:
            conn_kill(h, c, CLOSE_BROKEN)
            self.schedule()
            return False
        f = frame_new(RAW, <const uint8_t *><char *>response, len(response))
        if f == NULL or not conn_queue(h, c, f):
            raise MemoryError
        c.state = OPEN
        h.websockets += 1
        Py_INCREF(session)
        c.session = <PyObject *>session
        c.heard_ms = hub_ms(h)
        if wait:
            timer_set(h, c, wait)
        else:
            timer_stop(c)
        self.enter()
        try:
            if n:
                copy = <uint8_t *>malloc(n)     # the parser unmasks in place
                if copy == NULL:
                    raise MemoryError
                memcpy(copy, <char *>leftover, n)
                try:
                    if not self.polling:
                        h.now_ns = cc_now_ns()
                    self.feed(c, copy, n)
                finally:
                    free(copy)
        finally:
            self.leave()
        return True

    # -- a WebSocket ----------------------------------------------------------------------------

    def authenticated(self, uint64_t conn, int64_t owner, ping_interval_ms):
        cdef Conn *c = conn_get(&self.hub, conn)
        cdef uint32_t interval = milliseconds("ping_interval_ms", ping_interval_ms)
        if c == NULL or c.state != OPEN:
            return
        c.flags |= AUTHED
        c.owner = owner
        c.ping_ms = interval
        if interval:
            timer_set(&self.hub, c, interval)
        else:
            timer_stop(c)

    cdef bint send_payload(self, uint64_t conn, bytes payload, int opcode) except -1:
        cdef Conn *c = conn_current(&self.hub, conn)
        cdef FrameBuf *f
        cdef bint sent
        if c == NULL or c.state != OPEN:
            return False
        f = frame_new(opcode, <const uint8_t *><char *>payload, len(payload))
        if f == NULL:
            raise MemoryError
        sent = conn_send(&self.hub, c, f)
        self.schedule()
        return sent

    def send(self, uint64_t conn, bytes payload not None):
        return self.send_payload(conn, payload, OP_TEXT)

    def send_binary(self, uint64_t conn, bytes payload not None):
        return self.send_payload(conn, payload, OP_BINARY)

    def send_frame(self, uint64_t conn, CFrame frame not None):
        cdef Conn *c = conn_current(&self.hub, conn)
        cdef bint sent
        if c == NULL or c.state != OPEN:
            return False
        frame.buf.refs += 1
        sent = conn_send(&self.hub, c, frame.buf)
        self.schedule()
        return sent

    def queued(self, uint64_t conn):
        cdef Conn *c = conn_current(&self.hub, conn)
        return 0 if c == NULL else c.out.bytes

    def notify_writable(self, uint64_t conn):
        cdef Conn *c = conn_current(&self.hub, conn)
        if c == NULL or c.state != OPEN:
            return False
        if c.out.bytes <= self.hub.low_water:
            return True
        c.flags |= NOTIFY_WRITABLE
        return False

    def defer(self, uint64_t conn):
        cdef Hub *h = &self.hub
        cdef Conn *c = conn_get(h, conn)
        cdef int64_t wait
        if c == NULL or c.state != OPEN:
            return 0
        wait = bucket_return(&c.bucket, conn_promised(h, c), &h.rate, cc_now_ns())
        if wait == BUCKET_FLOOD:
            hub_flush_topics(h)
            if c.state == OPEN:
                self.flooded(c)
            self.schedule()
            return 0
        return bucket_ms(wait)

    def close(self, uint64_t conn, uint16_t code, bytes reason not None=b""):
        cdef Hub *h = &self.hub
        cdef Conn *c = conn_current(h, conn)
        if c == NULL:
            return
        if c.state == OPEN and code == CLOSE_TOO_SLOW:
            conn_too_slow(h, c, reason)
        elif c.state == OPEN:
            conn_close(h, c, code, <const uint8_t *><char *>reason, len(reason))
        elif c.state == HTTP:
            conn_ended(h, c, code)
            conn_linger(h, c)
        self.schedule()

    def abort(self, uint64_t conn):
        cdef Hub *h = &self.hub
        cdef Conn *c = conn_get(h, conn)
        if c == NULL:
            return
        conn_reset(h, c)
        self.schedule()

    def topics_of(self, uint64_t conn):
        cdef Conn *c = conn_get(&self.hub, conn)
        cdef list found = []
        cdef uint32_t i = 0
        if c == NULL:
            return found
        # Appending may run the garbage collector and with it any code: read both each time.
        while c.topics != NULL and i < c.topics.count:
            found.append(<object>topics_members(c.topics)[i].topic)
            i += 1
        return found

    # -- all ------------------------------------------------------------------------------------

    def connections(self):
        return self.hub.open

    def sessions(self):
        cdef Hub *h = &self.hub
        cdef list found = []
        cdef Conn *c
        cdef uint32_t i = 0
        # Appending may run the garbage collector and with it any code: read the count each time.
        while i < h.slot_count:
            c = &h.chunks[i >> CHUNK_SHIFT][i & (CHUNK_CONNS - 1)]
            if c.state == OPEN and c.session != NULL:
                found.append(<object>c.session)
            i += 1
        return found

    def websockets(self):
        return self.hub.websockets

    def stats(self):
        return self.hub.stats

    def uses_io_uring(self):
        return self.ring.fd >= 0

    def sizes(self):
        return {"conn": sizeof(Conn) + sizeof(int64_t), "rx": sizeof(Rx)}

    def shutdown(self):
        self.stopped = True
        if self.hub.depth == 0:
            self.free_everything()

    cdef int free_everything(self) except -1:
        """Abort and free all; also for a reactor whose constructor failed half-way."""
        cdef Hub *h = &self.hub
        cdef Conn *c
        cdef uint32_t i
        if self.freed:
            return 0
        self.freed = True
        self.stopped = True
        sessions = []
        for i in range(h.slot_count):
            c = &h.chunks[i >> CHUNK_SHIFT][i & (CHUNK_CONNS - 1)]
            if c.state == FREE:
                continue
            conn_reset(h, c)
            if c.session != NULL:
                sessions.append(<object>c.session)
                Py_XDECREF(c.session)
                c.session = NULL
        while h.waiting_first != NULL:
            members_drop(h, h.waiting_first)
        h.dirty_first = NULL
        h.dirty_last = NULL
        h.dead = NULL
        h.free = NULL
        h.slot_count = 0                # no handle is valid any more
        for i in range(h.chunk_count):
            free(h.chunks[i])
        free(h.chunks)
        h.chunks = NULL
        h.chunk_count = 0
        if h.epfd >= 0:
            c_close(h.epfd)
            h.epfd = -1
        if self.reserve_fd >= 0:
            c_close(self.reserve_fd)
            self.reserve_fd = -1
        ring_close(&self.ring)
        free(self.recv_buffer)
        free(self.scratch)
        self.recv_buffer = NULL
        self.scratch = NULL
        if h.ping != NULL:
            frame_drop(h.ping)
            h.ping = NULL
        if h.pong != NULL:
            frame_drop(h.pong)
            h.pong = NULL
        self.event_at = self.event_count = 0
        self.listener_count = 0
        self.call_soon = self.flush_callback = self.handler = None
        self.on_http = self.on_http_closed = self.on_message = None
        self.on_writable = self.on_closed = None
        # Last, since it may run any code: drop the sessions.
        del sessions
        return 0
