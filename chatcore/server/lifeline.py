"""What ties the writer and the indexer of the embedded store to the supervisor, for processes without an event loop."""

from __future__ import annotations

import os
import select
import signal

from ..supervisor.worker_process import StoreProcessContext


class Lifeline:
    """Heartbeats to the supervisor, and the wish to end from it.

    `fds` are for the process's own poll: both become readable, and stay so, when the process is to end. One is for
    SIGTERM, the other for the end of the supervisor.
    """

    def __init__(self, context: StoreProcessContext) -> None:
        """Takes over SIGTERM, so it has to be made in the main thread; before, SIGTERM ends the process."""
        self._stats = context.stats
        self._orphaned = select.poll()
        self._orphaned.register(context.parent_fd, select.POLLIN)
        asked, wake = os.pipe()
        os.set_blocking(wake, False)
        self.fds = (asked, context.parent_fd)
        self._asked = select.poll()
        self._asked.register(asked, select.POLLIN)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # the wake-up descriptor tells it

    def beat(self) -> None:
        """The process's loop goes on; to be called several times in ``timeouts.stuck_writer_ms``."""
        self._stats.beat()

    def ready(self) -> None:
        """The process does its work from now on; the workers are forked when the writer first says so."""
        self._stats.ready()

    def asked(self) -> bool:
        """Whether the supervisor asked it to end."""
        return bool(self._asked.poll(0))

    def stopping(self) -> bool:
        """Whether it is to end: asked by SIGTERM when all workers are gone, or since the supervisor died."""
        return self.asked() or self.orphaned()

    def orphaned(self) -> bool:
        """Whether the supervisor died. Its workers drain then, and the writer has to serve them until they are gone."""
        return bool(self._orphaned.poll(0))
