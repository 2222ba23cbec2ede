"""Which faults there are, and which happen when: the same for the same seed, backend and length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

SQLITE: Final = "sqlite-local"
MONGODB: Final = "mongodb-redis"
BOTH: Final = (SQLITE, MONGODB)

#: Before the first fault, so that what is normal is known; and after the last.
WARM_S: Final = 8.0
#: Between the end of a fault and the next: clients are to be back from the one before.
REST_S: Final = (6.0, 9.0)


@dataclass(frozen=True)
class Kind:
    """A kind of fault. ``takes_host``: no worker of a host can serve meanwhile, or none of any (the store).

    ``share``: how many of it are in one deck; ``lasts_s`` without what the repair takes.
    """

    name: str
    what: str
    lasts_s: float
    backends: tuple[str, ...] = BOTH
    takes_host: bool = False
    share: int = 1


KINDS: Final = {
    kind.name: kind
    for kind in (
        Kind("kill_worker", "SIGKILL of a worker", 0.0, share=4),
        Kind("kill_in_batch", "SIGKILL of a worker while its batch is on the way to the store", 0.5, share=2),
        Kind("kill_writer", "SIGKILL of the writer of the store in the middle of a commit", 0.0, (SQLITE,), share=4),
        Kind("stop_writer", "SIGSTOP of the writer of the store, for 8 s if nobody ends it", 8.0, (SQLITE,), share=2),
        Kind("kill_in_slice", "SIGKILL of the indexer in the middle of a slice, and of the writer", 0.0, (SQLITE,),
             share=2),
        Kind("stop_worker", "SIGSTOP of a worker for 8 s", 8.0),
        Kind("reload", "rolling reload: every worker is replaced, one by one", 0.0, share=2),
        Kind("drain_worker", "a worker is drained and taken out, then back in", 3.0),
        Kind("clock", "the wall clock of server, Redis and store jumps, and back", 4.0),
        Kind("never_reads", "20 clients that never read", 6.0),
        Kind("kill_supervisor", "SIGKILL of a supervisor, which is restarted", 1.0, takes_host=True),
        Kind("drain_host", "a host is drained, gone for 2 s, and started again", 2.0, takes_host=True),
        Kind("store_stalls", "the store answers nothing for 6 s (SQLite: another process has the write lock)", 6.0,
             takes_host=True),
        Kind("store_killed", "SIGKILL of the store, which is restarted after 2 s", 2.0, (MONGODB,), takes_host=True),
        Kind("disk_full", "the disk is full for 6 s", 6.0, (SQLITE,), takes_host=True),
        Kind("sync_fails", "fdatasync fails with EIO for 4 s, in writer and indexer", 4.0, (SQLITE,), takes_host=True),
        Kind("redis_killed", "SIGKILL of Redis, back after 2 s with its data", 2.0, (MONGODB,)),
        Kind("redis_emptied", "SIGKILL of Redis, back after 2 s without its data", 2.0, (MONGODB,)),
        Kind("redis_stops", "Redis stands still for 10 s", 10.0, (MONGODB,)),
        Kind("bus_late", "what Redis tells one host comes 0.7 s late", 6.0, (MONGODB,)),
        Kind("bus_swallows_up", "what one host tells Redis vanishes, its connections stay", 6.0, (MONGODB,)),
        Kind("bus_swallows_down", "what Redis tells one host vanishes, its connections stay", 6.0, (MONGODB,)),
        Kind("bus_half_closed", "Redis' side of one host's connections is shut down", 6.0, (MONGODB,)),
    )
}  # fmt: skip

#: The faults of the short lane for each pair, in this order.
SHORT: Final = {
    SQLITE: ("kill_writer", "disk_full", "reload"),
    MONGODB: ("kill_worker", "bus_swallows_down", "redis_emptied"),
}


@dataclass(frozen=True)
class Fault:
    """One that is to happen: ``at`` seconds after the first message, to worker ``slot`` of host ``host``."""

    kind: Kind
    at: float
    host: int
    slot: int
    #: Chooses what else there is to choose, from 0 to 1.
    twist: float

    def __str__(self) -> str:
        return f"{self.at:.1f} s {self.kind.name} (host {self.host}, worker {self.slot}, twist {self.twist:.3f})"


def plan(
    backend: str,
    seed: int,
    seconds: float,
    most: int | None = None,
    names: Sequence[str] | None = None,
    warm_s: float = WARM_S,
    rest_s: tuple[float, float] = REST_S,
) -> list[Fault]:
    """Every kind comes once (or as often as its share), in a random order, before any comes again.

    :param most: not more than so many.
    :param names: just these, in this order.
    """
    chance = random.Random(f"{backend} {seed}")
    hosts, workers = (1, 4) if backend == SQLITE else (2, 2)
    kinds = [kind for kind in KINDS.values() if backend in kind.backends]
    faults: list[Fault] = []
    deck: list[Kind] = []
    at = warm_s
    while names is None or len(faults) < len(names):
        if names is not None:
            kind = KINDS[names[len(faults)]]
        else:
            if not deck:
                deck = [kind for kind in kinds for _ in range(kind.share)]
                chance.shuffle(deck)
            kind = deck.pop()
        rest = chance.uniform(*rest_s)
        if at + kind.lasts_s + rest > seconds or len(faults) == most:
            break
        faults.append(Fault(kind, at, chance.randrange(hosts), chance.randrange(workers), chance.random()))
        at += kind.lasts_s + rest
    return faults
