"""The messages that workers publish on the channel of a conversation, as bytes.

An entry of the log is already encoded as it goes to clients, so that a worker which receives it decodes no JSON.
A state (typing, read marks) is delivered at most once. A yield asks other hosts to pause their appends.
"""

from __future__ import annotations

import struct
from typing import Final

from ..store.base import Entry

#: What the names of these channels begin with.
CONV_CHANNEL: Final = "c:"

# kind, seq, msgs, last_msg, length of t, length of sender
_ENTRY: Final = struct.Struct("<cQQQBB")
_STATE: Final = struct.Struct("<cB")
ENTRY: Final = b"e"
STATE: Final = b"s"
#: The whole message: a host loses every race to append to the conversation, and asks the others to pause.
YIELD: Final = b"y"


def conv_channel(conv: str) -> str:
    """The bus channel of a conversation."""
    return CONV_CHANNEL + conv


def pack_entry(e: Entry) -> bytes:
    """An entry for the channel of its conversation."""
    t, sender = e.t.encode(), e.sender.encode()
    return b"%b%b%b%b" % (
        _ENTRY.pack(ENTRY, e.seq, e.msgs, e.last_msg, len(t), len(sender)),
        t,
        sender,
        e.wire,
    )


def unpack_entry(conv: str, payload: bytes) -> Entry:
    """The inverse of :func:`pack_entry`.

    :raises ValueError: not such a payload.
    """
    try:
        _, seq, msgs, last_msg, n_t, n_sender = _ENTRY.unpack_from(payload)
    except struct.error as exc:
        raise ValueError(str(exc)) from None
    at = _ENTRY.size + n_t
    t = payload[_ENTRY.size : at].decode()
    sender = payload[at : at + n_sender].decode()
    return Entry(conv, seq, t, sender, msgs, last_msg, payload[at + n_sender :])


def pack_state(skip_user: str, wire: bytes) -> bytes:
    """A state push for all sessions attached to a conversation, except those of ``skip_user`` ("": no exception)."""
    user = skip_user.encode()
    return b"%b%b%b" % (_STATE.pack(STATE, len(user)), user, wire)


def unpack_state(payload: bytes) -> tuple[str, bytes]:
    """The inverse of :func:`pack_state`: the user who is skipped, and the push.

    :raises ValueError: not such a payload.
    """
    try:
        _, n = _STATE.unpack_from(payload)
    except struct.error as exc:
        raise ValueError(str(exc)) from None
    return payload[2 : 2 + n].decode(), payload[2 + n :]
