"""The connection struct, and the functions that keep the structs consistent.

The rules that everything in this package relies on:

* A Conn lives in a slab chunk that never moves and is never given back while the reactor lives.
  Its memory may be reached through a `Conn *` until the outermost poll, flush, tick or upgrade
  returns (`Hub.depth`), even when the connection has died meanwhile: look at its state. Across
  calls only handles are kept; the generation in them is checked.
* States only go forward: HTTP -> OPEN -> CLOSING -> LINGER -> DEAD -> FREE, any step left out.
  conn_ended leaves HTTP or OPEN: it takes the connection out of its topics and has flush make the
  handler's last call about it (NOTIFY_CLOSED).
* No function here calls Python. A flag on a dirty connection says which call flush has to make.
* The loop's thread changes things with the GIL held, so that objects (Frame, Topic) may die in
  any thread. Without the GIL the reactor only makes system calls and reads outboxes.
* One timer per connection; its meaning follows from the state (see `expired`).
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset, strlen

from chatcore._fast.frames cimport CLOSE_BROKEN, FrameBuf, frame_close, frame_drop, frame_join, rx_free
from chatcore._fast.outbox cimport outbox_clear, outbox_drop_unsent
from chatcore._fast.sys cimport (
    CC_CHECK, EPOLL_CTL_MOD, EPOLLIN, EPOLLOUT, SHUT_WR, SO_LINGER, SOL_SOCKET, c_close, cc_now_ns,
    epoll_ctl, epoll_event, linger, setsockopt, shutdown,
)

cdef extern from "stdlib.h" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef enum:
    CACHE_LINE = 64
    # Close codes of the protocol that are decided here.
    CLOSE_NO_PONG = 4003
    CLOSE_NO_AUTH = 4005
    # Arrays of memberships grow by a quarter, which wastes little memory.
    GROW_FIRST = 4


cdef class Core:
    """The part of a reactor that topics use.

    Owns the Hub and everything in it; the Reactor (its only subclass) frees it.
    """

    cdef int call_flush(self) except -1:
        self.scheduled = True
        try:
            self.call_soon(self.flush_callback)
        except BaseException:
            self.scheduled = False
            raise
        return 0

# -- the slab -----------------------------------------------------------------------------------

cdef Conn *conn_new(Hub *h, int fd) noexcept nogil:
    """A connection in state HTTP that owns `fd`; NULL: no memory."""
    cdef Conn *c = h.free
    cdef Conn **chunks
    cdef Conn *chunk
    if c != NULL:
        h.free = c.next
    else:
        if h.slot_count == h.chunk_count * CHUNK_CONNS:
            chunks = <Conn **>realloc(h.chunks, (h.chunk_count + 1) * sizeof(Conn *))
            if chunks == NULL:
                return NULL
            h.chunks = chunks
            chunk = <Conn *>aligned_alloc(CACHE_LINE, CHUNK_CONNS * (sizeof(Conn) + sizeof(int64_t)))
            if chunk == NULL:
                return NULL
            memset(chunk, 0, CHUNK_CONNS * sizeof(Conn))
            chunks[h.chunk_count] = chunk
            h.chunk_count += 1
        c = &h.chunks[h.slot_count >> CHUNK_SHIFT][h.slot_count & (CHUNK_CONNS - 1)]
        c.slot = h.slot_count
        c.gen = 1
        h.slot_count += 1
    c.next = NULL
    c.fd = fd
    c.state = HTTP
    conn_promised(h, c)[0] = 0
    h.open += 1
    return c


cdef void conn_free(Hub *h, Conn *c) noexcept nogil:
    """Give back the slot of a dead connection to which no pointer is left; its next handle differs."""
    cdef uint32_t gen = c.gen, slot = c.slot
    CC_CHECK(c.state == DEAD and c.session == NULL and c.rx == NULL and c.topics == NULL)
    CC_CHECK(c.out.count == 0 and c.timer_prev == NULL and not c.flags & DIRTY)
    memset(c, 0, sizeof(Conn))
    c.slot = slot
    c.gen = (gen + 1) & 0x7FFFFFFF      # handles stay positive in 64 bits
    if c.gen == 0:
        c.gen = 1
    c.next = h.free
    h.free = c

# -- the life of a connection -------------------------------------------------------------------

cdef void conn_ended(Hub *h, Conn *c, uint16_t code) noexcept nogil:
    """Hand on no more input of the peer, and have flush report the end. The caller sets the state."""
    if c.state == OPEN:
        h.websockets -= 1
        c.flags |= NOTIFY_CLOSED
    elif c.state == HTTP:
        if c.flags & HTTP_SEEN:
            c.flags |= NOTIFY_CLOSED
    else:
        return
    c.code = code
    c.flags &= ~<uint16_t>NOTIFY_WRITABLE
    topics_leave(c)
    conn_touch(h, c)


cdef void conn_kill(Hub *h, Conn *c, uint16_t code) noexcept nogil:
    """Close the socket now."""
    if c.state == DEAD:
        return
    conn_ended(h, c, code)
    c.state = DEAD
    outbox_clear(&c.out)
    rx_free(&c.rx)
    timer_stop(c)
    c_close(c.fd)
    c.fd = -1
    h.open -= 1
    h.stats.closed += 1
    conn_touch(h, c)


cdef void conn_reset(Hub *h, Conn *c) noexcept nogil:
    """Close the socket now with RST: the kernel drops its buffers for it."""
    cdef linger reset
    if c.state == DEAD:
        return
    reset.l_onoff = 1
    reset.l_linger = 0
    setsockopt(c.fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset))
    conn_kill(h, c, CLOSE_BROKEN)


cdef void conn_linger(Hub *h, Conn *c) noexcept nogil:
    """Drain the outbox, send FIN, read to the end: closing a socket with unread input resets the
    connection and can destroy the last frames. From OPEN or HTTP: conn_ended comes first."""
    cdef bint timed = c.state == CLOSING
    c.state = LINGER
    rx_free(&c.rx)
    if not timed:
        timer_set(h, c, h.close_ms)
    if not c.flags & BLOCKED:
        conn_touch(h, c)


cdef void conn_close(Hub *h, Conn *c, uint16_t code, const uint8_t *reason, size_t size) noexcept nogil:
    """Queue a close frame on an OPEN connection and await the peer's; on_closed gets the same code."""
    cdef FrameBuf *f
    CC_CHECK(c.state == OPEN)
    conn_ended(h, c, code)
    c.state = CLOSING
    timer_set(h, c, h.close_ms)
    f = frame_close(code, reason, size)
    if f == NULL:
        conn_kill(h, c, code)
    else:
        conn_queue(h, c, f)


