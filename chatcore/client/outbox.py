"""Requests until they are answered, and messages until they are acknowledged: what may go out now, and what again when.

**Requests** (:class:`Calls`). Every request of the protocol may be repeated without
harm (those that make something carry a ``cid``), so a request whose connection is
lost before its reply is asked again on the next one.

**Messages** (:class:`MessageOutbox`). A message stays, with its one ``cid``, until
``ok`` or a final error. Per conversation messages go out in the order in which they
were given: by default one at a time, because only then can a refusal in the middle
not let a later message overtake. A refused message goes out again no sooner than its
own ``retry_after_ms``. While messages that were over the server's rate wait for their
times, no new ones go out: the tokens that grow meanwhile are promised to those that wait.
If one is refused again at its time (other requests took the token, or the server charges for
refusals), all wait until the last of these times, and then go out one at a time; each
acknowledged one lets one more be in flight.
"""

from __future__ import annotations

import base64
import heapq
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Final

import msgspec

from .errors import BadRequest, ConnectionLost

#: Requests, messages included, that are unanswered at the same time, if the server's ``hello`` does not say
#: how many it takes.
UNANSWERED_DEFAULT: Final = 16
#: Of the number that the server takes, left free for what does not wait its turn: pings, a new ``auth``, and
#: ``typing``, whose end the client does not see.
UNANSWERED_SPARE: Final = 4
#: Random bits of a ``cid``; the protocol asks for at least 96.
CID_BITS: Final = 128

_ID_MAX: Final = 2**31 - 1
#: No bound: the window of all requests is smaller.
_IN_FLIGHT_MAX: Final = 1000

#: Called once with the ``ok`` reply, or with the exception that ended the request.
Done = Callable[[dict[str, Any] | Exception], None]


def encode(t: str, fields: Mapping[str, Any]) -> bytes:
    """The fields of a request as JSON. Raises BadRequest."""
    try:
        return msgspec.json.encode(fields)
    except (TypeError, ValueError, OverflowError) as exc:  # half a surrogate pair, for one
        raise BadRequest(f"{t}: {exc}") from None


class Call:
    """One request. ``repeat``: ask again after a lost connection.

    :raises BadRequest: the fields cannot be written as JSON.
    """

    __slots__ = ("_fields", "done", "id", "repeat", "t")

    def __init__(self, t: str, fields: Mapping[str, Any], done: Done, *, repeat: bool = True) -> None:
        self.t = t
        # Encoded here and not when it goes out, so that the caller gets the exception.
        self._fields = encode(t, fields)
        self.done = done
        self.repeat = repeat
        self.id = 0

    def frame(self) -> bytes:
        """The message, with the id that it has now."""
        more = b"" if self._fields == b"{}" else b"," + self._fields[1:-1]
        return b'{"t":"%b","id":%d%b}' % (self.t.encode(), self.id, more)


