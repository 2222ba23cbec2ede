"""Requests in, replies out: every bound, and what is told when one is crossed."""

from __future__ import annotations

import re
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import msgspec
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chatcore import errors
from chatcore import protocol as p
from chatcore.entries import ENTRY_TYPES

ID: Final = "a" * 64
INT: Final = 2**53 - 1


def kinds_of(annotation: Any) -> tuple[Any, tuple[Any, ...], Any]:
    """The origin and arguments of a field's type, and what its Annotated says."""
    meta = None
    if get_origin(annotation) is Annotated:
        annotation, meta = get_args(annotation)[:2]
    return get_origin(annotation) or annotation, get_args(annotation), meta


def sample(annotation: Any) -> Any:
    """A value that a field of this type may have."""
    origin, args, meta = kinds_of(annotation)
    if origin is Literal:
        return args[0]
    if origin is str:
        return "some-id" if meta is not None else "hi"
    return {bool: True, int: 1, list: [], dict: {}}[origin]


#: A valid request of each kind, with all its required fields and no other.
LEAST: Final[dict[str, dict[str, Any]]] = {
    str(kind.__struct_config__.tag): {
        field.encode_name: sample(field.type) for field in msgspec.structs.fields(kind) if field.required
    }
    for kind in p.REQUESTS
}


def decode(t: str, **fields: Any) -> p.AnyRequest:
    return p.decode(orjson.dumps({"t": t, **LEAST.get(t, {}), **fields}))


def refused(data: bytes) -> p.InvalidRequest:
    with pytest.raises(p.InvalidRequest) as caught:
        p.decode(data)
    return caught.value


# --- what is accepted -----------------------------------------------------------


def test_every_request_has_a_name_of_its_own() -> None:
    assert len(LEAST) == len(p.REQUESTS) > 15


@pytest.mark.parametrize("t", LEAST)
def test_the_least_request(t: str) -> None:
    request = decode(t)
    assert request.__struct_config__.tag == t
    assert request.id is None
    assert {name: getattr(request, name) for name in LEAST[t]} == LEAST[t]


@pytest.mark.parametrize(("t", "missing"), [(t, name) for t, fields in LEAST.items() for name in fields])
def test_a_required_field_is_required(t: str, missing: str) -> None:
    fields = {name: value for name, value in LEAST[t].items() if name != missing}
    refusal = refused(orjson.dumps({"t": t, "id": 7, **fields}))
    assert missing in refusal.message
    assert refusal.id == 7


@pytest.mark.parametrize("t", LEAST)
def test_unknown_fields_are_ignored(t: str) -> None:
    assert decode(t, id=1, new_in_version_2={"deep": [1, None]}) == decode(t, id=1)


def test_null_is_as_good_as_absent_where_a_field_is_optional() -> None:
    for kind in p.REQUESTS:
        t = str(kind.__struct_config__.tag)
        defaults = {field.encode_name: None for field in msgspec.structs.fields(kind) if not field.required}
        assert decode(t, **defaults) == decode(t)
        for name in defaults:
            assert decode(t, **{name: None}) == decode(t), f"{t}.{name}"


def test_defaults() -> None:
    history = decode("history")
    assert isinstance(history, p.History)
    assert (history.before, history.after, history.limit, history.raw) == (None, None, 50, False)
    auth = decode("auth")
    assert isinstance(auth, p.Auth)
    assert auth.v == p.VERSION
    for t in ("members", "channels"):
        assert getattr(decode(t), "limit") == 50  # noqa: B009


def test_the_type_may_stand_anywhere() -> None:
    assert p.decode(b' {"id":1,"c":"c1","t":"typing"} ') == p.Typing(c="c1", id=1)


@pytest.mark.parametrize(
    ("data", "request_"),
    [
        (b'{"t":"ping","id":1,"id":2}', p.Ping(id=2)),
        # The first is of another request, or wrong: the decoder alone refused it, whatever came after it.
        (b'{"t":"ping","id":"x","id":2}', p.Ping(id=2)),
        (b'{"t":"ping","t":"typing","c":"c1"}', p.Typing(c="c1")),
        (b'{"t":"nope","c":"c1","t":"typing"}', p.Typing(c="c1")),
        (b'{"t":"typing","c":["c1"],"c":"c1"}', p.Typing(c="c1")),
        (b'{"t":"typing","c":"c1","id":5,"id":null}', p.Typing(c="c1")),
        (b'{"t":"history","c":"c1","limit":5,"limit":null}', p.History(c="c1")),
        (b'{"t":"history","c":"c1","limit":null,"limit":5}', p.History(c="c1", limit=5)),
        (b'{"t":"attach","have":{"c1":1,"c1":2}}', p.Attach(have={"c1": 2})),
    ],
)
def test_of_two_fields_of_one_name_the_last_counts(data: bytes, request_: p.AnyRequest) -> None:
    assert p.decode(data) == request_


