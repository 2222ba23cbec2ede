"""The contract between the supervisor and the processes that it forks, and the fork itself.

The contract of ``worker_main(context) -> exit code``:

- The supervisor forks a process for each worker. The worker creates its loops, threads and clients there.
- The worker calls ``context.stats.ready()`` when it serves clients, and from then on ``context.stats.beat()`` from
  its own loop a few times each second, also while it drains. The supervisor kills a worker without heartbeats as
  stuck.
- SIGTERM asks the worker to drain: it sets ``stats.state = WorkerState.DRAINING``, accepts the connections that wait in
  the listener's queue, closes ``listener``, and returns 0 within ``settings.server.drain_timeout_ms``. (In a reload the
  supervisor and the new worker still hold the listener; in a stop, closing it makes the kernel refuse late clients
  at once instead of letting them wait.) Until the worker installs a handler, SIGTERM ends it.
- The worker starts with SIGINT, SIGQUIT, SIGHUP, SIGTTIN, SIGTTOU and SIGPIPE ignored: a terminal sends the first ones
  to the whole process group, and only the supervisor decides what they mean.
- ``parent_fd`` becomes readable (end of file) when the supervisor has died: the worker drains and returns as after
  SIGTERM.
- The worker raises :class:`StartError`, with the reason in one line, when the server cannot start (for example, the
  database file is broken).

The embedded store has two processes more, the *writer* and the *indexer* (:class:`StoreMains`). Their contract,
``main(context) -> exit code``, is the same but for this:

- The writer is forked before all others, which are forked when it first calls ``context.stats.ready()``. Until then it
  may change the data folder for as long as that takes, if it calls ``context.stats.beat()`` at least once in
  ``settings.timeouts.worker_start_ms``. A StartError, or any other end before it was ever ready, ends the server.
- A ready writer beats several times in ``settings.timeouts.stuck_writer_ms``: while it stands still nobody's write is
  committed, so it is killed and replaced soon.
- SIGTERM asks it to end: to commit what it was given, and to return 0. It is sent when the last worker has left.
- When ``parent_fd`` becomes readable the workers begin to drain, and still need the writer.
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
from typing import Final, NamedTuple, NoReturn

from ..settings import Settings
from .stats import StatsCell, WorkerState

log = logging.getLogger("chatcore.process")

#: Exit code of a process that raised StartError; a retry would fail in the same way.
EXIT_START_ERROR: Final = 3

#: Signals that a terminal sends to the whole process group, or that are meant for the supervisor alone.
IGNORED_BY_CHILDREN: Final = (
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGPIPE,
)


class StartError(Exception):
    """This server cannot start; the message is one line for the operator that says why."""


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """Everything that a worker gets from the supervisor."""

    settings: Settings
    host: str  # the name of the machine; (host, slot, nonce) identifies a worker for ever
    slot: int  # index of the worker slot, from 0; a replacement has the same slot and listener
    nonce: int  # random, new for every fork; below 2^53
    listener: socket.socket  # bound, listening, non-blocking; the supervisor holds it too: closing it resets nothing
    parent_fd: int  # readable (end of file) when the supervisor is dead
    stats: StatsCell
    version: str

    @property
    def name(self) -> str:
        """ "host:slot:nonce", unique for the lifetime of the worker and after."""
        return f"{self.host}:{self.slot}:{self.nonce:x}"


WorkerMain = Callable[[WorkerContext], int]


@dataclass(frozen=True, slots=True)
class StoreProcessContext:
    """Everything that the writer or the indexer of the embedded store gets from the supervisor."""

    settings: Settings  # those of the server's start: a reload changes nothing for these processes
    host: str
    name: str  # "writer" or "indexer"
    parent_fd: int  # readable (end of file) when the supervisor is dead
    stats: StatsCell
    version: str


StoreProcessMain = Callable[[StoreProcessContext], int]


class StoreMains(NamedTuple):
    """The main functions of the embedded store's processes; a field's name is the name of the process."""

    writer: StoreProcessMain
    indexer: StoreProcessMain


def fork_process(name: str, stats: StatsCell, run: Callable[[], int], in_child: Callable[[], None]) -> int:
    """Fork a child that calls `run` and exits with what it returns; returns its pid (in the parent only).

    The child first calls `in_child`, which closes what only the parent may hold. `name` is for the log, "worker 0".
    Raises OSError if the fork fails.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # Between the fork and the child's own handlers, a signal would run the parent's handlers in the child.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _child(name, stats, run, in_child, blocked)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _child(
    name: str,
    stats: StatsCell,
    run: Callable[[], int],
    in_child: Callable[[], None],
    mask: set[int | signal.Signals],
) -> NoReturn:
    """Run the child. It never returns to, or raises into, the code that called fork: that code is the parent's."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            # This resets the interpreter's own SIGINT handler, too; SIGINT is ignored just below.
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        for ignored in IGNORED_BY_CHILDREN:
            signal.signal(ignored, signal.SIG_IGN)
        in_child()
        stats.pid = os.getpid()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = run()
    except StartError as error:
        code = EXIT_START_ERROR
        stats.error = str(error)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:  # the supervisor reads the reason, whatever it was, from the cell
        stats.error = f"{type(error).__name__}: {error}".splitlines()[0]
        log.critical("%s failed\n%s", name, traceback.format_exc().rstrip())
    finally:
        stats.state = WorkerState.STOPPED
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            # Not sys.exit: the child must not run the parent's finally blocks and exit handlers.
            os._exit(code)
