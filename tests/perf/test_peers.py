"""Each server to compare with says what its adapter promises; those that are not installed are skipped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from perf.peers import centrifuge, native, node, node_app, python
from perf.peers.base import BODY, Peer, World
from perf.peers.installed import HERE
from tests.services.redis import free_port

from .client import PATIENCE_S, Client

PEERS = [peer for module in (python, native, node, centrifuge, node_app) for peer in module.PEERS]
ROOM = 1
BODY_TEXT = "b" * 40 + " 0123456789 ~!#$%&'()*+,-./:;<=>?[]^_`{|}"


@contextmanager
def serving(peer: Peer, data: Path, world: World) -> Iterator[int]:
    """The peer's server, listening on the port that is yielded."""
    port = free_port()
    with peer.services(data) as services:
        peer.prepare(data, world)
        env = {**os.environ, **peer.env(1), **services.env}
        with (data / "log").open("wb") as log:
            process = subprocess.Popen(peer.command(port, 1, data), env=env, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not _listens(port):
                assert process.poll() is None, f"{peer.name} ended: {(data / 'log').read_text()}"
                assert time.monotonic() < deadline, f"{peer.name} does not listen: {(data / 'log').read_text()}"
                time.sleep(0.02)
            yield port
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_S)
        finally:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_all_members_get_what_one_says(peer: Peer, tmp_path: Path) -> None:
    if (reason := peer.missing()) is not None:
        pytest.skip(f"{peer.name}: {reason}")
    assert all(peer.versions().values())
    world = World(rooms=[[2], [0, 1]], users=3)
    with (
        serving(peer, tmp_path, world) as port,
        Client(peer, port, 0, [ROOM]) as one,
        Client(peer, port, 1, [ROOM]) as two,
        Client(peer, port, 2, [0]) as stranger,
    ):
        for count in range(3):
            body = f"{count} {BODY_TEXT}"
            number = one.send(ROOM, body)
            ack = () if peer.ack is None else (f"{peer.ack}{number}",)
            lines = [*one.lines_until(body, *ack), *two.lines_until(body)]
            assert "".join(lines).count(body) == 2, f"each gets it once: {lines}"
            if peer.error is not None:
                assert not [line for line in lines if peer.error in line and body not in line]
        stranger.send(0, f"last {BODY_TEXT}")
        assert not [
            line for line in stranger.lines_until(f"last {BODY_TEXT}") if BODY_TEXT in line and "last" not in line
        ]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_it_is_described(peer: Peer) -> None:
    assert re.fullmatch(r"[a-z0-9-]+", peer.name)
    assert peer.about
    assert BODY in peer.send(0, ROOM)
    assert peer.benches


def test_what_is_locked_names_no_registry() -> None:
    assert '"resolved"' not in (HERE / "package-lock.json").read_text()
