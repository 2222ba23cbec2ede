"""The wire protocol, version 1: every message, error and close code in one place.

``docs/protocol.md`` is the document; ``tests/test_protocol_doc.py`` holds the two
together. Inbound requests are typed structs that msgspec decodes and validates
in one pass; outbound messages are made with orjson, except for log entries,
which are assembled from bytes that are already JSON (:func:`encode_entry`).
"""

from __future__ import annotations

import functools
from enum import IntEnum
from types import UnionType
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin

import msgspec
import orjson

from .errors import BadRequest

VERSION: Final = 1
SUBPROTOCOL: Final = "chatcore.v1"

# Integers stay below 2^53 so that JavaScript clients hold them exactly.
MAX_INT: Final = 2**53 - 1
# No server message is larger; a page is cut at it and says ``more``.
MAX_SERVER_MESSAGE_BYTES: Final = 256 * 1024

# \Z, not $: that would let a newline pass at the end, and ids go out unescaped (encode_entry).
ID_PATTERN: Final = r"^[A-Za-z0-9_-]{1,64}\Z"

# The descriptions are what a client reads when a value is refused ("limit: a whole number from 1 to ..."): in the
# words of the document, see :func:`expected`.
ID_WORDS: Final = "an id, 1 to 64 of A-Z a-z 0-9 _ -"

Id = Annotated[str, msgspec.Meta(pattern=ID_PATTERN, description=ID_WORDS)]
#: An :data:`Id` whose pattern :func:`decode` checks itself: in msgspec the check takes 1.5 µs, and all else of a
#: ``send`` 0.6 µs.
QuickId = Annotated[str, msgspec.Meta(extra={"pattern": ID_PATTERN}, description=ID_WORDS)]
Seq = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT, description=f"a whole number from 0 to {MAX_INT}")]
RequestId = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1, description=f"a whole number from 1 to {2**31 - 1}")]
#: A whole number from 1: a seq that exists, a size of a page, a duration.
Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_INT, description=f"a whole number from 1 to {MAX_INT}")]

Kind = Literal["dm", "group", "channel"]
Role = Literal["none", "banned", "member", "admin", "owner"]
Level = Literal["all", "mentions", "none"]

#: Roles whose holder is in the conversation, by rising power.
MEMBER_ROLES: Final = ("member", "admin", "owner")


class CloseCode(IntEnum):
    """Close codes. 1xxx and 40xx: come back; 41xx: only when something changed."""

    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED = 1003
    NOT_UTF8 = 1007
    TOO_BIG = 1009
    RESTART = 1012
    OVER_CAPACITY = 1013
    INTERNAL = 4000
    TOO_SLOW = 4002
    NO_PONG = 4003
    FLOODING = 4004
    NO_AUTH = 4005
    BAD_TOKEN = 4101
    BAD_VERSION = 4102
    MALFORMED = 4103
    TOO_MANY_CONNECTIONS = 4104


class Request(msgspec.Struct, tag_field="t", frozen=True, gc=False, kw_only=True):
    """The field of every request: ``id`` (a request without it is not answered)."""

    id: RequestId | None = None


class Auth(Request, tag="auth", frozen=True):
    """Log in on this connection, or renew the token of a live session."""

    token: str
    v: int = VERSION
    sync: str | None = None
    have: dict[Id, Seq] | None = None
    only: list[Id] | None = None
    ping_ms: Count | None = None


class Send(Request, tag="send", frozen=True):
    """Append a message. ``files`` is a field so that they are refused, not dropped silently."""

    c: QuickId
    cid: QuickId
    body: str
    re: Count | None = None
    data: str | None = None
    files: list[Id] | None = None


def is_id(text: str) -> bool:
    """Whether the text matches :data:`ID_PATTERN`."""
    # Of ASCII, letters and digits alone are alphanumeric.
    return 0 < len(text) <= 64 and text.isascii() and text.replace("-", "0").replace("_", "0").isalnum()


def bad_ids(req: Send) -> str | None:
    """The error message for the ids of a ``send``, None if they are valid. To be called after making one, since
    the struct does not check them."""
    for name, id in (("c", req.c), ("cid", req.cid)):
        if not is_id(id):
            return f"{name}: {ID_WORDS}"
    return None


class History(Request, tag="history", frozen=True):
    """One page of entries, ascending; the newest page without a bound."""

    c: Id
    before: Seq | None = None
    after: Seq | None = None
    limit: Count = 50
    raw: bool = False


class Attach(Request, tag="attach", frozen=True):
    """Replace the choice of attached conversations, or add more ``have``."""

    only: list[Id] | None = None
    have: dict[Id, Seq] | None = None


class Read(Request, tag="read", frozen=True):
    """Move the own read mark (it never moves back)."""

    c: Id
    upto: Seq


class Typing(Request, tag="typing", frozen=True):
    """Signal to the other members that this user is typing."""

    c: Id


