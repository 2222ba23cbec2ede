"""The client without its I/O: what to send, what to tell the application, when to come back.

Whoever does the I/O calls the inputs (``connected``, ``received``, ``lost``,
``tick``, ...) with the time in seconds of one clock that never jumps back, and
after each of them looks at the outputs: :meth:`Core.take_frames`,
:meth:`Core.take_events`, :attr:`Core.connect_at`, :attr:`Core.drop`,
:attr:`Core.failure` and :meth:`Core.wake_at`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import msgspec

from .backoff import Backoff
from .calls import Call, Calls, Done, encode
from .errors import ChatError, ConnectionLost, RateLimited, StateMismatch, TooLarge, error_from, rejection_from
from .events import Disconnected, Event, Refused, User
from .outbox import Draft, Outbox, Pending
from .pulse import AUTH_TIMEOUT_S, PING_TIMEOUT_S, QUIET_S, Pulse
from .resume import resume_fields
from .state import Snapshot
from .world import Mark, World

log: Final = logging.getLogger("chatcore.client")

VERSION: Final = 1
#: A retryable refusal without a sensible time is repeated after this.
RETRY_MIN_S: Final = 0.05
#: Entries asked for in one page when a hole is filled.
PAGE: Final = 100
#: Closes that some message of ours caused: it is not repeated.
BAD_MESSAGE_CODES: Final = frozenset({1002, 1003, 1007, 1009})

#: What the server allows until its ``hello`` says otherwise (protocol.md, "Connecting").
_LIMITS: Final = {"frame": 65536, "have": 1000, "history": PAGE}


class Core:
    """One user's session over any number of connections; not more than one at a time."""

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
        kept = snapshot or Snapshot()
        self._rng = rng or random.Random()
        self._token = token
        self._user_id = kept.user
        self._only = only
        self._ping_ms = ping_ms
        self._backoff = Backoff(self._rng)
        self._calls = Calls()
        self._outbox = Outbox(window)
        self.world = World(dict(kept.have), dict(kept.convs), kept.sync)
        for draft in kept.sends:
            self._outbox.add(Pending(draft, None, stored=True))
        self._watched: list[str] | None = None
        self._frames: list[bytes] = []
        self._limits = dict(_LIMITS)
        self._now = 0.0
        self._gen = 0
        self._open = False
        self._authenticated = False
        self._pulse = Pulse()
        self._auth_at: float | None = None
        #: ``ready`` came on this connection: every conversation is known.
        self.in_step = False
        #: When to connect; None while there is a connection or one is being made.
        self.connect_at: float | None = 0.0
        #: The socket is to be aborted, then ``lost`` to be called.
        self.drop = False
        #: Why it is all over; nothing will happen any more.
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
        self._pulse.opened(now)
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
            log.warning("the server sent something that is no JSON object; dropping the connection")
            self.drop = True
            return
        t = obj.get("t")
        self._pulse.heard(now, news=t not in ("ok", "error", "hello"))
        match t:
            case "ok":
                if call := self._calls.answered(obj.get("id")):
                    call.done(obj)
            case "error":
                if call := self._calls.answered(obj.get("id")):
                    call.done(error_from(obj))
                else:
                    log.warning("the server says: %s %s", obj.get("code"), obj.get("message"))
            case "hello":
                self._hello(obj)
            case "ready":
                self.in_step = True
                self.world.push(obj)
                self._backoff.ready(now)
                self._pulse.synced(now)
            case _:
                self.world.push(obj)
        self._flush()

    def lost(self, gen: int, code: int, reason: str, now: float) -> None:
        """The connection ended, or could not be made (code 1006)."""
        if gen != self._gen or self.failure:
            return
        self._now = now
        self._open = self._authenticated = self.in_step = self.drop = False
        self._auth_at = None
        self._frames.clear()
        rejection = rejection_from(code, reason)
        bad = code in BAD_MESSAGE_CODES
        flying = sum(1 for pending in self._outbox if pending.in_flight)
        culprit = self._outbox.disconnected(bad_message=bad, others=self._calls.unanswered - flying)
        self.world.disconnected()
        for call, error in self._calls.disconnected(repeat=not bad):
            call.done(error)
        if rejection is not None:
            self.fail(rejection)
            return
        if culprit is not None:
            self._finish(culprit, TooLarge(f"the server closed the connection over this message: {reason} ({code})"))
        attempt = self._backoff.attempt + 1
        wait = self._backoff.lost(now, reason)
        self.connect_at = now + wait
        self.world.say(Disconnected(code=code, reason=reason, retry_in_s=wait, attempt=attempt))

    def tick(self, now: float) -> None:
        """Time has passed, at least until :meth:`wake_at`."""
        self._now = max(self._now, now)
        if not self._open or self.drop or self.failure:
            return
        if self._pulse.dead(now):
            log.info("no sign of life from the server; dropping the connection")
            self.drop = True
            return
        if self._authenticated and self._pulse.due(now):
            self._send_ping()
        self._flush()

    def nudge(self, now: float) -> None:
        """The machine woke up or changed networks: come back at once, or see if the other side is there."""
        self._now = max(self._now, now)
        if self.connect_at is not None:
            self.connect_at = now
        elif self._authenticated and not self._pulse.waiting:
            self._send_ping()
            self._flush()

    def reading(self, yes: bool, now: float) -> None:
        """Whether the socket is being read: silence means nothing while it is not."""
        self._pulse.reading(yes, now)

    def set_room(self, room: bool, now: float) -> None:
        """Whether the application can take more; without room entries are left to be paged."""
        self._now = max(self._now, now)
        if room != self.world.room:
            self.world.set_room(room)
            self._flush()

    # Inputs: the application.

    def send(self, draft: Draft, done: Done, *, stored: bool) -> Pending:
        """Send a message; ``done`` is called once, with the reply or an exception.

        Until ``stored`` (:meth:`stored`) it does not go out.

        :raises BadRequest: it cannot be said in JSON.
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
        pending.stored = True
        self._flush()

    def discard(self, pending: Pending) -> None:
        """Forget a message that did not go out."""
        self._outbox.finish(pending)

    def call(self, t: str, fields: Mapping[str, Any], done: Done, *, repeat: bool = True) -> Call:
        """Ask something; ``done`` is called once, with the reply or an exception.

        :raises BadRequest: it cannot be said in JSON.
        """
        call = Call(t, fields, done, repeat=repeat)
        if self.failure:
            done(self.failure)
            return call
        self._calls.add(call)
        self._flush()
        return call

    def cancel(self, call: Call) -> None:
        """Nobody waits for this answer any more."""
        self._calls.cancel(call)

    def tell(self, t: str, fields: Mapping[str, Any]) -> None:
        """Send what is not answered and not worth repeating."""
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
        """It is all over: everything that waits ends with ``error``."""
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
        """Connected and authenticated."""
        return self._authenticated

    @property
    def waiting(self) -> bool:
        """Somebody waits for something that the server is to say."""
        return self._calls.outstanding > 0 or len(self._outbox) > 0 or not self._authenticated

    @property
    def user_id(self) -> str:
        """Who we are; empty until the first ``auth`` was answered."""
        return self._user_id

    @property
    def has_frames(self) -> bool:
        """:meth:`take_frames` would return something."""
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

    def take_events(self) -> list[tuple[Event | None, Mark]]:
        """What to tell the application, in order."""
        return self.world.take()

    def wake_at(self) -> float | None:
        """When to call :meth:`tick` next; None if only other inputs matter."""
        if not self._open or self.failure:
            return None
        times: list[float | None] = [self._auth_at, self._pulse.wake_at(asking=self._authenticated)]
        if self._authenticated:
            times += [self._outbox.next_at(self._now), self.world.catchup.next_at(self._now)]
        return min((at for at in times if at is not None), default=None)

    # Inside.

    def _hello(self, obj: dict[str, Any]) -> None:
        limits = obj.get("limits")
        if isinstance(limits, dict):
            self._limits |= {k: v for k, v in limits.items() if k in _LIMITS and isinstance(v, int) and v > 0}

    def _send_ping(self) -> None:
        self._pulse.asked(self._now, PING_TIMEOUT_S)
        self._frames.append(self._calls.ask(Call("ping", {}, self._pong, repeat=False)))

    def _pong(self, reply: dict[str, Any] | Exception) -> None:
        self._pulse.answered()
        self._pulse.synced(self._now)
        if isinstance(reply, dict) and self.in_step:
            self.world.synced(reply.get("sync"))

    def _auth(self) -> None:
        first = not self._authenticated
        self._auth_at = None
        if first:
            self._pulse.asked(self._now, AUTH_TIMEOUT_S)
        fields: dict[str, Any] = {"v": VERSION, "token": self._token}
        if first:
            fields |= resume_fields(self.world, most=self._limits["have"], most_bytes=self._limits["frame"] // 2)
            if self._only is not None:
                fields["only"] = self._only
            if self._ping_ms is not None:
                fields["ping_ms"] = self._ping_ms
        self._frames.append(self._calls.ask(Call("auth", fields, partial(self._authed, first), repeat=False)))

    def _authed(self, first: bool, reply: dict[str, Any] | Exception) -> None:
        if isinstance(reply, ConnectionLost):
            return
        if first:
            self._pulse.answered()
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
            self._pulse.quiet_s = QUIET_S * self._rng.uniform(0.8, 1.2)
            self.world.authenticated(user, reply.get("full") is True)
            if self._watched is not None:
                self.call("watch", {"users": self._watched}, self.watching, repeat=False)

    def watching(self, reply: dict[str, Any] | Exception) -> None:
        """The states of the watched users came; tell them as if pushed."""
        states = reply.get("states") if isinstance(reply, dict) else None
        for state in states if isinstance(states, list) else []:
            if isinstance(state, dict):
                self.world.push({"t": "presence", **state})

    def _flush(self) -> None:
        """Make frames of everything that may go out now."""
        if not self._open or self.failure:
            return
        if self._auth_at is not None and self._auth_at <= self._now:
            self._auth()
        if not self._authenticated:
            return
        if self.world.room:
            for conv, after in self.world.catchup.take(self._now):
                fields = {"c": conv, "after": after, "limit": min(PAGE, self._limits["history"]), "raw": True}
                self._ask(Call("history", fields, partial(self._page, conv), repeat=False))
        for call in self._calls.take():
            self._ask(call)
        # Again, because what is refused right here makes way for the next.
        while taken := self._outbox.take(self._now):
            for pending in taken:
                self._ask(Call("send", pending.draft.fields(), partial(self._sent, pending), repeat=False))

    def _ask(self, call: Call) -> None:
        frame = self._calls.ask(call)
        if len(frame) > self._limits["frame"]:
            # The server would close the connection over it.
            self._calls.unask(call)
            call.done(TooLarge(f"{call.t}: {len(frame)} bytes, the server takes {self._limits['frame']}"))
        else:
            self._frames.append(frame)

    def _page(self, conv: str, reply: dict[str, Any] | Exception) -> None:
        if isinstance(reply, dict):
            self.world.page(conv, reply, self._now)
        elif not isinstance(reply, ConnectionLost):
            self.world.page_refused(conv, self._retry_at(reply))

    def _sent(self, pending: Pending, reply: dict[str, Any] | Exception) -> None:
        if isinstance(reply, ConnectionLost):
            return
        if isinstance(reply, Exception) and (at := self._retry_at(reply)) is not None:
            self._outbox.retry(pending, at, everything=isinstance(reply, RateLimited))
        else:
            self._finish(pending, reply)

    def _finish(self, pending: Pending, result: dict[str, Any] | Exception) -> None:
        self._outbox.finish(pending)
        if pending.done is not None:
            pending.done(result)
        elif isinstance(result, Exception):
            draft = pending.draft
            self.world.insist(Refused(conv=draft.conv, cid=draft.cid, body=draft.body, error=result))

    def _retry_at(self, error: Exception) -> float | None:
        if isinstance(error, ChatError) and error.retry_after_ms is not None:
            return self._now + max(RETRY_MIN_S, error.retry_after_ms / 1000)
        return None
