"""Texts that people read: which may be a title, and how they are cut."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from chatcore.common.text import cut, is_line, is_visible

TITLES = [
    "Lunch",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 Familie",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian: a non-joiner within a word
    "\u0dc1\u0dca\u200d\u0dbb\u0dd3",  # Sinhala: a joiner within a syllable
    "\U0001f1ee\U0001f1f7",
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f Edinburgh",
    "\u2764\ufe0f",
    "\u5bb6\u65cf\u3000\u65c5\u884c",  # an ideographic space
    "10\u00a0km",
    "\u05e9\u05dc\u05d5\u05dd\u200f!",  # a mark, which ends where it stands
    "\U0001fae9",  # assigned in Unicode 16
    "e\u0301",
]
NO_LINES = [
    "a\nb",
    "a\x00",
    "\x1b[31m",
    "a\x7f",
    "a\x85b",
    "a\u2028b",
    "a\u2029b",
    "\ud83d",
    "\ufffe",
    "\ufdd0",
    "\ue000",
]
UNSEEN = [
    "",
    " ",
    "\u200b",
    "\u200d\u200c",
    "\u2060",
    "\ufeff",
    "\ufe0f",
    "\u3164",
    "\u2800",
    "\u00ad \u00ad",
    "\U000e0067",
]


@pytest.mark.parametrize("text", TITLES, ids=ascii)
def test_words_and_emoji_of_any_language(text: str) -> None:
    assert is_line(text)
    assert is_visible(text)


@pytest.mark.parametrize("text", NO_LINES, ids=ascii)
def test_controls_and_separators(text: str) -> None:
    assert not is_line(text)


@pytest.mark.parametrize(
    "text", [f"a{char}b" for char in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"], ids=ascii
)
def test_what_turns_its_surroundings_around(text: str) -> None:
    assert not is_line(text)


@pytest.mark.parametrize("text", UNSEEN, ids=ascii)
def test_what_cannot_be_seen(text: str) -> None:
    assert is_line(text)
    assert not is_visible(text)
    assert is_visible(text + "x")


def test_every_letter_digit_and_symbol_is_allowed() -> None:
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code))[0] in "LNPSM":
            assert is_line(chr(code)), hex(code)


def test_a_text_is_cut_between_two_characters() -> None:
    assert cut("abc", 3) == b"abc"
    assert cut("abcd", 3) == b"abc"
    assert cut("aé€😀", 10) == "aé€😀".encode()
    for most in range(10):
        assert "aé€😀".encode().startswith(cut("aé€😀", most))
        assert len(cut("aé€😀", most).decode()) == (0, 1, 1, 2, 2, 2, 3, 3, 3, 3)[most]
    assert cut("\ud800", 9) == b"?"
