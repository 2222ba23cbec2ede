"""How each fault is done, and undone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..server import BACKENDS
from .crowd import Crowd, silent
from .host import Host
from .plan import Fault
from .proxy import How
from .site import Site
from .wire import Broken, Wire, dial

#: A worker is ready again long before; a host whose workers drain first needs their time.
WELL_S = 45.0
JUMPS_S = (3600.0, -3600.0, 86_400.0, -600.0)
LATE_S = 0.7
SILENT = 20
#: New connections per second that knock while workers are replaced.
KNOCKS_PER_S = 40
KNOCK_S = 20.0
TRACE_S = 10.0


class Skipped(Exception):
    """This machine cannot do it; the message says why, in one line."""


@dataclass
class Scene:
    """The objects that faults work on, and their notes for the checker."""

    site: Site
    crowd: Crowd
    resets: list[str] = field(default_factory=list)  # of connections in an accept queue
    knocks: int = 0
    notes: list[str] = field(default_factory=list)

    def host(self, fault: Fault) -> Host:
        """The one that is hit."""
        return self.site.hosts[fault.host]


def strace() -> str:
    """The program; installed if it is missing and we are root, as redis-server is.

    :raises Skipped: it is not there.
    """
    if shutil.which("strace") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        for arguments in (["update", "-q"], ["install", "-yq", "--no-install-recommends", "strace"]):
            subprocess.run(
                ["apt-get", *arguments],
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                check=False,
                stdout=subprocess.DEVNULL,
            )
    found = shutil.which("strace")
    if found is None:
        raise Skipped("strace is missing: apt-get install strace")
    return found


async def well(site: Site) -> None:
    """Wait until every host has all its workers."""
    deadline = time.monotonic() + WELL_S
    for host in site.hosts:
        while len(await asyncio.to_thread(host.workers_now)) < host.workers:
            assert time.monotonic() < deadline, (
                f"{host.data.name} is not well after {WELL_S:.0f} s:\n{host.log()[-3000:]}"
            )
            await asyncio.sleep(0.05)


async def pid_of(host: Host, slot: int) -> int:
    """Of a serving worker (that slot's, if it serves)."""
    while not (pids := await asyncio.to_thread(host.workers_now)):
        await asyncio.sleep(0.05)
    return pids.get(slot) or next(iter(pids.values()))


# --- processes -----------------------------------------------------------------------
async def kill_worker(scene: Scene, fault: Fault) -> None:
    os.kill(await pid_of(scene.host(fault), fault.slot), signal.SIGKILL)


async def kill_in_batch(scene: Scene, fault: Fault) -> None:
    pid = await pid_of(scene.host(fault), fault.slot)
    site = scene.site
    if site.mongo is not None:
        # The batch is on its way, and lands after its worker has died.
        site.mongo.pause()
        await asyncio.sleep(fault.kind.lasts_s)
        os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.1)
        site.mongo.resume()
        return
    writer = await store_pid(scene.host(fault), "writer")
    os.kill(writer, signal.SIGSTOP)
    try:
        await asyncio.sleep(fault.kind.lasts_s)
        os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.1)
    finally:
        os.kill(writer, signal.SIGCONT)


async def store_pid(host: Host, name: str) -> int:
    """Of the writer or the indexer, as soon as it is ready."""
    while (pid := (await asyncio.to_thread(host.store_now)).get(name)) is None:
        await asyncio.sleep(0.02)
    return pid


async def _kill_as_it_calls(host: Host, name: str, calls: str) -> None:
    """SIGKILL a process of the store as it enters one of these system calls."""
    pid = await store_pid(host, name)
    async with traced([pid], calls, "signal=KILL:when=1"):
        deadline = time.monotonic() + TRACE_S
        while (await asyncio.to_thread(host.store_now)).get(name, pid) == pid:
            assert time.monotonic() < deadline, f"{name} {pid} made no {calls} within {TRACE_S} s"
            await asyncio.sleep(0.02)


async def kill_writer(scene: Scene, fault: Fault) -> None:
    # As it enters the system call that would make its next commit durable.
    await _kill_as_it_calls(scene.host(fault), "writer", "fdatasync,fsync")


async def stop_writer(scene: Scene, fault: Fault) -> None:
    pid = await store_pid(scene.host(fault), "writer")
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + fault.kind.lasts_s
    try:
        while (await asyncio.to_thread(scene.host(fault).store_now)).get("writer", pid) == pid:
            if time.monotonic() > deadline:
                scene.crowd.broken.add("stuck", f"{fault}: the writer stood still for {fault.kind.lasts_s} s")
                break
            await asyncio.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def kill_in_slice(scene: Scene, fault: Fault) -> None:
    host = scene.host(fault)
    writer = await store_pid(host, "writer")
    # As it writes rows of a run: portions are small here, so that one is never far.
    await _kill_as_it_calls(host, "indexer", "pwrite64")
    with contextlib.suppress(ProcessLookupError):
        os.kill(writer, signal.SIGKILL)


