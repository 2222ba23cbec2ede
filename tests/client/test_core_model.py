"""The core against a model server, with everything going wrong at every point.

Promised: the application gets every entry once and in order, without a hole,
whatever happens to connections and to the process; what it sent is in the log
once and in order; and it is in exactly the conversations in which the server says
that it is, however often it was removed and invited again.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from chatcore.client.events import Entry

from .model import App, ModelServer

CONVS = ("c1", "c2", "c3")


class Faults(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.server = ModelServer()
        self.server.create("c1")
        self.server.create("c2")
        self.app = App(self.server)
        self.others = 0

    @rule(conv=st.sampled_from(CONVS), n=st.integers(1, 12), told=st.booleans())
    def others_say(self, conv: str, n: int, told: bool) -> None:
        if conv not in self.server.logs:
            self.server.create(conv)
        for _ in range(n):
            self.others += 1
            self.server.append(conv, "u2", f"o{self.others}", told=told)

    @rule(conv=st.sampled_from(CONVS[:2]))
    def say(self, conv: str) -> None:
        self.app.send(conv)

    @precondition(lambda self: self.app.core.connect_at is not None)
    @rule()
    def connect(self) -> None:
        self.app.connect()

    @precondition(lambda self: self.server.from_client)
    @rule(n=st.integers(1, 5))
    def serve(self, n: int) -> None:
        for _ in range(min(n, len(self.server.from_client))):
            self.server.serve()

    @precondition(lambda self: self.server.to_client)
    @rule(n=st.integers(1, 8))
    def receive(self, n: int) -> None:
        for _ in range(min(n, len(self.server.to_client))):
            self.app.receive()

    @precondition(lambda self: self.app.inbox)
    @rule(n=st.integers(1, 10))
    def consume(self, n: int) -> None:
        for _ in range(min(n, len(self.app.inbox))):
            self.app.consume()

    @precondition(lambda self: self.app.core.connect_at is None)
    @rule(code=st.sampled_from([1006, 1012, 1009, 4002, 4000]))
    def lose(self, code: int) -> None:
        # Closed over a message: only if that cannot be a `send`, which would rightly be refused.
        self.app.lose(1006 if code == 1009 and self.app.core.unacknowledged_count else code)

    @rule(room=st.booleans())
    def set_room(self, room: bool) -> None:
        self.app.core.set_accepting(room, self.app.now)
        self.app.collect()

    @rule(seconds=st.sampled_from([0.1, 1.0, 20.0, 70.0]))
    def pass_time(self, seconds: float) -> None:
        self.app.pass_time(seconds)

    @rule()
    def restart(self) -> None:
        self.app.restart()

    @precondition(lambda self: "c3" in self.server.logs)
    @rule(conv_push=st.booleans())
    def removed_or_invited(self, conv_push: bool) -> None:
        if "c3" in self.server.out:
            self.server.invite("c3")
        else:
            self.server.remove("c3", conv_push=conv_push)

    @precondition(lambda self: "c3" in self.server.logs and "c3" not in self.server.out)
    @rule()
    def removed_and_invited_at_once(self) -> None:
        self.server.remove_and_invite("c3")

    @precondition(lambda self: self.server.attached)
    @rule(conv=st.sampled_from(CONVS), back=st.integers(0, 5))
    def view_of_before(self, conv: str, back: int) -> None:
        if conv in self.server.logs:
            self.server.say_view_of_before(conv, back)

    @rule(n=st.integers(1, 3))
    def store_is_down(self, n: int) -> None:
        self.server.refuse = n

    @precondition(lambda self: self.server.attached)
    @rule(conv=st.sampled_from(CONVS), back=st.integers(1, 5))
    def push_again(self, conv: str, back: int) -> None:
        if conv not in self.server.out and (log := self.server.logs.get(conv)):
            self.server.to_client.append(log[-min(back, len(log))])

    def teardown(self) -> None:
        self.app.connect()
        self.app.finish()
        for conv in self.server.logs:  # a later entry brings to light what was not told
            self.server.append(conv, "u2", f"last-{conv}")
        self.app.finish()
        assert set(self.app.core.replica.views) == set(self.server.logs) - self.server.out
        for conv, log in self.server.logs.items():
            if conv in self.server.out:
                assert conv not in self.app.got
                continue
            start = self.app.start.get(conv, 1)
            assert self.app.got.get(conv, []) == list(range(start, len(log) + 1))
            mine = [row["cid"] for row in log if row["t"] == "msg" and row["from"] == "u1"]
            assert mine == self.app.sent.get(conv, [])
            view = self.app.core.replica.views[conv]
            assert (view.head, view.role) == (len(log), "member")


Faults.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestFaults = Faults.TestCase


def test_a_new_conversation_begins_where_the_server_says() -> None:
    server = ModelServer()
    server.create("c1")
    for n in range(7):
        server.append("c1", "u2", f"o{n}")
    app = App(server)
    app.connect()
    app.finish()
    server.append("c1", "u2", "live")
    app.finish()
    assert app.got == {"c1": [8]}


def test_a_long_absence_is_paged_while_live_entries_are_held_back() -> None:
    server = ModelServer(backlog=5, page=3)
    server.create("c1")
    app = App(server)
    app.connect()
    app.finish()
    app.lose()
    for n in range(20):
        server.append("c1", "u2", f"o{n}")
    app.connect()
    server.serve()  # auth: too far behind for a replay
    while server.to_client:
        app.receive()
    server.append("c1", "u2", "live")
    app.receive()
    assert not any(isinstance(event, Entry) for event, _ in app.inbox)
    app.finish()
    assert app.got == {"c1": list(range(1, 22))}
