"""The app of today's users (socketio_app/): Node.js, Socket.IO with its Redis adapter, MongoDB, two processes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from .base import BODY, REQUEST_ID, Send, Services, Step, Wait, World
from .installed import HERE, NOT_SET_UP
from .node import NodePeer

PROCESSES: Final = 2
REDIS_URL: Final = "CHATCORE_TEST_REDIS_URL"
MONGODB_URL: Final = "CHATCORE_TEST_MONGODB_URL"


class _App(NodePeer):
    """The parts that both variants share: everything but the database."""

    benches = frozenset({"users"})
    packages = ("socket.io", "@socket.io/redis-adapter", "redis", "mongodb", "bufferutil")
    multi_process = True
    path = "/socket.io/?EIO=4&transport=websocket"
    ack = "43"
    error = '"ok":false'
    ping = "2"
    pong = "3"

    store = ""

    def missing(self) -> str | None:
        if REDIS_URL not in os.environ and shutil.which("redis-server") is None:
            return "Redis is missing: apt install redis-server"
        return super().missing()

    def command(self, port: int, workers: int, data: Path) -> list[str]:
        command = ["node", str(HERE / "socketio_app" / "server.js"), "--port", str(port), "--store", self.store]
        return [*command, "--workers", str(max(workers, PROCESSES)), "--world", str(_world(data))]

    def prepare(self, data: Path, world: World) -> None:
        """The program puts it into its database before it listens."""
        rooms = [list(members) for members in world.rooms]
        _world(data).write_text(json.dumps({"users": world.users, "rooms": rooms, "entries": world.entries}))

    @contextmanager
    def services(self, data: Path) -> Iterator[Services]:
        with ExitStack() as stack:
            yield _redis(stack, data)

    def join(self, user: int, rooms: Sequence[int]) -> list[Step]:
        """It looks itself for the rooms of a user."""
        return [Wait('0{"sid"'), Send(f'40{{"token":"s{user}"}}'), Wait('42["init"')]

    def send(self, user: int, room: int) -> str:
        return f'42{REQUEST_ID}["message",{{"conversation":"c{room}","text":"{BODY}"}}]'

    def history(self, user: int, room: int) -> str:
        return f'42{REQUEST_ID}["history","c{room}"]'


class SocketIOApp(_App):
    """With what there is of MongoDB: a running one (`MONGODB_URL`), mongod, or FerretDB, which is slower than mongod;
    so compare `SocketIOAppNoDatabase`, too."""

    name = "socketio-app"
    about = "Node.js, Socket.IO, Redis adapter, MongoDB inserts, two processes"
    store = "mongodb"

    def missing(self) -> str | None:
        from tests.services import mongodb

        there = MONGODB_URL in os.environ or shutil.which("mongod") or any(mongodb.CACHE.glob("ferretdb-*/ferretdb"))
        return super().missing() if there else NOT_SET_UP

    def versions(self) -> dict[str, str]:
        external, mongod = MONGODB_URL in os.environ, shutil.which("mongod")
        kind = f"the server of {MONGODB_URL}" if external else "mongod" if mongod else "FerretDB, a stand-in"
        return super().versions() | {"MongoDB": kind}

    @contextmanager
    def services(self, data: Path) -> Iterator[Services]:
        from tests.services.mongodb import MongoServer

        with ExitStack() as stack:
            redis = _redis(stack, data)
            server = stack.enter_context(MongoServer())
            env = {"MONGODB_URL": server.url, "MONGODB_DATABASE": stack.enter_context(server.fresh_database())}
            yield Services({**redis.env, **env}, [*redis.pids, *([] if server.external else [server.pid])])


class SocketIOAppNoDatabase(_App):
    """The upper bound: a database that answers at once and costs nothing."""

    name = "socketio-app-nodb"
    about = "the same without a database: what it could do if MongoDB took no time at all"
    store = "memory"


def _world(data: Path) -> Path:
    return data / "world.json"


def _redis(stack: ExitStack, data: Path) -> Services:
    if REDIS_URL in os.environ:
        return Services({"REDIS_URL": os.environ[REDIS_URL]})
    from tests.services.redis import RedisServer

    server = stack.enter_context(RedisServer(data / "redis"))
    return Services({"REDIS_URL": server.url}, [server.pid])


PEERS = (SocketIOApp(), SocketIOAppNoDatabase())
