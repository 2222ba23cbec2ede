"""Scripts for delivery: attaching and removal at every point, in every weather of the bus."""

from __future__ import annotations

from hypothesis import strategies as st

from .deliver_world import (
    DEVICES,
    WORKERS,
    Action,
    Attach,
    BusCut,
    Connect,
    Drop,
    Open,
    Ping,
    Post,
    Role,
    Slow,
    StoreDown,
    Wait,
)
from .weather import Climate

_device = st.integers(0, len(DEVICES) - 1)
_worker = st.integers(0, WORKERS - 1)
_conv = st.sampled_from((0, 0, 0, 1))
_only = st.sampled_from((None, None, None, (), (0,), (0, 1)))
_wait = st.builds(Wait, st.sampled_from((0.0, 0.0005, 0.001, 0.002, 0.005, 0.02, 0.1, 0.6, 2.5)))
_post = st.builds(Post, _worker, _conv, st.integers(0, 2), n=st.sampled_from((1, 1, 1, 2, 6, 20)))
_connect = st.builds(Connect, _device, _worker, _only)

_single: st.SearchStrategy[Action] = st.one_of(
    *[_post] * 8,
    *[_connect] * 6,
    *[_wait] * 8,
    *[st.builds(Role, _worker, _conv, st.integers(1, 2), st.sampled_from(("none", "none", "member", "banned")))] * 4,
    *[st.builds(Attach, _device, _only, st.booleans())] * 2,
    *[st.builds(Ping, _device)] * 2,
    st.builds(Drop, _device),
    st.builds(Slow, _device, st.sampled_from((0.1, 1.0, 40.0))),
    st.builds(Open, _device),
    st.builds(BusCut, st.sampled_from((0.1, 1.0)), st.booleans()),
    st.builds(StoreDown, _worker, st.sampled_from((0.01, 0.3, 1.5))),
)


@st.composite
def removed_while_attaching(draw: st.DrawFn) -> list[Action]:
    """Out, and perhaps in again, at every point of an attach, in the middle of messages."""
    conv, worker = draw(_conv), draw(_worker)
    device = draw(st.integers(1, 3))
    user = 1 if device < 3 else 2
    steps: list[Action] = [
        Connect(device, worker, None),
        Role(draw(_worker), conv, user, "none"),
        Post(draw(_worker), conv, 0, n=draw(st.sampled_from((1, 6)))),
    ]
    if draw(st.booleans()):
        steps.insert(draw(st.integers(2, 3)), Role(draw(_worker), conv, user, "member"))
    return [a for step in steps for a in (step, draw(_wait))]


@st.composite
def away_and_back(draw: st.DrawFn) -> list[Action]:
    """A device comes back after it missed something, perhaps more than the backlog, perhaps with a `sync` of a ping."""
    device = draw(_device)
    steps: list[Action] = [Connect(device, draw(_worker)), draw(_post)]
    if draw(st.booleans()):
        steps.append(Ping(device))
    lie = draw(st.sampled_from((0, 0, 0, 1000)))
    steps += [Drop(device), draw(_post), draw(_single), Connect(device, draw(_worker), lie=lie)]
    return [a for step in steps for a in (step, draw(_wait))]


@st.composite
def removed_while_replaying(draw: st.DrawFn) -> list[Action]:
    """Removed in the middle of a replay, which is slow because the device reads slowly."""
    conv, device = draw(_conv), draw(st.integers(1, 3))
    return [
        Connect(device, draw(_worker)),
        Wait(0.1),
        Drop(device),
        Post(draw(_worker), conv, 0, n=draw(st.integers(5, 11))),
        Wait(0.1),
        Connect(device, draw(_worker)),
        Slow(device, draw(st.sampled_from((0.0, 0.1, 1.0)))),
        draw(_wait),
        draw(_wait),
        Role(draw(_worker), conv, 1 if device < 3 else 2, draw(st.sampled_from(("none", "member")))),
        draw(_post),
        draw(_wait),
        draw(_post),
    ]


@st.composite
def pinged_before_told(draw: st.DrawFn) -> list[Action]:
    """A `sync` from a ping that comes between a change and the moment at which it is told."""
    conv, device = draw(_conv), draw(st.integers(1, 3))
    role = Role(draw(_worker), conv, 1 if device < 3 else 2, draw(st.sampled_from(("none", "banned"))))
    back = Role(draw(_worker), conv, role.user, "member")
    change: list[Action] = draw(st.sampled_from(([role], [role, Wait(2.5), back])))
    return [
        Connect(device, draw(_worker)),
        Wait(0.1),
        *change[:-1],
        BusCut(1.0, draw(st.booleans())),
        change[-1],
        draw(_wait),
        Ping(device),
        draw(_wait),
        Drop(device),
        draw(_wait),
        Connect(device, draw(_worker)),
    ]


def _several(*groups: st.SearchStrategy[list[Action]]) -> st.SearchStrategy[list[Action]]:
    return st.lists(st.one_of(*groups), min_size=1, max_size=4).map(lambda found: [a for group in found for a in group])


scripts = _several(
    st.lists(_single, min_size=1, max_size=8),
    removed_while_attaching(),
    away_and_back(),
    removed_while_replaying(),
    pinged_before_told(),
)
while_attaching = _several(removed_while_attaching())
while_replaying = _several(removed_while_replaying())
while_untold = _several(pinged_before_told())
while_away = _several(away_and_back())

_often = st.sampled_from((0.0, 0.0, 0.1, 0.5))
climates = st.builds(
    Climate,
    failed_read=st.sampled_from((0.0, 0.0, 0.05)),
    stale_read=st.sampled_from((0.0, 0.0, 0.3)),
    bus_lost=st.sampled_from((0.0, 0.0, 0.1, 0.5, 1.0)),
    bus_repeated=_often,
    bus_late=_often,
)
