"""From the arguments to the chat and to its end."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import Final

from ..accounts import request
from ..client import Client
from ..errors import ClientError, TokenRejected
from .chat import Chat
from .commands import Quit, run_line
from .credentials import Login, Refusal, Tokens
from .options import Options
from .screen import Plain, Stdin, Tty

#: Someone who quits while messages wait for their acknowledgement waits this long for it.
QUIT_S: Final = 3.0
PROMPT_END: Final = "> "


async def run(options: Options) -> int:
    """Chat until the end of input; the exit code. Raises Refusal, ChatError, ClientError, OSError."""
    stdin = Stdin()
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    tokens = Tokens(options.address)
    login = Login(options, tokens, input if interactive else None, stdin.readline)
    await request(options.address, "GET", "/healthz")  # say at once if nobody is there
    client = await _connect(options, tokens, login)
    try:
        return await _chat(client, options, stdin, interactive)
    except TokenRejected as error:
        tokens.drop(login.user)
        raise Refusal(f"the server ended the session: {error.reason or 'log in again'}") from None
    finally:
        await client.close()


async def _connect(options: Options, tokens: Tokens, login: Login) -> Client:
    """A started client, with the kept token if it is still good."""
    token = login.kept()
    if token is not None:
        client = Client(str(options.address), token)
        try:
            await client.start()
            return client
        except TokenRejected:
            await client.close()
            tokens.drop(login.user)
        except BaseException:
            await client.close()
            raise
    client = Client(str(options.address), await login.fresh())
    try:
        await client.start()
    except BaseException:
        await client.close()
        raise
    return client


async def _chat(client: Client, options: Options, stdin: Stdin, interactive: bool) -> int:
    chat = Chat(client, options.history)
    if interactive:
        chat.screen = Tty(lambda: chat.title + PROMPT_END, chat.status, chat.typed)
        chat.screen.notice(f"{options.address} as {client.user.name}; /help for help")
    else:
        chat.screen = Plain(stdin)
    following = asyncio.create_task(chat.follow(), name="chat events")
    talking = asyncio.create_task(_talk(chat, options.conversation, interactive), name="chat lines")
    try:
        # Whichever ends first: the input, or the connection for good.
        await asyncio.wait([following, talking], return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()  # raises why
        await talking
    finally:
        for task in (following, talking):
            task.cancel()
        await asyncio.gather(following, talking, return_exceptions=True)
    return 1 if chat.refused or client.unacknowledged else 0


async def _talk(chat: Chat, conversation: str, interactive: bool) -> None:
    """Do what the lines say until there are no more."""
    await chat.enter(conversation)
    with suppress(Quit):
        while (line := await chat.screen.line()) is not None:
            await run_line(chat, line)
    if not interactive:
        await chat.finish()
        return
    try:
        async with asyncio.timeout(QUIT_S):
            await chat.finish()
    except (TimeoutError, ClientError):
        chat.screen.notice(f"{chat.client.unacknowledged} messages were not sent")
