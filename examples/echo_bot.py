"""A bot that answers messages to it: it sends the text back, as a reply.

    CHATCORE_PASSWORD='correct horse' python examples/echo_bot.py http://127.0.0.1:8080 echo lobby

The arguments are the server, the bot's name, and a channel. The bot creates its account and the channel if there are
none, and answers each message in the channel that begins with "@echo", and each direct message. It does not answer
replies, so that two bots do not answer each other for ever. Messages that are sent while it does not run stay
unanswered. Ctrl-C ends it.
"""

import asyncio
import contextlib
import os
import sys

from chatcore.client import ChatError, Client, Message


def spoken_to(chat: Client, message: Message) -> str:
    """The text for the bot in the message; empty if the message is not meant for the bot."""
    if message.sender == chat.user.id or message.reply_to is not None or not message.body:
        return ""
    called = f"@{chat.user.name} "
    if message.body.startswith(called):
        return message.body.removeprefix(called)
    view = chat.conversations.get(message.conv)
    return message.body if view is not None and view.kind == "dm" else ""


async def main(url: str, name: str, channel: str) -> None:
    async with await Client.login(url, name, os.environ["CHATCORE_PASSWORD"], register=True) as chat:
        await chat.channel(channel)
        print(f"{name} listens in #{channel}", flush=True)
        async for event in chat.events():  # each message once and in order, over reconnects
            if isinstance(event, Message) and (text := spoken_to(chat, event)):
                try:
                    await chat.send(event.conv, text, reply_to=event.seq)  # returns when it is durable
                except ChatError as error:  # for example, the user has blocked the bot
                    print(f"no answer to {event.sender}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(*sys.argv[1:]))
