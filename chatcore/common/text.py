"""Texts that people read: cutting them, and which may stand on one line."""

from __future__ import annotations

import unicodedata
from typing import Final

# Embeddings, overrides and isolates (UAX #9): they turn what stands after them around, outside of the text, too.
_BIDI_CONTROLS: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
#: General categories: controls, surrogates, private use, line and paragraph separators.
_REFUSED: Final = frozenset({"Cc", "Cs", "Co", "Zl", "Zp"})
# Categories of which no character can be seen by itself: format characters (joiners, tags), marks, spaces.
_INVISIBLE: Final = frozenset({"Cf", "Mn", "Me", "Zs"})
# Letters and a symbol whose glyph is empty: Hangul fillers, the blank of braille.
_BLANK: Final = frozenset("\u115f\u1160\u3164\uffa0\u2800")


def cut(text: str, most: int) -> bytes:
    """The text in UTF-8, cut to at most so many bytes between two characters."""
    data = text.encode("utf-8", "replace")
    return data if len(data) <= most else data[:most].decode("utf-8", "ignore").encode()


def is_line(text: str) -> bool:
    """Whether the text is one line without anything that acts on its surroundings.

    Joiners and other format characters are part of words and emoji and are allowed. So are characters that this
    Python's Unicode does not know yet, which the next emoji are.
    """
    return not any(
        char in _BIDI_CONTROLS or unicodedata.category(char) in _REFUSED or _is_noncharacter(char) for char in text
    )


def is_visible(text: str) -> bool:
    """Whether there is anything to be seen in the text."""
    return any(unicodedata.category(char) not in _INVISIBLE and char not in _BLANK for char in text)


def _is_noncharacter(char: str) -> bool:
    # Unicode, 23.7: for internal use, never to be exchanged.
    return ord(char) & 0xFFFE == 0xFFFE or "\ufdd0" <= char <= "\ufdef"
