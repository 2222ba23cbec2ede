"""What the index of the log is made of: see runs.pyx."""

from libc.stdint cimport int64_t, uint8_t

cdef struct Record:     # as in a file: little-endian, without padding
    int64_t key
    int64_t id

cdef struct Place:      # of an entry in its conversation
    int64_t conv
    int64_t seq
    int64_t id

cdef class Filter:
    cdef uint8_t *bits
    cdef size_t blocks
    cdef bint has(self, int64_t key)

cdef class Portion:
    cdef uint8_t secret[16]
    cdef Place *where
    cdef Record *keys
    cdef size_t count
    cdef size_t capacity
    cdef int grow(self) except -1
