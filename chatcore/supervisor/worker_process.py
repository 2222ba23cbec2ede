"""What a worker process is given, and what happens between the fork and its first own line.

The contract of ``worker_main(context) -> exit code``:

- It runs in a process of its own, forked by the supervisor. Loops, threads and clients are made in it.
- It calls ``context.stats.ready()`` when it serves clients and ``context.stats.beat()`` from its own loop a
  few times each second ever after, draining included: a worker that does not is killed as stuck.
- SIGTERM means drain: say so (``stats.state = State.DRAINING``), take what waits in the listener's queue, close
  ``listener`` (in a reload others still hold it; in a stop late clients are refused at once instead of
  waiting), be gone within ``settings.server.drain_timeout_ms``, return 0. Until the worker installs a handler,
  SIGTERM simply ends it.
- SIGINT, SIGQUIT, SIGHUP, SIGTTIN, SIGTTOU and SIGPIPE are ignored already: a terminal sends the first ones
  to the whole group, and what they mean is for the supervisor to say.
- When ``parent_fd`` becomes readable (end of file) the supervisor is dead: drain and return as for SIGTERM.
- :class:`StartError` says in one line why this server cannot start (a broken database file).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

from ..settings import Settings
from .stats import State, StatsCell

log = logging.getLogger("chatcore.process")

#: Exit code of a worker that raised StartError; a retry would fail the same way.
EXIT_START_ERROR: Final = 3

#: Sent to the whole group by a terminal, or meant for the supervisor alone.
IGNORED_BY_WORKERS: Final = (
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGPIPE,
)


class StartError(Exception):
    """This server cannot start; the message is one line that tells the operator why."""


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """Everything that a worker gets from outside."""

    settings: Settings
    host: str  # the machine's name; (host, slot, nonce) names a worker for ever
    slot: int  # from 0; a replacement has the same slot and listener
    nonce: int  # random, new for every fork; below 2^53
    listener: socket.socket  # bound, listening, non-blocking; the supervisor's too, so closing it resets nobody
    parent_fd: int  # end of file here: the supervisor is dead
    stats: StatsCell
    version: str

    @property
    def name(self) -> str:
        """ "host:slot:nonce", unique for the lifetime of the worker and after."""
        return f"{self.host}:{self.slot}:{self.nonce:x}"


WorkerMain = Callable[[WorkerContext], int]


def fork_worker(context: WorkerContext, main: WorkerMain, in_child: Callable[[], None]) -> int:
    """Fork a child that runs `main`; returns its pid (in the parent only).

    `in_child` is called there first, to close what the parent holds and the child must not. Raises OSError if
    there can be no process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # A signal that came between fork and the child's own handlers would run the parent's handlers there.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _child(context, main, in_child, blocked)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _child(
    context: WorkerContext, main: WorkerMain, in_child: Callable[[], None], mask: set[int | signal.Signals]
) -> NoReturn:
    """Never returns and never lets an exception reach the code that called fork, which is the parent's."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            # The interpreter's own INT handler counts as none: INT is ignored just below.
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        for ignored in IGNORED_BY_WORKERS:
            signal.signal(ignored, signal.SIG_IGN)
        in_child()
        context.stats.pid = os.getpid()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = main(context)
    except StartError as error:
        code = EXIT_START_ERROR
        context.stats.error = str(error)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:  # whatever it was, the supervisor hears of it
        context.stats.error = f"{type(error).__name__}: {error}".splitlines()[0]
        log.critical("worker %d failed\n%s", context.slot, traceback.format_exc().rstrip())
    finally:
        context.stats.state = State.STOPPED
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            # Not sys.exit: the parent's finally blocks and exit handlers are not the child's to run.
            os._exit(code)