@contextlib.asynccontextmanager
async def traced(pids: list[int], calls: str, inject: str | None, output: Path | None = None) -> AsyncIterator[None]:
    """strace is attached to these processes, and does ``inject`` to these calls."""
    arguments = ["-f", "-qq", "-s", "8192", "-e", f"trace={calls}", "-o", str(output or os.devnull)]
    if inject is not None:
        arguments += ["-e", f"inject={calls}:{inject}"]
    process = await asyncio.create_subprocess_exec(
        await asyncio.to_thread(strace), *arguments, *(part for pid in pids for part in ("-p", str(pid))),
        stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()  # it lets them go
        _, said = await process.communicate()
        if b"Operation not permitted" in said:
            raise Skipped("strace may not attach to the processes here (ptrace)")


async def stop_worker(scene: Scene, fault: Fault) -> None:
    pid = await pid_of(scene.host(fault), fault.slot)
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(fault.kind.lasts_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def kill_supervisor(scene: Scene, fault: Fault) -> None:
    host = scene.host(fault)
    await asyncio.to_thread(host.kill_supervisor)
    await asyncio.sleep(fault.kind.lasts_s)
    await asyncio.to_thread(host.restart)


async def drain_host(scene: Scene, fault: Fault) -> None:
    host = scene.host(fault)
    host.signal(signal.SIGTERM)
    code = await asyncio.to_thread(host.wait)
    if code != 0:
        scene.notes.append(f"{fault}: the drained host ended with {code}")
    await asyncio.sleep(fault.kind.lasts_s)
    await asyncio.to_thread(host.restart)


async def reload(scene: Scene, fault: Fault) -> None:
    host = scene.host(fault)
    async with knocking(scene, host):
        before = set((await asyncio.to_thread(host.workers_now)).values())
        host.signal(signal.SIGHUP)
        await _replaced(host, before)


async def _replaced(host: Host, before: set[int]) -> None:
    deadline = time.monotonic() + WELL_S
    while True:
        workers = (await asyncio.to_thread(host.status))["workers"]
        ready = {one["pid"] for one in workers if one["state"] == "ready"}
        if len(workers) == len(ready) == host.workers and not ready & before:
            return
        assert time.monotonic() < deadline, f"not reloaded: {workers}"
        await asyncio.sleep(0.1)


async def drain_worker(scene: Scene, fault: Fault) -> None:
    host = scene.host(fault)
    async with knocking(scene, host):
        host.signal(signal.SIGTTOU)
        await asyncio.sleep(fault.kind.lasts_s)
        host.signal(signal.SIGTTIN)
        await asyncio.sleep(1)
        await well(scene.site)


@contextlib.asynccontextmanager
async def knocking(scene: Scene, host: Host) -> AsyncIterator[None]:
    """New connections come all the time; none may be reset before it was greeted."""

    async def knock() -> None:
        scene.knocks += 1
        wire: Wire | None = None
        try:
            # Resets are looked for here; how long it takes is seen elsewhere.
            wire = await dial(host.address, lambda data: None, within_s=KNOCK_S)
            async with asyncio.timeout(KNOCK_S):
                while not wire.greeted and not wire.ended.is_set():
                    await asyncio.sleep(0.01)
            # Closed with 1012 instead of a greeting: the worker accepted it, and sent the reason.
            if wire.reset and not wire.greeted:
                scene.resets.append("reset after the upgrade, before any message")
        except ConnectionResetError:
            scene.resets.append("reset before the upgrade")
        except (OSError, Broken) as exc:
            scene.resets.append(f"not taken: {exc!r}")
        finally:
            if wire is not None:
                wire.close()
                await asyncio.sleep(0.05)
                wire.abort()

    async def keep_on() -> None:
        async with asyncio.TaskGroup() as group:
            while not done.is_set():
                group.create_task(knock())
                await asyncio.sleep(1 / KNOCKS_PER_S)

    done = asyncio.Event()
    task = asyncio.create_task(keep_on())
    try:
        yield
    finally:
        done.set()
        await task


# --- the store -----------------------------------------------------------------------
async def store_stalls(scene: Scene, fault: Fault) -> None:
    site = scene.site
    if site.mongo is not None:
        site.mongo.pause()
        try:
            await asyncio.sleep(fault.kind.lasts_s)
        finally:
            site.mongo.resume()
        return
    stall = BACKENDS[0].stall(site.hosts[0].data)
    await asyncio.to_thread(stall.__enter__)
    try:
        await asyncio.sleep(fault.kind.lasts_s)
    finally:
        stall.__exit__(None, None, None)


async def store_killed(scene: Scene, fault: Fault) -> None:
    mongo = scene.site.mongo
    assert mongo is not None
    mongo.kill()
    await asyncio.sleep(fault.kind.lasts_s)
    await asyncio.to_thread(mongo.start)


async def disk_full(scene: Scene, fault: Fault) -> None:
    disk = scene.site.disk
    if not disk.small:
        raise Skipped(f"no tmpfs can be mounted here: {disk.why}")
    errors = sum(len(sender.errors) for sender in scene.crowd.senders)
    await asyncio.to_thread(disk.fill)
    try:
        await asyncio.sleep(fault.kind.lasts_s)
        # A checkpoint may have made a little room in the files that were there.
        told = sum(len(sender.errors) for sender in scene.crowd.senders) - errors
        scene.notes.append(f"{fault}: {told} sends were told to come back")
        if not told:
            scene.crowd.broken.add("full", f"{fault}: nobody was told")
    finally:
        disk.empty()


async def sync_fails(scene: Scene, fault: Fault) -> None:
    host = scene.host(fault)
    pids = [await store_pid(host, name) for name in ("writer", "indexer")]
    trace = scene.site.folder / "trace"
    async with traced(pids, "fdatasync,fsync", "error=EIO", trace):
        await asyncio.sleep(fault.kind.lasts_s)
    failed = trace.read_text(errors="replace").count("(INJECTED)")
    scene.notes.append(f"{fault}: {failed} syncs failed")
    if not failed:
        scene.crowd.broken.add("harmless", f"{fault}: no sync was seen")


# --- Redis and the bus ----------------------------------------------------------------
async def _redis_away(scene: Scene, fault: Fault, *, lose_data: bool) -> None:
    redis = scene.site.redis
    assert redis is not None
    redis.kill(lose_data=lose_data)
    await asyncio.sleep(fault.kind.lasts_s)
    await asyncio.to_thread(redis.start)


async def redis_killed(scene: Scene, fault: Fault) -> None:
    await _redis_away(scene, fault, lose_data=False)


async def redis_emptied(scene: Scene, fault: Fault) -> None:
    await _redis_away(scene, fault, lose_data=True)


async def redis_stops(scene: Scene, fault: Fault) -> None:
    redis = scene.site.redis
    assert redis is not None
    redis.freeze()
    try:
        await asyncio.sleep(fault.kind.lasts_s)
    finally:
        redis.thaw()


async def _bus(scene: Scene, fault: Fault, *, up: How = How.WELL, down: How = How.WELL) -> None:
    proxy = scene.site.proxies[fault.host]
    proxy.block(up=up, down=down, delay_s=LATE_S)
    try:
        await asyncio.sleep(fault.kind.lasts_s)
    finally:
        proxy.heal()


async def bus_late(scene: Scene, fault: Fault) -> None:
    await _bus(scene, fault, down=How.LATE)


async def bus_swallows_up(scene: Scene, fault: Fault) -> None:
    await _bus(scene, fault, up=How.NEVER)


async def bus_swallows_down(scene: Scene, fault: Fault) -> None:
    await _bus(scene, fault, down=How.NEVER)


async def bus_half_closed(scene: Scene, fault: Fault) -> None:
    await _bus(scene, fault, down=How.ENDED)


# --- clocks and clients ---------------------------------------------------------------
async def clock(scene: Scene, fault: Fault) -> None:
    jump = JUMPS_S[int(fault.twist * len(JUMPS_S))]
    scene.notes.append(f"{fault}: by {jump:+.0f} s, and back")
    scene.site.clock.jump(jump)
    try:
        await asyncio.sleep(fault.kind.lasts_s)
    finally:
        scene.site.clock.jump(-jump)


async def never_reads(scene: Scene, fault: Fault) -> None:
    address = scene.host(fault).address
    wires = [await silent(address, scene.crowd.reader[1]) for _ in range(SILENT)]
    try:
        await asyncio.sleep(fault.kind.lasts_s)
    finally:
        for wire in wires:
            wire.abort()


HARM: dict[str, Callable[[Scene, Fault], Awaitable[None]]] = {
    one.__name__: one
    for one in (
        kill_worker, kill_in_batch, kill_writer, stop_writer, kill_in_slice, stop_worker, kill_supervisor, drain_host,
        reload, drain_worker, store_stalls, store_killed, disk_full, sync_fails, redis_killed, redis_emptied,
        redis_stops, bus_late, bus_swallows_up, bus_swallows_down, bus_half_closed, clock, never_reads,
    )
}  # fmt: skip
#: Those that replace workers without resetting any connection.
REPLACING = (reload, drain_worker)