def test_a_wrong_field_is_wrong_though_a_right_one_came_before_it() -> None:
    assert refused(b'{"t":"ping","id":2,"id":"x"}').id is None
    assert refused(b'{"t":"ping","id":2,"t":"nope"}').message == "t: no such request: nope"


# --- bounds ---------------------------------------------------------------------

IDS: Final = [("send", "c"), ("send", "cid"), ("member", "user"), ("members", "after"), ("block", "user")]


@pytest.mark.parametrize(("t", "field"), IDS)
@pytest.mark.parametrize("good", ["a", ID, "-", "_", "0", "Az09_-"])
def test_ids_that_are_allowed(t: str, field: str, good: str) -> None:
    assert getattr(decode(t, **{field: good}), field) == good


@pytest.mark.parametrize(("t", "field"), IDS)
@pytest.mark.parametrize(
    "bad",
    ["", ID + "a", " a", "a b", "a.b", "a/b", 'a"', "a\\", "é", "a\n", "\na", "a\r", "a\x00", "\u0661", "a\u2028", 1],
)
def test_ids_that_are_not(t: str, field: str, bad: object) -> None:
    assert refused(orjson.dumps({"t": t, "id": 1, **LEAST[t], field: bad})).id == 1


@pytest.mark.parametrize(
    ("t", "wrap"),
    [
        ("auth", lambda bad: {"only": ["ok", bad]}),
        ("auth", lambda bad: {"have": {"ok": 1, bad: 1}}),
        ("attach", lambda bad: {"only": [bad]}),
        ("attach", lambda bad: {"have": {bad: 1}}),
        ("open", lambda bad: {"members": [bad]}),
        ("users", lambda bad: {"ids": [bad]}),
        ("watch", lambda bad: {"users": [bad]}),
        ("send", lambda bad: {"files": [bad]}),
    ],
)
@pytest.mark.parametrize("bad", ["", "a b", "a\n", ID + "a"])
def test_ids_within_lists_and_as_keys(t: str, wrap: Any, bad: str) -> None:
    refused(orjson.dumps({"t": t, **LEAST[t], **wrap(bad)}))


@pytest.mark.parametrize(
    ("t", "field", "low", "high"),
    [
        ("ping", "id", 1, 2**31 - 1),
        ("send", "re", 1, INT),
        ("history", "before", 0, INT),
        ("history", "after", 0, INT),
        ("history", "limit", 1, INT),
        ("members", "limit", 1, INT),
        ("channels", "limit", 1, INT),
        ("read", "upto", 0, INT),
        ("auth", "ping_ms", 1, INT),
    ],
)
def test_numbers(t: str, field: str, low: int, high: int) -> None:
    for good in (low, high):
        assert getattr(decode(t, **{field: good}), field) == good
    for bad in (low - 1, high + 1, -1, 1.5, "1", True):
        refused(orjson.dumps({"t": t, **LEAST[t], field: bad}))
    refused(b'{"t":"%b","%b":%d}' % (t.encode(), field.encode(), 2**70))
    refused(b'{"t":"%b","%b":1e400}' % (t.encode(), field.encode()))


@pytest.mark.parametrize("t", ["auth", "attach"])
def test_have(t: str) -> None:
    assert getattr(decode(t, have={"c1": 0, "c2": INT}), "have") == {"c1": 0, "c2": INT}  # noqa: B009
    for bad in (-1, INT + 1, 1.5, "1", None):
        refused(orjson.dumps({"t": t, **LEAST[t], "have": {"c1": bad}}))


@pytest.mark.parametrize(
    ("t", "field", "allowed"),
    [
        ("open", "kind", ["dm", "group", "channel"]),
        ("member", "role", ["none", "banned", "member", "admin", "owner"]),
        ("notify", "level", ["all", "mentions", "none"]),
    ],
)
def test_choices(t: str, field: str, allowed: list[str]) -> None:
    for good in allowed:
        assert getattr(decode(t, **{field: good}), field) == good
    for bad in ("", allowed[0].upper(), "other", None, 0):
        refused(orjson.dumps({"t": t, **LEAST[t], field: bad}))


