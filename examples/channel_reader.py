"""Prints a channel as it goes, and continues after a restart where it stopped.

    CHATCORE_PASSWORD='correct horse' python examples/channel_reader.py http://127.0.0.1:8080 carol lobby lobby.state

The arguments are the server, the reader's user (created if there is none), a channel, and the file that keeps how far
the reader has read. The first start begins with the next message; later ones begin after the last message printed, and
print what was said meanwhile. Ctrl-C ends it. If it is killed, it may print the last messages once more, but it leaves
none out once the file exists, a moment after the first start.
"""

import asyncio
import contextlib
import os
import sys

from chatcore.client import Client, FileState, Gap, Message


async def main(url: str, name: str, title: str, state: str) -> None:
    async with await Client.login(url, name, os.environ["CHATCORE_PASSWORD"], register=True) as chat:
        channel = await chat.channel(title)  # joined, or created if there is none
    async with Client(url, chat.token, only=[channel], state=FileState(state)) as chat:
        await chat.view(channel)
        print(f"reading #{title}", file=sys.stderr, flush=True)
        # Asking for the next event says that the last one is done: only then does the saved state move past it.
        async for event in chat.events():
            if isinstance(event, Message) and event.body is not None:
                print(f"{await chat.name_of(event.sender)}: {event.body}", flush=True)
            elif isinstance(event, Gap):
                print(f"messages {event.first} to {event.last} are lost", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(*sys.argv[1:]))
