"""More and fewer workers in a running server."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from chatcore.supervisor import control

from .harness import Server, alive, eventually
from .test_reload import Traffic

MakeServer = Callable[..., Server]


def slots(one: Server) -> list[int]:
    return [worker["slot"] for worker in one.workers() if worker["state"] == "ready"]


def test_growing_and_shrinking_lose_no_connection(server: MakeServer) -> None:
    one = server(workers=2).ready()
    with Traffic(one) as traffic:
        assert one.call("scale", workers=4) == {"ok": True, "workers": 4}
        assert slots(one) == [0, 1, 2, 3]
        eventually(lambda: one.ask().slot == 3)
        assert one.call("scale", workers=1) == {"ok": True, "workers": 1}
        assert slots(one) == [0]
        traffic.some_more()
        assert one.call("scale", workers=3) == {"ok": True, "workers": 3}
        eventually(lambda: one.ask().slot == 2)
        traffic.some_more()
    assert traffic.lost == []


def test_a_slot_that_goes_gets_no_new_connections_but_answers_those_it_has(server: MakeServer) -> None:
    one = server(workers=2, worker={"drain_s": 1}).ready()
    leaving = one.worker(1)["pid"]
    # Connected but not accepted yet: some of them wait in the queue of worker 1.
    waiting = [one.connect() for _ in range(20)]
    one.signal(signal.SIGTTOU)
    one.logged("changing the number of workers to 1")
    one.workers()  # answered in a later round than the one that steers
    answers = [one.ask_on(connection) for connection in waiting]
    assert all(answer.line == "hello" for answer in answers)
    assert {one.ask().slot for _ in range(50)} == {0}
    eventually(lambda: not alive(leaving))
    assert slots(one) == [0]
    for connection in waiting:
        connection.close()


def test_signals_add_and_take_one(server: MakeServer) -> None:
    one = server(workers=1).ready()
    one.signal(signal.SIGTTIN)
    eventually(lambda: slots(one) == [0, 1])
    one.signal(signal.SIGTTOU)
    eventually(lambda: slots(one) == [0])
    one.signal(signal.SIGTTOU)  # the last one stays
    assert one.call("scale", workers=1)["workers"] == 1
    assert one.ask().slot == 0


@pytest.mark.parametrize("workers", [0, 129, -1, "2", 1.5, True, None])
def test_impossible_numbers_of_workers_are_refused(server: MakeServer, workers: object) -> None:
    one = server(workers=1).ready()
    with pytest.raises(control.ControlError, match="it must be a whole number from 1 to 128"):
        one.call("scale", workers=workers)
    assert slots(one) == [0]


def test_scaling_reports_workers_that_cannot_start(server: MakeServer) -> None:
    one = server(workers=1).ready()
    one.behave(crash="boom")
    with pytest.raises(control.ControlError, match="worker 1 died before it was ready: RuntimeError: boom"):
        one.call("scale", workers=2)
    assert slots(one) == [0]
    assert one.call("scale", workers=1) == {"ok": True, "workers": 1}
    assert one.ask().slot == 0
