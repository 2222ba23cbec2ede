"""A real server of the MongoDB wire protocol for tests: started on a free port, killed, paused, restarted.

Which one: ``CHATCORE_TEST_MONGODB_URL`` (a running one), else ``mongod`` from the PATH, else FerretDB, built
once with Go into ``.cache/`` from the module beside this file (see README.md here for what it can and cannot).

``python -m tests.services.mongodb`` builds what is missing; with ``serve`` it also starts the server, prints
its URL, and stops it on Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pymongo import MongoClient
from pymongo.errors import PyMongoError

URL_VARIABLE = "CHATCORE_TEST_MONGODB_URL"
MODULE = Path(__file__).with_name("ferretdb")
CACHE = Path(__file__).parents[2] / ".cache"
BUILD_OPTIONS = ["-tags=ferretdb_no_postgresql", "-trimpath", "-buildvcs=false", "-ldflags=-s -w"]
START_LIMIT = 30.0
STOP_LIMIT = 10.0


class Unavailable(Exception):
    """There is no server to test with; the text is one line and says what to install."""


class MongoServer:
    """One server with its own data, which outlive a restart and go with ``close``.

    ``external`` is true when it is not ours: then only ``url`` and ``fresh_database`` work.
    """

    def __init__(self) -> None:
        self.external = URL_VARIABLE in os.environ
        self._process: subprocess.Popen[bytes] | None = None
        if self.external:
            self.url = os.environ[URL_VARIABLE]
            return
        self._program = program()
        self.port = _free_port()
        # A standalone server has neither; pymongo would find that out by itself, a test should not depend on it.
        self.url = f"mongodb://127.0.0.1:{self.port}/?directConnection=true&retryWrites=false"
        self._folder = Path(tempfile.mkdtemp(prefix="chatcore-mongodb-"))
        self._log = self._folder / "log"

    def __enter__(self) -> Self:
        try:
            if self.external:
                self._wait()
            else:
                self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._running().pid

    def start(self) -> None:
        """On the same port and data each time; returns when the server answers."""
        if self.external or self._process is not None:
            raise RuntimeError(f"{self.url} is running already")
        data = self._folder / "data"
        data.mkdir(exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                _command(self._program, self.port, data),
                # FerretDB stops when this pipe ends, so that no killed test run leaves one behind.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env={**os.environ, "GOGC": "400"},  # a third less CPU for some 20 MB
                start_new_session=True,  # Ctrl-C is for the tests, which stop it when they are done with it
            )
        self._wait()

    def stop(self) -> None:
        """As an administrator would; does nothing when it is not running."""
        if self._process is None:
            return
        process = self._process
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
        self._gone()

    def kill(self) -> None:
        """SIGKILL; also works on a paused one."""
        self._running().kill()
        self._gone()

    def restart(self) -> None:
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, and nothing answers from when it returns."""
        self._running().send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + STOP_LIMIT
        while not all(_stands_still(thread) for thread in Path(f"/proc/{self.pid}/task").iterdir()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self._program} runs on after SIGSTOP")
            time.sleep(0.002)

    def resume(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Stop it and remove its data."""
        if not self.external:
            self.stop()
            shutil.rmtree(self._folder, ignore_errors=True)

    @contextlib.contextmanager
    def fresh_database(self) -> Iterator[str]:
        """The name of a database that no other test uses; it is dropped afterwards if the server answers."""
        name = f"chatcore_test_{secrets.token_hex(6)}"
        try:
            yield name
        finally:
            try:
                with self.client() as client:
                    client.drop_database(name)
            except PyMongoError:
                if self.external:
                    raise  # ours goes with its data; an external one would keep it

    def client(self, *, limit: float = 5.0) -> MongoClient[dict[str, Any]]:
        """A synchronous client, for a test to look into the database; ``limit`` in seconds for each call."""
        milliseconds = int(limit * 1000)
        return MongoClient(self.url, timeoutMS=milliseconds, serverSelectionTimeoutMS=milliseconds)

    def log(self) -> str:
        """The log of the server so far."""
        return "" if self.external else self._log.read_text(errors="replace")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"{self.url} is not ours, or not running")
        return self._process

    def _gone(self) -> None:
        process = self._running()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
        self._process = None

    def _wait(self) -> None:
        deadline = time.monotonic() + START_LIMIT
        while not (self._process is None or self._listens()):
            if self._process.poll() is not None:
                self._gone()
                raise Unavailable(f"{self._program} ended at its start: {self.log()[-2000:]}")
            if time.monotonic() > deadline:
                raise Unavailable(f"{self._program} does not listen after {START_LIMIT:.0f} s: {self.log()[-2000:]}")
            time.sleep(0.02)
        with self.client(limit=max(1.0, deadline - time.monotonic())) as client:
            try:
                client.admin.command("ping")
            except PyMongoError as error:
                raise Unavailable(f"no MongoDB at {self.url}: {error}") from error

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1.0).close()
        except OSError:
            return False
        return True


def _stands_still(thread: Path) -> bool:
    """Whether a thread was stopped; the signal reaches one after the other."""
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] in "TtZ"
    except (FileNotFoundError, ProcessLookupError):
        return True


def program() -> Path:
    """mongod, or FerretDB; builds the latter if need be. Raises Unavailable."""
    mongod = shutil.which("mongod")
    return Path(mongod) if mongod is not None else ferretdb()


def ferretdb() -> Path:
    """The built FerretDB, named by its version and by what it was built from; takes minutes the first time."""
    version = _pinned(r"^require github\.com/FerretDB/FerretDB v(\S+)")
    source = hashlib.sha256(" ".join([platform.machine(), *BUILD_OPTIONS]).encode())
    for name in ("go.mod", "go.sum", "main.go"):
        source.update((MODULE / name).read_bytes())
    built = CACHE / f"ferretdb-{version}-{source.hexdigest()[:12]}" / "ferretdb"
    if built.exists():
        return built
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "ferretdb.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another run that builds FerretDB {version}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _build(version, built)
    return built


def _build(version: str, built: Path) -> None:
    go = _go()
    _say(f"building FerretDB {version}, the MongoDB for the tests, with {go}: minutes, only this time")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-") as folder:
        new = Path(folder) / "new"
        made = subprocess.run(
            [go, "build", *BUILD_OPTIONS, "-o", new / "ferretdb", "."],
            cwd=MODULE,
            env={**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if made.returncode != 0:
            raise Unavailable(f"FerretDB {version} cannot be built, set {URL_VARIABLE} instead: {made.stdout[-2000:]}")
        new.rename(built.parent)  # older ones stay: another run may be about to start one
    _say(f"built FerretDB {version} in {time.monotonic() - began:.0f} s")


def _go() -> str:
    """A Go that can build it, installed from the system's packages if that is possible. Raises Unavailable."""
    needed = _version(_pinned(r"^go (\S+)"))
    where = ["go", "/usr/local/go/bin/go", *map(str, sorted(Path("/usr/lib").glob("go-*/bin/go"), reverse=True))]
    for go in filter(shutil.which, where):
        if _go_version(go) >= needed:
            return go
    offered: tuple[int, ...] = ()
    if os.geteuid() == 0 and shutil.which("apt-get") is not None:
        _run("apt-get", "update", "-qq")
        # golang-go's version is the Go release; an older one would be installed for nothing.
        found = re.search(r"Candidate: (?:\d+:)?([0-9.]+)", _run("apt-cache", "policy", "golang-go"))
        offered = _version(found[1]) if found else ()
        if offered >= needed:
            _say("installing Go from the package golang-go")
            _run("apt-get", "install", "-y", "-qq", "--no-install-recommends", "golang-go")
            if _go_version("go") >= needed:
                return "go"
    wanted = "Go " + ".".join(map(str, needed)) + " or newer"
    beside = f" (the package golang-go has {'.'.join(map(str, offered))})" if offered else ""
    raise Unavailable(f"no MongoDB to test with: install {wanted}{beside}, or mongod, or set {URL_VARIABLE}")


def _go_version(go: str) -> tuple[int, ...]:
    if shutil.which(go) is None:
        return ()
    found = re.match(r"go([0-9.]+)", _run(go, "env", "GOVERSION"))
    return _version(found[1]) if found else ()


def _pinned(pattern: str) -> str:
    found = re.search(pattern, (MODULE / "go.mod").read_text(), re.MULTILINE)
    if found is None:
        raise Unavailable(f"{MODULE / 'go.mod'} has no line {pattern}")
    return found[1]


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def _run(*command: str) -> str:
    """The output of the command; its failure shows in what is missing afterwards."""
    ran = subprocess.run(
        command,
        cwd=MODULE,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "GOWORK": "off"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return ran.stdout


def _command(program: Path, port: int, data: Path) -> list[str]:
    if program.name == "mongod":
        return [str(program), "--bind_ip=127.0.0.1", f"--port={port}", f"--dbpath={data}", "--nounixsocket", "--quiet"]
    # Without syncs it survives every kill of the process, which is all that a test does to it.
    sqlite = f"file:{data}/?_pragma=synchronous(off)"
    return [str(program), "-stop-with-stdin", f"-listen=127.0.0.1:{port}", f"-sqlite-url={sqlite}"]


def _free_port() -> int:
    """Below the ports that outgoing connections get: a stopped server must find its own free again."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(100):
        port = random.randrange(min(20000, low - 2000), low)
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise Unavailable("no free port on 127.0.0.1")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    try:
        if sys.argv[1:] != ["serve"]:
            if URL_VARIABLE not in os.environ:
                program()
            return
        for ending in (signal.SIGINT, signal.SIGTERM):  # the first is ignored in what a shell runs in the background
            signal.signal(ending, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt), MongoServer() as server:
            print(server.url, flush=True)
            signal.pause()
    except Unavailable as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
