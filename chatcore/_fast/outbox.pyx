"""The queue of frames to be sent on one connection.

A queue of references to shared frames; no payload is copied until the moment of sending, and
then only to put small frames beside each other in one scratch buffer, so that any number of them
is one system call. Gathering and writing only read and run without the GIL; all other functions
change reference counts and need it.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from chatcore._fast.frames cimport FrameBuf, frame_drop
from chatcore._fast.sys cimport (
    CC_CHECK, MSG_DONTWAIT, MSG_NOSIGNAL, errno, iovec, msghdr, send, sendmsg,
)


cdef inline FrameBuf *first(const Outbox *o) noexcept nogil:
    return (<FrameBuf **>o.frames)[o.head] if o.capacity else <FrameBuf *>o.frames


cdef bint outbox_push_ring(Outbox *o, FrameBuf *f) noexcept nogil:
    """outbox_push for the second frame and those after it, which need a ring."""
    cdef FrameBuf **ring
    cdef uint32_t capacity, i
    if o.count == o.capacity or o.capacity == 0:
        capacity = o.capacity * 2 if o.capacity else RING_FIRST
        ring = <FrameBuf **>malloc(capacity * sizeof(FrameBuf *))
        if ring == NULL:
            return False
        if o.capacity == 0:
            ring[0] = <FrameBuf *>o.frames
        else:
            for i in range(o.count):
                ring[i] = (<FrameBuf **>o.frames)[(o.head + i) & (o.capacity - 1)]
            free(o.frames)
        o.frames = ring
        o.head = 0
        o.capacity = capacity
    (<FrameBuf **>o.frames)[(o.head + o.count) & (o.capacity - 1)] = f
    o.count += 1
    o.bytes += f.size
    return True


cdef inline void pop(Outbox *o) noexcept nogil:
    frame_drop(first(o))
    o.sent = 0
    o.count -= 1
    if o.count == 0:
        if o.capacity:
            free(o.frames)
            o.capacity = 0
        o.frames = NULL
        o.head = 0
    else:
        o.head = (o.head + 1) & (o.capacity - 1)


cdef void outbox_written(Outbox *o, uint32_t n) noexcept nogil:
    """The kernel took `n` bytes: drop the frames that are sent."""
    cdef uint32_t rest
    CC_CHECK(n <= o.bytes)
    o.bytes -= n
    while o.count:
        rest = first(o).size - o.sent
        if n < rest:
            o.sent += n
            return
        n -= rest
        pop(o)
    CC_CHECK(n == 0 and o.bytes == 0)


cdef void outbox_drop_unsent(Outbox *o) noexcept nogil:
    """Drop all but a first frame of which a part is sent already: half a frame on the wire would
    make everything after it unreadable."""
    cdef FrameBuf *half
    cdef uint32_t sent = o.sent
    if sent == 0:
        outbox_clear(o)
        return
    half = first(o)
    half.refs += 1
    outbox_clear(o)
    outbox_push(o, half)
    o.sent = sent
    o.bytes = half.size - sent


cdef void outbox_clear(Outbox *o) noexcept nogil:
    while o.count:
        pop(o)
    o.bytes = 0


cdef uint32_t outbox_gather(Send *s, uint8_t *scratch, size_t *scratch_used, iovec *iov) noexcept nogil:
    """Put together the bytes of one system call; returns how many of the IOV_MAX_USED `iov` it uses.

    Runs without the GIL: reads the outbox, changes nothing but the Send. Small frames are copied
    beside each other into the rest of `scratch` (SCRATCH_BYTES large), which is in use until the
    call was made.
    """
    cdef const Outbox *o = s.out
    cdef FrameBuf *f
    cdef uint8_t *data
    cdef size_t size, total = 0, used = scratch_used[0]
    cdef uint32_t i, n = 0
    cdef bint joined = False
    for i in range(o.count):
        f = (<FrameBuf **>o.frames)[(o.head + i) & (o.capacity - 1)] if o.capacity else <FrameBuf *>o.frames
        data = f.data
        size = f.size
        if i == 0:
            data += o.sent
            size -= o.sent
        if o.count > 1 and size <= COPY_MAX and used + size <= SCRATCH_BYTES:
            memcpy(scratch + used, data, size)
            if joined:
                iov[n - 1].iov_len += size
            else:
                if n == IOV_MAX_USED:
                    break
                iov[n].iov_base = scratch + used
                iov[n].iov_len = size
                n += 1
                joined = True
            used += size
        else:
            if n == IOV_MAX_USED:
                break
            iov[n].iov_base = data
            iov[n].iov_len = size
            n += 1
            joined = False
        total += size
        if total >= SEND_MAX:
            break
    scratch_used[0] = used
    s.tried = <uint32_t>total
    return n


cdef void outbox_write(Send *s, iovec *iov, uint32_t n) noexcept nogil:
    """The system call for the gathered bytes."""
    cdef msghdr msg
    cdef ssize_t r
    if n == 1:
        r = send(s.fd, iov[0].iov_base, iov[0].iov_len, MSG_DONTWAIT | MSG_NOSIGNAL)
    else:
        memset(&msg, 0, sizeof(msg))
        msg.msg_iov = iov
        msg.msg_iovlen = n
        r = sendmsg(s.fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL)
    s.result = <int>r if r >= 0 else -errno


cdef void outbox_send(Send *s, uint8_t *scratch) noexcept nogil:
    """Write as much as fits into one system call; `scratch` is in use only during it."""
    cdef iovec iov[IOV_MAX_USED]
    cdef size_t used = 0
    outbox_write(s, iov, outbox_gather(s, scratch, &used, iov))
