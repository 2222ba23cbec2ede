"""``instructions``: what a send and a delivery cost the server, in instructions of its user code.

Time on a shared machine varies by a tenth; instructions hardly do, so two versions of the source can be compared to
better than 2 %. The real server (one worker, SQLite, local bus, no io_uring) runs under callgrind, which counts the
instructions of all threads of the worker, and of the store's writer and indexer where the server has them; those of the
kernel are not counted. The load comes from this process:

- rooms of 10, batches of 1: one member sends, waits until it has its ``ok`` and all members have the message, and
  sends the next;
- rooms of 10, batches of 64: the same with 64 messages in one write;
- room of 1,000, batches of 16: counted per delivery, and what the sends cost is in it.

What the worker does by the clock (ticks, health, sweeps) is counted while there is no load, and subtracted in
proportion to ticks. The periodic search for missed entries is kept out of what is counted. Commits are calls of
``fdatasync``: a batch that falls into two commits costs more than in one.

Under callgrind everything is some fifty times slower, so two things that would happen at moments that depend on the
load of the machine differ from production: a thread that waits for the interpreter does not interrupt the one that
has it, and the cycle collector is off.

The server of the first tree makes accounts and rooms, and each server starts from a copy of them, since random ids
alone make a difference of a percent. So compare only what one run has counted, and name the older tree first:

    python -m perf instructions --tree /path/to/old --tree .

All trees run on this interpreter and its packages. The same tree twice shows how repeatable the figures are.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from websockets.sync.client import connect

from .bench import progress
from .machine import machine
from .processes import tree as process_tree
from .show import WIDTH, heading
from .store_processes import copy

TOOLS: Final = ("valgrind", "vgdb")
SWITCH_S: Final = 5.0
#: Runs ``python -m chatcore`` with the two differences that the docstring of this module names.
PROGRAM: Final = f"""
import gc, runpy, sys
gc.disable()
switch = sys.setswitchinterval
sys.setswitchinterval = lambda seconds: switch({SWITCH_S})
runpy.run_module("chatcore", run_name="__main__", alter_sys=True)
"""

#: Nothing may time out, be refused or be read again by the clock while everything is so slow.
MINUTES: Final = "600000"
HOUR: Final = "3600000"
SETTINGS: Final = {
    "server.host": "127.0.0.1",
    "server.workers": "1",
    "server.io_uring": "false",
    "server.registration": "open",
    "limits.open_members": "1000",
    "limits.outstanding": "10000",
    "rates.messages_per_s": "100000",
    "rates.messages_burst": "100000",
    "timeouts.handshake_ms": MINUTES,
    "timeouts.auth_ms": MINUTES,
    "timeouts.ping_ms": MINUTES,
    "timeouts.store_ms": MINUTES,
    "timeouts.replay_stall_ms": MINUTES,
    "timeouts.still_worker_ms": HOUR,
    "timeouts.stuck_worker_ms": HOUR,
    "timeouts.stuck_writer_ms": HOUR,
    "timeouts.worker_start_ms": HOUR,
    "accounts.password_hash_memory_kib": "8",
    "accounts.password_hash_time": "1",
    "store.check_interval_ms": "60000",
    "bus.heartbeat_ms": "60000",
}
#: Cached values of a worker live for an hour. Names differ between trees, so each tree is asked for its own.
CACHED: Final = re.compile(r"cache\.(?!l2_|negative_|unheard_)\w+_ttl_ms")
MAX_MEMBERS: Final = 1000
START_S: Final = 300.0
STOP_S: Final = 60.0
#: For one batch, one log-in, or one command to callgrind.
STEP_S: Final = 300.0
#: The worker is left alone: to finish what log-ins began, and to see what it does without load.
SETTLE_S: Final = 1.5
#: A worker whose loop stood still for 2 s searches for missed entries, at some 4,000 instructions for each entry since
#: the last search. The next one follows a minute later (store.check_interval_ms), when the counting is over.
STALL_S: Final = 2.5
IDLE_S: Final = 8.0
WARM_BATCHES: Final = 4
BODY: Final = "x" * 128
#: Functions whose calls are counted.
COMMIT: Final = re.compile(r"fdatasync(@|$)")
TICK: Final = re.compile(r"__pyx_pw_\w*Reactor_\d+tick(@|$)")

#: As these stand in the stream of bytes: a server does not mask, and no body contains them.
OK: Final = b'"t":"ok"'
ERROR: Final = b'"t":"error"'
MESSAGE: Final = b'"t":"msg"'
READY: Final = b'"t":"ready"'
MARKS: Final = (OK, ERROR, MESSAGE, READY)
LONGEST: Final = max(map(len, MARKS))


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of load."""

    name: str
    unit: str
    members: int
    batch: int

    def batches(self, messages: int) -> int:
        """How many batches are sent."""
        return max(1, round(messages / self.batch))


