"""The protocol of the bare relays, as simple as it can be: nothing of theirs is slow because of it.

All frames are text. ``J1 2`` joins the rooms 1 and 2 and is answered ``joined``; ``M1 text`` goes, as it is, to all
members of room 1, its sender too.
"""

from __future__ import annotations

from collections.abc import Sequence

from .base import BODY, Peer, Send, Step, Wait


class Relay(Peer):
    """A server that says this protocol."""

    benches = frozenset({"fanout", "send", "idle"})

    def join(self, user: int, rooms: Sequence[int]) -> list[Step]:
        if not rooms:
            return []
        return [Send("J" + " ".join(map(str, rooms))), Wait("joined")]

    def send(self, user: int, room: int) -> str:
        return f"M{room} {BODY}"
