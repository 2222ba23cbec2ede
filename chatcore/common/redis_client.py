"""Redis: the meaning of a URL, and clients that never repeat, never wait long and never cancel.

| URL | is |
|---|---|
| ``redis://[user[:password]@]host[:port][/db]`` | one server; ``rediss://``: with TLS |
| ``unix://[user[:password]@]/path[?db=n]`` | one server, at its socket |
| ``redis+sentinel://host:port,host:port/service[/db]`` | the primary that the sentinels name; ``rediss+sentinel`` |
| ``redis+cluster://host:port,host:port`` | a Redis Cluster, found through any of these; ``rediss+cluster`` |

Options behind ``?``: ``db``; ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile`` (paths),
``ssl_cert_reqs`` (``required`` or ``none``), ``ssl_check_hostname`` (``true`` or ``false``);
``sentinel_username``, ``sentinel_password``.

Rules for the hot path, each because of a known failure:

* A command is sent once. redis-py repeats by default, ``INCR`` and ``PUBLISH`` included.
* A command in flight is never cancelled: a connection of redis-py whose command was cancelled once gave the reply
  to the next caller. A caller that gives up leaves the command to end by itself, holding its connection until then.
* A full pool makes callers wait, within their timeout.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar
from urllib.parse import parse_qs, unquote

import redis.asyncio
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import BlockingConnectionPool, Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import (
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TimeoutError,
)

from ..errors import Unavailable
from .breaker import Breaker, BreakerState

log = logging.getLogger("chatcore.redis")

T = TypeVar("T")
Args = Sequence[str | bytes | int | float]

PORT: Final = 6379
SENTINEL_PORT: Final = 26379
#: A user waits for the hot path; Redis answers within a millisecond or is not well.
TIMEOUT_S: Final = 0.5
#: Commands in flight of one worker and client; more only queue in Redis, which has one thread.
MAX_CONNECTIONS: Final = 32
#: Error replies that mean "not now" rather than "never": retrying may help.
_RETRYABLE: Final = (
    "LOADING", "MISCONF", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY ", "OOM", "READONLY",
    "UNBLOCKED", "MOVED", "ASK ",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A parsed URL. Its ``repr`` omits secrets."""

    kind: Literal["single", "sentinel", "cluster"]
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    db: int = 0
    service: str = ""
    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    sentinel_username: str = field(default="", repr=False)
    sentinel_password: str = field(default="", repr=False)
    tls: bool = False
    ca_certs: str = ""
    certfile: str = ""
    keyfile: str = ""
    verify: bool = True
    check_hostname: bool = True

    @property
    def cluster(self) -> bool:
        """Whether it is a Redis Cluster: keys of one command share a slot, pub/sub is sharded."""
        return self.kind == "cluster"

    def __str__(self) -> str:
        """For people and logs: the address without credentials."""
        where = self.path or ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"{where} ({self.service})" if self.service else where

    def ssl_context(self) -> ssl.SSLContext | None:
        """For connections that are not redis-py's; None without TLS.

        :raises OSError: a file cannot be read, or holds no certificate or key.
        """
        if not self.tls:
            return None
        context = ssl.create_default_context(cafile=self.ca_certs or None)
        if self.certfile:
            context.load_cert_chain(self.certfile, self.keyfile or None)
        context.check_hostname = self.check_hostname and self.verify
        if not self.verify:
            context.verify_mode = ssl.CERT_NONE
        return context


