"""An ``ok`` means synced: a kill proves nothing about it, the order of system calls does."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

import orjson
import pytest
import uvloop

from ..server import Server
from .harm import Skipped, traced
from .record import Message
from .rest import post
from .tracing import CALLS, Trace
from .wire import dial

MESSAGES = 30
ANSWER_S = 20.0


def test_every_ok_comes_after_the_sync_of_its_entry(tmp_path: Path) -> None:
    server = Server(tmp_path / "data", workers=1).start()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            sent, trace = runner.run(_traced_sends(server, tmp_path / "trace"))
    except Skipped as exc:
        pytest.skip(str(exc))
    finally:
        server.stop()
    problems = [problem for cid, id in sent if (problem := trace.problem(cid, id))]
    assert not problems, "\n".join(problems)


async def _traced_sends(server: Server, output: Path) -> tuple[list[tuple[str, int]], Trace]:
    """The cids and request ids of messages that were acknowledged, and what the worker did meanwhile."""
    user = await post(server.address, "/v1/users", {"name": "alice", "password": "correct horse"})
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    wire = await dial(server.address, lambda data: inbox.put_nowait(orjson.loads(data)))

    async def ask(request: Message) -> Message:
        wire.send(orjson.dumps(request))
        async with asyncio.timeout(ANSWER_S):
            while (reply := await inbox.get()).get("id") != request["id"]:
                pass
        assert reply["t"] == "ok", reply
        return reply

    await ask({"t": "auth", "id": 1, "v": 1, "token": user["token"]})
    opened = await ask({"t": "open", "id": 2, "kind": "group", "title": "g", "cid": secrets.token_hex(12)})
    sent: list[tuple[str, int]] = []
    async with traced([server.pids()[0], server.store_pids()["writer"]], CALLS, None, output):
        while not output.exists() or not output.stat().st_size:  # it is attached when it sees the first call
            await ask({"t": "ping", "id": 3})
        for id in range(10, 10 + MESSAGES):
            cid = secrets.token_hex(12)
            await ask({"t": "send", "id": id, "c": opened["c"], "cid": cid, "body": f"message {id}"})
            sent.append((cid, id))
    wire.abort()
    return sent, Trace(output.read_text(errors="replace"))


WRITE = '7 pwrite64(9, "..the-cid..", 4096, 0) = 4096'
SYNC = "7 fdatasync(9) = 0"
OK = r'5 sendto(12, "\201.{\"t\":\"ok\",\"id\":7,\"s\":3}", 40, 0, NULL, 0) = 40'


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([WRITE, SYNC, OK], None),
        ([WRITE, "7 fdatasync(9 <unfinished ...>", "5 getpid() = 5", "7 <... fdatasync resumed>) = 0", OK], None),
        ([WRITE, OK, SYNC], "before it was synced"),
        ([WRITE, "7 fdatasync(9 <unfinished ...>", OK, "7 <... fdatasync resumed>) = 0"], "before it was synced"),
        ([SYNC, WRITE, OK], "was not synced"),
        (["8 fdatasync(9 <unfinished ...>", WRITE, "8 <... fdatasync resumed>) = 0", OK], "was not synced"),
        ([WRITE, "7 fdatasync(9) = -1 EIO (Input/output error)", OK], "was not synced"),
        ([SYNC, OK], "was not written"),
        ([WRITE, SYNC], "was not acknowledged"),
    ],
)
def test_the_reader_of_traces_sees_what_is_wrong(lines: list[str], problem: str | None) -> None:
    found = Trace("\n".join(lines)).problem("the-cid", 7)
    assert (found is None) if problem is None else (problem in (found or "")), found
