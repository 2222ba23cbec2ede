"""The types of log entries, each declared once.

An :class:`EntryType` says of a type which fields it has, who may append it, what it changes, whether it
counts as a message, and what it becomes in the Python client. The stores, the append loop, the cache, the
delivery and the client read that from :data:`ENTRY_TYPES`, or from the sets derived from it
(:data:`MESSAGES`, :data:`CHANGING`, :data:`ROLE_CHANGING`); none of them compares names of types.

To add a type: declare its fields and its :class:`EntryType` here, and describe it in the protocol. If it
changes something that no type has changed before, add the kind of :data:`Change`, and to each store how it
is applied. If its rule needs a fact that no rule has needed before (such as the sender of the entry that it
edits), add the :class:`Fact` and the attribute of :class:`Standing`, and to each store how it is loaded.

Rules are pure functions. A store asks them at the head of the log, inside the step that appends
(docs/log.md, rule 6), so that a user removed by entry 100 cannot write entry 101.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final

import msgspec

from .errors import ChatError, Forbidden, NotFound
from .protocol import MAX_INT, MEMBER_ROLES, Id

Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_INT)]

_RANK: Final = {"none": 0, "banned": 0, "member": 1, "admin": 2, "owner": 3}


# --- what an entry changes -------------------------------------------------------------
class RoleChange(msgspec.Struct, frozen=True, gc=False):
    """A user has this role from here on: the row of the member follows."""

    user: str
    role: str


class ConversationChange(msgspec.Struct, frozen=True, gc=False):
    """The conversation has this title from here on: its row follows."""

    title: str


#: What the rows of a store follow. Applied in the order of the log.
Change = RoleChange | ConversationChange


# --- fields ------------------------------------------------------------------------------
class EntryFields(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What a type adds to the fields that all entries have, by its names on the wire."""

    #: The type, as in the field ``t`` of an entry.
    t: ClassVar[str]

    def change(self) -> Change | None:
        """What an entry with these fields changes in rows."""
        return None


#: Fields as JSON: stored like this, and taken by :func:`~chatcore.protocol.encode_entry`.
encode_fields: Final[Callable[[EntryFields], bytes]] = msgspec.json.Encoder().encode


class MsgFields(EntryFields, frozen=True):
    """A message. ``re``: the seq of the message that it answers; ``data``: for applications."""

    t: ClassVar[str] = "msg"
    body: str
    re: Count | None = None
    data: str | None = None


class MemberFields(EntryFields, frozen=True):
    """A user came, went, or has another role.

    ``was`` is the role before, "none" for a user who was never in the conversation. Only the head of the log
    knows it, so a request has none and the rule fills it in; entries stored by older versions have none.
    """

    t: ClassVar[str] = "member"
    user: Id
    # Not `Role`: an entry of a version that has more roles has to be read, too.
    role: str
    was: str | None = None

    def change(self) -> RoleChange:
        return RoleChange(self.user, self.role)


class MetaFields(EntryFields, frozen=True):
    """The conversation has another title."""

    t: ClassVar[str] = "meta"
    title: str

    def change(self) -> ConversationChange:
        return ConversationChange(self.title)


class NewEntry(msgspec.Struct, frozen=True, gc=False):
    """An entry to be appended.

    ``fields`` is the JSON object with the fields of its type. ``digest`` is a hash of what was requested: the
    same ``cid`` with another digest is a conflict. ``change`` is what the entry changes in rows.
    """

    conv: str
    sender: str
    cid: str
    t: str
    fields: bytes
    digest: bytes
    change: Change | None = None

    def completed(self, fields: EntryFields) -> NewEntry:
        """The same request with these fields. The digest stays, so that a repetition is recognised."""
        return NewEntry(self.conv, self.sender, self.cid, self.t, encode_fields(fields), self.digest, fields.change())


def new_entry(conv: str, sender: str, cid: str, fields: EntryFields) -> NewEntry:
    """An entry with these fields, and their hash (8 bytes: it detects mistakes, not attacks)."""
    data = encode_fields(fields)
    digest = hashlib.blake2b(data, key=fields.t.encode(), digest_size=8).digest()
    return NewEntry(conv, sender, cid, fields.t, data, digest, fields.change())


