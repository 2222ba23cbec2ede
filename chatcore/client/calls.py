"""Requests and their replies: numbering them, matching them, repeating them.

Every request of the protocol may be repeated without harm (those that make
something carry a ``cid``), so a request whose connection is lost before its
reply is asked again on the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from .errors import BadRequest, ConnectionLost

_ID_MAX: Final = 2**31 - 1

#: Called once with the ``ok`` reply, or with the exception that ended it.
Done = Callable[[dict[str, Any] | Exception], None]


class Call:
    """One request. ``repeat`` says to ask again after a lost connection.

    :raises BadRequest: the fields cannot be said in JSON.
    """

    __slots__ = ("_fields", "done", "id", "repeat", "t")

    def __init__(self, t: str, fields: Mapping[str, Any], done: Done, *, repeat: bool = True) -> None:
        self.t = t
        # Here and not when it goes out: then whoever asks is told of it.
        self._fields = encode(t, fields)
        self.done = done
        self.repeat = repeat
        self.id = 0

    def frame(self) -> bytes:
        """The message, with the id that it has now."""
        more = b"" if self._fields == b"{}" else b"," + self._fields[1:-1]
        return b'{"t":"%b","id":%d%b}' % (self.t.encode(), self.id, more)


def encode(t: str, fields: Mapping[str, Any]) -> bytes:
    """The fields of a request as JSON. Raises BadRequest."""
    try:
        return msgspec.json.encode(fields)
    except (TypeError, ValueError, OverflowError) as exc:  # half a surrogate pair, for one
        raise BadRequest(f"{t}: {exc}") from None


class Calls:
    """The requests waiting for a connection and those waiting for their reply."""

    def __init__(self) -> None:
        self._waiting: dict[Call, None] = {}
        self._asked: dict[int, Call] = {}
        self._last_id = 0

    @property
    def outstanding(self) -> int:
        """How many requests wait, for a connection or a reply."""
        return len(self._waiting) + len(self._asked)

    @property
    def unanswered(self) -> int:
        """How many requests went out on this connection and have no reply yet."""
        return len(self._asked)

    def add(self, call: Call) -> None:
        """Ask as soon as there is a connection."""
        self._waiting[call] = None

    def cancel(self, call: Call) -> None:
        """Nobody waits for the reply any more."""
        self._waiting.pop(call, None)
        if self._asked.get(call.id) is call:
            # Its number stays taken until the reply, and nobody is told.
            self._asked[call.id] = ignored = Call(call.t, {}, _ignore, repeat=False)
            ignored.id = call.id

    def take(self) -> list[Call]:
        """What is to be asked now, in the order it came."""
        out = list(self._waiting)
        self._waiting.clear()
        return out

    def ask(self, call: Call) -> bytes:
        """The frame for a request that goes out now."""
        self._last_id = self._last_id % _ID_MAX + 1
        while self._last_id in self._asked:
            self._last_id = self._last_id % _ID_MAX + 1
        call.id = self._last_id
        self._asked[call.id] = call
        return call.frame()

    def unask(self, call: Call) -> None:
        """The frame that :meth:`ask` made does not go out."""
        self._asked.pop(call.id, None)

    def answered(self, id: object) -> Call | None:
        """The request that a reply belongs to, or None if it is not known."""
        return self._asked.pop(id, None) if isinstance(id, int) else None

    def disconnected(self, *, repeat: bool) -> list[tuple[Call, ConnectionLost]]:
        """The socket is gone: asked requests wait again, or are returned to be failed."""
        failed: list[tuple[Call, ConnectionLost]] = []
        again: dict[Call, None] = {}
        for call in self._asked.values():
            if repeat and call.repeat:
                again[call] = None
            else:
                failed.append((call, ConnectionLost(f"the connection was lost during {call.t}")))
        self._asked.clear()
        self._waiting = again | self._waiting
        return failed

    def drain(self) -> list[Call]:
        """All requests, to be failed: nothing will be asked again."""
        out = [*self._asked.values(), *self._waiting]
        self._asked.clear()
        self._waiting.clear()
        return out


def _ignore(_: object) -> None:
    pass
