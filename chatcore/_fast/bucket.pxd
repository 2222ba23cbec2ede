"""A token bucket in one number per connection (the "generic cell rate" form), and times to come back.

Instead of tokens and the time they were counted, keep the moment at which the bucket would be
full again. A token taken moves that moment by the time one token takes to grow back; how far it
lies ahead says how many tokens are missing. Nothing has to be refilled, nothing drifts.

A message that is refused takes no token. It is promised a time at which a token is there for it:
`promised` is the moment at which the bucket would be full again if every refused message came back
at its time, so each refusal in a row gets the next free token, one `token_ns` after the one before.
The first message to come takes a token: if that is another one, the last of those that wait
finds none and is promised the next free time. Refusals take nothing from the rate, so a peer that
obeys gets all of it; a peer that does not obey runs out of promises (BUCKET_FLOOD).
"""

from libc.stdint cimport int64_t

cdef struct Rate:
    int64_t token_ns    # the time one token takes to grow back; 0: no limit
    int64_t burst_ns    # the same for the whole bucket
    int64_t busy_ns     # distance of two promises while tokens are there
    int64_t refused     # promised tokens that were not taken, at most

cdef enum:
    BUCKET_FLOOD = -1
    # Messages that are refused though there is a token (too many are unanswered) come back at this
    # multiple of the rate, until they have used up what is left of the burst. Requests are normally
    # answered within a few milliseconds.
    BUSY_FACTOR = 4
    BUSY_MIN_NS = 1000000

cdef inline Rate bucket_rate(double per_s, int burst, int64_t refused) noexcept nogil:
    cdef Rate r
    r.token_ns = <int64_t>(1e9 / per_s) if per_s > 0 else 0
    r.burst_ns = r.token_ns * burst
    r.busy_ns = r.token_ns // BUSY_FACTOR
    if r.busy_ns < BUSY_MIN_NS:
        r.busy_ns = BUSY_MIN_NS
    r.refused = refused
    return r

cdef inline bint bucket_take(int64_t *full_at, const Rate *r, int64_t now) noexcept nogil:
    """Take one token. False: there is none, and nothing changed."""
    cdef int64_t at = full_at[0]
    if at < now:
        at = now
    at += r.token_ns
    if at - now > r.burst_ns:
        return False
    full_at[0] = at
    return True

cdef inline int64_t bucket_refuse(const int64_t *full_at, int64_t *promised, const Rate *r, int64_t now,
                                  int64_t distance_ns) noexcept nogil:
    """Promise a token to a message for which none was taken: nanoseconds until then, more than 0.

    `distance_ns`: promises lie at least so far apart (0: a token apart, which is what there is when
    the bucket is empty). BUCKET_FLOOD: there are too many promises already, and this is none.
    """
    cdef int64_t unpromised = full_at[0] if full_at[0] > now else now
    cdef int64_t at = promised[0] if promised[0] > unpromised else unpromised
    cdef int64_t token = r.token_ns if r.token_ns else r.busy_ns
    cdef int64_t ahead = (at - unpromised + token - 1) // token
    cdef int64_t wait, spread
    if ahead >= r.refused:
        return BUCKET_FLOOD
    at += token
    promised[0] = at
    wait = at - now - r.burst_ns
    spread = (ahead + 1) * distance_ns
    if wait < spread:
        wait = spread
    return wait if wait > 0 else 1

cdef inline int64_t bucket_return(int64_t *full_at, int64_t *promised, const Rate *r, int64_t now) noexcept nogil:
    """Give back the token of a message that is refused all the same, and promise it another: as
    bucket_refuse."""
    full_at[0] -= r.token_ns
    return bucket_refuse(full_at, promised, r, now, r.busy_ns)

cdef inline int64_t bucket_ms(int64_t wait_ns) noexcept nogil:
    """A wait for the peer in whole milliseconds; one more, for timers that fire up to one early."""
    return (wait_ns + 999999) // 1000000 + 1

cdef class Bucket:
    cdef Rate rate
    cdef int64_t full_at
    cdef int64_t promised
