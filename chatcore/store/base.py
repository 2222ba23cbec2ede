"""The store: what every implementation offers, and the values that go in and out.

All methods are called on the worker's loop. A call that raises :class:`ChatError`
changed nothing, except that ``Unavailable`` from a write means *unknown*: the
caller repeats it with the same ids, and finds out.

The values are msgspec structs: several are made for each message, and a frozen
dataclass costs ten times as much (0.9 µs against 0.08 µs).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from ..entries import NewEntry


class Appended(msgspec.Struct, frozen=True, gc=False):
    """The outcome of an append. ``seq`` is 0 if there was nothing to do (a role already held)."""

    seq: int
    ts: int
    dup: bool = False


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A committed entry. ``wire`` is its JSON as pushed.

    ``msgs`` counts the messages of the conversation up to and including this
    entry, ``last_msg`` is the seq of the newest of them (0: none): with both in
    every entry, unread counts and last messages cost one index look-up.
    """

    conv: str
    seq: int
    t: str
    sender: str
    msgs: int
    last_msg: int
    wire: bytes


class Page(msgspec.Struct, frozen=True, gc=False):
    """A page of a log, ascending. ``head``: the newest seq when it was read."""

    entries: list[Entry]
    more: bool
    head: int


class View(msgspec.Struct, frozen=True, gc=False):
    """One user's view of one conversation: all that a ``conv`` push says.

    ``rev`` is the change counter of the row (see :class:`Changes`), ``head_id``
    that of the newest entry.
    """

    conv: str
    kind: str
    title: str | None
    with_id: str | None
    with_name: str | None
    role: str
    members: int
    notify: str
    head: int
    read: int
    unread: int
    last: bytes | None
    rev: int
    head_id: int
    #: The seq of the entry that the row reflects (a row may follow its entry after a while; the
    #: default: it always reflects the newest).
    as_of: int = 2**53


class Changes(msgspec.Struct, frozen=True, gc=False):
    """What changed after a position: the newest seq of each conversation with new
    entries, the (user, conversation) rows, and the revoked tokens and users.

    ``position`` is where to go on from; ``more``: there is more right now.
    """

    position: int
    heads: list[tuple[str, int]]
    rows: list[tuple[str, str]]
    revoked_tokens: list[bytes]
    revoked_users: list[str]
    more: bool = False


class Memberships(msgspec.Struct, frozen=True, gc=False):
    """The conversations that a user is in, with the change counter of each row, as of ``position``;
    ``left``: those that the user is no longer in, by changes after the position that was asked about."""

    position: int
    revs: dict[str, int]
    left: list[str]


class Known(Protocol):
    """What a worker holds, for a store that has to look at each: all of these may have changed."""

    def lasts(self) -> dict[str, int]:
        """The conversations with sessions attached here, and the newest seq known of each."""

    def users(self) -> list[str]:
        """The users who are connected."""

    def tokens(self) -> list[bytes]:
        """The hashes of the tokens in use."""


class User(msgspec.Struct, frozen=True, gc=False):
    """An account, as others may see it."""

    id: str
    name: str


class Account(msgspec.Struct, frozen=True, gc=False):
    """An account as the login needs it. ``password`` is an argon2id hash."""

    id: str
    name: str
    password: str
    disabled: bool


class Token(msgspec.Struct, frozen=True, gc=False):
    """A session token, looked up by its hash. Times in Unix ms."""

    user: User
    expires: int
    disabled: bool


class Peer(msgspec.Struct, frozen=True, gc=False):
    """One member in a page of members."""

    user: str
    role: str
    read: int


class Opened(msgspec.Struct, frozen=True, gc=False):
    """The outcome of ``open``. ``created`` is False if it was there already (and its creator may have left it)."""

    conv: str
    created: bool


