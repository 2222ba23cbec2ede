"""What the chat is shown on: how things look as text, and one interface with a pipe and a terminal behind it."""

from __future__ import annotations

import asyncio
import codecs
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from typing import Final, Protocol

from ..events import Conversation, MemberChanged, Message, MetaChanged

#: Lines read ahead from a pipe; then its writer has to wait.
LINES_AHEAD: Final = 100
_CHUNK: Final = 65536
#: Joins emoji into one; the only invisible character that is let through.
_ZWJ: Final = "\u200d"


def clean(text: str) -> str:
    """A text of another user, safe to print: without control characters, which could command
    the terminal, and without those that hide or reorder text. Line breaks are kept."""
    return "".join(
        char if char in (_ZWJ, "\n") or unicodedata.category(char)[0] != "C" else " " if char == "\t" else "\ufffd"
        for char in text.replace("\r\n", "\n")
    )


def one_line(text: str) -> str:
    """As :func:`clean`, on one line."""
    return clean(text).replace("\n", " ")


def title_of(view: Conversation | None) -> str:
    """The name of a conversation: ``#channel``, ``@user``, or a group's title."""
    if view is None:
        return "(gone)"
    if view.kind == "channel":
        return "#" + one_line(view.title)
    if view.kind == "dm":
        return "@" + one_line(view.peer.name if view.peer else view.id)
    return one_line(view.title) or view.id


def clock(ts: int) -> str:
    """Hours and minutes of a Unix time in ms, here; with the date if it is not today."""
    then = time.localtime(ts / 1000)
    same_day = then[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if same_day else "%Y-%m-%d %H:%M", then)


def body_of(message: Message) -> str:
    """The text of a message; later lines are indented."""
    if message.body is None:
        return "(deleted)"
    return clean(message.body).replace("\n", "\n    ") or "(data)"


def member_line(entry: MemberChanged, sender: str, user: str) -> str:
    """The line for a ``member`` entry."""
    if entry.role == "none":
        return f"{user} left" if entry.sender == entry.user else f"{sender} removed {user}"
    if entry.role == "banned":
        return f"{sender} banned {user}"
    if entry.role == "member":
        return f"{user} joined" if entry.sender == entry.user else f"{sender} added {user}"
    return f"{user} is now {entry.role}"


def meta_line(entry: MetaChanged, sender: str) -> str:
    """The line for a ``meta`` entry."""
    return f"{sender} set the title: {one_line(entry.title)}"


def listing(names: list[str], most: int = 8) -> str:
    """Some names on one line."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


class Screen(Protocol):
    """Shows lines, and returns the lines that the user types."""

    def message(self, when: str, name: str, body: str, mine: bool) -> None:
        """Show a message of the conversation on the screen."""

    def notice(self, text: str) -> None:
        """Show any other line."""

    def refresh(self) -> None:
        """Show the status line anew: it has changed."""

    async def line(self) -> str | None:
        """The next line that the user typed, without its end; None at the end of input."""


class Stdin:
    """Lines of standard input, read without Python's buffer: the reading thread may hang in
    a read when the program ends, and must not hold the lock on ``sys.stdin`` then."""

    def __init__(self, fd: int = 0) -> None:
        self._fd = fd
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._ended = False

    def readline(self) -> str | None:
        """The next line; blocks; None at the end."""
        while "\n" not in self._text and not self._ended:
            data = os.read(self._fd, _CHUNK)
            self._ended = not data
            self._text += self._decoder.decode(data, final=not data)
        if not self._text:
            return None
        line, _, self._text = self._text.partition("\n")
        return line.removesuffix("\r")


class PipeScreen:
    """Line by line: messages to stdout as ``name: text``, all else to stderr."""

    def __init__(self, stdin: Stdin) -> None:
        self._stdin = stdin
        self._lines: asyncio.Queue[str | None] = asyncio.Queue(LINES_AHEAD)
        self._thread: threading.Thread | None = None

    def message(self, when: str, name: str, body: str, mine: bool) -> None:
        print(f"{name}: {body}", flush=True)

    def notice(self, text: str) -> None:
        print(f"* {text}", file=sys.stderr, flush=True)

    def refresh(self) -> None:
        pass

    async def line(self) -> str | None:
        if self._thread is None:
            loop = asyncio.get_running_loop()
            # Not joined: it may hang in a read that nothing ends.
            self._thread = threading.Thread(target=self._read, args=(loop,), name="stdin", daemon=True)
            self._thread.start()
        return await self._lines.get()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            line = self._stdin.readline()
            if loop.is_closed():
                return
            try:
                asyncio.run_coroutine_threadsafe(self._lines.put(line), loop).result()
            except (RuntimeError, asyncio.CancelledError):
                return  # the loop is closed: the chat has ended
            if line is None:
                return


class TtyScreen:
    """A terminal: a line to type in below everything else, and a status line under it."""

    def __init__(self, prompt: Callable[[], str], status: Callable[[], str], typing: Callable[[str], None]) -> None:
        # Here and not at the top: it takes a while to load, and a pipe does not need it.
        from prompt_toolkit import PromptSession
        from prompt_toolkit.patch_stdout import patch_stdout

        self._patch = patch_stdout
        self._prompt = prompt
        self._session: PromptSession[str] = PromptSession(
            erase_when_done=True,  # the message shows when it is sent
            bottom_toolbar=status,
            refresh_interval=1.0,  # typing signals end by themselves
        )
        self._session.default_buffer.on_text_changed += lambda buffer: typing(buffer.text)

    def message(self, when: str, name: str, body: str, mine: bool) -> None:
        colour = "ansigreen" if mine else "ansicyan"
        self._print(("ansibrightblack", f"{when} "), (f"bold {colour}", f"{name}:"), ("", f" {body}"))

    def notice(self, text: str) -> None:
        self._print(("ansiyellow", f"* {text}"))

    def refresh(self) -> None:
        if self._session.app.is_running:
            self._session.app.invalidate()

    async def line(self) -> str | None:
        while True:
            try:
                with self._patch():
                    return await self._session.prompt_async(self._prompt)
            except EOFError:
                return None
            except KeyboardInterrupt:
                # As in a shell: it throws the line away; on an empty line it is the end.
                if not self._session.default_buffer.text:
                    return None

    def _print(self, *parts: tuple[str, str]) -> None:
        from prompt_toolkit import print_formatted_text
        from prompt_toolkit.formatted_text import FormattedText

        print_formatted_text(FormattedText(list(parts)))
