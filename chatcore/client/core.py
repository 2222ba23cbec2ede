"""The client without its I/O: what to send, which events to give the application, when to come back.

The owner does the I/O. It calls the inputs (``connected``, ``received``, ``lost``,
``tick``, ...) with the time in seconds of one clock that never jumps back, and
after each of them looks at the outputs: :meth:`ClientCore.take_frames`,
:meth:`ClientCore.take_events`, :attr:`ClientCore.connect_at`, :attr:`ClientCore.drop`,
:attr:`ClientCore.failure` and :meth:`ClientCore.wake_at`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import msgspec

from .errors import ChatError, ConnectionLost, RateLimited, StateMismatch, TooLarge, error_from, rejection_from
from .events import Disconnected, Event, Refused, User
from .liveness import AUTH_TIMEOUT_S, IDLE_S, PING_TIMEOUT_S, Liveness, ReconnectDelay
from .outbox import (
    UNANSWERED_DEFAULT,
    UNANSWERED_SPARE,
    Call,
    Calls,
    Done,
    Draft,
    MessageOutbox,
    Pending,
    encode,
)
from .replica import Progress, Replica
from .state import Snapshot

log: Final = logging.getLogger("chatcore.client")

VERSION: Final = 1
#: A refusal that asks for less is repeated after this, so that a server that says 0 is not asked in a tight loop.
RETRY_MIN_S: Final = 0.01
#: Entries asked for in one page when a hole is filled.
PAGE: Final = 100
#: Closes that some message of this client caused: it is not repeated.
BAD_MESSAGE_CODES: Final = frozenset({1002, 1003, 1007, 1009})

#: What the server allows until its ``hello`` says otherwise (docs/protocol.md, "Limits and rates").
_LIMITS: Final = {
    "frame": 65536,
    "have": 1000,
    "history": PAGE,
    "outstanding": UNANSWERED_DEFAULT + UNANSWERED_SPARE,
}
#: What one conversation takes in ``have`` besides its id, with the largest seq.
_HAVE_OVERHEAD_BYTES: Final = 20


class ClientCore:
    """One user's session over any number of connections; not more than one at a time.

    :param snapshot: the saved state of an earlier run.
    :param only: attach just these conversations; None: all.
    :param ping_ms: how often the server is to ping; its own choice if None.
    :param window: messages unanswered at the same time per conversation.
    """

    def __init__(
        self,
        token: str,
        snapshot: Snapshot | None = None,
        *,
        only: list[str] | None = None,
        ping_ms: int | None = None,
        window: int = 1,
        rng: random.Random | None = None,
    ) -> None:
        saved = snapshot or Snapshot()
        self._rng = rng or random.Random()
        self._token = token
        self._user_id = saved.user
        self._only = only
        self._ping_ms = ping_ms
        self._reconnect = ReconnectDelay(self._rng)
        self._calls = Calls()
        self._outbox = MessageOutbox(window)
        self.replica = Replica(dict(saved.have), dict(saved.convs), saved.sync)
        for draft in saved.sends:
            self._outbox.add(Pending(draft, None, stored=True))
        self._watched: list[str] | None = None
        self._frames: list[bytes] = []
        self._limits = dict(_LIMITS)
        self._now = 0.0
        self._gen = 0
        self._open = False
        self._authenticated = False
        self._liveness = Liveness()
        self._auth_at: float | None = None
        #: ``ready`` came on this connection: every conversation is known.
        self.ready = False
        #: When to connect; None while there is a connection or one is being made.
        self.connect_at: float | None = 0.0
        #: The socket is to be aborted, then ``lost`` to be called.
        self.drop = False
        #: Why the session ended for good; nothing will happen any more.
        self.failure: Exception | None = None

    # Inputs: the connection.

    def connecting(self) -> int:
        """A connection is being made; its number goes with every input that concerns it."""
        self._gen += 1
        self.connect_at = None
        self.drop = False
        return self._gen

    def connected(self, gen: int, now: float) -> None:
        """The WebSocket is open. ``auth`` goes out at once, without waiting for ``hello``."""
        if gen != self._gen or self.failure:
            return
        self._now = now
        self._open, self._authenticated = True, False
        self._liveness.opened(now)
        self._frames.clear()
        self._auth_at = now
        self._flush()

    def received(self, gen: int, data: bytes | str, now: float) -> None:
        """A message came. Those of an older connection are ignored."""
        if gen != self._gen or not self._open or self.drop:
            return
        self._now = now
        try:
            obj = msgspec.json.decode(data)
        except msgspec.DecodeError:
            obj = None
        if not isinstance(obj, dict):
            log.warning("the server sent a message that is no JSON object; dropping the connection")
            self.drop = True
            return
        t = obj.get("t")
        self._liveness.heard(now, news=t not in ("ok", "error", "hello"))
        match t:
            case "ok":
                if call := self._calls.answered(obj.get("id")):
                    call.done(obj)
            case "error":
                if call := self._calls.answered(obj.get("id")):
                    call.done(error_from(obj))
                else:
                    log.warning(
                        "the server sent an error without a request: %s %s", obj.get("code"), obj.get("message")
                    )
            case "hello":
                self._hello(obj)
            case "ready":
                self.ready = True
                self.replica.push(obj)
                self._reconnect.ready(now)
                self._liveness.synced(now)
            case _:
                self.replica.push(obj)
        self._flush()

    def lost(self, gen: int, code: int, reason: str, now: float) -> None:
        """The connection ended, or could not be made (code 1006)."""
        if gen != self._gen or self.failure:
            return
        self._now = now
        self._open = self._authenticated = self.ready = self.drop = False
        self._auth_at = None
        self._frames.clear()
        rejection = rejection_from(code, reason)
        bad = code in BAD_MESSAGE_CODES
        flying = sum(1 for pending in self._outbox if pending.in_flight)
        culprit = self._outbox.disconnected(bad_message=bad, others=self._calls.unanswered - flying)
        self.replica.disconnected()
        for call, error in self._calls.disconnected(repeat=not bad):
            call.done(error)
        if rejection is not None:
            self.fail(rejection)
            return
        if culprit is not None:
            self._finish(culprit, TooLarge(f"the server closed the connection over this message: {reason} ({code})"))
        attempt = self._reconnect.attempt + 1
        wait = self._reconnect.lost(now, reason)
        self.connect_at = now + wait
        self.replica.emit_at_most_once(Disconnected(code=code, reason=reason, retry_in_s=wait, attempt=attempt))

    def tick(self, now: float) -> None:
        """Time has passed, at least until :meth:`wake_at`."""
        self._now = max(self._now, now)
        if not self._open or self.drop or self.failure:
            return
        if self._liveness.dead(now):
            log.info("no sign of life from the server; dropping the connection")
            self.drop = True
            return
        if self._authenticated and self._liveness.due(now):
            self._send_ping()
        self._flush()

    def nudge(self, now: float) -> None:
        """The machine woke up or changed networks: come back at once, or ask whether the server is there."""
        self._now = max(self._now, now)
        if self.connect_at is not None:
            self.connect_at = now
        elif self._authenticated and not self._liveness.waiting:
            self._send_ping()
            self._flush()

    def reading(self, yes: bool, now: float) -> None:
        """Whether the socket is being read: silence means nothing while it is not."""
        self._liveness.reading(yes, now)

    def set_accepting(self, accepting: bool, now: float) -> None:
        """Whether the application can take more events; otherwise entries are left to be paged."""
        self._now = max(self._now, now)
        if accepting != self.replica.accepting:
            self.replica.set_accepting(accepting)
            self._flush()

    # Inputs: the application.

    def send(self, draft: Draft, done: Done, *, stored: bool) -> Pending:
        """Send a message; ``done`` is called once, with the reply or an exception.

        Until ``stored`` (:meth:`stored`) it does not go out.

        :raises BadRequest: it cannot be written as JSON.
        """
        encode("send", draft.fields())
        pending = Pending(draft, done, stored)
        if self.failure:
            done(self.failure)
            return pending
        self._outbox.add(pending)
        self._flush()
        return pending

    def stored(self, pending: Pending) -> None:
        """The message is in the saved state and may go out."""
        self._outbox.stored(pending)
        self._flush()

    def discard(self, pending: Pending) -> None:
        """Forget a message that did not go out."""
        self._outbox.finish(pending)

    def call(self, t: str, fields: Mapping[str, Any], done: Done, *, repeat: bool = True) -> Call:
        """Send a request; ``done`` is called once, with the reply or an exception.

        :raises BadRequest: it cannot be written as JSON.
        """
        call = Call(t, fields, done, repeat=repeat)
        if self.failure:
            done(self.failure)
            return call
        self._calls.add(call)
        self._flush()
        return call

    def cancel(self, call: Call) -> None:
        """Drop a request: its caller does not wait for the reply any more."""
        self._calls.cancel(call)

    def send_once(self, t: str, fields: Mapping[str, Any]) -> None:
        """Send a request without a reply, which is not worth repeating; it is dropped when offline."""
        if self._authenticated:
            self._frames.append(msgspec.json.encode({"t": t, **fields}))

    def watch(self, users: list[str]) -> None:
        """Remember whose presence to ask for again on later connections."""
        self._watched = users

    def attach(self, only: list[str] | None) -> None:
        """Remember the choice of conversations for later connections."""
        self._only = only

    def renew(self, token: str, now: float) -> None:
        """Use a new token of the same user from now on."""
        self._now = max(self._now, now)
        self._token = token
        if self._authenticated:
            self._auth_at = now
            self._flush()

    def fail(self, error: Exception) -> None:
        """End the session for good: everything that waits ends with ``error``."""
        if self.failure is None:
            self.failure = error
            self.connect_at = None
            self.drop = self._open
            self._open = self._authenticated = False
            for call in self._calls.drain():
                call.done(error)
            for pending in self._outbox:
                if pending.done is not None:
                    done, pending.done = pending.done, None
                    done(error)

    # Outputs.

    @property
    def online(self) -> bool:
        """Whether the client is connected and authenticated."""
        return self._authenticated

    @property
    def waiting(self) -> bool:
        """Whether a reply of the server is awaited."""
        return self._calls.outstanding > 0 or len(self._outbox) > 0 or not self._authenticated

    @property
    def user_id(self) -> str:
        """The own user id; empty until the first ``auth`` was answered."""
        return self._user_id

    @property
    def has_frames(self) -> bool:
        """Whether :meth:`take_frames` would return any."""
        return bool(self._frames)

    @property
    def unacknowledged_count(self) -> int:
        """How many messages are not acknowledged yet."""
        return len(self._outbox)

    @property
    def unacknowledged(self) -> list[Draft]:
        """The messages not acknowledged yet, in order per conversation."""
        return [pending.draft for pending in self._outbox]

    def take_frames(self) -> list[bytes]:
        """Messages to write to the current socket, in order."""
        out, self._frames = self._frames, []
        return out

    def take_events(self) -> list[tuple[Event | None, Progress]]:
        """The events for the application, in order; one of None only has progress to record."""
        return self.replica.take()

    def wake_at(self) -> float | None:
        """When to call :meth:`tick` next; None if only other inputs matter."""
        if not self._open or self.failure:
            return None
        times: list[float | None] = [self._auth_at, self._liveness.wake_at(may_ping=self._authenticated)]
        if self._authenticated:
            times += [self._outbox.next_at(self._now), self.replica.catchup.next_at(self._now)]
        return min((at for at in times if at is not None), default=None)

    # Internals.

    def _hello(self, obj: dict[str, Any]) -> None:
        limits = obj.get("limits")
        if isinstance(limits, dict):
            self._limits |= {k: v for k, v in limits.items() if k in _LIMITS and isinstance(v, int) and v > 0}

    def _send_ping(self) -> None:
        self._liveness.asked(self._now, PING_TIMEOUT_S)
        self._frames.append(self._calls.issue(Call("ping", {}, self._pong, repeat=False)))

    def _pong(self, reply: dict[str, Any] | Exception) -> None:
        self._liveness.answered()
        self._liveness.synced(self._now)
        if isinstance(reply, dict) and self.ready:
            self.replica.synced(reply.get("sync"))

    def _auth(self) -> None:
        first = not self._authenticated
        self._auth_at = None
        if first:
            self._liveness.asked(self._now, AUTH_TIMEOUT_S)
        fields: dict[str, Any] = {"v": VERSION, "token": self._token}
        if first:
            fields |= self._resume_fields()
            if self._only is not None:
                fields["only"] = self._only
            if self._ping_ms is not None:
                fields["ping_ms"] = self._ping_ms
        self._frames.append(self._calls.issue(Call("auth", fields, partial(self._authed, first), repeat=False)))

    def _resume_fields(self) -> dict[str, Any]:
        """``sync`` and ``have`` for ``auth``, or nothing: without ``sync`` the server ignores ``have``.

        As many conversations as the server takes, in about half a frame, the newest first.
        One that is left out costs a page of history, if it changed at all.
        """
        if self.replica.sync is None:
            return {}
        cursors, views = self.replica.catchup.cursors, self.replica.views

        def newest(conv: str) -> int:
            view = views.get(conv)
            return view.last.ts if view and view.last else 0

        have: dict[str, int] = {}
        size = 0
        for conv in sorted(cursors, key=newest, reverse=True)[: self._limits["have"]]:
            size += len(conv) + _HAVE_OVERHEAD_BYTES
            if size > self._limits["frame"] // 2:
                break
            have[conv] = cursors[conv].have
        return {"sync": self.replica.sync, "have": have}

    def _authed(self, first: bool, reply: dict[str, Any] | Exception) -> None:
        if isinstance(reply, ConnectionLost):
            return
        if first:
            self._liveness.answered()
        if isinstance(reply, ChatError) and reply.retry_after_ms is not None:
            self._auth_at = self._now + max(RETRY_MIN_S, reply.retry_after_ms / 1000)
            return
        try:
            if isinstance(reply, Exception):
                raise reply
            user = msgspec.convert(reply.get("user"), User)
            if self._user_id not in ("", user.id):
                raise StateMismatch(f"the saved state is not that of {user.name}")
        except (ChatError, StateMismatch, msgspec.ValidationError) as error:
            self.fail(error)
            return
        self._user_id = user.id
        if isinstance(expires_ms := reply.get("expires_ms"), int):
            # The token slides while used; half its life leaves time for several tries.
            self._auth_at = self._now + max(10.0, expires_ms / 2000)
        if first:
            self._authenticated = True
            self._liveness.idle_s = IDLE_S * self._rng.uniform(0.8, 1.2)
            self.replica.authenticated(user, reply.get("full") is True)
            if self._watched is not None:
                self.call("watch", {"users": self._watched}, self._watching, repeat=False)

    def _watching(self, reply: dict[str, Any] | Exception) -> None:
        """The states of the watched users came: give them out as if they were pushed."""
        states = reply.get("states") if isinstance(reply, dict) else None
        for state in states if isinstance(states, list) else []:
            if isinstance(state, dict):
                self.replica.push({"t": "presence", **state})

    def _flush(self) -> None:
        """Make frames of everything that may go out now."""
        if not self._open or self.failure:
            return
        if self._auth_at is not None and self._auth_at <= self._now:
            self._auth()
        if not self._authenticated:
            return
        if self.replica.accepting:
            for conv, after in self.replica.catchup.take(self._now, self._free()):
                fields = {"c": conv, "after": after, "limit": min(PAGE, self._limits["history"]), "raw": True}
                self._issue(Call("history", fields, partial(self._page, conv), repeat=False))
        # In loops, because a request that is refused right here makes way for the next.
        while calls := self._calls.take(self._free()):
            for call in calls:
                self._issue(call)
        while messages := self._outbox.take(self._now, self._free()):
            for pending in messages:
                self._issue(Call("send", pending.draft.fields(), partial(self._sent, pending), repeat=False))

    def _free(self) -> int:
        """How many more requests may go out before others are answered."""
        return max(1, self._limits["outstanding"] - UNANSWERED_SPARE) - self._calls.unanswered

    def _issue(self, call: Call) -> None:
        frame = self._calls.issue(call)
        if len(frame) > self._limits["frame"]:
            # The server would close the connection over it.
            self._calls.withdraw(call)
            call.done(TooLarge(f"{call.t}: {len(frame)} bytes, the server takes {self._limits['frame']}"))
        else:
            self._frames.append(frame)

    def _page(self, conv: str, reply: dict[str, Any] | Exception) -> None:
        if isinstance(reply, dict):
            self.replica.page(conv, reply, self._now)
        elif not isinstance(reply, ConnectionLost):
            self.replica.page_refused(conv, self._retry_at(reply))

    def _sent(self, pending: Pending, reply: dict[str, Any] | Exception) -> None:
        if isinstance(reply, ConnectionLost):
            return
        if isinstance(reply, Exception) and (at := self._retry_at(reply)) is not None:
            self._outbox.retry(pending, at, over_rate=isinstance(reply, RateLimited))
        else:
            self._finish(pending, reply)

    def _finish(self, pending: Pending, result: dict[str, Any] | Exception) -> None:
        self._outbox.finish(pending)
        if pending.done is not None:
            pending.done(result)
        elif isinstance(result, Exception):
            draft = pending.draft
            self.replica.emit(Refused(conv=draft.conv, cid=draft.cid, body=draft.body, error=result))

    def _retry_at(self, error: Exception) -> float | None:
        if isinstance(error, ChatError) and error.retry_after_ms is not None:
            return self._now + max(RETRY_MIN_S, error.retry_after_ms / 1000)
        return None
