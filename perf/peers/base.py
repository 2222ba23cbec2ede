"""The facts that a benchmark needs of a server under test: the contract of every module in this folder.

A module has ``PEERS``, a tuple of `Peer` objects; `find_peers` collects them. The load generator knows no
protocol: it upgrades, follows the steps of `Peer.join`, and from then on sends `Peer.send` templates. What it
wants of the server:

- *All members* of the room get each message, its sender too, with the body (`BODY`) as it was sent. Several
  messages may come in one frame, one per line (text between newlines); a body occurs once in a delivery.
- Where `Peer.ack` is set, each send is answered by a line that begins with it, and then has the request id
  in digits. Without, the sender's own copy is the answer.
- Nothing is compressed, nothing is sent to a client that has not joined.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

#: In the text of `Peer.send`: a number unique in its connection (digits) …
REQUEST_ID: Final = "@ID@"
#: … 24 characters unique among all messages …
CID: Final = "@CID@"
#: … the body: printable ASCII without quotes, backslashes and ``@``, of 48 bytes or more.
BODY: Final = "@BODY@"
#: In any step after a `Wait` with ``capture``: what was captured in this connection, or in the one before it.
CAPTURED: Final = "@CAPTURED@"

#: Names of the benches that a peer can take part in.
ALL_BENCHES: Final = frozenset({"fanout", "send", "idle", "storm", "history", "users", "echo"})


@dataclass(frozen=True, slots=True)
class Send:
    """Send this text frame (no newline in it)."""

    text: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait until ``count`` frames, from this step on, contain ``text``.

    With ``capture`` the last of them is searched for it, and what stands behind it, up to the next ``"``, is kept
    (at most 250 bytes).
    """

    text: str
    count: int = 1
    capture: str = ""


Step = Send | Wait


@dataclass(frozen=True, slots=True)
class World:
    """The users and rooms, known before the server starts: both are numbers from 0."""

    #: Members of each room.
    rooms: Sequence[Sequence[int]]
    users: int
    #: Messages that are in each room already (in servers that keep them).
    entries: int = 0
    #: Where that differs: of each room.
    entries_of: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Services:
    """The other programs that a server needs: environment for it, and the processes, whose CPU is reported apart."""

    env: Mapping[str, str] = field(default_factory=dict)
    pids: Sequence[int] = ()


class Peer(ABC):
    """One kind of server. Objects are made once and hold no state of a run, but what `prepare` notes."""

    #: As in tables and in ``--peers``: lower case, dashes.
    name: str = ""
    #: One line for the report: what it is and how it is configured, as its documentation recommends.
    about: str = ""
    benches: frozenset[str] = frozenset({"fanout"})
    #: Whether it can use more than one process (then ``workers`` of `command` counts).
    multi_process: bool = False
    #: Whether an acknowledged message is on disk.
    durable: bool = False
    #: No usable server, but what the kernel asks for the same writes: never the best peer.
    floor: bool = False

    # -- WebSocket
    path: str = "/"
    headers: Mapping[str, str] = {}
    subprotocol: str = ""
    #: The beginning of an acknowledgement's line; the request id follows in digits.
    ack: str | None = None
    #: A line without a message that contains this is an error.
    error: str | None = None
    #: A text frame that is exactly ``ping`` is answered with ``pong`` (WebSocket pings always are).
    ping: str | None = None
    pong: str = ""

    # -- the program
    @abstractmethod
    def missing(self) -> str | None:
        """Why it cannot run here, in a few words; None: it can."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """The versions that are measured, by package."""

    @abstractmethod
    def command(self, port: int, workers: int, data: Path) -> list[str]:
        """The program, listening on 127.0.0.1:port. It runs until SIGTERM (then SIGKILL). Its CPU and memory are
        those of its whole process tree. ``data`` is an empty folder of this run, on a real disk."""

    def env(self, workers: int) -> dict[str, str]:
        """Additions to its environment."""
        return {}

    def settings(self) -> dict[str, str]:
        """Limits that were raised for the artificial load, to be printed in the report."""
        return {}

    def prepare(self, data: Path, world: World) -> None:  # noqa: B027 (nothing to do, for most)
        """Before the start: seed what has to be there."""

    @contextmanager
    def _no_services(self) -> Iterator[Services]:
        yield Services()

    def services(self, data: Path) -> AbstractContextManager[Services]:
        """Other servers that it needs (a database), running while the context is open."""
        return self._no_services()

    # -- what clients say
    @abstractmethod
    def join(self, user: int, rooms: Sequence[int]) -> list[Step]:
        """From the upgrade to being a live member of these rooms. Ends with a `Wait`, if the server answers at all."""

    def resume(self, user: int, rooms: Sequence[int], have: int) -> list[Step]:
        """The same for a returning user with ``have`` messages of each room (servers without this: as `join`)."""
        return self.join(user, rooms)

    @abstractmethod
    def send(self, user: int, room: int) -> str:
        """The text frame of one message, with `REQUEST_ID`, `CID` and `BODY` where they belong."""

    def history(self, user: int, room: int) -> str | None:
        """A request for the newest page, with `REQUEST_ID`, acknowledged by `ack`; None: there is none."""
        return None


def find_peers() -> dict[str, Peer]:
    """All peers by name, of all modules in this folder."""
    found: dict[str, Peer] = {}
    package = importlib.import_module(__package__)
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        peers = getattr(importlib.import_module(f"{__package__}.{module}"), "PEERS", ())
        found |= {peer.name: peer for peer in peers}
    return found