class Calls:
    """The requests that wait to go out and those that wait for their reply."""

    def __init__(self) -> None:
        self._waiting: dict[Call, None] = {}
        self._unanswered: dict[int, Call] = {}
        self._last_id = 0

    @property
    def outstanding(self) -> int:
        """How many requests wait, to go out or for a reply."""
        return len(self._waiting) + len(self._unanswered)

    @property
    def unanswered(self) -> int:
        """How many requests went out on this connection and have no reply yet."""
        return len(self._unanswered)

    def add(self, call: Call) -> None:
        """Put a request in line to go out."""
        self._waiting[call] = None

    def cancel(self, call: Call) -> None:
        """Drop a request: its caller does not wait for the reply any more."""
        self._waiting.pop(call, None)
        if self._unanswered.get(call.id) is call:
            # Its id stays taken until the reply, which is ignored.
            self._unanswered[call.id] = ignored = Call(call.t, {}, _ignore, repeat=False)
            ignored.id = call.id

    def take(self, free: int) -> list[Call]:
        """The requests to send now, at most ``free``, in the order in which they came."""
        out = list(islice(self._waiting, max(0, free)))
        for call in out:
            del self._waiting[call]
        return out

    def issue(self, call: Call) -> bytes:
        """Give a request its id; return the frame to send."""
        self._last_id = self._last_id % _ID_MAX + 1
        while self._last_id in self._unanswered:
            self._last_id = self._last_id % _ID_MAX + 1
        call.id = self._last_id
        self._unanswered[call.id] = call
        return call.frame()

    def withdraw(self, call: Call) -> None:
        """Undo :meth:`issue`: the frame does not go out."""
        self._unanswered.pop(call.id, None)

    def answered(self, id: object) -> Call | None:
        """The request that a reply belongs to, or None if it is not known."""
        return self._unanswered.pop(id, None) if isinstance(id, int) else None

    def disconnected(self, *, repeat: bool) -> list[tuple[Call, ConnectionLost]]:
        """The socket is gone: unanswered requests go out again, or are returned, to be failed."""
        failed: list[tuple[Call, ConnectionLost]] = []
        again: dict[Call, None] = {}
        for call in self._unanswered.values():
            if repeat and call.repeat:
                again[call] = None
            else:
                failed.append((call, ConnectionLost(f"the connection was lost during {call.t}")))
        self._unanswered.clear()
        self._waiting = again | self._waiting
        return failed

    def drain(self) -> list[Call]:
        """Remove and return all requests, to be failed: none will go out again."""
        out = [*self._unanswered.values(), *self._waiting]
        self._unanswered.clear()
        self._waiting.clear()
        return out


def _ignore(_: object) -> None:
    pass


