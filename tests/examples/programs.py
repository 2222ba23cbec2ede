"""Runs a program of `examples/` as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from ..server import PATIENCE_S, ROOT, environment

PASSWORD = "correct horse"


class Program:
    """A running example. Tests wait until it has printed something."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        #: All that it has printed, on stdout and on stderr.
        self.out = ""
        self.err = ""
        self._printed = asyncio.Event()

    async def prints(self, pattern: str) -> re.Match[str]:
        """Wait until stdout or stderr matches."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not (found := re.search(pattern, self.out) or re.search(pattern, self.err)):
                    assert self.process.returncode is None, f"it ended: {self.out!r} {self.err!r}"
                    self._printed.clear()
                    await self._printed.wait()
                return found
        except TimeoutError:
            raise AssertionError(f"it did not print {pattern!r}: {self.out!r} {self.err!r}") from None

    async def interrupt(self) -> None:
        """Press Ctrl-C: it ends well, and without a traceback."""
        self.process.send_signal(signal.SIGINT)
        assert await self.ended() == 0, self.err
        assert "Traceback" not in self.err

    async def kill(self) -> None:
        self.process.kill()
        await self.ended()

    async def ended(self) -> int:
        async with asyncio.timeout(PATIENCE_S):
            return await self.process.wait()

    async def collect(self, name: str, stream: asyncio.StreamReader) -> None:
        while data := await stream.read(65_536):
            setattr(self, name, getattr(self, name) + data.decode())
            self._printed.set()
        self._printed.set()


@contextlib.asynccontextmanager
async def running(name: str, *arguments: object) -> AsyncIterator[Program]:
    """``python examples/NAME ARGUMENTS``, killed at the end if it still runs. Its output is complete afterwards."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "examples" / name),
        *map(str, arguments),
        env=environment() | {"CHATCORE_PASSWORD": PASSWORD},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # A shell makes the programs that it starts in the background ignore it, and they pass that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    program = Program(process)
    readers = [
        asyncio.create_task(program.collect("out", process.stdout)),
        asyncio.create_task(program.collect("err", process.stderr)),
    ]
    try:
        yield program
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await asyncio.gather(*readers)


def usage(name: str) -> str:
    """The comment at the top of an example."""
    return (ROOT / "examples" / name).read_text().partition('"""')[2].partition('"""')[0]


def examples() -> list[str]:
    return sorted(path.name for path in Path(ROOT / "examples").glob("*.py"))
