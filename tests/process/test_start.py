"""Starts: one that succeeds, and all that fail with one line and an exit code, and change nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from .harness import Server, alive, eventually

MakeServer = Callable[..., Server]
DEBUG = {"CHATCORE_DEBUG": "1"}  # logs every fork


def test_it_prints_its_address_once_every_worker_is_ready(server: MakeServer, tmp_path: Path) -> None:
    go = tmp_path / "go"
    one = server(workers=3, worker={"never_ready": str(go), "slot": 1})
    one.logged(r"worker 0 \(process \d+\) is ready")
    one.logged(r"worker 2 \(process \d+\) is ready")
    assert [worker["state"] for worker in one.workers()] == ["ready", "starting", "ready"]
    assert one.printed() == ""
    go.touch()
    one.ready()
    assert f"3 workers on http://127.0.0.1:{one.port}" in one.printed()
    assert str(tmp_path / "data") in one.printed()
    assert f"chat http://127.0.0.1:{one.port}\n" in one.printed()
    assert "user add" not in one.printed()
    assert one.ask().line == "hello"


def test_what_to_type_next_is_to_make_an_account_where_strangers_cannot(server: MakeServer) -> None:
    one = server("--set", "server.registration=closed").ready()
    assert f"user add NAME --data {one.data}\n" in one.printed()


def test_every_worker_gets_connections_and_has_its_own_name(server: MakeServer) -> None:
    one = server(workers=2).ready()
    seen: set[tuple[int, int, int]] = set()

    def both() -> bool:
        answer = one.ask()
        seen.add((answer.slot, answer.pid, answer.nonce))
        return len(seen) == 2

    eventually(both)
    slots, pids, nonces = zip(*seen, strict=True)
    assert set(slots) == {0, 1}
    assert len(set(pids)) == len(set(nonces)) == 2


def test_a_worker_does_not_hold_its_siblings_listeners_nor_the_supervisors_pipes(server: MakeServer) -> None:
    one = server(workers=3).ready()
    for worker in one.workers():
        links = [os.readlink(fd) for fd in Path(f"/proc/{worker['pid']}/fd").iterdir()]
        # Its own listener, its own pipe, and the one end of the supervisor's pipes that shows the supervisor's death.
        assert sum(link.startswith("socket:") for link in links) == 1
        assert len({link for link in links if link.startswith("pipe:")}) == 2


def test_a_port_in_use_is_one_line_and_touches_nothing(server: MakeServer, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        one = server(port=port)
        assert one.ended() == 1
    assert one.log() == f"chatcore: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    assert not (tmp_path / "data").exists()


def test_a_port_that_another_server_shares_readily_is_in_use_too(server: MakeServer, tmp_path: Path) -> None:
    first = server().ready()
    second = server(port=first.port, data=tmp_path / "other")
    assert second.ended() == 1
    assert "Address already in use" in second.log()
    assert not (tmp_path / "other").exists()


def test_a_restart_finds_its_port_free_at_once(server: MakeServer) -> None:
    first = server().ready()
    port = first.port
    # The server closes first, so this connection leaves TIME_WAIT behind on the server's port.
    first.ask()
    first.process.terminate()
    assert first.ended() == 0
    assert server(port=port).ready().port == port


def test_data_that_another_server_holds_is_one_line_with_its_pid(server: MakeServer) -> None:
    first = server().ready()
    second = server()
    assert second.ended() == 1
    assert second.log() == f"chatcore: data directory {first.data} is in use by another server (pid {first.pid})\n"
    assert first.ask().line == "hello"
    assert (first.data / "lock").read_text() == f"{first.pid}\n"


def test_data_that_cannot_be_made_is_one_line(server: MakeServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    one = server(data=tmp_path / "file" / "data")
    assert one.ended() == 1
    assert "Not a directory" in one.log()
    assert one.log().count("\n") == 1


def test_a_bad_setting_is_one_line_and_exit_code_2(server: MakeServer, tmp_path: Path) -> None:
    for arguments, env, expected in (
        (("--set", "limits.history=0"), {}, "limits.history = '0' (flag --limits.history) is not allowed"),
        ((), {"CHATCORE_RATES_MESSAGES_PER_S": "fast"}, "rates.messages_per_s = 'fast' (environment CHATCORE_RATES"),
        ((), {"CHATCORE_PROT": "1"}, "CHATCORE_PROT = '1' (environment) is not a setting: did you mean CHATCORE_PORT"),
        (("--config", str(tmp_path / "none.toml")), {}, "none.toml cannot be read: No such file or directory"),
    ):
        one = server(*arguments, env=env)
        assert one.ended() == 2
        assert expected in one.log()
        assert one.log().count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_an_unknown_host_is_one_line(server: MakeServer) -> None:
    one = server("--host", "no.such.host.invalid")
    assert one.ended() == 1
    assert "chatcore: host 'no.such.host.invalid' is neither an address" in one.log()


def test_it_halts_when_a_worker_raises_starterror(server: MakeServer) -> None:
    one = server(worker={"start_error": "the database is broken"})
    assert one.ended() == 1
    assert one.log() == "chatcore: no worker could start: the database is broken\n"
    assert one.printed() == ""


def test_it_halts_when_no_worker_ever_gets_ready(server: MakeServer) -> None:
    one = server(workers=2, worker={"crash": "no such table"})
    assert one.ended() == 1
    assert one.log().splitlines()[-1] == "chatcore: no worker could start: RuntimeError: no such table"


def test_it_goes_on_when_at_least_one_worker_got_ready(server: MakeServer) -> None:
    one = server(workers=2, worker={"exit": 9, "slot": 1})
    one.logged("worker 1 .* died: exit code 9")
    one.logged("worker 0 .* is ready")
    one.logged("(?s)(worker 1 .* died: exit code 9.*){3}")
    assert one.process.poll() is None
    assert one.printed() == ""
    one.behave()
    one.ready()


def test_a_worker_that_is_not_ready_in_time_is_killed(server: MakeServer, tmp_path: Path) -> None:
    one = server("--set", "timeouts.worker_start_ms=300", workers=1, worker={"never_ready": str(tmp_path / "never")})
    assert one.ended() == 1
    assert one.log().splitlines()[-1] == "chatcore: no worker could start: it was not ready after 300 ms"


def test_nothing_is_left_after_a_failed_start(server: MakeServer) -> None:
    one = server(
        workers=2, worker={"start_error": "no", "slot": 0, "others": {"never_ready": "/nonexistent"}}, env=DEBUG
    )
    assert one.ended() == 1
    started = [int(line.rpartition(" ")[2]) for line in one.log().splitlines() if " is process " in line]
    assert started
    assert not any(alive(pid) for pid in started)
    assert not (one.data / "run" / "control.sock").exists()
