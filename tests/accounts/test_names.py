"""Names of users: which are refused."""

from __future__ import annotations

import pytest

from chatcore.errors import BadRequest
from chatcore.store.names import check_name


@pytest.mark.parametrize(
    "blank", ["\u034f", "\u115f", "\u17b4", "\u180b", "\u2800", "\u3164", "\ufe0f", "\uffa0", "\U000e0100"]
)
@pytest.mark.parametrize("name", ["{}{}{}", "alice{}"])
def test_letters_that_show_nothing_make_no_name(name: str, blank: str) -> None:
    """They are letters and marks to Unicode, but three of them are an empty line in a list of users, and one of them
    in a name makes it look like another's.
    """
    with pytest.raises(BadRequest):
        check_name(name.replace("{}", blank), 32)


@pytest.mark.parametrize("name", ["alice", "Å", "李雷", "한글", "ﾊﾅ", "o'neil", "⠓⠊"])
def test_what_can_be_seen_is_a_name(name: str) -> None:
    assert check_name(name, 32)
