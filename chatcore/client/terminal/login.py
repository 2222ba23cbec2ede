"""The arguments of ``chatcore chat``, and how the user logs in: the saved token, the password, the first registration.

Tokens are stored in ``$XDG_STATE_HOME/chatcore/`` (``~/.local/state/chatcore/``), one
file for each user of each server, readable by the owner only. The newest file of a
server says which user was here last.
"""

from __future__ import annotations

import argparse
import getpass
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from .. import accounts
from ..accounts import Address, Session
from ..errors import Conflict, Unauthenticated
from ..state import replace_file

DEFAULT_URL: Final = "http://127.0.0.1:8080"
DEFAULT_CONVERSATION: Final = "#lobby"
#: Messages shown on entering a conversation: about a screen.
HISTORY: Final = 20
HISTORY_MAX: Final = 100

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


@dataclass(frozen=True)
class Options:
    """The arguments; ``user`` is None if it has to be found out."""

    address: Address
    user: str | None
    conversation: str
    register: bool
    password_stdin: bool
    history: int


def parse(argv: Sequence[str]) -> Options:
    """Read the arguments; wrong ones end the program with 2, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="chatcore chat",
        description="Chat in this terminal; with a pipe for input, line by line.",
        epilog="The password is asked for, or taken from CHATCORE_PASSWORD. A token is saved for the next time under"
        " $XDG_STATE_HOME/chatcore (~/.local/state/chatcore).",
    )
    parser.add_argument(
        "conversation",
        nargs="*",
        metavar="CONVERSATION",
        help="#channel (made if there is none), @user, or an id; #lobby if not given. The server's URL may stand here.",
    )
    parser.add_argument("--url", help=f"address of the server; {DEFAULT_URL} if not given")
    parser.add_argument("--user", metavar="NAME", help="who you are; else who you were last time, or it is asked for")
    parser.add_argument("--register", action="store_true", help="make the account if there is none, without asking")
    parser.add_argument("--password-stdin", action="store_true", help="take the password from the first line of stdin")
    parser.add_argument(
        "--history", type=int, default=HISTORY, metavar="N", help=f"messages to show first (0 to {HISTORY_MAX})"
    )
    given = parser.parse_args(list(argv))
    urls = [word for word in given.conversation if "://" in word]
    names = [word for word in given.conversation if "://" not in word]
    if len(urls) + (given.url is not None) > 1 or len(names) > 1:
        parser.error("one server and one conversation at most")
    if not 0 <= given.history <= HISTORY_MAX:
        parser.error(f"--history: 0 to {HISTORY_MAX}")
    conversation = names[0] if names else DEFAULT_CONVERSATION
    if not is_target(conversation):
        parser.error(f"{conversation!r} is no conversation: #channel, @user, or an id")
    user = given.user or os.environ.get("CHATCORE_USER") or None
    try:
        address = Address(given.url or (urls[0] if urls else DEFAULT_URL))
    except ValueError as error:
        parser.error(str(error))
    return Options(address, user, conversation, given.register, given.password_stdin, given.history)


def is_target(text: str) -> bool:
    """Whether this text can name a conversation."""
    return (text[:1] in ("#", "@") and len(text) > 1) or _ID.match(text) is not None


class LoginFailed(Exception):
    """The chat cannot start or go on; the message is for the user."""


class SavedToken(msgspec.Struct):
    """One token file."""

    url: str
    user: str
    token: str


class TokenFiles:
    """The saved tokens of one server."""

    def __init__(self, address: Address, directory: Path | None = None) -> None:
        self._url = str(address)
        self._directory = directory or _state_directory()

    def last_user(self) -> str | None:
        """The user who used this server last from here."""
        saved = [(path.stat().st_mtime_ns, found.user) for path in self._files() if (found := _read(path, self._url))]
        return max(saved)[1] if saved else None

    def get(self, user: str) -> str | None:
        """The token of a user, or None."""
        found = _read(self._path(user), self._url)
        return found.token if found else None

    def put(self, user: str, token: str) -> None:
        """Save a token. Raises OSError."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(self._path(user), msgspec.json.encode(SavedToken(self._url, user, token)))

    def used(self, user: str) -> None:
        """Note that this user uses the server now."""
        with suppress(OSError):
            os.utime(self._path(user))

    def drop(self, user: str) -> None:
        """Delete a token that is not valid any more."""
        self._path(user).unlink(missing_ok=True)

    def _path(self, user: str) -> Path:
        name = user.casefold()
        digest = hashlib.blake2b(f"{self._url}\0{name}".encode(), digest_size=6).hexdigest()
        slug = re.sub(r"[^A-Za-z0-9]+", "_", f"{self._url.split('://')[1]}_{name}")[:80]
        return self._directory / f"{slug}.{digest}.token"

    def _files(self) -> list[Path]:
        try:
            return list(self._directory.glob("*.token"))
        except OSError:
            return []


class TokenSource:
    """Gets a token for the user of this terminal.

    :param ask: asks a question on the terminal and returns the answer; None without a terminal.
    :param first_line: the first line of stdin, for ``--password-stdin``.
    """

    def __init__(
        self,
        options: Options,
        tokens: TokenFiles,
        ask: Callable[[str], str] | None,
        first_line: Callable[[], str | None],
    ) -> None:
        self._options = options
        self._tokens = tokens
        self._ask = ask
        self._password: str | None = None
        if options.password_stdin:
            # Read at once, whether it is needed or not: the lines after it are messages.
            self._password = (first_line() or "").rstrip("\r\n")
        self.user = options.user or tokens.last_user() or self._ask_name()

    def saved(self) -> str | None:
        """The token of an earlier run, if there is one."""
        self._tokens.used(self.user)
        return self._tokens.get(self.user)

    async def fresh(self) -> str:
        """A new token, by password; saved for the next time. Raises LoginFailed, ChatError, OSError."""
        password = self._password or os.environ.get("CHATCORE_PASSWORD") or self._ask_password()
        try:
            session = await accounts.login(self._options.address, self.user, password)
        except Unauthenticated:
            session = await self._register(password)
        self._tokens.put(self.user, session.token)
        return session.token

    async def _register(self, password: str) -> Session:
        if not self._options.register:
            if self._ask is None:
                raise LoginFailed("the name or the password is wrong (--register makes a new account)")
            answer = self._ask(f"There is no {self.user!r} with this password. Make a new account? [y/N] ")
            if answer.strip().casefold() not in ("y", "yes"):
                raise LoginFailed("not logged in")
        try:
            return await accounts.register(self._options.address, self.user, password)
        except Conflict:
            raise LoginFailed(f"the name {self.user!r} is taken, and this is not its password") from None

    def _ask_name(self) -> str:
        if self._ask is None:
            raise LoginFailed("the user is not known: give --user NAME")
        name = self._ask("Your name: ").strip()
        if not name:
            raise LoginFailed("a name is needed")
        return name

    def _ask_password(self) -> str:
        if self._ask is None:
            raise LoginFailed("a password is needed: set CHATCORE_PASSWORD, or use --password-stdin")
        return getpass.getpass(f"Password of {self.user}: ")


def _state_directory() -> Path:
    base = os.environ.get("XDG_STATE_HOME", "")
    # The specification says to ignore relative paths.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "chatcore"


def _read(path: Path, url: str) -> SavedToken | None:
    try:
        saved = msgspec.json.decode(path.read_bytes(), type=SavedToken)
    except (OSError, msgspec.MsgspecError):
        return None
    return saved if saved.url == url else None
