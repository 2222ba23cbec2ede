"""Sorted runs of an index: keyed hashes, records in the order of their keys, Bloom filters. Knows no files.

Records are read and written as structs in the memory of ``bytes``, so all of this is for little-endian machines
(setup.py names those that there are).
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport INT64_MAX, INT64_MIN, int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort, realloc
from libc.string cimport memcpy

cdef enum:
    SECRET_BYTES = 16
    BLOCK_BYTES = 64        # one cache line: a look-up touches one
    BITS_PER_KEY = 14
    PROBES = 7              # bits that a key sets in its block: with blocks fewer than the 10 that are best without
    FIRST_CAPACITY = 1024   # entries of a portion; doubles

# -- SipHash-2-4 (Aumasson and Bernstein, "SipHash: a fast short-input PRF") --------------------------

cdef extern from * nogil:
    """
    #include <stdint.h>
    #include <string.h>
    #if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "records are little-endian"
    #endif

    typedef struct { uint64_t v0, v1, v2, v3; } cc_sip;

    static inline uint64_t cc_rotl(uint64_t x, int b) { return x << b | x >> (64 - b); }

    static inline void cc_sip_round(cc_sip *s) {
        s->v0 += s->v1; s->v2 += s->v3;
        s->v1 = cc_rotl(s->v1, 13) ^ s->v0; s->v3 = cc_rotl(s->v3, 16) ^ s->v2;
        s->v0 = cc_rotl(s->v0, 32);
        s->v2 += s->v1; s->v0 += s->v3;
        s->v1 = cc_rotl(s->v1, 17) ^ s->v2; s->v3 = cc_rotl(s->v3, 21) ^ s->v0;
        s->v2 = cc_rotl(s->v2, 32);
    }

    static inline void cc_sip_word(cc_sip *s, uint64_t m) {
        s->v3 ^= m;
        cc_sip_round(s);
        cc_sip_round(s);
        s->v0 ^= m;
    }

    /* Of `words` numbers, then `n` bytes. */
    static uint64_t cc_siphash(const uint8_t *key, const uint64_t *first, size_t words, const uint8_t *p, size_t n) {
        uint64_t k0, k1, m, last = (uint64_t)(8 * words + n) << 56;
        cc_sip s;
        size_t i;
        memcpy(&k0, key, 8);
        memcpy(&k1, key + 8, 8);
        s.v0 = k0 ^ 0x736f6d6570736575ull;
        s.v1 = k1 ^ 0x646f72616e646f6dull;
        s.v2 = k0 ^ 0x6c7967656e657261ull;
        s.v3 = k1 ^ 0x7465646279746573ull;
        for (i = 0; i < words; i++) cc_sip_word(&s, first[i]);
        for (; n >= 8; p += 8, n -= 8) {
            memcpy(&m, p, 8);
            cc_sip_word(&s, m);
        }
        for (i = 0; i < n; i++) last |= (uint64_t)p[i] << (8 * i);
        cc_sip_word(&s, last);
        s.v2 ^= 0xff;
        for (i = 0; i < 4; i++) cc_sip_round(&s);
        return s.v0 ^ s.v1 ^ s.v2 ^ s.v3;
    }

    /* The bits of a key within its block: PROBES numbers of 9 bits. The block comes from the high bits of the key
       itself, so these are mixed once more (the finalizer of MurmurHash3). */
    static inline uint64_t cc_mix(uint64_t x) {
        x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
        x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ull;
        return x ^ x >> 33;
    }

    /* In which of `blocks` a key is. Monotone in the signed key: sorted keys fill the blocks from first to last. */
    static inline size_t cc_block(int64_t key, size_t blocks) {
        uint64_t high = ((uint64_t)key ^ 1ull << 63) >> 32;
        return (size_t)(high * blocks >> 32);
    }
    """
    uint64_t cc_siphash(const uint8_t *key, const uint64_t *first, size_t words, const uint8_t *p, size_t n)
    uint64_t cc_mix(uint64_t x)
    size_t cc_block(int64_t key, size_t blocks)


cdef const uint8_t *secret_of(bytes secret16) except NULL:
    if PyBytes_GET_SIZE(secret16) != SECRET_BYTES:
        raise ValueError(f"the secret has {len(secret16)} bytes and needs {SECRET_BYTES}")
    return <const uint8_t *>PyBytes_AS_STRING(secret16)


cdef inline int hash_cid(const uint8_t *secret, int64_t conv, int64_t sender, object cid, int64_t *key) except -1:
    cdef uint64_t numbers[2]
    cdef Py_ssize_t n
    cdef const char *text = PyUnicode_AsUTF8AndSize(cid, &n)    # the string keeps it
    numbers[0] = <uint64_t>conv
    numbers[1] = <uint64_t>sender
    key[0] = <int64_t>cc_siphash(secret, numbers, 2, <const uint8_t *>text, <size_t>n)
    return 0


def siphash(bytes secret16 not None, bytes data not None):
    return cc_siphash(secret_of(secret16), NULL, 0, <const uint8_t *>PyBytes_AS_STRING(data),
                      <size_t>PyBytes_GET_SIZE(data))


def key_of(bytes secret16 not None, int64_t conv, int64_t sender, str cid not None):
    cdef int64_t key
    hash_cid(secret_of(secret16), conv, sender, cid, &key)
    return key

# -- records --------------------------------------------------------------------------------------

cdef int by_key(const void *a, const void *b) noexcept nogil:
    cdef const Record *x = <const Record *>a
    cdef const Record *y = <const Record *>b
    if x.key != y.key:
        return 1 if x.key > y.key else -1
    return (x.id > y.id) - (x.id < y.id)


cdef int by_place(const void *a, const void *b) noexcept nogil:
    cdef const Place *x = <const Place *>a
    cdef const Place *y = <const Place *>b
    if x.conv != y.conv:
        return 1 if x.conv > y.conv else -1
    if x.seq != y.seq:
        return 1 if x.seq > y.seq else -1
    return (x.id > y.id) - (x.id < y.id)


cdef inline const Record *records_of(bytes records, size_t *n) except? NULL:
    """The memory of the bytes, which must live on; Python's own data of bytes is aligned to 8 on 64-bit machines."""
    cdef Py_ssize_t size = PyBytes_GET_SIZE(records)
    if size % sizeof(Record):
        raise ValueError(f"{size} bytes are not records of {sizeof(Record)}")
    n[0] = <size_t>size // sizeof(Record)
    return <const Record *>PyBytes_AS_STRING(records)


