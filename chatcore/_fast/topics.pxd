"""Fan-out: see topics.pyx."""

from chatcore._fast.conns cimport Core, Members

cdef class Topic:
    cdef Members members
    cdef Core core
    cdef public object key
