"""The command ``chatcore``: its subcommands and their output.

Every mistake of an operator ends in one line on stderr. Exit codes: 0 success, 1 failure, 2 the command line or a
setting is wrong, 130 interrupted. Each subcommand imports the parts that it needs, so that small ones start fast.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import getpass
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .config import ConfigError, Loaded, as_json, as_toml, load, load_with_origins
from .errors import ChatError
from .settings import Settings

if TYPE_CHECKING:
    from .queue.base import DeadLetter, Queue
    from .supervisor.worker_process import StoreMains, WorkerMain

VERIFY_TEXT = (
    "Check the embedded store: its files, every log (dense, each cid once, right counters), the rows of members, read"
    " marks and titles against the log, and the index against the log. Nothing is changed, and the server may run;"
    " chatcore.db-wal grows meanwhile, as all is read in one state of the database. The log is sorted in temporary"
    " files in /var/tmp (or in SQLITE_TMPDIR): about 100 bytes for each entry. Exit code 0: all is well, 1: there are"
    " problems."
)
LOG_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(process)d %(name)s: %(message)s"


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, without printing the usage as well."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(
    argv: Sequence[str] | None = None,
    *,
    worker_main: WorkerMain | None = None,
    store_mains: StoreMains | None = None,
) -> int:
    """Run one command; returns the exit code. `worker_main` and `store_mains` (None: no such processes) replace what
    `serve` runs (in tests)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["chat"]:  # the terminal chat has its own options
            from .client.terminal import main as chat

            return chat(arguments[1:])
        mains = (worker_main, store_mains) if worker_main else None
        parsed = _parser().parse_args(arguments, argparse.Namespace(mains=mains))
        command: Callable[[argparse.Namespace], int] = parsed.command
        return command(parsed)
    except ConfigError as error:
        return _fail(str(error), 2)
    except ChatError as error:
        return _fail(error.message, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of the output has closed the pipe; discard what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(message: str, code: int) -> int:
    print(f"chatcore: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
    return code


def _parser() -> argparse.ArgumentParser:
    where = _Parser(add_help=False)
    # Allowed before and after the last word of a command; with SUPPRESS the later parser does not reset the value.
    where.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="file with settings (TOML)")
    where.add_argument("--data", metavar="DIR", default=argparse.SUPPRESS, help="data directory of the server")
    settings = _Parser(add_help=False, parents=[where])
    settings.add_argument("--host", help="address to listen on")
    settings.add_argument("--port", help="port to listen on")
    settings.add_argument("--workers", help="number of worker processes; 0 starts one per core")
    settings.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="set any setting, for example limits.history=50",
    )

    parser = _Parser(prog="chatcore", description="A self-hosted chat server.")
    parser.add_argument("--version", action="version", version=f"chatcore {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", parents=[settings], help="run the server")
    serve.set_defaults(command=_serve)

    commands.add_parser("chat", help="chat in this terminal")  # listed in the help only; main() runs it

    user = commands.add_parser("user", parents=[where], help="accounts: add, list, disable")
    users = user.add_subparsers(required=True, metavar="ACTION")
    add = users.add_parser("add", parents=[where], help="create an account")
    add.add_argument("name")
    add.add_argument("--password-stdin", action="store_true", help="read the password from the first line of stdin")
    add.set_defaults(command=_user_add)
    listing = users.add_parser("list", parents=[where], help="list all accounts")
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(command=_user_list)
    disable = users.add_parser(
        "disable", parents=[where], help="end the sessions of an account and refuse further log-ins"
    )
    disable.add_argument("name")
    disable.set_defaults(command=_user_disable)

    ctl = commands.add_parser("ctl", parents=[where], help="control a running server: status, drain, reload, scale")
    actions = ctl.add_subparsers(required=True, metavar="ACTION")
    status = actions.add_parser("status", parents=[where], help="show the state of the server and its workers")
    status.add_argument("--json", action="store_true")
    status.set_defaults(command=_status)
    drain = actions.add_parser("drain", parents=[where], help="close the connections of clients one by one, then stop")
    drain.add_argument(
        "--no-wait", action="store_true", help="return at once instead of waiting until the server has stopped"
    )
    drain.set_defaults(command=_drain)
    reload = actions.add_parser(
        "reload", parents=[where], help="read the settings again and replace all workers one by one"
    )
    reload.set_defaults(command=_reload)
    scale = actions.add_parser("scale", parents=[where], help="change the number of workers")
    scale.add_argument("workers", type=int)
    scale.set_defaults(command=_scale)

    queue = commands.add_parser(
        "queue", parents=[where], help="the queue of background work: list, retry or drop dead letters"
    )
    queue_actions = queue.add_subparsers(required=True, metavar="ACTION")
    prefixed = _Parser(add_help=False, parents=[where])
    prefixed.add_argument("--of", metavar="NAME", help="which queue, if several servers share one Redis")
    lists = queue_actions.add_parser(
        "list", parents=[prefixed], help="show the length of each topic, or the dead letters"
    )
    lists.add_argument("--dead", action="store_true", help="show the dead letters, with the reason of each")
    lists.add_argument("--json", action="store_true")
    lists.set_defaults(command=_queue_list)
    for action, text in (("retry", "put dead letters back into the queue"), ("drop", "delete dead letters")):
        change = queue_actions.add_parser(action, parents=[prefixed], help=text)
        which = change.add_mutually_exclusive_group(required=True)
        which.add_argument("id", nargs="?", metavar="ID", help="id from `queue list --dead`")
        which.add_argument("--all", action="store_true")
        change.set_defaults(command=_queue_change, action=action)

    database = commands.add_parser("db", parents=[where], help="MongoDB: check and create indexes, plan sharding")
    database_actions = database.add_subparsers(required=True, metavar="ACTION")
    checks = database_actions.add_parser(
        "check", parents=[where], help="list the indexes: the state and the purpose of each"
    )
    checks.add_argument("--json", action="store_true")
    checks.set_defaults(command=_db_check)
    migrate = database_actions.add_parser("migrate", parents=[where], help="create the missing indexes")
    migrate.set_defaults(command=_db_migrate)
    shards = database_actions.add_parser(
        "shard-plan", parents=[where], help="print the commands that shard the database, with their reasons"
    )
    shards.set_defaults(command=_db_shard_plan)

    verify = commands.add_parser(
        "verify", parents=[where], help="check the stored data for damage and contradictions", description=VERIFY_TEXT
    )
    verify.set_defaults(command=_verify)

    config = commands.add_parser("config", parents=[settings], help="print all settings with their origins and reasons")
    config.add_argument("--json", action="store_true")
    config.set_defaults(command=_config)
    return parser


