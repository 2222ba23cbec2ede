"""A token bucket, and times at which refused messages can come back."""

class Bucket:
    """The bucket alone, for tests: ``per_s`` tokens per second, at most ``burst``, at most ``refused`` promises.

    Times are nanoseconds on any clock that begins at 0 or later.
    """

    def __init__(self, per_s: float, burst: int, refused: int) -> None: ...
    def take(self, now: int) -> bool:
        """Take a token; False: there is none."""
    def refuse(self, now: int) -> int:
        """Promise a token to a message that found none: the ns until then; -1: too many are promised (flood)."""
    def give_back(self, now: int) -> int:
        """Give the token of a message back and promise it another; as ``refuse``."""