class Open(Request, tag="open", frozen=True):
    """Make a conversation, or find the one this very request made before."""

    kind: Kind
    cid: Id
    title: str | None = None
    members: list[Id] | None = None


class Member(Request, tag="member", frozen=True):
    """Join, invite, leave, remove, ban, appoint."""

    c: Id
    user: Id
    role: Role


class Meta(Request, tag="meta", frozen=True):
    """Change the title."""

    c: Id
    cid: Id
    title: str


class Notify(Request, tag="notify", frozen=True):
    """Set which messages of a conversation notify this user."""

    c: Id
    level: Level


class Members(Request, tag="members", frozen=True):
    """A page of the members, by user id."""

    c: Id
    after: Id | None = None
    limit: Count = 50


class Users(Request, tag="users", frozen=True):
    """Look up users by id; unknown ones are left out of the answer."""

    ids: list[Id]


class Channels(Request, tag="channels", frozen=True):
    """A page of the public directory of channels, by title."""

    prefix: str | None = None
    after: str | None = None
    limit: Count = 50


class Watch(Request, tag="watch", frozen=True):
    """Replace the set of users whose presence is pushed."""

    users: list[Id]


class Block(Request, tag="block", frozen=True):
    """Refuse direct messages from a user, or allow them again."""

    user: Id
    on: bool


class Ping(Request, tag="ping", frozen=True):
    """A liveness check for clients that see no WebSocket pings."""


AnyRequest = (
    Auth
    | Send
    | History
    | Attach
    | Read
    | Typing
    | Open
    | Member
    | Meta
    | Notify
    | Members
    | Users
    | Channels
    | Watch
    | Block
    | Ping
)

#: The requests, each in the union once.
REQUESTS: Final[tuple[type[AnyRequest], ...]] = get_args(AnyRequest)

#: Pushes and replies that this version can send, by ``t``, beside entries (:data:`~chatcore.entries.ENTRY_TYPES`).
PUSHES: Final = ("hello", "ok", "error", "conv", "ready", "typing", "read", "presence", "user")


class Malformed(Exception):
    """Not a JSON object: the connection is closed with 4103."""


class _IdOnly(msgspec.Struct, gc=False):
    id: RequestId | None = None


S = TypeVar("S", bound=msgspec.Struct)

_decoder: Final[msgspec.json.Decoder[AnyRequest]] = msgspec.json.Decoder(AnyRequest)
_object: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_id_only: Final = msgspec.json.Decoder(_IdOnly)
_by_tag: Final[dict[str, type[AnyRequest]]] = {str(kind.__struct_config__.tag): kind for kind in REQUESTS}


class InvalidRequest(BadRequest):
    """A JSON object that is no valid request; ``id`` as far as it had one."""

    def __init__(self, message: str, id: int | None) -> None:
        super().__init__(message)
        self.id = id


# Exceptions of a decoder for bytes that are no JSON. (ValidationError, a subclass of the first, means valid JSON of
# another shape and is to be caught before.)
_NOT_JSON: Final = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)
# An error quotes an unknown `t` only so far: the client knows what it sent.
_QUOTE_CHARS: Final = 40


def decode(data: bytes) -> AnyRequest:
    """Decode and validate one request.

    :raises InvalidRequest: a JSON object, but not a valid request.
    :raises Malformed: not a JSON object at all.
    """
    try:
        req = _decoder.decode(data)
    except msgspec.ValidationError:
        req = _decode_slowly(data)
    except _NOT_JSON as exc:
        raise Malformed(_not_json(exc)) from None
    if type(req) is Send:
        why = bad_ids(req)
        if why is not None:
            raise InvalidRequest(why, req.id)
    return req


def _decode_slowly(data: bytes) -> AnyRequest:
    """Decode a request that the decoder refused. The decoder does not accept ``null`` for an absent field, nor two
    fields of one name of which the first is wrong, and its messages are for Python programmers.
    """
    fields = _fields_of(data)
    id = _as_request_id(fields.get("id"))
    try:
        return from_fields(_kind_of(fields), fields)
    except BadRequest as exc:
        raise InvalidRequest(exc.message, id) from None


