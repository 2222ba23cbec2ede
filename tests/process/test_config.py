"""Settings: which source wins, and the error for a value that is not allowed."""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatcore.config import ConfigError, as_json, as_toml, load, load_with_origins, specs
from chatcore.settings import ServerSettings, Settings, is_loopback


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "chatcore.toml"
    file.write_text("[server]\nport = 1\nhost = '127.0.0.1'\nworkers = 1\n[rates]\nmessages_per_s = 5\n")
    env = {"CHATCORE_PORT": "2", "CHATCORE_SERVER_HOST": "127.0.0.2", "PATH": "/bin"}
    loaded = load_with_origins(file, env, {"server.port": "3", "server.data": None})
    assert loaded.settings.server == ServerSettings(port=3, host="127.0.0.2", workers=1)
    assert loaded.settings.rates.messages_per_s == 5.0
    assert loaded.origins["server.port"] == "flag --port"
    assert loaded.origins["server.host"] == "environment CHATCORE_SERVER_HOST"
    assert loaded.origins["server.workers"] == f"file {file}"
    assert loaded.origins["server.data"] == "default"


def test_the_long_name_of_a_variable_wins() -> None:
    assert load(env={"CHATCORE_SERVER_PORT": "1", "CHATCORE_PORT": "2"}).server.port == 1


def test_nothing_given_is_the_default() -> None:
    assert load() == Settings.default() == Settings()


def test_variables_of_the_tests_the_build_and_the_chat_are_ignored() -> None:
    assert (
        load(
            env={
                "CHATCORE_TEST_X": "1",
                "CHATCORE_DEBUG": "1",
                "CHATCORE_SANITIZE": "address",
                "CHATCORE_PASSWORD": "x",
            }
        )
        == Settings()
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[server]\nprot = 1", "server.prot = 1 (file FILE) is not a setting: did you mean server.port"),
        ("[sever]\nport = 1", "sever (file FILE) is not a group of settings: the groups are server, limits"),
        ("port = 1", "port (file FILE) is not a group of settings"),
        (
            "[server]\nport = 65536",
            "server.port = 65536 (file FILE) is not allowed: it must be a whole number from 0 to",
        ),
        ("[server]\nport = '1'", "server.port = '1' (file FILE) is not allowed"),
        ("[server]\nport = true", "server.port = True (file FILE) is not allowed"),
        ("[server]\nport = 1.0", "server.port = 1.0 (file FILE) is not allowed"),
        ("[server]\nhost = ''", "server.host = '' (file FILE) is not allowed"),
        ('[server]\ndata = "a\\nb"', r"server.data = 'a\nb' (file FILE) is not allowed"),
        ("[server]\nregistration = 'no'", "(file FILE) is not allowed: it must be one of auto, open, closed"),
        ("[rates]\nmessages_per_s = nan", "rates.messages_per_s = nan (file FILE) is not allowed"),
        ("[rates]\nmessages_per_s = inf", "rates.messages_per_s = inf (file FILE) is not allowed"),
        ("[rates]\nmessages_per_s = false", "rates.messages_per_s = False (file FILE) is not allowed"),
        ("[server", "config file FILE is not valid TOML: "),
        (
            "[timeouts]\nping_ms = 5000\nping_min_ms = 6000",
            "ping_min_ms = 6000 (file FILE) is not allowed: it must be at most timeouts.ping_ms = 5000 (file FILE)",
        ),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "chatcore.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(file)
    message = str(error.value)
    assert expected.replace("FILE", str(file)) in message
    assert "\n" not in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)
    (tmp_path / "latin").write_bytes(b"# \xe9\n")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load(tmp_path / "latin")


@given(st.text(max_size=20))
def test_an_environment_variable_is_a_value_or_one_clear_line(text: str) -> None:
    for spec in specs():
        message = ""
        try:
            load(env={spec.env: text})
        except ConfigError as error:
            message = str(error)
        assert message == "" or spec.name in message
        assert "\n" not in message


def test_every_setting_is_documented_and_its_default_is_allowed() -> None:
    seen = list(specs())
    assert len({spec.env for spec in seen}) == len(seen) >= 58
    for spec in seen:
        assert spec.doc.endswith(".")
        assert len(spec.doc.split()) > 4, spec.name
        assert spec.allowed
        assert spec.value(spec.default, "default", is_text=False) == spec.default
        assert spec.value(str(spec.default), "text", is_text=True) == spec.default


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().server.port = 1  # type: ignore[misc]


@given(st.text(min_size=1, max_size=30))
def test_what_is_printed_can_be_saved_as_a_file(name: str) -> None:
    try:
        loaded = load_with_origins(env={"CHATCORE_PORT": "9"}, flags={"server.data": name, "limits.history": 7})
    except ConfigError:
        return
    printed = as_toml(loaded)
    assert tomllib.loads(printed) == dataclasses.asdict(loaded.settings)


def test_the_printed_file_is_loaded_again_and_explains_itself(tmp_path: Path) -> None:
    loaded = load_with_origins(env={"CHATCORE_PORT": "9"})
    file = tmp_path / "new\nline.toml"
    file.write_text(as_toml(loaded))
    again = load_with_origins(file)
    assert again.settings == loaded.settings
    assert tomllib.loads(as_toml(again)) == dataclasses.asdict(again.settings)
    for spec in specs():
        assert spec.doc in as_toml(loaded)
    assert "# From: environment CHATCORE_PORT.\nport = 9\n" in as_toml(loaded)


def test_json_has_value_origin_and_doc() -> None:
    port = json.loads(as_json(load_with_origins(env={"CHATCORE_PORT": "9"})))["server.port"]
    assert port["value"] == 9
    assert port["default"] == 8080
    assert port["origin"] == "environment CHATCORE_PORT"
    assert port["doc"]


@pytest.mark.parametrize(
    ("host", "registration", "is_open"),
    [
        ("127.0.0.1", "auto", True),
        ("127.9.9.9", "auto", True),
        ("::1", "auto", True),
        ("localhost", "auto", True),
        ("0.0.0.0", "auto", False),
        ("::", "auto", False),
        ("192.0.2.1", "auto", False),
        ("chat.example", "auto", False),
        ("0.0.0.0", "open", True),
        ("127.0.0.1", "closed", False),
    ],
)
def test_registration_is_open_on_loopback_only_unless_set(host: str, registration: str, is_open: bool) -> None:
    settings = load(flags={"server.host": host, "server.registration": registration})
    assert settings.registration_open() is is_open
    assert is_loopback("[::1]")


def test_no_workers_means_one_per_core_that_may_be_used() -> None:
    assert Settings().worker_count() == len(os.sched_getaffinity(0))
    assert load(flags={"server.workers": 3}).worker_count() == 3
