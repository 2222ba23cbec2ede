"""The parts that the servers in Python share: the command line, the limits of the system, the protocol of relay.py."""

from __future__ import annotations

import argparse
import asyncio
import resource
import signal
from typing import Final

#: Connections that may wait to be accepted: a load generator opens thousands at once.
BACKLOG: Final = 4096
HOST: Final = "127.0.0.1"
JOIN: Final = "J"
SEND: Final = "M"
JOINED: Final = "joined"
MAX_MESSAGE_BYTES: Final = 64 * 1024


def start(about: str) -> int:
    """The port to listen on; as many files may be open as the system allows."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1, help="one process serves all rooms; more are not started")
    port: int = parser.parse_args().port
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return port


async def until_stopped() -> None:
    """Return on SIGTERM or Ctrl-C."""
    stop = asyncio.Event()
    for ending in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(ending, stop.set)
    await stop.wait()
