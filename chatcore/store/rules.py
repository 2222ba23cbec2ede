"""Who may do what in a conversation: pure functions, the same for every store.

They are asked at the head of the log, inside the step that appends (log.md,
rule 6), so that somebody removed by entry 100 cannot write entry 101.
"""

from __future__ import annotations

from typing import Final

from ..errors import ChatError, Forbidden, NotFound
from ..protocol import MEMBER_ROLES

_RANK: Final = {"none": 0, "banned": 0, "member": 1, "admin": 2, "owner": 3}


def check_send(kind: str | None, role: str | None, blocked: bool) -> ChatError | None:
    """Whether a message may be sent. ``role`` None: no row; ``blocked``: by the other in a dm."""
    if kind is None or role not in MEMBER_ROLES:
        return NotFound("no such conversation")
    if blocked:
        return Forbidden("this user takes no direct messages from you")
    return None


def check_meta(kind: str | None, role: str | None) -> ChatError | None:
    """Whether the title may be changed: by admins and owners; a dm has none."""
    if kind is None or role not in MEMBER_ROLES:
        return NotFound("no such conversation")
    if kind == "dm":
        return Forbidden("a dm has no title")
    if _RANK[role] < _RANK["admin"]:
        return Forbidden("only admins change the title")
    return None


def check_member(
    kind: str | None,
    actor: str,
    actor_role: str | None,
    user: str,
    user_role: str | None,
    role: str,
    owners: int,
    members: int,
) -> ChatError | None:
    """Whether ``actor`` may give ``user`` (who has ``user_role``) the role ``role``.

    ``owners`` and ``members`` count those of the conversation now. Joining and
    leaving a channel by oneself is decided here too, though it makes no entry.
    """
    had = user_role or "none"
    mine = actor_role or "none"
    if kind is None or (
        mine not in MEMBER_ROLES
        # A channel is open to all; and who has left a group may find that out again.
        and not (actor == user and (kind == "channel" or (role == had and user_role is not None)))
    ):
        return NotFound("no such conversation")
    if kind == "dm":
        return Forbidden("a dm has always the same two members")
    if role == had:
        return None  # nothing to do, which is what a repeated request finds
    if actor == user:
        return _check_oneself(kind, had, role, owners, members)
    if _RANK[role] > _RANK["member"] or _RANK[had] > _RANK["member"]:
        # Appointing, and everything done to somebody who was appointed.
        if mine != "owner":
            return Forbidden("only the owner appoints, and only the owner removes who was appointed")
        if had not in MEMBER_ROLES:
            return NotFound("not a member")
        return None
    if role == "member":
        if had == "banned":
            return None if _RANK[mine] >= _RANK["admin"] else Forbidden("this user is banned")
        if kind == "channel":
            return Forbidden("one joins a channel by oneself")
        return None
    if _RANK[mine] < _RANK["admin"]:
        return Forbidden("only admins remove and ban")
    return None


def _check_oneself(kind: str, had: str, role: str, owners: int, members: int) -> ChatError | None:
    if had == "banned":
        return Forbidden("you are banned here")
    if role == "member" and had == "none" and kind == "channel":
        return None
    if role in ("none", "member") and had in MEMBER_ROLES:
        if had == "owner" and owners == 1 and members > 1:
            return Forbidden("appoint another owner first")
        return None
    return Forbidden("nobody appoints or bans oneself")


def no_such_user() -> ChatError:
    """There is no such account."""
    return NotFound("no such user")


def check_room_for(user: str, inside: int, most: int) -> ChatError | None:
    """Whether somebody who is in ``inside`` conversations may come into another."""
    if inside >= most:
        return Forbidden(f"{user} is in {most} conversations, which is the limit")
    return None