cdef void conn_close_because(Hub *h, Conn *c, uint16_t code, const char *reason) noexcept nogil:
    """conn_close with a reason that is text."""
    conn_close(h, c, code, <const uint8_t *>reason, strlen(reason))


cdef void conn_too_slow(Hub *h, Conn *c, const char *reason) noexcept nogil:
    """Close a connection whose peer does not read (4002), so that the peer learns why if it reads on.

    What is queued is dropped, but for the rest of a frame of which a part was sent: the close frame
    is the next thing that the socket takes, and FIN follows it. The socket is full, so that may take
    until slow_ms, far longer than a closing handshake. The handler and the topics forget the
    connection at once; until then it costs its struct and what the kernel holds for it.
    `reason` NULL: the outbox is full.
    """
    h.stats.too_slow += 1
    outbox_drop_unsent(&c.out)
    if reason == NULL:
        reason = b"too slow: too much was waiting to be read"
    conn_close_because(h, c, CLOSE_TOO_SLOW, reason)
    if c.state == CLOSING:
        conn_linger(h, c)
        timer_set(h, c, h.slow_ms)


cdef void conn_no_memory(Hub *h, Conn *c, FrameBuf *f) noexcept nogil:
    frame_drop(f)
    conn_kill(h, c, CLOSE_BROKEN)