def sort_records(bytes records not None, int64_t low=INT64_MIN, int64_t high=INT64_MAX):
    cdef size_t n, i, kept = 0
    cdef const Record *r = records_of(records, &n)
    cdef Record *out = <Record *>malloc(n * sizeof(Record) or 1)
    cdef int64_t key
    if out == NULL:
        raise MemoryError
    try:
        with nogil:
            for i in range(n):
                key = r[i].key
                if low <= key and key <= high:
                    out[kept] = r[i]
                    kept += 1
            qsort(out, kept, sizeof(Record), by_key)
        return PyBytes_FromStringAndSize(<char *>out, <Py_ssize_t>(kept * sizeof(Record)))
    finally:
        free(out)


def find_ids(bytes records not None, int64_t key):
    cdef size_t n, low = 0, high, middle
    cdef const Record *r = records_of(records, &n)
    cdef list found = []
    high = n
    while low < high:
        middle = (low + high) // 2
        if r[middle].key < key:
            low = middle + 1
        else:
            high = middle
    while low < n and r[low].key == key:
        found.append(r[low].id)
        low += 1
    return found


cdef class Filter:
    """Which keys a run may have: a Bloom filter in blocks of one cache line.

    Owns `bits`, which is `blocks` times BLOCK_BYTES long and stays where it is.
    """

    def __cinit__(self, size_t keys):
        self.blocks = (keys * BITS_PER_KEY + BLOCK_BYTES * 8 - 1) // (BLOCK_BYTES * 8) or 1
        self.bits = <uint8_t *>calloc(self.blocks, BLOCK_BYTES)
        if self.bits == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.bits)

    def add_records(self, bytes records not None):
        cdef size_t n, i
        cdef const Record *r = records_of(records, &n)
        cdef uint8_t *block
        cdef uint64_t probes
        cdef int probe
        with nogil:
            for i in range(n):
                block = self.bits + cc_block(r[i].key, self.blocks) * BLOCK_BYTES
                probes = cc_mix(<uint64_t>r[i].key)
                for probe in range(PROBES):
                    block[(probes & 511) >> 3] |= 1 << (probes & 7)
                    probes >>= 9

    def __contains__(self, int64_t key):
        return self.has(key)

    cdef bint has(self, int64_t key):
        cdef const uint8_t *block = self.bits + cc_block(key, self.blocks) * BLOCK_BYTES
        cdef uint64_t probes = cc_mix(<uint64_t>key)
        cdef int probe
        for probe in range(PROBES):
            if not block[(probes & 511) >> 3] >> (probes & 7) & 1:
                return False
            probes >>= 9
        return True

    @property
    def size(self):
        return self.blocks * BLOCK_BYTES

    def put(self, size_t at, bytes bits not None):
        cdef size_t size = <size_t>PyBytes_GET_SIZE(bits)
        if at > self.blocks * BLOCK_BYTES or size > self.blocks * BLOCK_BYTES - at:
            raise ValueError(f"{size} bytes at {at} are not within the filter")
        memcpy(self.bits + at, PyBytes_AS_STRING(bits), size)

    def dump(self):
        return PyBytes_FromStringAndSize(<char *>self.bits, <Py_ssize_t>(self.blocks * BLOCK_BYTES))


