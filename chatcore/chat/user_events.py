"""What concerns all sessions of one user, on whichever worker they are: published on the user's channel, applied here.

Each user has a channel ``u:<user>``; on the local bus all users share one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import orjson

from .directory import SHARED_USER_CHANNEL, user_channel

log = logging.getLogger("chatcore.user_events")


class Publisher(Protocol):
    """The part of the bus that is used here."""

    def publish(self, channel: str, payload: bytes) -> None: ...


class LocalSessions(Protocol):
    """The part of :class:`~.directory.Directory` that is used here."""

    def push_all(self, user: str, wire: bytes) -> None: ...
    def revoke_token(self, user: str, token_hash: bytes) -> None: ...
    def blocks_changed(self, user: str) -> None: ...


class UserEvents:
    """One per worker. Each method applies its event to the sessions here and publishes it for the other workers."""

    def __init__(
        self,
        bus: Publisher,
        sessions: LocalSessions,
        refresh: Callable[[str, str, int | None], None],
        on_remote_row: Callable[[str, str], None] = lambda conv, user: None,
        on_blocks: Callable[[], None] = lambda: None,
        *,
        one_channel: bool = False,
    ) -> None:
        """:param refresh: (user, conversation, have): brings the user's sessions here up to date.
        :param on_remote_row: (conversation, user): another worker changed the row.
        :param on_blocks: some user with a session here was blocked, or no longer is.
        :param one_channel: the users share one channel of the bus; otherwise each has its own.
        """
        self._bus = bus
        self._sessions = sessions
        self._refresh = refresh
        self._on_remote_row = on_remote_row
        self._on_blocks = on_blocks
        self._one_channel = one_channel

    def row_changed(self, user: str, conv: str, have: int | None = None) -> None:
        """The user's row of a conversation changed.

        ``have``: the seq before the entry that brought the user in, if one did.
        """
        self._publish(user, {"k": "row", "c": conv} | ({} if have is None else {"have": have}))
        self._refresh(user, conv, have)

    def blocks_changed(self, user: str) -> None:
        """The list of those who block the user changed: the workers where the user writes may have cached it."""
        self._publish(user, {"k": "blocks"})
        self._apply_blocks(user)

    def push(self, user: str, wire: bytes) -> None:
        """Push something to all sessions of the user."""
        self._publish(user, {"k": "push", "wire": wire.decode()})
        self._sessions.push_all(user, wire)

    def token_revoked(self, user: str, token_hash: bytes) -> None:
        """A token was revoked: its sessions end at once (the check of the store finds it, too, but later)."""
        self._publish(user, {"k": "revoked", "token": token_hash.hex()})
        self._sessions.revoke_token(user, token_hash)

    def _apply_blocks(self, user: str) -> None:
        self._on_blocks()
        self._sessions.blocks_changed(user)

    def _publish(self, user: str, message: dict[str, Any]) -> None:
        self._bus.publish(
            SHARED_USER_CHANNEL if self._one_channel else user_channel(user), orjson.dumps({"u": user, **message})
        )

    def on_bus(self, payload: bytes) -> None:
        """An event that another worker published.

        :raises ValueError, KeyError: not such a payload.
        """
        message = orjson.loads(payload)
        user = message["u"]
        match message.get("k"):
            case "row":
                self._on_remote_row(message["c"], user)
                self._refresh(user, message["c"], message.get("have"))
            case "blocks":
                self._apply_blocks(user)
            case "push":
                self._sessions.push_all(user, message["wire"].encode())
            case "revoked":
                self._sessions.revoke_token(user, bytes.fromhex(message["token"]))
            case _:
                log.warning("an event of unknown kind on the channel of %s was ignored", user)
