"""Real Redis servers for tests: one alone, a cluster of three, a pair with a sentinel.

Each listens on a free port of the loopback, keeps its data in a folder of the test, and is
ended by its pid. ``CHATCORE_TEST_REDIS_URL`` names a running one that tests which need no power
over the server use instead (:func:`redis_url`); nothing but keys and channels below a random
prefix may be touched there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

#: Nothing here takes a second on an idle machine; a busy one gets its time.
PATIENCE_S = 30.0
#: Between looks at something that cannot be waited for.
LOOK_S = 0.01


def wait_for(holds: Callable[[], Any], what: str) -> Any:
    """Look until something is true, and return it.

    :raises AssertionError: it never was; ``what`` says what was promised.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not (value := holds()):
        assert time.monotonic() < deadline, f"it never came to hold: {what}"
        time.sleep(LOOK_S)
    return value


def binary(name: str) -> str:
    """The path of a program of Debian's redis-server, which is installed if it is missing and we are root.

    :raises RuntimeError: it is missing and cannot be installed.
    """
    if (path := shutil.which(name)) is None and os.geteuid() == 0 and shutil.which("apt-get"):
        # RUNLEVEL: the package must not start a server of its own.
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        subprocess.run(["apt-get", "update", "-q"], env=environment, check=False, stdout=subprocess.DEVNULL)
        subprocess.run(
            ["apt-get", "install", "-yq", "--no-install-recommends", "redis-server"],
            env=environment,
            check=False,
            stdout=subprocess.DEVNULL,
        )
        path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} is missing and these tests need it: apt-get install redis-server")
    return path


def free_port() -> int:
    """A port that no process listens on at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class RedisServer:
    """One ``redis-server``. It writes an append-only file, so that a killed one comes back with its data.

    :param folder: for its data and log; made if need be.
    :param options: more lines of its configuration, such as ``"requirepass secret"``.
    :param sentinel: run it as a sentinel.
    """

    def __init__(self, folder: Path, *options: str, sentinel: bool = False) -> None:
        self.folder = folder
        self.options = options
        self.sentinel = sentinel
        self.port = 0
        self.username = ""
        self.password = ""
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens, without credentials."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of the running server."""
        assert self.process is not None, "it does not run"
        return self.process.pid

    def start(self) -> RedisServer:
        """Start it, on the port of its last life if it had one; return when it answers.

        :raises RuntimeError: it does not start; with its log.
        """
        for _ in range(5):  # another process may take the free port first
            port = self.port or free_port()
            self.folder.mkdir(parents=True, exist_ok=True)
            log = self.folder / "log"
            config = [f"port {port}", "bind 127.0.0.1", f"dir {self.folder}", f"logfile {log}", *self.options]
            if not self.sentinel:
                config += ["appendonly yes", "appendfsync no", 'save ""', f"unixsocket {self.folder}/socket"]
            path = self.folder / "conf"
            path.write_text("\n".join(config) + "\n")
            args = [binary("redis-server"), str(path)] + (["--sentinel"] if self.sentinel else [])
            self.process = subprocess.Popen(args, stdin=subprocess.DEVNULL)
            self.port, fixed = port, self.port
            deadline = time.monotonic() + PATIENCE_S
            while self.process.poll() is None and time.monotonic() < deadline:
                if self._answers():
                    return self
                time.sleep(LOOK_S)
            self.kill()
            self.port = fixed
        raise RuntimeError(f"redis-server does not start:\n{log.read_text()}")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as s:
            s.settimeout(1)
            s.sendall(b"PING\r\n")
            return s.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        return False

    def freeze(self) -> None:
        """Let it stand still: it accepts connections (the kernel does) and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self, *, lose_data: bool = False) -> None:
        """End it without a word; with ``lose_data`` the next start finds nothing."""
        if self.process is not None:
            self.process.kill()  # works on a frozen one, too
            self.process.wait()
            self.process = None
        if lose_data:
            shutil.rmtree(self.folder, ignore_errors=True)

    def restart(self, *, lose_data: bool = False) -> None:
        """Kill it and start it on the same port."""
        self.kill(lose_data=lose_data)
        self.start()

    def client(self) -> redis.Redis:
        """A plain client, to be closed by its user; text is decoded."""
        return redis.Redis(
            host="127.0.0.1", port=self.port, username=self.username or None, password=self.password or None,
            decode_responses=True, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=PATIENCE_S,
        )  # fmt: skip

    def command(self, *args: str | int | bytes) -> Any:
        """One command on a connection of its own."""
        with self.client() as client:
            return client.execute_command(*args)

    def __enter__(self) -> RedisServer:
        return self.start() if self.process is None else self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()


class RedisCluster:
    """A Redis Cluster of three primaries without replicas."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.nodes = [
            RedisServer(folder / f"n{i}", "cluster-enabled yes", "cluster-node-timeout 15000", *options)
            for i in range(3)
        ]  # fmt: skip

    @property
    def url(self) -> str:
        """All nodes."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{n.port}" for n in self.nodes)

    def __enter__(self) -> RedisCluster:
        try:
            for node in self.nodes:
                # Its default would be the port + 10000, which need not be free, nor exist.
                node.options += (f"cluster-port {free_port()}",)
                node.start()
            subprocess.run(
                [binary("redis-cli"), "--cluster", "create", "--cluster-yes"]
                + [f"127.0.0.1:{n.port}" for n in self.nodes],
                check=True, stdout=subprocess.PIPE, timeout=PATIENCE_S,
            )  # fmt: skip
            for node in self.nodes:
                wait_for(partial(self._is_up, node), "the cluster is up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _is_up(self, node: RedisServer) -> bool:
        return "cluster_state:ok" in str(node.command("CLUSTER", "INFO"))

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        for node in self.nodes:
            node.kill()


class RedisSentinel:
    """A primary, its replica, and one sentinel that decides alone and quickly. The service is called ``main``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.primary = RedisServer(folder / "primary")
        self.replica = RedisServer(folder / "replica", "repl-diskless-sync-delay 0")
        self.sentinel = RedisServer(folder / "sentinel", sentinel=True)

    @property
    def url(self) -> str:
        """The service, as asked of the sentinel."""
        return f"redis+sentinel://127.0.0.1:{self.sentinel.port}/main/0"

    def __enter__(self) -> RedisSentinel:
        try:
            self.primary.options += ("repl-diskless-sync-delay 0",)
            self.primary.start()
            self.replica.options += (f"replicaof 127.0.0.1 {self.primary.port}",)
            self.replica.start()
            wait_for(lambda: self.replica.command("ROLE")[3] == "connected", "the replica is connected")
            self.sentinel.options = (
                f"sentinel monitor main 127.0.0.1 {self.primary.port} 1",
                "sentinel down-after-milliseconds main 300",
                "sentinel failover-timeout main 3000",
            )
            self.sentinel.start()
            wait_for(lambda: self.sentinel.command("SENTINEL", "REPLICAS", "main"), "the sentinel knows the replica")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        for server in (self.sentinel, self.replica, self.primary):
            server.kill()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of this test's own, to do anything with."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that many tests share: the one of ``CHATCORE_TEST_REDIS_URL``, else one started for them."""
    if url := os.environ.get("CHATCORE_TEST_REDIS_URL"):
        yield url
        return
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server.url