def _flags(parsed: argparse.Namespace) -> dict[str, object]:
    """The settings given as options, by name."""
    flags: dict[str, object] = {
        f"server.{key}": getattr(parsed, key, None) for key in ("host", "port", "workers", "data")
    }
    for assignment in getattr(parsed, "set", ()):
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment} is not of the form NAME=VALUE")
        flags[name.strip()] = value
    return flags


def _load(parsed: argparse.Namespace) -> Loaded:
    return load_with_origins(getattr(parsed, "config", None), os.environ, _flags(parsed))


# -- serve


def _serve(parsed: argparse.Namespace) -> int:
    from .supervisor.supervisor import Supervisor
    from .supervisor.worker_process import StartError

    settings = _load(parsed).settings
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if os.environ.get("CHATCORE_DEBUG") else logging.INFO,
        format=LOG_FORMAT,
        datefmt="%Y-%m-%dT%H:%M:%S",
    )
    try:
        worker_main, store_mains = parsed.mains or _real_mains()
        return Supervisor(
            settings,
            worker_main,
            store_mains=store_mains,
            reread=lambda: load(getattr(parsed, "config", None), os.environ, _flags(parsed)),
            announce=_announce,
        ).run()
    except StartError as error:
        return _fail(str(error), 1)


def _real_mains() -> tuple[WorkerMain, StoreMains]:
    """The main functions of a worker and of the embedded store's processes. They are loaded before the fork, so that
    the processes share their memory and a replacement starts at once. Raises StartError when the native modules are not
    built."""
    from .supervisor.worker_process import StartError

    try:
        from .server.store_processes import STORE_MAINS
        from .server.worker import main as worker_main
    except ImportError as error:
        raise StartError(f"cannot load the worker; build chatcore first: {error}") from error
    return worker_main, STORE_MAINS


