"""What a client says of itself when it comes back: ``sync``, and how far it is in each conversation."""

from __future__ import annotations

from typing import Any, Final

from .world import World

#: What one conversation takes in ``have`` besides its id, with the largest seq.
_OVERHEAD_BYTES: Final = 20


def resume_fields(world: World, *, most: int, most_bytes: int) -> dict[str, Any]:
    """``sync`` and ``have`` for ``auth``, or nothing: without ``sync`` the server ignores ``have``.

    At most ``most`` conversations in about ``most_bytes``, the newest first. What
    is left out costs a page of history, if it changed at all.
    """
    if world.sync is None:
        return {}
    cursors, views = world.catchup.cursors, world.views

    def newest(conv: str) -> int:
        view = views.get(conv)
        return view.last.ts if view and view.last else 0

    have: dict[str, int] = {}
    size = 0
    for conv in sorted(cursors, key=newest, reverse=True)[:most]:
        size += len(conv) + _OVERHEAD_BYTES
        if size > most_bytes:
            break
        have[conv] = cursors[conv].have
    return {"sync": world.sync, "have": have}
