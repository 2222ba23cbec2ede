"""What may be asked of the writer: each kind of write is a named request, a struct that says how it is applied.

Requests go from the workers (and from `chatcore user` and `chatcore queue`) to the writer as MessagePack over a Unix
socket, in frames of 4 bytes of length (little-endian) and a list of requests. Answers come back in the order of the
requests of a connection, as lists of :class:`Reply` in frames of the same form.

Other parts that keep tables in the store's file add requests of their own (:mod:`chatcore.queue.sqlite_ops`); the
writer is given all of them when it is made.
"""

from __future__ import annotations

import struct
from typing import Any, ClassVar, Final

import msgspec

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