@pytest.mark.parametrize(("t", "field"), [("history", "raw"), ("block", "on")])
def test_truth_is_true_or_false(t: str, field: str) -> None:
    assert getattr(decode(t, **{field: True}), field) is True
    for bad in (0, 1, "true", []):
        refused(orjson.dumps({"t": t, **LEAST[t], field: bad}))


# --- malformed and invalid --------------------------------------------------------

NOT_JSON_OBJECTS: Final = [
    b"",
    b" ",
    b"hello",
    b"null",
    b"true",
    b"12",
    b'"{}"',
    b"[]",
    b'[{"t":"ping"}]',
    b"{",
    b'{"t":"ping"',
    b'{"t":"ping",}',
    b"{'t':'ping'}",
    b'{"t":"ping"} {"t":"ping"}',
    b'\xef\xbb\xbf{"t":"ping"}',
    b'{"t":"ping","id":NaN}',
    b'{"t":"send","c":"c1","cid":"m1","body":"\\ud800"}',
    b'{"t":"send","c":"c1","cid":"m1","body":"\n"}',
    b"\xff\xfe",
    # What is wrong first is only the value; what is wrong behind it is the JSON.
    b'{"t":"nope"} x',
    b'{"t":"send","c":"x y" x',
    b'{"t":5,"id":5',
    b'{"id":"a"} x',
    b'{"t":"ping","x":' + b"[" * 100_000,
    b'{"t":"nope","x":' + b'{"a":' * 100_000,
]


@pytest.mark.parametrize("data", NOT_JSON_OBJECTS, ids=lambda data: repr(data[:30]))
def test_what_is_no_json_object_is_malformed(data: bytes) -> None:
    with pytest.raises(p.Malformed):
        p.decode(data)
    p.request_id(data)  # never raises


@pytest.mark.parametrize(
    ("data", "id"),
    [
        (b'{"t":"nope","id":9}', 9),
        (b'{"id":9}', 9),
        (b'{"t":null,"id":9}', 9),
        (b'{"t":5,"id":9}', 9),
        (b'{"t":"send","id":9}', 9),
        (b'{"id":9,"t":"send","c":[]}', 9),
        (b'{"t":"send","c":[],"id":9}', 9),
        (b'{"t":"send","c":[],"id":2147483647}', 2**31 - 1),
        (b"{}", None),
        (b'{"t":"nope"}', None),
        (b'{"t":"nope","id":null}', None),
        (b'{"t":"ping","id":0}', None),
        (b'{"t":"ping","id":-1}', None),
        (b'{"t":"ping","id":2147483648}', None),
        (b'{"t":"ping","id":1.0}', None),
        (b'{"t":"ping","id":"9"}', None),
        (b'{"t":"ping","id":true}', None),
        (b'{"t":"ping","id":[9]}', None),
        (b'{"t":"ping","id":{"id":9}}', None),
        (b'{"t":"nope","x":{"id":9}}', None),
    ],
)
def test_the_id_of_an_invalid_request_is_saved_if_it_is_one(data: bytes, id: int | None) -> None:
    refusal = refused(data)
    assert refusal.id == id
    assert refusal.code == "bad_request"
    assert refusal.retry_after_ms is None


ID_SAID: Final = "an id, 1 to 64 of A-Z a-z 0-9 _ -"
SEQ_SAID: Final = "a whole number from 0 to 9007199254740991"
COUNT_SAID: Final = "a whole number from 1 to 9007199254740991"
WRONG: Final[list[tuple[str, dict[str, Any], str]]] = [
    ("edit", {}, "t: no such request: edit"),
    ("send", {"c": "a b"}, f"c: {ID_SAID}"),
    ("send", {"cid": 5}, f"cid: {ID_SAID}"),
    ("send", {"body": None}, "body: text"),
    ("send", {"re": 0}, f"re: {COUNT_SAID}"),
    ("send", {"files": ["a b"]}, f"files: an array, each of it {ID_SAID}"),
    ("history", {"c": ""}, f"c: {ID_SAID}"),
    ("history", {"limit": 0}, f"limit: {COUNT_SAID}"),
    ("history", {"before": -1}, f"before: {SEQ_SAID}"),
    ("history", {"raw": 1}, "raw: true or false"),
    ("ping", {"id": 0}, "id: a whole number from 1 to 2147483647"),
    ("auth", {"v": "1"}, "v: a whole number"),
    ("auth", {"token": 5}, "token: text"),
    ("auth", {"have": {"c1": "1"}}, f"have: an object, each key {ID_SAID}, each value {SEQ_SAID}"),
    ("attach", {"only": "c1"}, f"only: an array, each of it {ID_SAID}"),
    ("open", {"kind": "room"}, "kind: one of dm, group, channel"),
    ("member", {"role": "king"}, "role: one of none, banned, member, admin, owner"),
    ("block", {"on": "yes"}, "on: true or false"),
]


