"""The Python client of chatcore, on asyncio.

::

    import asyncio
    from chatcore.client import Client

    async def main():
        async with await Client.login("http://127.0.0.1:8080", "alice", "correct horse", register=True) as chat:
            room = await chat.channel("lobby")      # joined, or made if there is none
            await chat.send(room, "hello")          # returns when it is durable
            async for event in chat.events():       # each entry once and in order, over reconnects
                print(event)

    asyncio.run(main())
"""

from . import events
from .accounts import Address, Session, find_user, login, logout, register
from .client import Client
from .errors import (
    ChatError,
    ClientClosed,
    ClientError,
    OutboxFull,
    Rejected,
    StateMismatch,
    TokenRejected,
    TooManyConnections,
)
from .events import *  # noqa: F403  (its own __all__ says which, so that a new event is listed once)
from .requests import Channel, ChannelsPage, MemberInfo, MembersPage, Page
from .state import FileState, MemoryState, Snapshot, State

__all__ = [
    "Address",
    "Channel",
    "ChannelsPage",
    "ChatError",
    "Client",
    "ClientClosed",
    "ClientError",
    "FileState",
    "MemberInfo",
    "MembersPage",
    "MemoryState",
    "OutboxFull",
    "Page",
    "Rejected",
    "Session",
    "Snapshot",
    "State",
    "StateMismatch",
    "TokenRejected",
    "TooManyConnections",
    "find_user",
    "login",
    "logout",
    "register",
]
__all__ += events.__all__
