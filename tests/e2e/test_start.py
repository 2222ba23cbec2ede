"""Starts that fail: one clear line, an exit code, and nothing touched. And accounts from the command line."""

from __future__ import annotations

import contextlib
import json
import socket
import sqlite3
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from ..server import Server, command
from .conftest import Serve
from .rest import http
from .world import PASSWORD, World


def _files(directory: Path) -> dict[str, bytes | None]:
    """Every file of a directory with its content (sockets and directories: None)."""
    if not directory.exists():
        return {}
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def _fails(data: Path, port: int = 0, settings: Mapping[str, object] | None = None) -> str:
    """Starting a server on the data fails as it should; the line that it says."""
    done = command("serve", "--data", data, "--port", port, "--workers", 2, settings=settings, cwd=data.parent)
    _one_line(done)
    return done.stderr


def _one_line(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode not in (0, -1), done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("chatcore: ")
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_one_line_and_no_data_is_made(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert str(port) in _fails(tmp_path / "data", port)
    assert not (tmp_path / "data").exists()


def test_the_port_of_another_server_is_in_use(serve: Serve, tmp_path: Path) -> None:
    """Both could share it (SO_REUSEPORT), and each would get half of the other's clients."""
    server = serve()
    assert str(server.port) in _fails(tmp_path / "other", server.port)
    assert not (tmp_path / "other").exists()


async def test_data_held_by_another_server_is_one_line_and_that_server_goes_on(serve: Serve) -> None:
    server = serve()
    world = World(server)
    try:
        client = await world.connect(await world.user())
        before = _files(server.data)
        line = _fails(server.data)
        assert str(server.data) in line
        assert str(server.process.pid) in line
        after = _files(server.data)
        assert before.keys() == after.keys()
        assert before == after
        await client.request("ping")
    finally:
        await world.aclose()


def _garbage(path: Path) -> None:
    path.write_bytes(b"this is no database, but somebody may still want it\n" * 100)


def _of_another_application(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA application_id = 1234")
        db.execute("CREATE TABLE recipes(name TEXT)")
        db.execute("INSERT INTO recipes VALUES ('soup')")
    db.close()


def _of_no_application(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE users(name TEXT)")
    db.close()


def _of_a_later_version(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 9999")
    db.close()


def _truncated(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2 + 100)


def _header_only(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(100)


def _overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 8192)


@pytest.mark.parametrize(
    "breaks",
    [
        _garbage,
        _of_another_application,
        _of_no_application,
        _of_a_later_version,
        _truncated,
        _header_only,
        _overwritten,
    ],
)
def test_a_broken_database_is_one_line_and_stays_as_it_is(serve: Serve, breaks: object) -> None:
    server = serve(start=False)
    if server.backend.file is None:
        pytest.skip("this backend keeps its data elsewhere")
    if breaks in (_garbage, _of_another_application, _of_no_application):
        server.data.mkdir()
    else:
        server.start()
        server.stop()
        # Two workers that close at the same moment may both leave the log file to the other.
        with contextlib.closing(sqlite3.connect(server.data / server.backend.file)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path = server.data / server.backend.file
    breaks(path)  # type: ignore[operator]
    before = path.read_bytes()
    beside = {name for name in _files(server.data) if name.startswith(path.name)}
    line = _fails(server.data)
    assert str(path) in line
    assert path.read_bytes() == before
    assert {name for name in _files(server.data) if name.startswith(path.name)} == beside
    for action in (("user", "list"), ("user", "add", "bob", "--password-stdin")):
        _one_line(command(*action, "--data", server.data, stdin=f"{PASSWORD}\n"))
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"CHATCORE_LIMITS_HISTROY": "5"}, ["CHATCORE_LIMITS_HISTROY", "5", "CHATCORE_LIMITS_HISTORY"]),
        ({"limits.history": "0"}, ["limits.history", "0", "from 1 to 1000"]),
        ({"limits.history": "many"}, ["limits.history", "many", "from 1 to 1000"]),
        ({"server.registration": "maybe"}, ["server.registration", "maybe", "open", "closed"]),
    ],
)
def test_an_unknown_or_impossible_setting_is_named(
    tmp_path: Path, settings: dict[str, object], words: list[str]
) -> None:
    line = _fails(tmp_path / "data", settings=settings)
    for word in words:
        assert word in line
    assert not (tmp_path / "data").exists()


# --- chatcore user -------------------------------------------------------------------------------


def _user(server: Server, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return command("user", *arguments, "--data", server.data, settings=server.settings, stdin=stdin)


def _listed(server: Server) -> dict[str, dict[str, object]]:
    done = _user(server, "list", "--json")
    assert done.returncode == 0, done.stderr
    return {user["name"]: user for user in json.loads(done.stdout)}


def _add(server: Server, name: str, password: str = PASSWORD) -> subprocess.CompletedProcess[str]:
    return _user(server, "add", name, "--password-stdin", stdin=f"{password}\n")


async def test_accounts_made_without_a_server_work_with_one(serve: Serve) -> None:
    server = serve(start=False)
    for name in ("alice", "bob"):
        done = _add(server, name)
        assert done.returncode == 0, done.stderr
        assert _listed(server)[name]["id"] == done.stdout.strip()
    assert _user(server, "disable", "bob").returncode == 0
    assert {name: user["disabled"] for name, user in _listed(server).items()} == {"alice": False, "bob": True}
    server.start()
    body = {"name": "alice", "password": PASSWORD}
    assert (await http(server.address, "POST", "/v1/sessions", body=body)).status == 201
    body = {"name": "bob", "password": PASSWORD}
    assert (await http(server.address, "POST", "/v1/sessions", body=body)).status == 401


async def test_accounts_are_made_and_listed_while_the_server_runs(world: World) -> None:
    user = await world.user()
    server = world.server
    done = _add(server, f"cli-{user.id}")
    assert done.returncode == 0, done.stderr
    listed = _listed(server)
    assert listed[user.name]["id"] == user.id
    assert listed[f"cli-{user.id}"]["id"] == done.stdout.strip()
    body = {"name": f"cli-{user.id}", "password": PASSWORD}
    assert (await world.http("POST", "/v1/sessions", body=body)).status == 201
    text = _user(server, "list")
    assert user.name in text.stdout


async def test_what_the_command_line_refuses_is_one_line_and_changes_nothing(world: World) -> None:
    user = await world.user()
    server = world.server
    before = _listed(server)
    _one_line(_add(server, user.name.upper()))
    _one_line(_add(server, "two words"))
    _one_line(_add(server, "somebody", "short"))
    _one_line(_user(server, "disable", "nobody-of-that-name"))
    assert _listed(server) == before


def test_users_of_no_data_are_one_line_and_no_data_is_made(tmp_path: Path) -> None:
    for action in (("user", "list"), ("user", "disable", "alice")):
        _one_line(command(*action, "--data", tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
