"""The terminal chat, ``chatcore chat``: from the arguments to the chat and to its end."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from ..accounts import request
from ..client import Client
from ..errors import ChatError, ClientError, TokenRejected
from .chat import TerminalChat
from .commands import Quit, run_line
from .login import LoginFailed, Options, TokenFiles, TokenSource, parse
from .screen import PipeScreen, Stdin, TtyScreen

__all__ = ["main"]

#: At /quit, messages that wait for their acknowledgement get this long for it, in seconds.
QUIT_S: Final = 3.0
PROMPT_END: Final = "> "


def main(argv: Sequence[str]) -> int:
    """Run ``chatcore chat`` with these arguments; the exit code.

    0: done. 1: it failed, or not everything was sent. 2: the arguments are
    wrong. 130: interrupted.
    """
    options = parse(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that cannot show a character shows a question mark instead of ending the chat.
            stream.reconfigure(errors="replace")
    try:
        return asyncio.run(_run(options))
    except LoginFailed as failed:
        problem = str(failed)
    except (ChatError, ClientError) as error:
        problem = str(error)
    except TimeoutError:
        problem = f"no answer from {options.address}"
    except BrokenPipeError:
        # The reader of the output has closed it; the rest of the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        problem = f"{options.address}: {error.strerror or error}"
    except KeyboardInterrupt:
        return 130
    print(f"chatcore chat: {' '.join(problem.split())}", file=sys.stderr, flush=True)
    return 1


async def _run(options: Options) -> int:
    """Chat until the end of input; the exit code. Raises LoginFailed, ChatError, ClientError, OSError."""
    stdin = Stdin()
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    tokens = TokenFiles(options.address)
    source = TokenSource(options, tokens, input if interactive else None, stdin.readline)
    await request(options.address, "GET", "/healthz")  # fail at once if there is no server
    client = await _connect(options, tokens, source)
    try:
        return await _chat(client, options, stdin, interactive)
    except TokenRejected as error:
        tokens.drop(source.user)
        raise LoginFailed(f"the server ended the session: {error.reason or 'log in again'}") from None
    finally:
        await client.close()


async def _connect(options: Options, tokens: TokenFiles, source: TokenSource) -> Client:
    """A started client, with the saved token if it is still valid."""
    token = source.saved()
    if token is not None:
        client = Client(str(options.address), token)
        try:
            await client.start()
            return client
        except TokenRejected:
            await client.close()
            tokens.drop(source.user)
        except BaseException:
            await client.close()
            raise
    client = Client(str(options.address), await source.fresh())
    try:
        await client.start()
    except BaseException:
        await client.close()
        raise
    return client


async def _chat(client: Client, options: Options, stdin: Stdin, interactive: bool) -> int:
    chat = TerminalChat(client, options.history)
    if interactive:
        chat.screen = TtyScreen(lambda: chat.title + PROMPT_END, chat.status, chat.typed)
        chat.screen.notice(f"{options.address} as {client.user.name}; /help for help")
    else:
        chat.screen = PipeScreen(stdin)
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


async def _talk(chat: TerminalChat, conversation: str, interactive: bool) -> None:
    """Run the typed lines until there are no more."""
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
