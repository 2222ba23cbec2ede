"""Loads the settings from their sources; later ones win: TOML file, environment, flags.

An unknown setting or a value that is not allowed raises :class:`ConfigError`: one line with the setting, its value,
the allowed values and the source. ``settings.py`` declares the settings.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .settings import ORDERED, TOGETHER, Settings

ENV_PREFIX = "CHATCORE_"
#: Variables that are no settings: tests, the build and the terminal chat read them.
ENV_IGNORED = ("CHATCORE_TEST_", "CHATCORE_DEBUG", "CHATCORE_SANITIZE", "CHATCORE_PASSWORD", "CHATCORE_USER")
#: Short names for common settings. The long name wins if both are set.
ENV_SHORT = {
    "CHATCORE_HOST": "server.host",
    "CHATCORE_PORT": "server.port",
    "CHATCORE_WORKERS": "server.workers",
    "CHATCORE_DATA": "server.data",
}


class ConfigError(Exception):
    """A setting is unknown, its value is not allowed, or the file cannot be read; the message is one line."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One setting as declared in ``settings.py``."""

    name: str  # "server.port"
    type: type  # int, float or str
    default: Any
    allowed: str
    field: dataclasses.Field[Any]

    @property
    def doc(self) -> str:
        return str(self.field.metadata["doc"])

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.replace(".", "_").upper()

    def value(self, given: object, origin: str, *, is_text: bool) -> Any:
        """The value of this setting for `given`; `is_text`: convert it, as the environment and flags only have text.

        Raises ConfigError when the value has another type or is not allowed.
        """
        value = given
        try:
            if self.type is float and (is_text or type(given) is int):
                value = float(given)  # type: ignore[arg-type]
            elif self.type is bool and is_text:
                value = {"true": True, "false": False}.get(str(given).lower(), given)
            elif self.type is int and is_text:
                value = int(str(given), 10)
        except ValueError:
            pass
        if type(value) is not self.type or not self.field.metadata["check"](value):
            raise ConfigError(f"{self.name} = {given!r} ({origin}) is not allowed: it must be {self.allowed}")
        return value


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and for each name ("server.port") the source of its value."""

    settings: Settings
    origins: Mapping[str, str]


def specs() -> Iterator[Spec]:
    """Every setting, in the order of ``settings.py``."""
    defaults = Settings.default()
    for group in dataclasses.fields(Settings):
        for field in dataclasses.fields(getattr(defaults, group.name)):
            default = getattr(getattr(defaults, group.name), field.name)
            yield Spec(f"{group.name}.{field.name}", type(default), default, field.metadata["allowed"], field)


def load(
    config_path: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Settings:
    """The settings alone; see :func:`load_with_origins`."""
    return load_with_origins(config_path, env, flags).settings


def load_with_origins(
    config_path: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Loaded:
    """Read and check all settings.

    `config_path`: a TOML file with one table per group. `env`: the environment; None means empty, so that tests do
    not depend on theirs. `flags`: values by name ("server.port"), as text or typed; None values are ignored. Raises
    ConfigError.
    """
    known = {spec.name: spec for spec in specs()}
    values: dict[str, Any] = {name: spec.default for name, spec in known.items()}
    origins: dict[str, str] = dict.fromkeys(known, "default")

    def take(name: str, given: object, origin: str, *, is_text: bool) -> None:
        spec = known.get(name)
        if spec is None:
            raise ConfigError(f"{name} = {given!r} ({origin}) is not a setting: {_nearest(name, known)}")
        values[name] = spec.value(given, origin, is_text=is_text)
        origins[name] = origin

    if config_path is not None:
        for name, given in _read_file(config_path):
            take(name, given, f"file {config_path}", is_text=False)
    for name, given, variable in _read_env(env or {}, known):
        take(name, given, f"environment {variable}", is_text=True)
    for name, flag in (flags or {}).items():
        if flag is not None:
            take(name, flag, "flag --" + name.removeprefix("server."), is_text=isinstance(flag, str))
    for lower, upper in ORDERED:
        if values[lower] > values[upper]:
            raise ConfigError(
                f"{lower} = {values[lower]} ({origins[lower]}) is not allowed: "
                f"it must be at most {upper} = {values[upper]} ({origins[upper]})"
            )
    for one, other in TOGETHER:
        if bool(values[one]) != bool(values[other]):
            given, lacking = (one, other) if values[one] else (other, one)
            raise ConfigError(f"{given} ({origins[given]}) needs {lacking}: several hosts need both")
    return Loaded(_build(values), origins)


def _build(values: Mapping[str, Any]) -> Settings:
    groups = {}
    for group in dataclasses.fields(Settings):
        prefix = group.name + "."
        own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        groups[group.name] = type(getattr(Settings.default(), group.name))(**own)
    return Settings(**groups)


def _read_file(path: str | Path) -> Iterator[tuple[str, object]]:
    try:
        tables = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from error
    groups = [group.name for group in dataclasses.fields(Settings)]
    for name, table in tables.items():
        if name not in groups or not isinstance(table, dict):
            raise ConfigError(f"{name} (file {path}) is not a group of settings: the groups are {', '.join(groups)}")
        for key, given in table.items():
            yield f"{name}.{key}", given


def _read_env(env: Mapping[str, str], known: Mapping[str, Spec]) -> Iterator[tuple[str, str, str]]:
    """(setting, text, variable) for each CHATCORE_ variable; short names come first, so that long ones win."""
    by_variable = dict(ENV_SHORT) | {spec.env: spec.name for spec in known.values()}
    for variable in sorted(env, key=lambda name: (name not in ENV_SHORT, name)):
        if not variable.startswith(ENV_PREFIX) or variable.startswith(ENV_IGNORED):
            continue
        if variable not in by_variable:
            nearest = _nearest(variable, by_variable)
            raise ConfigError(f"{variable} = {env[variable]!r} (environment) is not a setting: {nearest}")
        yield by_variable[variable], env[variable], variable


def _nearest(name: str, known: Mapping[str, object]) -> str:
    close = get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return hint + "`chatcore config` prints all settings"


def as_toml(loaded: Loaded) -> str:
    """The effective settings as a TOML file, each with its documentation and its source."""
    lines = ["# Settings of chatcore. The environment (variable in brackets) overrides this file, flags override both."]
    group = ""
    for spec in specs():
        head, _, key = spec.name.partition(".")
        if head != group:
            group = head
            lines += ["", f"[{group}]"]
        lines += [
            f"# {spec.doc}",
            f"# Allowed: {spec.allowed}. Default: {_toml(spec.default)}. [{spec.env}]",
            # Escaped, since a path may contain a line break, which would end the comment.
            f"# From: {loaded.origins[spec.name].encode('unicode_escape').decode()}.",
            f"{key} = {_toml(_get(loaded.settings, spec.name))}",
        ]
    return "\n".join(lines) + "\n"


def as_json(loaded: Loaded) -> str:
    """The effective settings by name, as one JSON object: value, default, allowed, origin, doc."""
    return json.dumps(
        {
            spec.name: {
                "value": _get(loaded.settings, spec.name),
                "default": spec.default,
                "allowed": spec.allowed,
                "origin": loaded.origins[spec.name],
                "env": spec.env,
                "doc": spec.doc,
            }
            for spec in specs()
        },
        indent=2,
    )


def _get(settings: Settings, name: str) -> Any:
    group, _, key = name.partition(".")
    return getattr(getattr(settings, group), key)


def _toml(value: object) -> str:
    # A JSON string is a TOML basic string, except for escaped characters outside ASCII (surrogate pairs), so those
    # stay unescaped. The check of the value has refused unprintable characters.
    return json.dumps(value, ensure_ascii=False)