class Store(Protocol):
    """Everything durable. One per worker, made after the fork in the running loop."""

    #: What `ctl status` calls it: "sqlite", "mongodb".
    name: str
    #: One counter orders all changes, so that a position stands for all of them up to it. Otherwise
    #: a position is of one user's rows, and ``have`` alone says which entries a client lacks.
    global_positions: bool

    @property
    def store_id(self) -> str: ...

    @property
    def healthy(self) -> bool: ...

    async def start(self) -> None: ...

    async def close(self) -> None:
        """Finish what is queued, answer it, end threads and connections."""

    # --- the log -----------------------------------------------------------
    def append(self, entry: NewEntry) -> asyncio.Future[Appended]:
        """Append durably. The future fails with ChatError. New entries are given to
        ``on_commit`` (set at construction) before their futures are resolved. Joining or leaving
        a channel by oneself changes the row alone: ``Appended`` with seq 0."""

    async def open(self, conv: Opening) -> Opened:
        """Make a conversation, or find it.

        :raises Conflict: the creator's cid made another conversation.
        """

    async def heads(self, convs: Sequence[str]) -> dict[str, int]:
        """The newest committed seq of each (0: no such conversation)."""

    async def entries(self, conv: str, after: int, limit: int, max_bytes: int) -> list[Entry]:
        """Dense from ``after`` + 1, up to ``limit`` entries or ``max_bytes`` (at least one)."""

    async def page(
        self, user: str, conv: str, before: int | None, after: int | None, limit: int, max_bytes: int
    ) -> Page:
        """A page for a member.

        :raises NotFound: the user is none.
        """

    async def position(self) -> int:
        """The newest position of the change counter."""

    async def changes(self, after: int, known: Known | None = None, everything: bool = True) -> Changes:
        """What changed after a position. A store without global positions looks at what is ``known``
        instead: at all of it, or at the next part of a rotation."""

    # --- conversations -----------------------------------------------------
    async def memberships(self, user: str, since: int | None = None) -> Memberships:
        """What the user is in, and (if ``since`` is given) what the user left or was removed from after it."""

    async def views(self, user: str, convs: Sequence[str] | None = None) -> tuple[int, list[View]]:
        """The position as of which, and the user's views, newest first (of those named, or all).
        A conversation that the user is not in is left out. A row never shows less than the head
        beside it: every change up to it is in."""

    async def role(self, user: str, conv: str) -> str | None:
        """The role in the user's row of a conversation (None: there is no row)."""

    async def member_count(self, conv: str) -> int: ...

    async def members(self, user: str, conv: str, after: str | None, limit: int) -> tuple[list[Peer], str | None]: ...

    async def channels(
        self, user: str, prefix: str | None, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], str | None]: ...

    async def set_read(self, user: str, conv: str, upto: int) -> bool: ...

    async def set_notify(self, user: str, conv: str, level: str) -> None: ...

    async def block(self, user: str, other: str, on: bool) -> None: ...

    async def acquainted(self, user: str, others: Sequence[str]) -> set[str]:
        """Those of ``others`` who share a conversation with the user."""

    async def dm_peer(self, user: str, conv: str) -> str | None:
        """The other member of a dm of the user; None: it is no such dm. The answer never changes."""

    async def blockers(self, user: str, others: Sequence[str]) -> set[str]:
        """Those of ``others`` who block the user."""

    # --- accounts ----------------------------------------------------------
    async def add_user(self, name: str, password: str) -> User: ...

    async def update_user(self, user: str, name: str | None, password: str | None, keep: bytes = b"") -> User:
        """Another name, another password hash (which revokes all tokens but the one with hash ``keep``), or both."""

    async def set_disabled(self, name: str, disabled: bool) -> None: ...

    async def account(self, name: str) -> Account | None: ...

    async def account_by_id(self, user: str) -> Account | None: ...

    async def users(self, ids: Sequence[str]) -> list[User]: ...

    async def seen(self, ids: Sequence[str]) -> dict[str, int]:
        """When each was last online (Unix ms; left out if never)."""

    async def mark_seen(self, users: Sequence[str]) -> None: ...

    async def add_token(self, token_hash: bytes, user: str, expires: int, password: str) -> None:
        """A new session token.

        :raises Unauthenticated: ``password`` is no longer the account's hash, or the account is disabled.
        """

    async def token(self, token_hash: bytes) -> Token | None: ...

    async def extend_token(self, token_hash: bytes, expires: int) -> bool:
        """False: it has been revoked."""

    async def revoke_token(self, token_hash: bytes) -> None: ...


class Opening(msgspec.Struct, frozen=True, gc=False):
    """A conversation to make or find. ``digest`` covers the whole request."""

    creator: str
    cid: str
    kind: str
    title: str | None
    members: tuple[str, ...]
    digest: bytes


#: Called with new entries as soon as they are durable, before their senders are answered.
OnCommit = Callable[[list[Entry]], None]


class CommitHooks(list[OnCommit]):
    """The parts that follow the log, in the order in which they are called. A store is given it as its ``on_commit``;
    the parts, which need the store, append theirs afterwards, before the first entry is."""

    def __call__(self, entries: list[Entry]) -> None:
        for hook in self:
            hook(entries)
