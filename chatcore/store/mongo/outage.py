"""The log lines of an outage of MongoDB: one when it begins, one when it ends.

The driver logs connections that it loses, or cannot make, in the background: as an error with its traceback,
for each of them and again every second. An outage is no bug, so this filter replaces those lines. Any other
failure in the background is left as it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from pymongo.errors import PyMongoError

log = logging.getLogger("chatcore.store")

#: Where the driver logs its background tasks.
DRIVER_LOG: Final = "pymongo.client"
#: The least time between two beginnings that are logged: an outage that comes and goes would fill the log.
PAUSE_S: Final = 30.0


class Outage(logging.Filter):
    """Of one client. :meth:`watch` replaces the driver's lines from then on, until :meth:`close`.

    :param where: the servers, without credentials.
    :param clock: monotonic, in seconds.
    """

    def __init__(self, where: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._where = where
        self._clock = clock
        self._logged_s = -PAUSE_S
        self._background_s = -PAUSE_S
        self._seen = False  # it answered once; until then the start of the server reports what is wrong
        self._open = False  # the end of this outage is to be logged
        #: Failures of the driver's background tasks for want of a server, since the start.
        self.background = 0

    def watch(self) -> None:
        """Begin to filter the driver's log."""
        logging.getLogger(DRIVER_LOG).addFilter(self)

    def close(self) -> None:
        """Leave the driver's log alone again."""
        logging.getLogger(DRIVER_LOG).removeFilter(self)

    def failed(self, why: str) -> None:
        """An operation was not answered."""
        if self._seen and not self._open and self._clock() - self._logged_s >= PAUSE_S:
            self._logged_s = self._clock()
            self._open = True
            log.warning("mongodb at %s does not answer: %s", self._where, why)

    def succeeded(self) -> None:
        """An operation was answered."""
        self._seen = True
        if self._open:
            self._open = False
            log.info("mongodb at %s answers again", self._where)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the driver's own line is to stay."""
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, PyMongoError | OSError):
            return True
        self.background += 1
        if not self._open and self._clock() - self._background_s >= PAUSE_S:
            self._background_s = self._clock()
            log.info("mongodb: no connection to a server, or a lost one: %s", f"{error}".partition(" (")[0])
        return False
