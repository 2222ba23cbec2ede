"""The client over lost connections, killed workers and restarted servers: nothing missed, nothing twice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from chatcore.client import Client, Disconnected, FileState, MemoryState, Message, Ready
from chatcore.client.errors import ClientClosed, StateMismatch

from ..server import PATIENCE_S, Server
from .helpers import PASSWORD, bodies, fresh, login, proxy_to, until

KILLS = 4


async def test_a_lost_connection_is_made_again_and_what_was_missed_comes(url: str, server: Server) -> None:
    async with proxy_to(server.port) as proxy, await login(url) as alice:
        token = (await login(url)).token
        async with Client(f"http://127.0.0.1:{proxy.port}", token) as bob:
            group = await alice.open("group", members=[bob.user.id])
            await bob.view(group)
            await alice.send(group, "before")
            assert (await until(bob, Message)).body == "before"
            proxy.cut()
            lost = await until(bob, Disconnected)
            assert lost.code == 1006
            for n in range(3):
                await alice.send(group, f"meanwhile {n}")
            got = await bodies(bob, group, 3)
            assert [m.body for m in got] == ["meanwhile 0", "meanwhile 1", "meanwhile 2"]
            assert proxy.accepted == 2


async def test_a_long_absence_is_paged(own_server: Server) -> None:
    url = f"http://127.0.0.1:{own_server.port}"
    async with proxy_to(own_server.port) as proxy, await login(url) as alice:
        token = (await login(url)).token
        async with Client(f"http://127.0.0.1:{proxy.port}", token) as bob:
            group = await alice.open("group", members=[bob.user.id])
            await bob.view(group)
            proxy.refuse = True
            proxy.cut()
            count = 620  # more than the server replays
            for n in range(count):
                alice.post(group, str(n))
            await alice.flush()
            proxy.refuse = False
            bob.nudge()
            assert [m.body for m in await bodies(bob, group, count)] == [str(n) for n in range(count)]


async def test_a_message_whose_reply_was_lost_is_repeated_with_its_cid(url: str, server: Server) -> None:
    async with proxy_to(server.port) as proxy, await login(url) as other:
        token = (await login(url)).token
        async with Client(f"http://127.0.0.1:{proxy.port}", token) as chat:
            group = await other.open("group", members=[chat.user.id])
            await chat.view(group)
            proxy.mute = True
            sending = chat.post(group, "once")
            message = await until(other, Message)  # the server has it, and its answer is lost
            await proxy.heard.wait()
            proxy.cut()
            proxy.mute = False
            sent = await sending
            assert (sent.cid, sent.seq, sent.dup) == (message.cid, message.seq, True)
            page = await other.history(group)
            assert [e.cid for e in page.entries if isinstance(e, Message)] == [sent.cid]


async def test_requests_wait_for_the_connection(url: str, server: Server) -> None:
    async with proxy_to(server.port) as proxy:
        token = (await login(url)).token
        async with Client(f"http://127.0.0.1:{proxy.port}", token) as chat:
            proxy.cut()
            await until(chat, Disconnected)
            assert [u.id for u in await chat.users([chat.user.id])] == [chat.user.id]


async def test_a_request_gives_up_after_its_time(url: str, server: Server) -> None:
    async with proxy_to(server.port) as proxy:
        token = (await login(url)).token
        async with Client(f"http://127.0.0.1:{proxy.port}", token, timeout_s=2.0) as chat:
            proxy.refuse = True
            proxy.cut()
            with pytest.raises(TimeoutError):
                await chat.users([])


async def test_killed_workers_cost_nothing(own_server: Server) -> None:
    """Each reader's record equals the log, and every message is in it once and in order."""
    url = f"http://127.0.0.1:{own_server.port}"
    names = [fresh(f"writer{n}") for n in range(3)]
    clients = [await login(url, name) for name in names]
    await asyncio.gather(*(chat.start() for chat in clients))
    records: list[list[tuple[int, str]]] = [[] for _ in clients]
    ends = [asyncio.Event() for _ in clients]
    progress = asyncio.Event()

    async def record(chat: Client, into: list[tuple[int, str]], end: asyncio.Event) -> None:
        async for event in chat.events():
            if isinstance(event, Message) and event.body is not None:
                into.append((event.seq, event.body))
                progress.set()
                if event.body == "the end":
                    end.set()

    async def write(chat: Client, name: str, stop: asyncio.Event) -> list[str]:
        said: list[str] = []
        while not stop.is_set():
            said.append(f"{name} {len(said)}")
            await chat.send(group, said[-1])
        return said

    readers = [asyncio.create_task(record(c, r, e)) for c, r, e in zip(clients, records, ends, strict=True)]
    try:
        group = await clients[0].open("group", members=[chat.user.id for chat in clients[1:]])
        for chat in clients:
            await chat.view(group)
        stop = asyncio.Event()
        writers = [asyncio.create_task(write(chat, name, stop)) for chat, name in zip(clients, names, strict=True)]
        for n in range(KILLS):
            before = len(records[0])
            async with asyncio.timeout(PATIENCE_S):
                while len(records[0]) < before + 20:
                    progress.clear()
                    await progress.wait()
            pids = await asyncio.to_thread(own_server.pids)
            if pids:
                os.kill(pids[sorted(pids)[n % len(pids)]], signal.SIGKILL)
            for chat in clients:
                chat.nudge()
        stop.set()
        said = await asyncio.gather(*writers)
        await clients[0].send(group, "the end")
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(end.wait() for end in ends))
        for log in records:
            seqs = [seq for seq, _ in log]
            assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
            assert log == records[0]
        for name, mine in zip(names, said, strict=True):
            assert [body for _, body in records[0] if body.startswith(name)] == mine
    finally:
        for task in readers:
            task.cancel()
        await asyncio.gather(*(chat.close() for chat in clients))
    own_server.signal(signal.SIGTERM)  # its log tells of the dead, as it should
    assert own_server.wait() == 0


