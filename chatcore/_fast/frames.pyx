"""WebSocket framing (RFC 6455), without any I/O: incremental parser, builder, shared frames.

The parser is a function over the bytes that were received, which it unmasks in place, and over
an :c:type:`Rx` that exists only while a frame or a message is incomplete: an idle connection
costs one NULL. A message that lies whole in the input is never copied by the parser.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy

from chatcore._fast.sys cimport CC_CHECK

cdef enum:
    # The first allocation for an incomplete message. The buffer then doubles as bytes arrive: a
    # peer gets memory for what it has sent, not for the length that it declared.
    MSG_FIRST = 512

# -- masking and UTF-8 ------------------------------------------------------------------------

cdef extern from * nogil:
    """
    #include <string.h>
    #include <stdint.h>

    /* XOR with the mask (section 5.3), 8 bytes a step; gcc turns the loop into vector code. */
    static inline void cc_unmask(uint8_t *restrict dst, const uint8_t *src, size_t n,
                                 const uint8_t *mask) {
        uint8_t m8[8];
        uint64_t m, w;
        size_t i, words = n / 8;
        memcpy(m8, mask, 4);
        memcpy(m8 + 4, mask, 4);
        memcpy(&m, m8, 8);
        for (i = 0; i < words; i++) {
            memcpy(&w, src + 8 * i, 8);
            w ^= m;
            memcpy(dst + 8 * i, &w, 8);
        }
        for (i = words * 8; i < n; i++)
            dst[i] = src[i] ^ m8[i & 7];
    }

    static inline void cc_unmask_in_place(uint8_t *p, size_t n, const uint8_t *mask) {
        uint8_t m8[8];
        uint64_t m, w;
        size_t i, words = n / 8;
        memcpy(m8, mask, 4);
        memcpy(m8 + 4, mask, 4);
        memcpy(&m, m8, 8);
        for (i = 0; i < words; i++) {
            memcpy(&w, p + 8 * i, 8);
            w ^= m;
            memcpy(p + 8 * i, &w, 8);
        }
        for (i = words * 8; i < n; i++)
            p[i] ^= m8[i & 7];
    }

    /* UTF-8 (RFC 3629) as a state machine, so that it can stop and go on at any byte.
       The state counts the continuation bytes to come (bits 0-1) and holds the range that the
       next one must be in when the first byte narrows it: no overlong forms, no surrogates,
       nothing above U+10FFFF (bits 8-15 lowest, 16-23 highest). 0: between characters. */
    #define CC_UTF8_BAD 0xFFFFFFFFu
    #define CC_UTF8(need, lo, hi) ((uint32_t)(need) | (uint32_t)(lo) << 8 | (uint32_t)(hi) << 16)

    static inline uint32_t cc_utf8_first(uint8_t b) {
        if (b < 0x80) return 0;
        if (b < 0xC2) return CC_UTF8_BAD;
        if (b < 0xE0) return CC_UTF8(1, 0x80, 0xBF);
        if (b == 0xE0) return CC_UTF8(2, 0xA0, 0xBF);
        if (b == 0xED) return CC_UTF8(2, 0x80, 0x9F);
        if (b < 0xF0) return CC_UTF8(2, 0x80, 0xBF);
        if (b == 0xF0) return CC_UTF8(3, 0x90, 0xBF);
        if (b < 0xF4) return CC_UTF8(3, 0x80, 0xBF);
        if (b == 0xF4) return CC_UTF8(3, 0x80, 0x8F);
        return CC_UTF8_BAD;
    }

    static uint32_t cc_utf8(uint32_t state, const uint8_t *p, size_t n) {
        const uint8_t *end = p + n;
        while (p < end) {
            if (state == 0) {
                /* Mostly ASCII: 16 bytes a step, then one. */
                while (end - p >= 16) {
                    uint64_t a, b;
                    memcpy(&a, p, 8);
                    memcpy(&b, p + 8, 8);
                    if ((a | b) & 0x8080808080808080ull) break;
                    p += 16;
                }
                while (p < end && *p < 0x80) p++;
                if (p == end) return 0;
                state = cc_utf8_first(*p++);
                if (state == CC_UTF8_BAD) return state;
            } else {
                uint8_t b = *p++;
                if (b < (uint8_t)(state >> 8) || b > (uint8_t)(state >> 16)) return CC_UTF8_BAD;
                state = (state & 3) == 1 ? 0 : CC_UTF8((state & 3) - 1, 0x80, 0xBF);
            }
        }
        return state;
    }
    """
    void cc_unmask(uint8_t *dst, const uint8_t *src, size_t n, const uint8_t *mask)
    void cc_unmask_in_place(uint8_t *p, size_t n, const uint8_t *mask)
    uint32_t cc_utf8(uint32_t state, const uint8_t *p, size_t n)
    const uint32_t CC_UTF8_BAD

# -- outbound ---------------------------------------------------------------------------------

cdef FrameBuf *frame_new(int opcode, const uint8_t *payload, size_t size) noexcept nogil:
    """A final, unmasked frame with one reference, or (RAW) the bytes alone. NULL: no memory."""
    cdef uint8_t head[10]
    cdef size_t n
    cdef int i
    cdef FrameBuf *f
    if opcode == RAW:
        n = 0
    else:
        head[0] = FIN | <uint8_t>opcode
        if size <= 125:
            head[1] = <uint8_t>size
            n = 2
        elif size <= 0xFFFF:
            head[1] = 126
            head[2] = <uint8_t>(size >> 8)
            head[3] = <uint8_t>size
            n = 4
        else:
            head[1] = 127
            for i in range(8):
                head[2 + i] = <uint8_t>(<uint64_t>size >> (56 - 8 * i))
            n = 10
    if size > 0x7FFFFFFF:
        return NULL
    f = <FrameBuf *>malloc(sizeof(FrameBuf) + n + size)
    if f == NULL:
        return NULL
    f.refs = 1
    f.size = <uint32_t>(n + size)
    if n:
        memcpy(f.data, head, n)
    if size:
        memcpy(f.data + n, payload, size)
    return f


cdef FrameBuf *frame_close(uint16_t code, const uint8_t *reason, size_t size) noexcept nogil:
    """A close frame (section 5.5.1); code 1005: an empty one. A long reason is cut to fit,
    between two characters."""
    cdef uint8_t body[CONTROL_MAX]
    if code == CLOSE_NO_STATUS:
        return frame_new(OP_CLOSE, NULL, 0)
    if size > CONTROL_MAX - 2:
        size = CONTROL_MAX - 2
        while size and (reason[size] & 0xC0) == 0x80:
            size -= 1
    body[0] = <uint8_t>(code >> 8)
    body[1] = <uint8_t>code
    if size:
        memcpy(body + 2, reason, size)
    return frame_new(OP_CLOSE, body, size + 2)


cdef FrameBuf *frame_join(FrameBuf **frames, uint32_t n, uint32_t size) noexcept nogil:
    """The bytes of `n` frames, `size` in all, one behind the other, with one reference. NULL: no memory."""
    cdef FrameBuf *f = <FrameBuf *>malloc(sizeof(FrameBuf) + size)
    cdef uint8_t *to
    cdef uint32_t i
    if f == NULL:
        return NULL
    f.refs = 1
    f.size = size
    to = f.data
    for i in range(n):
        memcpy(to, frames[i].data, frames[i].size)
        to += frames[i].size
    return f


cdef void frame_free(FrameBuf *f) noexcept nogil:
    free(f)


cdef class Frame:
    """An outbound text frame, built once and shared by all outboxes.

    Owns one reference to the C frame; each outbox slot owns another. The bytes live until the
    last of them is dropped, whichever goes first.
    """

    def __cinit__(self, payload not None):
        cdef bytes data = payload
        self.buf = frame_new(OP_TEXT, <const uint8_t *><char *>data, <size_t>len(data))
        if self.buf == NULL:
            raise MemoryError

    def __init__(self, payload):
        pass

    def __dealloc__(self):
        if self.buf != NULL:
            frame_drop(self.buf)

    def __len__(self):
        return self.buf.size

    def __bytes__(self):
        return (<char *>self.buf.data)[:self.buf.size]

# -- inbound ----------------------------------------------------------------------------------

cdef struct Head:
    uint8_t opcode
    uint8_t fin
    uint8_t size                # of the header
    uint8_t mask[4]
    uint64_t payload


cdef int read_head(const uint8_t *p, size_t n, Head *h) noexcept nogil:
    """Read and check a frame header (section 5.2) of which `n` bytes are there.

    > 0: its size. 0: incomplete, and legal so far. < 0: minus the close code.
    """
    cdef size_t need
    cdef uint8_t length
    cdef int i
    if n < 1:
        return 0
    if p[0] & RSV:
        return -CLOSE_PROTOCOL      # no extension was negotiated
    h.opcode = p[0] & 0x0F
    h.fin = (p[0] & FIN) != 0
    if not (h.opcode <= OP_BINARY or OP_CLOSE <= h.opcode <= OP_PONG):
        return -CLOSE_PROTOCOL
    if n < 2:
        return 0
    if not p[1] & MASKED:
        return -CLOSE_PROTOCOL      # section 5.1: a client masks
    length = p[1] & 0x7F
    if h.opcode >= OP_CLOSE and (length > CONTROL_MAX or not h.fin):
        return -CLOSE_PROTOCOL      # section 5.5
    need = 2 if length < 126 else (4 if length == 126 else 10)
    if n < need:
        return 0
    if length < 126:
        h.payload = length
    elif length == 126:
        h.payload = <uint64_t>p[2] << 8 | p[3]
        if h.payload < 126:
            return -CLOSE_PROTOCOL  # "the minimal number of bytes MUST be used"
    else:
        h.payload = 0
        for i in range(8):
            h.payload = h.payload << 8 | p[2 + i]
        if h.payload <= 0xFFFF or h.payload >> 63:
            return -CLOSE_PROTOCOL
    h.size = <uint8_t>(need + 4)
    if n >= need + 4:
        memcpy(h.mask, p + need, 4)
        return h.size
    return -1                       # all but the mask: the length is known and can be judged


cdef int judge(const Rx *r, const Head *h, uint32_t max_message, bint allow_binary) noexcept nogil:
    """Check a header against the sequence of frames and the limits. 0 or minus the close code."""
    cdef uint8_t begun = r.opcode if r != NULL else 0
    if h.opcode >= OP_CLOSE:
        return 0
    if (h.opcode == OP_CONT) != (begun != 0):
        return -CLOSE_PROTOCOL      # section 5.4
    if h.opcode == OP_BINARY and not allow_binary:
        return -CLOSE_UNSUPPORTED
    if h.payload > <uint64_t>(max_message - (r.size if begun else 0)):
        return -CLOSE_TOO_BIG       # by the declared size, before any of it is kept
    return 0


cdef int append(Rx *r, const uint8_t *data, size_t n) noexcept nogil:
    """Unmask `n` payload bytes onto the message and check them. 0 or minus the close code."""
    cdef size_t capacity = r.capacity
    cdef uint8_t turned[4]
    cdef uint8_t *msg
    cdef int i
    if n == 0:
        return 0
    if r.size + n > capacity:
        if capacity == 0:
            capacity = MSG_FIRST
        while capacity < r.size + n:
            capacity *= 2
        msg = <uint8_t *>realloc(r.msg, capacity)
        if msg == NULL:
            return -CLOSE_INTERNAL
        r.msg = msg
        r.capacity = <uint32_t>capacity
    cc_unmask(r.msg + r.size, data, n, r.mask)
    if n & 3:
        for i in range(4):
            turned[i] = r.mask[(n + i) & 3]
        memcpy(r.mask, turned, 4)
    if r.opcode == OP_TEXT:
        r.utf8 = cc_utf8(r.utf8, r.msg + r.size, n)
        if r.utf8 == CC_UTF8_BAD:
            return -CLOSE_NOT_UTF8
    r.size += <uint32_t>n
    return 0


cdef inline void fail(Event *ev, int minus_code) noexcept nogil:
    ev.kind = EV_FAIL
    ev.code = <uint16_t>-minus_code


cdef void control(Event *ev, uint8_t opcode, uint8_t *data, size_t n) noexcept nogil:
    """A whole control frame, unmasked."""
    cdef uint16_t code
    ev.data = data
    ev.size = n
    if opcode == OP_PING:
        ev.kind = EV_PING
    elif opcode == OP_PONG:
        ev.kind = EV_PONG
    elif n == 0:
        ev.kind = EV_CLOSE
        ev.code = CLOSE_NO_STATUS
    elif n == 1:
        fail(ev, -CLOSE_PROTOCOL)
    else:
        # Section 7.4: 1004-1006 and 1015 never go over the wire; 1012-1014 are registered.
        code = <uint16_t>(data[0] << 8 | data[1])
        if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
            fail(ev, -CLOSE_PROTOCOL)
        elif cc_utf8(0, data + 2, n - 2) != 0:
            fail(ev, -CLOSE_NOT_UTF8)
        else:
            ev.kind = EV_CLOSE
            ev.code = code


cdef void end_of_frame(Rx *r, Event *ev) noexcept nogil:
    """All payload of a data frame has been appended."""
    if not r.fin:
        ev.kind = EV_FRAGMENT
        return
    if r.opcode == OP_TEXT and r.utf8 != 0:
        fail(ev, -CLOSE_NOT_UTF8)
        return
    ev.kind = EV_TEXT if r.opcode == OP_TEXT else EV_BINARY
    ev.data = r.msg
    ev.size = r.size
    r.opcode = 0                    # rx_done gives the buffer back


cdef Rx *rx_get(Rx **rx) noexcept nogil:
    if rx[0] == NULL:
        rx[0] = <Rx *>calloc(1, sizeof(Rx))
    return rx[0]


cdef size_t rx_parse(Rx **rx, uint8_t *data, size_t size, uint32_t max_message, bint allow_binary,
                     Event *ev) noexcept nogil:
    """Use up input until something is complete or none is left; returns how much was used.

    `ev.data` points into `data` or into the Rx: it is dead after the next rx_parse, rx_done or
    rx_free. After EV_FAIL the stream is of no more use. The caller calls rx_done after each event
    when it no longer needs `ev.data`.
    """
    cdef Rx *r = rx[0]
    cdef size_t at = 0, n = 0
    cdef Head h
    cdef const uint8_t *head
    cdef int got, bad
    ev.kind = EV_NONE
    ev.data = NULL
    ev.size = 0
    ev.code = 0
    h.payload = 0

    while at < size:
        # 1. the rest of a data frame
        if r != NULL and r.remain:
            n = size - at
            if n > r.remain:
                n = r.remain
            bad = append(r, data + at, n)
            at += n
            r.remain -= <uint32_t>n
            if bad:
                fail(ev, bad)
                return at
            if r.remain == 0:
                end_of_frame(r, ev)
                return at
            return at

        # 2. a header: where it lies, or collected byte by byte
        if r != NULL and r.head_size:
            r.head[r.head_size] = data[at]
            r.head_size += 1
            at += 1
            head = r.head
            got = read_head(head, r.head_size, &h)
            if got > 0 and h.opcode >= OP_CLOSE and r.head_size < got + h.payload:
                # A control frame is collected whole.
                n = got + h.payload - r.head_size
                if n > size - at:
                    n = size - at
                memcpy(r.head + r.head_size, data + at, n)
                r.head_size += <uint8_t>n
                at += n
                if r.head_size < got + h.payload:
                    return at
        else:
            head = data + at
            got = read_head(head, size - at, &h)
            if got > 0:
                at += got
            else:
                n = size - at
        if got < -1:
            fail(ev, got)
            return at
        if got != 0:
            bad = judge(r, &h, max_message, allow_binary)
            if bad:
                fail(ev, bad)
                return at
        if got <= 0:
            if r != NULL and r.head_size:
                continue
            r = rx_get(rx)
            if r == NULL:
                fail(ev, -CLOSE_INTERNAL)
                return at
            memcpy(r.head, data + at, n)
            r.head_size = <uint8_t>n
            return size

        # 3. a control frame
        if h.opcode >= OP_CLOSE:
            if r != NULL and r.head_size:
                CC_CHECK(r.head_size == got + h.payload)
                cc_unmask_in_place(r.head + got, h.payload, h.mask)
                r.head_size = 0
                control(ev, h.opcode, r.head + got, h.payload)
                return at
            if size - at >= h.payload:
                cc_unmask_in_place(data + at, h.payload, h.mask)
                control(ev, h.opcode, data + at, h.payload)
                return at + h.payload
            r = rx_get(rx)
            if r == NULL:
                fail(ev, -CLOSE_INTERNAL)
                return at
            n = got + (size - at)
            memcpy(r.head, head, n)
            r.head_size = <uint8_t>n
            return size

        # 4. a whole message in one piece: hand it out where it lies
        if h.opcode != OP_CONT and h.fin and size - at >= h.payload:
            if r != NULL:
                r.head_size = 0
            cc_unmask_in_place(data + at, h.payload, h.mask)
            ev.data = data + at
            ev.size = h.payload
            if h.opcode == OP_TEXT:
                ev.kind = EV_TEXT
                if cc_utf8(0, ev.data, ev.size) != 0:
                    fail(ev, -CLOSE_NOT_UTF8)
            else:
                ev.kind = EV_BINARY
            return at + h.payload

        # 5. anything else is put together in the Rx
        r = rx_get(rx)
        if r == NULL:
            fail(ev, -CLOSE_INTERNAL)
            return at
        r.head_size = 0
        memcpy(r.mask, h.mask, 4)
        r.remain = <uint32_t>h.payload
        r.fin = h.fin
        if h.opcode != OP_CONT:
            r.opcode = h.opcode
            r.size = 0
            r.utf8 = 0
        if r.remain == 0:
            end_of_frame(r, ev)
            return at
    return at


cdef void rx_done(Rx **rx) noexcept nogil:
    """After the handling of an event: free the Rx if no frame or message is incomplete."""
    cdef Rx *r = rx[0]
    if r == NULL or r.opcode or r.head_size or r.remain:
        return
    rx_free(rx)


cdef void rx_free(Rx **rx) noexcept nogil:
    if rx[0] != NULL:
        free(rx[0].msg)
        free(rx[0])
        rx[0] = NULL


cdef class Parser:
    """The parser alone, for tests: bytes in, a list of (kind, data or code) out.

    Owns its Rx. Input is copied first, since the parser unmasks in place.
    """

    def __cinit__(self, max_message=65536, allow_binary=False):
        self.rx = NULL
        self.max_message = max_message
        self.allow_binary = allow_binary
        self.failed = False

    def __init__(self, max_message=65536, allow_binary=False):
        pass

    def __dealloc__(self):
        rx_free(&self.rx)

    @property
    def idle(self):
        """Nothing is kept."""
        return self.rx == NULL

    def feed(self, bytes data not None):
        cdef size_t n = len(data), at = 0
        cdef uint8_t *buf
        cdef Event ev
        out = []
        if self.failed or n == 0:
            return out
        buf = <uint8_t *>malloc(n)
        if buf == NULL:
            raise MemoryError
        memcpy(buf, <char *>data, n)
        try:
            while at < n:
                at += rx_parse(&self.rx, buf + at, n - at, self.max_message, self.allow_binary, &ev)
                if ev.kind == EV_NONE:
                    break
                body = (<char *>ev.data)[:ev.size] if ev.data != NULL else b""
                rx_done(&self.rx)
                if ev.kind == EV_TEXT:
                    out.append(("text", body))
                elif ev.kind == EV_BINARY:
                    out.append(("binary", body))
                elif ev.kind == EV_PING:
                    out.append(("ping", body))
                elif ev.kind == EV_PONG:
                    out.append(("pong", body))
                elif ev.kind == EV_CLOSE:
                    out.append(("close", ev.code, body[2:]))
                elif ev.kind == EV_FAIL:
                    self.failed = True
                    out.append(("fail", ev.code))
                    break
        finally:
            free(buf)
        return out
