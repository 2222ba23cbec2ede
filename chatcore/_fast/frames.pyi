"""WebSocket framing (RFC 6455), without any I/O: incremental parser, builder, shared frames."""

class Frame:
    """An outbound WebSocket text frame, built once and shared by reference (C refcount) by all
    outboxes. Immutable."""

    def __init__(self, payload: bytes) -> None: ...
    def __len__(self) -> int: ...  # bytes on the wire
    def __bytes__(self) -> bytes: ...  # a copy of them, for tests and measurements

class Parser:
    """The parser alone, for tests.

    Events: ``("text" | "binary" | "ping" | "pong", payload)``, ``("close", code, reason)`` (1005:
    no code was given) and, at most once and last, ``("fail", code to be sent)``.
    """

    def __init__(self, max_message: int = 65536, allow_binary: bool = False) -> None: ...
    def feed(self, data: bytes) -> list[tuple[str, bytes] | tuple[str, int] | tuple[str, int, bytes]]: ...
    @property
    def idle(self) -> bool: ...  # nothing is kept: no frame and no message is incomplete