# --- rules -------------------------------------------------------------------------------
class Fact(enum.Enum):
    """Facts that cost the store a query, and that few entries need: a rule asks for the one that it lacks."""

    #: ``owners`` and ``members`` of the conversation.
    COUNTS = "counts"
    #: ``user_exists``.
    USER = "user"
    #: ``user_conversations``.
    CONVERSATIONS = "conversations"
    #: ``user_blocks``.
    BLOCKS = "blocks"


class Standing(msgspec.Struct, gc=False):
    """The facts at the head of a log by which an entry is judged; None: not loaded (a role: there is no row)."""

    #: Of the conversation; None: there is none.
    kind: str | None
    #: Of the sender.
    role: str | None
    #: In a dm: the other one has blocked the sender.
    blocked: bool = False
    #: Of the user whose role the entry changes.
    user_role: str | None = None
    #: How many conversations a user may be in.
    max_conversations: int = MAX_INT
    owners: int | None = None
    members: int | None = None
    user_exists: bool | None = None
    user_conversations: int | None = None
    #: The user whose role the entry changes has blocked the sender.
    user_blocks: bool | None = None


#: What a rule says: append this entry, which has what only the head of the log knows; None: what the entry
#: asks for is so already, append nothing; an error: refuse it; a fact: load it and ask again.
Decision = NewEntry | ChatError | Fact | None
Rule = Callable[[NewEntry, Standing], Decision]


def check_message(kind: str | None, role: str | None, blocked: bool) -> ChatError | None:
    """The rule of all messages, by the sender's role and whether the other one of a dm has blocked the sender.

    Stores ask this instead of :attr:`EntryType.rule` where they append many messages at once.
    """
    if kind is None or role not in MEMBER_ROLES:
        return NotFound("no such conversation")
    if blocked:
        return takes_no_messages()
    return None


def _message_rule(e: NewEntry, s: Standing) -> Decision:
    return check_message(s.kind, s.role, s.blocked) or e


def _meta_rule(e: NewEntry, s: Standing) -> Decision:
    """Admins and owners change the title; a dm has none."""
    if s.kind is None or s.role not in MEMBER_ROLES:
        return NotFound("no such conversation")
    if s.kind == "dm":
        return Forbidden("a dm has no title")
    if _RANK[s.role] < _RANK["admin"]:
        return Forbidden("only admins change the title")
    return e


def _member_rule(e: NewEntry, s: Standing) -> Decision:
    """Whether the sender may give the user this role; joining and leaving a channel by oneself included."""
    change = e.change
    assert isinstance(change, RoleChange)
    user, role = change.user, change.role
    oneself = user == e.sender
    had = s.user_role or "none"
    # A channel is open to all; and a user who has left a group may find that out again.
    may_know = s.role in MEMBER_ROLES or (
        oneself and (s.kind == "channel" or (role == had and s.user_role is not None))
    )
    if s.kind is None or not may_know:
        return NotFound("no such conversation")
    if s.kind == "dm":
        return Forbidden("a dm has always the same two members")
    if role != had:
        refused = _check_oneself(s, had, role) if oneself else _check_other(s, had, role)
        if refused is not None:
            return refused
    if s.user_role is None:
        if s.user_exists is None:
            return Fact.USER
        if not s.user_exists:
            return NotFound("no such user")
    if role == had:
        return None  # as a repeated request finds it
    if role in MEMBER_ROLES and had not in MEMBER_ROLES:
        if s.kind == "channel" and not oneself:
            # The user is banned. Others bring no user into a channel: the ban ends, and the user may join.
            role = "none"
        elif not oneself and s.user_blocks is None:
            return Fact.BLOCKS
        elif not oneself and s.user_blocks:
            return takes_no_invitations(user)
        elif s.user_conversations is None:
            return Fact.CONVERSATIONS
        elif (refused := check_room_for(user, s.user_conversations, s.max_conversations)) is not None:
            return refused
        elif s.kind == "channel":
            if s.members is None:
                return Fact.COUNTS
            if not s.members:
                role = "owner"  # of a channel that all members left: one member must be able to lead it
    return e.completed(MemberFields(user, role, had))


