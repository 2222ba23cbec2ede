"""``websockets``: its ``broadcast()`` on uvloop.

Configured as its documentation advises for many receivers: ``broadcast()`` instead of tasks or queues
(websockets.readthedocs.io, topics/broadcast), uvloop and the C extension (topics/performance), no compression,
which costs memory and CPU for small messages (topics/compression, topics/memory).
"""

from __future__ import annotations

import os
from collections import defaultdict

import uvloop
import websockets
from websockets.asyncio.server import ServerConnection, serve

from .common import BACKLOG, HOST, JOIN, JOINED, MAX_MESSAGE_BYTES, start, until_stopped

rooms: defaultdict[str, set[ServerConnection]] = defaultdict(set)


async def client(connection: ServerConnection) -> None:
    """Serve one connection to its end."""
    joined: list[str] = []
    try:
        async for message in connection:
            assert isinstance(message, str)
            if message[0] == JOIN:
                joined += message[1:].split()
                for room in joined:
                    rooms[room].add(connection)
                await connection.send(JOINED)
            else:
                websockets.broadcast(rooms[message[1 : message.index(" ")]], message)
    except websockets.ConnectionClosedError:
        pass  # a client that went without a word
    finally:
        for room in joined:
            rooms[room].discard(connection)


async def main(port: int) -> None:
    """Serve until stopped."""
    async with serve(client, HOST, port, compression=None, max_size=MAX_MESSAGE_BYTES, backlog=BACKLOG):
        await until_stopped()
        os._exit(0)  # thousands of close handshakes are nothing to wait for


if __name__ == "__main__":
    uvloop.run(main(start(__doc__ or "")))
