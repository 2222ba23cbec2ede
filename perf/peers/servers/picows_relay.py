"""``picows``: frames built in one shared buffer, on uvloop.

Its example of a broadcast (examples/broadcast_server.py) loops over the transports with ``send``; its reference
advises ``send_reuse_external_bytearray`` to avoid the copy (picows.readthedocs.io, reference, WSTransport). A
server's frames are not masked, so the header that it writes before the message is the same for all, and one buffer
serves them all. Listeners' methods are plain ones, as its guide says is fastest. It runs on aiofastnet's
transports, which it depends on for speed.
"""

from __future__ import annotations

import os
from collections import defaultdict

import uvloop
from picows import (  # type: ignore[import-not-found, unused-ignore]
    WSFrame,
    WSListener,
    WSMsgType,
    WSTransport,
    WSUpgradeRequest,
    ws_create_server,
)

from .common import BACKLOG, HOST, JOIN, JOINED, MAX_MESSAGE_BYTES, start, until_stopped

#: Room that the library wants before the message, for the frame's header.
HEADER_BYTES = 14
HEADER = bytes(HEADER_BYTES)
JOIN_BYTE = ord(JOIN)

rooms: defaultdict[bytes, set[WSTransport]] = defaultdict(set)


class Client(WSListener):  # type: ignore[misc, unused-ignore]
    """One connection."""

    def __init__(self) -> None:
        self.joined: list[bytes] = []

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Join, relay, or close."""
        if frame.msg_type == WSMsgType.TEXT:
            message = frame.get_payload_as_bytes()
            if message[0] == JOIN_BYTE:
                self.joined += message[1:].split()
                for room in self.joined:
                    rooms[room].add(transport)
                transport.send(WSMsgType.TEXT, JOINED.encode())
            else:
                buffer = bytearray(HEADER + message)
                for member in rooms[message[1 : message.index(b" ")]]:
                    member.send_reuse_external_bytearray(WSMsgType.TEXT, buffer, HEADER_BYTES)
        elif frame.msg_type == WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code(), frame.get_close_message())
            transport.disconnect()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        """Forget it."""
        for room in self.joined:
            rooms[room].discard(transport)


def upgrade(request: WSUpgradeRequest) -> Client:
    """Any path will do."""
    return Client()


async def main(port: int) -> None:
    """Serve until stopped."""
    await ws_create_server(upgrade, HOST, port, max_frame_size=MAX_MESSAGE_BYTES, backlog=BACKLOG)
    await until_stopped()
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(main(start(__doc__ or "")))
