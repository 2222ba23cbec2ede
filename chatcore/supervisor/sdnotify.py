"""Reports the state of the service to systemd: sd_notify(3), without a library.

Without NOTIFY_SOCKET in the environment, nothing is sent.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import Final

log = logging.getLogger("chatcore.sdnotify")

#: Pings per watchdog period; sd_watchdog_enabled(3) recommends an interval of half the period.
PINGS_PER_PERIOD: Final = 2


class Notifier:
    """Sends datagrams to the service manager. Never raises and never blocks."""

    def __init__(self, env: Mapping[str, str]) -> None:
        """`env`: the environment with NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID, as systemd sets them."""
        self._address = env.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # an abstract address
            self._address = "\0" + self._address[1:]
        self._status = ""
        self._socket: socket.socket | None = None
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
        #: Seconds between pings; 0 if systemd expects none.
        self.watchdog_s = 0.0
        usec = env.get("WATCHDOG_USEC", "")
        if self._socket and usec.isdecimal() and env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            self.watchdog_s = int(usec) / 1e6 / PINGS_PER_PERIOD

    def ready(self) -> None:
        """The start, or a reload, is complete."""
        self._send("READY=1")

    def reloading(self) -> None:
        """A reload begins. The time must be in the same datagram (Type=notify-reload)."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def extend_timeout(self, seconds: int) -> None:
        """The start takes longer: do not give up within the next `seconds`."""
        self._send(f"EXTEND_TIMEOUT_USEC={seconds * 1_000_000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """The service is alive; send this every `watchdog_s`."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Set the line that `systemctl status` shows; sent only when it changes."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *lines: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            log.warning("cannot send %s to systemd: %s", lines[0], error)
