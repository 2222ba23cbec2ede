"""The tree of errors: one class per error code of the protocol.

A request that raises a :class:`ChatError` is answered with its ``code``. Any other exception is a bug, and the answer
is ``internal``.
"""

from __future__ import annotations

from typing import ClassVar, Final


class ChatError(Exception):
    """A request was refused.

    ``message`` is for people. ``retry_after_ms`` is set exactly when the same request can succeed later: the client
    repeats it after that time.
    """

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_ms = retry_after_ms


class BadRequest(ChatError):
    """The request is malformed, or of an unknown type."""

    code = "bad_request"
    http_status = 400


class Unauthenticated(ChatError):
    """There is no valid session token."""

    code = "unauthenticated"
    http_status = 401


class Forbidden(ChatError):
    """The user may not do this."""

    code = "forbidden"
    http_status = 403


class NotFound(ChatError):
    """The object does not exist, or this user may not know that it does."""

    code = "not_found"
    http_status = 404


class Conflict(ChatError):
    """A ``cid`` was used again for different content, or a name is taken."""

    code = "conflict"
    http_status = 409


class TooLarge(ChatError):
    """A size is over its limit."""

    code = "too_large"
    http_status = 413


class RateLimited(ChatError):
    """The client sends too many requests; ``retry_after_ms`` says when it may repeat this one."""

    code = "rate_limited"
    http_status = 429


class Unavailable(ChatError):
    """A part of the server is down, or the outcome is unknown: the client repeats the request with the same ``cid``."""

    code = "unavailable"
    http_status = 503

    def __init__(self, message: str, *, retry_after_ms: int = 1000) -> None:
        super().__init__(message, retry_after_ms=retry_after_ms)


class Internal(ChatError):
    """A bug in the server."""

    code = "internal"
    http_status = 500


ALL: tuple[type[ChatError], ...] = (
    BadRequest,
    Unauthenticated,
    Forbidden,
    NotFound,
    Conflict,
    TooLarge,
    RateLimited,
    Unavailable,
    Internal,
)

_BY_CODE: Final = {cls.code: cls for cls in ALL}


def error_of(code: str, message: str) -> ChatError:
    """The error with a code, as it comes from another process; an unknown code is a bug there."""
    return _BY_CODE.get(code, Internal)(message)