async def test_a_restart_of_the_server_is_survived(own_server: Server) -> None:
    url = f"http://127.0.0.1:{own_server.port}"
    async with await login(url) as chat:
        room = await chat.channel("lobby")
        await chat.send(room, "before")
        await until(chat, Message)
        own_server.stop()
        lost = await until(chat, Disconnected)
        assert lost.code == 1012
        waiting = [chat.post(room, f"meanwhile {n}") for n in range(3)]
        own_server.start()
        chat.nudge()
        sent = [await one for one in waiting]
        assert [s.seq for s in sent] == list(range(sent[0].seq, sent[0].seq + 3))
        got = await bodies(chat, room, 3)
        assert [m.body for m in got] == ["meanwhile 0", "meanwhile 1", "meanwhile 2"]


async def test_a_restarted_client_goes_on_exactly_where_it_was(url: str, tmp_path: Path) -> None:
    name = fresh("bot")
    state = tmp_path / "bot.state"
    async with await login(url) as alice:
        async with await login(url, name, state=FileState(state)) as bot:
            group = await alice.open("group", title="ours", members=[bot.user.id])
            await bot.view(group)
            for n in range(5):
                await alice.send(group, str(n))
            first = await bodies(bot, group, 2)
        assert state.stat().st_mode & 0o777 == 0o600
        for n in range(5, 8):
            await alice.send(group, str(n))
        async with await login(url, name, state=FileState(state)) as bot:
            assert bot.conversations[group].title == "ours"
            second = await bodies(bot, group, 6)
    assert [m.body for m in first + second] == [str(n) for n in range(8)]


async def test_an_event_that_failed_is_told_again_after_a_restart(url: str) -> None:
    state = MemoryState()
    name = fresh("bot")
    async with await login(url) as alice:
        bot = await login(url, name, state=state)
        with contextlib.suppress(ZeroDivisionError):
            async with bot:
                group = await alice.open("group", members=[bot.user.id])
                await bot.view(group)
                await alice.send(group, "done")
                await alice.send(group, "fails")
                await bodies(bot, group, 2)
                raise ZeroDivisionError
        async with await login(url, name, state=state) as bot:
            assert (await until(bot, Message)).body == "fails"


async def test_a_message_of_a_run_that_died_is_sent_once_by_the_next(url: str, server: Server, tmp_path: Path) -> None:
    name = fresh("bot")
    path = tmp_path / "bot.state"
    async with proxy_to(server.port) as proxy, await login(url) as alice:
        through = f"http://127.0.0.1:{proxy.port}"
        bot = await login(through, name, state=FileState(path))
        async with bot:
            group = await alice.open("group", members=[bot.user.id])
            await bot.view(group)
            proxy.mute = True
            lost = [bot.post(group, f"{n}") for n in range(3)]
            first = await until(alice, Message)  # stored before it went out; its answer is lost
            died_with = path.read_bytes()
        for one in lost:
            with pytest.raises(ClientClosed):
                await one
        proxy.mute = False
        path.write_bytes(died_with)
        async with await login(through, name, state=FileState(path)) as again:
            await again.flush()
            said = [m for m in (await alice.history(group)).entries if isinstance(m, Message)]
            assert [m.body for m in said] == ["0", "1", "2"]
            assert said[0].cid == first.cid


async def test_the_state_of_another_user_is_refused(url: str) -> None:
    state = MemoryState()
    async with await login(url, state=state) as chat:
        await until(chat, Ready)
    with pytest.raises(StateMismatch):
        async with await Client.login(url, fresh(), PASSWORD, register=True, state=state):
            pass


async def test_a_state_that_cannot_be_read_is_refused(url: str) -> None:
    state = MemoryState()
    state.data = b"{"
    with pytest.raises(StateMismatch):
        async with await login(url, state=state):
            pass


async def test_a_message_that_cannot_be_stored_is_not_sent(url: str, tmp_path: Path) -> None:
    directory = tmp_path / "gone"
    directory.mkdir()
    async with await login(url, state=FileState(directory / "state")) as chat:
        room = await chat.channel(fresh("lobby"))
        await chat.send(room, "stored")
        directory.rename(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="No such file"):
            await chat.send(room, "lost")
        assert chat.unacknowledged == 0
        page = await chat.history(room)
        assert [m.body for m in page.entries if isinstance(m, Message)] == ["stored"]