def parse_url(url: str) -> RedisAddress:
    """Parse a URL (see the table above).

    :raises ValueError: with one line for the operator, without the password.
    """
    scheme, found, rest = url.partition("://")
    kinds: dict[str, Literal["single", "sentinel", "cluster"]] = {"redis": "single", "rediss": "single"}
    kinds |= {"unix": "single", "redis+sentinel": "sentinel", "rediss+sentinel": "sentinel"}
    kinds |= {"redis+cluster": "cluster", "rediss+cluster": "cluster"}
    if not found or scheme not in kinds:
        raise ValueError(f"a Redis URL begins with one of {', '.join(f'{known}://' for known in kinds)}")
    kind = kinds[scheme]
    rest, _, query = rest.partition("?")
    options = {name: values[-1] for name, values in parse_qs(query, keep_blank_values=True).items()}
    servers, slash, path = rest.partition("/")
    credentials, at, servers = servers.rpartition("@")
    username, colon, password = credentials.partition(":")
    db = options.pop("db", "")
    service = ""
    hosts: tuple[tuple[str, int], ...] = ()
    if scheme == "unix":
        if not path or servers:
            raise ValueError("unix:// needs an absolute path: unix:///run/redis/redis.sock")
        path = unquote(slash + path)
    else:
        hosts = tuple(_host(part, SENTINEL_PORT if kind == "sentinel" else PORT) for part in servers.split(","))
        if kind == "single" and len(hosts) > 1:
            raise ValueError("redis:// names one server; for several use redis+sentinel:// or redis+cluster://")
        if kind == "sentinel":
            service, _, path = path.partition("/")
            service = unquote(service)
            if not service:
                raise ValueError("redis+sentinel:// must name the service: redis+sentinel://host:26379/service/0")
        db, path = path or db, ""
    if db and not (db.isascii() and db.isdigit()):
        raise ValueError(f"database {db!r} is not a number")
    if kind == "cluster" and int(db or 0):
        raise ValueError("a Redis Cluster has only database 0")
    address = RedisAddress(
        kind=kind,
        hosts=hosts,
        path=path,
        db=int(db or 0),
        service=service,
        username=unquote(username) if colon else unquote(username) if at else "",
        password=unquote(password),
        sentinel_username=options.pop("sentinel_username", ""),
        sentinel_password=options.pop("sentinel_password", ""),
        tls=scheme.startswith("rediss"),
        ca_certs=options.pop("ssl_ca_certs", ""),
        certfile=options.pop("ssl_certfile", ""),
        keyfile=options.pop("ssl_keyfile", ""),
        verify=_choice(options, "ssl_cert_reqs", "required", "none"),
        check_hostname=_choice(options, "ssl_check_hostname", "true", "false"),
    )
    if options:
        raise ValueError(f"a Redis URL has no option {', '.join(options)}")
    return address


