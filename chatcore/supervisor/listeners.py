"""The listening sockets: one per worker slot on the same port, so that the kernel spreads the connections.

The supervisor owns each listener, so it outlives the workers: when a worker dies, its replacement accepts the
connections that wait in the listener's queue.
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

#: Connections that may wait to be accepted, per worker; the kernel limits it to net.core.somaxconn (4096 by default).
BACKLOG: Final = 4096

# asm-generic/socket.h; not in the socket module.
SO_ATTACH_REUSEPORT_CBPF: Final = 51
SO_DETACH_REUSEPORT_BPF: Final = 68


class Listeners:
    """Opens listeners on one address, which is resolved once, at construction."""

    def __init__(self, host: str, port: int) -> None:
        """Resolve the address and check that no other process listens on it. Raises StartError.

        With SO_REUSEPORT alone a second server of the same user would share the port silently, and each server would
        get half of the clients. So this binds the port once without SO_REUSEPORT. (A server that starts within the
        same microseconds can still slip through; on the same data directory the lock stops it.)
        """
        self._host = host
        try:
            found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            raise StartError(f"host {host!r} is neither an address nor a known name: {error}") from error
        # A name such as localhost may have addresses of both families; every client can reach the IPv4 one.
        family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        self._family = family
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # Ignore old connections in TIME_WAIT; another listening socket still makes the bind fail.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen(1)
                self.port: int = probe.getsockname()[1]
        except OSError as error:
            raise StartError(f"cannot listen on {_show(host, port)}: {error.strerror}") from error
        self._address = (address[0], self.port, *address[2:])

    @property
    def url(self) -> str:
        """The URL for a browser or client on this machine."""
        return f"http://{_show(self._host, self.port)}"

    def open(self) -> socket.socket:
        """Open one more listener: bound, listening, non-blocking. Raises StartError."""
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
    """Let the kernel give new connections, at random, only to the `chosen` listeners of the group of `listener`.

    Listeners are numbered in the order of opening; an empty `chosen` lets the kernel use all of them again.

    Closing a listener resets the connections in its queue, unless the machine has net.ipv4.tcp_migrate_req=1 (then
    the kernel moves them to the other listeners). So a worker slot that is to be removed must get nothing new before
    its listener is closed. This attaches a classic BPF program, which needs no privilege.
    """
    try:
        if not chosen:
            listener.setsockopt(socket.SOL_SOCKET, SO_DETACH_REUSEPORT_BPF, 0)
            return
        steps = [
            (0x20, 0, 0, 0xFFFFF000 + 56),  # A = random (SKF_AD_OFF + SKF_AD_RANDOM)
            (0x94, 0, 0, len(chosen)),  # A %= len(chosen)
        ]
        for i, number in enumerate(chosen):
            steps += [(0x15, 0, 1, i), (0x06, 0, 0, number)]  # if A == i: return number
        steps.append((0x06, 0, 0, chosen[0]))  # a program must end with a return
        program = b"".join(struct.pack("=HBBI", *step) for step in steps)
        buffer = ctypes.create_string_buffer(program, len(program))
        fprog = struct.pack("@HP", len(steps), ctypes.addressof(buffer))  # struct sock_fprog
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, fprog)
    except OSError as error:
        # No reason to fail: the connections concerned wait, or are reset and the clients connect again.
        log.info("cannot steer new connections between worker slots: %s", error)


def _show(host: str, port: int) -> str:
    return f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"
