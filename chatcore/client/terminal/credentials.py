"""Who the user is: the kept token, the password, the first registration.

Tokens lie in ``$XDG_STATE_HOME/chatcore/`` (``~/.local/state/chatcore/``), one
file for each user of each server, readable by the owner only. The newest one
of a server tells who was here last.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from .. import accounts
from ..accounts import Address, Session
from ..errors import Conflict, Unauthenticated
from ..state import replace_file
from .options import Options


class Refusal(Exception):
    """It cannot go on; the message is for the user."""


class Kept(msgspec.Struct):
    """One token file."""

    url: str
    user: str
    token: str


class Tokens:
    """The kept tokens of one server."""

    def __init__(self, address: Address, directory: Path | None = None) -> None:
        self._url = str(address)
        self._directory = directory or _state_directory()

    def last_user(self) -> str | None:
        """Who used this server last from here."""
        kept = [(path.stat().st_mtime_ns, found.user) for path in self._files() if (found := _read(path, self._url))]
        return max(kept)[1] if kept else None

    def get(self, user: str) -> str | None:
        """The token of a user, or None."""
        found = _read(self._path(user), self._url)
        return found.token if found else None

    def put(self, user: str, token: str) -> None:
        """Keep a token. Raises OSError."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(self._path(user), msgspec.json.encode(Kept(self._url, user, token)))

    def used(self, user: str) -> None:
        """This user is here now."""
        with suppress(OSError):
            os.utime(self._path(user))

    def drop(self, user: str) -> None:
        """The token is worth nothing any more."""
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


class Login:
    """Gets a token for whoever sits here.

    :param ask: asks a question on the terminal and returns the answer; None if
        there is nobody to ask.
    :param first_line: the first line of stdin, for ``--password-stdin``.
    """

    def __init__(
        self, options: Options, tokens: Tokens, ask: Callable[[str], str] | None, first_line: Callable[[], str | None]
    ) -> None:
        self._options = options
        self._tokens = tokens
        self._ask = ask
        self._password: str | None = None
        if options.password_stdin:
            # Taken off at once, whether it is needed or not: the lines after it are messages.
            self._password = (first_line() or "").rstrip("\r\n")
        self.user = options.user or tokens.last_user() or self._who()

    def kept(self) -> str | None:
        """The token of an earlier time."""
        self._tokens.used(self.user)
        return self._tokens.get(self.user)

    async def fresh(self) -> str:
        """A new token, by password; kept for the next time. Raises Refusal, ChatError, OSError."""
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
                raise Refusal("the name or the password is wrong (--register makes a new account)")
            answer = self._ask(f"There is no {self.user!r} with this password. Make a new account? [y/N] ")
            if answer.strip().casefold() not in ("y", "yes"):
                raise Refusal("not logged in")
        try:
            return await accounts.register(self._options.address, self.user, password)
        except Conflict:
            raise Refusal(f"the name {self.user!r} is taken, and this is not its password") from None

    def _who(self) -> str:
        if self._ask is None:
            raise Refusal("who are you? Give --user NAME")
        name = self._ask("Your name: ").strip()
        if not name:
            raise Refusal("no name, no chat")
        return name

    def _ask_password(self) -> str:
        if self._ask is None:
            raise Refusal("a password is needed: set CHATCORE_PASSWORD, or use --password-stdin")
        return getpass.getpass(f"Password of {self.user}: ")


def _state_directory() -> Path:
    base = os.environ.get("XDG_STATE_HOME", "")
    # The specification says to ignore relative paths.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "chatcore"


def _read(path: Path, url: str) -> Kept | None:
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=Kept)
    except (OSError, msgspec.MsgspecError):
        return None
    return kept if kept.url == url else None
