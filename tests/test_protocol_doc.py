"""docs/protocol.md and the code cannot drift apart.

The tables of the document are compared with the structs, the codes, the limits and the routes, in both
directions; its examples are decoded, or checked against its tables; and what a real server sends is
checked against them, too. Whoever changes one side is told here what the other side says.
"""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
import re
import types
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast

import msgspec
import orjson
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from chatcore import errors
from chatcore import protocol as p
from chatcore.entries import ENTRY_TYPES
from chatcore.server import api as routes
from chatcore.server.connections import _make_hello
from chatcore.server.session import conv_push
from chatcore.settings import Settings
from chatcore.store.base import View

from .server import PATIENCE_S, Server

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "protocol.md"
Json = dict[str, Any]
#: All that the server sends, by `t`.
PUSHES: Final = (*p.PUSHES, *ENTRY_TYPES)


# --- reading the document ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Field:
    """One row of a table of fields."""

    type: str
    presence: str

    @property
    def choices(self) -> list[str] | None:
        return re.findall(r"`([^`]*)`", self.type) if self.type.startswith("one of ") else None


@dataclasses.dataclass
class Section:
    """What stands under one heading: its tables by the title of their first column, its examples, its text."""

    tables: dict[str, list[list[str]]] = dataclasses.field(default_factory=dict)
    examples: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # (kind, text)
    text: str = ""

    def fields(self, table: str = "Field") -> dict[str, Field]:
        rows = self.tables.get(table, [])
        found = {row[0].strip("`"): Field(row[1], row[2]) for row in rows}
        assert len(found) == len(rows), f"a field stands twice in {rows}"
        return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@cache
def document() -> dict[str, dict[str, Section]]:
    """Chapter -> part -> section; what stands before the first part of a chapter is under ""."""
    chapters: dict[str, dict[str, Section]] = {}
    section = Section()
    table: list[list[str]] | None = None
    fence: list[str] | None = None
    kind = ""
    for line in DOCUMENT.read_text().splitlines():
        if fence is not None:
            if line.startswith("```"):
                section.examples.append((kind, "\n".join(fence)))
                fence = None
            else:
                fence.append(line)
        elif line.startswith("```"):
            fence, kind, table = [], line[3:], None
        elif line.startswith("## "):
            section = Section()
            assert line[3:] not in chapters, f"{line!r} stands twice"
            chapters[line[3:]] = {"": section}
            table = None
        elif line.startswith("### "):
            section = Section()
            sections = list(chapters.values())[-1]
            assert line[4:] not in sections, f"{line!r} stands twice in its chapter"
            sections[line[4:]] = section
            table = None
        elif line.startswith("|"):
            if table is None:
                title = _cells(line)[0]
                assert title not in section.tables, f"two tables {title!r} in one section"
                table = section.tables[title] = []
            elif not set(line) <= set("|-: "):
                table.append(_cells(line))
        else:
            table = None
            section.text += line + "\n"
    assert fence is None, "a code block is not closed"
    return chapters


def chapter(name: str) -> dict[str, Section]:
    assert name in document(), f"docs/protocol.md has no chapter {name!r}"
    return document()[name]


def parts(name: str) -> dict[str, Section]:
    """The parts of a chapter whose heading is code: those that describe a message, a request or a route."""
    return {part.strip("`"): section for part, section in chapter(name).items() if part.startswith("`")}


def same(documented: Any, code: Any, what: str) -> None:
    """Both ways; says which side has what."""
    documented, code = set(documented), set(code)
    assert documented == code, (
        f"{what}: only docs/protocol.md has {sorted(map(str, documented - code))}, "
        f"only the code has {sorted(map(str, code - documented))}"
    )


# --- the types of the document -------------------------------------------------------

CHOICE: Final = re.compile(r"one of (`[^`]+`)(, `[^`]+`)*")


def is_id(value: Any) -> bool:
    return isinstance(value, str) and re.search(p.ID_PATTERN, value) is not None


def is_int(value: Any, low: int = -p.MAX_INT, high: int = p.MAX_INT) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(of(item) for item in value)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


