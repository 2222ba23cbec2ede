"""The client's rules, one by one, on the core alone: messages and the time in, frames and events out."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from chatcore.client.core import ClientCore
from chatcore.client.errors import (
    BadRequest,
    ChatError,
    ConnectionLost,
    Rejected,
    StateMismatch,
    TokenRejected,
    TooLarge,
    TooManyConnections,
    Unavailable,
)
from chatcore.client.events import (
    Conversation,
    ConversationChanged,
    ConversationGone,
    Disconnected,
    Entry,
    Event,
    Gap,
    MemberChanged,
    Message,
    Presence,
    Ready,
    Refused,
    Reset,
    Typing,
)
from chatcore.client.outbox import Draft
from chatcore.client.state import Snapshot

AUTH_OK = {"t": "ok", "user": {"id": "u1", "name": "alice"}, "full": True, "expires_ms": 86400000}


class Wire:
    """A core and the other end of its connection."""

    def __init__(self, snapshot: Snapshot | None = None, **options: Any) -> None:
        self.core = ClientCore("secret", snapshot, rng=random.Random(1), **options)
        self.now = 100.0
        self.gen = 0
        self.told: list[Event] = []

    def open(self) -> dict[str, Any]:
        """Connect; the ``auth`` that comes first."""
        self.gen = self.core.connecting()
        self.core.connected(self.gen, self.now)
        (auth,) = self.frames()
        return auth

    def auth(self, *, full: bool = True, sync: str = "S1", convs: list[dict[str, Any]] | None = None) -> None:
        auth = self.open()
        self.say(AUTH_OK | {"id": auth["id"], "full": full})
        for conv in convs or []:
            self.say({"t": "conv"} | conv)
        self.say({"t": "ready", "sync": sync})

    def say(self, obj: dict[str, Any]) -> None:
        self.core.received(self.gen, msgspec.json.encode(obj), self.now)

    def frames(self) -> list[dict[str, Any]]:
        return [msgspec.json.decode(frame) for frame in self.core.take_frames()]

    def events(self) -> list[Event]:
        return [event for event, _ in self.core.take_events() if event is not None]

    def lose(self, code: int = 1006, reason: str = "") -> None:
        self.core.lost(self.gen, code, reason, self.now)

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.core.tick(self.now)


def msg(seq: int, conv: str = "c1", sender: str = "u2") -> dict[str, Any]:
    return {"t": "msg", "c": conv, "s": seq, "from": sender, "ts": 5, "cid": f"x{seq}", "body": "hi"}


def conv(name: str = "c1", after: int | None = 0, **fields: Any) -> dict[str, Any]:
    out = {"t": "conv", "c": name, "kind": "group", "role": "member", "head": after or 0, **fields}
    return out if after is None else out | {"after": after}


def draft(cid: str, body: str = "hi") -> Draft:
    return Draft("c1", cid, body)


def ignore(_: object) -> None:
    pass


# Connecting.


def test_auth_goes_out_without_waiting_for_hello() -> None:
    assert Wire().open() == {"t": "auth", "id": 1, "v": 1, "token": "secret"}


def test_nothing_else_goes_out_before_auth_is_answered() -> None:
    wire = Wire()
    wire.core.call("users", {"ids": ["u2"]}, ignore)
    auth = wire.open()
    wire.say({"t": "hello", "v": 1, "limits": {"frame": 1000}})
    assert wire.frames() == []
    wire.say(AUTH_OK | {"id": auth["id"]})
    assert [f["t"] for f in wire.frames()] == ["users"]


def test_coming_back_names_sync_and_what_we_have() -> None:
    wire = Wire()
    wire.auth(convs=[conv(after=41)])
    wire.say(msg(42))
    wire.lose()
    auth = wire.open()
    assert auth["sync"] == "S1"
    assert auth["have"] == {"c1": 42}


def test_a_pong_brings_a_newer_sync() -> None:
    wire = Wire()
    wire.auth()
    wire.say({"t": "typing", "c": "c1", "user": "u2"})
    wire.tick(61)
    (ping,) = wire.frames()
    assert ping["t"] == "ping"
    wire.say({"t": "ok", "id": ping["id"], "ts": 1, "sync": "S2"})
    wire.lose()
    assert wire.open()["sync"] == "S2"


def test_sync_counts_only_when_nothing_before_it_is_missing() -> None:
    wire = Wire(Snapshot(user="u1", sync="S0", have={"c1": 3}))
    wire.auth(full=False, sync="S1", convs=[conv(after=9)])
    (page,) = wire.frames()
    wire.lose()
    auth = wire.open()
    assert auth["sync"] == "S0"
    wire.say(AUTH_OK | {"id": auth["id"], "full": False})
    wire.say(conv(after=9))
    wire.say({"t": "ready", "sync": "S2"})
    (page,) = wire.frames()
    wire.say({"t": "ok", "id": page["id"], "entries": [msg(s) for s in range(4, 10)], "more": False, "at": 9})
    wire.lose()
    assert wire.open()["sync"] == "S2"


def test_have_is_cut_to_what_the_server_takes_newest_conversations_first() -> None:
    convs = {
        f"c{n}": Conversation(id=f"c{n}", last=Message(conv=f"c{n}", seq=1, ts=n, type="msg")) for n in range(1500)
    }
    wire = Wire(Snapshot(user="u1", sync="S0", have=dict.fromkeys(convs, 1), convs=convs))
    have = wire.open()["have"]
    assert len(have) == 1000
    assert "c1499" in have
    assert "c499" not in have


@pytest.mark.parametrize(
    ("code", "kind"), [(4101, TokenRejected), (4104, TooManyConnections), (4177, Rejected)], ids=str
)
def test_41xx_is_final_and_ends_everything_that_waits(code: int, kind: type[Exception]) -> None:
    wire = Wire()
    wire.auth()
    results: list[Any] = []
    wire.core.call("users", {"ids": []}, results.append)
    wire.core.send(draft("a"), results.append, stored=True)
    wire.lose(code, "no")
    assert [type(r) for r in results] == [kind, kind]
    assert isinstance(wire.core.failure, kind)
    assert wire.core.connect_at is None
    assert [d.cid for d in wire.core.unacknowledged] == ["a"]  # for the next run


def test_a_close_reason_sets_the_least_wait() -> None:
    for _ in range(20):
        wire = Wire()
        wire.auth()
        wire.lose(1012, "restart 1500")
        assert wire.core.connect_at is not None
        assert 1.5 <= wire.core.connect_at - wire.now <= 2.5


def test_waits_double_and_start_again_after_a_stable_minute() -> None:
    wire = Wire()
    for _ in range(8):
        wire.gen = wire.core.connecting()
        wire.lose()
    wire.events()
    wire.auth()
    wire.tick(61)
    wire.lose()
    *_, lost = wire.events()
    assert isinstance(lost, Disconnected)
    assert lost.retry_in_s <= 1.0


def test_a_change_of_network_comes_back_at_once() -> None:
    wire = Wire()
    wire.auth()
    wire.lose(1012, "restart 60000")
    wire.core.nudge(wire.now)
    assert wire.core.connect_at == wire.now


def test_frames_of_an_older_socket_are_ignored() -> None:
    wire = Wire()
    wire.auth(convs=[conv()])
    old = wire.gen
    wire.lose()
    wire.auth(full=False)
    wire.events()
    wire.core.received(old, msgspec.json.encode(msg(1)), wire.now)
    wire.core.lost(old, 4101, "", wire.now)
    assert wire.events() == []
    assert wire.core.online


def test_a_retryable_refusal_of_auth_is_tried_again_on_the_same_connection() -> None:
    wire = Wire()
    auth = wire.open()
    wire.say({"t": "error", "id": auth["id"], "code": "unavailable", "message": "", "retry_after_ms": 800})
    assert wire.core.wake_at() == pytest.approx(wire.now + 0.8)
    wire.tick(0.8)
    assert [f["t"] for f in wire.frames()] == ["auth"]


def test_a_final_refusal_of_auth_is_final() -> None:
    wire = Wire()
    auth = wire.open()
    wire.say({"t": "error", "id": auth["id"], "code": "bad_request", "message": "no"})
    assert isinstance(wire.core.failure, ChatError)
    assert wire.core.drop


def test_saved_state_of_another_user_is_refused() -> None:
    wire = Wire(Snapshot(user="u9", sync="S0"))
    auth = wire.open()
    wire.say(AUTH_OK | {"id": auth["id"]})
    assert isinstance(wire.core.failure, StateMismatch)


def test_the_token_is_renewed_before_it_expires() -> None:
    wire = Wire()
    auth = wire.open()
    wire.say(AUTH_OK | {"id": auth["id"], "expires_ms": 40_000})
    wire.tick(20)
    (renewal,) = wire.frames()
    assert renewal == {"t": "auth", "id": renewal["id"], "v": 1, "token": "secret"}


# Liveness.


def test_silence_is_asked_about_and_then_ends_the_connection() -> None:
    wire = Wire()
    wire.auth()
    wire.tick(40)
    assert [f["t"] for f in wire.frames()] == ["ping"]
    wire.tick(4.9)
    assert not wire.core.drop
    wire.tick(0.2)
    assert wire.core.drop


def test_any_message_counts_as_a_sign_of_life() -> None:
    wire = Wire()
    wire.auth(convs=[conv()])
    wire.tick(40)
    wire.tick(4)
    wire.say(msg(1))
    wire.tick(4)
    assert not wire.core.drop


def test_silence_means_nothing_while_we_do_not_read() -> None:
    wire = Wire()
    wire.auth()
    wire.tick(40)
    wire.core.reading(False, wire.now)
    wire.tick(60)
    assert not wire.core.drop
    wire.core.reading(True, wire.now)
    wire.tick(1)
    assert not wire.core.drop
    wire.tick(5)
    assert wire.core.drop


def test_no_answer_to_auth_ends_the_connection() -> None:
    wire = Wire()
    wire.open()
    wire.tick(15.1)
    assert wire.core.drop


def test_what_is_no_json_object_ends_the_connection() -> None:
    for junk in (b"\xff", b"[]", b"{", b"3"):
        wire = Wire()
        wire.auth()
        wire.core.received(wire.gen, junk, wire.now)
        assert wire.core.drop


# Entries and pushes.


def test_a_gap_at_attach_is_paged_without_waiting_for_a_live_entry() -> None:
    wire = Wire(Snapshot(user="u1", sync="S0", have={"c1": 3}))
    wire.auth(full=False, convs=[conv(after=900)])
    (page,) = wire.frames()
    assert page == {"t": "history", "id": page["id"], "c": "c1", "after": 3, "limit": 100, "raw": True}


def test_where_a_new_conversation_begins_is_remembered() -> None:
    wire = Wire()
    wire.auth(convs=[conv(after=7)])
    marks = [mark for _, mark in wire.core.take_events()]
    assert ("c1", 7) in [(mark.conv, mark.have) for mark in marks]


def test_a_history_that_is_refused_for_good_leaves_a_gap_by_name() -> None:
    wire = Wire(Snapshot(user="u1", sync="S0", have={"c1": 3}))
    wire.auth(full=False, convs=[conv(after=9)])
    wire.say(msg(10))
    wire.events()
    (page,) = wire.frames()
    wire.say({"t": "error", "id": page["id"], "code": "not_found", "message": ""})
    gap, entry = wire.events()
    assert gap == Gap(conv="c1", first=4, last=9)
    assert isinstance(entry, Message)


def test_a_history_that_is_refused_for_now_is_asked_again() -> None:
    wire = Wire(Snapshot(user="u1", sync="S0", have={"c1": 3}))
    wire.auth(full=False, convs=[conv(after=9)])
    (page,) = wire.frames()
    wire.say({"t": "error", "id": page["id"], "code": "unavailable", "message": "", "retry_after_ms": 300})
    assert wire.frames() == []
    wire.tick(0.3)
    assert [f["t"] for f in wire.frames()] == ["history"]


def test_a_log_that_went_back_is_told() -> None:
    wire = Wire(Snapshot(user="u1", sync="S0", have={"c1": 50}))
    wire.auth(full=False, convs=[conv(after=30)])
    wire.say(msg(31))
    assert next(e for e in wire.events() if isinstance(e, Reset | Entry)) == Reset(conv="c1", upto=30)


def test_an_after_that_live_entries_have_overtaken_is_no_reset() -> None:
    wire = Wire()
    wire.auth(convs=[conv(after=0)])
    wire.say(msg(1))
    wire.say(msg(2))
    wire.say(conv(after=1))
    wire.say(msg(2))
    told = wire.events()
    assert [e.seq for e in told if isinstance(e, Entry)] == [1, 2]
    assert not any(isinstance(e, Reset) for e in told)


def test_unknown_pushes_and_fields_are_ignored_and_unknown_entries_kept() -> None:
    wire = Wire()
    wire.auth(convs=[conv()])
    wire.events()
    wire.say({"t": "weather", "sun": True})
    wire.say(msg(1) | {"color": "red"})
    wire.say({"t": "poll", "c": "c1", "s": 2, "from": "u2", "ts": 5, "options": ["a"]})
    wire.say({"t": "msg", "c": "c1", "s": 3, "from": "u2", "ts": 5, "body": 17})
    wire.say({"t": "typing", "c": 5})
    first, second, third = wire.events()
    assert isinstance(first, Message)
    assert (type(second), second.raw["options"]) == (Entry, ["a"])  # type: ignore[attr-defined]
    assert (type(third), third.seq) == (Entry, 3)  # type: ignore[attr-defined]


def test_an_at_most_once_push_is_told() -> None:
    wire = Wire()
    wire.auth()
    wire.events()
    wire.say({"t": "typing", "c": "c1", "user": "u2"})
    wire.say({"t": "presence", "user": "u2", "state": "online", "seen": 7})
    assert wire.events() == [Typing(conv="c1", user="u2"), Presence(user="u2", state="online", seen=7)]


def test_after_a_full_resync_the_rest_is_forgotten() -> None:
    old = {name: Conversation(id=name, head=1) for name in ("c1", "c2")}
    wire = Wire(Snapshot(user="u1", sync="gone", have={"c1": 1, "c2": 1}, convs=old))
    wire.auth(full=True, convs=[conv("c1", after=1)])
    told = wire.events()
    assert ConversationGone(conv="c2") in told
    assert set(wire.core.replica.views) == {"c1"}
    assert isinstance(told[-1], Ready)


def test_our_removal_comes_last_and_the_conversation_is_gone() -> None:
    wire = Wire()
    wire.auth(convs=[conv()])
    wire.events()
    wire.say({"t": "member", "c": "c1", "s": 1, "from": "u2", "ts": 1, "user": "u1", "role": "none"})
    entry, gone = wire.events()
    assert isinstance(entry, MemberChanged)
    assert gone == ConversationGone(conv="c1")


def test_our_removal_may_be_told_by_the_conv_first() -> None:
    wire = Wire()
    wire.auth(convs=[conv()])
    wire.events()
    wire.say({"t": "conv", "c": "c1", "role": "none"})
    wire.say({"t": "member", "c": "c1", "s": 1, "from": "u2", "ts": 1, "user": "u1", "role": "none"})
    assert wire.events() == [ConversationGone(conv="c1")]


def test_what_is_missing_before_our_removal_is_named() -> None:
    wire = Wire()
    wire.auth(convs=[conv()])
    wire.events()
    wire.say({"t": "member", "c": "c1", "s": 4, "from": "u2", "ts": 1, "user": "u1", "role": "banned"})
    gap, entry, gone = wire.events()
    assert gap == Gap(conv="c1", first=1, last=3)
    assert isinstance(entry, MemberChanged)
    assert isinstance(gone, ConversationGone)


def test_an_old_removal_in_a_replay_does_not_end_a_membership_that_was_renewed() -> None:
    wire = Wire(Snapshot(user="u1", sync="S0", have={"c1": 0}))
    wire.auth(full=False, convs=[conv(after=0, head=2)])
    wire.say({"t": "member", "c": "c1", "s": 1, "from": "u2", "ts": 1, "user": "u1", "role": "none"})
    wire.say({"t": "member", "c": "c1", "s": 2, "from": "u2", "ts": 1, "user": "u1", "role": "member"})
    assert [e.role for e in wire.events() if isinstance(e, MemberChanged)] == ["none", "member"]
    assert wire.core.replica.views["c1"].role == "member"


def member(seq: int, role: str, user: str = "u1") -> dict[str, Any]:
    return {"t": "member", "c": "c1", "s": seq, "from": "u2", "ts": 1, "user": user, "role": role}


@pytest.mark.parametrize("accepting", [True, False])
def test_removed_and_invited_again_while_away_stays_in(accepting: bool) -> None:
    """The story: "either is enough" made a client forget a conversation that it is in. The `conv` is as of its
    head; the removal that is replayed behind it is older."""
    wire = Wire(Snapshot(user="u1", sync="S0", have={"c1": 4}, convs={"c1": Conversation(id="c1", head=4)}))
    wire.auth(full=False)
    wire.core.set_accepting(accepting, wire.now)
    wire.say(conv(after=4, head=6, role="admin"))
    wire.say(member(5, "none"))
    wire.say(member(6, "member"))
    assert wire.core.replica.views["c1"].role == "admin"
    wire.core.set_accepting(True, wire.now)
    if not accepting:
        (page,) = wire.frames()
        entries = [member(5, "none"), member(6, "member")]
        wire.say({"t": "ok", "id": page["id"], "entries": entries, "more": False, "at": 6})
    told = wire.events()
    assert [e.role for e in told if isinstance(e, MemberChanged)] == ["none", "member"]
    assert ConversationGone(conv="c1") not in told
    assert wire.core.replica.views["c1"].role == "admin", "history changes no role"
    wire.say(member(7, "banned"))
    assert wire.events()[-1] == ConversationGone(conv="c1")


def test_a_removal_in_a_page_of_a_long_absence_is_history() -> None:
    wire = Wire(Snapshot(user="u1", sync="S0", have={"c1": 4}, convs={"c1": Conversation(id="c1", head=4)}))
    wire.auth(full=False, convs=[conv(after=900, head=900)])
    wire.say(msg(901))
    (page,) = wire.frames()
    entries = [member(5, "none"), member(6, "member"), *[msg(s) for s in range(7, 901)]]
    wire.say({"t": "ok", "id": page["id"], "entries": entries, "more": False, "at": 900})
    told = wire.events()
    assert [e.seq for e in told if isinstance(e, Entry)] == list(range(5, 902))
    assert ConversationGone(conv="c1") not in told


def test_removed_and_invited_again_at_once_stays_in_whichever_comes_first() -> None:
    """The `conv` was read after both entries, which come behind it; the second one attaches anew."""
    wire = Wire()
    wire.auth(convs=[conv(after=10, head=10)])
    wire.say(conv(after=None, head=12))
    wire.say(member(11, "none"))
    wire.say(conv(after=11, head=12))
    wire.say(member(12, "member"))
    wire.say(msg(13))
    told = wire.events()
    assert [e.seq for e in told if isinstance(e, Entry)] == [11, 12, 13]
    assert ConversationGone(conv="c1") not in told
    assert not any(isinstance(e, Reset) for e in told)


def test_removed_and_invited_again_after_the_removal_was_seen_begins_anew() -> None:
    wire = Wire()
    wire.auth(convs=[conv(after=10, head=10)])
    wire.events()
    wire.say(member(11, "none"))
    wire.say(conv(after=11, head=12))
    wire.say(member(12, "member"))
    wire.say(msg(13))
    told = wire.events()
    assert [type(e) for e in told if not isinstance(e, Message)] == [
        MemberChanged,
        ConversationGone,
        ConversationChanged,
        MemberChanged,
    ]
    assert [e.seq for e in told if isinstance(e, Entry)] == [11, 12, 13]


def test_a_conv_that_entries_have_overtaken_takes_nothing_back() -> None:
    """It was read before the entry that is here already: the role, the title, the newest message and the head are
    those of the entries; what it says of the settings counts."""
    wire = Wire()
    wire.auth(convs=[conv(after=3, title="old", read=3)])
    wire.say(member(4, "admin"))
    wire.say({"t": "meta", "c": "c1", "s": 5, "from": "u2", "ts": 1, "title": "new"})
    wire.say(msg(6))
    wire.say(conv(after=None, head=3, title="old", read=3, unread=0, notify="none"))
    view = wire.core.replica.views["c1"]
    assert (view.role, view.title, view.head, view.unread, view.notify) == ("admin", "new", 6, 1, "none")
    assert view.last is not None
    assert view.last.seq == 6
    # And an entry that comes again is still history.
    wire.say(member(4, "none"))
    assert "c1" in wire.core.replica.views


def test_a_log_that_went_back_takes_the_view_with_it() -> None:
    """A backup was restored: the first `conv` of a connection counts as it is."""
    old = Conversation(id="c1", head=50, role="owner", title="later")
    wire = Wire(Snapshot(user="u1", sync="S0", have={"c1": 50}, convs={"c1": old}))
    wire.auth(full=False, convs=[conv(after=30, head=30, role="member", title="earlier")])
    view = wire.core.replica.views["c1"]
    assert (view.head, view.role, view.title) == (30, "member", "earlier")
    wire.say(member(31, "none"))
    assert "c1" not in wire.core.replica.views


def test_leaving_does_not_undo_a_return_that_is_known_already() -> None:
    """The user left by entry 11 and was invited again by entry 12; the `ok` to leaving comes last."""
    wire = Wire()
    wire.auth(convs=[conv(after=10, head=10)])
    wire.say(conv(after=None, head=12))
    wire.core.replica.left("c1", 11)
    assert "c1" in wire.core.replica.views
    wire.core.replica.left("c1", 12)
    assert "c1" not in wire.core.replica.views


def test_absent_fields_of_a_view_are_unchanged_and_later_messages_are_counted() -> None:
    wire = Wire()
    wire.auth(convs=[conv(after=3, title="lobby", read=1, unread=2, mentions=1)])
    wire.say({"t": "conv", "c": "c1", "notify": "none"})
    wire.say(msg(4) | {"mentions": ["u1"]})
    view = wire.core.replica.views["c1"]
    assert (view.title, view.notify, view.unread, view.mentions, view.head) == ("lobby", "none", 3, 2, 4)
    wire.say(msg(5, sender="u1"))
    view = wire.core.replica.views["c1"]
    assert (view.read, view.unread, view.mentions) == (5, 0, 0)


def test_while_the_application_is_too_slow_views_are_merged_and_come_later() -> None:
    wire = Wire()
    wire.auth(convs=[conv()])
    wire.events()
    wire.core.set_accepting(False, wire.now)
    wire.say({"t": "conv", "c": "c1", "title": "a"})
    wire.say({"t": "conv", "c": "c1", "title": "b"})
    wire.say({"t": "typing", "c": "c1", "user": "u2"})
    assert wire.events() == []
    wire.core.set_accepting(True, wire.now)
    (changed,) = wire.events()
    assert isinstance(changed, ConversationChanged)
    assert changed.conversation.title == "b"


# Requests.


def test_a_request_survives_a_lost_connection() -> None:
    wire = Wire()
    wire.auth()
    results: list[Any] = []
    wire.core.call("users", {"ids": ["u2"]}, results.append)
    wire.frames()
    wire.lose()
    wire.auth()
    (again,) = wire.frames()
    assert again["t"] == "users"
    wire.say({"t": "ok", "id": again["id"], "users": []})
    assert results == [{"t": "ok", "id": again["id"], "users": []}]


def test_a_request_that_is_not_repeated_says_so() -> None:
    wire = Wire()
    wire.auth()
    results: list[Any] = []
    wire.core.call("ping", {}, results.append, repeat=False)
    wire.lose()
    assert isinstance(results[0], ConnectionLost)


def test_a_refusal_carries_code_message_and_time() -> None:
    wire = Wire()
    wire.auth()
    results: list[Any] = []
    wire.core.call("users", {"ids": []}, results.append)
    (asked,) = wire.frames()
    wire.say({"t": "error", "id": asked["id"], "code": "unavailable", "message": "later", "retry_after_ms": 70})
    (error,) = results
    assert isinstance(error, Unavailable)
    assert (error.code, error.message, error.retry_after_ms) == ("unavailable", "later", 70)


def test_an_unknown_code_is_kept() -> None:
    wire = Wire()
    wire.auth()
    results: list[Any] = []
    wire.core.call("users", {"ids": []}, results.append)
    (asked,) = wire.frames()
    wire.say({"t": "error", "id": asked["id"], "code": "teapot", "message": "short and stout"})
    assert (results[0].code, results[0].retry_after_ms) == ("teapot", None)


def test_nobody_hears_of_a_cancelled_request() -> None:
    wire = Wire()
    wire.auth()
    results: list[Any] = []
    call = wire.core.call("users", {"ids": []}, results.append)
    (asked,) = wire.frames()
    wire.core.cancel(call)
    wire.say({"t": "ok", "id": asked["id"], "users": []})
    wire.lose()
    wire.auth()
    assert (results, wire.frames()) == ([], [])


def test_a_request_that_is_too_large_does_not_go_out() -> None:
    wire = Wire()
    wire.auth()
    results: list[Any] = []
    wire.core.call("users", {"ids": ["x" * 70_000]}, results.append)
    wire.core.send(draft("a", "x" * 70_000), results.append, stored=True)
    assert [type(r) for r in results] == [TooLarge, TooLarge]
    assert wire.frames() == []
    assert wire.core.unacknowledged == []


def test_what_follows_a_message_that_is_too_large_goes_out_at_once() -> None:
    wire = Wire()
    wire.auth()
    wire.core.send(draft("a"), ignore, stored=True)
    wire.core.send(draft("b", "x" * 70_000), ignore, stored=True)
    wire.core.send(draft("c"), ignore, stored=True)
    (first,) = wire.frames()
    wire.say({"t": "ok", "id": first["id"], "s": 1, "ts": 1})
    assert [f["cid"] for f in wire.frames()] == ["c"]


def test_typing_is_not_kept_for_later() -> None:
    wire = Wire()
    wire.core.send_once("typing", {"c": "c1"})
    wire.auth()
    assert wire.frames() == []
    wire.core.send_once("typing", {"c": "c1"})
    assert wire.frames() == [{"t": "typing", "c": "c1"}]


def test_presence_is_watched_again_on_the_next_connection() -> None:
    wire = Wire()
    wire.auth()
    wire.core.watch(["u2"])
    wire.lose()
    wire.auth()
    wire.events()
    (watch,) = wire.frames()
    assert (watch["t"], watch["users"]) == ("watch", ["u2"])
    wire.say({"t": "ok", "id": watch["id"], "states": [{"user": "u2", "state": "online", "seen": 3}]})
    assert wire.events() == [Presence(user="u2", state="online", seen=3)]


# Sending.


def test_an_unacknowledged_message_goes_out_again_with_the_same_cid() -> None:
    wire = Wire()
    wire.auth()
    results: list[Any] = []
    wire.core.send(draft("a"), results.append, stored=True)
    (first,) = wire.frames()
    wire.lose()
    wire.auth()
    (again,) = wire.frames()
    assert (again["cid"], again["body"]) == (first["cid"], first["body"]) == ("a", "hi")
    wire.say({"t": "ok", "id": again["id"], "s": 1, "ts": 1, "dup": True})
    assert results == [{"t": "ok", "id": again["id"], "s": 1, "ts": 1, "dup": True}]
    assert wire.core.unacknowledged == []


def test_a_retryable_refusal_is_repeated_after_its_time_and_nothing_overtakes_it() -> None:
    wire = Wire()
    wire.auth()
    for cid in ("a", "b"):
        wire.core.send(draft(cid), ignore, stored=True)
    (first,) = wire.frames()
    wire.say({"t": "error", "id": first["id"], "code": "unavailable", "message": "", "retry_after_ms": 500})
    wire.tick(0.4)
    assert wire.frames() == []
    wire.tick(0.2)
    (again,) = wire.frames()
    assert again["cid"] == "a"


def test_a_final_refusal_ends_one_message_and_the_next_goes_out() -> None:
    wire = Wire()
    wire.auth()
    results: list[Any] = []
    for cid in ("a", "b"):
        wire.core.send(draft(cid), results.append, stored=True)
    (first,) = wire.frames()
    wire.say({"t": "error", "id": first["id"], "code": "forbidden", "message": "no"})
    assert results[0].code == "forbidden"
    assert [f["cid"] for f in wire.frames()] == ["b"]


def test_a_message_of_an_earlier_run_that_is_refused_is_told() -> None:
    wire = Wire(Snapshot(user="u1", sends=[draft("a")]))
    wire.auth()
    wire.events()
    (send,) = wire.frames()
    wire.say({"t": "error", "id": send["id"], "code": "not_found", "message": "no"})
    (refused,) = wire.events()
    assert isinstance(refused, Refused)
    assert (refused.cid, refused.body) == ("a", "hi")


def test_a_message_that_the_server_closed_over_is_refused_and_not_repeated() -> None:
    wire = Wire()
    wire.auth()
    results: list[Any] = []
    wire.core.send(draft("a"), results.append, stored=True)
    wire.lose(1009)
    assert isinstance(results[0], TooLarge)
    wire.auth()
    assert wire.frames() == []


def test_what_is_no_unicode_is_refused_at_once_and_does_no_harm() -> None:
    wire = Wire()
    wire.auth()
    with pytest.raises(BadRequest):
        wire.core.send(draft("a", "\ud83d"), ignore, stored=True)
    with pytest.raises(BadRequest):
        wire.core.call("meta", {"title": "\ud83d"}, ignore)
    wire.core.send(draft("b"), ignore, stored=True)
    assert [f["cid"] for f in wire.frames()] == ["b"]


def test_a_message_waits_until_it_is_stored() -> None:
    wire = Wire()
    wire.auth()
    pending = wire.core.send(draft("a"), ignore, stored=False)
    assert wire.frames() == []
    wire.core.stored(pending)
    assert [f["cid"] for f in wire.frames()] == ["a"]
