"""The client's view of a conversation follows its entries."""

from __future__ import annotations

import pytest

from chatcore.client.events import Conversation, MemberChanged
from chatcore.client.replica import with_entry


@pytest.mark.parametrize(
    ("was", "role", "members"),
    [
        ("none", "member", 6),
        ("banned", "member", 6),
        ("member", "none", 4),
        ("admin", "banned", 4),
        ("admin", "member", 5),  # a dismissed admin looked like a new member
        ("member", "owner", 5),
        ("none", "banned", 5),
        ("", "member", 5),  # an entry of an older version does not say
    ],
)
def test_members_are_counted_by_the_role_before(was: str, role: str, members: int) -> None:
    view = Conversation(id="c", members=5, head=7)
    entry = MemberChanged(conv="c", seq=8, sender="a", ts=1, user="b", role=role, was=was)
    assert with_entry(view, entry, "me").members == members
    assert with_entry(view, entry, "me").role == view.role
    known = MemberChanged(conv="c", seq=7, sender="a", ts=1, user="me", role="none", was="member")
    assert with_entry(view, known, "me") == view
