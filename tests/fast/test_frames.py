"""The parser, rule by rule (RFC 6455), and against an oracle that is as simple as can be."""

from __future__ import annotations

import codecs
import itertools
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chatcore._fast.frames import Frame, Parser

from .support import close_payload, frame

TEXT, BINARY, CLOSE, PING, PONG, CONT = 1, 2, 8, 9, 10, 0
LIMIT = 1000


def parse(*chunks: bytes, max_message: int = LIMIT, allow_binary: bool = False) -> list[Any]:
    parser = Parser(max_message, allow_binary)
    return [event for chunk in chunks for event in parser.feed(chunk)]


def every_split(data: bytes, expected: list[Any], **settings: Any) -> None:
    """The same events however TCP cuts the bytes in two, and byte by byte."""
    assert parse(data, **settings) == expected
    assert parse(*(data[i : i + 1] for i in range(len(data))), **settings) == expected
    for cut in range(1, len(data)):
        assert parse(data[:cut], data[cut:], **settings) == expected, cut


# -- what is legal


@pytest.mark.parametrize("size", [0, 1, 7, 8, 15, 16, 17, 124, 125, 126, 127, 255, 256, 999, 1000])
def test_sizes(size: int) -> None:
    text = bytes(32 + i % 90 for i in range(size))
    every_split(frame(TEXT, text), [("text", text)])


def test_largest_forms() -> None:
    for size in (65535, 65536, 70000):
        text = b"a" * size
        assert parse(frame(TEXT, text), max_message=1 << 20) == [("text", text)]
        cuts = [frame(TEXT, text)[i : i + 1000] for i in range(0, size + 14, 1000)]
        assert parse(*cuts, max_message=1 << 20) == [("text", text)]


def test_fragments_with_control_frames_between() -> None:
    data = (
        frame(TEXT, b"Hel", fin=False)
        + frame(PING, b"a")
        + frame(CONT, b"", fin=False)
        + frame(PONG, b"b" * 125)
        + frame(CONT, b"lo", fin=True)
        + frame(TEXT, b"next")
        + frame(CLOSE, close_payload(1000, b"bye"))
    )
    expected = [
        ("ping", b"a"),
        ("pong", b"b" * 125),
        ("text", b"Hello"),
        ("text", b"next"),
        ("close", 1000, b"bye"),
    ]
    every_split(data, expected)


def test_nothing_is_kept_between_messages() -> None:
    parser = Parser()
    data = frame(TEXT, b"Hel", fin=False) + frame(PING, b"xyz") + frame(CONT, b"lo")
    for i in range(len(data)):
        assert parser.idle == (i == 0)
        parser.feed(data[i : i + 1])
    assert parser.idle
    parser.feed(frame(CLOSE, close_payload(1000)))
    assert parser.idle


def test_binary_where_allowed() -> None:
    data = frame(BINARY, b"\xff\x00", fin=False) + frame(CONT, b"\xfe")
    every_split(data, [("binary", b"\xff\x00\xfe")], allow_binary=True)
    every_split(frame(BINARY, b"\xff"), [("binary", b"\xff")], allow_binary=True)


@pytest.mark.parametrize("mask", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x01\x02\x03\x04"])
def test_masks(mask: bytes) -> None:
    text = bytes(32 + i % 90 for i in range(77))
    every_split(frame(TEXT, text, mask=mask), [("text", text)])


# -- what is not

ILLEGAL: list[tuple[str, bytes, int]] = [
    ("unmasked", frame(TEXT, b"x", mask=None), 1002),
    ("unmasked control", frame(PING, b"", mask=None), 1002),
    *((f"rsv {rsv}", frame(TEXT, b"x", rsv=rsv), 1002) for rsv in range(1, 8)),
    *((f"opcode {op}", frame(op, b"x"), 1002) for op in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
    ("fragmented ping", frame(PING, b"", fin=False), 1002),
    ("fragmented close", frame(CLOSE, b"", fin=False), 1002),
    ("ping of 126", frame(PING, b"x" * 126), 1002),
    ("close of 126", frame(CLOSE, close_payload(1000) + b"x" * 124), 1002),
    ("ping with a 64 bit length", frame(PING, b"x", form=64), 1002),
    ("continues nothing", frame(CONT, b"x"), 1002),
    ("continues nothing, not final", frame(CONT, b"x", fin=False), 1002),
    ("text inside text", frame(TEXT, b"x", fin=False) + frame(TEXT, b"y"), 1002),
    ("125 in the 16 bit form", frame(TEXT, b"x" * 125, form=16), 1002),
    ("0 in the 16 bit form", frame(TEXT, b"", form=16), 1002),
    ("65535 in the 64 bit form", frame(TEXT, b"", length=65535, form=64), 1002),
    ("126 in the 64 bit form", frame(TEXT, b"x" * 126, form=64), 1002),
    ("length with the top bit", frame(TEXT, b"", length=1 << 63, form=64), 1002),
    ("close with half a code", frame(CLOSE, b"\x03"), 1002),
    *(
        (f"close code {code}", frame(CLOSE, close_payload(code)), 1002)
        for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
    ),
    ("close reason not UTF-8", frame(CLOSE, close_payload(1000, b"\xff")), 1007),
    ("close reason cut short", frame(CLOSE, close_payload(1000, b"\xc3")), 1007),
    ("binary", frame(BINARY, b"x"), 1003),
    ("binary, empty", frame(BINARY, b""), 1003),
    ("binary, not final", frame(BINARY, b"x", fin=False), 1003),
    ("too big", frame(TEXT, b"x" * (LIMIT + 1)), 1009),
    ("too big together", frame(TEXT, b"x" * 600, fin=False) + frame(CONT, b"y" * 401), 1009),
    ("huge", frame(TEXT, b"", length=(1 << 63) - 1, form=64), 1009),
    ("not UTF-8", frame(TEXT, b"abc\xff"), 1007),
]


@pytest.mark.parametrize(("data", "code"), [c[1:] for c in ILLEGAL], ids=[c[0] for c in ILLEGAL])
def test_illegal(data: bytes, code: int) -> None:
    every_split(data, [("fail", code)])
    # What follows is not looked at, what came before is.
    before = frame(TEXT, b"fine")
    assert parse(before + data + before) == [("text", b"fine"), ("fail", code)]


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1007, 1011, 1014, 3000, 3999, 4000, 4999])
def test_legal_close_codes(code: int) -> None:
    every_split(frame(CLOSE, close_payload(code, "für".encode())), [("close", code, "für".encode())])


