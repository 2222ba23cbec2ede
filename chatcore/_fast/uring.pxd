"""Many sends in one system call: see uring.pyx."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from chatcore._fast.outbox cimport Send

cdef extern from *:
    """
    #include <linux/io_uring.h>
    """
    struct io_uring_sqe:
        pass
    struct io_uring_cqe:
        uint64_t user_data
        int res

cdef enum:
    # Sends in one submission at most. 64 cost as little each as 256 do.
    RING_SENDS = 256
    # Fewer than this go out one by one: a submission has a price of its own (measured: even at 4).
    RING_MIN = 8

cdef struct Ring:
    # The two queues that are shared with the kernel. `fd` is -1 if there is none.
    int fd
    void *queues                # both, one mapping
    size_t queues_bytes
    io_uring_sqe *sqes
    size_t sqes_bytes
    io_uring_cqe *cqes
    uint32_t *sq_tail
    uint32_t *sq_array
    uint32_t sq_mask
    uint32_t *cq_head
    uint32_t *cq_tail
    uint32_t cq_mask
    uint32_t added              # since the last submission

cdef bint ring_open(Ring *r) noexcept nogil
cdef void ring_close(Ring *r) noexcept nogil
cdef void ring_send_batch(Ring *r, Send *sends, int n, uint8_t *scratch) noexcept nogil
