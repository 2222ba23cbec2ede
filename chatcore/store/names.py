"""Names of users: what is allowed, and when two are the same."""

from __future__ import annotations

import unicodedata
from typing import Final

from ..errors import BadRequest

# Letters and marks that show nothing (Hangul fillers, Braille blank, combining grapheme joiner).
_BLANK: Final = frozenset("\u034f\u115f\u1160\u2800\u3164\uffa0")


def name_key(name: str) -> str:
    """What makes two names the same: case and compatibility forms do not tell them apart."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def check_name(name: str, max_chars: int) -> str:
    """A usable name, normalised to NFC.

    :raises BadRequest: empty, too long, or with spaces, control or invisible characters.
    """
    name = unicodedata.normalize("NFC", name)
    if not 1 <= len(name) <= max_chars:
        raise BadRequest(f"name: 1 to {max_chars} characters")
    # Categories: Z separators, C control, format, surrogate, private use, unassigned.
    if any(unicodedata.category(ch)[0] in "ZC" or ch in _BLANK for ch in name):
        raise BadRequest("name: no spaces, control or invisible characters")
    if name[0] in "@#":
        raise BadRequest("name: must not begin with @ or #")
    return name
