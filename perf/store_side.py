"""What the bench ``store`` runs inside each tree: this file, as a program, with that tree's ``chatcore``.

    python -P perf/store_side.py MODE JSON        # with PYTHONPATH=TREE

It imports nothing of ``perf``, which the tree may have in another version, and knows both forms of the embedded store:
that in which each worker writes by a thread of its own (schema 1), and that with one writer and one indexer for the
host (schema 2). What it says are lines of JSON: ``"ready"``, and results; a line on stdin begins what a mode measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import json
import os
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, cast

import apsw
import uvloop

from chatcore.entries import MsgFields, NewEntry, new_entry
from chatcore.store.sqlite.schema import database_path, prepare
from chatcore.store.sqlite.store import SQLiteStore

#: Whether one writer and one indexer serve all workers of the host.
SPLIT: Final = find_spec("chatcore.store.sqlite.indexer") is not None
MEMBERS: Final = 10
TEXT_BYTES: Final = 128
#: Different texts; more would only take longer to make.
TEXTS: Final = 4096
#: Entries that each conversation has at least that is read from.
ASKED_ENTRIES: Final = 200
PAGE: Final = 50
PAGE_BYTES: Final = 256 * 1024
MISSED: Final = 100
SEED_ROWS: Final = 10_000
#: Of a log that has always been served, the newest changes of rows are kept, so many values of the counter back.
KEPT_CHANGES: Final = 1_000_000
SEED_CACHE_KIB: Final = 2 << 20
FOLLOW_S: Final = 0.1
#: Requests of one worker that wait for the store, at most (as in the settings of ``serve``).
QUEUE: Final = 10_000


def say(answer: object) -> None:
    """One line for the bench."""
    print(json.dumps(answer), flush=True)


def heard() -> Any:
    """The next line of the bench (None: it has ended)."""
    line = sys.stdin.readline()
    return json.loads(line) if line else None


def conv_id(c: int) -> str:
    """The id of a conversation."""
    return f"conversation{c:010d}"


def user_id(u: int) -> str:
    """The id of a user."""
    return f"user{u:018d}"


def member(c: int, i: int, convs: int) -> int:
    """The members of conversation ``c`` are the users ``c``, ``c`` + 1, …"""
    return (c + i) % max(MEMBERS, convs)


def texts(chance: random.Random) -> list[str]:
    """Texts of words, none like the other."""
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 10))) for _ in range(5000)]
    return [" ".join(chance.choices(words, k=TEXT_BYTES // 2))[:TEXT_BYTES] for _ in range(TEXTS)]


# -- what is there before
def seed(plan: dict[str, Any]) -> None:
    """A data folder with so many messages in so many conversations: written past the store, but as it would stand.

    ``asked`` conversations have `ASKED_ENTRIES` each, each other one has at least one, the rest is spread at random.
    """
    data, entries, convs, asked = Path(plan["data"]), plan["entries"], plan["convs"], plan["asked"]
    prepare(data)
    (data / "run").mkdir(exist_ok=True)
    db = apsw.Connection(os.fspath(database_path(data)))
    # All in memory until the end: indexes grow at random, as in real life, but without the disk.
    db.execute(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{SEED_CACHE_KIB}")
    db.execute("BEGIN")
    first = _seed_rows(db, convs)
    began = time.monotonic()
    newest = _seed_entries(db, entries, convs, asked, first)
    if SPLIT:
        trimmed = max(first - 1, newest - KEPT_CHANGES)
        db.execute("UPDATE meta SET value = ? WHERE key = 'folded'", (newest,))
        db.execute("UPDATE meta SET value = ? WHERE key = 'trimmed'", (trimmed,))
    db.execute("COMMIT")
    db.execute("PRAGMA journal_mode = WAL")
    db.close()
    log_s = time.monotonic() - began
    say({"newest": newest, "log_s": log_s} | (_seed_index(data, plan["portion"]) if SPLIT else {}))


def _seed_rows(db: apsw.Connection, convs: int) -> int:
    """Users, conversations and members; returns the first id that is free for an entry."""
    now = int(time.time() * 1000)
    users = max(MEMBERS, convs)
    db.executemany(
        "INSERT INTO users(id, name, name_key, password, created) VALUES (?, ?, ?, 'none', ?)",
        ((user_id(u), f"user-{u}", f"user-{u}", now) for u in range(users)),
    )
    db.executemany(
        "INSERT INTO convs(id, kind, title, title_key, created, members) VALUES (?, 'group', ?, ?, ?, ?)",
        ((conv_id(c), f"room {c}", f"room {c}", now, MEMBERS) for c in range(convs)),
    )
    db.executemany(
        "INSERT INTO members(conv, user, role, as_of, read, read_msgs, rev) VALUES (?, ?, 'member', 0, 0, 0, ?)",
        ((conv_id(c), user_id(member(c, i, convs)), 1 + c * MEMBERS + i) for c in range(convs) for i in range(MEMBERS)),
    )
    if SPLIT:
        db.executemany("INSERT INTO ids VALUES (?, ?)", ((1 + c, conv_id(c)) for c in range(convs)))
        db.executemany("INSERT INTO ids VALUES (?, ?)", ((1 + convs + u, user_id(u)) for u in range(users)))
    return 1 + convs * MEMBERS


def _order(entries: int, convs: int, asked: int, chance: random.Random) -> Iterator[list[int]]:
    """The conversation of each message, in parts."""
    fixed = list(range(convs)) + [c for c in range(asked) for _ in range(ASKED_ENTRIES - 1)]
    chance.shuffle(fixed)
    # Those that are asked for grow with the log, not before it.
    share = len(fixed) / entries
    for start in range(0, entries, SEED_ROWS):
        n = min(SEED_ROWS, entries - start)
        take = max(0, min(len(fixed), round(share * n)) if start + n < entries else len(fixed))
        part = [fixed.pop() for _ in range(take)] + chance.choices(range(convs), k=max(0, n - take))
        chance.shuffle(part)
        yield part


def _seed_entries(db: apsw.Connection, entries: int, convs: int, asked: int, first: int) -> int:
    """The messages; returns the newest id."""
    chance = random.Random(1)
    bodies = [(e.fields.decode(), e.digest) for e in (new_entry("", "", "", MsgFields(t)) for t in texts(chance))]
    convs_of: Sequence[Any] = [1 + c if SPLIT else conv_id(c) for c in range(convs)]
    users_of: Sequence[Any] = [1 + convs + u if SPLIT else user_id(u) for u in range(max(MEMBERS, convs))]
    heads = [0] * convs
    ts = int(time.time() * 1000) - entries
    at = first
    sql = (
        "INSERT INTO entries(id, conv, seq, t, sender, cid, digest, ts, msgs, last_msg, fields)"
        " VALUES (?, ?, ?, 'msg', ?, ?, ?, ?, ?, ?, ?)"
    )
    for part in _order(entries, convs, asked, chance):
        rows = []
        for c in part:
            heads[c] = seq = heads[c] + 1
            fields, digest = bodies[at % TEXTS]
            sender = users_of[member(c, at % MEMBERS, convs)]
            cid = f"{chance.getrandbits(96):024x}"
            kept = digest if SPLIT else digest.hex()
            rows.append((at, convs_of[c], seq, sender, cid, kept, ts + at - first, seq, seq, fields))
            at += 1
        db.executemany(sql, rows)
    return at - 1


def _seed_index(data: Path, portion: int) -> dict[str, Any]:
    """Build the index of what was written, and say what that took."""
    from chatcore.store.sqlite.indexer import Indexer

    indexer = Indexer(data, portion=portion)
    began, cpu, written = time.monotonic(), time.process_time(), written_bytes()
    indexer.open()
    while indexer.step():
        pass
    indexer.close()
    return {
        "index_s": time.monotonic() - began,
        "index_cpu_s": time.process_time() - cpu,
        "index_bytes": written_bytes() - written,
    }


def written_bytes() -> int:
    """Bytes that this process caused to be written to the disk."""
    for line in Path("/proc/self/io").read_text().splitlines():
        key, _, value = line.partition(": ")
        if key == "write_bytes":
            return int(value)
    return 0


# -- the host's processes
class Cell:
    """Stands for the cell of the supervisor's page in which a process says that it lives."""

    def beat(self) -> None: ...

    def ready(self) -> None:
        say("ready")


