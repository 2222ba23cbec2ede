"""The one tree of errors, mapped one to one to the protocol's error codes.

A request that raises a :class:`ChatError` is answered with its ``code``;
anything else that escapes is a bug and is answered with ``internal``.
"""

from __future__ import annotations

from typing import ClassVar


class ChatError(Exception):
    """A request was refused.

    ``message`` is for people; ``retry_after_ms`` is set exactly when repeating
    the same request later can succeed (protocol: "repeat after it").
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
    """It does not exist, or this user may not know that it does."""

    code = "not_found"
    http_status = 404


class Conflict(ChatError):
    """A ``cid`` was used again for something else, or a name is taken."""

    code = "conflict"
    http_status = 409


class TooLarge(ChatError):
    """A size is over its limit."""

    code = "too_large"
    http_status = 413


class RateLimited(ChatError):
    """Too many requests; ``retry_after_ms`` says when to come back."""

    code = "rate_limited"
    http_status = 429


class Unavailable(ChatError):
    """A part is down, or the outcome is unknown: repeat with the same ``cid``."""

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
