"""Reading what strace saw: was an entry written, then synced, and only then acknowledged?"""

from __future__ import annotations

import re

#: To files: requests to the writer of the store are written, too, but to a socket.
WRITES = ("pwrite64", "pwritev", "pwritev2")
SYNCS = ("fdatasync", "fsync")
SENDS = ("sendto", "sendmsg", "send", "write", "writev")
CALLS = ",".join(dict.fromkeys((*WRITES, *SYNCS, *SENDS)))

_LINE = re.compile(r"^(\d+) +(<\.\.\. )?(\w+)")


class Trace:
    """Lines of ``strace -f -o``, in the order in which strace saw calls begin, or end."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()

    def problem(self, cid: str, id: int) -> str | None:
        """The problem with the acknowledgement of the message ``cid``, asked for by request ``id``; None: nothing.

        The call that wrote it has to be there, then a sync that began after it and succeeded, then the first
        byte of the reply.
        """
        written = self._first(WRITES, cid, 0)
        if written is None:
            return f"{cid} was not written"
        told = self._first(SENDS, f'\\"ok\\",\\"id\\":{id},', 0)
        if told is None:
            return f"{cid} was not acknowledged"
        synced = self._synced(written)
        if synced is None:
            return f"{cid} was not synced"
        return None if synced < told else f"{cid} was acknowledged (line {told}) before it was synced (line {synced})"

    def _first(self, calls: tuple[str, ...], text: str, at: int) -> int | None:
        for i in range(at, len(self._lines)):
            match = _LINE.match(self._lines[i])
            if match and match[3] in calls and text in self._lines[i]:
                return i
        return None

    def _synced(self, after: int) -> int | None:
        """The end of the first sync that began after a line."""
        running: set[str] = set()  # threads whose sync began after it
        for i in range(after + 1, len(self._lines)):
            match = _LINE.match(self._lines[i])
            if not match or match[3] not in SYNCS:
                continue
            if match[2] is None:
                running.add(match[1])
            if match[1] in running and re.search(r"\)\s+= 0$", self._lines[i]):
                return i
        return None
