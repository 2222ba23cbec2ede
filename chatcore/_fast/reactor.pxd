"""The reactor: see reactor.pyx."""

from libc.stdint cimport int64_t, uint8_t, uint64_t

from chatcore._fast.conns cimport Conn, Core
from chatcore._fast.frames cimport Event
from chatcore._fast.outbox cimport Send
from chatcore._fast.sys cimport epoll_event
from chatcore._fast.uring cimport Ring

cdef enum:
    EVENTS_MAX = 256            # of one epoll_wait
    BATCH = 32                  # connections read in one release of the GIL
    LISTENERS_MAX = 64

cdef struct Read:
    # One connection's part in a batch of receives.
    Conn *conn
    int fd
    int result                  # bytes, 0: end, or minus errno
    uint8_t *data               # into the receive buffer

cdef class Reactor(Core):
    cdef object handler
    cdef object on_http
    cdef object on_http_closed
    cdef object on_message
    cdef object on_writable
    cdef object on_closed
    cdef object escaped         # a KeyboardInterrupt or the like, raised when the call ends

    cdef uint8_t *recv_buffer
    cdef size_t recv_size
    cdef uint8_t *scratch
    cdef Ring ring              # fd is -1 where the kernel forbids it, or the setting is off
    cdef epoll_event events[EVENTS_MAX]
    cdef int event_at           # events before this are handled
    cdef int event_count
    cdef int listeners[LISTENERS_MAX]
    cdef int listener_count
    cdef bint listeners_paused  # no descriptors left: until the next tick
    cdef int reserve_fd         # given up for a moment to refuse a connection when none are left
    cdef bint polling
    cdef bint flushing
    cdef bint stopped           # by shutdown, or not begun
    cdef bint freed

    cdef int enter(self) except -1
    cdef int leave(self) except -1
    cdef int accept_from(self, int index)
    cdef int refuse(self, int listener)
    cdef int adopt(self, int fd)
    cdef int pause_listeners(self, bint pause)
    cdef int poll_events(self) except -1
    cdef int received(self, Conn *c, uint8_t *data, int n) except -1
    cdef int received_end(self, Conn *c) except -1
    cdef int feed(self, Conn *c, uint8_t *data, size_t n) except -1
    cdef int handle_event(self, Conn *c, Event *ev) except -1
    cdef int flooded(self, Conn *c)
    cdef int deliver(self, Conn *c, Event *ev, int64_t wait) except -1
    cdef int flush_batch(self) except -1
    cdef int wrote(self, Send *s, Conn *c) except -1
    cdef int notify(self, Conn *c) except -1
    cdef int failed(self, str where, Conn *c) except -1
    cdef bint send_payload(self, uint64_t conn, bytes payload, int opcode) except -1
    cdef int free_everything(self) except -1
