"""How values lie in level 2, as bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

import orjson

from ..store.base import Entry

# seq, msgs, last_msg, length of t, length of sender
_ENTRY: Final = struct.Struct("<QQQBB")
# expires, disabled
_SESSION: Final = struct.Struct("<QB")


@dataclass(frozen=True, slots=True)
class Session:
    """What a session token stands for. Not the user's name: that is a value of its own, which may change."""

    user: str
    expires: int
    disabled: bool


def pack_entry(e: Entry) -> bytes:
    """An entry, without its conversation."""
    t, sender = e.t.encode(), e.sender.encode()
    return b"%b%b%b%b" % (_ENTRY.pack(e.seq, e.msgs, e.last_msg, len(t), len(sender)), t, sender, e.wire)


def unpack_entry(conv: str, data: bytes) -> Entry:
    """The inverse of :func:`pack_entry`.

    :raises ValueError: not an entry.
    """
    try:
        seq, msgs, last_msg, n_t, n_sender = _ENTRY.unpack_from(data)
    except struct.error as exc:
        raise ValueError(f"no entry: {exc}") from None
    at = _ENTRY.size + n_t
    t = data[_ENTRY.size : at].decode()
    sender = data[at : at + n_sender].decode()
    return Entry(conv, seq, t, sender, msgs, last_msg, data[at + n_sender :])


def pack_session(s: Session) -> bytes:
    """A session."""
    return _SESSION.pack(s.expires, s.disabled) + s.user.encode()


def unpack_session(data: bytes) -> Session:
    """The inverse of :func:`pack_session`.

    :raises ValueError: not a session.
    """
    try:
        expires, disabled = _SESSION.unpack_from(data)
    except struct.error as exc:
        raise ValueError(f"no session: {exc}") from None
    return Session(data[_SESSION.size :].decode(), expires, bool(disabled))


def pack_text(text: str) -> bytes:
    """A name, a role."""
    return text.encode()


def unpack_text(data: bytes) -> str:
    """The inverse of :func:`pack_text` (UnicodeDecodeError is a ValueError)."""
    return data.decode()


def member_of(e: Entry) -> str | None:
    """Whose role a ``member`` entry decides."""
    fields: Any = orjson.loads(e.wire)
    user = fields.get("user")
    return user if isinstance(user, str) else None
