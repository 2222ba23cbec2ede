"""The parts of the terminal chat that need no server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chatcore.client.accounts import Address
from chatcore.client.events import Conversation, MemberChanged, User
from chatcore.client.terminal.login import TokenFiles, parse
from chatcore.client.terminal.screen import Stdin, clean, listing, member_line, one_line, title_of


def test_without_arguments_it_is_the_lobby_here() -> None:
    options = parse([])
    assert (str(options.address), options.conversation, options.user) == ("http://127.0.0.1:8080", "#lobby", None)


def test_a_url_and_a_conversation_may_stand_in_any_order() -> None:
    for argv in (["http://h:1", "@bob"], ["@bob", "http://h:1"], ["--url", "http://h:1", "@bob"]):
        options = parse(argv)
        assert (str(options.address), options.conversation) == ("http://h:1", "@bob")


@pytest.mark.parametrize(
    "argv",
    [["a b"], ["#"], ["#a", "#b"], ["--url", "ftp://x"], ["http://x/?token=1"], ["--history", "-1"], ["--nope"]],
    ids=str,
)
def test_wrong_arguments_end_it_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(argv)
    assert ended.value.code == 2
    assert "chatcore chat: error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "http", "ws"),
    [
        ("http://h:1", "http://h:1", "ws://h:1/ws"),
        ("https://h/chat/", "https://h/chat", "wss://h/chat/ws"),
        ("wss://h/ws", "https://h", "wss://h/ws"),
        ("h:1", "http://h:1", "ws://h:1/ws"),
        ("http://[::1]:1", "http://[::1]:1", "ws://[::1]:1/ws"),
    ],
)
def test_addresses(url: str, http: str, ws: str) -> None:
    address = Address(url)
    assert (address.http, address.ws) == (http, ws)


def test_an_address_holds_no_secrets() -> None:
    for url in ("http://alice:secret@h", "http://h/?token=x", "http://h/#x", "gopher://h", "http://"):
        with pytest.raises(ValueError, match="address"):
            Address(url)


def test_tokens_are_kept_for_their_owner_only_and_per_server(tmp_path: Path) -> None:
    here, there = Address("http://127.0.0.1:1"), Address("http://127.0.0.1:2")
    tokens = TokenFiles(here, tmp_path / "chatcore")
    assert tokens.last_user() is None
    tokens.put("Alice", "A")
    tokens.put("bob", "B")
    assert tokens.get("alice") == "A"
    assert TokenFiles(there, tmp_path / "chatcore").get("alice") is None
    files = list((tmp_path / "chatcore").iterdir())
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert (tmp_path / "chatcore").stat().st_mode & 0o777 == 0o700
    for file in files:
        os.utime(file, (0, 0))
    tokens.used("alice")
    assert tokens.last_user() == "Alice"
    tokens.drop("alice")
    assert tokens.get("Alice") is None


def test_what_others_wrote_cannot_command_the_terminal() -> None:
    assert clean("\x1b[2Jhi\a\x9b1m\u202eabc") == "\ufffd[2Jhi\ufffd\ufffd1m\ufffdabc"
    assert clean("a\tb\r\nc\rd") == "a b\nc\ufffdd"
    assert one_line("a\nb") == "a b"
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f é 漢"
    assert clean(family) == family


def test_titles_and_lines() -> None:
    assert title_of(Conversation(id="c", kind="channel", title="lobby")) == "#lobby"
    assert title_of(Conversation(id="c", kind="dm", peer=User("u", "bob"))) == "@bob"
    assert title_of(Conversation(id="c", kind="group", title="")) == "c"
    entry = MemberChanged(conv="c", seq=1, sender="u1", user="u2", role="none")
    assert member_line(entry, "alice", "bob") == "alice removed bob"
    assert listing([str(n) for n in range(10)], 3) == "0, 1, 2 and 7 more"


def test_stdin_gives_lines_however_they_come() -> None:
    out, into = os.pipe()
    stdin = Stdin(out)
    os.write(into, "sécr".encode()[:3])
    os.write(into, "sécr".encode()[3:] + b"et\r\n\nhello")
    os.close(into)
    assert [stdin.readline() for _ in range(4)] == ["sécret", "", "hello", None]
    os.close(out)
