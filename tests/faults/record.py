"""The entries that a client was sent, kept small: where it began in each conversation, and a digest of each since.

Millions of deliveries are recorded in a run; the digests are compared with those of the stored log at the end.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import Counter, deque
from typing import Any

import orjson

Message = dict[str, Any]

#: Examples that are kept of each kind of broken promise; all are counted.
EXAMPLES = 20


def digest(entry: Message) -> int:
    """Of everything that an entry says, whatever the order of its fields."""
    data = orjson.dumps(entry, option=orjson.OPT_SORT_KEYS)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


class Broken:
    """The promises that were broken: how often, with some examples of each.

    Kinds: ``lost`` (a hole, an acknowledged message that is not there), ``doubled`` (stored or sent twice),
    ``order``, ``phantom`` (sent but not stored), ``refused`` (a final error where none is due), and others
    that the checker names.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, kind: str, text: str, times: int = 1) -> None:
        """Note one (or some) of a kind."""
        self.counts[kind] += times
        kept = self.examples.setdefault(kind, [])
        if len(kept) < EXAMPLES:
            kept.append(text)

    def lines(self) -> list[str]:
        """For people."""
        return [f"{kind} x{self.counts[kind]}: {text}" for kind, texts in self.examples.items() for text in texts]


class Log:
    """One conversation as one client holds it."""

    __slots__ = ("digests", "later", "missing_to", "start", "times")

    def __init__(self, start: int) -> None:
        self.start = start  # it holds what comes after this seq
        self.digests = array("Q")
        self.times = array("d")  # when each came (monotonic)
        # While a hole is filled with pages: up to where, and what was pushed meanwhile.
        self.missing_to = 0
        self.later: list[Message] = []

    def add(self, entry: Message) -> None:
        """The next one."""
        self.digests.append(digest(entry))
        self.times.append(time.monotonic())

    @property
    def held(self) -> int:
        """The last seq that it holds without a hole."""
        return self.start + len(self.digests)

    @property
    def reached(self) -> int:
        """The last seq that it has heard of."""
        return max(self.held, self.missing_to) + len(self.later)


class Record:
    """All conversations of one client."""

    def __init__(self, name: str, broken: Broken) -> None:
        self.name = name
        self.broken = broken
        self.logs: dict[str, Log] = {}
        self.events: deque[tuple[float, str]] = deque(maxlen=8)
        self.filled = 0  # holes that were too long for a replay, filled with pages

    def have(self) -> dict[str, int]:
        """For ``auth`` and ``attach``."""
        return {conv: log.held for conv, log in self.logs.items()}

    def attached(self, conv: str, after: int) -> bool:
        """A ``conv`` said where the entries begin. True: there is a hole to be filled with pages."""
        log = self.logs.get(conv)
        self.note(f"{conv} after {after}, held {log.held if log else None}")
        if log is None:
            self.logs[conv] = Log(after)
            return False
        log.later.clear()
        log.missing_to = 0
        if after < log.held:
            self.broken.add("lost", f"{self.name} holds {conv} up to {log.held} and is told that the rest is {after}")
        elif after > log.held:
            log.missing_to = after
            return True
        return False

    def pushed(self, entry: Message) -> bool:
        """An entry came. False: it is not the next one, and the connection is not to be trusted any more."""
        conv, seq = entry["c"], entry["s"]
        log = self.logs.get(conv)
        if log is None:
            self.broken.add("order", f"{self.name}: entry {seq} of {conv} before any conv")
            return False
        due = log.reached + 1
        if seq != due:
            kind = "doubled" if seq < due else "lost"
            self.broken.add(kind, f"{self.name}: entry {seq} of {conv} where {due} was due; {self.lately()}")
            return False
        if log.missing_to:
            log.later.append(entry)
        else:
            log.add(entry)
        return True

    def looked(self, conv: str, told: int, entries: list[Message], at: int) -> None:
        """A newest page came, to a client that had heard of everything up to ``told``."""
        log = self.logs[conv]
        seqs = [entry["s"] for entry in entries]
        if not seqs or at < told or seqs != list(range(at - len(seqs) + 1, at + 1)):
            ends = f"{seqs[0]} to {seqs[-1]}" if seqs else "nothing"
            self.broken.add("stale", f"{self.name}: told of {told} in {conv}, its newest page has {ends} and says {at}")
            return
        for entry in entries:
            i = entry["s"] - log.start - 1
            if 0 <= i < len(log.digests) and log.digests[i] != digest(entry):
                self.broken.add("stale", f"{self.name}: a page of {conv} has another {entry['s']} than was pushed")

    def lately(self) -> str:
        """The last things that the client did."""
        return "; ".join(f"{time.monotonic() - at:.2f} s ago {what}" for at, what in self.events)

    def note(self, what: str) -> None:
        """Keep it, for a person who looks for the cause of a broken promise."""
        self.events.append((time.monotonic(), what))

    def page(self, conv: str, entries: list[Message]) -> bool:
        """A page of history for a hole. True: it is filled."""
        log = self.logs[conv]
        for entry in entries:
            if entry["s"] == log.held + 1 and entry["s"] <= log.missing_to:
                log.add(entry)
            elif entry["s"] > log.missing_to:
                break
            elif entry["s"] > log.held:
                self.broken.add("lost", f"{self.name}: a page of {conv} has {entry['s']} where {log.held + 1} was due")
                return True
        if log.held < log.missing_to:
            return False
        log.missing_to = 0
        later, log.later = log.later, []
        for entry in later:
            log.add(entry)
        self.filled += 1
        return True
