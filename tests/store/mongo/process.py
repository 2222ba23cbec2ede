"""A worker in a process of its own: sends to one conversation as fast as it can, and prints what it was answered.

``python -m tests.store.mongo.process URL DATABASE CONVERSATION SENDER COUNT``
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from chatcore.store.base import User

from ..harness import Database, message
from .parts import insist, run, workers

AT_ONCE = 4


async def work(database: Database, conv: str, sender: User, count: int) -> dict[str, int]:
    answers: dict[str, int] = {}
    async with workers(database, 1) as [worker]:

        async def send(first: int) -> None:
            for i in range(first, count, AT_ONCE):
                cid = f"p{os.getpid()}-{i}"
                answers[cid] = (await insist(worker, message(conv, sender, str(i), cid))).seq

        await asyncio.gather(*(send(first) for first in range(AT_ONCE)))
        assert worker.store.healthy, "losing to another writer is no ill health"
    return answers


if __name__ == "__main__":
    url, name, conv, sender, count = sys.argv[1:]
    print(json.dumps(run(work(Database(url, name), conv, User(sender, "name"), int(count)))))
