"""Fan-out: one frame by reference to every member of a topic, without touching Python."""

cimport cython
from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free

from chatcore._fast.conns cimport (
    OPEN, Conn, Core, Hub, Members, conn_get, conn_send, members_drop, members_hold, members_flush,
    topic_add, topic_has, topic_remove,
)
from chatcore._fast.frames cimport Frame, FrameBuf
from chatcore._fast.sys cimport CC_CHECK


# (The collector must not clear `core` before __dealloc__, which needs it; a cycle through `key` is
# broken at its other objects.)
@cython.no_gc_clear
cdef class Topic:
    """A set of connections to fan out to.

    Owns the arrays of its Members; each member connection points back to them, so they are
    emptied before the object goes. A connection that ends leaves by itself, so a member is always
    OPEN. Neither side keeps the other alive. The address of `members` identifies the topic in the
    connection structs: it never changes, being part of the object.
    """

    def __cinit__(self, Core reactor not None, key):
        self.core = reactor
        self.key = key
        self.members.topic = <PyObject *>self

    def __init__(self, reactor, key):
        pass

    def __dealloc__(self):
        # Also after the shutdown of the reactor, which empties the topic. (No core: the constructor
        # refused its arguments.)
        if self.core is not None:
            members_drop(&self.core.hub, &self.members)
        while self.members.count:
            topic_remove(&self.members, self.members.count - 1)
        free(self.members.conns)
        free(self.members.slots)

    def __len__(self):
        return self.members.count

    def __contains__(self, uint64_t conn):
        cdef Conn *c = conn_get(&self.core.hub, conn)
        cdef uint32_t at
        return c != NULL and topic_has(&self.members, c, &at)

    def add(self, uint64_t conn):
        cdef Conn *c = conn_get(&self.core.hub, conn)
        cdef uint32_t at
        if c == NULL or c.state != OPEN or topic_has(&self.members, c, &at):
            return False
        members_flush(&self.core.hub, &self.members)    # the new member gets later frames only
        if c.state != OPEN:
            return False
        if not topic_add(&self.members, c):
            raise MemoryError
        return True

    def discard(self, uint64_t conn):
        cdef Conn *c = conn_get(&self.core.hub, conn)
        cdef uint32_t at
        if c == NULL or not topic_has(&self.members, c, &at):
            return False
        members_flush(&self.core.hub, &self.members)    # the member gets the frames until now
        # Which may have closed it as too slow, or have moved it.
        if topic_has(&self.members, c, &at):
            topic_remove(&self.members, at)
        return True

    def fan_out(self, Frame frame not None, int64_t skip_owner=0):
        cdef Hub *h = &self.core.hub
        cdef FrameBuf *f = frame.buf
        cdef uint32_t i = self.members.count, queued = 0
        cdef Conn *c
        if not skip_owner:
            if i and not members_hold(h, &self.members, f):
                raise MemoryError
            self.core.schedule()
            return i
        members_flush(h, &self.members)
        i = self.members.count
        # From the last to the first: a member that turns out too slow is removed on the way, and
        # the one that takes its place has been served.
        while i:
            i -= 1
            c = self.members.conns[i]
            CC_CHECK(c.state == OPEN)
            if c.owner == skip_owner:
                continue
            f.refs += 1
            if conn_send(h, c, f):
                queued += 1
        self.core.schedule()
        return queued

    def sessions(self):
        cdef list found = []
        cdef uint32_t i = 0
        # Appending may run the garbage collector and with it any code: read the count each time.
        while i < self.members.count:
            found.append(<object>self.members.conns[i].session)
            i += 1
        return found
