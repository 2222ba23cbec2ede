"""Messages not yet acknowledged: which may be sent now, in what order, and again when.

A message stays here, with its one ``cid``, until ``ok`` or a final error. Per
conversation they go out in the order they were given: by default one at a time,
because only then can a refusal in the middle not let the next one overtake.
"""

from __future__ import annotations

import base64
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

#: Messages unanswered at the same time, over all conversations.
IN_FLIGHT_MAX: Final = 16
#: Random bits of a ``cid``; the protocol asks for at least 96.
CID_BITS: Final = 128


def new_cid() -> str:
    """A fresh client id: 128 random bits in 22 characters."""
    return base64.urlsafe_b64encode(secrets.token_bytes(CID_BITS // 8)).rstrip(b"=").decode()


class Draft(msgspec.Struct, frozen=True):
    """What a ``send`` says; kept until it is acknowledged, over restarts too."""

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


#: Called once with the ``ok`` reply, or with the exception that ended it.
Done = Callable[[dict[str, Any] | Exception], None]


class Pending:
    """One unacknowledged message. ``stored`` must be true before it may go out."""

    __slots__ = ("done", "draft", "in_flight", "stored", "suspect")

    def __init__(self, draft: Draft, done: Done | None, stored: bool) -> None:
        self.draft = draft
        self.done = done
        self.stored = stored
        self.in_flight = False
        self.suspect = False


class _Line:
    """The queue of one conversation."""

    __slots__ = ("not_before", "queue")

    def __init__(self) -> None:
        self.queue: deque[Pending] = deque()
        self.not_before = 0.0


class Outbox:
    """All unacknowledged messages of one user. ``window``: unanswered per conversation."""

    def __init__(self, window: int = 1) -> None:
        self._window = window
        self._lines: dict[str, _Line] = {}
        self._in_flight = 0
        self._not_before = 0.0
        self._suspects = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Pending]:
        for line in self._lines.values():
            yield from line.queue

    def add(self, pending: Pending) -> None:
        """Put a message at the end of its conversation's line."""
        self._lines.setdefault(pending.draft.conv, _Line()).queue.append(pending)
        self._count += 1

    def take(self, now: float) -> list[Pending]:
        """What is to be sent now; it counts as in flight from here on."""
        if now < self._not_before:
            return []
        out: list[Pending] = []
        limit = 1 if self._suspects else IN_FLIGHT_MAX
        for conv, line in list(self._lines.items()):
            if self._in_flight >= limit:
                break
            if now < line.not_before:
                continue
            # To the end of the round, so that busy conversations do not starve the others.
            self._lines[conv] = self._lines.pop(conv)
            for pending in list(line.queue)[: self._window]:
                if self._in_flight >= limit or not pending.stored:
                    break
                if not pending.in_flight:
                    pending.in_flight = True
                    self._in_flight += 1
                    out.append(pending)
        return out

    def finish(self, pending: Pending) -> None:
        """Acknowledged or refused for good: forget it."""
        line = self._lines.get(pending.draft.conv)
        if line is None or pending not in line.queue:
            return
        self._land(pending)
        if pending.suspect:
            self._suspects -= 1
        line.queue.remove(pending)
        self._count -= 1
        if not line.queue:
            del self._lines[pending.draft.conv]

    def retry(self, pending: Pending, at: float, *, everything: bool) -> None:
        """Refused for now: its line, or ``everything``, waits until ``at``."""
        self._land(pending)
        if everything:
            self._not_before = max(self._not_before, at)
        elif line := self._lines.get(pending.draft.conv):
            line.not_before = max(line.not_before, at)

    def disconnected(self, *, bad_message: bool, others: int) -> Pending | None:
        """The socket is gone: all that was in flight will be sent again.

        ``bad_message`` says that the server closed because of some message,
        which must not be repeated; ``others`` is how many requests besides ours
        were unanswered. If only one message can be meant it is returned, to be
        refused; otherwise the suspects go out one at a time from now on, so
        that the next such close names the one.
        """
        flying = [pending for pending in self if pending.in_flight]
        for pending in flying:
            self._land(pending)
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
        """When something that waits now may be tried again; None if nothing waits for time."""
        times = [line.not_before for line in self._lines.values() if line.not_before > now]
        if self._count and self._not_before > now:
            times.append(self._not_before)
        return min(times, default=None)

    def _land(self, pending: Pending) -> None:
        if pending.in_flight:
            pending.in_flight = False
            self._in_flight -= 1
