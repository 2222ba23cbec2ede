"""``chatcore queue``: on a server that runs, and on one that does not."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest

from chatcore import cli
from chatcore.queue.redis import PREFIXES
from tests.services.redis import RedisServer

from .harness import SETTINGS, Backend, Log, RedisBackend, SQLiteBackend, empty, run, until

#: As `queue list --json` names them.
TOPIC = {"topic", "depth", "delayed", "oldest_ms", "retries", "dead", "dead_lost"}


@pytest.fixture(params=["sqlite", "redis"])
def backend(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """One that the command finds by its settings, and that is the only one there."""
    if request.param == "sqlite":
        monkeypatch.setenv("CHATCORE_DATA", str(tmp_path))
        return SQLiteBackend(tmp_path)
    server: RedisServer = request.getfixturevalue("redis_server")
    _redis_settings(monkeypatch, server)
    return RedisBackend(server.url)


def _redis_settings(monkeypatch: pytest.MonkeyPatch, server: RedisServer) -> None:
    monkeypatch.setenv("CHATCORE_REDIS_URL", server.url)
    # They go together; it is not asked.
    monkeypatch.setenv("CHATCORE_STORE_MONGODB_URL", "mongodb://127.0.0.1:1")


def _fail_three(backend: Backend) -> list[str]:
    """Three dead letters, and one message of another topic that waits; the ids of the dead."""

    async def work() -> list[str]:
        async with backend.worker(replace(SETTINGS, deliveries=2)) as queue:
            ids = [await queue.put("mail", f"k{n}", b"letter %d" % n) for n in range(2)]
            ids.append(await queue.put("mail", "k2", b"\xff"))
            await queue.put("push", "k", b"waits", delay_ms=3_600_000)
            queue.consume("mail", Log(fails=lambda job: True))
            await empty(queue, "mail")
            return ids

    ids: list[str] = run(work)
    return ids


def _json(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, object]]:
    assert cli.main(["queue", *args, "--json"]) == 0
    found: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return found


def test_it_lists_retries_and_drops_while_no_server_runs(backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    ids = _fail_three(backend)
    mail, push = _json(capsys, "list")
    assert mail.keys() == TOPIC
    assert (mail["topic"], mail["depth"], mail["retries"], mail["dead"]) == ("mail", 0, 3, 3)
    assert (push["topic"], push["depth"], push["delayed"]) == ("push", 1, 1)

    assert cli.main(["queue", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:3] == ["TOPIC", "WAITING", "DELAYED"]

    dead = {letter["id"]: letter for letter in _json(capsys, "list", "--dead")}
    assert dead.keys() == {*ids}
    assert dead[ids[0]]["payload"] == "letter 0"
    assert dead[ids[0]]["deliveries"] == 2
    assert dead[ids[2]]["payload_base64"] == base64.b64encode(b"\xff").decode()
    assert cli.main(["queue", "list", "--dead"]) == 0
    table = capsys.readouterr().out
    assert all(id in table for id in ids)
    assert "ValueError: letter 0 does not please" in table

    assert cli.main(["queue", "drop", ids[0]]) == 0
    assert capsys.readouterr().out == "1 dropped\n"
    assert cli.main(["queue", "drop", ids[0]]) == 1
    assert capsys.readouterr().err == f"chatcore: there is no dead letter {ids[0]}\n"
    assert cli.main(["queue", "retry", ids[1]]) == 0
    assert capsys.readouterr().out == "1 back in line\n"
    assert {letter["id"] for letter in _json(capsys, "list", "--dead")} == {ids[2]}
    assert cli.main(["queue", "drop", "--all"]) == 0
    assert capsys.readouterr().out == "1 dropped\n"
    assert _json(capsys, "list", "--dead") == []
    assert _json(capsys, "list")[0]["depth"] == 1, "the retried one waits for a server"


def test_a_running_server_handles_what_is_retried(backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    _fail_three(backend)

    async def work() -> None:
        log = Log()
        async with backend.worker() as queue:
            queue.consume("mail", log)
            assert await asyncio.to_thread(cli.main, ["queue", "retry", "--all"]) == 0
            await until(lambda: sorted(log.payloads()) == [b"letter 0", b"letter 1", b"\xff"], "all are handled")
            assert {job.delivery for job in log.done} == {1}

    run(work)
    assert capsys.readouterr().out == "3 back in line\n"


@pytest.mark.parametrize("args", [["retry"], ["drop"], ["drop", "x", "--all"], []])
def test_what_to_change_is_said_exactly(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["queue", *args])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_where_there_was_never_a_queue_there_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHATCORE_DATA", str(tmp_path))
    assert cli.main(["queue", "list"]) == 1
    assert "there is no chatcore data" in capsys.readouterr().err
    SQLiteBackend(tmp_path)
    assert _json(capsys, "list") == []
    assert _json(capsys, "list", "--dead") == []
    assert cli.main(["queue", "retry", "--all"]) == 0
    assert capsys.readouterr().out == "0 back in line\n"
    assert cli.main(["queue", "drop", "x"]) == 1


def test_of_several_queues_in_one_redis_one_is_named(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _redis_settings(monkeypatch, redis_server)
    assert _json(capsys, "list") == []
    redis_server.command("SADD", PREFIXES, "chatcore:a", "chatcore:b")
    assert cli.main(["queue", "list"]) == 1
    assert "name one with --of: chatcore:a, chatcore:b" in capsys.readouterr().err
    assert _json(capsys, "list", "--of", "chatcore:a") == []
    assert cli.main(["queue", "list", "--of", "chatcore:c"]) == 1
    capsys.readouterr()
    redis_server.kill()
    assert cli.main(["queue", "list"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1, "a Redis that is away is one line"
