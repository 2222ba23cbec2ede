"""One run: all clients connect, faults happen in the middle of traffic, and in the end everything is compared."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from chatcore.store.sqlite.verify import verify

from . import check, stored
from .crowd import Crowd, Scale
from .figures import Figures, Happened, figure
from .harm import HARM, REPLACING, Scene, Skipped, well
from .host import Host
from .plan import Fault
from .record import Broken, Message
from .site import Site
from .use import Use, measure
from .wire import dial

#: All clients hold everything so long after the last fault, without a further send.
CONVERGE_S = 10.0
#: In the end the servers may use so much more than before the first fault.
GROWTH = 0.05
#: Traffic before what the servers use is measured, as a part of a run, at least and at most: caches fill, those of
#: SQLite's pages last.
FILL, FILL_S = 0.1, (20.0, 60.0)
STILL_S = 3.0
#: A page of a cache, newest entries.
PAGE = 50
#: In the servers' logs: what the faults make them say.
EXPECTED_LOG = r"died|signal 9|store|disk|I/O|mongo|redis|unavailable|full|stuck|supervisor is gone"


@dataclass
class Result:
    """The result of a run."""

    backend: str
    seed: int
    seconds: float
    scale: Scale
    broken: Broken
    figures: Figures
    happened: list[Happened]
    notes: list[str] = field(default_factory=list)
    messages: int = 0
    per_s: float = 0.0
    deliveries: int = 0
    converged_s: float = 0.0
    before: Use | None = None
    after: Use | None = None
    resets: int = 0
    knocks: int = 0
    filled: int = 0
    unacked: int = 0


class Run:
    """``await Run(...).run()``."""

    def __init__(
        self, backend: str, seed: int, seconds: float, scale: Scale, faults: list[Fault], *,
        launcher: tuple[str, ...] = ("tests.faults.launch",), say: Callable[[str], None] | None = None,
        compare_use: bool = True,
    ) -> None:  # fmt: skip
        self.backend, self.seed, self.seconds, self.scale, self.faults = backend, seed, seconds, scale, faults
        self.happened: list[Happened] = []
        self.notes: list[str] = []
        self._launcher = launcher
        self._compare_use = compare_use
        self._began_at = time.monotonic()
        self._say = say or (lambda line: print(f"{time.monotonic() - self._began_at:7.1f} {line}", file=sys.stderr))

    async def run(self) -> Result:
        """To its end; nothing is left running."""
        async with Site(self.backend, launcher=self._launcher) as site:
            crowd = Crowd(self.scale, self.seed, site.addresses)
            try:
                return await self._run(site, crowd)
            finally:
                await crowd.end()

    async def _run(self, site: Site, crowd: Crowd) -> Result:
        loop = asyncio.get_running_loop()
        await crowd.gather()
        await crowd.connect()
        self._say(f"{len(crowd.devices)} clients are there")
        crowd.begin()
        before = await self._fill(site, crowd) if self._compare_use else None
        # Every worker's cache has every newest page, and has to hear of all that comes.
        async for _ in self._all_pages(site, crowd):
            pass
        began = loop.time()
        first = [len(sender.sent) for sender in crowd.senders]
        crowd.flow(True)
        crowd.move()
        scene = Scene(site, crowd)
        for i, fault in enumerate(self.faults):
            await asyncio.sleep(began + fault.at - loop.time())
            await self._harm(scene, fault, last=i == len(self.faults) - 1)
        if not self.faults:
            await asyncio.sleep(began + self.seconds - loop.time())
        hushed = loop.time()
        sent = sum(len(sender.sent) for sender in crowd.senders) - sum(first)
        await crowd.hush()
        unacked, converged_s = await self._converge(site, crowd, hushed)
        ended = loop.time()
        after = None
        if self._compare_use:
            await asyncio.sleep(STILL_S)
            after = await measure(site)
            self._grown(before, after, crowd.broken)
        await self._check(site, crowd)
        self._mishaps(site, crowd.broken)
        steady = [device for device in crowd.devices if not device.slow]
        figures = figure(self.happened, crowd.senders, steady, began, hushed)
        self._resets(scene)
        records = [device.record for device in crowd.devices]
        return Result(
            self.backend, self.seed, ended - began, self.scale, crowd.broken, figures, self.happened,
            [*self.notes, *scene.notes], sent, sent / (hushed - began),
            sum(len(log.digests) for record in records for log in record.logs.values()), converged_s,
            before, after, len(scene.resets), scene.knocks, sum(record.filled for record in records), unacked,
        )  # fmt: skip

    async def _fill(self, site: Site, crowd: Crowd) -> Use:
        crowd.flow(True)
        await asyncio.sleep(min(FILL_S[1], max(FILL_S[0], FILL * self.seconds)))
        crowd.flow(False)
        await asyncio.sleep(STILL_S)
        return await measure(site)

    # --- faults ----------------------------------------------------------------------
    async def _harm(self, scene: Scene, fault: Fault, *, last: bool) -> None:
        loop = asyncio.get_running_loop()
        one = Happened(fault, loop.time())
        self.happened.append(one)
        self._say(str(fault))
        try:
            await HARM[fault.kind.name](scene, fault)
        except Skipped as exc:
            one.skipped = str(exc)
            self._say(f"skipped: {exc}")
        one.healed = loop.time()
        if "SIGKILL" in fault.kind.what:
            await self._ahead(scene, str(fault))
        await well(scene.site)

    async def _ahead(self, scene: Scene, when: str) -> None:
        """Right after a kill: every entry that a client has heard of is stored."""
        crowd = scene.crowd
        held: dict[str, int] = dict.fromkeys(crowd.convs, 0)
        for device in crowd.devices:
            for conv, log in device.record.logs.items():
                held[conv] = max(held[conv], log.reached)
        for sender in crowd.senders:
            for message in sender.sent[-20:]:
                held[message.conv] = max(held[message.conv], message.seq)
        heads = await asyncio.to_thread(stored.heads, scene.site, crowd.convs)
        check.nothing_is_ahead(heads, held, when, crowd.broken)

    # --- the end ----------------------------------------------------------------------
    async def _converge(self, site: Site, crowd: Crowd, hushed: float) -> tuple[int, float]:
        """Wait until all clients hold everything; how many messages are not acknowledged, and how long it took."""
        loop = asyncio.get_running_loop()
        unacked = await crowd.quiet(CONVERGE_S)
        if unacked:
            crowd.broken.add("unanswered", f"{unacked} messages are not acknowledged after {CONVERGE_S:.0f} s")
        heads = await asyncio.to_thread(stored.heads, site, crowd.convs)
        while waiting := list(crowd.waiting(heads)):
            if loop.time() > hushed + CONVERGE_S:
                for who in waiting:
                    crowd.broken.add("lost", f"after {CONVERGE_S:.0f} s of silence {who}")
                break
            await asyncio.sleep(0.05)
        return unacked, loop.time() - hushed

    async def _check(self, site: Site, crowd: Crowd) -> None:
        broken = crowd.broken
        logs = await asyncio.to_thread(stored.read, site)
        check.logs_are_dense(logs, broken)
        acked, landed = check.sends_are_kept(logs, crowd.senders, broken)
        compared = check.records_are_the_log(logs, crowd.devices, broken)
        self._say(f"{acked} acknowledged, {landed} stored without; {compared} deliveries compared")
        async for where, pages in self._all_pages(site, crowd):
            check.pages_are_the_log(logs, where, pages, broken)
        if site.mongo is None:
            for problem in await asyncio.to_thread(verify, site.hosts[0].data, self._say):
                broken.add("store", problem)

    async def _all_pages(self, site: Site, crowd: Crowd) -> AsyncIterator[tuple[str, dict[str, list[Message]]]]:
        """Of every worker: its name, and the newest page of every conversation."""
        for host in site.hosts:
            for slot in range(host.workers):
                where = f"worker {slot} of host {host.data.name}"
                try:
                    yield where, await self._pages(host, slot, crowd)
                except TimeoutError:
                    crowd.broken.add("unanswered", f"{where} does not tell its pages")

    async def _pages(self, host: Host, slot: int, crowd: Crowd) -> dict[str, list[Message]]:
        loop = asyncio.get_running_loop()
        for _ in range(200):
            inbox: asyncio.Queue[Message] = asyncio.Queue()
            try:
                wire = await dial(host.address, lambda data, inbox=inbox: inbox.put_nowait(orjson.loads(data)))  # type: ignore[misc]
            except TimeoutError:
                continue
            try:
                if await asyncio.to_thread(host.slot_of, wire.port) != slot:
                    continue
                # Away: what is attached here is not loaded for the sake of this reader.
                wire.send(orjson.dumps({"t": "auth", "id": 1, "v": 1, "token": crowd.reader[1], "only": []}))
                pages: dict[str, list[Message]] = {}
                for id, conv in enumerate(crowd.convs, 2):
                    wire.send(orjson.dumps({"t": "history", "id": id, "c": conv, "limit": PAGE, "raw": True}))
                    deadline = loop.time() + 2 * CONVERGE_S
                    while True:
                        async with asyncio.timeout(deadline - loop.time()):
                            reply: dict[str, Any] = await inbox.get()
                        if reply.get("id") == id:
                            break
                    pages[conv] = reply.get("entries", [])
                return pages
            finally:
                wire.abort()
        raise AssertionError(f"no connection reached worker {slot}")

    def _resets(self, scene: Scene) -> None:
        """While workers are replaced, no connection that waits to be accepted is reset."""
        windows = [(one.began, one.healed) for one in self.happened if HARM[one.fault.kind.name] in REPLACING]
        for device in scene.crowd.devices:
            if any(began <= at <= healed for at in device.life.resets for began, healed in windows):
                scene.resets.append(f"{device.name} was reset before it was greeted")
        for text in scene.resets:
            scene.crowd.broken.add("reset", text)

    def _grown(self, before: Use | None, after: Use, broken: Broken) -> None:
        assert before is not None
        self._say(f"in use before: {before}; after: {after}")
        for what in ("memory_kib", "files", "threads", "tasks"):
            was, now = getattr(before, what), getattr(after, what)
            if now > was * (1 + GROWTH):
                broken.add("grown", f"{what}: {was} before the first fault, {now} in the end")

    def _mishaps(self, site: Site, broken: Broken) -> None:
        for host in site.hosts:
            for line in host.mishaps(EXPECTED_LOG):
                broken.add("log", f"{host.data.name}: {line}")
            for text in re.findall(r"Task was destroyed|never retrieved|was never awaited", host.log()):
                broken.add("log", f"{host.data.name}: {text}")
