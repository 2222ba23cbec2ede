"""A token bucket in one number per connection (the "generic cell rate" form).

Instead of tokens and the time they were counted, keep the moment at which the bucket would be
full again. A token taken moves that moment by the time one token takes to grow back; how far it
lies ahead says how many tokens are missing. Nothing has to be refilled, nothing drifts.
"""

from libc.stdint cimport int64_t

cdef struct Rate:
    int64_t token_ns    # the time one token takes to grow back; 0: no limit
    int64_t burst_ns    # the same for the whole bucket

cdef enum:
    BUCKET_FLOOD = -1   # a whole burst in debt

cdef inline Rate bucket_rate(double per_s, int burst) noexcept nogil:
    cdef Rate r
    r.token_ns = <int64_t>(1e9 / per_s) if per_s > 0 else 0
    r.burst_ns = r.token_ns * burst
    return r

cdef inline int64_t bucket_take(int64_t *full_at, const Rate *r, int64_t now) noexcept nogil:
    """Take one token, even from an empty bucket (a peer that goes on falls deeper into debt).

    0: it was there. > 0: it was not; nanoseconds until a next one will be.
    BUCKET_FLOOD: the debt is larger than a burst.
    """
    cdef int64_t at = full_at[0]
    cdef int64_t missing
    if at < now:
        at = now
    at += r.token_ns
    full_at[0] = at
    missing = at - now
    if missing <= r.burst_ns:
        return 0
    if missing > 2 * r.burst_ns:
        return BUCKET_FLOOD
    return missing - r.burst_ns + r.token_ns