def _host(text: str, port: int) -> tuple[str, int]:
    host, colon, number = text.rpartition(":")
    if not colon or number.endswith("]"):  # no port; an IPv6 address stands in brackets
        host, number = text, str(port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (number.isascii() and number.isdigit() and 0 < int(number) < 65536):
        raise ValueError(f"{text!r} is not host:port")
    return host, int(number)


def _choice(options: dict[str, str], name: str, yes: str, no: str) -> bool:
    value = options.pop(name, yes)
    if value not in (yes, no):
        raise ValueError(f"{name} must be {yes} or {no}")
    return value == yes


class RedisClient:
    """Commands for one Redis of any kind. Made inside the running loop; connects when first used.

    :param timeout_s: bounds the wait of a caller, and each step of a connection. Blocking commands
        need a client of their own with a longer one.
    :param max_connections: commands in flight; in a cluster of all nodes together.
    """

    def __init__(
        self,
        address: RedisAddress,
        *,
        timeout_s: float = TIMEOUT_S,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self.address = address
        self.breaker = Breaker("redis", on_change=self._log_availability)
        self._away = False
        self._timeout_s = timeout_s
        self._permits = asyncio.Semaphore(max_connections)
        # Not Tasks: the caller of a command gets its failure, which need not be logged, too.
        self._in_flight: set[asyncio.Task[Any]] = set()
        self._sentinel: Sentinel | None = None
        #: The client of redis-py. Use it inside :meth:`run` only, which keeps the rules.
        self.raw: Any = self._make(max_connections)

    @property
    def cluster(self) -> bool:
        """Whether keys of one command or script have to share a slot (``{tag}``)."""
        return self.address.cluster

    async def call(self, *args: str | bytes | int | float) -> Any:
        """One command; the reply as redis-py shapes it, text as bytes.

        :raises Unavailable: no reply in time, or an error that may pass; the command may have been carried out.
        :raises ResponseError: Redis refuses it as wrong; a subclass such as ``NoScriptError`` if redis-py has one.
        """
        return await self.run(lambda raw: raw.execute_command(*args))

    async def pipeline(self, commands: Sequence[Args], *, transaction: bool = False) -> list[Any]:
        """Commands in one write; their replies in order, that of a refused one as a ``ResponseError``.

        In a cluster they are split by node (and ``transaction`` needs keys of one slot).

        :raises Unavailable: as :meth:`call`; some may have been carried out.
        """

        async def send(raw: Any) -> list[Any]:
            async with raw.pipeline(transaction=transaction) as pipe:
                for args in commands:
                    pipe.execute_command(*args)
                replies: list[Any] = await pipe.execute(raise_on_error=False)
                for reply in replies:
                    if isinstance(reply, Exception) and _is_outage(reply):
                        raise reply
                return replies

        return await self.run(send) if commands else []

    async def run(self, operation: Callable[[Any], Awaitable[T]]) -> T:
        """Call ``operation`` with the client of redis-py; its result. It is never cancelled, so it must end by
        itself (it awaits commands only). If it takes longer than the timeout, or the caller is cancelled, it goes
        on in the background.

        :raises Unavailable: as :meth:`call`.
        """
        breaker = self.breaker
        if not breaker.allow():
            raise Unavailable(f"{breaker.name} is away", retry_after_ms=breaker.retry_after_ms)
        try:
            deadline = asyncio.get_running_loop().time() + self._timeout_s
            async with asyncio.timeout_at(deadline):
                await self._permits.acquire()
        except BaseException as exc:
            if not isinstance(exc, asyncio.TimeoutError):
                breaker.abandoned()
                raise
            breaker.failed()
            raise Unavailable(f"{breaker.name}: too many commands are waiting") from None
        task = asyncio.get_running_loop().create_task(self._send(operation))
        self._in_flight.add(task)
        task.add_done_callback(self._ended)
        await asyncio.wait((task,), timeout=max(0.0, deadline - asyncio.get_running_loop().time()))
        if not task.done():
            raise Unavailable(f"{breaker.name} did not answer in time")
        return task.result()

    async def close(self) -> None:
        """Wait for the commands in flight (the timeouts bound them), then close every connection."""
        if self._in_flight:
            await asyncio.wait(self._in_flight)
        await self.raw.aclose()
        if self._sentinel is not None:
            await self._sentinel.aclose()

    async def _send(self, operation: Callable[[Any], Awaitable[T]]) -> T:
        started = asyncio.get_running_loop().time()
        try:
            result = await operation(self.raw)
        except (RedisError, OSError) as exc:
            if not _is_outage(exc):
                self.breaker.succeeded()
                raise
            self.breaker.failed()
            raise Unavailable(f"{self.breaker.name}: {type(exc).__name__}: {exc}"[:200]) from exc
        except BaseException:
            self.breaker.abandoned()
            raise
        finally:
            self._permits.release()
        # A reply after the timeout counts as a failure, too: its caller has given up.
        if asyncio.get_running_loop().time() - started > self._timeout_s:
            self.breaker.failed()
        else:
            self.breaker.succeeded()
        return result

    def _make(self, max_connections: int) -> Any:
        a = self.address
        # A new one for each client: redis-py keeps state in it.
        once = Retry(NoBackoff(), 0)
        common: dict[str, Any] = {
            "username": a.username or None,
            "password": a.password or None,
            "socket_timeout": self._timeout_s,
            "socket_connect_timeout": self._timeout_s,
            # RESP2: no HELLO, no maintenance notifications, replies of one shape for every server.
            "protocol": 2,
            "driver_info": None,
        }
        tls: dict[str, Any] = {}
        if a.tls:
            tls = {
                "ssl_ca_certs": a.ca_certs or None,
                "ssl_certfile": a.certfile or None,
                "ssl_keyfile": a.keyfile or None,
                "ssl_cert_reqs": "required" if a.verify else "none",
                "ssl_check_hostname": a.check_hostname and a.verify,
            }
        if a.cluster:
            nodes = [ClusterNode(host, port) for host, port in a.hosts]
            secure = {"ssl": True, **tls} if a.tls else {}
            # Steps 0: redis-py learns of each slot that moves anyway; else every fifth one would close all
            # connections, even those with commands in flight.
            return RedisCluster(
                startup_nodes=nodes, max_connections=max_connections, retry=once, reinitialize_steps=0,
                **common, **secure,
            )  # fmt: skip
        common |= {"retry": once, "db": a.db}
        if a.kind == "sentinel":
            secure = {"ssl": True, **tls} if a.tls else {}
            asks = common | secure
            asks |= {"db": 0, "username": a.sentinel_username or None, "password": a.sentinel_password or None}
            self._sentinel = Sentinel(list(a.hosts), sentinel_kwargs=asks)  # type: ignore[no-untyped-call]
            return self._sentinel.master_for(a.service, max_connections=max_connections, **common, **secure)
        kind: type[Any] = SSLConnection if a.tls else UnixDomainSocketConnection if a.path else Connection
        where = {"path": a.path} if a.path else {"host": a.hosts[0][0], "port": a.hosts[0][1]}
        pool = BlockingConnectionPool(
            max_connections=max_connections, timeout=self._timeout_s, connection_class=kind, **where, **common, **tls
        )  # fmt: skip
        return redis.asyncio.Redis.from_pool(pool)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._in_flight.discard(task)
        if not task.cancelled():
            task.exception()  # mark it as retrieved: its caller may have given up

    def _log_availability(self, state: BreakerState) -> None:
        """Log one line when Redis goes away and one when it is back, however many probes fail in between."""
        if state is BreakerState.OPEN and not self._away:
            self._away = True
            log.warning("redis at %s does not answer", self.address)
        elif state is BreakerState.CLOSED:
            self._away = False
            log.info("redis at %s answers again", self.address)


def _is_outage(exc: BaseException) -> bool:
    """Whether the error is about Redis' state rather than about the command."""
    if isinstance(exc, ConnectionError | TimeoutError | OSError | RedisClusterException):
        return True
    if isinstance(exc, ReadOnlyError | OutOfMemoryError):
        return True
    return isinstance(exc, ResponseError) and str(exc).startswith(_RETRYABLE)
