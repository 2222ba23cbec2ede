"""Locks by key that exist while they are used: most keys never need one, and a lock is larger than most of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Locks(Generic[K]):
    """One at a time for each key, first come first served."""

    def __init__(self) -> None:
        self._used: dict[K, tuple[asyncio.Lock, int]] = {}  # and how many hold it or wait for it

    def __contains__(self, key: K) -> bool:
        """Whether a task holds the key's lock, or waits for it."""
        return key in self._used

    @contextlib.asynccontextmanager
    async def hold(self, key: K) -> AsyncIterator[None]:
        """Hold the key's lock."""
        lock, users = self._used.get(key) or (asyncio.Lock(), 0)
        self._used[key] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._used.pop(key)
            if users > 1:
                self._used[key] = lock, users - 1
