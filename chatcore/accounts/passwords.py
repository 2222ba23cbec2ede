"""Passwords: which are allowed, and their argon2id hashes, computed on a thread with a bounded queue."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from ..errors import BadRequest, Unavailable
from ..settings import Settings


def check_password(password: str, settings: Settings) -> None:
    """:raises BadRequest: the password is too short or too long."""
    low, high = settings.limits.password_chars_min, settings.limits.password_chars_max
    if not low <= len(password) <= high:
        raise BadRequest(f"password: {low} to {high} characters")


class Passwords:
    """Hashes and verifies on one thread (argon2 releases the interpreter lock).

    A log-in with an unknown name verifies the password against a dummy hash, so that it costs and looks the same as a
    log-in with a wrong password.

    :param queue: how many passwords may wait.
    """

    def __init__(self, *, memory_kib: int, time_cost: int, parallel: int, queue: int) -> None:
        self._hasher = PasswordHasher(time_cost=time_cost, memory_cost=memory_kib, parallelism=parallel)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="passwords")
        self._limit = queue
        self._waiting = 0
        # Computed in advance, so that even the first log-in with an unknown name takes no longer than others.
        self._dummy = self._executor.submit(self._hasher.hash, "a password of no account")

    @classmethod
    def configured(cls, settings: Settings, *, queue: int | None = None) -> Self:
        """With the cost that the settings ask for; `queue`: another limit than theirs."""
        accounts = settings.accounts
        return cls(
            memory_kib=accounts.password_hash_memory_kib,
            time_cost=accounts.password_hash_time,
            parallel=accounts.password_hash_parallel,
            queue=accounts.password_hash_queue if queue is None else queue,
        )

    def close(self) -> None:
        """End the thread; passwords that wait are dropped."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def hash(self, password: str) -> str:
        """The encoded hash of a password.

        :raises Unavailable: too many passwords wait.
        """
        return str(await self._run(self.hash_now, password))

    async def verify(self, hashed: str | None, password: str) -> bool:
        """Whether the password matches the hash (None: the user does not exist, so it does not).

        :raises Unavailable: too many passwords wait.
        """
        return bool(await self._run(self._verify, hashed, password))

    def hash_now(self, password: str) -> str:
        """As :meth:`hash`, on the calling thread, for the command line."""
        return self._hasher.hash(password)

    def _verify(self, hashed: str | None, password: str) -> bool:
        if hashed is None:
            self._check(self._dummy.result(), password)
            return False
        return self._check(hashed, password)

    def _check(self, hashed: str, password: str) -> bool:
        try:
            return self._hasher.verify(hashed, password)
        except (VerificationError, InvalidHashError):
            return False

    async def _run(self, call: object, *args: object) -> object:
        if self._waiting >= self._limit:
            raise Unavailable("too many logins at once", retry_after_ms=2000)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, call, *args)  # type: ignore[arg-type]
        finally:
            self._waiting -= 1
