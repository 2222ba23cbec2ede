"""The participants of a test: users, their clients on either worker, and their conversations."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import secrets
import subprocess
from dataclasses import dataclass
from typing import Any

from ..server import PATIENCE_S, Server, command
from .client import Client, Message
from .raw import Raw
from .rest import Response, http

PASSWORD = "correct horse"


def new_cid() -> str:
    """An id for something new."""
    return secrets.token_urlsafe(12)


@dataclass(frozen=True)
class User:
    id: str
    name: str
    token: str


class World:
    """Everything that one test makes on a server. Clients are spread over the workers in turn."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.clients: list[Client] = []
        self.raws: list[Raw] = []
        self._turn = itertools.count()

    @property
    def servers(self) -> list[Server]:
        return [self.server]

    async def aclose(self) -> None:
        """Hang up on the server."""
        for client in self.clients:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(2):
                    await client.close()
        for raw in self.raws:
            raw.close()

    async def command(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run ``chatcore ARGUMENTS`` on the server's data."""
        run = functools.partial(command, *arguments, "--data", self.server.data, stdin=stdin)
        return await asyncio.to_thread(run, settings=self.server.settings)

    # --- users -------------------------------------------------------------------
    async def http(self, method: str, path: str, **options: Any) -> Response:
        """One HTTP request."""
        return await http(self.server.address, method, path, **options)

    async def user(self, name: str = "user", password: str = PASSWORD) -> User:
        """A new account; its name is made unique."""
        response = await self.http(
            "POST", "/v1/users", body={"name": f"{name}-{secrets.token_hex(6)}", "password": password}
        )
        assert response.status == 201, response
        account = response.json
        return User(account["user"]["id"], account["user"]["name"], account["token"])

    async def login(self, user: User, password: str = PASSWORD) -> User:
        """The same user with another token."""
        response = await self.http("POST", "/v1/sessions", body={"name": user.name, "password": password})
        assert response.status == 201, response
        return User(user.id, user.name, response.json["token"])

    async def worthless(self, token: str) -> None:
        """Wait until a token that was ended is refused on each worker: those that remember it hear of it."""
        async with asyncio.timeout(PATIENCE_S):
            for slot in range(self.server.workers):
                with contextlib.suppress(ConnectionError):
                    while True:
                        client = await self.open(slot)
                        await client.request("auth", v=1, token=token)
                        await client.close()
                assert (await client.end()).code == 4101

    # --- connections -----------------------------------------------------------------
    async def open(self, on: int | None = None, **options: Any) -> Client:
        """A connection that has not logged in, on the worker of this slot (None: the next in turn)."""
        slot = next(self._turn) % self.server.workers if on is None else on
        for _ in range(200):
            client = await Client.open(self.server.address, **options)
            self.clients.append(client)
            await client.expect(t="hello")
            if self.server.slot_of(client.port) == slot:
                return client
            self.clients.remove(client)
            await client.close()
        raise AssertionError(f"no connection reached worker {slot}")

    async def connect(self, user: User, *, on: int | None = None, ready: bool = True, **auth: Any) -> Client:
        """A client that has logged in; with ``ready``, after its `ready`."""
        client = await self.open(on)
        await client.request("auth", v=1, token=user.token, **auth)
        client.user = user.id
        if ready:
            await client.expect(t="ready", sync=...)
        return client

    async def pair(self, name: str = "user", **auth: Any) -> tuple[User, Client]:
        """A new user and a client of it."""
        user = await self.user(name)
        return user, await self.connect(user, **auth)

    async def raw(self, on: int | None = None, **options: Any) -> Raw:
        """A connection without manners, upgraded."""
        slot = next(self._turn) % self.server.workers if on is None else on
        for _ in range(200):
            raw = await Raw.open(self.server.address, **options)
            await raw.upgrade()
            if self.server.slot_of(raw.port) == slot:
                self.raws.append(raw)
                return raw
            raw.close()
        raise AssertionError(f"no connection reached worker {slot}")

    async def both_workers(self, user: User, **auth: Any) -> tuple[Client, Client]:
        """Two clients of one user, one on each worker."""
        return await self.connect(user, on=0, **auth), await self.connect(user, on=1, **auth)

    # --- conversations -----------------------------------------------------------------
    async def _told(self, conv: str, *members: str) -> str:
        """Wait until all clients of the members have the `conv` of a new conversation.

        Messages sent to it from then on are pushed to them, states too. Earlier entries may be, or not:
        one may be attached where the head was.
        """
        for client in self.clients:
            if client.user in members and client.closed is None:
                await client.until(lambda c=client: c.got(t="conv", c=conv), f"a conv of {conv}")
                for view in client.got(t="conv", c=conv, after=...):
                    await client.reach(conv, view["head"])
        return conv

    async def group(self, owner: Client, *members: User, title: str | None = "a group") -> str:
        """Open a group; its id, once all its members have its `conv`."""
        fields: Message = {"kind": "group", "cid": new_cid(), "members": [user.id for user in members]}
        if title is not None:
            fields["title"] = title
        return await self._told((await owner.request("open", **fields))["c"], owner.user, *fields["members"])

    async def channel(self, owner: Client, title: str | None = None) -> str:
        """Open a channel; its id."""
        title = title or f"channel {secrets.token_hex(4)}"
        reply = await owner.request("open", kind="channel", cid=new_cid(), title=title)
        return await self._told(reply["c"], owner.user)

    async def dm(self, one: Client, other: User) -> str:
        """Open the direct conversation with another user; its id."""
        reply = await one.request("open", kind="dm", cid=new_cid(), members=[other.id])
        return await self._told(reply["c"], one.user, other.id)

    @staticmethod
    async def send(client: Client, conv: str, body: str = "hello", **fields: Any) -> Message:
        """Send a message; the reply."""
        return await client.request("send", **{"c": conv, "cid": new_cid(), "body": body, **fields})

    @staticmethod
    async def fill(client: Client, conv: str, count: int, body: str = "message") -> int:
        """Send so many messages; the seq of the last."""
        last = 0
        # Below the limit on unanswered requests, however small a test has set it.
        for first in range(0, count, 8):
            replies = [
                await client.begin("send", c=conv, cid=new_cid(), body=f"{body} {i}")
                for i in range(first, min(first + 8, count))
            ]
            for reply in replies:
                done = await client.answer(reply)
                assert done["t"] == "ok", done
                last = max(last, done["s"])
        return last

    @staticmethod
    async def whole_log(client: Client, conv: str) -> list[Message]:
        """Every entry, by pages of `history`."""
        entries: list[Message] = []
        while True:
            after = entries[-1]["s"] if entries else 0
            page = await client.request("history", c=conv, after=after, limit=10, raw=True)
            entries += page["entries"]
            if not page["more"]:
                assert [entry["s"] for entry in entries] == list(range(1, len(entries) + 1))
                return entries


async def until(condition: Any, what: str) -> Any:
    """Wait for something that raises no event when it happens; ``condition`` may be a coroutine function."""
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert asyncio.get_running_loop().time() < deadline, f"not within {PATIENCE_S} s: {what}"
        await asyncio.sleep(0.02)