@pytest.mark.parametrize(("t", "fields", "message"), WRONG)
def test_an_error_names_the_field_and_what_is_allowed(t: str, fields: dict[str, Any], message: str) -> None:
    """It was the decoder's own text: Expected `int | null`, regular expressions, Invalid value 'edit' - at `$.t`."""
    assert refused(orjson.dumps({"t": t, **LEAST.get(t, {}), **fields})).message == message


def test_every_field_can_be_said_in_words() -> None:
    for kind in p.REQUESTS:
        for field in msgspec.structs.fields(kind):
            words = p.expected(field.type)
            assert not set(words) & set("`|$[]'"), f"{kind.__name__}.{field.name}: {words}"


def test_a_missing_field_is_named() -> None:
    assert refused(b'{"t":"typing","id":1}').message == f"c: missing; {ID_SAID}"
    assert refused(b'{"id":1}').message == "t: missing; the name of the request"
    assert refused(b'{"t":["ping"],"id":1}').message == "t: text, the name of the request"


def test_why_it_is_no_json_is_said_without_the_decoders_names() -> None:
    for data in (b"", b"{", b"[]", b'{"t":"ping","x":' + b"[" * 100_000, b'{"t":"auth","token":"\xff"}'):
        with pytest.raises(p.Malformed) as caught:
            p.decode(data)
        assert not re.search(r"codec|recursion|str|dict|deserializ", str(caught.value)), caught.value


def test_the_id_of_a_request_that_is_not_looked_at() -> None:
    assert p.request_id(b'{"t":"whatever","id":9,"c":[]}') == 9
    for data in (b'{"t":"ping"}', b'{"id":"9"}', b'{"id":0}', b"[9]", b"{", b"", b"\xff"):
        assert p.request_id(data) is None


def test_an_error_does_not_send_a_large_request_back() -> None:
    assert len(refused(orjson.dumps({"t": "x" * 60_000})).message) <= 200


# --- what goes out ------------------------------------------------------------------


def test_ok() -> None:
    assert p.ok(7) == p.ok(7, {}) == b'{"t":"ok","id":7}'
    assert orjson.loads(p.ok(7, {"more": False})) == {"t": "ok", "id": 7, "more": False}


@given(st.integers(1, 2**31 - 1), st.integers(1, INT), st.integers(0, INT), st.booleans())
def test_ok_sent_is_what_ok_would_say(id: int, seq: int, ts: int, dup: bool) -> None:
    assert p.ok_sent(id, seq, ts, dup) == p.ok(id, {"s": seq, "ts": ts, **({"dup": True} if dup else {})})


@given(st.none() | st.integers(1, 2**31 - 1), st.text(), st.none() | st.integers(0, 10**6))
def test_error(id: int | None, message: str, retry: int | None) -> None:
    wire = p.error(id, "rate_limited", message, retry)
    expected = {"t": "error", "id": id, "code": "rate_limited", "message": message, "retry_after_ms": retry}
    assert orjson.loads(wire) == {name: value for name, value in expected.items() if value is not None}


def test_an_error_without_an_id_has_none() -> None:
    assert "id" not in orjson.loads(p.error(None, "bad_request", "no"))


ids = st.from_regex(re.compile(p.ID_PATTERN), fullmatch=True)
seqs = st.integers(1, INT)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-INT, INT) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
HEAD: Final = ("t", "c", "s", "from", "ts", "cid")


@given(
    st.sampled_from(tuple(ENTRY_TYPES)),
    ids,
    seqs,
    ids,
    seqs,
    ids,
    st.dictionaries(st.text().filter(lambda name: name not in HEAD), json_values, max_size=4),
)
@example("msg", "c", 1, "u", 1, "m", {})
@example("msg", "c", 1, "u", 1, "m", {"body": '"\\\n\u2028\x00'})
def test_an_entry_is_json_with_what_was_put_in(
    t: str, conv: str, seq: int, sender: str, ts: int, cid: str, fields: dict[str, Any]
) -> None:
    wire = p.encode_entry(t, conv, seq, sender, ts, cid, orjson.dumps(fields))
    entry = orjson.loads(wire)
    assert tuple(entry)[:6] == HEAD
    assert entry == {"t": t, "c": conv, "s": seq, "from": sender, "ts": ts, "cid": cid, **fields}
    assert b"\n" not in wire


