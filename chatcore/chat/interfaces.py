"""The parts that the chat services use, as protocols.

Each names exactly what is used of a part, so that a model can stand in for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from ..store.base import Changes, Entry, Known, View


class Subscriber(Protocol):
    """A session, as the chat services see it. It alone writes into its own state."""

    @property
    def conn(self) -> int:
        """The number of its connection in the reactor."""

    @property
    def user_id(self) -> str: ...
    @property
    def token_hash(self) -> bytes: ...
    @property
    def expires(self) -> float:
        """When its token ends, by the loop's clock."""

    @property
    def closed(self) -> bool: ...
    @property
    def away(self) -> bool:
        """The user is not looking: appears offline, is notified."""

    @property
    def ready(self) -> bool:
        """Its list of conversations was read: from now on it must be sent what joins the list."""

    def wants(self, conv: str) -> bool:
        """Attached (True), or sent changes of the ``conv`` only (False)."""

    def push(self, payload: bytes) -> object: ...

    def push_view(self, view: View, after: int | None) -> None:
        """Push a ``conv``; ``after`` only when the conversation becomes attached."""

    async def drained(self) -> bool:
        """Wait until the outbox is below its low-water mark. False: the session was closed for making no progress."""

    def attach_lock(self) -> AbstractAsyncContextManager[None]:
        """Attaches of one session run one after the other, so that none repeats what another pushed."""

    def hold_sync(self) -> None:
        """Keep the session's ``sync`` where it is until :meth:`release_sync`: a push that it would cover is still due.
        Calls nest."""

    def release_sync(self) -> None: ...

    def defer_refresh(self, conv: str) -> None:
        """A row changed before the session was ``ready``: it asks for a refresh as soon as it is."""

    def blocks_changed(self) -> None:
        """A user blocked the session's user, or allows it again."""

    def extend(self, expires: float) -> None:
        """Its token was found to be valid for longer."""

    def close(self, code: int, reason: str = "") -> None: ...

    def revoke(self) -> None:
        """Close it: its token is no longer valid."""


class TopicLike(Protocol):
    """The part of ``_fast.Topic`` that is used here."""

    def __len__(self) -> int: ...
    def __contains__(self, conn: int) -> bool: ...
    def add(self, conn: int) -> bool: ...
    def discard(self, conn: int) -> bool: ...
    def fan_out(self, frame: Any, skip_owner: int = 0) -> int: ...
    def sessions(self) -> list[Any]: ...


class StoreReads(Protocol):
    """The part of the store that is used here."""

    async def heads(self, convs: Sequence[str]) -> dict[str, int]: ...
    async def entries(self, conv: str, after: int, limit: int, max_bytes: int) -> list[Entry]: ...
    async def position(self) -> int: ...
    async def changes(self, after: int, known: Known | None = None, everything: bool = True) -> Changes: ...
    async def views(self, user: str, convs: Sequence[str] | None = None) -> tuple[int, list[View]]: ...


class Subscriptions(Protocol):
    """The part of the bus that is used here."""

    @property
    def healthy(self) -> bool: ...
    async def subscribe(self, channels: list[str]) -> None: ...
    def unsubscribe(self, channels: list[str]) -> None: ...


class Connected(Protocol):
    """One user with at least one session on this worker."""

    @property
    def sessions(self) -> Iterable[Subscriber]: ...
    def knows_view(self, conv: str, view: tuple[int, int]) -> bool: ...
    def learned_view(self, conv: str, view: tuple[int, int] | None) -> None: ...


class Sessions(Protocol):
    """The part of :class:`~.directory.Directory` that is used here: the users that are connected to this worker."""

    def get(self, user: str) -> Connected | None: ...
    def sessions_of(self, user: str) -> Iterable[Subscriber]: ...
    def owner_of(self, user: str) -> int: ...
    def connected(self) -> list[str]: ...
    def tokens(self) -> list[bytes]: ...
    def revoked(self, tokens: list[bytes], users: list[str]) -> None: ...