def new_cid() -> str:
    """A fresh client id: 128 random bits in 22 characters."""
    return base64.urlsafe_b64encode(secrets.token_bytes(CID_BITS // 8)).rstrip(b"=").decode()


class Draft(msgspec.Struct, frozen=True):
    """The content of a ``send``; kept until it is acknowledged, over restarts too."""

    conv: str
    cid: str
    body: str
    reply_to: int | None = None
    files: list[str] | None = None
    data: str | None = None

    def fields(self) -> dict[str, Any]:
        """The fields of the request."""
        out: dict[str, Any] = {"c": self.conv, "cid": self.cid, "body": self.body}
        if self.reply_to is not None:
            out["re"] = self.reply_to
        if self.files is not None:
            out["files"] = self.files
        if self.data is not None:
            out["data"] = self.data
        return out


class Pending:
    """One unacknowledged message. It goes out once it is ``stored``, and no sooner than ``not_before``.

    ``promised``: it was over the rate, and the server said when it can succeed. ``suspect``: it may be the message
    over which the server closed a connection.
    """

    __slots__ = ("done", "draft", "in_flight", "not_before", "promised", "stored", "suspect")

    def __init__(self, draft: Draft, done: Done | None, stored: bool) -> None:
        self.draft = draft
        self.done = done
        self.stored = stored
        self.not_before = 0.0
        self.in_flight = False
        self.promised = False
        self.suspect = False


class MessageOutbox:
    """All unacknowledged messages of one user.

    :param window: messages unanswered at the same time per conversation.
    """

    def __init__(self, window: int = 1) -> None:
        self._window = window
        self._lines: dict[str, deque[Pending]] = {}  # by conversation, in order
        # Conversations that may have a message to send now, in the order of their turns.
        self._turns: dict[str, None] = {}
        # Refused messages by their time: (not_before, tie-breaker, message). An entry whose message has left, or
        # waits for another time by now, is skipped when its time comes.
        self._retries: list[tuple[float, int, Pending]] = []
        self._retry_count = 0
        # The last time that was promised to a message over the rate: new ones wait for it.
        self._new_not_before = 0.0
        # After a promise that did not hold, all messages wait, and only so many may be in flight.
        self._not_before = 0.0
        self._in_flight_max = _IN_FLIGHT_MAX
        self._in_flight = 0
        self._suspects = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Pending]:
        for line in self._lines.values():
            yield from line

    def add(self, pending: Pending) -> None:
        """Put a message at the end of its conversation's line."""
        conv = pending.draft.conv
        self._lines.setdefault(conv, deque()).append(pending)
        self._turns[conv] = None
        self._count += 1

    def stored(self, pending: Pending) -> None:
        """The message is in the saved state and may go out."""
        pending.stored = True
        if pending.draft.conv in self._lines:
            self._turns[pending.draft.conv] = None

    def take(self, now: float, free: int) -> list[Pending]:
        """The messages to send now, at most ``free``; they count as in flight from here on."""
        limit = min(free, (1 if self._suspects else self._in_flight_max) - self._in_flight)
        out: list[Pending] = []
        if now < self._not_before:
            return out
        while self._retries and self._retries[0][0] <= now and len(out) < limit:
            pending = heapq.heappop(self._retries)[2]
            # If a message before it in the line still waits, it follows in the turn of its conversation.
            if self._next(pending.draft.conv, now) is pending:
                self._launch(pending, out)
        if now < self._new_not_before:
            return out
        while self._turns and len(out) < limit:
            conv = next(iter(self._turns))
            del self._turns[conv]
            if (following := self._next(conv, now)) is not None:
                self._launch(following, out)
        return out

    def finish(self, pending: Pending) -> None:
        """Forget a message: it was acknowledged, or refused for good."""
        conv = pending.draft.conv
        line = self._lines.get(conv)
        if line is None or pending not in line:
            return
        self._land(pending)
        if pending.suspect:
            self._suspects -= 1
        line.remove(pending)
        self._count -= 1
        self._in_flight_max = min(self._in_flight_max + 1, _IN_FLIGHT_MAX)
        if line:
            self._turns[conv] = None
        else:
            del self._lines[conv]
            self._turns.pop(conv, None)

    def retry(self, pending: Pending, at: float, *, over_rate: bool) -> None:
        """A message was refused for now: it, and all after it in its conversation, wait until ``at``.

        ``over_rate``: the server promised it a token at that time, so new messages to any conversation wait, too.
        """
        self._land(pending)
        if pending.draft.conv not in self._lines:
            return
        pending.not_before = at
        self._retry_count += 1
        heapq.heappush(self._retries, (at, self._retry_count, pending))
        if over_rate:
            self._new_not_before = max(self._new_not_before, at)
            if pending.promised:
                self._not_before = self._new_not_before
                self._in_flight_max = 1
            pending.promised = True

    def disconnected(self, *, bad_message: bool, others: int) -> Pending | None:
        """The socket is gone: all that was in flight will be sent again.

        ``bad_message``: the server closed because of some message, which must not be repeated; ``others``: how many
        requests besides messages were unanswered. If only one message can be meant it is returned, to be refused;
        otherwise the suspects go out one at a time from now on, so that the next such close names the one.
        """
        # The next connection has a full bucket.
        self._new_not_before = self._not_before = 0.0
        self._in_flight_max = _IN_FLIGHT_MAX
        flying = [pending for pending in self if pending.in_flight]
        for pending in flying:
            self._land(pending)
        first: dict[str, None] = {pending.draft.conv: None for pending in flying}
        self._turns = first | self._turns
        if not bad_message:
            return None
        if len(flying) == 1 and not others:
            return flying[0]
        for pending in flying:
            if not pending.suspect:
                pending.suspect = True
                self._suspects += 1
        return None

    def next_at(self, now: float) -> float | None:
        """When a message that waits for its time may go out; None if no message waits for a time."""
        times = [max(self._retries[0][0], self._not_before)] if self._retries else []
        if self._turns:
            times.append(self._new_not_before)
        return min((at for at in times if at > now), default=None)

    def _next(self, conv: str, now: float) -> Pending | None:
        """The message of this conversation that may go out now: nothing overtakes one that has to wait."""
        for pending in islice(self._lines.get(conv, ()), self._window):
            if not pending.in_flight:
                return pending if pending.stored and pending.not_before <= now else None
        return None

    def _launch(self, pending: Pending, out: list[Pending]) -> None:
        pending.in_flight = True
        self._in_flight += 1
        out.append(pending)
        # Its conversation may have another one, behind those of all others, so that none starves.
        if self._window > 1:
            self._turns[pending.draft.conv] = None

    def _land(self, pending: Pending) -> None:
        if pending.in_flight:
            pending.in_flight = False
            self._in_flight -= 1
