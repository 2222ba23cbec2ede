"""The parts that all benches share: options, which servers take part, interleaved rounds, progress."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .load.generator import Generator, Stats
from .peers.base import Peer, find_peers
from .processes import Running, Usage
from .results import Results

CONSOLE = Console(stderr=True)
#: A window in which nothing happened goes on, this long at most.
WINDOW_MAX_S = 10.0
#: Called with the name of the step that begins now.
StepTold = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Size:
    """How much of a bench is run: rounds, and seconds of each window and of warming up before it."""

    name: str
    rounds: int
    seconds: float
    warm_s: float


SIZES = (
    Size("full", rounds=3, seconds=1.5, warm_s=0.3),
    Size("quick", rounds=1, seconds=1.5, warm_s=0.4),  # for development
    Size("tiny", rounds=1, seconds=0.2, warm_s=0.1),  # for tests: does it work at all?
)


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command line."""

    size: Size
    peers: tuple[Peer, ...]
    workers: int
    missing: tuple[str, ...] = ()

    @property
    def tiny(self) -> bool:
        """Only to see that it works."""
        return self.size.name == "tiny"

    def results(self, bench: str, *, ratio_of: str = "cpu_us_per_unit") -> Results:
        """Results of the servers that take part; those that do not are noted."""
        results = Results(bench, self.peers, ratio_of=ratio_of)
        for line in self.missing:
            results.note(line)
        return results


def parser(bench: str, doc: str | None) -> argparse.ArgumentParser:
    """The options that every bench has."""
    p = argparse.ArgumentParser(
        prog=f"python -m perf {bench}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--peers", default="all", help="names with commas between, or all, or none")
    p.add_argument("--no-chatcore", action="store_true", help="only the peers")
    p.add_argument("--quick", action="store_true", help="one round of less, for development")
    p.add_argument("--tiny", action="store_true", help="once and smallest, to see that it works")
    p.add_argument("--rounds", type=int)
    p.add_argument("--seconds", type=float, help="of each measurement")
    p.add_argument("--workers", type=int, default=1, help="processes of chatcore, and of peers that can have several")
    return p


def options(bench: str, args: argparse.Namespace) -> Options:
    """The options that were given. Ends the program if a name is unknown."""
    size = next(s for s in SIZES if s.name == ("tiny" if args.tiny else "quick" if args.quick else "full"))
    size = Size(size.name, args.rounds or size.rounds, args.seconds or size.seconds, size.warm_s)
    known = {name: peer for name, peer in find_peers().items() if bench in peer.benches}
    chatcore = known.pop("chatcore", None)
    names = list(known) if args.peers == "all" else [] if args.peers == "none" else args.peers.split(",")
    for name in names:
        if name not in known:
            sys.exit(f"no peer {name!r} in this bench; there are: {', '.join(known) or 'none'}")
    taking: list[Peer] = [chatcore] if chatcore is not None and not args.no_chatcore else []
    missing: list[str] = []
    for name in names:
        if (why := known[name].missing()) is None:
            taking.append(known[name])
        else:
            missing.append(f"{name} is left out: {why}")
    return Options(size, tuple(taking), args.workers, tuple(missing))


@contextmanager
def progress(title: str, total: int) -> Iterator[StepTold]:
    """A bar on stderr; call what it gives when the next of ``total`` steps begins."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=CONSOLE, transient=True) as bar:
        task = bar.add_task(title, total=total)
        begun = False

        def step(text: str) -> None:
            nonlocal begun
            if begun:
                bar.advance(task)
            begun = True
            bar.update(task, description=f"{title}: {text}")

        yield step


def rounds(opts: Options, results: Results, step: StepTold) -> Iterator[tuple[int, Peer]]:
    """Server A, B, C, A, B, C …"""
    for i in range(opts.size.rounds):
        for peer in opts.peers:
            step(f"round {i + 1}, {peer.name}")
            yield i, peer


@contextmanager
def survive(results: Results, peer: Peer) -> Iterator[None]:
    """A peer that fails is noted, and the others go on; chatcore's failures are failures."""
    try:
        yield
    except Exception as exc:
        if peer.name == "chatcore":
            raise
        results.note(f"{peer.name} failed: {str(exc)[:300]}")


def window(server: Running, generator: Generator, seconds: float) -> tuple[Stats, Usage]:
    """Counts and usage from now on, for some seconds, or longer until there is a first event."""
    generator.reset()
    before = server.usage()
    deadline = time.monotonic() + seconds + WINDOW_MAX_S
    while True:
        time.sleep(seconds)
        used = server.usage().since(before)
        stats = generator.stats()
        happened = stats.ack.n and (stats.delivery.n or not stats.counts["expected"])
        if happened or time.monotonic() > deadline:
            return stats, used
        seconds = 0.05
