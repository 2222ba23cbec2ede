"""Fan-out: one frame by reference to every member of a topic, without touching Python."""

from typing import Any

from .conns import Core
from .frames import Frame

class Topic:
    """A set of connections to fan out to.

    Members are C pointers with back references: add and discard are O(1) but for the question
    whether it is a member already, which looks through the shorter of both sides (the topic's
    members or the connection's topics). A connection that ends (in whatever way) leaves all its
    topics by itself, so members are open WebSockets. Holds ``key`` (any object: the conversation)
    for `topics_of`.
    """

    key: Any
    def __init__(self, reactor: Core, key: Any) -> None: ...
    def __len__(self) -> int: ...
    def add(self, conn: int) -> bool: ...  # False: already in, or conn is gone or closing
    def discard(self, conn: int) -> bool: ...
    def __contains__(self, conn: int) -> bool: ...
    def fan_out(self, frame: Frame, skip_owner: int = 0) -> int:
        """Queue the frame on every member, except those whose owner is `skip_owner` (0: on all);
        returns how many. Calls no handler: a member that is too slow by then is closed with 4002,
        and `on_closed` comes from the next flush. The frames of several calls in one turn of the loop
        are joined; they keep their place before frames queued later and after those queued before."""
    def sessions(self) -> list[Any]: ...  # for rare administrative walks, not for delivery
