"""The arguments of ``chatcore chat``."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..accounts import Address

DEFAULT_URL: Final = "http://127.0.0.1:8080"
DEFAULT_CONVERSATION: Final = "#lobby"
#: Messages shown on entering a conversation: about a screen.
HISTORY: Final = 20
HISTORY_MAX: Final = 100

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


@dataclass(frozen=True)
class Options:
    """What was asked for; ``user`` is None if it is to be found out."""

    address: Address
    user: str | None
    conversation: str
    register: bool
    password_stdin: bool
    history: int


def parse(argv: Sequence[str]) -> Options:
    """Read the arguments; what is wrong with them ends the program (2), as argparse does."""
    parser = argparse.ArgumentParser(
        prog="chatcore chat",
        description="Chat in this terminal; with a pipe for input, line by line.",
        epilog="The password is asked for, or taken from CHATCORE_PASSWORD. A token is kept for the next time under"
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
    """Whether this can name a conversation."""
    return (text[:1] in ("#", "@") and len(text) > 1) or _ID.match(text) is not None