#: What each type of the document means, for values.
TYPES: Final[dict[str, Callable[[Any], bool]]] = {
    "id": is_id,
    "seq": lambda v: is_int(v, 0),
    "count": lambda v: is_int(v, 1),
    "integer": is_int,
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "request id": lambda v: is_int(v, 1, 2**31 - 1),
    "time": lambda v: is_int(v, 1_500_000_000_000, 5_000_000_000_000),
    "ms": lambda v: is_int(v, 0),
    "string": lambda v: isinstance(v, str),
    "bool": lambda v: isinstance(v, bool),
    "object": is_object,
    "array of id": lambda v: is_list(v, is_id),
    "array of object": lambda v: is_list(v, is_object),
    "array of string": lambda v: is_list(v, lambda item: isinstance(item, str)),
    "map of id to seq": lambda v: is_object(v) and all(is_id(key) and is_int(seq, 0) for key, seq in v.items()),
    "entry": is_object,
    "array of entry": lambda v: is_list(v, is_object),
}


def is_of(value: Any, field: Field) -> bool:
    return value in field.choices if field.choices is not None else TYPES[field.type](value)


def described(annotation: Any) -> str:
    """How the document calls the type of a field of a struct."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        base, meta = args
        if base is str and p.ID_PATTERN in (meta.pattern, (meta.extra or {}).get("pattern")):
            return "id"
        if base is int:
            bounds = {(0, p.MAX_INT): "seq", (1, p.MAX_INT): "count", (1, 2**31 - 1): "request id"}
            return bounds.get((meta.ge, meta.le), f"a new kind of number: {meta}")
        return f"a new type: {annotation}"
    if origin in (typing.Union, types.UnionType):
        (some,) = (arg for arg in args if arg is not type(None))
        return described(some)
    if origin is Literal:
        return "one of " + ", ".join(f"`{arg}`" for arg in args)
    if origin is list:
        return f"array of {described(args[0])}"
    if origin is dict:
        return f"map of {described(args[0])} to {described(args[1])}"
    simple: dict[Any, str] = {str: "string", int: "integer", bool: "bool"}
    return simple.get(annotation, f"a new type: {annotation}")


def struct_fields(kind: type[msgspec.Struct]) -> dict[str, Field]:
    """The fields of a struct, as the document would have them."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found: dict[str, Field] = {}
    for field in msgspec.structs.fields(kind):
        if field.required:
            presence = "required"
        elif field.default is None:
            presence = "optional"
        else:
            presence = f"default {json.dumps(field.default)}"
        found[field.encode_name] = Field(described(hints[field.name]), presence)
    return found


def same_fields(documented: dict[str, Field], code: dict[str, Field], what: str) -> None:
    same(documented, code, f"the fields of {what}")
    for name, field in code.items():
        assert documented[name] == field, f"{what}, field {name}: docs/protocol.md {documented[name]}, the code {field}"


# --- messages against the tables ------------------------------------------------------


def entry_fields(t: str) -> dict[str, Field]:
    return chapter("Entries")[""].fields() | parts("Entries")[t].fields()


def documented_push(t: str) -> dict[str, Field]:
    if t in parts("Entries"):
        return entry_fields(t)
    assert t in parts("Pushes"), f"docs/protocol.md has no push {t!r}"
    return parts("Pushes")[t].fields()


def documented_ok(request: str) -> dict[str, Field]:
    return parts("Envelope")["ok"].fields() | parts("Requests")[request].fields("Reply field")


