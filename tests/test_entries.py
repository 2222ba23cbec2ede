"""The registry of entry types: what the parts read from it fits together, and the rules case by case."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import msgspec
import orjson
import pytest

from chatcore.client import events
from chatcore.entries import (
    CHANGING,
    ENTRY_TYPES,
    MESSAGES,
    ROLE_CHANGING,
    ConversationChange,
    EntryType,
    Fact,
    MemberFields,
    MetaFields,
    MsgFields,
    RoleChange,
    Standing,
    change_of,
    encode_fields,
    new_entry,
)
from chatcore.errors import ChatError, Forbidden, NotFound
from chatcore.protocol import MEMBER_ROLES, encode_entry

ALL = pytest.mark.parametrize("one", ENTRY_TYPES.values(), ids=ENTRY_TYPES)


def example(one: EntryType) -> Any:
    """Fields of a type, with something in each."""
    numbers = {f.name for f in msgspec.structs.fields(one.fields) if "int" in str(f.type)}
    values: dict[str, Any] = {name: 3 if name in numbers else "member" for name in one.fields.__struct_fields__}
    return one.fields(**values)


@ALL
def test_what_a_type_changes_is_read_back_from_its_fields_and_from_the_wire(one: EntryType) -> None:
    fields = example(one)
    change = fields.change()
    assert (None if change is None else type(change)) == one.changes
    data = encode_fields(fields)
    assert orjson.loads(data).keys() == set(one.fields.__struct_encode_fields__)
    wire = encode_entry(one.t, "c", 1, "u", 0, "cid", data)
    assert change_of(one.t, data) == change_of(one.t, data.decode()) == change_of(one.t, wire) == change


@ALL
def test_messages_change_nothing(one: EntryType) -> None:
    """Stores append them in bulk."""
    assert not (one.is_message and one.changes is not None)


def test_the_sets_of_types() -> None:
    assert {"msg"} == MESSAGES
    assert {"member", "meta"} == CHANGING
    assert {"member"} == ROLE_CHANGING
    assert change_of("a type of another version", b"{}") is None


@ALL
def test_the_client_has_an_event_with_the_fields_of_each_type(one: EntryType) -> None:
    event = getattr(events, one.event)
    assert issubclass(event, events.Entry)
    there = set(event.__struct_encode_fields__)
    assert set(one.fields.__struct_encode_fields__) <= there


def test_fields_are_stored_as_they_always_were() -> None:
    """A digest of stored entries is of these bytes: another encoding would make a repetition a conflict."""
    for text in ("", 'a"b\\c/d', "\0\x1f\x7f\x80", "\u2028\u2029é😀", "\n\r\t\b\f"):
        assert encode_fields(MsgFields(text)) == orjson.dumps({"body": text})
        assert encode_fields(MsgFields(text, 7, text)) == orjson.dumps({"body": text, "re": 7, "data": text})
        assert encode_fields(MetaFields(text)) == orjson.dumps({"title": text})
    assert encode_fields(MemberFields("u", "member")) == b'{"user":"u","role":"member"}'
    digest = hashlib.blake2b(b'{"user":"u","role":"member"}', key=b"member", digest_size=8).digest()
    assert new_entry("c", "a", "x", MemberFields("u", "member")).digest == digest


def test_a_completed_entry_keeps_the_digest_of_its_request() -> None:
    asked = new_entry("c", "a", "x", MemberFields("u", "member"))
    completed = asked.completed(MemberFields("u", "none", "banned"))
    assert completed.digest == asked.digest
    assert completed.change == RoleChange("u", "none")
    assert completed.fields == b'{"user":"u","role":"none","was":"banned"}'
    title = new_entry("c", "a", "x", MetaFields("t"))
    assert title.change == ConversationChange("t")


# --- rules ------------------------------------------------------------------------------------

KINDS = (None, "dm", "group", "channel")
ROLES = (None, "none", "banned", "member", "admin", "owner")


def decide(fields: Any, standing: Standing, sender: str = "alice") -> Any:
    """The decision when all facts are there, or those that the rule asks for are loaded: one by one."""
    entry = new_entry("c", sender, "x", fields)
    rule = ENTRY_TYPES[fields.t].rule
    for _ in range(5):
        decision = rule(entry, standing)
        match decision:
            case Fact.COUNTS:
                assert standing.owners is None or standing.members is None
                standing.owners, standing.members = 2, 3
            case Fact.USER:
                assert standing.user_exists is None
                standing.user_exists = True
            case Fact.CONVERSATIONS:
                assert standing.user_conversations is None
                standing.user_conversations = 1
            case Fact.BLOCKS:
                assert standing.user_blocks is None
                standing.user_blocks = False
            case _:
                return decision
    raise AssertionError(f"{decision} was asked for again and again")


@pytest.mark.parametrize("role", ["none", "banned", "member", "admin", "owner"])
@pytest.mark.parametrize("user", ["alice", "bob"])
def test_every_change_of_a_role_is_decided_and_says_what_was(user: str, role: str) -> None:
    for kind, mine, theirs in itertools.product(KINDS, ROLES, ROLES):
        if user == "alice" and mine != theirs:
            continue
        decision = decide(MemberFields(user, role), Standing(kind, mine, user_role=theirs))
        case = (kind, mine, theirs, role)
        had = theirs or "none"
        if kind is None:
            assert isinstance(decision, NotFound), case
        elif isinstance(decision, ChatError):
            # A member is never told that there is no such conversation (but only of a user who does not exist).
            assert not (isinstance(decision, NotFound) and mine in MEMBER_ROLES), case
        elif decision is None:
            assert role == had, case
        else:
            fields = msgspec.json.decode(decision.fields)
            assert fields["was"] == had != fields["role"], case
            assert fields["user"] == user
            assert decision.change == RoleChange(user, fields["role"])
            if kind == "channel" and user == "bob":
                assert fields["role"] not in MEMBER_ROLES or had in MEMBER_ROLES, "nobody is brought in by others"
            elif fields["role"] != role:
                raise AssertionError(case)


def test_a_user_who_does_not_exist_or_has_no_room_is_not_invited() -> None:
    def inviting(**facts: Any) -> Any:
        standing = Standing("group", "member", max_conversations=5, **facts)
        return ENTRY_TYPES["member"].rule(new_entry("c", "alice", "x", MemberFields("bob", "member")), standing)

    assert inviting() is Fact.USER
    assert isinstance(inviting(user_exists=False), NotFound)
    assert inviting(user_exists=True) is Fact.BLOCKS
    assert isinstance(inviting(user_exists=True, user_blocks=True), Forbidden)
    there = {"user_exists": True, "user_blocks": False}
    assert inviting(**there) is Fact.CONVERSATIONS
    assert isinstance(inviting(**there, user_conversations=5), Forbidden)
    assert inviting(**there, user_conversations=4).change == RoleChange("bob", "member")


def test_the_only_owner_stays_while_others_are_in() -> None:
    def leaving(owners: int, members: int) -> Any:
        return decide(MemberFields("alice", "none"), Standing("group", "owner", user_role="owner", owners=owners,
                                                              members=members))  # fmt: skip

    assert isinstance(leaving(1, 2), Forbidden)
    assert leaving(2, 2).change == RoleChange("alice", "none")
    assert leaving(1, 1).change == RoleChange("alice", "none")


def test_who_may_write_and_change_the_title() -> None:
    for kind, role in itertools.product(KINDS, ROLES):
        inside = kind is not None and role in MEMBER_ROLES
        sent = decide(MsgFields("hi"), Standing(kind, role))
        title = decide(MetaFields("t"), Standing(kind, role))
        if not inside:
            assert isinstance(sent, NotFound)
            assert isinstance(title, NotFound)
            continue
        assert sent == new_entry("c", "alice", "x", MsgFields("hi"))
        assert isinstance(title, ChatError) == (kind == "dm" or role == "member")
        assert isinstance(decide(MsgFields("hi"), Standing(kind, role, blocked=True)), Forbidden)
