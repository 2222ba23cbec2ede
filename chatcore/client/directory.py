"""Finding conversations by name: a channel by its title, a user for a dm.

Titles are not unique on the server, so two people who both find no ``lobby``
and both make one have to end in the same. The rule is that the oldest wins:
whoever has just made a channel lists the directory once more, and if there are
several of that title takes the one whose first entry has the lowest time stamp
(then the lowest id), leaving its own. Someone who listed before the other one
was made holds the older one already, so both agree; and a channel that is made
later under the same title does not draw anybody away. Namesakes that everybody
has left are looked at only if there are no others.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import msgspec

from . import accounts
from .accounts import Address, Session
from .errors import Conflict, Forbidden, NotFound, Unauthenticated
from .requests import Channel
from .views import is_out

if TYPE_CHECKING:
    from .client import Client

#: Channels looked at for one title; more namesakes than this are somebody's joke.
_LISTED_MAX: Final = 200
_PAGE: Final = 50
#: Later than any time stamp.
MAX_TS: Final = 2**53
#: Between tries to leave a namesake of our own; looking takes a few milliseconds.
LEAVE_WAITS_S: Final = (0.05, 0.1, 0.2, 0.4, 0.8)


async def register_or_say_wrong(address: Address, name: str, password: str) -> Session:
    """Make the account; if the name is taken, the password was wrong."""
    try:
        return await accounts.register(address, name, password)
    except Conflict:
        raise Unauthenticated("the name or the password is wrong") from None


async def channel(client: Client, title: str) -> str:
    """The id of the channel of this title: joined, or made if there is none."""
    found = await namesakes(client, title)
    made = ""
    if not found:
        made = await client.open("channel", title=title)
        found = await namesakes(client, title)
        if made not in [c.id for c in found]:
            return made  # the directory does not show it yet; nobody else's is there either
    chosen = found[0] if len(found) == 1 else await _oldest(client, found, made)
    if is_out(chosen.role):
        await client.join(chosen.id)
    await client.view(chosen.id)
    return chosen.id


async def namesakes(client: Client, title: str) -> list[Channel]:
    """All channels of this title; as in the directory, case does not matter."""
    wanted = title.strip().casefold()
    found: list[Channel] = []
    after: str | None = None
    listed = 0
    while listed < _LISTED_MAX:
        page = await client.channels(title, after=after, limit=_PAGE)
        found += [c for c in page.conversations if c.title.casefold() == wanted]
        listed += _PAGE
        after = page.next
        if after is None:
            break
    return [one for one in found if one.members] or found


async def _oldest(client: Client, found: list[Channel], made: str) -> Channel:
    """The oldest of several channels; ``made`` is the one that we have just made ourselves, if any.

    A log is only for members: look at each from inside.
    """
    ages: list[tuple[int, str, Channel]] = []
    joined: list[str] = []
    for one in found:
        if is_out(one.role):
            try:
                await client.join(one.id)
            except Forbidden:
                continue  # not for us, so not where we would meet anybody
            joined.append(one.id)
        first = await client.history(one.id, after=0, limit=1, raw=True)
        # One without any entry is the youngest: nobody has said anything there.
        ages.append((first.entries[0].ts if first.entries else MAX_TS, one.id, one))
    if not ages:
        raise Forbidden(f"you may not join {found[0].title!r}")
    chosen = min(ages)[2]
    # Leave what was joined to look, and at last the namesake that we have just made ourselves:
    # while we wait for the others to leave ours, they may be waiting for us to leave theirs.
    for conv in [*joined, made]:
        if conv and conv != chosen.id:
            await _leave(client, conv)
    return msgspec.structs.replace(chosen, role="member")


async def _leave(client: Client, conv: str) -> None:
    """Leave a namesake. Its owner cannot while others are in it, who only came to look."""
    for wait_s in LEAVE_WAITS_S:
        try:
            await client.leave(conv)
        except Forbidden:
            await asyncio.sleep(wait_s)
        else:
            return
    # Then we stay in it, which does no harm.


async def dm(client: Client, name: str) -> str:
    """The id of the direct conversation with the user of this name."""
    user = await accounts.find_user(client.address, client.token, name)
    if user is None:
        raise NotFound(f"there is no user {name!r}")
    conv = await client.open("dm", members=[user.id])
    await client.view(conv)
    return conv
