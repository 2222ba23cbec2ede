"""How a conversation begins: its id, and its first entries. The same for every store."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

import msgspec

from ..entries import MemberFields, MetaFields, NewEntry, new_entry
from .base import Opening


def derived_id(secret: bytes, *parts: str) -> str:
    """A 12-character id that the same parts always give, and that cannot be predicted without the secret."""
    digest = hashlib.blake2b("\0".join(parts).encode(), key=secret, digest_size=9).digest()
    return base64.urlsafe_b64encode(digest).decode()


def dm_id(secret: bytes, user: str, other: str) -> str:
    """The id of the dm of two users."""
    return derived_id(secret, "dm", *sorted((user, other)))


def request_id(secret: bytes, o: Opening) -> str:
    """An id by creator and cid: that of the group or channel which the request makes.

    Not by its kind: the cid of a group used again for a channel is a conflict. A dm, whose own id comes from
    its two users, leaves a record under this id (kind :data:`DM_REQUEST`), so that its cid is known as used.
    """
    return derived_id(secret, "open", o.creator, o.cid)


#: The kind of a row of conversations that is none: which dm was made by a creator's cid. It has no members
#: and no entries, and its id is never given out.
DM_REQUEST = "dm_request"


def conversation_id(secret: bytes, o: Opening) -> str:
    """The id of the conversation that a request makes or finds."""
    return dm_id(secret, o.creator, o.members[0]) if o.kind == "dm" else request_id(secret, o)


def first_members(o: Opening) -> list[str]:
    """The creator, then the other members, each once."""
    return [o.creator, *(user for user in dict.fromkeys(o.members) if user != o.creator)]


def first_entries(conv: str, o: Opening, users: Sequence[str]) -> list[NewEntry]:
    """The entries that a new conversation begins with: its members (the creator first), and its title.

    Their cids derive from that of the request; the first carries the digest of the whole request, so
    that the same cid with another request is recognised as a conflict.
    """
    roles = ["member" if o.kind == "dm" else "owner"] + ["member"] * (len(users) - 1)
    stem = o.cid[:56]
    entries: list[NewEntry] = []
    for i, (user, role) in enumerate(zip(users, roles, strict=True)):
        asked = MemberFields(user, role)
        new = new_entry(conv, o.creator, f"{stem}-m{i}", asked)
        entries.append(new.completed(msgspec.structs.replace(asked, was="none")))
    entries[0] = msgspec.structs.replace(entries[0], digest=o.digest)
    if o.title is not None:
        entries.append(new_entry(conv, o.creator, f"{stem}-t", MetaFields(o.title)))
    return entries
