"""Runs ``chatcore chat`` as people do: in a pipe, and on a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator
from pathlib import Path

from ..server import PATIENCE_S, environment

PASSWORD = "correct horse"


class RunningChat:
    """One running chat. What it prints is collected; tests wait until it has said something."""

    def __init__(self) -> None:
        self.out = ""
        self.err = ""
        self._more = asyncio.Event()

    def feed(self, name: str, text: str) -> None:
        setattr(self, name, getattr(self, name) + text)
        self._more.set()

    async def says(self, pattern: str, *, on: str = "out", times: int = 1) -> None:
        """Wait until what it has printed matches so many times."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while len(re.findall(pattern, getattr(self, on))) < times:
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise AssertionError(f"no {pattern!r} on {on}: {self.out!r} {self.err!r}") from None


class Piped(RunningChat):
    """A chat whose input and output are pipes."""

    process: asyncio.subprocess.Process

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())

    async def end(self) -> int:
        """End its input; its exit code."""
        assert self.process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self.process.stdin.close()
            await self.process.stdin.wait_closed()
        async with asyncio.timeout(PATIENCE_S):
            return await self.process.wait()


@contextlib.asynccontextmanager
async def piped(url: str, home: Path, *arguments: str, password: str | None = PASSWORD) -> AsyncIterator[Piped]:
    """A chat in a pipe; killed at the end if it still runs."""
    chat = Piped()
    chat.process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "chatcore", "chat", "--url", url, *arguments),
        env=_environment(home, password),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # What runs in the background of a script ignores it, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    async def collect(name: str, stream: asyncio.StreamReader | None) -> None:
        assert stream is not None
        while data := await stream.read(65536):
            chat.feed(name, data.decode())

    readers = [
        asyncio.create_task(collect("out", chat.process.stdout)),
        asyncio.create_task(collect("err", chat.process.stderr)),
    ]
    try:
        yield chat
        if chat.process.returncode is not None:
            await asyncio.gather(*readers)
    finally:
        with contextlib.suppress(ProcessLookupError):
            chat.process.kill()
        await chat.process.wait()
        await asyncio.gather(*readers)


class OnTerminal(RunningChat):
    """A chat on a pseudo-terminal that says where its cursor is when asked, as real ones do."""

    def __init__(self, process: asyncio.subprocess.Process, fd: int) -> None:
        super().__init__()
        self._process = process
        self._fd = fd

    def read(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the other side is closed
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._fd)
            return
        for _ in range(data.count(b"\x1b[6n")):
            os.write(self._fd, b"\x1b[1;1R")
        # Colours and movements are not what the tests are about.
        self.feed("out", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode(errors="replace")))

    async def shows(self, text: str) -> None:
        """Wait for a text in the prompt or the status line: there only cells that change are
        written, so that blanks between words may be left out."""
        await self.says(re.escape(text).replace(r"\ ", " *"))

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    async def leave(self) -> int:
        """Ctrl-D, and wait for the end; its exit code. Pressed again if it did not take, as people do: while a
        line is printed above the prompt the terminal is in its own mode for a moment, in which the key is lost."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                self.type("\x04")
                done, _ = await asyncio.wait([asyncio.ensure_future(self._process.wait())], timeout=1.0)
                if done:
                    return done.pop().result()

    async def wait(self) -> int:
        """Wait for its end; its exit code."""
        async with asyncio.timeout(PATIENCE_S):
            return await self._process.wait()


@contextlib.asynccontextmanager
async def on_terminal(url: str, home: Path, *arguments: str, password: str | None = None) -> AsyncIterator[OnTerminal]:
    """A chat on a terminal of 24 lines; killed at the end if it still runs."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        # A terminal of its own, so that the password is asked for on it.
        "import fcntl, sys, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "from chatcore.cli import main\n"
        "sys.exit(main(sys.argv[1:]))",
        *("chat", "--url", url, *arguments),
        env=_environment(home, password) | {"TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    chat = OnTerminal(process, ours)
    loop = asyncio.get_running_loop()
    loop.add_reader(ours, chat.read)
    try:
        yield chat
    finally:
        loop.remove_reader(ours)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        await process.wait()
        os.close(ours)


def _environment(home: Path, password: str | None) -> dict[str, str]:
    env = environment() | {"HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
    return env if password is None else env | {"CHATCORE_PASSWORD": password}
