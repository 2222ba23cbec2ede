"""The errors of a client, and how error replies and close codes become exceptions.

A refused request raises the class of :mod:`chatcore.errors` with its code. An error
of the connection as a whole is a :class:`ClientError`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

from ..errors import (
    ALL,
    BadRequest,
    ChatError,
    Conflict,
    Forbidden,
    Internal,
    NotFound,
    RateLimited,
    TooLarge,
    Unauthenticated,
    Unavailable,
)

__all__ = [
    "BadRequest",
    "ChatError",
    "ClientClosed",
    "ClientError",
    "Conflict",
    "ConnectionLost",
    "Forbidden",
    "Internal",
    "MalformedRequest",
    "NotFound",
    "OutboxFull",
    "RateLimited",
    "Rejected",
    "StateMismatch",
    "TokenRejected",
    "TooLarge",
    "TooManyConnections",
    "Unauthenticated",
    "Unavailable",
    "VersionRejected",
    "error_from",
    "rejection_from",
]


class ClientError(Exception):
    """The base of the errors that the client itself detects."""


class ClientClosed(ClientError):
    """The client was closed before there was a reply."""


class ConnectionLost(ClientError):
    """The connection was lost, and this request is not repeated."""


class OutboxFull(ClientError):
    """Too many messages wait for their acknowledgement."""


class StateMismatch(ClientError):
    """The saved state belongs to another user, or cannot be read."""


class Rejected(ClientError):
    """The server closed with a 41xx code: coming back unchanged makes no sense."""

    close_code: ClassVar[int] = 0

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason or type(self).__doc__} ({code})")
        self.code = code
        self.reason = reason


class TokenRejected(Rejected):
    """The token is wrong, expired or revoked: log in again."""

    close_code = 4101


class VersionRejected(Rejected):
    """The server does not speak this version of the protocol."""

    close_code = 4102


class MalformedRequest(Rejected):
    """The server could not read what this client sent."""

    close_code = 4103


class TooManyConnections(Rejected):
    """The user opened more connections than allowed; this was the oldest."""

    close_code = 4104


_BY_CODE: Final = {cls.code: cls for cls in ALL}
_REJECTIONS: Final = {
    cls.close_code: cls for cls in (TokenRejected, VersionRejected, MalformedRequest, TooManyConnections)
}


class UnknownError(ChatError):
    """A code that this version does not know; :attr:`code` holds it."""


def error_from(reply: dict[str, Any]) -> ChatError:
    """The exception for an ``error`` reply, or for the JSON body of an HTTP error."""
    code = str(reply.get("code", "internal"))
    message = str(reply.get("message", code))
    retry = reply.get("retry_after_ms")
    cls = _BY_CODE.get(code)
    error = cls(message) if cls is not None else UnknownError(message)
    if cls is None:
        error.code = code  # type: ignore[misc]  # the only class whose code is per instance
    # Set here and not by the constructor: Unavailable would make one up.
    error.retry_after_ms = int(retry) if isinstance(retry, int | float) else None
    return error


def rejection_from(code: int, reason: str) -> Rejected | None:
    """The exception for a close code, or None if the client may come back."""
    if not 4100 <= code <= 4199:
        return None
    return _REJECTIONS.get(code, Rejected)(code, reason)
