"""How things look as text."""

from __future__ import annotations

import time
import unicodedata
from typing import Final

from ..events import Conversation, MemberChanged, Message, MetaChanged

#: Joins emoji into one; the only invisible character that is let through.
_ZWJ: Final = "\u200d"


def clean(text: str) -> str:
    """What others wrote, safe to print: without control characters, which could command
    the terminal, and without those that hide or reorder text. Line breaks are kept."""
    return "".join(
        char if char in (_ZWJ, "\n") or unicodedata.category(char)[0] != "C" else " " if char == "\t" else "\ufffd"
        for char in text.replace("\r\n", "\n")
    )


def one_line(text: str) -> str:
    """The same on one line."""
    return clean(text).replace("\n", " ")


def title_of(view: Conversation | None) -> str:
    """What a conversation is called: ``#channel``, ``@user``, or a group's title."""
    if view is None:
        return "(gone)"
    if view.kind == "channel":
        return "#" + one_line(view.title)
    if view.kind == "dm":
        return "@" + one_line(view.peer.name if view.peer else view.id)
    return one_line(view.title) or view.id


def clock(ts: int) -> str:
    """Hours and minutes of a Unix time in ms, here; with the date if it is not today."""
    then = time.localtime(ts / 1000)
    same_day = then[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if same_day else "%Y-%m-%d %H:%M", then)


def body_of(message: Message) -> str:
    """What a message says; later lines are indented."""
    if message.body is None:
        return "(deleted)"
    return clean(message.body).replace("\n", "\n    ") or "(data)"


def member_line(entry: MemberChanged, sender: str, user: str) -> str:
    """What happened to a member."""
    if entry.role == "none":
        return f"{user} left" if entry.sender == entry.user else f"{sender} removed {user}"
    if entry.role == "banned":
        return f"{sender} banned {user}"
    if entry.role == "member":
        return f"{user} joined" if entry.sender == entry.user else f"{sender} added {user}"
    return f"{user} is now {entry.role}"


def meta_line(entry: MetaChanged, sender: str) -> str:
    """What happened to the title."""
    return f"{sender} set the title: {one_line(entry.title)}"


def listing(names: list[str], most: int = 8) -> str:
    """Some names on one line."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