def of_host(name: str, plan: dict[str, Any]) -> None:
    """The writer or the indexer of the host, as ``serve`` runs it, until SIGTERM or the end of the bench."""
    from chatcore.server.store_processes import STORE_MAINS
    from chatcore.settings import Settings
    from chatcore.supervisor.worker_process import StoreProcessContext

    settings = Settings()
    server = replace(settings.server, data=plan["data"])
    store = replace(settings.store, batch_entries=plan["batch"], portion_entries=plan["portion"])
    settings = replace(settings, server=server, store=store)
    context = StoreProcessContext(settings, "perf", name, sys.stdin.fileno(), cast(Any, Cell()), "")
    sys.exit(getattr(STORE_MAINS, name)(context))


# -- a worker
@contextlib.asynccontextmanager
async def opened(plan: dict[str, Any]) -> Any:
    """The store of a worker."""
    wanted = {"queue": QUEUE, "batch": plan.get("batch", 500)}
    known = inspect.signature(SQLiteStore).parameters
    store = SQLiteStore(Path(plan["data"]), lambda entries: None, **{k: v for k, v in wanted.items() if k in known})
    await store.start()
    try:
        yield store
    finally:
        await store.close()


def messages(plan: dict[str, Any], n: int) -> list[NewEntry]:
    """New messages in conversations at random."""
    chance = random.Random(os.urandom(8))
    some = texts(chance)
    found = []
    for i in range(n):
        c = chance.randrange(plan["convs"])
        sender = user_id(member(c, chance.randrange(MEMBERS), plan["convs"]))
        found.append(new_entry(conv_id(c), sender, f"{chance.getrandbits(96):024x}", MsgFields(some[i % TEXTS])))
    return found


