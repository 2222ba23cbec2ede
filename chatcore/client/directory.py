"""Finding conversations by name: a channel by its title, a user for a dm.

Titles are not unique on the server, so two people who both find no ``lobby``
and both make one have to end in the same. The rule is that the oldest wins:
whoever has just made a channel lists the directory once more, and if there are
several of that title takes the one whose first entry has the lowest time stamp
(then the lowest id), leaving its own. Someone who listed before the other one
was made holds the older one already, so both agree; and a channel that is made
later under the same title does not draw anybody away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from . import accounts
from .accounts import Address, Session
from .errors import Conflict, NotFound, Unauthenticated
from .requests import Channel

if TYPE_CHECKING:
    from .client import Client

#: Channels looked at for one title; more namesakes than this are somebody's joke.
_LISTED_MAX: Final = 200
_PAGE: Final = 50


async def register_or_say_wrong(address: Address, name: str, password: str) -> Session:
    """Make the account; if the name is taken, the password was wrong."""
    try:
        return await accounts.register(address, name, password)
    except Conflict:
        raise Unauthenticated("the name or the password is wrong") from None


async def channel(client: Client, title: str) -> str:
    """The id of the channel of this title: joined, or made if there is none."""
    found = await namesakes(client, title)
    if not found:
        made = await client.open("channel", title=title)
        found = await namesakes(client, title)
        if made not in [c.id for c in found]:
            return made
    chosen = found[0].id if len(found) == 1 else await _oldest(client, [c.id for c in found])
    if chosen not in client.conversations:
        await client.join(chosen)
    await client.view(chosen)
    return chosen


async def namesakes(client: Client, title: str) -> list[Channel]:
    """All channels of exactly this title."""
    found: list[Channel] = []
    after: str | None = None
    listed = 0
    while listed < _LISTED_MAX:
        page = await client.channels(title, after=after, limit=_PAGE)
        found += [c for c in page.conversations if c.title == title]
        listed += _PAGE
        after = page.next
        if after is None:
            break
    return found


async def _oldest(client: Client, ids: list[str]) -> str:
    """The oldest of several channels. Its log is only for members: look at each from inside."""
    ages: list[tuple[int, str]] = []
    joined: list[str] = []
    for conv in ids:
        if conv not in client.conversations:
            await client.join(conv)
            joined.append(conv)
        first = await client.history(conv, after=0, limit=1, raw=True)
        # One without any entry is the youngest: nobody has said anything there.
        ages.append((first.entries[0].ts if first.entries else 2**53, conv))
    chosen = min(ages)[1]
    for conv in ids:
        mine = client.conversations.get(conv)
        # Leave what was joined to look, and the namesake that we have just made ourselves.
        if conv != chosen and (conv in joined or (mine is not None and mine.role == "owner" and mine.members <= 1)):
            await client.leave(conv)
    return chosen


async def dm(client: Client, name: str) -> str:
    """The id of the direct conversation with the user of this name."""
    user = await accounts.find_user(client.address, client.token, name)
    if user is None:
        raise NotFound(f"there is no user {name!r}")
    conv = await client.open("dm", members=[user.id])
    await client.view(conv)
    return conv
