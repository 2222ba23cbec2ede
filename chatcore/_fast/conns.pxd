"""The connection struct and what keeps the structs consistent: see conns.pyx."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from chatcore._fast.bucket cimport Rate
from chatcore._fast.frames cimport FrameBuf, Rx
from chatcore._fast.outbox cimport Outbox, outbox_push

cdef extern from "Python.h":
    ctypedef struct PyObject

cdef enum:
    TICK_NS = 100000000         # the wheel's step; deadlines are never early and one step late
    WHEEL_SLOTS = 512           # 51 s: a ping interval fits; longer deadlines go round
    CHUNK_CONNS = 256           # 34 KiB at a time: the structs, then their promises (conn_promised)
    CHUNK_SHIFT = 8
    # A topic that holds so much moves it to the members' outboxes.
    HELD_MAX = 256
    HELD_BYTES = 65536

cdef enum:
    CLOSE_TOO_SLOW = 4002

cdef enum State:
    FREE                        # in the free list (zeroed memory)
    HTTP                        # not upgraded
    OPEN                        # a WebSocket
    CLOSING                     # our close frame is queued or sent; the peer's is awaited
    LINGER                      # input is discarded: drain the outbox, SHUT_WR, read to the end
    DEAD                        # the socket is closed; to be freed after on_closed

cdef enum Flag:
    DIRTY = 1                   # in the dirty list
    BURST = 8                   # times the outbox limit that one turn may queue; frames are shared
    BLOCKED = 2                 # the socket is full; EPOLLOUT is awaited
    ARMED_OUT = 4               # EPOLLOUT is in the epoll set
    NO_IN = 8                   # EPOLLIN is not
    EOF_SEEN = 16               # the peer's FIN was read
    SHUT = 32                   # our FIN is sent
    NOTIFY_CLOSED = 64          # flush has to call on_closed or on_http_closed
    NOTIFY_WRITABLE = 128       # on_writable has to be called below the low-water mark
    AUTHED = 256
    HTTP_SEEN = 512             # on_http was called
    HTTP_ASKED = 1024           # bytes came after the last write: an answer is due
    PINGED = 2048               # a ping was sent and no byte came since

cdef struct Topics:
    # The topics of one connection, one allocation: this, then `capacity` pointers, then as many numbers.
    # Owned by the connection.
    uint32_t count
    uint32_t capacity

cdef struct Members:
    # The connections of one topic. `conns[i]` is at `slots[i]` in its connection's Topics, and
    # that entry says i: both sides remove in O(1) by moving their last entry into the hole.
    # Embedded in a Topic object, which owns both arrays.
    #
    # `held`: frames for all members that are in no outbox yet, one reference each. members_flush
    # moves them at the end of the loop's turn, or before anything whose order with them matters, so
    # that frames of one turn are one piece of memory and one entry in each outbox.
    Conn **conns
    uint32_t *slots
    uint32_t count
    uint32_t capacity
    PyObject *topic             # the object it is embedded in (borrowed: it is)
    FrameBuf **held
    uint32_t held_count
    uint32_t held_capacity
    uint32_t held_bytes
    bint waiting                # in the hub's list of topics that hold frames
    Members *next_waiting

cdef struct Conn:
    # Two cache lines; a delivery touches only the first.
    Outbox out
    Conn *next                  # in the dirty list, the dead list or the free list
    int64_t owner               # the user's number; 0: none
    int fd
    uint16_t flags
    uint8_t state
    uint32_t gen                # of the handle; never 0
    uint32_t slot
    # -- second line
    Conn *timer_next
    Conn **timer_prev           # the pointer to this one; NULL: no timer runs
    uint32_t due                # the timer's tick
    uint32_t heard_ms           # when bytes came last: milliseconds since the start, mod 2^32
    int64_t bucket              # when it is full again, see bucket.pxd
    Rx *rx                      # owned; NULL when no frame or message is incomplete
    PyObject *session           # owned reference; NULL before the upgrade and after on_closed
    Topics *topics              # owned; NULL when in none
    uint32_t ping_ms            # 0: no pings
    uint16_t code               # for on_closed

cdef struct Stats:
    uint64_t accepted
    uint64_t refused
    uint64_t closed
    uint64_t bytes_in
    uint64_t bytes_out
    uint64_t messages_in
    uint64_t frames_in
    uint64_t frames_queued
    uint64_t sends
    uint64_t too_slow
    uint64_t flooding
    uint64_t no_pong
    uint64_t protocol_errors

cdef struct Hub:
    # The part of a reactor that is no Python object.
    Conn **chunks
    uint32_t chunk_count
    uint32_t slot_count         # slots ever handed out
    Conn *free
    Conn *dirty_first           # to be written, reported or freed by flush, in this order
    Conn *dirty_last
    Conn *dead                  # to be freed when the outermost call returns
    Members *waiting_first      # topics that hold frames, in the order in which they began to
    Members *waiting_last
    int epfd
    int depth                   # calls in progress that may hold a Conn *
    uint32_t open               # sockets
    uint32_t websockets         # in state OPEN
    # settings
    uint32_t max_message
    uint32_t outbox_limit
    uint32_t low_water
    uint32_t close_ms
    uint32_t slow_ms            # instead of close_ms, for a peer that was too slow
    uint32_t handshake_ms
    uint32_t max_connections
    bint allow_binary
    Rate rate
    # time
    int64_t start_ns
    int64_t now_ns              # of the poll in progress
    uint32_t tick               # the last one whose timers went off
    Conn *wheel[WHEEL_SLOTS]
    uint64_t random
    FrameBuf *ping
    FrameBuf *pong              # without payload
    Stats stats

cdef class Core:
    """The part of a reactor that topics use."""
    cdef Hub hub
    cdef bint scheduled
    cdef object call_soon
    cdef object flush_callback
    cdef int call_flush(self) except -1

    cdef inline int schedule(self) except -1:
        """Have flush() called once in this turn of the loop, if there is something for it."""
        if (self.hub.dirty_first != NULL or self.hub.waiting_first != NULL) and not self.scheduled:
            self.call_flush()
        return 0

cdef inline uint64_t conn_handle(const Conn *c) noexcept nogil:
    return <uint64_t>c.gen << 32 | c.slot

cdef inline Conn *conn_get(const Hub *h, uint64_t handle) noexcept nogil:
    """The connection, or NULL if it is gone."""
    cdef uint32_t slot = <uint32_t>handle
    cdef Conn *c
    if slot >= h.slot_count:
        return NULL
    c = &h.chunks[slot >> CHUNK_SHIFT][slot & (CHUNK_CONNS - 1)]
    if c.gen != handle >> 32 or c.state == FREE or c.state == DEAD:
        return NULL
    return c

cdef inline int64_t *conn_promised(const Hub *h, const Conn *c) noexcept nogil:
    """The other half of the connection's bucket (bucket.pxd). It is needed only when a message is
    refused, so it lies behind the structs of the chunk, which keep their two cache lines."""
    return <int64_t *>(h.chunks[c.slot >> CHUNK_SHIFT] + CHUNK_CONNS) + (c.slot & (CHUNK_CONNS - 1))

cdef inline void conn_touch(Hub *h, Conn *c) noexcept nogil:
    """Have flush look at the connection."""
    if c.flags & DIRTY:
        return
    c.flags |= DIRTY
    c.next = NULL
    if h.dirty_last == NULL:
        h.dirty_first = c
    else:
        h.dirty_last.next = c
    h.dirty_last = c

cdef Conn *conn_new(Hub *h, int fd) noexcept nogil
cdef void conn_free(Hub *h, Conn *c) noexcept nogil
cdef void conn_ended(Hub *h, Conn *c, uint16_t code) noexcept nogil
cdef void conn_kill(Hub *h, Conn *c, uint16_t code) noexcept nogil
cdef void conn_reset(Hub *h, Conn *c) noexcept nogil
cdef void conn_linger(Hub *h, Conn *c) noexcept nogil
cdef void conn_close(Hub *h, Conn *c, uint16_t code, const uint8_t *reason, size_t size) noexcept nogil
cdef void conn_close_because(Hub *h, Conn *c, uint16_t code, const char *reason) noexcept nogil
cdef void conn_too_slow(Hub *h, Conn *c, const char *reason) noexcept nogil
cdef void conn_interest(Hub *h, Conn *c) noexcept nogil
cdef void conn_drained(Hub *h, Conn *c) noexcept nogil

cdef inline bint conn_queue(Hub *h, Conn *c, FrameBuf *f) noexcept nogil:
    """Queue a frame whatever the limit says, taking over one reference; False: no memory, the
    connection was killed."""
    if not outbox_push(&c.out, f):
        conn_no_memory(h, c, f)
        return False
    h.stats.frames_queued += 1
    if not c.flags & BLOCKED:
        conn_touch(h, c)
    return True

cdef inline bint conn_send(Hub *h, Conn *c, FrameBuf *f) noexcept nogil:
    """conn_queue for messages: over the limit the connection is closed with 4002.

    Only a peer that lets the socket fill is too slow: one turn of the loop may queue more than the
    limit, which the peer had no chance to read yet. BURST bounds even that.
    """
    if not conn_queue(h, c, f):
        return False
    if c.out.bytes > h.outbox_limit and (c.flags & BLOCKED or c.out.bytes // BURST > h.outbox_limit):
        conn_too_slow(h, c, NULL)
        return False
    return True

cdef void conn_no_memory(Hub *h, Conn *c, FrameBuf *f) noexcept nogil

cdef uint32_t hub_ms(const Hub *h) noexcept nogil
cdef void timer_set(Hub *h, Conn *c, uint32_t ms) noexcept nogil
cdef void timer_stop(Conn *c) noexcept nogil
cdef void wheel_turn(Hub *h) noexcept nogil

cdef bint topic_add(Members *m, Conn *c) noexcept nogil
cdef bint topic_has(const Members *m, const Conn *c, uint32_t *at) noexcept nogil
cdef void topic_remove(Members *m, uint32_t at) noexcept nogil
cdef void topics_leave(Conn *c) noexcept nogil

cdef bint members_hold(Hub *h, Members *m, FrameBuf *f) noexcept nogil
cdef void members_flush(Hub *h, Members *m) noexcept nogil
cdef void members_drop(Hub *h, Members *m) noexcept nogil

cdef inline void hub_flush_topics(Hub *h) noexcept nogil:
    """Move everything that topics hold to the outboxes, so that other frames come after it."""
    while h.waiting_first != NULL:
        members_flush(h, h.waiting_first)

cdef inline Conn *conn_current(Hub *h, uint64_t handle) noexcept nogil:
    """conn_get after hub_flush_topics: frames queued from now on come after those that topics held."""
    hub_flush_topics(h)
    return conn_get(h, handle)

cdef inline Members **topics_members(Topics *t) noexcept nogil:
    return <Members **>(t + 1)

cdef inline uint32_t *topics_slots(Topics *t) noexcept nogil:
    return <uint32_t *>(topics_members(t) + t.capacity)