def thread_cpu_ns(name: str) -> int:
    """Time on a processor of a thread of this process (0: there is none of this name)."""
    for thread in threading.enumerate():
        if thread.name == name:
            return int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0])
    return 0


async def feed(plan: dict[str, Any]) -> None:
    """``lanes`` that each have a batch of messages under way, always, until all are answered."""
    batch, lanes = plan["batch"], plan["lanes"]
    batches = max(1, plan["messages"] // (batch * lanes))
    made = messages(plan, batches * batch * lanes)
    took: list[int] = []

    async with opened(plan) as store:

        async def lane(start: int) -> int:
            errors = 0
            for at in range(start, start + batches * batch, batch):
                began = time.perf_counter_ns()
                futures = [store.append(e) for e in made[at : at + batch]]
                await asyncio.wait(futures)
                took.append(time.perf_counter_ns() - began)
                errors += sum(f.exception() is not None for f in futures)
            return errors

        say("ready")
        await asyncio.to_thread(heard)
        thread, process = thread_cpu_ns("store-writer"), time.process_time_ns()
        written, began = written_bytes(), time.monotonic_ns()
        errors = sum(await asyncio.gather(*(lane(i * batches * batch) for i in range(lanes))))
        say(
            {
                "messages": len(made),
                "errors": errors,
                "began_ns": began,
                "ended_ns": time.monotonic_ns(),
                "thread_ns": thread_cpu_ns("store-writer") - thread,
                "process_ns": time.process_time_ns() - process,
                "written": written_bytes() - written,
                "took_ns": took,
            }
        )


async def read(plan: dict[str, Any]) -> None:
    """Each kind of read so often, one after the other, on a store that is warm."""
    chance = random.Random(2)
    count = plan["count"]
    async with opened(plan) as store:

        async def newest(user: str, conv: str, head: int) -> int:
            return len((await store.page(user, conv, None, None, PAGE, PAGE_BYTES)).entries)

        async def middle(user: str, conv: str, head: int) -> int:
            return len((await store.page(user, conv, head // 2 + PAGE // 2, None, PAGE, PAGE_BYTES)).entries)

        async def resume(user: str, conv: str, head: int) -> int:
            return len(await store.entries(conv, head - MISSED, MISSED, PAGE_BYTES))

        kinds: dict[str, tuple[Callable[[str, str, int], Awaitable[int]], int]] = {
            "newest page": (newest, PAGE),
            "page in the middle": (middle, PAGE),
            "resume after 100 missed": (resume, MISSED),
        }
        say("ready")
        await asyncio.to_thread(heard)
        result: dict[str, list[int]] = {}
        for kind, (ask, expected) in kinds.items():
            asked = [chance.randrange(plan["asked"]) for _ in range(count)]
            heads = await store.heads([conv_id(c) for c in set(asked)])
            calls = [(user_id(member(c, 0, plan["convs"])), conv_id(c), heads[conv_id(c)]) for c in asked]
            for call in calls:  # once to warm up
                assert await ask(*call) == expected, (kind, call)
            chance.shuffle(calls)
            took = result[kind] = []
            for call in calls:
                began = time.perf_counter_ns()
                await ask(*call)
                took.append(time.perf_counter_ns() - began)
        say(result)


async def lonely(plan: dict[str, Any]) -> None:
    """One message at a time, with pauses."""
    made = messages(plan, plan["count"])
    async with opened(plan) as store:
        say("ready")
        await asyncio.to_thread(heard)
        took = []
        for e in made:
            await asyncio.sleep(plan["pause_s"])
            began = time.perf_counter_ns()
            await store.append(e)
            took.append(time.perf_counter_ns() - began)
        say(took)
        await asyncio.to_thread(heard)


async def follow(plan: dict[str, Any]) -> None:
    """A worker that only keeps up with what others write, and looks ten times a second."""
    user, conv = user_id(member(0, 0, plan["convs"])), conv_id(0)
    async with opened(plan) as store:

        async def look() -> None:
            while True:
                await store.page(user, conv, None, None, 1, PAGE_BYTES)
                await asyncio.sleep(FOLLOW_S)

        looking = asyncio.create_task(look())
        say("ready")
        await asyncio.to_thread(heard)
        looking.cancel()


def main() -> None:
    """One mode."""
    mode, plan = sys.argv[1], json.loads(sys.argv[2])
    if mode == "seed":
        seed(plan)
        return
    if mode in ("writer", "indexer"):
        of_host(mode, plan)
    from chatcore.server.worker import GC_THRESHOLDS, SWITCH_INTERVAL_S

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(*GC_THRESHOLDS)
    asked = {"feed": feed, "read": read, "lonely": lonely, "follow": follow}[mode]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asked(plan))


if __name__ == "__main__":
    main()