def _announce(url: str, settings: Settings, workers: int) -> None:
    """Print that the server is ready, its URL, and the commands to go on with."""
    data = "" if settings.server.data == Settings.default().server.data else f" --data {settings.server.data}"
    # The URL from this machine; left out if it is the chat's default.
    here = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    chat = f"{_program()} chat" + ("" if here == "http://127.0.0.1:8080" else f" {here}")
    # With open registration the chat creates accounts; otherwise the operator has to create the first one.
    following = [chat] if settings.registration_open() else [f"{_program()} user add NAME{data}", chat]
    lines = [
        f"chatcore {__version__} is ready: {workers} worker{'s' if workers != 1 else ''} on {url}",
        f"  data   {Path(settings.server.data).absolute()}",
        *(f"  {'' if number else 'next':6} {command}" for number, command in enumerate(following)),
        f"  look   {_program()} ctl status{data}",
        "  stop   Ctrl-C",
    ]
    print("\n".join(lines), flush=True)


def _program() -> str:
    """How to run this program from the shell that started it."""
    if shutil.which("chatcore"):
        return "chatcore"
    beside = Path(sys.executable).with_name("chatcore")
    if not beside.exists():
        return f"{sys.executable} -m chatcore"
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)


# -- user


def _user_add(parsed: argparse.Namespace) -> int:
    from .accounts.admin import add_user

    settings = _load(parsed).settings
    if parsed.password_stdin:
        password = sys.stdin.readline().rstrip("\n")
    else:
        try:
            password = getpass.getpass(f"Password for {parsed.name}: ")
            if getpass.getpass("Again: ") != password:
                return _fail("the two passwords differ", 1)
        except EOFError:
            return _fail("no password was given; --password-stdin reads it from a pipe", 1)
    print(add_user(settings, parsed.name, password))
    return 0


def _user_list(parsed: argparse.Namespace) -> int:
    from .accounts.admin import list_users

    users = list_users(_load(parsed).settings)
    if parsed.json:
        keys = ("id", "name", "created_ms", "disabled")
        print(json.dumps([dict(zip(keys, user, strict=True)) for user in users]))
        return 0
    _table(
        ("ID", "NAME", "CREATED", ""),
        [
            (user_id, name, time.strftime("%Y-%m-%d %H:%M", time.localtime(created_ms / 1000)), "disabled" * disabled)
            for user_id, name, created_ms, disabled in users
        ],
    )
    return 0


def _user_disable(parsed: argparse.Namespace) -> int:
    from .accounts.admin import disable_user

    disable_user(_load(parsed).settings, parsed.name)
    return 0


# -- ctl


