"""Presence: who is online, told to those who watch. At most once, merged, shed first.

Each worker knows its own users. It tells on ``p:<user>`` when one comes or goes,
and whoever subscribes to that channel (because somebody there watches the user)
is told the state at once. A worker that dies takes its users with it
(``on_peer_gone``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import orjson

from ..bus.base import Bus
from ..errors import ChatError
from ..store.base import Store
from . import events

if TYPE_CHECKING:
    from ..server.session import Session

log = logging.getLogger("chatcore.presence")

# Who reconnects within this was never away: no storm when a worker restarts.
OFFLINE_GRACE_S: Final = 2.0
# Changes are merged over this time, then told to the watchers.
MERGE_S: Final = 0.2
#: Whom a session watches that watches nobody.
NOBODY: Final[frozenset[str]] = frozenset()
# Until the next try when the store does not answer.
RETRY_S: Final = 1.0


class Presence:
    """One per worker. Owns one task that tells what changed."""

    def __init__(self, store: Store, bus: Bus, is_online: Callable[[str], bool]) -> None:
        self._store = store
        self._bus = bus
        self._is_online_here = is_online
        self._watchers: dict[str, set[Session]] = {}
        self._remote: dict[str, set[str]] = {}  # watched user -> peers that have him online
        self._announced: set[str] = set()  # users of this worker that others believe online
        self._leaving: dict[str, float] = {}  # user -> when he is to be told offline (monotonic)
        self._told: dict[str, str] = {}  # watched user -> the state that the watchers know
        self._changed: set[str] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the task that tells."""
        self._task = asyncio.create_task(self._run(), name="presence")

    async def close(self) -> None:
        """Tell the last changes to nobody any more; note who was here until now."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._announced:
            try:
                await self._store.mark_seen(list(self._announced))
            except ChatError as exc:
                log.warning("last seen: %s", exc)

    # --- this worker's users --------------------------------------------------
    def changed(self, user: str) -> None:
        """A session of the user came, went, or changed between here and away."""
        if self._is_online_here(user):
            self._leaving.pop(user, None)
            if user not in self._announced:
                self._announced.add(user)
                self._announce(user, True)
        elif user in self._announced and user not in self._leaving:
            self._leaving[user] = time.monotonic() + OFFLINE_GRACE_S
            self._wake.set()

    def _announce(self, user: str, on: bool) -> None:
        self._bus.publish(events.presence_channel(user), orjson.dumps({"peer": self._bus.name, "on": on}))
        self._note(user)

    def _note(self, user: str) -> None:
        if user in self._watchers:
            self._changed.add(user)
            self._wake.set()

    # --- others -----------------------------------------------------------------
    def on_bus(self, user: str, payload: bytes) -> None:
        """A peer says that the user came or went there."""
        message = orjson.loads(payload)
        peers = self._remote.setdefault(user, set())
        if message["on"]:
            peers.add(message["peer"])
        else:
            peers.discard(message["peer"])
        self._note(user)

    def on_peer_subscribed(self, peer: str, user: str) -> None:
        """A peer has begun to watch the user: tell it, if there is something to tell."""
        if user in self._announced:
            self._bus.send_to(peer, events.presence_channel(user), orjson.dumps({"peer": self._bus.name, "on": True}))

    def on_peer_gone(self, peer: str) -> None:
        """A worker is gone, and its users with it, unless they come back elsewhere in time."""
        now = time.monotonic()
        for user, peers in self._remote.items():
            if peer in peers:
                peers.discard(peer)
                self._leaving.setdefault(user, now + OFFLINE_GRACE_S)
        self._wake.set()

    def _online(self, user: str) -> bool:
        return user in self._announced or bool(self._remote.get(user))

    # --- watching -----------------------------------------------------------------
    async def watch(self, x: Session, users: list[str]) -> list[dict[str, Any]]:
        """Replace whom a session watches; the states now."""
        wanted = frozenset(users)
        before = x.watching
        x.watching = wanted
        self._unwatch(x, before - wanted)
        fresh = [user for user in wanted if user not in self._watchers]
        for user in wanted:
            self._watchers.setdefault(user, set()).add(x)
        if fresh:
            await self._bus.subscribe([events.presence_channel(user) for user in fresh])
        states = await self._states([user for user in users if user in wanted])
        for state in states:
            if state["user"] in self._watchers:  # not if the session ended meanwhile
                self._told.setdefault(state["user"], state["state"])
        return states

    def forget(self, x: Session) -> None:
        """A session is over."""
        self._unwatch(x, x.watching)
        x.watching = NOBODY

    def _unwatch(self, x: Session, users: frozenset[str]) -> None:
        gone: list[str] = []
        for user in users:
            watchers = self._watchers.get(user)
            if watchers is None:
                continue
            watchers.discard(x)
            if not watchers:
                del self._watchers[user]
                self._remote.pop(user, None)
                self._told.pop(user, None)
                self._changed.discard(user)
                gone.append(events.presence_channel(user))
        if gone:
            self._bus.unsubscribe(gone)

    async def _states(self, users: list[str]) -> list[dict[str, Any]]:
        offline = [user for user in users if not self._online(user)]
        seen = await self._store.seen(offline) if offline else {}
        states: list[dict[str, Any]] = []
        for user in dict.fromkeys(users):
            state: dict[str, Any] = {"user": user, "state": "online" if self._online(user) else "offline"}
            if state["state"] == "offline" and user in seen:
                state["seen"] = seen[user]
            states.append(state)
        return states

    async def _run(self) -> None:
        while True:
            timeout = None
            if self._leaving:
                timeout = max(0.01, min(self._leaving.values()) - time.monotonic())
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with the event.
            try:
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
                await asyncio.sleep(MERGE_S)
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self._settle_leaving()
                await self._tell()
            except ChatError as exc:
                log.warning("presence: %s", exc)
                await asyncio.sleep(RETRY_S)
                self._wake.set()

    async def _settle_leaving(self) -> None:
        now = time.monotonic()
        due = [user for user, when in self._leaving.items() if when <= now]
        left: list[str] = []
        for user in due:
            del self._leaving[user]
            if user in self._announced and not self._is_online_here(user):
                self._announced.discard(user)
                left.append(user)
            self._note(user)
        if left:
            try:
                # Noted before it is told, so that the telling can say since when.
                await self._store.mark_seen(left)
            except ChatError as exc:
                log.warning("last seen of %d users: %s", len(left), exc)
            for user in left:
                self._announce(user, False)

    async def _tell(self) -> None:
        changed = [user for user in self._changed if user not in self._leaving]
        self._changed.clear()
        try:
            states = await self._states(changed)
        except ChatError:
            # Told later: the next change, or the next round, wakes it.
            self._changed.update(user for user in changed if user in self._watchers)
            raise
        for state in states:
            user = state["user"]
            if self._told.get(user) == state["state"]:
                continue
            self._told[user] = state["state"]
            wire = orjson.dumps({"t": "presence", **state})
            # Not a conversation: each watcher chose this user, at most `limits.watch` of them.
            for x in self._watchers.get(user, ()):
                x.push(wire)
