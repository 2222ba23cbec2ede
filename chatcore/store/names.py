"""Names of users: which are allowed, and when two are the same."""

from __future__ import annotations

import unicodedata
from typing import Final

from ..errors import BadRequest

# Letters and marks that show nothing: those that Unicode calls default-ignorable (combining grapheme joiner, Hangul
# fillers, Khmer inherent vowels, Mongolian and other variation selectors), and the Braille blank.
_BLANK: Final = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
    + "".join(map(chr, [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]))
)


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
