"""``chatcore db``, and what a server does at its start, on a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from chatcore import cli
from chatcore.store.mongo import schema
from chatcore.store.mongo.store import BrokenSchema

from ...services.production import mongodb, redis_url
from ..harness import Database
from .parts import Worker, run, workers

ALL = [index.label for index in schema.INDEXES]


@pytest.fixture
def settings(database: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    """The command finds the database by its settings."""
    monkeypatch.setenv("CHATCORE_STORE_MONGODB_URL", database.url)
    monkeypatch.setenv("CHATCORE_STORE_MONGODB_DATABASE", database.name)
    monkeypatch.setenv("CHATCORE_REDIS_URL", "redis://127.0.0.1:1")  # they go together; it is not asked
    return database


@pytest.fixture
def inside(settings: Database) -> Iterator[Any]:
    """The database itself."""
    client: MongoClient[dict[str, Any]]
    with mongodb().client() as client:
        yield client[settings.name]


def _check(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    code = cli.main(["db", "check", "--json"])
    return code, {one["index"]: one for one in json.loads(capsys.readouterr().out)}


def _start(database: Database) -> None:
    async def work() -> None:
        async with workers(database, 1):
            pass

    run(work())


def test_an_empty_database_lacks_everything_and_migrate_makes_it(
    settings: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = _check(capsys)
    assert code == 1
    assert list(found) == ALL
    assert {one["state"] for one in found.values()} == {"missing", "optional"}
    assert found["entries(c, f, cid)"] == {
        "index": "entries(c, f, cid)",
        "state": "missing",
        "why": "exactly once",
        "migrate": "make index entries(c, f, cid) (unique)",
    }
    assert found["tokens(gone)"]["state"] == "optional", "without it the rest is right"

    assert cli.main(["db", "migrate"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == ["making index entries(c, s) (unique)", "made index entries(c, s) (unique)"]
    assert [line for line in told if line.startswith("made")] == told[1::2]
    assert len(told) == 2 * len(ALL)
    code, found = _check(capsys)
    assert code == 0
    assert {one["state"] for one in found.values()} <= {"ok", "unused"}
    assert cli.main(["db", "migrate"]) == 0
    assert capsys.readouterr().out == "nothing is missing\n"
    _start(settings)


def test_a_server_makes_its_indexes_in_an_empty_database(
    settings: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    _start(settings)
    assert _check(capsys)[0] == 0


@pytest.mark.parametrize("lacks", ["c_s", "c_f_cid"])
def test_a_database_in_use_that_lacks_an_index_is_refused_until_it_is_made(
    settings: Database, inside: Any, capsys: pytest.CaptureFixture[str], lacks: str
) -> None:
    _start(settings)
    inside["entries"].drop_index(lacks)
    with pytest.raises(BrokenSchema) as refused:
        _start(settings)
    label = f"entries({lacks.replace('_', ', ')})"
    assert str(refused.value) == (
        f"the database {settings.name} lacks indexes: {label} (missing); run chatcore db migrate"
    )
    assert lacks not in inside["entries"].index_information(), "the server makes none in a database in use"
    assert cli.main(["db", "check"]) == 1
    shown = capsys.readouterr().out
    assert f"{label}: migrate would make index {label} (unique)\n" in shown
    assert cli.main(["db", "migrate"]) == 0
    assert inside["entries"].index_information()[lacks]["unique"]
    _start(settings)


def test_a_server_without_the_optional_index_starts(settings: Database, inside: Any) -> None:
    _start(settings)
    inside["tokens"].drop_index("gone")
    _start(settings)


def test_an_index_that_is_different_is_left_to_the_operator(
    settings: Database, inside: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _start(settings)
    inside["entries"].drop_index("c_f_cid")
    inside["entries"].create_index([("c", 1), ("f", 1), ("cid", 1)], name="mine")
    code, found = _check(capsys)
    assert (code, found["entries(c, f, cid)"]["state"]) == (1, "different")
    remedy = "it is not unique, but must be; drop entries.mine by hand, then migrate makes it"
    assert cli.main(["db", "check"]) == 1
    assert f"entries(c, f, cid): migrate would leave it alone: {remedy}\n" in capsys.readouterr().out
    assert cli.main(["db", "migrate"]) == 1
    assert capsys.readouterr().out == f"entries(c, f, cid) is different: {remedy}\n"
    with pytest.raises(BrokenSchema):
        _start(settings)
    inside["entries"].drop_index("mine")
    assert cli.main(["db", "migrate"]) == 0
    _start(settings)


def test_an_index_of_somebody_else_is_shown_and_left_alone(
    settings: Database, inside: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _start(settings)
    inside["entries"].create_index([("ts", 1)], name="theirs")
    code, found = _check(capsys)
    assert (code, found["entries(ts)"]["state"], found["entries(ts)"]["migrate"]) == (0, "foreign", "")
    assert cli.main(["db", "migrate"]) == 0
    assert "theirs" in inside["entries"].index_information()
    _start(settings)


def test_entries_without_the_id_of_their_store_are_not_taken_over(settings: Database, inside: Any) -> None:
    _start(settings)
    inside["entries"].insert_one({"c": "x", "s": 1})
    inside["meta"].delete_many({})
    with pytest.raises(BrokenSchema, match=r"lost its id"):
        _start(settings)


def test_a_database_of_another_version_is_refused(settings: Database, inside: Any) -> None:
    _start(settings)
    inside["meta"].update_one({"_id": "store"}, {"$set": {"version": 99}})
    with pytest.raises(BrokenSchema, match="schema version 99; this program needs 1"):
        _start(settings)


def test_serve_refuses_it_in_one_line(
    settings: Database, inside: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _start(settings)
    inside["entries"].drop_index("c_s")
    monkeypatch.setenv("CHATCORE_REDIS_URL", redis_url())
    command = [sys.executable, "-m", "chatcore", "serve", "--port", "0", "--workers", "1", "--data", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "lacks indexes: entries(c, s) (missing); run chatcore db migrate" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("action", ["check", "migrate", "shard-plan"])
def test_the_embedded_database_needs_none_of_it(
    action: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["db", action]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (
        "",
        "chatcore: store.mongodb_url is empty: the embedded database looks after itself\n",
    )


@pytest.mark.parametrize("action", ["check", "migrate"])
def test_a_database_that_is_not_there_is_told_in_one_line(
    settings: Database, action: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATCORE_STORE_SERVER_SELECTION_MS", "300")
    monkeypatch.setenv("CHATCORE_STORE_OPERATION_MS", "300")
    monkeypatch.setenv("CHATCORE_STORE_MONGODB_URL", "mongodb://127.0.0.1:1/?directConnection=true")
    assert cli.main(["db", action]) == 1
    assert capsys.readouterr().err == "chatcore: the store does not answer: ServerSelectionTimeoutError\n"
    monkeypatch.setenv("CHATCORE_STORE_MONGODB_URL", "mongodb://127.0.0.1,127.0.0.2/?directConnection=true")
    assert cli.main(["db", action]) == 2
    assert capsys.readouterr().err.startswith("chatcore: store.mongodb_url: ")


def test_the_shard_plan_says_what_to_type_and_why(
    settings: Database, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATCORE_STORE_MONGODB_URL", "mongodb://127.0.0.1:1")  # it is not asked
    assert cli.main(["db", "shard-plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    name = settings.name
    assert commands == [
        f'sh.enableSharding("{name}")',
        f'sh.shardCollection("{name}.entries", {{ c: 1 }})',
        f'sh.shardCollection("{name}.members", {{ c: 1 }})',
        f"db.getSiblingDB(\"{name}\").users.createIndex({{ _id: 'hashed' }})",
        f"sh.shardCollection(\"{name}.users\", {{ _id: 'hashed' }})",
        f"db.getSiblingDB(\"{name}\").tokens.createIndex({{ _id: 'hashed' }})",
        f"sh.shardCollection(\"{name}.tokens\", {{ _id: 'hashed' }})",
    ]
    why = "\n".join(line for line in lines if line.startswith("#"))
    assert "must begin with the shard key" in why
    assert all(reason in why for reason in schema.EVERY_SHARD.values())
    # A unique index of a sharded collection begins with its shard key.
    for index in schema.INDEXES:
        key = schema.SHARD_KEYS.get(index.collection)
        assert not index.unique or key is None or index.keys[: len(key)] == key


def test_a_worker_is_not_healthy_before_its_start(database: Database) -> None:
    async def work() -> None:
        worker = Worker(database, {}, {})
        assert not worker.store.healthy
        await worker.store.close()

    run(work())