def _check_oneself(s: Standing, had: str, role: str) -> Fact | ChatError | None:
    if had == "banned":
        return Forbidden("you are banned here")
    if role == "member" and had == "none" and s.kind == "channel":
        return None
    if role not in ("none", "member") or had not in MEMBER_ROLES:
        return Forbidden("you cannot appoint or ban yourself")
    if had == "owner":
        if s.owners is None or s.members is None:
            return Fact.COUNTS
        if s.owners == 1 and s.members > 1:
            return Forbidden("appoint another owner first")
    return None


def _check_other(s: Standing, had: str, role: str) -> ChatError | None:
    assert s.role is not None
    mine = _RANK[s.role]
    if _RANK[role] > _RANK["member"] or _RANK[had] > _RANK["member"]:
        # Appointing, and everything done to a user who was appointed.
        if s.role != "owner":
            return Forbidden("only the owner appoints, and only the owner removes who was appointed")
        if had not in MEMBER_ROLES:
            return Forbidden("only a member can be appointed")
        return None
    if role == "member":
        if had == "banned":
            return None if mine >= _RANK["admin"] else Forbidden("this user is banned")
        return Forbidden("users join a channel by themselves") if s.kind == "channel" else None
    if mine < _RANK["admin"]:
        return Forbidden("only admins remove and ban")
    return None


def check_room_for(user: str, conversations: int, most: int) -> ChatError | None:
    """Whether a user who is in so many conversations may come into another."""
    if conversations >= most:
        return Forbidden(f"{user} is in {most} conversations, which is the limit")
    return None


def takes_no_messages() -> ChatError:
    """The refusal of a dm by the other one, who blocks the sender."""
    return Forbidden("this user takes no direct messages from you")


def takes_no_invitations(user: str) -> ChatError:
    """The refusal of a user who blocks the inviter."""
    return Forbidden(f"{user} takes no invitations from you")


def by_oneself(e: NewEntry) -> bool:
    """Whether a user asks to come or go. In a channel that changes the row of the member alone, and makes no entry."""
    change = e.change
    return isinstance(change, RoleChange) and change.user == e.sender and change.role in ("member", "none")


# --- the types -----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class EntryType:
    """One type of entries."""

    fields: type[EntryFields]
    #: Decides which users may append it.
    rule: Rule
    #: The class in ``chatcore.client.events`` that the client makes of it.
    event: str
    #: It counts as a message: in ``unread``, as ``last``, as a read mark of its sender. :func:`check_message`
    #: is its rule and it changes nothing, so that stores append messages in bulk.
    is_message: bool = False
    #: What it changes in rows.
    changes: type[RoleChange] | type[ConversationChange] | None = None

    @property
    def t(self) -> str:
        """Its name on the wire."""
        return self.fields.t


_ALL: Final = (
    EntryType(MsgFields, _message_rule, event="Message", is_message=True),
    EntryType(MemberFields, _member_rule, event="MemberChanged", changes=RoleChange),
    EntryType(MetaFields, _meta_rule, event="MetaChanged", changes=ConversationChange),
)

#: By name on the wire. Another version may have types that are not here.
ENTRY_TYPES: Final = {one.t: one for one in _ALL}

# For hot paths: `e.t in MESSAGES` costs as much as comparing two names, and is false for unknown types.
#: Types that count as messages.
MESSAGES: Final = frozenset(one.t for one in _ALL if one.is_message)
#: Types that change rows.
CHANGING: Final = frozenset(one.t for one in _ALL if one.changes is not None)
#: Types that change the role of a user.
ROLE_CHANGING: Final = frozenset(one.t for one in _ALL if one.changes is RoleChange)

_decoders: Final = {one.t: msgspec.json.Decoder(one.fields).decode for one in _ALL}


def change_of(t: str, data: bytes | str) -> Change | None:
    """What an entry changes in rows.

    :param data: its fields as they are stored, or the whole entry as it goes over the wire.
    :raises msgspec.ValidationError: not an entry of this type.
    """
    return _decoders[t](data).change() if t in CHANGING else None