@given(st.text(max_size=70))
@example("a\n")
@example('a"')
@example("\u0661")
def test_what_may_be_an_id_needs_no_escaping(text: str) -> None:
    """encode_entry puts ids into JSON as they are."""
    if re.search(p.ID_PATTERN, text):
        assert orjson.dumps(text) == b'"%b"' % text.encode()
        assert 1 <= len(text) <= 64
        assert text.isascii()


def test_the_servers_own_names_need_no_escaping() -> None:
    for name in (*p.PUSHES, *ENTRY_TYPES, *p.MEMBER_ROLES):
        assert re.search(p.ID_PATTERN, name)


# --- anything at all ------------------------------------------------------------------


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """All values that a field of this type may have."""
    origin, args, meta = kinds_of(annotation)
    if origin in (Union, UnionType):
        return st.one_of([st.none() if one is type(None) else values(one) for one in args])
    if origin is Literal:
        return st.sampled_from(args)
    if origin is list:
        return st.lists(values(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    if origin is str:
        return ids if meta is not None else st.text()
    if origin is int:
        return st.integers(-INT, INT) if meta is None else st.integers(meta.ge, meta.le)
    assert origin is bool, annotation
    return st.booleans()


requests = st.one_of(
    [
        st.builds(kind, **{field.name: values(field.type) for field in msgspec.structs.fields(kind)})
        for kind in p.REQUESTS
    ]
)


@given(requests)
def test_every_valid_request_comes_back_as_it_was(request: p.Request) -> None:
    assert p.decode(msgspec.json.encode(request)) == request
    assert p.request_id(msgspec.json.encode(request)) == request.id


def decodes_or_refuses(data: bytes) -> None:
    """Nothing but the two documented exceptions, and what they say can be told."""
    salvaged = p.request_id(data)
    try:
        request = p.decode(data)
    except p.InvalidRequest as exc:
        refusal = orjson.loads(p.error(exc.id, exc.code, exc.message))
    except p.Malformed as exc:
        str(exc)[:100].encode()  # it becomes a close reason
        return
    else:
        assert type(request) in p.REQUESTS
        assert request.id == salvaged
        return
    assert refusal["code"] == "bad_request"
    assert 1 <= refusal.get("id", 1) < 2**31


@given(st.binary(max_size=200))
@example(b'{"t":"auth","token":"\xed\xa0\x80"}')
@example(b'{"t":"nope","\xff":1}')
def test_any_bytes(data: bytes) -> None:
    decodes_or_refuses(data)


@given(json_values)
def test_any_json(value: Any) -> None:
    decodes_or_refuses(orjson.dumps(value))


@given(
    st.sampled_from(sorted(LEAST)) | st.text(max_size=8),
    st.dictionaries(
        st.sampled_from(sorted({field.encode_name for kind in p.REQUESTS for field in msgspec.structs.fields(kind)})),
        json_values,
    ),
)
def test_any_values_in_known_fields(t: str, fields: dict[str, Any]) -> None:
    decodes_or_refuses(orjson.dumps({"t": t, **fields}))


@given(requests, st.data())
def test_any_damage_to_a_valid_request(request: p.Request, data: st.DataObject) -> None:
    wire = bytearray(msgspec.json.encode(request))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(wire) - 1))
        wire[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not wire:
            break
    decodes_or_refuses(bytes(wire))


# --- codes -----------------------------------------------------------------------------


def test_error_codes_are_one_to_one() -> None:
    codes = [kind.code for kind in errors.ALL]
    assert len(set(codes)) == len(codes)
    subclasses = {kind for kind in errors.ChatError.__subclasses__() if kind.__module__ == errors.__name__}
    assert set(errors.ALL) == subclasses
    assert all(400 <= kind.http_status < 600 for kind in errors.ALL)


def test_close_codes_are_ones_that_may_be_sent() -> None:
    """RFC 6455, 7.4: 1004 to 1006 and 1015 never are; 4000 to 4999 are an application's own."""
    for code in p.CloseCode:
        assert code in {1001, 1002, 1003, 1007, 1009, 1012, 1013} or 4000 <= code <= 4199


def test_entries_are_no_other_pushes() -> None:
    assert not set(ENTRY_TYPES) & set(p.PUSHES)
