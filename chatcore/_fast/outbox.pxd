"""The queue of frames to be sent on one connection: see outbox.pyx."""

from libc.stdint cimport uint8_t, uint32_t

from chatcore._fast.frames cimport FrameBuf
from chatcore._fast.sys cimport iovec

cdef enum:
    RING_FIRST = 8              # slots of a new ring: 64 bytes, most connections never need more
    # A frame up to this size is copied beside its neighbours: an iovec of its own costs the
    # kernel more than copying it costs us.
    COPY_MAX = 2048
    # One system call writes at most this much for a connection: others want their turn, and a
    # socket buffer rarely takes more at once.
    SEND_MAX = 262144
    SCRATCH_BYTES = 65536
    IOV_MAX_USED = 64

cdef struct Outbox:
    # A queue of references to frames. One frame needs no memory beyond this struct; a ring is
    # allocated for the second and freed when the queue is empty. Zeroed memory is a valid, empty
    # outbox.
    void *frames                # count <= 1 and capacity == 0: a FrameBuf *; else FrameBuf *[capacity]
    uint32_t bytes              # on the wire, still unsent
    uint32_t sent               # bytes of the first frame that are gone already
    uint32_t head
    uint32_t count
    uint32_t capacity               # slots of the ring, a power of two; 0: no ring

cdef struct Send:
    # One connection's part in a batch of sends.
    Outbox *out
    int fd
    int result                  # bytes written or minus errno
    uint32_t tried              # bytes handed to the kernel

cdef bint outbox_push_ring(Outbox *o, FrameBuf *f) noexcept nogil
cdef void outbox_written(Outbox *o, uint32_t n) noexcept nogil
cdef void outbox_drop_unsent(Outbox *o) noexcept nogil
cdef void outbox_clear(Outbox *o) noexcept nogil
cdef uint32_t outbox_gather(Send *s, uint8_t *scratch, size_t *scratch_used, iovec *iov) noexcept nogil
cdef void outbox_write(Send *s, iovec *iov, uint32_t n) noexcept nogil
cdef void outbox_send(Send *s, uint8_t *scratch) noexcept nogil

cdef inline bint outbox_push(Outbox *o, FrameBuf *f) noexcept nogil:
    """Queue the frame; takes over one reference. False: no memory (the reference is not taken)."""
    if o.count == 0 and o.capacity == 0:
        o.frames = f
        o.count = 1
        o.bytes = f.size
        return True
    return outbox_push_ring(o, f)
