"""A client that follows a peer's script, on the websockets library: nothing of the load generator is in it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from websockets.sync.client import connect
from websockets.typing import Subprotocol

from perf.peers.base import BODY, CAPTURED, CID, REQUEST_ID, Peer, Step, Wait
from perf.peers.base import Send as SendStep

PATIENCE_S = 30.0


class Client:
    """One user of a server on 127.0.0.1:port, and a member of these rooms when it is made."""

    def __init__(self, peer: Peer, port: int, user: int, rooms: Sequence[int]) -> None:
        self._peer = peer
        self._user = user
        self._sent = 0
        self._captured = ""
        self._stack = ExitStack()
        self._connection = self._stack.enter_context(
            connect(
                f"ws://127.0.0.1:{port}{peer.path}",
                additional_headers=peer.headers,
                subprotocols=[Subprotocol(peer.subprotocol)] if peer.subprotocol else None,
                compression=None,
                open_timeout=PATIENCE_S,
            )
        )
        for step in peer.join(user, rooms):
            self._follow(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def send(self, room: int, body: str) -> int:
        """Say it, and return the number of the request."""
        self._sent += 1
        number = 1000 + self._sent
        cid = f"{self._user:012x}{self._sent:012x}"
        text = self._peer.send(self._user, room)
        self._connection.send(text.replace(REQUEST_ID, str(number)).replace(CID, cid).replace(BODY, body))
        return number

    def lines_until(self, *wanted: str) -> list[str]:
        """All lines from now until each of these texts was in one of them."""
        lines: list[str] = []
        left = list(wanted)
        deadline = time.monotonic() + PATIENCE_S
        while left:
            for line in self._frame(deadline).split("\n"):
                lines.append(line)
                left = [text for text in left if text not in line]
        return lines

    def _frame(self, deadline: float) -> str:
        frame = self._connection.recv(deadline - time.monotonic())
        assert isinstance(frame, str)
        if frame == self._peer.ping:
            self._connection.send(self._peer.pong)
        return frame

    def _follow(self, step: Step) -> None:
        if isinstance(step, SendStep):
            self._connection.send(step.text.replace(CAPTURED, self._captured))
            return
        assert isinstance(step, Wait)
        count = 0
        deadline = time.monotonic() + PATIENCE_S
        while count < step.count:
            frame = self._frame(deadline)
            if step.text in frame:
                count += 1
                if step.capture:
                    self._captured = frame.partition(step.capture)[2].partition('"')[0]
