"""What may be asked of the writer: each kind of write is a named request, a struct that says how it is applied.

Requests go from the workers (and from `chatcore user` and `chatcore queue`) to the writer as MessagePack over a Unix
socket, in frames of 4 bytes of length (little-endian) and a list of requests. Answers come back in the order of the
requests of a connection, as lists of :class:`Reply` in frames of the same form.

Other parts that keep tables in the store's file add requests of their own (:mod:`chatcore.queue.sqlite_ops`); the
writer is given all of them when it is made.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import msgspec

from ...errors import error_of
from .transaction import Committed, Transaction

#: Length of a frame's body.
FRAME_HEAD: Final = struct.Struct("<I")
#: Set in the length of a frame of answers: its one reply fails everything that is not answered yet.
LAST: Final = 1 << 31
#: Longest body of a frame. A request is bounded by the limits on what it holds, which are far smaller.
FRAME_MAX_BYTES: Final = 64 * 1024 * 1024


class Request(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=True):
    """A named write. Subclasses add fields, and say how the write is done in :meth:`apply`.

    All fields have types that msgspec encodes as MessagePack. The tag on the wire is the name of the class.
    """

    #: The type of what ``apply`` returns (anything that msgspec can convert).
    result: ClassVar[Any] = None
    #: It appends to what the index covers later: refused while that lags too much.
    grows: ClassVar[bool] = False
    #: It may be applied twice when its outcome is unknown. Otherwise the caller is told ``unavailable`` then.
    repeatable: ClassVar[bool] = True

    def apply(self, tx: Transaction) -> Any:
        """Do it, inside the writer's transaction; returns the result.

        Check first, then write: a :class:`~chatcore.errors.ChatError` may only be raised before the first change, for
        there is no savepoint to go back to.

        :raises ChatError: refused, and nothing was changed.
        """
        raise NotImplementedError


class Reply(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """The outcome of one request: an error, or the result; of an append of a message the first five fields alone.

    ``announce``: the worker has to announce the entry, as it is new or may never have been announced.
    """

    seq: int = 0
    ts: int = 0
    msgs: int = 0
    dup: bool = False
    announce: bool = False
    #: Code and message of a ChatError.
    error: tuple[str, str] | None = None
    #: MessagePack of what ``apply`` returned.
    value: bytes | None = None
    entries: list[Committed] | None = None


_encode: Final = msgspec.msgpack.Encoder().encode


def frame(items: Sequence[Request] | Sequence[Reply], *, last: bool = False) -> bytes:
    """A frame with these requests or answers, to be sent as it is."""
    body = _encode(items)
    return FRAME_HEAD.pack(len(body) | (LAST if last else 0)) + body


def take_frames(received: bytearray, most_bytes: int = LAST - 1) -> list[tuple[bytes, bool]]:
    """Take the whole frames off the front of what was received: the body of each, and whether it is the last.

    :raises ValueError: a frame says that it is longer than ``most_bytes``.
    """
    found: list[tuple[bytes, bool]] = []
    at = 0
    while len(received) - at >= FRAME_HEAD.size:
        (head,) = FRAME_HEAD.unpack_from(received, at)
        start, length = at + FRAME_HEAD.size, head & ~LAST
        if length > most_bytes:
            raise ValueError(f"a frame of {length} bytes")
        if len(received) - start < length:
            break
        at = start + length
        found.append((bytes(received[start:at]), bool(head & LAST)))
    del received[:at]
    return found


def result_of(request: Request, reply: Reply) -> Any:
    """What the request returned; for an error, that error (which is not raised)."""
    if reply.error is not None:
        return error_of(*reply.error)
    if reply.value is None or request.result is None:
        return None
    return msgspec.msgpack.decode(reply.value, type=request.result)
