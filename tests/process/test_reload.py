"""Rolling reload: clients do not notice it, whether it succeeds or fails."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from chatcore.supervisor import control

from .harness import Server, eventually

MakeServer = Callable[..., Server]


class Traffic:
    """Sends requests without pause on a thread; counts the answered ones, and keeps the errors of the others."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.answered = 0
        self.lost: list[OSError | ValueError] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self.server.ask()
                self.answered += 1
            except (OSError, ValueError) as error:
                self.lost.append(error)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def some_more(self) -> None:
        """Wait until a good deal more was answered or something was lost."""
        enough = self.answered + 200
        eventually(lambda: self.answered >= enough or self.lost)


def test_a_reload_replaces_every_worker_and_loses_no_connection(server: MakeServer) -> None:
    one = server(workers=2).ready()
    seen = {worker["pid"] for worker in one.workers()}
    with Traffic(one) as traffic:
        for _ in range(3):
            traffic.some_more()
            assert one.call("reload") == {"ok": True, "workers": 2}
            fresh = {worker["pid"] for worker in one.workers() if worker["state"] == "ready"}
            assert len(fresh) == 2
            assert not fresh & seen
            seen |= fresh
        traffic.some_more()
    assert traffic.lost == []


def test_the_old_worker_serves_until_the_new_one_is_ready(server: MakeServer, tmp_path: Path) -> None:
    one = server(workers=1).ready()
    old = one.worker(0)
    one.behave(never_ready=str(tmp_path / "go"))
    one.signal(signal.SIGHUP)
    eventually(lambda: [worker["state"] for worker in one.workers()] == ["ready", "starting"])
    assert one.ask().pid == old["pid"]
    (tmp_path / "go").touch()
    fresh = one.replaced(0, old["pid"])
    assert fresh["nonce"] != old["nonce"]
    assert one.ask().pid == fresh["pid"]


@pytest.mark.parametrize("how", [{"crash": "boom"}, {"exit": 4}, {"start_error": "boom"}])
def test_the_old_worker_stays_when_the_new_one_fails(server: MakeServer, how: dict[str, object]) -> None:
    one = server(workers=2).ready()
    before = [worker["pid"] for worker in one.workers()]
    one.behave(**how)
    with pytest.raises(control.ControlError, match="the new worker 0 failed: "):
        one.call("reload")
    assert [worker["pid"] for worker in one.workers()] == before
    assert one.ask().line == "hello"
    one.behave()
    assert one.call("reload")["ok"]


def test_the_old_worker_stays_when_the_new_one_is_not_ready_in_time(server: MakeServer) -> None:
    one = server("--set", "timeouts.worker_start_ms=2000", workers=1).ready()
    before = one.worker(0)["pid"]
    one.behave(never_ready="/nonexistent")
    with pytest.raises(control.ControlError, match="it was not ready after 2000 ms"):
        one.call("reload")
    assert one.worker(0)["pid"] == before


def test_the_settings_are_read_anew_and_bad_ones_change_nothing(server: MakeServer, tmp_path: Path) -> None:
    file = tmp_path / "chatcore.toml"
    file.write_text("[server]\nworkers = 1\n")
    one = server("--config", str(file), workers=None).ready()
    pid = one.worker(0)["pid"]
    file.write_text("[server]\nworkers = 'many'\n")
    with pytest.raises(control.ControlError, match=r"server.workers = 'many' \(file .*\) is not allowed"):
        one.call("reload")
    one.logged("reload refused, the settings stay as they were: server.workers = 'many'")
    assert one.worker(0)["pid"] == pid
    file.write_text("[server]\nworkers = 2\nhost = '127.0.0.2'\n")
    assert one.call("reload")["ok"]
    one.logged("host, port and data stay as they are")
    eventually(lambda: len([worker for worker in one.workers() if worker["state"] == "ready"]) == 2)


def test_requests_during_a_reload_make_one_more(server: MakeServer, tmp_path: Path) -> None:
    one = server(workers=1).ready()
    one.behave(never_ready=str(tmp_path / "go"))
    one.signal(signal.SIGHUP)
    eventually(lambda: len(one.workers()) == 2)
    one.signal(signal.SIGHUP)
    one.signal(signal.SIGHUP)
    (tmp_path / "go").touch()
    eventually(lambda: one.log().count("reloaded\n") == 2, one.log())
    assert one.call("reload")["ok"]
    assert one.log().count("reloaded\n") == 3


def test_a_slot_whose_worker_died_is_part_of_the_reload(server: MakeServer) -> None:
    one = server(workers=2, worker={"exit": 9, "slot": 1})
    one.logged("worker 0 .* is ready")
    one.logged("(?s)(worker 1 .* died: exit code 9.*){4}")
    one.behave()
    assert one.call("reload")["ok"]
    one.ready()
    assert [worker["state"] for worker in one.workers() if worker["state"] != "draining"] == ["ready", "ready"]
