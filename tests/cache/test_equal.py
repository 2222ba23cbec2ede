"""The cache returns what the store returns: after random work on two workers, with faults of every kind."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from chatcore.errors import ChatError, NotFound
from chatcore.store.base import Page, User

from ..services.redis import RedisServer
from .parts import SETTINGS, Clock, Worker, until, within, workers

STEPS = 70
QUICK = replace(SETTINGS, l2_timeout_ms=300, recent_entries=8, recent_conversations=16, l1_entries=16, refresh=True)
ROLES = ("member", "none", "banned", "admin")


class World:
    """Users in conversations, and random operations of theirs on two workers."""

    def __init__(self, a: Worker, b: Worker, chance: random.Random, clock: Clock) -> None:
        self.workers = [a, b]
        self.chance = chance
        self.clock = clock
        self.people: list[User] = []
        self.convs: list[str] = []
        self.tokens: list[bytes] = []
        self.passwords: dict[str, str] = {}
        self.compared = 0

    @property
    def somewhere(self) -> Worker:
        return self.chance.choice(self.workers)

    async def begin(self) -> None:
        for i in range(4):
            self.people.append(await self.somewhere.user(f"user{i}"))
            self.passwords[self.people[-1].id] = "hash"
        for kind in ("group", "group", "channel"):
            others = self.people[1:3] if kind == "group" else []
            self.convs.append(await self.somewhere.conversation(self.people[0], *others, kind=kind))

    async def step(self) -> None:
        """A random operation of a random user on a random worker. It may be refused."""
        w, user, conv = self.somewhere, self.chance.choice(self.people), self.chance.choice(self.convs)
        try:
            match self.chance.randrange(9):
                case 0 | 1:
                    await w.send(conv, user, "x" * self.chance.randrange(50))
                case 2 | 3:
                    await w.change(conv, self.chance.choice(self.people), user, self.chance.choice(ROLES))
                case 4:
                    await w.cache.update_user(user.id, f"{user.name}-{self.chance.randrange(1000)}", None)
                case 5:
                    token = self.chance.randbytes(32)
                    expires = int(self.clock.unix * 1000) + self.chance.randrange(1, 100_000)
                    await w.cache.add_token(token, user.id, expires, self.passwords[user.id])
                    self.tokens.append(token)
                case 6 if self.tokens:
                    token = self.chance.choice(self.tokens)
                    if self.chance.random() < 0.5:
                        await w.cache.revoke_token(token)
                    else:
                        await w.cache.extend_token(token, int(self.clock.unix * 1000) + 500_000)
                case 7 if self.chance.random() < 0.3:
                    new = f"hash-{self.chance.randrange(10**6)}"
                    keep = self.chance.choice(self.tokens) if self.tokens else b""
                    await w.cache.update_user(user.id, None, new, keep=keep)
                    self.passwords[user.id] = new
                case 8:
                    self.clock.move(self.chance.uniform(0, 20))
        except ChatError:
            pass  # refused, as it would have been without a cache

    async def compare(self, *some: Worker) -> None:
        """Compare all that can be read, on these workers."""
        for w in some:
            ids = [user.id for user in self.people]
            assert await w.cache.users(ids) == await w.sqlite.users(ids)
            for token in self.tokens[-8:]:
                assert await w.cache.token(token) == await w.sqlite.token(token)
            for conv in self.convs:
                for user in self.people:
                    limit = self.chance.randrange(1, 12)
                    before = self.chance.choice([None, None, self.chance.randrange(1, 60)])
                    args = (user.id, conv, before, None, limit, 10**6)
                    assert await self._page(w.cache, *args) == await self._page(w.sqlite, *args), args
            self.compared += 1

    @staticmethod
    async def _page(store: object, *args: object) -> Page | None:
        try:
            page: Page = await store.page(*args)  # type: ignore[attr-defined]
            return page
        except NotFound:
            return None


@pytest.mark.parametrize("seed", range(4))
async def test_without_faults_it_returns_the_same_after_every_step(tmp_path: Path, redis_url: str, seed: int) -> None:
    chance, clock = random.Random(seed), Clock()
    url = redis_url if seed % 2 else None
    async with workers(tmp_path, 2, redis=url, settings=QUICK, clock=clock) as (a, b):
        world = World(a, b, chance, clock)
        await world.begin()
        for _ in range(STEPS):
            await world.step()
            await world.compare(world.somewhere)
        kinds = a.cache.stats()["kinds"]
        del kinds["member_counts"]  # may be some seconds old
        assert all(counts["l1"] > 20 for counts in kinds.values()), kinds


@pytest.mark.parametrize("seed", range(2))
async def test_after_faults_it_returns_the_same(tmp_path: Path, redis_server: RedisServer, seed: int) -> None:
    """Redis frozen, killed, emptied; announcements lost; then a resync, as the bus asks for one after each of these."""
    chance, clock = random.Random(100 + seed), Clock()
    async with workers(tmp_path, 2, redis=redis_server.url, settings=QUICK, clock=clock) as (a, b):
        world = World(a, b, chance, clock)
        await world.begin()
        for fault in chance.sample(["frozen", "emptied", "kept", "deaf", "both"], 3):
            for _ in range(5):
                await world.step()
                await world.compare(world.somewhere)
            if fault in ("deaf", "both"):
                a.hub.lossy = True
            if fault in ("frozen", "both"):
                redis_server.freeze()
            elif fault != "deaf":
                redis_server.kill(lose_data=fault == "emptied")
            for _ in range(12):
                await world.step()
                for w in (a, b):
                    await w.cache.users([user.id for user in world.people])
                    await world._page(w.cache, world.people[0].id, world.convs[0], None, None, 8, 10**6)
                    if fault not in ("deaf", "both"):
                        await world.compare(w)
            if fault in ("frozen", "both"):
                redis_server.thaw()
            elif fault != "deaf":
                redis_server.start()
            for w in (a, b):
                assert w.cache.l2 is not None
                await within(w.cache.l2.until_ready(), "the return of level 2")
            a.hub.lossy = False
            a.hub.resync()
            await world.compare(a, b)
        assert world.compared > 15
        await until(lambda: a.cache.l2 is not None and a.cache.l2.ready, "it is used in the end")