def _fields_of(data: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a JSON object, of two of one name the last.

    :raises Malformed: it is none. (The decoder stops at the first fault; this reads to the end.)
    """
    try:
        return _object.decode(data)
    except msgspec.ValidationError:
        raise Malformed("not a JSON object") from None
    except _NOT_JSON as exc:
        raise Malformed(_not_json(exc)) from None


def _not_json(exc: Exception) -> str:
    if isinstance(exc, RecursionError):
        return "nested too deeply"
    return "not UTF-8" if isinstance(exc, UnicodeDecodeError) else str(exc)


def _kind_of(fields: dict[str, msgspec.Raw]) -> type[AnyRequest]:
    """Which request it is, by its ``t``.

    :raises BadRequest: none that this version knows.
    """
    raw = fields.get("t")
    if raw is None:
        raise BadRequest("t: missing; the name of the request")
    try:
        t = msgspec.json.decode(raw, type=str)
    except msgspec.ValidationError:
        raise BadRequest("t: text, the name of the request") from None
    except _NOT_JSON as exc:
        raise Malformed(_not_json(exc)) from None
    kind = _by_tag.get(t)
    if kind is None:
        raise BadRequest(f"t: no such request: {t[:_QUOTE_CHARS]}")
    return kind


# Looking at the fields of a struct takes far longer than decoding it.
_fields_of_struct: Final = functools.cache(msgspec.structs.fields)


def from_fields(kind: type[S], fields: dict[str, msgspec.Raw]) -> S:
    """Make a struct of the fields of a JSON object, ignoring unknown ones and ``null`` for optional ones. Slow: for
    input that the decoder refused.

    :raises BadRequest: names the field that is wrong and what is allowed, in the words of the document.
    :raises Malformed: a field is not JSON.
    """
    values: dict[str, Any] = {}
    for field in _fields_of_struct(kind):
        raw = fields.get(field.encode_name)
        if raw is None:
            if field.required:
                raise BadRequest(f"{field.encode_name}: missing; {expected(field.type)}")
        elif field.required or bytes(raw) != b"null":
            try:
                values[field.name] = msgspec.json.decode(raw, type=field.type)
            except msgspec.ValidationError:
                raise BadRequest(f"{field.encode_name}: {expected(field.type)}") from None
            except _NOT_JSON as exc:
                raise Malformed(_not_json(exc)) from None
    return kind(**values)


def expected(annotation: Any) -> str:
    """The values that a field of this type may have, in the words of the document."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return str(args[1].description)
    if origin is Literal:
        return "one of " + ", ".join(args)
    if origin in (Union, UnionType):
        return expected(next(arg for arg in args if arg is not type(None)))
    if origin is list:
        return f"an array, each of it {expected(args[0])}"
    if origin is dict:
        return f"an object, each key {expected(args[0])}, each value {expected(args[1])}"
    return {str: "text", int: "a whole number", bool: "true or false"}[annotation]


def decode_body(data: bytes, kind: type[S]) -> S:
    """Decode the body of an HTTP request.

    :raises BadRequest: not a JSON object, or a field is wrong.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        pass
    except _NOT_JSON as exc:
        raise BadRequest(f"the body: {_not_json(exc)}") from None
    try:
        return from_fields(kind, _fields_of(data))
    except Malformed as exc:
        raise BadRequest(f"the body: {exc}") from None


def _as_request_id(raw: msgspec.Raw | None) -> int | None:
    try:
        return None if raw is None else msgspec.json.decode(raw, type=RequestId)
    except msgspec.ValidationError:
        return None


def request_id(data: bytes) -> int | None:
    """The ``id`` of a request that is refused undecoded; None if it has none."""
    try:
        return _id_only.decode(data).id
    except _NOT_JSON:
        return None


dumps = orjson.dumps


def ok(id: int, fields: dict[str, Any] | None = None) -> bytes:
    """The reply to a request that succeeded."""
    if not fields:
        return b'{"t":"ok","id":%d}' % id
    return orjson.dumps({"t": "ok", "id": id, **fields})


def conv_left(conv: str) -> bytes:
    """The push to a user who is no longer in a conversation."""
    return b'{"t":"conv","c":"%b","role":"none"}' % conv.encode()


def ok_sent(id: int, seq: int, ts: int, dup: bool) -> bytes:
    """The reply to ``send``. On the hot path, hence without a dict."""
    if dup:
        return b'{"t":"ok","id":%d,"s":%d,"ts":%d,"dup":true}' % (id, seq, ts)
    return b'{"t":"ok","id":%d,"s":%d,"ts":%d}' % (id, seq, ts)


def error(id: int | None, code: str, message: str, retry_after_ms: int | None = None) -> bytes:
    """The reply to a request that was refused."""
    fields: dict[str, Any] = {"t": "error", "code": code, "message": message}
    if id is not None:
        fields["id"] = id
    if retry_after_ms is not None:
        fields["retry_after_ms"] = retry_after_ms
    return orjson.dumps(fields)


def encode_entry(t: str, conv: str, seq: int, sender: str, ts: int, cid: str, fields: bytes) -> bytes:
    """A log entry as it goes over the wire.

    ``fields`` is a JSON object (``{…}``) with what the type adds; ids and cids
    match :data:`ID_PATTERN`, so nothing here needs escaping.
    """
    head = f'{{"t":"{t}","c":"{conv}","s":{seq},"from":"{sender}","ts":{ts},"cid":"{cid}"'.encode()
    if len(fields) > 2:
        return b"%b,%b" % (head, fields[1:])
    return head + b"}"