cdef void conn_interest(Hub *h, Conn *c) noexcept nogil:
    """Register with epoll for the events that the flags ask for."""
    cdef epoll_event ev
    ev.events = 0
    if not c.flags & NO_IN:
        ev.events |= <uint32_t>EPOLLIN
    if c.flags & ARMED_OUT:
        ev.events |= <uint32_t>EPOLLOUT
    ev.data.u64 = conn_handle(c)
    if epoll_ctl(h.epfd, EPOLL_CTL_MOD, c.fd, &ev) < 0:
        conn_kill(h, c, CLOSE_BROKEN)


cdef void conn_drained(Hub *h, Conn *c) noexcept nogil:
    """The outbox is empty: go on with the end of the connection, if it is ending."""
    if c.state == LINGER:
        if not c.flags & SHUT:
            c.flags |= SHUT
            shutdown(c.fd, SHUT_WR)
        if c.flags & EOF_SEEN:
            conn_kill(h, c, CLOSE_BROKEN)
    elif c.state == HTTP and c.flags & EOF_SEEN and not c.flags & HTTP_ASKED:
        # The peer has sent its FIN and was answered; the handler may still write more of the answer.
        timer_set(h, c, h.close_ms)

# -- timers -------------------------------------------------------------------------------------

cdef uint32_t hub_ms(const Hub *h) noexcept nogil:
    """Milliseconds since the start, mod 2^32 (49 days): compare differences only."""
    return <uint32_t>((cc_now_ns() - h.start_ns) // 1000000)


cdef void timer_link(Hub *h, Conn *c) noexcept nogil:
    cdef uint32_t ahead = c.due - h.tick
    cdef Conn **at
    if ahead >= WHEEL_SLOTS:
        ahead = WHEEL_SLOTS - 1     # looked at again when the wheel comes there
    at = &h.wheel[(h.tick + ahead) % WHEEL_SLOTS]
    c.timer_next = at[0]
    if c.timer_next != NULL:
        c.timer_next.timer_prev = &c.timer_next
    c.timer_prev = at
    at[0] = c


cdef void timer_set(Hub *h, Conn *c, uint32_t ms) noexcept nogil:
    """(Re)start the connection's timer; it goes off in the first tick() after `ms`."""
    cdef int64_t at = cc_now_ns() - h.start_ns + <int64_t>ms * 1000000
    timer_stop(c)
    c.due = <uint32_t>((at + TICK_NS - 1) // TICK_NS)
    if c.due <= h.tick:
        c.due = h.tick + 1
    timer_link(h, c)


cdef void timer_stop(Conn *c) noexcept nogil:
    if c.timer_prev == NULL:
        return
    c.timer_prev[0] = c.timer_next
    if c.timer_next != NULL:
        c.timer_next.timer_prev = c.timer_prev
    c.timer_prev = NULL
    c.timer_next = NULL


cdef uint32_t jittered(Hub *h, uint32_t ms) noexcept nogil:
    """± 10 %, so that connections that came together do not stay together (xorshift64)."""
    h.random ^= h.random << 13
    h.random ^= h.random >> 7
    h.random ^= h.random << 17
    return ms - ms // 10 + <uint32_t>(h.random % (ms // 5 + 1))


cdef void expired(Hub *h, Conn *c) noexcept nogil:
    """The timer went off: act according to the state."""
    cdef uint32_t silent, next_ms
    if c.state == OPEN and not c.flags & AUTHED:
        conn_close_because(h, c, CLOSE_NO_AUTH, b"no successful auth in time")
    elif c.state == OPEN:
        silent = hub_ms(h) - c.heard_ms
        if silent >= 2 * c.ping_ms and c.flags & PINGED:
            # (After a pause of the whole process the ping comes first: none was sent meanwhile.)
            h.stats.no_pong += 1
            conn_close_because(h, c, CLOSE_NO_PONG, b"no sign of life for two intervals of pings")
            return
        h.ping.refs += 1
        if conn_send(h, c, h.ping):
            c.flags |= PINGED
            next_ms = jittered(h, c.ping_ms)
            if silent < 2 * c.ping_ms and next_ms > 2 * c.ping_ms - silent:
                next_ms = 2 * c.ping_ms - silent
            timer_set(h, c, next_ms)
    elif c.out.count:
        # The peer does not read. After a FIN the kernel would keep its buffers for minutes.
        conn_reset(h, c)
    else:
        # HTTP: no request or no upgrade in time. CLOSING, LINGER: the peer did not answer.
        conn_kill(h, c, CLOSE_BROKEN)


cdef void wheel_turn(Hub *h) noexcept nogil:
    """Run the timers of the ticks that have passed."""
    cdef uint32_t now = <uint32_t>((cc_now_ns() - h.start_ns) // TICK_NS)
    cdef Conn *c
    while h.tick < now:
        h.tick += 1
        while True:
            c = h.wheel[h.tick % WHEEL_SLOTS]
            if c == NULL:
                break
            timer_stop(c)
            if c.due > h.tick:
                timer_link(h, c)
            else:
                expired(h, c)

# -- memberships --------------------------------------------------------------------------------

cdef bint topics_reserve(Conn *c) noexcept nogil:
    """Make space for one more topic of the connection. False: no memory."""
    cdef Topics *t = c.topics
    cdef Topics *bigger
    cdef uint32_t capacity
    if t != NULL and t.count < t.capacity:
        return True
    capacity = GROW_FIRST if t == NULL else t.capacity + (t.capacity >> 2 if t.capacity >= 16 else GROW_FIRST)
    bigger = <Topics *>malloc(sizeof(Topics) + capacity * (sizeof(Members *) + sizeof(uint32_t)))
    if bigger == NULL:
        return False
    bigger.count = 0
    bigger.capacity = capacity
    if t != NULL:
        bigger.count = t.count
        memcpy(topics_members(bigger), topics_members(t), t.count * sizeof(Members *))
        memcpy(topics_slots(bigger), topics_slots(t), t.count * sizeof(uint32_t))
        free(t)
    c.topics = bigger
    return True


cdef bint members_reserve(Members *m) noexcept nogil:
    cdef uint32_t capacity
    cdef void *p
    if m.count < m.capacity:
        return True
    capacity = m.capacity + (m.capacity >> 2 if m.capacity >= 16 else GROW_FIRST)
    p = realloc(m.conns, capacity * sizeof(Conn *))
    if p == NULL:
        return False
    m.conns = <Conn **>p
    p = realloc(m.slots, capacity * sizeof(uint32_t))
    if p == NULL:
        return False
    m.slots = <uint32_t *>p
    m.capacity = capacity
    return True


cdef bint topic_has(const Members *m, const Conn *c, uint32_t *at) noexcept nogil:
    """Is the connection in the topic, and where? Looks through the shorter of the two sides."""
    cdef uint32_t i
    if c.topics == NULL:
        return False
    if c.topics.count <= m.count:
        for i in range(c.topics.count):
            if topics_members(c.topics)[i] == m:
                at[0] = topics_slots(c.topics)[i]
                return True
    else:
        for i in range(m.count):
            if m.conns[i] == c:
                at[0] = i
                return True
    return False


cdef bint topic_add(Members *m, Conn *c) noexcept nogil:
    """Add a connection that is not in the topic. False: no memory."""
    if not topics_reserve(c) or not members_reserve(m):
        return False
    topics_members(c.topics)[c.topics.count] = m
    topics_slots(c.topics)[c.topics.count] = m.count
    m.conns[m.count] = c
    m.slots[m.count] = c.topics.count
    c.topics.count += 1
    m.count += 1
    return True


cdef void topic_remove(Members *m, uint32_t at) noexcept nogil:
    """Remove the member at index `at`; the last one takes its place."""
    cdef Conn *c = m.conns[at]
    cdef Topics *t = c.topics
    cdef uint32_t slot = m.slots[at]
    CC_CHECK(topics_members(t)[slot] == m and topics_slots(t)[slot] == at)
    m.count -= 1
    if at != m.count:
        m.conns[at] = m.conns[m.count]
        m.slots[at] = m.slots[m.count]
        topics_slots(m.conns[at].topics)[m.slots[at]] = at
    t.count -= 1
    if slot != t.count:
        topics_members(t)[slot] = topics_members(t)[t.count]
        topics_slots(t)[slot] = topics_slots(t)[t.count]
        topics_members(t)[slot].slots[topics_slots(t)[slot]] = slot
    if t.count == 0:
        free(t)
        c.topics = NULL


cdef void topics_leave(Conn *c) noexcept nogil:
    """Leave all topics."""
    while c.topics != NULL:
        topic_remove(topics_members(c.topics)[c.topics.count - 1],
                     topics_slots(c.topics)[c.topics.count - 1])

# -- frames that topics hold --------------------------------------------------------------------------

cdef void members_forget(Hub *h, Members *m) noexcept nogil:
    """Take the topic out of the list of those that hold frames (nearly always it is the first)."""
    cdef Members *at = h.waiting_first
    if not m.waiting:
        return
    m.waiting = False
    if at == m:
        h.waiting_first = m.next_waiting
        if h.waiting_first == NULL:
            h.waiting_last = NULL
    else:
        while at.next_waiting != m:
            at = at.next_waiting
        at.next_waiting = m.next_waiting
        if h.waiting_last == m:
            h.waiting_last = at
    m.next_waiting = NULL


cdef bint members_hold(Hub *h, Members *m, FrameBuf *f) noexcept nogil:
    """Keep the frame for all members until members_flush, with a reference of its own.
    False: no memory."""
    cdef FrameBuf **bigger
    cdef uint32_t capacity
    if m.held_count == m.held_capacity:
        capacity = m.held_capacity * 2 if m.held_capacity else GROW_FIRST
        bigger = <FrameBuf **>realloc(m.held, capacity * sizeof(FrameBuf *))
        if bigger == NULL:
            return False
        m.held = bigger
        m.held_capacity = capacity
    f.refs += 1
    m.held[m.held_count] = f
    m.held_count += 1
    m.held_bytes += f.size
    if not m.waiting:
        m.waiting = True
        m.next_waiting = NULL
        if h.waiting_last == NULL:
            h.waiting_first = m
        else:
            h.waiting_last.next_waiting = m
        h.waiting_last = m
    if m.held_count == HELD_MAX or m.held_bytes >= HELD_BYTES:
        members_flush(h, m)
    return True


cdef void members_flush(Hub *h, Members *m) noexcept nogil:
    """Queue the frames that the topic holds on every member."""
    cdef uint32_t i = m.count, k, n = m.held_count
    cdef FrameBuf *joined = NULL
    cdef Conn *c
    members_forget(h, m)
    if n == 0:
        return
    if n > 1 and i > 1:
        joined = frame_join(m.held, n, m.held_bytes)
    # From the last to the first: a member that turns out too slow is removed on the way, and the
    # one that takes its place has been served.
    while i:
        i -= 1
        c = m.conns[i]
        CC_CHECK(c.state == OPEN)
        if joined != NULL:
            joined.refs += 1
            if conn_send(h, c, joined):
                h.stats.frames_queued += n - 1
            continue
        for k in range(n):
            m.held[k].refs += 1
            if not conn_send(h, c, m.held[k]):
                break
    if joined != NULL:
        frame_drop(joined)
    members_drop(h, m)


cdef void members_drop(Hub *h, Members *m) noexcept nogil:
    """Drop the frames that the topic holds."""
    cdef uint32_t k
    members_forget(h, m)
    for k in range(m.held_count):
        frame_drop(m.held[k])
    free(m.held)
    m.held = NULL
    m.held_count = m.held_capacity = m.held_bytes = 0
