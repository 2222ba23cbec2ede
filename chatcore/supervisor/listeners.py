"""The listening sockets: one per worker slot on the same port, so that the kernel spreads the connections.

Each belongs to the supervisor and outlives its workers: a connection that waits in the queue of a worker that
died is taken by its replacement.
"""

from __future__ import annotations

import ctypes
import logging
import socket
import struct
from collections.abc import Sequence
from typing import Final

from .worker_process import StartError

log = logging.getLogger("chatcore.listeners")

#: Connections that wait to be accepted, per worker; the kernel cuts it to net.core.somaxconn (4096 by default).
BACKLOG: Final = 4096

# asm-generic/socket.h; not in the socket module.
SO_ATTACH_REUSEPORT_CBPF: Final = 51
SO_DETACH_REUSEPORT_BPF: Final = 68


class Listeners:
    """Opens listeners on one address. The address is fixed when this is made."""

    def __init__(self, host: str, port: int) -> None:
        """Find the address and make sure that nobody else has it. Raises StartError.

        With SO_REUSEPORT alone a second server of the same user would share the port silently, and each would
        get half of the clients; so the port is first bound without it. (A server that starts within the same
        microseconds can still slip through; on the same data directory the lock stops it.)
        """
        self._host = host
        try:
            found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            raise StartError(f"host {host!r} is no address and no known name: {error}") from error
        # A name such as localhost may have both kinds; the IPv4 one is what everything else can reach.
        family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        self._family = family
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # Old connections in TIME_WAIT do not matter; a listening socket still refuses.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen(1)
                self.port: int = probe.getsockname()[1]
        except OSError as error:
            raise StartError(f"cannot listen on {_show(host, port)}: {error.strerror}") from error
        self._address = (address[0], self.port, *address[2:])

    @property
    def url(self) -> str:
        """Where a browser or client on this machine would go."""
        return f"http://{_show(self._host, self.port)}"

    def open(self) -> socket.socket:
        """One more listener: bound, listening, non-blocking. Raises StartError."""
        listener = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(self._address)
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            raise StartError(f"cannot listen on {_show(self._host, self.port)}: {error.strerror}") from error
        return listener


def steer(listener: socket.socket, chosen: Sequence[int]) -> None:
    """Let the kernel give new connections only to these listeners of the group (numbered in the order of opening),
    at random. None: to all again.

    A listener that is closed resets what waits in its queue, unless net.ipv4.tcp_migrate_req=1 is set on the
    machine (then the kernel moves it to the others). So a slot that is to go first gets nothing new. It is a classic
    BPF program, which needs no privilege.
    """
    try:
        if not chosen:
            listener.setsockopt(socket.SOL_SOCKET, SO_DETACH_REUSEPORT_BPF, 0)
            return
        steps = [
            (0x20, 0, 0, 0xFFFFF000 + 56),  # A = random (SKF_AD_OFF + SKF_AD_RANDOM)
            (0x94, 0, 0, len(chosen)),  # A %= how many
        ]
        for i, number in enumerate(chosen):
            steps += [(0x15, 0, 1, i), (0x06, 0, 0, number)]  # if A == i: return number
        steps.append((0x06, 0, 0, chosen[0]))  # a program must end with a return
        program = b"".join(struct.pack("=HBBI", *step) for step in steps)
        buffer = ctypes.create_string_buffer(program, len(program))
        fprog = struct.pack("@HP", len(steps), ctypes.addressof(buffer))  # struct sock_fprog
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, fprog)
    except OSError as error:
        # Worth no more than a line: those connections wait, or are reset, and come again.
        log.info("new connections cannot be steered away from a slot: %s", error)


def _show(host: str, port: int) -> str:
    return f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"
