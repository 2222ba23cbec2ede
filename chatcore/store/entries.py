"""How entries and ids are made from what was asked: the same for every store."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from .base import NewEntry, Opening


def new_entry(conv: str, sender: str, cid: str, t: str, fields: dict[str, Any]) -> NewEntry:
    """An entry from its fields, with their hash (8 bytes: it detects mistakes, not attacks)."""
    data = orjson.dumps(fields)
    digest = hashlib.blake2b(data, key=t.encode(), digest_size=8).digest()
    return NewEntry(conv, sender, cid, t, data, digest, fields.get("user"), fields.get("role"), fields.get("title"))


def derived_id(secret: bytes, *parts: str) -> str:
    """A 12-character id that the same parts always give, and that nobody can predict."""
    digest = hashlib.blake2b("\0".join(parts).encode(), key=secret, digest_size=9).digest()
    return base64.urlsafe_b64encode(digest).decode()


def conversation_id(secret: bytes, o: Opening) -> str:
    """Opening is idempotent: a dm is known by its two users, another by creator and cid."""
    if o.kind == "dm":
        return derived_id(secret, "dm", *sorted((o.creator, o.members[0])))
    # Not by its kind: the cid of a group used again for a channel is a conflict.
    return derived_id(secret, "open", o.creator, o.cid)


def first_entries(conv: str, o: Opening, everybody: Sequence[str]) -> list[NewEntry]:
    """The entries that a new conversation begins with: its members (the creator first), and its title.

    Their cids derive from that of the request; the first carries the digest of the whole request, so
    that the same cid with another request is seen to be a conflict.
    """
    roles = ["member" if o.kind == "dm" else "owner"] + ["member"] * (len(everybody) - 1)
    stem = o.cid[:56]
    entries = [
        new_entry(conv, o.creator, f"{stem}-m{i}", "member", {"user": user, "role": role})
        for i, (user, role) in enumerate(zip(everybody, roles, strict=True))
    ]
    entries[0] = msgspec.structs.replace(entries[0], digest=o.digest)
    if o.title is not None:
        entries.append(new_entry(conv, o.creator, f"{stem}-t", "meta", {"title": o.title}))
    return entries