cdef class Portion:
    """Entries of the log in any order, which leave it in the two orders of a run.

    Owns both arrays, which move when it grows: no pointer into them outlives a call. `places` sorts its array at
    the first step of the iteration.
    """

    def __cinit__(self, bytes secret16 not None):
        memcpy(self.secret, secret_of(secret16), SECRET_BYTES)

    def __init__(self, secret16):
        pass

    def __dealloc__(self):
        free(self.where)
        free(self.keys)

    def __len__(self):
        return self.count

    cdef int grow(self) except -1:
        cdef size_t capacity = self.capacity * 2 or FIRST_CAPACITY
        cdef Place *where = <Place *>realloc(self.where, capacity * sizeof(Place))
        cdef Record *keys
        if where == NULL:
            raise MemoryError
        self.where = where
        keys = <Record *>realloc(self.keys, capacity * sizeof(Record))
        if keys == NULL:
            raise MemoryError
        self.keys = keys
        self.capacity = capacity
        return 0

    def add(self, rows not None):
        cdef int64_t id, conv, seq, sender, key
        for id, conv, seq, sender, cid in rows:
            hash_cid(self.secret, conv, sender, cid, &key)
            if self.count == self.capacity:
                self.grow()
            self.where[self.count] = Place(conv, seq, id)
            self.keys[self.count] = Record(key, id)
            self.count += 1

    def places(self, size_t most):
        cdef size_t at = 0, n, i
        cdef int64_t conv, first
        cdef Place *p
        cdef Place *before
        cdef bytes ids
        with nogil:
            qsort(self.where, self.count, sizeof(Place), by_place)
        while at < self.count:
            conv = self.where[at].conv
            first = self.where[at].seq
            n = 1
            while n < most and at + n < self.count and self.where[at + n].conv == conv:
                n += 1
            ids = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(n * sizeof(int64_t)))
            for i in range(n):
                p = self.where + at + i
                if at + i:
                    before = p - 1
                    if before.conv == conv and (p.seq != before.seq + 1 or p.id <= before.id):
                        raise ValueError(
                            f"conversation {conv} has seq {p.seq} (id {p.id}) after {before.seq} (id {before.id})")
                (<int64_t *>PyBytes_AS_STRING(ids))[i] = p.id
            yield conv, first, ids
            at += n

    def records(self):
        with nogil:
            qsort(self.keys, self.count, sizeof(Record), by_key)
        return PyBytes_FromStringAndSize(<char *>self.keys, <Py_ssize_t>(self.count * sizeof(Record)))


def any_has(list filters not None, int64_t key):
    cdef Filter one
    for one in filters:
        if one.has(key):
            return True
    return False
