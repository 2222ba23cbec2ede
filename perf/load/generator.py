"""Processes of the load generator, directed as one."""

from __future__ import annotations

import json
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..peers.base import Peer, Send, Step
from .build import load_program
from .histogram import Histogram

#: Connections of one process; it may have 20,000 open files on most machines.
MAX_CONNECTIONS = 19_500
#: Connections that are being made at the same time, where it is not the bench's point.
HANDSHAKES = 128
ANSWER_S = 20.0
#: From here on, the generator is what was measured.
BUSY = 0.9
LATE_MS = 5.0

HISTOGRAMS = ("ack", "delivery", "join", "late")


@dataclass(frozen=True, slots=True)
class Client:
    """One connection: how it becomes live, and what it sends then."""

    join: Sequence[Step] = ()
    resume: Sequence[Step] = ()
    #: Of its messages; several are used in turn. None: it only listens.
    template: str | Sequence[str] | None = None
    #: Deliveries expected of each of its messages.
    fan: int = 0


@dataclass
class Stats:
    """The counts of all processes in one window."""

    counts: dict[str, int] = field(default_factory=dict)
    ack: Histogram = field(default_factory=Histogram)
    delivery: Histogram = field(default_factory=Histogram)
    join: Histogram = field(default_factory=Histogram)
    late: Histogram = field(default_factory=Histogram)
    #: Of each process: the share of the time in which it was not waiting, and in which it had a processor.
    busy: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    last_error: str = ""

    @property
    def seconds(self) -> float:
        """How long the window was."""
        return self.counts["wall_ns"] / max(1, len(self.busy)) / 1e9

    @property
    def asleep(self) -> float:
        """The share of the time in which the receivers slept (what wakes them is charged to the server)."""
        return 1 - sum(self.busy) / max(1, len(self.busy))

    def limit(self) -> str | None:
        """Whether the generator was the limit, and why."""
        if max(self.cpu, default=0) > BUSY:
            return f"the load generator used {max(self.cpu):.0%} of a processor"
        if max(self.busy, default=0) > BUSY:
            return f"the load generator was busy {max(self.busy):.0%} of the time"
        late = self.late.ms(0.99)
        if late is not None and late > LATE_MS:
            return f"the load generator sent {late:.0f} ms late (p99)"
        return None

    def add(self, said: dict[str, Any]) -> None:
        """Add what one process has said."""
        for name in HISTOGRAMS:
            getattr(self, name).add(said[name])
        for name, value in said.items():
            if isinstance(value, int):
                self.counts[name] = self.counts.get(name, 0) + value
        wall = max(1, said["wall_ns"])
        self.busy.append(1 - said["wait_ns"] / wall)
        self.cpu.append(said["cpu_ns"] / wall)
        self.last_error = self.last_error or said["last_error"]