def _ask(parsed: argparse.Namespace, request: dict[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
    from .supervisor.control import call

    return call(Path(_load(parsed).settings.server.data), request, timeout_s)


def _controlled(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """`command`, with errors of the control socket reported in one line."""

    def run(parsed: argparse.Namespace) -> int:
        from .supervisor.control import ControlError

        try:
            return command(parsed)
        except ControlError as error:
            return _fail(str(error), 1)

    return run


#: The supervisor answers at once, whatever its workers do; no answer within this time means that it is suspended.
STATUS_TIMEOUT_S = 5.0


@_controlled
def _status(parsed: argparse.Namespace) -> int:
    from .supervisor.status import summary

    status = _ask(parsed, {"cmd": "status"}, STATUS_TIMEOUT_S)
    del status["ok"]
    if parsed.json:
        print(json.dumps(status))
        return 0
    print("\n".join(summary(status)))
    _table(
        ("SLOT", "PID", "STATE", "CONNECTIONS", "SESSIONS", "UPTIME", "LAST ERROR"),
        [
            (
                worker["slot"],
                worker["pid"] or "-",
                worker["state"],
                worker["connections"],
                worker.get("sessions", 0),
                f"{worker['uptime_s']:.0f} s",
                worker["error"] or "",
            )
            for worker in status["workers"]
        ],
    )
    return 0


@_controlled
def _drain(parsed: argparse.Namespace) -> int:
    _ask(parsed, {"cmd": "drain", "wait": not parsed.no_wait})
    print("draining" if parsed.no_wait else "stopped")
    return 0


@_controlled
def _reload(parsed: argparse.Namespace) -> int:
    print(f"reloaded {_ask(parsed, {'cmd': 'reload'})['workers']} workers")
    return 0


@_controlled
def _scale(parsed: argparse.Namespace) -> int:
    print(f"{_ask(parsed, {'cmd': 'scale', 'workers': parsed.workers})['workers']} workers")
    return 0


# -- queue

#: The most dead letters that `queue list --dead` shows; each carries its payload.
DEAD_SHOWN = 1000


def _queue_list(parsed: argparse.Namespace) -> int:
    from .queue.admin import with_queue

    settings = _load(parsed).settings
    if not parsed.dead:
        topics = with_queue(settings, lambda queue: queue.stats(), parsed.of)
        if parsed.json:
            print(json.dumps([dataclasses.asdict(topic) for topic in topics]))
            return 0
        _table(
            ("TOPIC", "WAITING", "DELAYED", "OLDEST", "RETRIES", "DEAD", "DEAD LOST"),
            [
                (t.topic, t.depth - t.delayed, t.delayed, f"{t.oldest_ms / 1000:.0f} s", t.retries, t.dead, t.dead_lost)
                for t in topics
            ],
        )
        return 0
    letters = with_queue(settings, lambda queue: queue.dead(limit=DEAD_SHOWN), parsed.of)
    if parsed.json:
        print(json.dumps([_letter(letter) for letter in letters]))
    else:
        _table(
            ("ID", "TOPIC", "KEY", "DELIVERIES", "GIVEN UP", "ERROR"),
            [(x.id, x.topic, x.key, x.deliveries, _minute(x.failed_ms), " ".join(x.error.split())) for x in letters],
        )
    if len(letters) == DEAD_SHOWN:
        print(f"only the first {DEAD_SHOWN} are shown", file=sys.stderr)
    return 0


def _letter(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter for JSON: the payload as text if it is UTF-8, else in base64."""
    fields = dataclasses.asdict(letter)
    payload: bytes = fields.pop("payload")
    try:
        return fields | {"payload": payload.decode()}
    except UnicodeDecodeError:
        return fields | {"payload_base64": base64.b64encode(payload).decode()}


def _minute(unix_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_ms / 1000))


def _queue_change(parsed: argparse.Namespace) -> int:
    from .queue.admin import with_queue

    def change(queue: Queue) -> Awaitable[int]:
        return queue.retry(parsed.id) if parsed.action == "retry" else queue.drop(parsed.id)

    count = with_queue(_load(parsed).settings, change, parsed.of)
    if not count and parsed.id is not None:
        return _fail(f"there is no dead letter {parsed.id}", 1)
    done = "back in line" if parsed.action == "retry" else "dropped"
    print(f"{count} {done}")
    return 0


# -- db


def _db_check(parsed: argparse.Namespace) -> int:
    from .store.mongo.admin import check

    findings = check(_load(parsed).settings)
    if parsed.json:
        shown = [{"index": x.label, "state": x.state, "why": x.why, "migrate": x.plan} for x in findings]
        print(json.dumps(shown))
    else:
        _table(("INDEX", "STATE", "WHY"), [(x.label, x.state, x.why) for x in findings])
        for x in findings:
            if x.plan:
                print(f"{x.label}: migrate would {x.plan}" + (f": {x.remedy}" if x.remedy else ""))
    return 1 if any(x.broken for x in findings) else 0


def _db_migrate(parsed: argparse.Namespace) -> int:
    from .store.mongo.admin import migrate

    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    wrong = migrate(_load(parsed).settings, tell)
    for x in wrong:
        print(f"{x.label} is {x.state}: {x.remedy}")
    if not wrong and not lines:
        print("nothing is missing")
    return 1 if wrong else 0


def _db_shard_plan(parsed: argparse.Namespace) -> int:
    from .store.mongo.admin import database_of
    from .store.mongo.schema import shard_plan

    print("\n".join(shard_plan(database_of(_load(parsed).settings))))
    return 0


# -- verify


def _verify(parsed: argparse.Namespace) -> int:
    from .store.sqlite.schema import BrokenStore
    from .store.sqlite.verify import verify

    settings = _load(parsed).settings
    if settings.store.mongodb_url:
        return _fail("this checks the embedded store; `chatcore db check` checks MongoDB", 1)
    try:
        problems = verify(Path(settings.server.data), lambda line: print(line, flush=True))
    except BrokenStore as error:
        return _fail(str(error), 1)
    return 1 if problems else 0


# -- config


def _config(parsed: argparse.Namespace) -> int:
    loaded = _load(parsed)
    print(as_json(loaded) if parsed.json else as_toml(loaded), end="\n" if parsed.json else "")
    return 0


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
