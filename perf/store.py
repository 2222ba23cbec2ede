"""``store``: what a durable message costs the embedded store, as its log grows, without sessions and deliveries.

Conversations of 10, texts of 128 B of words. The log has so many entries before; writers choose among up to 10,000
conversations at random.

- *Batches of 64 and 500*: 8 processes (workers) have a batch under way each, and the store commits as many at a time.
  CPU and bytes are those of the store's processes: of the writer and the indexer, until the indexer has caught up, all
  checkpoints included. Beside them, what a message costs the worker that asks for it, and what each other worker pays
  to follow.
- *One message at a time*, with a pause of 20 ms; the CPU is that of all processes together.
- *Pages and resumes*: 1,000 requests, warm, one after the other, in a worker. Each takes 50 entries (100) of a
  conversation that has 200 at least.
- *Size*: of the files, per entry.

With ``--tree OLD`` (a built checkout, also one in which each worker writes by itself) that one's store is measured,
too, in turn. There all 8 batches come from one worker, and the CPU is that of its writer thread. All trees run on this
interpreter and its packages:

    python -m perf store --tree /path/to/old --tree .
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .bench import StepTold, progress
from .instructions import commit_of
from .load.build import BUILD
from .load.histogram import percentile_ms
from .processes import usage
from .results import Results
from .store_processes import PORTION, ROOT, Side, Tree, host, side

BATCHES: Final = (64, 500)
#: Of a log that is larger, the conversations that writers choose among, and those that readers ask for.
CONVERSATIONS: Final = 10_000
ASKED: Final = 1_000
PAUSE_S: Final = 0.02
#: A tree without an indexer writes every page of its indexes anew for each message: fewer say as much, and a log of
#: ten millions would take an hour to make.
OLDER_MESSAGES: Final = 30_000
OLDER_ENTRIES: Final = 1_000_000
#: The indexer has caught up when it used less of a processor than this, for so long.
QUIET: Final = 0.03
QUIET_S: Final = 1.0
CATCH_UP_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    entries: tuple[int, ...]
    rounds: int
    #: In batches; of each tree, size of the log and round. Eight portions of the index, with their merges.
    messages: int
    reads: int
    lonely: int
    portion: int = PORTION


FULL: Final = Size((10_000, 1_000_000, 10_000_000), rounds=3, messages=524_288, reads=1000, lonely=200)
QUICK: Final = Size((10_000, 100_000), rounds=1, messages=262_144, reads=300, lonely=100)
TINY: Final = Size((500, 2_000), rounds=1, messages=4_000, reads=5, lonely=2, portion=500)


def main(argv: list[str]) -> dict[str, Any]:
    """Run it; what ``--json`` writes."""
    p = argparse.ArgumentParser(
        prog="python -m perf store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tree", action="append", type=Path, help="a built checkout (default: this one)")
    p.add_argument("--entries", help="in the log before: numbers with commas between")
    p.add_argument("--rounds", type=int, help="of all trees in turn")
    p.add_argument("--messages", type=int, help="in batches, of each round")
    p.add_argument("--processes", type=int, default=8, help="that feed the store (%(default)s)")
    p.add_argument("--quick", action="store_true", help="one round of less, for development")
    p.add_argument("--tiny", action="store_true", help="once and smallest, to see that it works")
    args = p.parse_args(argv)
    size = TINY if args.tiny else QUICK if args.quick else FULL
    size = Size(
        tuple(int(n) for n in args.entries.split(",")) if args.entries else size.entries,
        args.rounds or size.rounds,
        args.messages or size.messages,
        size.reads,
        size.lonely,
        size.portion,
    )
    trees = named([path.resolve() for path in args.tree or [ROOT]])
    results = Results("store", ())
    BUILD.mkdir(parents=True, exist_ok=True)
    parts = len(size.entries) * len(trees) * (1 + size.rounds * (2 + len(BATCHES)))
    with progress("store", parts) as step:
        for entries in size.entries:
            with tempfile.TemporaryDirectory(prefix="store-", dir=BUILD) as folder:
                measure(trees, entries, Path(folder), size, args.processes, results, step)
    found = {tree.name: {"commit": commit_of(tree.path), "python": platform.python_version()} for tree in trees}
    return results.json() | {"versions": found}


def named(paths: Sequence[Path]) -> list[Tree]:
    """The trees: this one is `chatcore`, others have their commit in the name."""
    found: list[Tree] = []
    for path in paths:
        if not list((path / "chatcore" / "_fast").glob("*.so")):
            sys.exit(f"{path} is not built: there is no compiled module in chatcore/_fast")
        name = "chatcore" if path == ROOT else f"chatcore {commit_of(path)}"
        if name in (tree.name for tree in found):
            name += f" ({len(found) + 1})"
        found.append(Tree(path, name))
    return found


def measure(
    trees: Sequence[Tree], entries: int, folder: Path, size: Size, processes: int, results: Results, step: StepTold
) -> None:
    """Everything, at one size of the log: what only reads first, so that the log has that size."""
    plans: list[tuple[Tree, dict[str, Any]]] = []
    for i, tree in enumerate(trees):
        step(f"a log of {entries:,} entries, {tree.name}")
        if not tree.split and entries > OLDER_ENTRIES:
            continue
        convs = max(10, min(CONVERSATIONS, entries // 10))
        data = folder / f"tree-{i + 1}"
        data.mkdir()
        plan = {
            "data": str(data),
            "entries": entries,
            "convs": convs,
            "asked": max(2, min(ASKED, entries // 1000)),
            "portion": size.portion,
            "batch": BATCHES[-1],
            "count": size.reads,
        }
        plans.append((tree, plan))
        seed(tree, plan, results)
    for n in range(size.rounds):
        for tree, plan in plans:
            step(f"{entries:,} entries, reads, round {n + 1}, {tree.name}")
            reads(tree, plan, results)
    for n in range(size.rounds):
        for tree, plan in plans:
            step(f"{entries:,} entries, one by one, round {n + 1}, {tree.name}")
            one_by_one(tree, plan | {"count": size.lonely, "pause_s": PAUSE_S}, results)
    for batch in BATCHES:
        for n in range(size.rounds):
            for tree, plan in plans:
                step(f"{entries:,} entries, batches of {batch}, round {n + 1}, {tree.name}")
                messages = size.messages if tree.split else min(size.messages, OLDER_MESSAGES)
                batches(tree, plan | {"batch": batch, "messages": messages}, processes, results)


def hosted(tree: Tree, plan: Mapping[str, Any]) -> contextlib.AbstractContextManager[tuple[Side, ...]]:
    """The processes of the host, as the plan has it."""
    return host(tree, Path(plan["data"]), batch=plan["batch"], portion=plan["portion"])


def seed(tree: Tree, plan: Mapping[str, Any], results: Results) -> None:
    """The log that is there before, and its size."""
    process = Side(tree, "seed", plan)
    try:
        made = process.answer()
    finally:
        process.close()
    stored = sum(path.stat().st_size for path in Path(plan["data"]).glob("*.db*"))
    entries = plan["entries"]
    results.add(tree.name, f"size, {entries:,} entries", "entry", {"file_bytes_per_unit": stored / entries})
    if tree.split:
        results.note(
            f"{tree.name}: the index of {entries:,} entries was built in {made['index_s']:.1f} s, with"
            f" {made['index_cpu_s'] / entries * 1e6:.2f} µs of CPU and {made['index_bytes'] / entries:,.0f} B written"
            " per entry, all merges included"
        )


def reads(tree: Tree, plan: Mapping[str, Any], results: Results) -> None:
    """One round of reads."""
    with hosted(tree, plan), side(tree, "read", plan) as reader:
        reader.go()
        for kind, took in reader.answer().items():
            results.add(tree.name, f"{kind}, {plan['entries']:,} entries", "read", percentiles(took))


def percentiles(took_ns: Sequence[int]) -> dict[str, float]:
    """The median, and what few took longer."""
    return {"p50_ms": percentile_ms(took_ns, 0.5), "p99_ms": percentile_ms(took_ns, 0.99)}


def one_by_one(tree: Tree, plan: Mapping[str, Any], results: Results) -> None:
    """One round of lonely messages."""
    with hosted(tree, plan) as processes, side(tree, "lonely", plan) as worker:
        pids = [process.pid for process in (*processes, worker)]
        before = usage(pids, [])
        worker.go()
        took = worker.answer()
        used = usage(pids, []).since(before)
        figures = percentiles(took) | {
            "cpu_us_per_unit": used.cpu_ns / 1000 / len(took),
            "write_bytes_per_unit": used.written / len(took),
        }
        results.add(tree.name, f"one message at a time, {plan['entries']:,} entries", "message", figures)
        worker.go()


def batches(tree: Tree, plan: Mapping[str, Any], workers: int, results: Results) -> None:
    """One round of messages in batches."""
    # Without a writer of its own, several workers of a host would measure how they wait for each other's lock.
    processes, lanes = (workers, 1) if tree.split else (1, workers)
    own = dict(plan) | {"lanes": lanes, "messages": plan["messages"] // processes}
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(hosted(tree, plan))
        follower = stack.enter_context(side(tree, "follow", plan))
        feeders = [stack.enter_context(side(tree, "feed", own)) for _ in range(processes)]
        caught_up(store)
        looking = following(follower, QUIET_S)
        before = [process.usage() for process in (*store, follower)]
        for feeder in feeders:
            feeder.go()
        said = [feeder.answer() for feeder in feeders]
        follows = follower.usage().since(before[-1])
        caught_up(store)
        used = [process.usage().since(then) for process, then in zip(store, before[:-1], strict=True)]
    messages = sum(answer["messages"] for answer in said)
    seconds = (max(a["ended_ns"] for a in said) - min(a["began_ns"] for a in said)) / 1e9
    threads, clients = (sum(answer[key] for answer in said) for key in ("thread_ns", "process_ns"))
    figures = percentiles([took for answer in said for took in answer["took_ns"]]) | {
        "units_per_s": messages / seconds,
        # The writer is a thread of the worker, or a process with the indexer beside it.
        "cpu_us_per_unit": (threads + sum(u.cpu_ns for u in used)) / 1000 / messages,
        "workers_us_per_unit": (clients - threads) / 1000 / messages,
        "follow_us_per_unit": max(0.0, follows.cpu_ns - looking * seconds) / 1000 / messages,
        "write_bytes_per_unit": (sum(a["written"] for a in said) + sum(u.written for u in used)) / messages,
        "errors": sum(answer["errors"] for answer in said),
    }
    if tree.split:
        figures["indexer_us_per_unit"] = used[1].cpu_ns / 1000 / messages
    results.add(tree.name, f"batches of {plan['batch']}, {plan['entries']:,} entries", "message", figures)


def following(follower: Side, seconds: float) -> float:
    """What a worker that only looks uses per second, in ns."""
    before = follower.usage()
    time.sleep(seconds)
    return follower.usage().since(before).cpu_ns / seconds


def caught_up(store: Sequence[Side]) -> None:
    """Wait until the processes of a host have nothing left to do.

    :raises RuntimeError: they have, for very long.
    """
    deadline = time.monotonic() + CATCH_UP_S
    while store:
        before = usage([process.pid for process in store], [])
        time.sleep(QUIET_S)
        if usage([process.pid for process in store], []).since(before).cpu_ns < QUIET * QUIET_S * 1e9:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"the indexer does not come to rest in {CATCH_UP_S:.0f} s")
