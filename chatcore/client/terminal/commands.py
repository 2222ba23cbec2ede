"""The commands: lines that begin with a slash."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from ...errors import BadRequest
from ..accounts import find_user
from ..errors import ChatError, NotFound
from .chat import TerminalChat
from .login import HISTORY, HISTORY_MAX, is_target
from .screen import clean, one_line, title_of

HELP: Final = """\
/help                  this
/who                   who is in this conversation
/history [N]           the last N messages
/join #NAME            a channel (made if there is none); also @USER, or an id
/dm USER               talk to one user
/group TITLE [USER…]   make a group (one word for the title)
/invite USER           invite a user into this group
/remove USER           remove a user from it
/title TEXT            set the title
/leave                 leave this conversation
/list                  your conversations
/channels [PREFIX]     the public channels
/quit                  the end; Ctrl-D does it too
//text                 says /text"""

#: Channels on one list.
_CHANNELS: Final = 50


class Quit(Exception):
    """The user ends the chat."""


async def run_line(chat: TerminalChat, line: str) -> None:
    """Send a typed line, or run the command in it. Raises Quit."""
    text = line.rstrip()
    if not text.strip():
        return
    if not text.startswith("/") or text.startswith("//"):
        chat.say(text[1:] if text.startswith("//") else text)
        return
    name, _, rest = text[1:].partition(" ")
    command = _COMMANDS.get(name.casefold())
    if command is None:
        chat.screen.notice(f"no such command: /{one_line(name)} (see /help; //text says /text)")
        return
    try:
        await command(chat, rest.strip())
    except ChatError as error:
        chat.screen.notice(one_line(error.message))
    except TimeoutError:
        chat.screen.notice(f"/{name}: no answer from the server; try again later")


async def _help(chat: TerminalChat, _: str) -> None:
    for line in HELP.splitlines():
        chat.screen.notice(line)


async def _who(chat: TerminalChat, _: str) -> None:
    await chat.members.load(_here(chat))
    for line in chat.members.who():
        chat.screen.notice(line)


async def _history(chat: TerminalChat, rest: str) -> None:
    _here(chat)
    if rest and not (rest.isascii() and rest.isdigit() and 1 <= int(rest) <= HISTORY_MAX):
        raise BadRequest(f"/history N: 1 to {HISTORY_MAX}")
    await chat.show_history(int(rest or HISTORY))


async def _join(chat: TerminalChat, rest: str) -> None:
    if not is_target(rest):
        raise BadRequest("/join #channel, @user or an id")
    await chat.enter(rest)


async def _dm(chat: TerminalChat, rest: str) -> None:
    if not rest:
        raise BadRequest("/dm USER")
    await chat.enter("@" + rest.removeprefix("@"))


async def _group(chat: TerminalChat, rest: str) -> None:
    title, *names = rest.split() or [""]
    if not title:
        raise BadRequest("/group TITLE [USER…]")
    members = [await _user(chat, name) for name in names]
    await chat.enter(await chat.client.open("group", title=title, members=members))


async def _invite(chat: TerminalChat, rest: str) -> None:
    await chat.client.invite(_here(chat), await _user(chat, rest))


async def _remove(chat: TerminalChat, rest: str) -> None:
    await chat.client.remove(_here(chat), await _user(chat, rest))


async def _title(chat: TerminalChat, rest: str) -> None:
    if not rest:
        raise BadRequest("/title TEXT")
    await chat.client.set_title(_here(chat), rest)


async def _leave(chat: TerminalChat, _: str) -> None:
    await chat.client.leave(_here(chat))


async def _list(chat: TerminalChat, _: str) -> None:
    views = sorted(chat.client.conversations.values(), key=lambda view: title_of(view).casefold())
    for view in views:
        news = f", {view.unread} unread" if view.unread and view.id != chat.conv else ""
        chat.screen.notice(f"{title_of(view)} ({view.id}{news})")


async def _channels(chat: TerminalChat, rest: str) -> None:
    page = await chat.client.channels(rest.removeprefix("#") or None, limit=_CHANNELS)
    for channel in page.conversations:
        count = f"{channel.members} member{'s' if channel.members != 1 else ''}"
        chat.screen.notice(f"#{one_line(channel.title)} ({count})")
    if page.next is not None:
        chat.screen.notice("… and more: /channels PREFIX")


async def _quit(chat: TerminalChat, _: str) -> None:
    raise Quit


def _here(chat: TerminalChat) -> str:
    if not chat.conv:
        raise NotFound("you are nowhere: /join #channel first")
    return chat.conv


async def _user(chat: TerminalChat, name: str) -> str:
    """The id of a user by name. Raises NotFound."""
    name = name.removeprefix("@")
    user = await find_user(chat.client.address, chat.client.token, name) if name else None
    if user is None:
        raise NotFound(f"there is no user {clean(name)!r}")
    return user.id


_COMMANDS: Final[dict[str, Callable[[TerminalChat, str], Awaitable[None]]]] = {
    "help": _help,
    "who": _who,
    "history": _history,
    "join": _join,
    "dm": _dm,
    "group": _group,
    "invite": _invite,
    "remove": _remove,
    "title": _title,
    "leave": _leave,
    "list": _list,
    "channels": _channels,
    "quit": _quit,
    "exit": _quit,
}