class Process:
    """One process with its part of the connections."""

    def __init__(self, plan: Path, clients: int) -> None:
        self.clients = clients
        self._process = subprocess.Popen(
            [load_program(), plan], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._rest = b""

    def tell(self, line: str) -> None:
        """One command."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The next line that it says.

        :raises TimeoutError: nothing came.
        """
        out: IO[bytes] | None = self._process.stdout
        assert out is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            if not select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the load generator does not answer")
            chunk = out.read(1 << 20)
            if not chunk:
                raise RuntimeError(f"the load generator ended with {self._process.wait()}")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said

    def close(self) -> None:
        """End it, and with it its connections."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Generator:
    """``with Generator(peer, port, clients) as generator``: clients are numbered as given."""

    def __init__(
        self, peer: Peer, port: int, clients: Sequence[Client], *, body: int = 128, processes: int = 1, net: int = 10
    ) -> None:
        """``net``: the second byte of the source addresses, of the first process."""
        self.clients = clients
        processes = max(processes, -(-len(clients) // MAX_CONNECTIONS))
        self._folder = tempfile.TemporaryDirectory(prefix="chatcore-perf-")
        self._parts: list[Process] = []
        try:
            for i in range(processes):
                plan = Path(self._folder.name) / f"plan-{i}"
                own = clients[i::processes]
                plan.write_text(_plan(peer, port, own, body, net + i, 1_000_000 * i))
                self._parts.append(Process(plan, len(own)))
            for part in self._parts:
                part.answer(ANSWER_S)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for part in self._parts:
            part.close()
        self._folder.cleanup()

    # -- connections
    def connect(
        self,
        first: int = 0,
        count: int | None = None,
        *,
        resume: bool = False,
        spread_s: float = 0.0,
        handshakes: int = HANDSHAKES,
        timeout_s: float = 120.0,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Connect clients, and wait until each is live or has failed.

        ``handshakes``: at most so many at the same time, in each process (0: all). ``meanwhile`` is called when
        every process has its orders.
        """
        for i, part in enumerate(self._parts):
            at, n = self._range(i, first, count)
            part.tell(f"connect {int(resume)} {int(spread_s * 1000)} {handshakes} {at} {n}")
        meanwhile()
        for part in self._parts:
            part.answer(timeout_s)

    def cut(self, first: int = 0, count: int | None = None) -> None:
        """Close connections without a word."""
        for i, part in enumerate(self._parts):
            at, n = self._range(i, first, count)
            part.tell(f"cut {at} {n}")
        self._answers()

    def _range(self, i: int, first: int, count: int | None) -> tuple[int, int]:
        """Clients `first` to `first` + `count`, as process `i` numbers its own."""
        n = len(self._parts)
        end = len(self.clients) if count is None else first + count
        at = max(0, -(-(first - i) // n))
        return at, max(0, -(-(end - i) // n)) - at

    # -- modes
    def body(self, size: int) -> None:
        """Messages from now on have bodies of so many bytes (48 to 65,536)."""
        self._all(f"body {size}")

    def paced(self, per_s: float) -> None:
        """So many messages per second in all, 20 % jittered, whatever becomes of them (an open loop)."""
        self._all(f"paced {int(1e9 / per_s * len(self._parts))}")

    def flood(self, window: int) -> None:
        """Each sender has so many unanswered messages, always."""
        self._all(f"flood {window}")

    def random(self, interval_s: float) -> None:
        """Each sender sends one message per interval, jittered by half of it."""
        self._all(f"random {int(interval_s * 1e9)}")

    def once(self) -> None:
        """Each sender sends one message, now."""
        self._all("once")

    def idle(self) -> None:
        """Send nothing."""
        self._all("idle")

    def churn(self, per_s: float) -> None:
        """So many connections per second are cut and come back at once (0: none)."""
        self._all(f"churn {int(1e9 / per_s * len(self._parts)) if per_s else 0}")

    def retry(self, mean_s: float) -> None:
        """Connections that fail or are lost come back after about this time (0: never)."""
        self._all(f"retry {int(mean_s * 1e9)}")

    # -- counts
    def reset(self) -> None:
        """Begin a window."""
        self._all("reset")

    def stats(self) -> Stats:
        """The counts since `reset`."""
        return self._counted("stats")

    def totals(self) -> Stats:
        """The counts since the start; also ends the window."""
        return self._counted("totals")

    def drain(self, timeout_s: float = 10.0) -> Stats:
        """Send nothing more, wait for what is under way; the totals."""
        self.idle()
        deadline = time.monotonic() + timeout_s
        while True:
            totals = self.totals()
            counts = totals.counts
            answered = counts["acked"] + counts["abandoned"] >= counts["sent"]
            if (answered and counts["delivered"] >= counts["expected"]) or time.monotonic() > deadline:
                return totals
            time.sleep(0.05)

    def _counted(self, line: str) -> Stats:
        for part in self._parts:
            part.tell(line)
        stats = Stats()
        for part in self._parts:
            stats.add(part.answer(ANSWER_S))
        return stats

    def _all(self, line: str) -> None:
        for part in self._parts:
            part.tell(line)
        self._answers()

    def _answers(self) -> None:
        for part in self._parts:
            part.answer(ANSWER_S)


def _plan(peer: Peer, port: int, clients: Sequence[Client], body: int, net: int, base: int) -> str:
    """The plan of one process, as ``plan.c`` reads it."""
    lines = [f"port {port}", f"net {net}", f"base {base}", f"body {body}", f"conns {len(clients)}", f"path {peer.path}"]
    headers = dict(peer.headers)
    if peer.subprotocol:
        headers["Sec-WebSocket-Protocol"] = peer.subprotocol
    lines += [f"header {name}: {value}" for name, value in headers.items()]
    lines += [f"{key} {value}" for key, value in (("ack", peer.ack), ("error", peer.error)) if value]
    if peer.ping is not None:
        lines += [f"ping {peer.ping}", f"pong {peer.pong}"]
    for client in clients:
        lines.append("conn")
        for prefix, steps in (("", client.join), ("r", client.resume)):
            lines += [_step(prefix, step) for step in steps]
        templates = [client.template] if isinstance(client.template, str) else client.template or ()
        lines += [f"template {text}" for text in templates]
        if templates:
            lines.append(f"fan {client.fan}")
    return "\n".join(lines) + "\n"


def _step(prefix: str, step: Step) -> str:
    if isinstance(step, Send):
        return f"{prefix}send {step.text}"
    return f"{prefix}wait {step.count}\t{step.text}\t{step.capture}"