def paths(value: Json, fields: dict[str, Field], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a message with its path, as the document names it."""
    for name, item in value.items():
        path = prefix + name
        yield path, item
        field = fields.get(path)
        if field is not None and field.type == "object" and is_object(item):
            yield from paths(item, fields, path + ".")
        elif field is not None and field.type == "array of object" and isinstance(item, list):
            for one in item:
                yield from paths(one, fields, path + "[].")


def absent(value: Any, fields: dict[str, Field], prefix: str = "") -> Iterator[str]:
    """Every field that a message could have had and has not, with its path."""
    for path, field in fields.items():
        name = path[len(prefix) :]
        if not path.startswith(prefix) or "." in name:
            continue
        if name not in value:
            yield path
        elif field.type == "object":
            yield from absent(value[name], fields, path + ".")
        elif field.type == "array of object":
            for one in value[name]:
                yield from absent(one, fields, path + "[].")


def check(value: Json, fields: dict[str, Field], what: str, seen: set[str] | None = None) -> None:
    """A message has what the document says, and nothing else."""
    without = set(absent(value, fields))
    missing = [path for path in sorted(without) if fields[path].presence in ("always", "required")]
    assert not missing, f"{what} lacks {missing}, which docs/protocol.md says is always there: {value}"
    if seen is not None:
        seen.update("no " + path for path in without)
    for path, item in paths(value, fields):
        assert path in fields, f"{what} has a field {path!r} that docs/protocol.md does not know: {value}"
        assert is_of(item, fields[path]), f"{what}, field {path}: {item!r} is no {fields[path].type}"
        if seen is not None:
            seen.add(path)
        if fields[path].type in ("entry", "array of entry"):
            for entry in [item] if fields[path].type == "entry" else item:
                check(entry, entry_fields(entry["t"]), f"an entry in {what}")


def both_ways(fields: dict[str, Field]) -> Iterator[str]:
    """What has to be seen of these fields, in the terms of `check`: all of them, and optional ones absent, too."""
    for path, field in fields.items():
        yield path
        if field.presence == "optional":
            yield "no " + path


def check_push(push: Json, seen: set[tuple[str, str]] | None = None) -> None:
    mine: set[str] = set()
    check(push, documented_push(push["t"]), f"push {push['t']}", mine)
    if seen is not None:
        seen.update((push["t"], path) for path in mine)


def check_reply(request: str, reply: Json) -> set[str]:
    seen: set[str] = set()
    if reply["t"] == "ok":
        check(reply, documented_ok(request), f"the ok of {request}", seen)
    else:
        check(reply, parts("Envelope")["error"].fields(), f"the error of {request}")
        assert reply["code"] in error_codes(), reply
        assert ("retry_after_ms" in reply) == (reply["code"] in ("rate_limited", "unavailable")), reply
    return seen


def error_codes() -> dict[str, int]:
    return {row[0].strip("`"): int(row[1]) for row in chapter("Error codes")[""].tables["Code"]}


# --- the document itself -----------------------------------------------------------------

FIELD_TABLES: Final = ("Field", "Reply field", "Answer field", "Parameter")


def all_fields() -> list[tuple[str, str, Field]]:
    return [
        (f"{name} / {part} / {table}", path, field)
        for name, sections in document().items()
        for part, section in sections.items()
        for table in FIELD_TABLES
        for path, field in section.fields(table).items()
    ]


def test_every_type_is_explained() -> None:
    explained = {row[0].strip("`") for row in chapter("Types")[""].tables["Type"]}
    for where, path, field in all_fields():
        if not CHOICE.fullmatch(field.type):
            assert field.type in TYPES, f"{where}, {path}: unknown type {field.type!r}"
            assert field.type in explained or field.type == "array of string", f"{field.type!r} is not explained"
    same(explained, set(TYPES) - {"array of string"}, "the types")


def test_the_bounds_of_the_types() -> None:
    said = {row[0].strip("`"): row[1] for row in chapter("Types")[""].tables["Type"]}
    assert "^" + said["id"].split("`")[1] + r"\Z" == p.ID_PATTERN
    for name, low, high in (("seq", 0, p.MAX_INT), ("count", 1, p.MAX_INT), ("request id", 1, 2**31 - 1)):
        assert f"{low} to {high} " in said[name] + " ", f"{name}: {said[name]}"


def test_presence_is_said_in_the_same_words_everywhere() -> None:
    for where, path, field in all_fields():
        said = ("required", "optional", "always")
        assert field.presence in said or field.presence.startswith("default "), f"{where}, {path}: {field.presence!r}"


def test_every_link_leads_somewhere() -> None:
    text = DOCUMENT.read_text()
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    for target in re.findall(r"\]\(#([^)]*)\)", text):
        assert target in anchors, f"#{target} leads nowhere"
    for target in re.findall(r"\]\(([^#)][^)]*)\)", text):
        assert (DOCUMENT.parent / target).exists(), f"{target} is not there"
    contents = re.findall(r"^\d+\. \[([^]]*)\]", text, flags=re.M)
    assert contents == list(document()), "the table of contents is not that of the document"


def test_the_anchor_of_a_part_is_the_one_that_is_meant() -> None:
    """Two parts of one name (the push `read`, the request `read`): a link leads to the first."""
    first: dict[str, str] = {}
    for name, sections in document().items():
        for part in sections:
            first.setdefault(part.strip("`"), name)
    for target in re.findall(r"\]\(#([a-z]+)\)", DOCUMENT.read_text()):
        if first.get(target):
            others = [name for name, sections in document().items() if f"`{target}`" in sections]
            assert len(others) == 1, f"#{target} may mean {others}"


# --- requests -------------------------------------------------------------------------------


def tag(kind: type[p.Request]) -> str:
    return str(kind.__struct_config__.tag)


def test_requests_are_the_documented_ones() -> None:
    same(parts("Requests"), map(tag, p.REQUESTS), "requests")


@pytest.mark.parametrize("kind", p.REQUESTS, ids=tag)
def test_the_fields_of_a_request(kind: type[p.Request]) -> None:
    code = struct_fields(kind)
    del code["id"]
    same_fields(parts("Requests")[tag(kind)].fields(), code, f"request {tag(kind)}")


def test_the_envelope_of_a_request() -> None:
    documented = chapter("Envelope")[""].fields()
    assert documented.pop("t") == Field("string", "required")
    same_fields(documented, struct_fields(p.Request), "every request")


@pytest.mark.parametrize("t", [*parts("Requests"), *parts("HTTP")])
def test_the_errors_of_a_request_exist(t: str) -> None:
    section = (parts("Requests") | parts("HTTP"))[t]
    for code, *_ in section.tables.get("Error", []):
        assert code.strip("`") in error_codes(), f"{t}: {code} is no error code"


# --- codes ------------------------------------------------------------------------------------


def test_error_codes() -> None:
    same(error_codes().items(), {kind.code: kind.http_status for kind in errors.ALL}.items(), "error codes")


def test_close_codes() -> None:
    rows = {int(row[0]): row[2] for row in chapter("Close codes")[""].tables["Code"]}
    same(rows, map(int, p.CloseCode), "close codes")
    for code, back in rows.items():
        said = "no" if code >= 4100 else "yes"
        assert back.startswith(said), f"{code}: coming back has to be {said!r} for every client that only knows ranges"


def test_no_other_close_code_is_spoken_of() -> None:
    text = DOCUMENT.read_text()
    spoken = set(map(int, re.findall(r"(?:[Cc]lose[sd]? (?:with )?|\()(\d{4})\b", text)))
    assert spoken - {1000} <= set(map(int, p.CloseCode)), f"no close codes: {spoken - {1000, *p.CloseCode}}"
    assert len(spoken) > 5, "the pattern finds nothing any more"


# --- what the server pushes ----------------------------------------------------------------------


def test_pushes_and_replies() -> None:
    same(
        [*parts("Pushes"), *parts("Entries"), *parts("Envelope")],
        PUSHES,
        "pushes and replies",
    )
    same(parts("Entries"), ENTRY_TYPES, "entries")


@cache
def hello() -> Json:
    """What a worker with default settings says first."""
    frame = _make_hello(Settings.default(), "0.0.0")
    message: Json = orjson.loads(frame[frame.index(b"{") :])
    return message


def test_hello_and_its_limits() -> None:
    check_push(hello())
    same({path for path, _ in paths(hello(), documented_push("hello"))}, documented_push("hello"), "hello")


def view(**fields: Any) -> View:
    entry = p.encode_entry("msg", "c1", 3, "u1", 1_700_000_000_000, "m1", b'{"body":"hi"}')
    least: Json = dict.fromkeys(View.__struct_fields__, 0)
    some = {"conv": "c1", "kind": "group", "title": "Lunch", "with_id": None, "with_name": None, "role": "member"}
    return View(**least | some | {"notify": "all", "last": entry} | fields)


def test_conv() -> None:
    seen: set[tuple[str, str]] = set()
    for push in (
        conv_push(view(), 0),
        conv_push(view(title=None, last=None), None),
        conv_push(view(kind="dm", title=None, with_id="u2", with_name="bob"), None),
        b'{"t":"conv","c":"c1","role":"none"}',
    ):
        check_push(orjson.loads(push), seen)
    same({path for _, path in seen}, both_ways(documented_push("conv")), "conv (no: without)")


def test_a_refusal() -> None:
    check(orjson.loads(p.error(7, "rate_limited", "why", 5)), parts("Envelope")["error"].fields(), "error")
    check(orjson.loads(p.error(None, "bad_request", "why")), parts("Envelope")["error"].fields(), "error")


# --- limits ----------------------------------------------------------------------------------------

#: Settings of these groups that no client can notice.
INTERNAL: Final = {
    "limits.outbox_low_water_bytes",
    "limits.http_connections_per_worker",
    "limits.append_queue",
    "limits.ring",
    "limits.ring_bytes",
    "timeouts.still_worker_ms",
    "timeouts.stuck_worker_ms",
    "timeouts.stuck_writer_ms",
    "timeouts.worker_start_ms",
    "accounts.password_hash_memory_kib",
    "accounts.password_hash_time",
    "accounts.password_hash_parallel",
    "accounts.password_hash_queue",
}


def limit_rows() -> dict[str, list[str]]:
    return {row[3].strip("`"): row for row in chapter("Limits and rates")[""].tables["Limit"]}


def test_limits_are_the_settings() -> None:
    settings = Settings.default()
    defaults = {
        f"{group}.{field.name}": getattr(getattr(settings, group), field.name)
        for group in ("limits", "rates", "timeouts", "accounts")
        for field in dataclasses.fields(getattr(settings, group))
    }
    assert set(defaults) >= INTERNAL, f"not there any more: {INTERNAL - set(defaults)}"
    same(limit_rows(), set(defaults) - INTERNAL, "limits (or a setting is internal: say so in this test)")
    for name, row in limit_rows().items():
        assert float(row[1]) == float(defaults[name]), f"{name}: docs/protocol.md {row[1]}, the code {defaults[name]}"


def test_limits_in_hello() -> None:
    said = hello()["limits"] | {name: hello()[name] for name in ("auth_ms", "ping_ms")}
    rows = {row[2].strip("`"): int(row[1]) for row in limit_rows().values() if row[2]}
    same(rows.items(), said.items(), "limits in hello")


def test_limits_in_the_text() -> None:
    """Limits are repeated where they are needed: as often as they are, they are the same."""
    limits = Settings.default().limits
    request = {t: " ".join(" ".join(row) for row in s.tables.get("Field", [])) for t, s in parts("Requests").items()}
    for t, said in {
        "send": f"{limits.body_bytes:,} bytes",
        "history": f"up to {limits.history}",
        "members": f"up to {limits.members}",
        "channels": f"up to {limits.channels}",
        "users": f"up to {limits.users}",
        "watch": f"up to {limits.watch}",
        "open": f"up to {limits.open_members}",
        "meta": f"1 to {limits.title_chars} characters",
    }.items():
        assert said in request[t], f"{t}: {said!r} is not said in {request[t]}"
    timeouts = Settings.default().timeouts
    assert f"{timeouts.ping_min_ms:,} to {timeouts.ping_max_ms:,}" in request["auth"]
    assert f"{p.MAX_SERVER_MESSAGE_BYTES // 1024} KiB" in chapter("Transport")[""].text
    assert f"`{p.SUBPROTOCOL}`" in chapter("Transport")[""].text


# --- HTTP ---------------------------------------------------------------------------------------------


def test_routes() -> None:
    known = {f"{method} {path}" for method, path in routes.Api(*[cast(Any, None)] * 7)._routes}
    same((part.replace("{id}", "{}") for part in parts("HTTP")), known, "routes")


@pytest.mark.parametrize(
    ("route", "kind"),
    [
        ("POST /v1/users", routes.Credentials),
        ("POST /v1/sessions", routes.Credentials),
        ("PATCH /v1/me", routes.Profile),
        ("POST /v1/conversations/{id}/messages", routes.NewMessage),
    ],
)
def test_bodies(route: str, kind: type[msgspec.Struct]) -> None:
    same_fields(parts("HTTP")[route].fields(), struct_fields(kind), route)


def test_only_those_have_bodies() -> None:
    own = [kind for kind in vars(routes).values() if getattr(kind, "__module__", "") == routes.__name__]
    bodies = {kind for kind in own if isinstance(kind, type) and issubclass(kind, msgspec.Struct)}
    assert bodies == {routes.Credentials, routes.Profile, routes.NewMessage}, "a new body: compare it, too"
    assert {part for part, section in parts("HTTP").items() if section.fields()} == {
        "POST /v1/users",
        "POST /v1/sessions",
        "PATCH /v1/me",
        "POST /v1/conversations/{id}/messages",
    }


# --- examples -----------------------------------------------------------------------------------------------


def wire_examples() -> list[tuple[str, list[tuple[str, Json]]]]:
    """Where it stands, and the messages with who sends them."""
    found = []
    for name, sections in document().items():
        for part, section in sections.items():
            for kind, text in section.examples:
                assert kind in ("", "wire", "http"), f"{name}: what is a block of {kind!r}?"
                if kind == "wire":
                    lines = [(line[:2], json.loads(line[2:])) for line in text.splitlines()]
                    assert all(side in ("C ", "S ") for side, _ in lines), text
                    found.append((f"{name} / {part}", lines))
    return found


def test_examples_on_the_wire() -> None:
    outstanding: dict[int | None, str] = {}
    requests: set[str] = set()
    pushes: set[str] = set()
    oks: set[str] = set()
    for where, lines in wire_examples():
        for side, message in lines:
            if side == "C ":
                try:
                    request = p.decode(orjson.dumps(message))
                except p.InvalidRequest as exc:
                    pytest.fail(f"{where}: the example {message} is refused: {exc.message}")
                assert set(message) - {"t"} <= set(struct_fields(type(request))), f"{where}: {message}"
                requests.add(message["t"])
                outstanding[message.get("id")] = message["t"]
            elif message["t"] in ("ok", "error"):
                t = outstanding.pop(message["id"], None)
                assert t is not None, f"{where}: a reply to nothing: {message}"
                check_reply(t, message)
                oks |= {t} if message["t"] == "ok" else set()
            else:
                check_push(message)
                pushes.add(message["t"])
        outstanding.clear()
    same(requests, parts("Requests"), "requests with an example")
    same(oks, set(parts("Requests")) - {"typing"}, "requests with an example of their ok")
    assert pushes >= set(parts("Pushes")), f"pushes without an example: {set(parts('Pushes')) - pushes}"


def test_examples_in_the_text() -> None:
    found = 0
    for name, sections in document().items():
        for part, section in sections.items():
            text = section.text + "".join(" ".join(row) + "\n" for rows in section.tables.values() for row in rows)
            for example in re.findall(r"`(\{[^`]*\})`", text):
                if example == '{"code","message"}':
                    continue
                message = json.loads(example)
                found += 1
                if "s" in message:
                    assert f"`{message['t']}`" == part, name
                    check_push(message)
                else:
                    assert TYPES["map of id to seq"](message), f"{name}: what is {example}?"
            for fragment in re.findall(r'`("[a-z_]+":[^`]*)`', text):
                json.loads("{" + fragment + "}")
    assert found == len(ENTRY_TYPES) + 1


def test_examples_of_http() -> None:
    for route, section in parts("HTTP").items():
        for kind, text in section.examples:
            assert kind == "http", text
            asked, answered = text.split("\n\n")
            line, *body = asked.splitlines()
            method, _, target = line.partition(" ")
            path, _, query = target.partition("?")
            assert re.fullmatch(re.escape(route).replace(r"\{id\}", "[^/]+"), f"{method} {path}"), f"{route}: {line}"
            if body:
                check(json.loads(body[0]), section.fields(), f"the body of {route}")
            for pair in filter(None, query.split("&")):
                assert pair.partition("=")[0] in section.fields("Parameter"), f"{route}: {pair}"
            status, *answer = answered.splitlines()
            if int(status.split()[0]) < 400:
                check(json.loads(answer[0]), section.fields("Answer field"), f"the answer of {route}")
            else:
                code = json.loads(answer[0])["code"]
                assert error_codes()[code] == int(status.split()[0]), text
                assert f"`{code}`" in [row[0] for row in section.tables["Error"]], text


def test_hello_in_the_examples_is_that_of_today() -> None:
    for where, lines in wire_examples():
        for _, message in lines:
            if message["t"] == "hello":
                assert message | {"server": ""} == hello() | {"server": ""}, where


# --- reserved -------------------------------------------------------------------------------------------------


def test_reserved_names_are_not_in_use() -> None:
    names = [row[0].strip("`") for row in chapter("Reserved")[""].tables["Name"]]
    used = {*map(tag, p.REQUESTS), *PUSHES}
    assert not used & set(names), "it is there: move it from Reserved to where it belongs"
    same(names, ["edit", "del", "react", "search", "files", "mentions"], "reserved names")
    assert hello()["features"] == [], "the document says that there are none"


# --- a real server -----------------------------------------------------------------------------------------------


class Wire:
    """A connection whose every message is checked against the document."""

    def __init__(self, ws: ClientConnection, seen: set[tuple[str, str]]) -> None:
        self.ws = ws
        self._seen = seen
        self._asked: dict[int, str] = {}
        self._inbox: list[Json] = []
        self._ids = 0

    async def send(self, t: str, **fields: Any) -> int:
        self._ids += 1
        self._asked[self._ids] = t
        await self.ws.send(json.dumps({"t": t, "id": self._ids, **fields}))
        return self._ids

    async def receive(self) -> Json:
        async with asyncio.timeout(PATIENCE_S):
            message: Json = json.loads(await self.ws.recv())
        if message["t"] in ("ok", "error") and "id" in message:
            t = self._asked.pop(message["id"])
            self._seen.update((f"{message['t']} {t}", path) for path in check_reply(t, message))
        elif message["t"] == "error":
            check(message, parts("Envelope")["error"].fields(), "error")
        else:
            check_push(message, self._seen)
        return message

    async def until(self, **wanted: Any) -> Json:
        """The first message that has these fields and was not taken yet."""
        while True:
            for message in self._inbox:
                if all(message.get(name) == value for name, value in wanted.items()):
                    self._inbox.remove(message)
                    return message
            self._inbox.append(await self.receive())

    def got(self, t: str) -> bool:
        """Whether such a message came and was not taken yet."""
        return any(message["t"] == t for message in self._inbox)

    async def ask(self, t: str, **fields: Any) -> Json:
        return await self.until(id=await self.send(t, **fields))


class Http:
    """Requests whose every answer is checked against the document."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.seen: set[tuple[str, str]] = set()

    def __call__(self, route: str, query: str = "", body: Json | None = None, token: str = "", **ids: str) -> Json:
        method, _, path = route.partition(" ")
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_S)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request(method, path.format(**ids) + query, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        section = parts("HTTP")[route]
        assert response.status < 300, f"{route}: {response.status} {text!r}"
        if not section.fields("Answer field"):
            assert not text
            return {}
        answer: Json = json.loads(text)
        mine: set[str] = set()
        if route == "GET /v1/conversations":
            for one in answer["conversations"]:
                check_push({"t": "conv", **one})
                assert "after" not in one
            check({**answer, "conversations": []}, section.fields("Answer field"), route, mine)
        else:
            check(answer, section.fields("Answer field"), route, mine)
        self.seen.update((route, path) for path in mine)
        return answer


async def live(port: int, tokens: dict[str, str], ids: dict[str, str], seen: set[tuple[str, str]]) -> str:
    """One of everything. Returns the id of a conversation."""
    url = f"ws://127.0.0.1:{port}/ws"
    async with (
        connect(url, compression=None, ping_interval=None, proxy=None) as first,
        connect(url, compression=None, ping_interval=None, proxy=None) as second,
    ):
        alice, bob = Wire(first, seen), Wire(second, seen)
        refused = await alice.ask("ping")
        assert refused["code"] == "unauthenticated"
        for wire, name in ((alice, "alice"), (bob, "bob")):
            await wire.ask("auth", token=tokens[name], v=1)
            await wire.until(t="ready")
        group = (await alice.ask("open", kind="group", cid="o1", title="Lunch", members=[ids["bob"]]))["c"]
        await bob.until(t="meta", c=group)
        was_early = False
        while not was_early:  # the ping has to be there before all is sent
            async with connect(url, compression=None, ping_interval=None, proxy=None) as third:
                wire = Wire(third, seen)
                auth, early = await wire.send("auth", token=tokens["bob"], v=1), await wire.send("ping")
                await wire.until(id=auth)
                was_early = "sync" not in await wire.until(id=early)
                assert was_early != wire.got("ready"), "nothing stands for what is still being sent"
                await wire.until(t="ready")
        await alice.ask("send", c=group, cid="m1", body="hi", data="{}", re=1)
        assert (await alice.ask("send", c=group, cid="m1", body="hi", data="{}", re=1))["dup"]
        assert (await alice.ask("send", c=group, cid="m1", body="ho"))["code"] == "conflict"
        await alice.ask("send", c=group, cid="m2", body="there")
        await bob.until(t="msg", cid="m2")
        await alice.ask("typing", c=group)
        assert (await alice.ask("typing", c=group))["code"] == "rate_limited"
        await bob.until(t="typing")
        await bob.ask("read", c=group, upto=4)
        await bob.until(t="conv", read=4)
        await alice.until(t="read")
        assert (await alice.ask("history", c=group, limit=2))["more"]
        await alice.ask("notify", c=group, level="mentions")
        await alice.ask("meta", c=group, cid="t1", title="Dinner")
        assert (await alice.ask("meta", c=group, cid="t1", title="Dinner"))["dup"]
        assert (await alice.ask("members", c=group, limit=1))["next"]
        assert "next" not in await alice.ask("members", c=group)
        await alice.ask("users", ids=[ids["bob"]])
        await alice.ask("watch", users=[ids["bob"]])
        channel = (await alice.ask("open", kind="channel", cid="o2", title="General"))["c"]
        await alice.ask("open", kind="channel", cid="o3", title="Random")
        assert (await bob.ask("channels", limit=1))["next"]
        assert "next" not in await bob.ask("channels")
        await bob.ask("member", c=channel, user=ids["bob"], role="member")
        await bob.until(t="conv", c=channel)
        await bob.ask("member", c=channel, user=ids["bob"], role="none")
        await bob.until(t="conv", c=channel, role="none")
        await alice.ask("member", c=group, user=ids["bob"], role="admin")
        await alice.ask("open", kind="dm", cid="o4", members=[ids["bob"]])
        await alice.ask("block", user=ids["bob"], on=True)
        sync = (await alice.ask("ping"))["sync"]
        await alice.ask("attach", have={group: 0})
        assert "full" not in await alice.ask("auth", token=tokens["alice"])
        await first.send('{"t":"ping","id":"seven"}')
        assert "id" not in await alice.until(t="error")
        await second.close()
        gone = await alice.until(t="presence", state="offline")
        assert "seen" in gone
        states = (await alice.ask("watch", users=[ids["bob"]]))["states"]
        assert "seen" in states[0]
        async with connect(url, compression=None, ping_interval=None, proxy=None) as again:
            await Wire(again, seen).ask("auth", token=tokens["bob"])
            await alice.until(t="presence", state="online")
    async with connect(url, compression=None, ping_interval=None, proxy=None) as third:
        alice = Wire(third, seen)
        assert not (await alice.ask("auth", token=tokens["alice"], sync=sync, have={group: 1}))["full"]
        await alice.until(t="ready")
        await asyncio.to_thread(Http(port), "PATCH /v1/me", body={"name": "alicia"}, token=tokens["alice"])
        await alice.until(t="user")
        await third.send("[]")
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                await alice.receive()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == p.CloseCode.MALFORMED
    return str(group)


def test_what_a_real_server_says(tmp_path: Path) -> None:
    """Every message as the document has it; and all that the document has was sent."""
    seen: set[tuple[str, str]] = set()
    server = Server(tmp_path / "data").start()
    try:
        ask = Http(server.port)
        logins = {
            name: ask("POST /v1/users", body={"name": name, "password": "correct horse"}) for name in ("alice", "bob")
        }
        tokens = {name: login["token"] for name, login in logins.items()}
        ids = {name: login["user"]["id"] for name, login in logins.items()}
        ask("POST /v1/sessions", body={"name": "bob", "password": "correct horse"})
        group = asyncio.run(live(server.port, tokens, ids, seen))
        token = tokens["alice"]
        ask("GET /v1/me", token=token)
        ask("PATCH /v1/me", body={"name": "alice"}, token=token)
        ask("GET /v1/users", "?name=BOB", token=token)
        ask("GET /v1/users/{id}", token=token, id=ids["bob"])
        more = ask("GET /v1/conversations", "?limit=1", token=token)["next"]
        ask("GET /v1/conversations", f"?after={more}", token=token)
        ask("GET /v1/conversations/{id}/messages", "?limit=2", token=token, id=group)
        ask("POST /v1/conversations/{id}/messages", body={"body": "beep"}, token=token, id=group)
        ask("GET /healthz")
        ask("GET /readyz")
        ask("DELETE /v1/sessions/current", token=token)
    finally:
        server.stop()
        server.kill()
    expected = {(t, path) for t in PUSHES if t not in ("ok", "error") for path in both_ways(documented_push(t))}
    expected |= {(f"ok {t}", path) for t in parts("Requests") for path in both_ways(documented_ok(t))}
    same(expected, (one for one in seen if not one[0].startswith("error")), "what a real server sends (no: without)")
    expected = {(t, path) for t, section in parts("HTTP").items() for path in both_ways(section.fields("Answer field"))}
    same(expected, ask.seen, "the answers of HTTP (no: without)")
