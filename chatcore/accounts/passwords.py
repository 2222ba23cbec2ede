"""Password hashes: argon2id, off the loop, and never more at once than the machine bears."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from ..errors import Unavailable


class Passwords:
    """Hashes and verifies in one thread (argon2 gives up the interpreter lock).

    A login for a user who does not exist verifies against a hash of nobody's
    password, so that it costs and looks the same as a wrong password.
    """

    def __init__(self, *, memory_kib: int, time_cost: int, parallel: int, queue: int) -> None:
        self._hasher = PasswordHasher(time_cost=time_cost, memory_cost=memory_kib, parallelism=parallel)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="passwords")
        self._limit = queue
        self._waiting = 0
        # Made before anybody logs in, so that not even the first unknown name takes longer.
        self._nobody = self._executor.submit(self._hasher.hash, "nobody's password")

    def close(self) -> None:
        """End the thread; what waits is dropped."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def hash(self, password: str) -> str:
        """The encoded hash.

        :raises Unavailable: too many are waiting.
        """
        return str(await self._run(self.hash_now, password))

    async def verify(self, hashed: str | None, password: str) -> bool:
        """Whether the password is the one of the hash (None: of a user who does not exist).

        :raises Unavailable: too many are waiting.
        """
        return bool(await self._run(self._verify, hashed, password))

    def hash_now(self, password: str) -> str:
        """The same without a loop, for the command line."""
        return self._hasher.hash(password)

    def _verify(self, hashed: str | None, password: str) -> bool:
        if hashed is None:
            self._check(self._nobody.result(), password)
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