def cases_for(members: int) -> tuple[Case, ...]:
    """All loads; `members`: of the large room."""
    return (
        Case("rooms of 10, batches of 1", "send", 10, 1),
        Case("rooms of 10, batches of 64", "send", 10, 64),
        Case(f"room of {members:,}, batches of 16", "delivery", members, 16),
    )


@dataclass(frozen=True, slots=True)
class Count:
    """The cost of one load. ``per_unit`` is without what the clock caused; ``idle`` is the share of that."""

    per_unit: float
    idle: float
    messages_per_commit: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Room:
    """A seeded conversation, and the tokens of its members. The first of them sends."""

    conv: str
    tokens: Sequence[str]


def main(argv: list[str]) -> dict[str, Any]:
    """Run it; what ``--json`` writes."""
    p = argparse.ArgumentParser(
        prog="python -m perf instructions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tree", action="append", type=Path, help="a built checkout; ratios are to the first (default: .)")
    p.add_argument("--messages", type=int, default=1024, help="of each case, in whole batches (%(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="of all trees in turn (%(default)s)")
    p.add_argument("--members", type=int, default=1000, help="of the large room (%(default)s)")
    p.add_argument("--tiny", action="store_true", help="once and smallest, to see that it works")
    p.add_argument("--keep", type=Path, help="folder that gets callgrind's files, for callgrind_annotate")
    args = p.parse_args(argv)
    trees: list[Path] = [path.resolve() for path in args.tree or [Path()]]
    if (why := missing(trees)) is not None:
        sys.exit(why)
    idle_s = IDLE_S
    if args.tiny:
        args.messages, args.rounds, args.members, idle_s = 16, 1, 20, 1.0
    if not 2 <= args.members <= MAX_MEMBERS:
        sys.exit(f"--members has to be from 2 to {MAX_MEMBERS}")
    cases = cases_for(args.members)
    counts: dict[tuple[int, Case], list[Count]] = {(i, case): [] for case in cases for i in range(len(trees))}
    with (
        tempfile.TemporaryDirectory(prefix="chatcore-perf-") as name,
        progress("instructions", 1 + len(trees) * args.rounds) as step,
    ):
        folder = Path(name)
        step("accounts and rooms")
        rooms = seed(trees[0], folder / "seed", cases)
        for n in range(args.rounds):
            for i, tree in enumerate(trees):
                step(f"round {n + 1}, {tree}")
                run = f"round-{n + 1}-tree-{i + 1}"
                out = (folder if args.keep is None else args.keep.resolve()) / run
                out.mkdir(parents=True, exist_ok=True)
                data = folder / f"{run}-data"
                copy(folder / "seed", data)
                for case, count in measure(tree, data, out, rooms, args.messages, idle_s):
                    counts[i, case].append(count)
    return {
        "bench": "instructions",
        "machine": machine(),
        "versions": {},
        "trees": [f"{tree}, commit {commit_of(tree)}" for tree in trees],
        "messages": args.messages,
        "rows": [_row(i, case, found, counts[0, case]) for (i, case), found in counts.items()],
    }


def missing(trees: Sequence[Path]) -> str | None:
    """Why it cannot run; None: it can."""
    for tool in TOOLS:
        if shutil.which(tool) is None:
            return f"{tool} is missing: install valgrind"
    for tree in trees:
        if not list((tree / "chatcore" / "_fast").glob("*.so")):
            return f"{tree} is not built: there is no compiled module in chatcore/_fast"
    return None


def commit_of(tree: Path) -> str:
    """Which state of the source it is, with a mark if files were changed."""
    command = ["git", "describe", "--always", "--dirty=, changed", "--exclude=*"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _row(i: int, case: Case, found: Sequence[Count], first: Sequence[Count]) -> dict[str, Any]:
    values = [count.per_unit for count in found]
    middle = median(values)
    return {
        "tree": i + 1,
        "case": case.name,
        "unit": case.unit,
        "rounds": len(found),
        "instructions": round(middle, 1),
        "range": [round(min(values), 1), round(max(values), 1)],
        "spread": round((max(values) - min(values)) / middle, 5),
        "ratio_to_first": round(middle / median(count.per_unit for count in first), 5),
        "messages_per_commit": [round(count.messages_per_commit, 2) for count in found],
        "idle_share": round(median(count.idle for count in found), 4),
        "seconds": round(median(count.seconds for count in found), 1),
    }


def show(result: dict[str, Any]) -> None:
    """Print it."""
    console = Console()
    console = Console(width=max(console.width, WIDTH))
    console.print(heading(result), highlight=False)
    for i, tree in enumerate(result["trees"]):
        console.print(f"tree {i + 1}: {tree}", highlight=False)
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["case"] == case]
        table = Table(title=f"{case}  (per {own[0]['unit']})", title_justify="left", box=None, pad_edge=False)
        table.add_column("tree")
        for head in ("instructions", "range", "spread", "to the first", "messages per commit", "by the clock", "s"):
            table.add_column(head, justify="right", no_wrap=True)
        for row in own:
            low, high = row["range"]
            table.add_row(
                str(row["tree"]),
                f"{row['instructions']:,.1f}",
                f"{low:,.1f}-{high:,.1f}",
                f"{row['spread']:.2%}",
                f"{row['ratio_to_first']:.4f}",
                " ".join(f"{n:.2f}" for n in row["messages_per_commit"]),
                f"{row['idle_share']:.1%}",
                f"{row['seconds']:.1f}",
            )
        console.print(table)


# -- the server
def variables(settings: Mapping[str, str]) -> dict[str, str]:
    """Settings as environment variables."""
    return {"CHATCORE_" + name.replace(".", "_").upper(): value for name, value in settings.items()}


@functools.cache
def environment(tree: Path) -> dict[str, str]:
    """All that a server of this tree is started with, but for its port and its data."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CHATCORE_", "PYTHON"))}
    env |= {"PYTHONPATH": str(tree), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "chatcore", "config", "--json"]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tree} does not start: {done.stderr}")
    known = json.loads(done.stdout)
    cached = [name for name in known if CACHED.fullmatch(name)]
    wanted = {name: value for name, value in SETTINGS.items() if name in known}
    return env | variables(wanted) | variables(dict.fromkeys(cached, HOUR))


@contextlib.contextmanager
def serving(tree: Path, data: Path, command: Sequence[str]) -> Iterator[tuple[int, list[int]]]:
    """The server of a tree, while the context is open: its port, and the ids of its processes but for the supervisor.
    The last one is the worker."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    env = environment(tree) | variables({"server.port": str(port), "server.data": str(data)})
    with (data.parent / f"{data.name}.log").open("w+") as log:
        process = subprocess.Popen(
            [*command, "serve"],
            cwd=tree,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_ready(process, port, Path(log.name))
            yield port, process_tree(process.pid)[1:]
        except Exception as exc:
            exc.add_note(f"the server's log ends with: {Path(log.name).read_text(errors='replace')[-2000:]}")
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            # The processes that are left of it: its session is of this run alone.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
        with contextlib.suppress(OSError), contextlib.closing(connection):
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError("the server does not get ready")


def stall(pid: int) -> None:
    """Let a worker stand still."""
    os.kill(pid, signal.SIGSTOP)
    time.sleep(STALL_S)
    os.kill(pid, signal.SIGCONT)


def seed(tree: Path, data: Path, cases: Sequence[Case]) -> list[tuple[Room, list[Case]]]:
    """Make one room for each number of members, with accounts of its own, by a tree's server at full speed."""
    data.mkdir()
    rooms = []
    with serving(tree, data, [sys.executable, "-m", "chatcore"]) as (port, _):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
        for members in dict.fromkeys(case.members for case in cases):
            accounts = [_register(connection, f"user-{members}-{i}") for i in range(members)]
            users = [account["user"]["id"] for account in accounts]
            tokens = [account["token"] for account in accounts]
            room = Room(_open(port, tokens[0], users[1:]), tokens)
            rooms.append((room, [case for case in cases if case.members == members]))
        connection.close()
    return rooms


def _register(connection: http.client.HTTPConnection, name: str) -> dict[str, Any]:
    body = json.dumps({"name": name, "password": "correct horse"})
    connection.request("POST", "/v1/users", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    if response.status != 201:
        raise RuntimeError(f"{name} cannot be registered: {text.decode(errors='replace')}")
    account: dict[str, Any] = json.loads(text)
    return account


def _open(port: int, token: str, others: Sequence[str]) -> str:
    """A group of the token's user and these others."""
    with connect(f"ws://127.0.0.1:{port}/ws", compression=None, open_timeout=START_S) as socket_:
        socket_.send(json.dumps({"t": "auth", "id": 1, "v": 1, "token": token}))
        request = {"t": "open", "id": 2, "kind": "group", "title": "room", "members": others, "cid": "c" * 22}
        socket_.send(json.dumps(request))
        while True:
            for line in str(socket_.recv(START_S)).split("\n"):
                said = json.loads(line)
                if said["t"] == "error":
                    raise RuntimeError(f"the room cannot be opened: {line}")
                if said["t"] == "ok" and said["id"] == 2:
                    return str(said["c"])


# -- the load
class Member:
    """One connection, logged in. Counts what arrives."""

    def __init__(self, port: int, token: str) -> None:
        self.counts = dict.fromkeys(MARKS, 0)
        self.socket = socket.create_connection(("127.0.0.1", port), STEP_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._tail = b""
        self.socket.sendall(
            b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            + frame({"t": "auth", "id": 1, "v": 1, "token": token})
        )

    def read(self) -> None:
        """Count what is there, or wait for something.

        :raises RuntimeError: the server refuses something, or has closed.
        """
        data = self.socket.recv(1 << 20)
        if not data:
            raise RuntimeError(f"a connection was closed after {self._tail!r}")
        seen = self._tail + data
        for mark in MARKS:
            # Marks that lie wholly in the tail have been counted: some marks are shorter than the longest.
            self.counts[mark] += seen.count(mark) - self._tail.count(mark)
        self._tail = seen[-LONGEST + 1 :]
        if self.counts[ERROR]:
            raise RuntimeError(f"the server refuses something: {data!r}")

    def until(self, mark: bytes, count: int) -> None:
        """Wait until this came so often."""
        while self.counts[mark] < count:
            self.read()


def frame(message: dict[str, Any]) -> bytes:
    """A client's text frame. Its mask is the same each time: what is in it makes no difference to the server."""
    payload = json.dumps(message, separators=(",", ":")).encode()
    mask = b"\x5a\xa5\x3c\xc3"
    n = len(payload)
    head = bytes((0x81, 0x80 | n)) if n < 126 else bytes((0x81, 0xFE)) + n.to_bytes(2, "big")
    wide = (mask * (n // 4 + 1))[:n]
    return head + mask + (int.from_bytes(payload, "big") ^ int.from_bytes(wide, "big")).to_bytes(n, "big")


class Load:
    """``with Load(port, room) as load``: all members of a room, attached; the first of them sends."""

    def __init__(self, port: int, room: Room) -> None:
        self._room = room
        self._sent = 0
        self._selector = selectors.DefaultSelector()
        self._members: list[Member] = []
        try:
            for token in room.tokens:
                member = Member(port, token)
                self._members.append(member)
                member.until(READY, 1)
                self._selector.register(member.socket, selectors.EVENT_READ, member)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._selector.close()
        for member in self._members:
            member.socket.close()

    def send(self, batches: int, batch: int) -> None:
        """Send so many batches. Each waits until all members have all of the last one, and the sender each `ok`.

        :raises TimeoutError: the server does not answer.
        """
        sender = self._members[0]
        for _ in range(batches):
            before = {member: member.counts[MESSAGE] for member in self._members}
            oks = sender.counts[OK]
            sender.socket.sendall(b"".join(self._next() for _ in range(batch)))
            waiting = set(self._members)
            while waiting:
                ready = self._selector.select(STEP_S)
                if not ready:
                    raise TimeoutError(f"{len(waiting)} members wait for messages")
                for key, _ in ready:
                    member: Member = key.data
                    member.read()
                    whole = member.counts[MESSAGE] - before[member] >= batch
                    if whole and (member is not sender or member.counts[OK] - oks >= batch):
                        waiting.discard(member)

    def _next(self) -> bytes:
        self._sent += 1
        # Ids of one length, so that each message costs the same.
        cid = f"{self._sent:022d}"
        return frame({"t": "send", "id": 100_000_000 + self._sent, "c": self._room.conv, "cid": cid, "body": BODY})


# -- callgrind
@dataclass(frozen=True, slots=True)
class Counted:
    """Of all threads of a process, in some time."""

    instructions: int
    commits: int
    ticks: int


class Callgrind:
    """Directs callgrind in running processes, and reads what it writes to ``out``."""

    def __init__(self, pids: Sequence[int], out: Path) -> None:
        self._pids = pids
        self._out = out
        self._dumps = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count while the context is open. The first seconds go into translating the code anew."""
        self._tell("instrumentation on")
        try:
            yield
        finally:
            self._tell("instrumentation off")

    def zero(self) -> None:
        """Begin to count."""
        self._tell("zero")

    def dump(self) -> Counted:
        """The counts since the last of `zero` and `dump`."""
        self._tell("dump")
        self._dumps += 1
        calls: Counter[str] = Counter()
        total = 0
        for pid in self._pids:
            total += self._read(self._out / f"callgrind.out.{pid}.{self._dumps}", calls)
        if not total:
            raise RuntimeError(f"callgrind counted nothing in {self._out}")
        commits, ticks = (sum(n for name, n in calls.items() if which.match(name)) for which in (COMMIT, TICK))
        return Counted(total, commits, ticks)

    @staticmethod
    def _read(path: Path, calls: Counter[str]) -> int:
        """The instructions in a file; its calls are added to ``calls``."""
        names: dict[str, str] = {}
        callee, total = "", 0
        with path.open() as lines:
            for line in lines:
                key, _, value = line.strip().partition("=")
                if key in ("fn", "cfn"):
                    # "(12) name", and "(12)" from then on.
                    number, _, name = value.partition(" ")
                    callee = names.setdefault(number, name)
                elif key == "calls":
                    calls[callee] += int(value.split()[0])
                elif line.startswith("totals:"):
                    total = int(line.partition(":")[2])
        return total

    def _tell(self, command: str) -> None:
        for pid in self._pids:
            done = subprocess.run(
                ["vgdb", f"--pid={pid}", *command.split()],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=STEP_S,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"callgrind does not obey {command!r}: {done.stderr}")


def measure(
    tree: Path, data: Path, out: Path, rooms: Sequence[tuple[Room, Sequence[Case]]], messages: int, idle_s: float
) -> Iterator[tuple[Case, Count]]:
    """All loads, one after the other, on one server that begins with a copy of the seeded data."""
    valgrind = [
        "valgrind",
        "--quiet",
        "--tool=callgrind",
        "--trace-children=yes",  # only then can a forked process be directed, too
        "--instr-atstart=no",
        "--dump-line=no",
        f"--callgrind-out-file={out}/callgrind.out.%p",
    ]
    with serving(tree, data, [*valgrind, sys.executable, "-c", PROGRAM]) as (port, pids):
        callgrind = Callgrind(pids, out)
        for room, cases in rooms:
            with Load(port, room) as load, callgrind.counting():
                for case in cases:
                    load.send(WARM_BATCHES, case.batch)
                stall(pids[-1])
                time.sleep(SETTLE_S)
                callgrind.zero()
                time.sleep(idle_s)
                idle = callgrind.dump()
                if not idle.ticks:
                    raise RuntimeError(f"the worker does not tick, or no function matches {TICK.pattern}")
                for case in cases:
                    batches = case.batches(messages)
                    began = time.monotonic()
                    load.send(batches, case.batch)
                    seconds = time.monotonic() - began
                    loaded = callgrind.dump()
                    yield case, _count(case, batches * case.batch, loaded, idle, seconds)


def _count(case: Case, sent: int, loaded: Counted, idle: Counted, seconds: float) -> Count:
    units = sent * case.members if case.unit == "delivery" else sent
    by_clock = idle.instructions * loaded.ticks / idle.ticks
    return Count(
        (loaded.instructions - by_clock) / units,
        by_clock / loaded.instructions,
        sent / max(1, loaded.commits),
        seconds,
    )
