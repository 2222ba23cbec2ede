"""Starts bus workers as processes and waits for their events."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

#: Nothing here takes a second on an idle machine; a busy one gets its time.
PATIENCE_S = 30.0
OPTIONS = {"queue_bytes": 4 << 20, "confirm_timeout_ms": 2000, "heartbeat_ms": 100}

Event = dict[str, Any]


class Worker:
    """One process. Events are kept; `wait` looks at those that it has not passed yet."""

    def __init__(self, run_dir: Path, name: str, loop: str = "uvloop", **options: int) -> None:
        self.name = name
        self.events: list[Event] = []
        self._passed = 0
        self._numbers = 0
        self._changed = threading.Condition()
        self._ended = False
        args = [str(run_dir), name, loop, json.dumps(OPTIONS | options)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bus.worker", *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.events.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self, event: str, **fields: Any) -> Event:
        """The next event of this kind with these fields (a callable: that accepts the value)."""

        def fits(e: Event) -> bool:
            return e["event"] == event and all(v(e.get(k)) if callable(v) else e.get(k) == v for k, v in fields.items())

        deadline = time.monotonic() + PATIENCE_S
        with self._changed:
            while True:
                while self._passed < len(self.events):
                    self._passed += 1
                    if fits(self.events[self._passed - 1]):
                        return self.events[self._passed - 1]
                left = deadline - time.monotonic()
                if left <= 0 or self._ended:
                    raise AssertionError(
                        f"{self.name} never reported {event} {fields}; it reported {self.events[-20:]}"
                    )
                self._changed.wait(left)

    def rewind(self) -> None:
        """Let `wait` look at everything again."""
        self._passed = 0

    def order(self, do: str, **fields: Any) -> int:
        """Give a command; returns its number."""
        self._numbers += 1
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, "number": self._numbers, **fields}) + "\n")
        self.process.stdin.flush()
        return self._numbers

    def do(self, command: str, **fields: Any) -> Event:
        """Give a command and wait until it is done."""
        return self.wait("did", number=self.order(command, **fields))

    def until(self, holds: Callable[[Event], bool]) -> Event:
        """Look again until something holds (each look is an answer of the worker's loop)."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if holds(state := self.do("look")):
                return state
        raise AssertionError(f"{self.name}: never came to hold; last {state}")

    def leave(self) -> None:
        """Let it end in order."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def close(self) -> Event:
        """Let it end in order, and wait for that."""
        self.leave()
        closed = self.wait("closed")
        assert self.process.wait(PATIENCE_S) == 0
        return closed

    def end(self) -> None:
        """Kill it in any state."""
        self.process.kill()
        self.process.wait()
        self._thread.join(PATIENCE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Host:
    """The workers of one run folder; all are gone at the end of the block."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.workers: list[Worker] = []

    def start(self, *names: str, loop: str = "uvloop", **options: int) -> list[Worker]:
        """Start workers at the same time; they may still be starting."""
        new = [Worker(self.run_dir, name, loop, **options) for name in names]
        self.workers += new
        return new

    def up(self, *names: str, loop: str = "uvloop", **options: int) -> list[Worker]:
        """Start workers and wait until every one has a confirmed link to every other one."""
        new = self.start(*names, loop=loop, **options)
        for w in new:
            w.wait("started")
            w.rewind()
            for other in names:
                if other != w.name:
                    w.wait("resync", why=f"the link to {other} is up")
                    w.rewind()
        return new

    def __enter__(self) -> Host:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        for w in self.workers:
            w.end()

    def __iter__(self) -> Iterator[Worker]:
        return iter(self.workers)
