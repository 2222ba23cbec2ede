"""Each example does what the comment at its top promises, against a real server."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from chatcore.client import Client, Message

from ..server import PATIENCE_S, eventually
from .programs import PASSWORD, Program, examples, running, usage

READER = "channel_reader.py"


async def log_in(url: str, name: str) -> Client:
    return await Client.login(url, name, PASSWORD, register=True)


async def messages(chat: Client) -> AsyncIterator[Message]:
    """The messages that others send to this client."""
    async for event in chat.events():
        if isinstance(event, Message) and event.sender != chat.user.id:
            yield event


@pytest.mark.parametrize("name", examples())
async def test_without_arguments_an_example_prints_its_usage(name: str) -> None:
    async with running(name) as program:
        assert await program.ended() == 1
    assert program.err.strip() == usage(name).strip()
    assert f"python examples/{name} http://127.0.0.1:8080" in usage(name)


# --- the echo bot ------------------------------------------------------------------------------


async def test_the_bot_answers_when_it_is_spoken_to_and_only_then(url: str) -> None:
    async with await log_in(url, "alice") as alice, running("echo_bot.py", url, "echo", "bots") as bot:
        await bot.prints(r"echo listens in #bots\n")
        room = await alice.channel("bots")
        dm = await alice.dm("echo")
        await alice.send(room, "good morning")
        await alice.send(room, "@echoes are nice")
        first = await alice.send(room, "@echo are you there?")
        await alice.send(room, "@echo no answer to this reply", reply_to=first.seq)
        second = await alice.send(room, "@echo goodbye")
        private = await alice.send(dm, "hello")
        answers = {}
        async with asyncio.timeout(PATIENCE_S):
            async for answer in messages(alice):
                answers[answer.conv, answer.reply_to] = answer.body
                # The bot answers in the order of the messages of a conversation, so nothing comes before these.
                if {(room, second.seq), (dm, private.seq)} <= answers.keys():
                    break
        await bot.interrupt()
        assert answers == {
            (room, first.seq): "are you there?",
            (room, second.seq): "goodbye",
            (dm, private.seq): "hello",
        }


async def test_the_bot_survives_a_user_who_blocks_it(url: str) -> None:
    async with (
        await log_in(url, "mallory") as mallory,
        await log_in(url, "carol") as carol,
        running("echo_bot.py", url, "echo2", "bots") as bot,
    ):
        await bot.prints("listens")
        dm = await mallory.dm("echo2")
        view = await mallory.view(dm)
        assert view.peer is not None
        await mallory.block(view.peer.id)
        await mallory.send(await mallory.channel("bots"), "@echo2 in public")  # the block is known by then
        with_carol = await carol.dm("echo2")
        await carol.send(with_carol, "hello")
        async with asyncio.timeout(PATIENCE_S):
            async for answer in messages(carol):
                if answer.conv == with_carol:
                    assert answer.body == "hello"
                    break
        await bot.interrupt()


# --- the bridge from webhooks ------------------------------------------------------------------


async def call(url: str, body: bytes, **headers: str) -> tuple[int, bytes]:
    """Call a webhook; the status and the body of the answer."""

    def send() -> tuple[int, bytes]:
        request = urllib.request.Request(url, body, {name.replace("_", "-"): value for name, value in headers.items()})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    return await asyncio.to_thread(send)


async def test_the_bridge_posts_what_it_receives(url: str) -> None:
    async with await log_in(url, "dave") as dave, running("webhook_bridge.py", url, "builds", "news", 0) as bridge:
        hook = (await bridge.prints(r"listening on (http://127\.0\.0\.1:\d+)\n"))[1]
        room = await dave.channel("news")
        status, answer = await call(hook, b'{"text": "build 17 passed"}')
        assert (status, json.loads(answer)["dup"]) == (201, False)
        # Repeated with the same key, as after a lost answer: it is stored once.
        again = [await call(hook, b'{"text": "build 18 failed"}', Idempotency_Key="build-18") for _ in range(2)]
        assert [(status, json.loads(answer)["dup"]) for status, answer in again] == [(201, False), (200, True)]
        for body in (b"", b"{}", b"[]", b"text", b'{"text": 17}', b'{"text": ""}'):
            assert (await call(hook, body))[0] == 400, body
        assert (await call(hook, json.dumps({"text": "x" * 20_000}).encode()))[0] == 413
        assert (await call(hook, b'{"text": "the end"}'))[0] == 201
        arrived = []
        async with asyncio.timeout(PATIENCE_S):
            async for message in messages(dave):
                if message.conv == room:
                    arrived.append(message.body)
                if message.body == "the end":
                    break
        assert arrived == ["build 17 passed", "build 18 failed", "the end"]
        await bridge.interrupt()


# --- the reader of a channel -------------------------------------------------------------------


async def said(program: Program, chat: Client, room: str, *bodies: str) -> None:
    """Say something, and wait until the reader has printed the last of it."""
    for body in bodies:
        await chat.send(room, body)
    await program.prints(f": {bodies[-1]}\n")


async def test_the_reader_continues_where_it_stopped(url: str, tmp_path: Path) -> None:
    arguments = (url, "reader", "log", tmp_path / "log.state")
    async with await log_in(url, "erin") as erin:
        room = await erin.channel("log")
        await erin.send(room, "before the first start")
        async with running(READER, *arguments) as first:
            await first.prints("reading #log\n")
            elsewhere = await erin.channel("another")
            await erin.send(elsewhere, "not in this channel")
            await said(first, erin, room, "one", "two")
            await first.interrupt()
        assert first.out == "erin: one\nerin: two\n"
        for number in range(3):
            await erin.send(room, f"missed {number}")
        async with running(READER, *arguments) as second:
            await second.prints("erin: missed 2\n")
            await said(second, erin, room, "three")
            await second.interrupt()
        assert second.out == "erin: missed 0\nerin: missed 1\nerin: missed 2\nerin: three\n"


async def test_a_reader_that_is_killed_leaves_nothing_out(url: str, tmp_path: Path) -> None:
    arguments = (url, "reader2", "log2", tmp_path / "log.state")
    async with await log_in(url, "frank") as frank:
        room = await frank.channel("log2")
        async with running(READER, *arguments) as first:
            await first.prints("reading")
            await asyncio.to_thread(eventually, arguments[3].exists, "the reader saves its state")
            await said(first, frank, room, *(f"line {number}" for number in range(20)))
            await first.kill()
        await frank.send(room, "line 20")
        async with running(READER, *arguments) as second:
            await second.prints("line 20\n")
            await second.interrupt()
        # The last lines may have been printed twice, but in order and without a hole.
        lines = second.out.splitlines()
        printed = first.out.splitlines()
        everything = [f"frank: line {number}" for number in range(21)]
        assert printed == everything[:20]
        assert lines == everything[21 - len(lines) :]


async def test_more_than_a_replay_was_missed(url: str, tmp_path: Path) -> None:
    arguments = (url, "reader3", "log3", tmp_path / "log.state")
    async with await log_in(url, "grace") as grace:
        room = await grace.channel("log3")
        async with running(READER, *arguments) as first:
            await first.prints("reading")
            await said(first, grace, room, "the first")
            await first.interrupt()
        count = 1_200  # more than limits.backlog, and than the events that a client holds
        for number in range(count):
            grace.post(room, f"missed {number}") if number % 500 else await grace.send(room, f"missed {number}")
        await grace.flush()
        async with running(READER, *arguments) as second:
            await second.prints(f"missed {count - 1}\n")
            await second.interrupt()
        assert second.out.splitlines() == [f"grace: missed {number}" for number in range(count)]
