"""Passwords and tokens that change while the server checks them, and the cost of a log-in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from chatcore.accounts.passwords import Passwords
from chatcore.accounts.service import Accounts, token_hash
from chatcore.errors import Unauthenticated
from chatcore.settings import AccountSettings, Settings
from chatcore.store.base import Account, Token
from chatcore.store.sqlite.store import SQLiteStore

from ..store.harness import Opened, run
from ..store.hosting import hosted

FAR = 2**50


class Raced(SQLiteStore):
    """A store in which something happens just after an account or a token was read."""

    def __init__(self, data: Path) -> None:
        super().__init__(data, lambda entries: None)
        self.after_account: Callable[[Account], Awaitable[None]] | None = None
        self.after_token: Callable[[bytes], Awaitable[None]] | None = None

    async def account(self, name: str) -> Account | None:
        found = await super().account(name)
        if found is not None and self.after_account is not None:
            await self.after_account(found)
        return found

    async def token(self, token_hash: bytes) -> Token | None:
        found = await super().token(token_hash)
        if self.after_token is not None:
            await self.after_token(token_hash)
        return found


def with_accounts(data: Path, work: Callable[[Raced, Accounts], Awaitable[Any]]) -> None:
    """Accounts with cheap passwords, on a store that can be raced."""

    async def main() -> None:
        settings = Settings(accounts=AccountSettings(password_hash_memory_kib=8, password_hash_time=1))
        store = Raced(data)
        await store.start()
        accounts = Accounts(settings, store)
        try:
            await work(store, accounts)
        finally:
            accounts.close()
            await store.close()

    with hosted(data), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


# --- the store ---------------------------------------------------------------------------------


def test_no_token_is_given_for_a_password_that_was_changed_since_it_was_verified(tmp_path: Path) -> None:
    """Changing the password revokes all tokens; a login that had verified the old one then put a new one in."""

    async def work(o: Opened) -> None:
        alice = await o.user("alice")  # with the hash "hash"
        await o.store.add_token(b"first", alice.id, FAR, "hash")
        await o.store.update_user(alice.id, None, "new hash", b"")
        with pytest.raises(Unauthenticated):
            await o.store.add_token(b"late", alice.id, FAR, "hash")
        assert await o.store.token(b"late") is None
        assert await o.store.token(b"first") is None
        await o.store.add_token(b"new", alice.id, FAR, "new hash")
        assert await o.store.token(b"new") is not None

    run(tmp_path, work)


def test_an_account_disabled_meanwhile_gets_no_token(tmp_path: Path) -> None:
    """The server checked the account before it computed the hash, and not again afterwards."""

    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        await o.store.set_disabled("alice", True)
        with pytest.raises(Unauthenticated):
            await o.store.add_token(b"late", alice.id, FAR, "hash")
        assert await o.store.token(b"late") is None

    run(tmp_path, work)


def test_extending_a_revoked_token_fails_and_returns_false(tmp_path: Path) -> None:
    async def work(o: Opened) -> None:
        alice = await o.user("alice")
        await o.store.add_token(b"token", alice.id, FAR, "hash")
        assert await o.store.extend_token(b"token", FAR + 1) is True
        await o.store.revoke_token(b"token")
        assert await o.store.extend_token(b"token", FAR + 2) is False
        assert await o.store.token(b"token") is None

    run(tmp_path, work)


# --- the service -------------------------------------------------------------------------------


def test_a_login_that_the_change_of_the_password_overtakes_fails(tmp_path: Path) -> None:
    """The same through the service: the old password opened a session after it had been changed."""

    async def work(store: Raced, accounts: Accounts) -> None:
        first = await accounts.register("alice", "correct horse")

        async def change(account: Account) -> None:
            store.after_account = None
            who = await accounts.identify(first.token)
            await accounts.update(who, None, "battery staple", "correct horse")

        store.after_account = change
        with pytest.raises(Unauthenticated):
            await accounts.login("alice", "correct horse")
        assert (await accounts.login("alice", "battery staple")).user == first.user

    with_accounts(tmp_path, work)


def test_a_token_revoked_while_it_is_checked_is_refused(tmp_path: Path) -> None:
    """The server found it valid, and did not notice that it could not extend it any more after it was revoked."""

    async def work(store: Raced, accounts: Accounts) -> None:
        user = (await accounts.register("alice", "correct horse")).user
        account = await store.account("alice")
        assert account is not None
        # Old enough to be extended at its next use.
        soon = time.time_ns() // 1_000_000 + 60_000
        await store.add_token(token_hash("old"), user.id, soon, account.password)
        assert (await accounts.identify("old")).user == user
        await store.add_token(token_hash("older"), user.id, soon, account.password)
        store.after_token = store.revoke_token
        with pytest.raises(Unauthenticated):
            await accounts.identify("older")

    with_accounts(tmp_path, work)


def test_the_first_log_in_with_an_unknown_name_costs_as_much_as_any_other() -> None:
    """The dummy hash was computed when it was first needed: the first unknown name on each worker took twice as long,
    so that a stranger who had just seen a restart could learn that a name is not taken.
    """

    async def work() -> None:
        firsts, others = [], []
        for _ in range(20):  # one undisturbed round is enough: twice the cost would show in every round
            passwords = Passwords(memory_kib=8192, time_cost=4, parallel=1, queue=10)
            try:
                known = await passwords.hash("correct horse")  # all that is computed at the start is there by now
                for hashed, durations in ((None, firsts), (known, others)):
                    begin = time.process_time()  # CPU time does not depend on other users of the machine
                    assert not await passwords.verify(hashed, "wrong horse")
                    durations.append(time.process_time() - begin)
            finally:
                passwords.close()
            if len(firsts) >= 3 and min(firsts) < 1.5 * min(others):
                break
        assert min(firsts) < 1.5 * min(others), (firsts, others)

    asyncio.run(work())
