"""What workers tell each other when a value changed: kinds and keys, on one bus channel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import orjson

#: All workers listen to it.
CHANNEL: Final = "i:"

#: Kinds: session tokens by hash (hex), profiles by user, roles by conversation:user, tails by conversation.
TOKEN: Final = "t"
PROFILE: Final = "u"
ROLE: Final = "r"
TAIL: Final = "e"
KINDS: Final = (TOKEN, PROFILE, ROLE, TAIL)
#: Stands for every key of a kind.
ALL: Final = "*"
# More keys than this in one message are told as all of their kinds: it must fit the bus.
MOST_KEYS: Final = 2000

Key = tuple[str, str]


def role_key(user: str, conv: str) -> str:
    """The key of a role (ids have no colon)."""
    return f"{conv}:{user}"


def pack(keys: Iterable[Key], *, owed: bool) -> bytes:
    """A message. ``owed``: level 2 could not be told, so whoever can reach it should."""
    listed = sorted(set(keys))
    if len(listed) > MOST_KEYS:
        listed = sorted({(kind, ALL) for kind, _ in listed})
    return orjson.dumps({"k": listed, "owed": owed} if owed else {"k": listed})


def unpack(payload: bytes) -> tuple[list[Key], bool]:
    """The inverse of :func:`pack`.

    :raises ValueError: not such a message.
    """
    message: Any = orjson.loads(payload)
    try:
        keys = [(str(kind), str(key)) for kind, key in message["k"]]
        owed = bool(message.get("owed", False))
    except (AttributeError, KeyError, TypeError) as exc:
        raise ValueError(f"no invalidation: {exc!r}") from None
    if any(kind not in KINDS for kind, _ in keys):
        raise ValueError("an invalidation of an unknown kind")
    return keys, owed
