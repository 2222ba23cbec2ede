"""``chatcore chat`` as a process: piped, and on a pseudo-terminal, against a real server."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from chatcore.client import Message, Typing

from ..server import Server
from .chats import on_terminal, piped
from .helpers import PASSWORD, fresh, login, until


async def test_two_people_chat(url: str, tmp_path: Path) -> None:
    alice, bob, room = fresh("alice"), fresh("bob"), "#" + fresh("lobby")
    async with (
        piped(url, tmp_path, "--register", "--user", alice, room) as one,
        piped(url, tmp_path, "--register", "--user", bob, room) as two,
    ):
        one.type("hello\n")
        await two.says(f"{alice}: hello\n")
        two.type("hello yourself\n")
        await one.says(f"{bob}: hello yourself\n")
        assert (await one.end(), await two.end()) == (0, 0)
    assert one.out == two.out == f"{alice}: hello\n{bob}: hello yourself\n"


async def test_it_ends_at_the_end_of_input_when_all_is_sent(url: str, tmp_path: Path) -> None:
    alice, room = fresh("alice"), "#" + fresh("lobby")
    async with piped(url, tmp_path, "--register", "--user", alice, room) as chat:
        chat.type("".join(f"{n}\n" for n in range(100)))
        assert await chat.end() == 0
    assert chat.out.splitlines() == [f"{alice}: {n}" for n in range(100)]
    async with piped(url, tmp_path, "--user", alice, room, "--history", "3", password=None) as again:
        assert await again.end() == 0
    assert again.out.splitlines() == [f"{alice}: {n}" for n in range(97, 100)]


async def test_the_password_from_stdin_and_then_the_kept_token(url: str, tmp_path: Path) -> None:
    alice = fresh("alice")
    arguments = ("--user", alice, "#" + fresh("lobby"))
    async with piped(url, tmp_path, "--register", "--password-stdin", *arguments, password=None) as chat:
        chat.type(f"{PASSWORD}\nhello\n")
        assert await chat.end() == 0
    assert chat.out == f"{alice}: hello\n"
    (token,) = (tmp_path / "state" / "chatcore").iterdir()
    assert token.stat().st_mode & 0o777 == 0o600
    async with piped(url, tmp_path, "--history", "0", arguments[2], password=None) as again:
        again.type("it is me again\n")
        assert await again.end() == 0
    assert again.out == f"{alice}: it is me again\n"


async def test_a_wrong_password_and_nobody_to_ask(url: str, tmp_path: Path) -> None:
    async with await login(url, name := fresh("alice")):
        pass
    for arguments in (("--user", name), ("--user", name, "--register"), ("--user", fresh())):
        async with piped(url, tmp_path, *arguments, password="not this") as chat:
            assert await chat.end() == 1
        assert chat.err.startswith("chatcore chat: the name")
        assert chat.err.count("\n") == 1


async def test_no_server_is_one_line(tmp_path: Path) -> None:
    async with piped("http://127.0.0.1:1", tmp_path, "--user", "alice") as chat:
        assert await chat.end() == 1
    assert chat.err == "chatcore chat: http://127.0.0.1:1: Connection refused\n"


async def test_a_revoked_token_is_replaced_by_the_password(url: str, tmp_path: Path) -> None:
    alice, room = fresh("alice"), "#" + fresh("lobby")
    async with piped(url, tmp_path, "--register", "--user", alice, room) as chat:
        assert await chat.end() == 0
    (file,) = (tmp_path / "state" / "chatcore").iterdir()
    good = file.read_text()
    file.write_text(good.replace('"token":"', '"token":"x'))
    async with piped(url, tmp_path, "--user", alice, room) as chat:
        chat.type("back\n")
        assert await chat.end() == 0
    assert chat.out == f"{alice}: back\n"
    assert file.read_text() != good


async def test_several_first_ones_meet_in_the_same_lobby(url: str, tmp_path: Path) -> None:
    room = "#" + fresh("lobby")
    names = [fresh(f"user{n}") for n in range(3)]
    async with (
        piped(url, tmp_path, "--register", "--user", names[0], room) as one,
        piped(url, tmp_path, "--register", "--user", names[1], room) as two,
        piped(url, tmp_path, "--register", "--user", names[2], room) as three,
    ):
        chats = (one, two, three)
        for name, chat in zip(names, chats, strict=True):
            chat.type(f"I am {name}\n")
        for chat in chats:
            for name in names:
                await chat.says(f"{name}: I am {name}\n")
        assert [await chat.end() for chat in chats] == [0, 0, 0]


async def test_lines_typed_while_the_server_is_away_are_sent_once(own_server: Server, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{own_server.port}"
    async with (
        piped(url, tmp_path, "--register", "--user", "alice") as alice,
        piped(url, tmp_path, "--register", "--user", "bob") as bob,
    ):
        alice.type("before\n")
        await bob.says("alice: before\n")
        await asyncio.to_thread(own_server.stop)
        await alice.says("reconnecting…", on="err")
        alice.type("meanwhile 1\nmeanwhile 2\n")
        await asyncio.to_thread(own_server.start)
        await bob.says("alice: meanwhile 1\nalice: meanwhile 2\n")
        assert (await alice.end(), await bob.end()) == (0, 0)
    assert alice.out == bob.out == "alice: before\nalice: meanwhile 1\nalice: meanwhile 2\n"


async def test_commands(url: str, tmp_path: Path) -> None:
    alice, bob, room = fresh("alice"), fresh("bob"), fresh("room")
    async with await login(url, bob) as other:
        async with piped(url, tmp_path, "--register", "--user", alice, f"#{room}") as chat:
            chat.type("/who\n")
            await chat.says(rf"\* {alice} \(you, owner\)\n", on="err")
            chat.type("/title brand new\n")
            await chat.says(rf"\* {alice} set the title: brand new\n", on="err")
            chat.type(f"/group ours {bob}\n//not a command\n")
            await chat.says(f"{alice}: /not a command\n")
            chat.type(f"/dm {bob}\nfor your eyes\n")
            await chat.says(f"{alice}: for your eyes\n")
            chat.type("/list\n")
            await chat.says(r"\* ours \(", on="err")
            chat.type("/channels brand\n")
            await chat.says(r"\* #brand new \(1 member\)\n", on="err")
            chat.type("/history 500\n/nonsense\n/dm nobody-of-this-name\n/leave\n")
            await chat.says(r"\* /history N: 1 to 100\n", on="err")
            await chat.says(r"\* no such command: /nonsense", on="err")
            await chat.says(r"\* there is no user", on="err")
            assert await chat.end() == 0
        dm = next(view for view in other.conversations.values() if view.kind == "dm")
        assert dm.last is not None
        assert dm.last.body == "for your eyes"


async def test_what_cannot_be_sent_is_said_and_counted(url: str, tmp_path: Path) -> None:
    async with piped(url, tmp_path, "--register", "--user", fresh("alice"), "#" + fresh("lobby")) as chat:
        chat.type("x" * 9000 + "\nfine\n")
        assert await chat.end() == 1
    assert "* not sent: xxx" in chat.err
    assert chat.out.endswith(": fine\n")


async def test_an_interrupt_ends_it(url: str, tmp_path: Path) -> None:
    alice = fresh("alice")
    async with piped(url, tmp_path, "--register", "--user", alice, "#" + fresh("lobby")) as chat:
        chat.type("hello\n")
        await chat.says(f"{alice}: hello\n")
        chat.process.send_signal(signal.SIGINT)
        assert await chat.process.wait() == 130
    assert "Traceback" not in chat.err


async def test_on_a_terminal(url: str, tmp_path: Path) -> None:
    alice, bob, room = fresh("alice"), fresh("bob"), fresh("lobby")
    async with on_terminal(url, tmp_path, "--user", alice, f"#{room}") as chat:
        await chat.says(f"Password of {alice}: ")
        chat.type(f"{PASSWORD}\n")
        await chat.says(r"Make a new account\? \[y/N\] ")
        chat.type("y\n")
        await chat.shows(f"#{room}> ")
        async with await login(url, bob) as other:
            conv = await other.channel(room)
            chat.type("hello from ")
            typing = await until(other, Typing)
            assert await other.name_of(typing.user) == alice
            chat.type("a terminal\r")
            await chat.says(f"{alice}: hello from a terminal")
            await other.send(conv, "hi \x1b]0;evil\a there")
            await chat.says(rf"{bob}: hi \ufffd\]0;evil\ufffd there")
            await chat.shows(f"online: {bob}")
            other.typing(conv)
            await chat.shows(f"{bob} is typing…")
        await chat.says(rf"\* {bob} is offline")
        assert await chat.leave() == 0


async def test_a_terminal_over_a_restart(own_server: Server, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{own_server.port}"
    async with on_terminal(url, tmp_path, "--user", "alice", "--register", password=PASSWORD) as chat:
        await chat.shows("#lobby> ")
        await asyncio.to_thread(own_server.stop)
        await chat.says(r"\* reconnecting…")
        chat.type("typed meanwhile\r")
        await chat.shows("1 not sent yet")
        await asyncio.to_thread(own_server.start)
        await chat.says("alice: typed meanwhile")
        await chat.says(r"\* connected again")
        chat.type("/quit\r")
        assert await chat.wait() == 0
    async with await login(url, "alice") as client:
        page = await client.history(await client.channel("lobby"))
        assert [e.body for e in page.entries if isinstance(e, Message)] == ["typed meanwhile"]
