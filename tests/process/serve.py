"""A server whose workers are small but real processes; each test runs it as a program.

Each worker accepts on its listener and answers each connection with one line: its own name and the line it read.
CHATCORE_TEST_WORKER names a file with a JSON object that says how workers behave. Each new worker reads it, so a test
can change the behaviour of later workers. With CHATCORE_TEST_STORE there are a writer and an indexer, too, which write
nothing; they behave as the values of "writer" and "indexer" in the same object say.
"""

from __future__ import annotations

import json
import os
import select
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from chatcore import cli
from chatcore.server.lifeline import Lifeline
from chatcore.supervisor.stats import PartHealth, WorkerState
from chatcore.supervisor.worker_process import StartError, StoreMains, StoreProcessContext, WorkerContext

BEAT_S = 0.05


def read_behaviour() -> dict[str, Any]:
    path = os.environ.get("CHATCORE_TEST_WORKER", "")
    how: dict[str, Any] = json.loads(Path(path).read_text()) if path else {}
    return how


def behaviour(slot: int) -> dict[str, Any]:
    """The behaviour of a worker slot: the whole object; with "slot" in it, other slots behave as its "others"."""
    how = read_behaviour()
    return how if how.get("slot", slot) == slot else how.get("others", {})


def fail_as_told(how: dict[str, Any]) -> None:
    if "start_error" in how:
        raise StartError(str(how["start_error"]))
    if "crash" in how:
        raise RuntimeError(str(how["crash"]))
    if "exit" in how:
        sys.exit(int(how["exit"]))


def tiny_worker(context: WorkerContext) -> int:
    """The contract of `chatcore.supervisor.worker_process`, and nothing else."""
    how = behaviour(context.slot)
    fail_as_told(how)
    while "never_ready" in how and not Path(how["never_ready"]).exists():
        time.sleep(BEAT_S)
    drain, drained = os.pipe()
    os.set_blocking(drained, False)
    if not how.get("ignore_term"):
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        signal.set_wakeup_fd(drained)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    selector = selectors.DefaultSelector()
    selector.register(drain, selectors.EVENT_READ)
    selector.register(context.parent_fd, selectors.EVENT_READ)
    selector.register(context.listener, selectors.EVENT_READ)
    context.stats.store_health = context.stats.bus_health = context.stats.queue_health = PartHealth.OK
    context.stats.cache_health = PartHealth.NONE
    context.stats.metrics = how.get("metrics", {})
    context.stats.ready()
    while True:
        events = [key.fileobj for key, _ in selector.select(BEAT_S)]
        context.stats.beat()
        if context.listener in events:
            take(context)
        if drain in events or context.parent_fd in events:
            break
    context.stats.state = WorkerState.DRAINING
    take(context)
    context.listener.close()
    until = time.monotonic() + float(how.get("drain_s", 0))
    while time.monotonic() < until or ("drain_until" in how and not Path(how["drain_until"]).exists()):
        time.sleep(BEAT_S)
        context.stats.beat()
    return 0


def take(context: WorkerContext) -> None:
    """Answer all connections that wait."""
    while True:
        try:
            connection, _ = context.listener.accept()
        except BlockingIOError:
            return
        context.stats.connections += 1
        with connection:
            connection.settimeout(5)
            answer(context, connection)
        context.stats.connections -= 1


def answer(context: WorkerContext, connection: socket.socket) -> None:
    with connection.makefile("rb") as lines:
        line = lines.readline().decode().strip()
    if line == "hang":
        while True:
            signal.pause()
    if line == "die":
        os._exit(7)
    connection.sendall(f"{context.slot} {os.getpid()} {context.nonce} {line}\n".encode())
    connection.shutdown(socket.SHUT_WR)


def tiny_store_process(context: StoreProcessContext) -> int:
    """The contract of the writer and the indexer, and nothing else."""
    how = read_behaviour().get(context.name, {})
    fail_as_told(how)
    while "never_ready" in how and not Path(how["never_ready"]).exists():
        time.sleep(BEAT_S)
        if not how.get("silent"):
            context.stats.beat()
    lifeline = Lifeline(context)
    poll = select.poll()
    for fd in lifeline.fds:
        poll.register(fd, select.POLLIN)
    lifeline.ready()
    while not poll.poll(BEAT_S * 1000):
        lifeline.beat()
    assert lifeline.stopping()
    while how.get("ignore_term") and not lifeline.orphaned():
        time.sleep(BEAT_S)
    return 0


if __name__ == "__main__":
    store = StoreMains(writer=tiny_store_process, indexer=tiny_store_process)
    sys.exit(
        cli.main(
            sys.argv[1:],
            worker_main=tiny_worker,
            store_mains=store if os.environ.get("CHATCORE_TEST_STORE") else None,
        )
    )
