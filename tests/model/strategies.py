"""What hypothesis chooses: scripts, climates, and how much of it all.

Every run is the same (``derandomize``). ``MODEL_EXPLORE=20`` looks at other examples
instead, and at twenty times as many.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from .append_world import Action, ByRow, Crash, Failover, Member, SameMember, Send, Wait
from .weather import Climate

EXPLORE = int(os.environ.get("MODEL_EXPLORE", "0"))


def bounded(examples: int, shrink: bool = True) -> settings:
    """So many examples, the same ones in every run."""
    return settings(
        max_examples=examples * max(EXPLORE, 1),
        derandomize=not EXPLORE,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])],
        print_blob=False,
    )


seeds = st.integers(0, 2**32 - 1)
_writer = st.integers(0, 2)
_conv = st.sampled_from((0, 0, 0, 1))
_user = st.integers(0, 2)

_send = st.builds(Send, _writer, _conv, _user, n=st.sampled_from((1, 1, 2, 4, 9)))
_again = st.builds(Send, _writer, _conv, _user, again=st.integers(1, 3), same=st.booleans())
_member = st.builds(
    Member, _writer, _conv, st.integers(1, 2), st.sampled_from(("none", "none", "banned", "member", "member"))
)
_same_member = st.builds(
    SameMember,
    _conv,
    st.integers(1, 2),
    st.lists(st.sampled_from(("none", "banned", "member")), min_size=2, max_size=3).map(tuple),
)
_by_row = st.builds(ByRow, _conv, st.integers(1, 2), st.booleans())
_failover = st.builds(
    Failover, st.sampled_from((0.0, 0.5, 1.0)), st.sampled_from((0.0, 0.5, 3.0)), st.sampled_from((0.01, 0.3, 2.0))
)
_wait = st.builds(Wait, st.sampled_from((0.0, 0.0005, 0.001, 0.002, 0.005, 0.02, 0.1, 0.6, 2.5)))

single: st.SearchStrategy[Action] = st.one_of(
    *[_send] * 6, *[_again] * 5, *[_member] * 4, *[_same_member] * 2, *[_wait] * 6, *[_by_row] * 2, _failover,
    st.builds(Crash, _writer),
)  # fmt: skip


@st.composite
def removed(draw: st.DrawFn) -> list[Action]:
    """A user writes while being removed (or put out by a row), perhaps repeats it, perhaps in a failover."""
    conv, user = draw(_conv), draw(st.integers(1, 2))
    send = Send(draw(_writer), conv, user, n=draw(st.sampled_from((1, 2, 4))))
    again = Send(draw(_writer), conv, user, again=draw(st.integers(1, 2)))
    outs: list[Action] = [Member(draw(_writer), conv, user, "none"), ByRow(conv, user, True)]
    out = draw(st.sampled_from(outs))
    steps: list[Action] = draw(st.sampled_from(([send, out, again], [out, send, again], [send, again, out])))
    if draw(st.booleans()):
        steps.insert(draw(st.integers(0, 2)), draw(_failover))
    return [a for step in steps for a in (step, draw(_wait))]


@st.composite
def repeat(draw: st.DrawFn) -> list[Action]:
    """One cid again and again, from any worker, now and then for something else."""
    conv, user = draw(_conv), draw(_user)
    steps: list[Action] = [Send(draw(_writer), conv, user)]
    for _ in range(draw(st.integers(1, 4))):
        steps += [draw(_wait), Send(draw(_writer), conv, user, again=1, same=draw(st.booleans()))]
    return steps


@st.composite
def deposed(draw: st.DrawFn) -> list[Action]:
    """A primary that was deposed and has not noticed is still asked, while a user is removed."""
    conv, user = draw(_conv), draw(st.integers(1, 2))
    steps: list[Action] = [
        Failover(draw(st.sampled_from((0.0, 1.0))), 3.0, 0.01),
        Send(draw(_writer), conv, user, n=draw(st.sampled_from((1, 2)))),
        Member(draw(_writer), conv, user, "none"),
        Send(draw(_writer), conv, user, again=1),
        Send(draw(_writer), conv, user),
        Send(draw(_writer), conv, user, again=draw(st.integers(1, 2))),
    ]
    pauses = [Wait(draw(st.sampled_from((0.01, 0.05, 0.2)))) for _ in steps]
    return [action for pair in zip(steps, pauses, strict=True) for action in pair]


scripts: st.SearchStrategy[list[Action]] = st.lists(
    st.one_of(st.lists(single, min_size=1, max_size=8), repeat(), removed(), removed(), deposed()),
    min_size=1,
    max_size=6,
).map(lambda groups: [action for group in groups for action in group])


def _several(one: st.SearchStrategy[list[Action]]) -> st.SearchStrategy[list[Action]]:
    return st.lists(one, min_size=1, max_size=4).map(lambda groups: [action for group in groups for action in group])


while_deposed = _several(deposed())
put_out = _several(
    st.builds(
        lambda writer, conv, user, pause: [Send(writer, conv, user), Wait(pause), ByRow(conv, user, True), Wait(2.5)],
        _writer,
        _conv,
        st.integers(1, 2),
        st.sampled_from((0.005, 0.1)),
    )
)
same_member = _several(
    st.builds(
        lambda one, pause, other: [one, Wait(pause), other, Wait(0.6)],
        _same_member,
        st.sampled_from((0.0, 0.001, 0.005)),
        _same_member,
    )
)

_often = st.sampled_from((0.0, 0.0, 0.05, 0.3))
climates = st.builds(
    Climate,
    lost_request=_often,
    lost_reply=_often,
    late=_often,
    cut=_often,
    slow_documents=_often,
    lagging_majority=_often,
    failed_read=st.sampled_from((0.0, 0.0, 0.0, 0.1)),
    stale_read=st.sampled_from((0.0, 0.5)),
    bus_lost=st.sampled_from((0.0, 0.5)),
)
