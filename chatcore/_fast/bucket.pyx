"""The token bucket: see bucket.pxd. The functions are compiled into the reactor; here they are for tests."""

cdef class Bucket:
    """The bucket alone, for tests. Times are nanoseconds on any clock that begins at 0 or later."""

    def __init__(self, double per_s, int burst, int refused):
        self.rate = bucket_rate(per_s, burst, refused)
        self.full_at = 0
        self.promised = 0

    def take(self, int64_t now):
        return bucket_take(&self.full_at, &self.rate, now)

    def refuse(self, int64_t now):
        return bucket_refuse(&self.full_at, &self.promised, &self.rate, now, 0)

    def give_back(self, int64_t now):
        return bucket_return(&self.full_at, &self.promised, &self.rate, now)