def test_empty_close() -> None:
    every_split(frame(CLOSE), [("close", 1005, b"")])


def test_a_declared_length_is_judged_without_its_payload() -> None:
    # CVE-2026-54274: not when the body has come, and before the mask.
    head = frame(TEXT, b"", length=LIMIT + 1, mask=b"")
    assert head[-2:] == (LIMIT + 1).to_bytes(2, "big")
    assert parse(head) == [("fail", 1009)]
    assert parse(frame(TEXT, b"x" * 999, fin=False) + frame(CONT, b"", length=2, mask=b"\0\0\0\0")) == [("fail", 1009)]
    assert parse(frame(TEXT, b"x" * 999, fin=False) + frame(CONT, b"y")) == [("text", b"x" * 999 + b"y")]


# -- UTF-8

GOOD = ["κόσμε", "\x00\x7f\x80߿ࠀ\uffff𐀀\U0010ffff", "\ud7ff\ue000\ufffd", "aé" * 40, "日本語" * 30, "😀" * 20]
BAD = [
    b"\x80", b"\xbf", b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xe0\x9f\xbf", b"\xed\xa0\x80",
    b"\xed\xbf\xbf", b"\xf0\x80\x80\x80", b"\xf0\x8f\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80",
    b"\xf8\x88\x80\x80\x80", b"\xfe", b"\xff", b"\xc3(", b"\xe2\x82(", b"\xf0\x9f\x98(", b"\xc3\xc3\xa9",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_utf8_over_fragments(text: str) -> None:
    data = text.encode()
    for cut in range(len(data) + 1):
        wire = frame(TEXT, data[:cut], fin=False) + frame(PING) + frame(CONT, data[cut:])
        assert parse(wire) == [("ping", b""), ("text", data)]
        assert parse(*(wire[i : i + 1] for i in range(len(wire)))) == [("ping", b""), ("text", data)]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("before", [0, 1, 7, 8, 15, 16, 17, 31, 40])
def test_not_utf8(bad: bytes, before: int) -> None:
    data = b"a" * before + bad + b"b" * 20
    assert parse(frame(TEXT, data)) == [("fail", 1007)]
    for cut in range(1, len(data)):
        wire = frame(TEXT, data[:cut], fin=False) + frame(CONT, data[cut:])
        assert parse(wire) == [("fail", 1007)]


def test_utf8_cut_short() -> None:
    for text in ("é", "日", "😀"):
        data = text.encode()
        for cut in range(1, len(data)):
            assert parse(frame(TEXT, b"abc" + data[:cut])) == [("fail", 1007)]
            assert parse(frame(TEXT, b"abc" + data[:cut], fin=False)) == []
            assert parse(frame(TEXT, data[:cut], fin=False) + frame(CONT)) == [("fail", 1007)]


def test_utf8_fails_as_soon_as_it_is_wrong() -> None:
    assert parse(frame(TEXT, b"abc\xf4\x90", length=500)) == [("fail", 1007)]


# -- against an oracle


class Oracle:
    """RFC 6455's receiving side, a byte at a time, written to be obviously right."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.buffer = b""
        self.message: bytearray | None = None
        self.failed = False

    def feed(self, data: bytes) -> list[Any]:
        out: list[Any] = []
        for i in range(len(data)):
            if self.failed:
                break
            self.buffer += data[i : i + 1]
            event = self.step()
            if event is not None:
                out.append(event)
                self.failed = event[0] == "fail"
        return out

    def step(self) -> Any:
        b = self.buffer
        op, fin = b[0] & 15, b[0] >> 7
        if b[0] & 0x70 or op not in (0, 1, 2, 8, 9, 10):
            return ("fail", 1002)
        if len(b) < 2:
            return None
        size = b[1] & 127
        if not b[1] & 128 or (op >= 8 and (size > 125 or not fin)):
            return ("fail", 1002)
        extra = {126: 2, 127: 8}.get(size, 0)
        if len(b) < 2 + extra:
            return None
        if extra:
            size = int.from_bytes(b[2 : 2 + extra], "big")
            if size >> 63 or size < (126 if extra == 2 else 65536):
                return ("fail", 1002)
        if op < 8:
            if (op == 0) != (self.message is not None):
                return ("fail", 1002)
            if op == 2:
                return ("fail", 1003)
            if len(self.message or b"") + size > self.limit:
                return ("fail", 1009)
        at = 2 + extra + 4
        if len(b) < at:
            return None
        mask = b[at - 4 : at]
        payload = bytes(c ^ mask[i % 4] for i, c in enumerate(b[at:]))
        done = len(payload) == size
        if op < 8:
            try:
                codecs.getincrementaldecoder("utf-8")().decode(
                    bytes(self.message or b"") + payload, final=bool(done and fin)
                )
            except UnicodeDecodeError:
                return ("fail", 1007)
        if not done:
            return None
        self.buffer = b""
        if op in (9, 10):
            return ("ping" if op == 9 else "pong", payload)
        if op == 8:
            if not payload:
                return ("close", 1005, b"")
            code = int.from_bytes(payload[:2], "big")
            legal = 3000 <= code <= 4999 or (code in range(1000, 1015) and code not in (1004, 1005, 1006))
            if len(payload) == 1 or not legal:
                return ("fail", 1002)
            try:
                payload[2:].decode()
            except UnicodeDecodeError:
                return ("fail", 1007)
            return ("close", code, payload[2:])
        whole = bytes(self.message or b"") + payload
        self.message = None if fin else bytearray(whole)
        return ("text", whole) if fin else None


payloads = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=60).map(str.encode),
    st.integers(100, 400).map(lambda n: b"q" * n),
    st.integers(0, 5200).map(lambda code: close_payload(code, b"why")),
)
frames = st.builds(
    frame,
    st.sampled_from([0, 0, 1, 1, 1, 2, 8, 9, 10, 3]),
    payloads,
    fin=st.booleans(),
    rsv=st.sampled_from([0] * 12 + [1]),
    mask=st.one_of(*[st.binary(min_size=4, max_size=4)] * 9, st.none()),
)


def cut_up(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@settings(max_examples=600, deadline=None)
@given(st.lists(frames, max_size=8), st.lists(st.integers(0, 1 << 16), max_size=12))
def test_frames_like_the_oracle(sent: list[bytes], cuts: list[int]) -> None:
    data = b"".join(sent)
    assert parse(*cut_up(data, cuts), max_message=500) == Oracle(500).feed(data)


@settings(max_examples=600, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=40), st.lists(st.integers(0, 200), max_size=4)), max_size=5),
    st.lists(st.integers(0, 1 << 16), max_size=20),
)
def test_legal_messages_arrive(texts: list[tuple[str, list[int]]], cuts: list[int]) -> None:
    data = b""
    for text, places in texts:
        parts = cut_up(text.encode(), places) or [b""]
        for i, part in enumerate(parts):
            data += frame(TEXT if i == 0 else CONT, part, fin=i == len(parts) - 1)
            data += frame(PONG, b"between")
    events = parse(*cut_up(data, cuts))
    assert [e for e in events if e[0] == "text"] == [("text", t.encode()) for t, _ in texts]
    assert all(e in (("pong", b"between"),) for e in events if e[0] != "text")


@settings(max_examples=1500, deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(0, 1 << 16), max_size=8))
@example(b"\x81\xfe\x00", [])
def test_any_bytes_end_in_a_legal_state(data: bytes, cuts: list[int]) -> None:
    parser = Parser(200)
    events = [e for chunk in cut_up(data, cuts) for e in parser.feed(chunk)]
    assert events == Oracle(200).feed(data)
    assert [e[0] for e in events].count("fail") <= 1
    if events and events[-1][0] == "fail":
        assert parser.feed(frame(TEXT, b"x")) == []


# -- the builder


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 70000])
def test_built_frames(size: int) -> None:
    built = Frame(b"z" * size)
    expected = frame(TEXT, b"z" * size, mask=None)
    assert bytes(built) == expected
    assert len(built) == len(expected)


def test_frames_are_of_bytes() -> None:
    for wrong in ("text", None, 3, bytearray(b"x")):
        with pytest.raises(TypeError):
            Frame(wrong)  # type: ignore[arg-type]
