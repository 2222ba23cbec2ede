"""WebSocket framing (RFC 6455): see frames.pyx."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

cdef enum:
    # RFC 6455 section 5.2
    OP_CONT = 0x0
    OP_TEXT = 0x1
    OP_BINARY = 0x2
    OP_CLOSE = 0x8
    OP_PING = 0x9
    OP_PONG = 0xA
    FIN = 0x80
    RSV = 0x70
    MASKED = 0x80
    CONTROL_MAX = 125           # section 5.5
    HEADER_MAX = 14             # 2 + 8 (length) + 4 (mask)
    RAW = 0x100                 # "opcode" of bytes that are no frame (HTTP)

cdef enum:
    # Section 7.4.1
    CLOSE_PROTOCOL = 1002
    CLOSE_UNSUPPORTED = 1003
    CLOSE_NO_STATUS = 1005
    CLOSE_BROKEN = 1006
    CLOSE_NOT_UTF8 = 1007
    CLOSE_TOO_BIG = 1009
    CLOSE_INTERNAL = 1011

# -- outbound ---------------------------------------------------------------------------------

cdef struct FrameBuf:
    # Header and payload as they go over the wire. Counted references: one for each outbox slot
    # and one for a Frame object. The count is only touched with the GIL held (a Frame may die in
    # any thread), so it needs no atomics; without the GIL the bytes may be read, no more.
    uint32_t refs
    uint32_t size
    uint8_t data[1]             # in fact `size`

cdef FrameBuf *frame_new(int opcode, const uint8_t *payload, size_t size) noexcept nogil
cdef FrameBuf *frame_close(uint16_t code, const uint8_t *reason, size_t size) noexcept nogil
cdef FrameBuf *frame_join(FrameBuf **frames, uint32_t n, uint32_t size) noexcept nogil
cdef void frame_free(FrameBuf *f) noexcept nogil

cdef inline void frame_drop(FrameBuf *f) noexcept nogil:
    f.refs -= 1
    if f.refs == 0:
        frame_free(f)

cdef class Frame:
    cdef FrameBuf *buf

# -- inbound ----------------------------------------------------------------------------------

cdef struct Rx:
    # The state of an incomplete frame or message. Exists only while there is one.
    uint8_t *msg                # the message so far, unmasked; owned
    uint32_t size
    uint32_t capacity
    uint32_t remain             # payload bytes of the current data frame still to come
    uint32_t utf8               # state of the validation at the end of msg
    uint8_t mask[4]             # for the next payload byte, first byte first
    uint8_t opcode              # OP_TEXT or OP_BINARY; 0: no message has begun
    uint8_t fin                 # the current frame is the message's last
    uint8_t head_size           # bytes in head
    uint8_t head[HEADER_MAX + CONTROL_MAX]  # an incomplete header or control frame

cdef enum EventKind:
    EV_NONE                     # all input used up
    EV_TEXT
    EV_BINARY
    EV_FRAGMENT                 # a frame was complete, its message is not
    EV_PING
    EV_PONG
    EV_CLOSE
    EV_FAIL

cdef struct Event:
    EventKind kind
    uint8_t *data               # into the input or into rx.msg / rx.head
    size_t size
    uint16_t code               # EV_CLOSE: as received (1005: none); EV_FAIL: to be sent

cdef size_t rx_parse(Rx **rx, uint8_t *data, size_t size, uint32_t max_message, bint allow_binary,
                     Event *ev) noexcept nogil
cdef void rx_done(Rx **rx) noexcept nogil
cdef void rx_free(Rx **rx) noexcept nogil

cdef class Parser:
    cdef Rx *rx
    cdef uint32_t max_message
    cdef bint allow_binary
    cdef bint failed
