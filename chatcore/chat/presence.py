"""Presence: which users are online, pushed to the sessions that watch them. At most once, merged, shed first.

Each worker knows its own users. It publishes on ``p:<user>`` when one comes or goes. A worker
subscribes to that channel while one of its sessions watches the user, and the others answer a new
subscription with the state. When a worker dies, its users are offline (``on_peer_gone``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Final

import orjson

from ..bus.base import Bus
from ..common.tasks import Tasks
from ..errors import ChatError
from ..store.base import Store
from .interfaces import Subscriber

log = logging.getLogger("chatcore.presence")

#: What the names of the presence channels begin with.
PRESENCE_CHANNEL: Final = "p:"
# A user who reconnects within this was never offline: no storm when a worker restarts.
OFFLINE_GRACE_S: Final = 2.0
# Changes are merged over this time, then pushed to the watchers.
MERGE_S: Final = 0.2
# Until the next try when the store does not answer.
RETRY_S: Final = 1.0


def presence_channel(user: str) -> str:
    """The channel of one user's presence."""
    return PRESENCE_CHANNEL + user


class Presence:
    """One per worker. Owns one task that pushes changes to the watchers."""

    def __init__(self, store: Store, bus: Bus, is_online: Callable[[str], bool]) -> None:
        self._store = store
        self._bus = bus
        self._is_online_here = is_online
        self._watchers: dict[str, set[Subscriber]] = {}
        self._remote: dict[str, set[str]] = {}  # watched user -> peers on which the user is online
        self._announced: set[str] = set()  # users of this worker that others believe online
        self._leaving: dict[str, float] = {}  # user -> when to announce that the user is offline (monotonic)
        self._pushed: dict[str, str] = {}  # watched user -> the state that the watchers know
        self._changed: set[str] = set()
        self._wake = asyncio.Event()
        self._tasks = Tasks()

    def start(self) -> None:
        """Start the task that pushes changes."""
        self._tasks.spawn(self._run(), "presence")

    async def close(self) -> None:
        """End the task; note in the store which users were online until now."""
        await self._tasks.close()
        if self._announced:
            try:
                await self._store.mark_seen(list(self._announced))
            except ChatError as exc:
                log.warning("last seen of %d users: %s", len(self._announced), exc)

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
        self._bus.publish(presence_channel(user), orjson.dumps({"peer": self._bus.name, "on": on}))
        self._note(user)

    def _note(self, user: str) -> None:
        if user in self._watchers:
            self._changed.add(user)
            self._wake.set()

    # --- others -----------------------------------------------------------------
    def on_bus(self, user: str, payload: bytes) -> None:
        """The user came online or went offline on a peer."""
        message = orjson.loads(payload)
        peers = self._remote.setdefault(user, set())
        if message["on"]:
            peers.add(message["peer"])
        else:
            peers.discard(message["peer"])
        self._note(user)

    def on_peer_subscribed(self, peer: str, user: str) -> None:
        """A peer has begun to watch the user: send it the state if the user is online here."""
        if user in self._announced:
            self._bus.send_to(peer, presence_channel(user), orjson.dumps({"peer": self._bus.name, "on": True}))

    def on_peer_gone(self, peer: str) -> None:
        """A worker is gone. Its users are offline unless they reconnect elsewhere within the grace time."""
        now = time.monotonic()
        for user, peers in self._remote.items():
            if peer in peers:
                peers.discard(peer)
                self._leaving.setdefault(user, now + OFFLINE_GRACE_S)
        self._wake.set()

    def _online(self, user: str) -> bool:
        return user in self._announced or bool(self._remote.get(user))

    # --- watching -----------------------------------------------------------------
    async def watch(self, x: Subscriber, before: frozenset[str], users: list[str]) -> list[dict[str, Any]]:
        """A session that watched ``before`` watches these users from now on; their states now."""
        wanted = frozenset(users)
        self._unwatch(x, before - wanted)
        fresh = [user for user in wanted if user not in self._watchers]
        for user in wanted:
            self._watchers.setdefault(user, set()).add(x)
        if fresh:
            await self._bus.subscribe([presence_channel(user) for user in fresh])
        states = await self._states([user for user in users if user in wanted])
        for state in states:
            if state["user"] in self._watchers:  # not if the session ended meanwhile
                self._pushed.setdefault(state["user"], state["state"])
        return states

    def forget(self, x: Subscriber, watched: frozenset[str]) -> None:
        """A session that watched these users is over."""
        self._unwatch(x, watched)

    def _unwatch(self, x: Subscriber, users: frozenset[str]) -> None:
        gone: list[str] = []
        for user in users:
            watchers = self._watchers.get(user)
            if watchers is None:
                continue
            watchers.discard(x)
            if not watchers:
                del self._watchers[user]
                self._remote.pop(user, None)
                self._pushed.pop(user, None)
                self._changed.discard(user)
                gone.append(presence_channel(user))
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
                await self._announce_offline()
                await self._push_changes()
            except ChatError as exc:
                log.warning("presence: %s", exc)
                await asyncio.sleep(RETRY_S)
                self._wake.set()

    async def _announce_offline(self) -> None:
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
                # Stored before it is announced, so that the watchers can be sent since when.
                await self._store.mark_seen(left)
            except ChatError as exc:
                log.warning("last seen of %d users: %s", len(left), exc)
            for user in left:
                self._announce(user, False)

    async def _push_changes(self) -> None:
        changed = [user for user in self._changed if user not in self._leaving]
        self._changed.clear()
        try:
            states = await self._states(changed)
        except ChatError:
            # Pushed later: the next change, or the next round, wakes the task.
            self._changed.update(user for user in changed if user in self._watchers)
            raise
        for state in states:
            user = state["user"]
            if self._pushed.get(user) == state["state"]:
                continue
            self._pushed[user] = state["state"]
            wire = orjson.dumps({"t": "presence", **state})
            # Not a conversation: each watcher chose this user, at most `limits.watch` of them.
            for x in self._watchers.get(user, ()):
                x.push(wire)
