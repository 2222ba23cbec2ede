"""Which settings there are: name, type, default, allowed values, and why that default.

One line adds a setting; ``config.py`` reads, checks, prints and documents whatever is here. The unit is in
the name (``_ms``, ``_bytes``, ``_per_s``, ``_kib``; plain counts have none). Everything is a frozen
dataclass, so a worker cannot change what the others rely on.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

#: Slots of the stats page, so also the most workers that one server can have.
MAX_WORKERS = 128


def _setting(default: Any, allowed: str, check: Callable[[Any], bool], doc: str) -> Any:
    return field(default=default, metadata={"allowed": allowed, "check": check, "doc": doc})


def _int(default: int, low: int, high: int, doc: str) -> int:
    value: int = _setting(default, f"a whole number from {low} to {high}", lambda v: low <= v <= high, doc)
    return value


def _float(default: float, low: float, high: float, doc: str) -> float:
    value: float = _setting(default, f"a number from {low} to {high}", lambda v: low <= v <= high, doc)
    return value


def _text(default: str, doc: str) -> str:
    def check(text: str) -> bool:
        return bool(text.strip()) and text.isprintable()

    value: str = _setting(default, "text, not empty, on one line", check, doc)
    return value


def _url(schemes: tuple[str, ...], doc: str) -> str:
    """Empty by default: the part is not used."""

    def check(text: str) -> bool:
        return not text or (text.isprintable() and text.partition("://")[0] in schemes)

    value: str = _setting("", "empty, or a URL that begins with " + ", ".join(f"{s}://" for s in schemes), check, doc)
    return value


def _bool(default: bool, doc: str) -> bool:
    value: bool = _setting(default, "true or false", lambda v: True, doc)
    return value


def _choice(choices: tuple[str, ...], doc: str) -> str:
    """The first choice is the default."""
    value: str = _setting(choices[0], "one of " + ", ".join(choices), lambda v: v in choices, doc)
    return value


@dataclass(frozen=True, slots=True)
class Server:
    """The process: where it listens, where its data is, how it stops."""

    host: str = _text("127.0.0.1", "Address or name to listen on; loopback, so that nothing is exposed by accident.")
    port: int = _int(8080, 0, 65535, "TCP port; 0 chooses a free one; 8080 needs no privileges.")
    workers: int = _int(0, 0, MAX_WORKERS, "Worker processes; 0 means one per core that this process may use.")
    data: str = _text("./data", "Directory for everything durable; a relative path counts from the current directory.")
    drain_timeout_ms: int = _int(
        20_000, 0, 600_000, "A worker that stops has this long; time for clients to be told and to leave one by one."
    )
    reconnect_spread_ms: int = _int(
        5_000,
        0,
        600_000,
        "Clients told to leave come back at random within 10 ms for each, and this at most: not all at once.",
    )
    registration: str = _choice(
        ("auto", "open", "closed"), "Who may make an account; auto is open on a loopback host and closed elsewhere."
    )
    io_uring: bool = _bool(
        True, "Send to many clients by one system call where the kernel allows it; a sixth less CPU per delivery."
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes and counts that bound what one client, user or worker can use."""

    frame_bytes: int = _int(65_536, 1_024, 262_144, "Largest WebSocket message from a client; a body, data and room.")
    body_bytes: int = _int(8_192, 1, 16_384, "Largest text of a message; some pages, while 100 still fit one push.")
    data_bytes: int = _int(8_192, 0, 16_384, "Largest `data` of a message, for bots and games; as large as a text.")
    have: int = _int(1_000, 1, 10_000, "Conversations named in `have`; as many as a user can be in.")
    only: int = _int(100, 1, 10_000, "Conversations named in `only`; more than any screen shows.")
    history: int = _int(100, 1, 1_000, "Entries on one page of history; below the largest server message.")
    backlog: int = _int(500, 0, 10_000, "Missing entries that are replayed; beyond, a page of history is cheaper.")
    small: int = _int(100, 0, 10_000, "Members up to which typing and read marks are told; each costs members squared.")
    watch: int = _int(500, 0, 10_000, "Users whose presence one session watches; bounds a presence storm.")
    users: int = _int(100, 1, 1_000, "Users looked up in one request; one query of the store.")
    members: int = _int(100, 1, 1_000, "Members on one page; one query of the store.")
    channels: int = _int(100, 1, 1_000, "Channels on one page of the directory; one query of the store.")
    conversations: int = _int(100, 1, 1_000, "Conversations on one page over HTTP; each may show a whole message.")
    open_members: int = _int(100, 1, 1_000, "Members named when a conversation is opened; each becomes an entry.")
    title_chars: int = _int(100, 1, 1_000, "Longest title of a conversation; one line of a list.")
    name_chars: int = _int(32, 1, 64, "Longest name of a user; fits beside every message.")
    password_chars_min: int = _int(8, 1, 64, "Shortest password; what NIST SP 800-63B asks at least.")
    password_chars_max: int = _int(256, 64, 4_096, "Longest password; more only costs time to hash.")
    conversations_per_user: int = _int(1_000, 1, 10_000, "Conversations that a user is in; all are read at log-in.")
    connections_per_user: int = _int(20, 1, 10_000, "Sessions of one user on a worker; some devices and open tabs.")
    connections_per_worker: int = _int(
        15_000, 1, 1_000_000, "Sockets of clients in one worker; below a usual limit of 20,000 open files."
    )
    outstanding: int = _int(
        64, 1, 10_000, "Requests of a session not yet answered; more would only queue in the store."
    )
    outbox_bytes: int = _int(
        1_048_576, 65_536, 67_108_864, "Unsent bytes for one client; above, it is too slow and is cut off to resume."
    )
    outbox_low_water_bytes: int = _int(
        65_536, 1, 16_777_216, "Replay goes on below this; small, so that live messages wait little behind it."
    )
    http_body_bytes: int = _int(65_536, 1_024, 1_048_576, "Largest body of an HTTP request; as a WebSocket message.")
    http_connections_per_worker: int = _int(
        1_000, 1, 100_000, "Plain HTTP connections in one worker; each has Python objects, so there are fewer."
    )
    append_queue: int = _int(10_000, 1, 1_000_000, "Entries waiting for the store in one worker; seconds of its work.")
    ring_bytes: int = _int(
        262_144, 4_096, 16_777_216, "Bytes of those entries; large ones are read from the store instead."
    )
    ring: int = _int(64, 1, 4_096, "Last entries kept for each attached conversation; a short gap costs no query.")


@dataclass(frozen=True, slots=True)
class Rates:
    """How often one client may ask."""

    messages_per_s: float = _float(50.0, 0.1, 100_000.0, "Frames per second of one connection; far above any typist.")
    messages_burst: int = _int(200, 1, 100_000, "Frames at once; an app that reconnects asks for much in one go.")
    typing_interval_ms: int = _int(3_000, 0, 60_000, "Least time between two typing signals; they are shown for 6 s.")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long something may take; all on the monotonic clock."""

    handshake_ms: int = _int(
        10_000, 100, 600_000, "From accept to upgrade in all, so that slow bytes do not extend it."
    )
    auth_ms: int = _int(10_000, 100, 600_000, "From upgrade to `auth`; strangers hold no connection for long.")
    close_ms: int = _int(2_000, 0, 60_000, "From the end of sending to the peer's end, so that last replies arrive.")
    ping_ms: int = _int(25_000, 1_000, 600_000, "Interval of pings; below the 30 s after which mobile carriers forget.")
    ping_min_ms: int = _int(5_000, 100, 600_000, "Shortest ping interval a client may ask for; pings cost a write.")
    ping_max_ms: int = _int(600_000, 1_000, 3_600_000, "Longest ping interval a client may ask for; for battery life.")
    replay_stall_ms: int = _int(30_000, 100, 600_000, "A replay whose client reads nothing for this long is given up.")
    store_ms: int = _int(5_000, 10, 600_000, "Longest wait for the store; then the answer is `unavailable`.")
    still_worker_ms: int = _int(
        1_000, 200, 3_600_000, "A worker whose loop has not ticked for this long gets no new connections until it does."
    )
    stuck_worker_ms: int = _int(
        15_000, 200, 3_600_000, "A worker whose loop has not ticked for this long is killed; well above any hiccup."
    )
    worker_start_ms: int = _int(30_000, 100, 3_600_000, "A worker has this long to get ready; a database may recover.")


@dataclass(frozen=True, slots=True)
class Accounts:
    """Passwords and tokens."""

    token_ttl_ms: int = _int(2_592_000_000, 1_000, 31_536_000_000, "An unused token ends after this: 30 days.")
    password_hash_memory_kib: int = _int(19_456, 8, 4_194_304, "Memory of argon2id; the least that OWASP accepts.")
    password_hash_time: int = _int(2, 1, 100, "Passes of argon2id; the least that OWASP accepts for this memory.")
    password_hash_parallel: int = _int(1, 1, 64, "Lanes of argon2id; one, as a worker has one core.")
    password_hash_queue: int = _int(100, 1, 10_000, "Passwords waiting to be hashed in a worker; about two seconds.")


@dataclass(frozen=True, slots=True)
class Store:
    """Where everything durable is: the embedded database, or MongoDB for several hosts."""

    mongodb_url: str = _url(
        ("mongodb", "mongodb+srv"), "MongoDB; empty: the embedded database in the data directory. Needs redis.url."
    )
    mongodb_database: str = _text("chatcore", "Name of the database in MongoDB; all hosts of a server use the same.")
    pool_max: int = _int(25, 1, 1_000, "Connections of one worker to MongoDB; more only queue in the server.")
    pool_min: int = _int(4, 0, 1_000, "Connections kept open, so that a burst does not begin with handshakes.")
    pool_wait_ms: int = _int(500, 1, 60_000, "Wait for a free connection; then the answer is `unavailable`.")
    server_selection_ms: int = _int(3_000, 100, 60_000, "Wait for a primary, an election included.")
    operation_ms: int = _int(4_000, 100, 60_000, "Longest operation of MongoDB; timeouts.store_ms if that is less.")
    history_from_secondaries: bool = _bool(
        False, "Pages of history may come from secondaries, which may be 90 s behind; replay never does."
    )

    check_interval_ms: int = _int(1_000, 10, 60_000, "How often new entries are looked for; bounds what the bus loses.")
    batch_entries: int = _int(500, 1, 10_000, "Entries in one commit; a larger batch gains little and delays the rest.")
    checkpoint_pages: int = _int(
        16_000,
        1,
        1_000_000,
        "Pages in the write-ahead log before a checkpoint, 64 MiB; what is written often is moved once.",
    )


@dataclass(frozen=True, slots=True)
class Bus:
    """Messages between the workers of this host."""

    queue_bytes: int = _int(8_388_608, 65_536, 1_073_741_824, "Unsent bytes for one peer; above, it is told to look.")
    confirm_timeout_ms: int = _int(
        1_000, 10, 60_000, "Wait for a peer to confirm a subscription; then it counts as gone."
    )
    heartbeat_ms: int = _int(1_000, 10, 60_000, "Interval of heartbeats between workers; a missing one is a doubt.")


@dataclass(frozen=True, slots=True)
class Redis:
    """Redis, for several hosts: the bus between their workers, the second cache level, the queue."""

    url: str = _url(
        (
            "redis",
            "rediss",
            "unix",
            "redis+sentinel",
            "rediss+sentinel",
            "redis+cluster",
            "rediss+cluster",
        ),
        "Redis; empty: one host. Needs store.mongodb_url: hosts share nothing but these two.",
    )


@dataclass(frozen=True, slots=True)
class Cache:
    """What is remembered of the store: by each worker, and by all of them in Redis."""

    enabled: bool = _bool(True, "Remember at all; off: every read asks the store.")
    l2: bool = _bool(True, "Remember in Redis too, where there is one: what one worker read, the others know.")
    l2_timeout_ms: int = _int(
        250, 5, 10_000, "Longest wait for Redis; the store answers then. Redis takes a millisecond if it is well."
    )
    l1_entries: int = _int(
        50_000, 16, 10_000_000, "Sessions, profiles and roles kept in a worker, of each; some 300 bytes apiece."
    )
    tail_entries: int = _int(50, 1, 500, "Last entries kept of a conversation; what an app shows when it is opened.")
    tail_conversations: int = _int(5_000, 16, 1_000_000, "Conversations whose last entries are kept in a worker.")
    tail_bytes: int = _int(67_108_864, 1_048_576, 17_179_869_184, "Bytes of those entries together, in a worker.")
    session_ttl_ms: int = _int(
        60_000, 1, 3_600_000, "A worker believes in a session for this long; a lost revocation ends with it."
    )
    profile_ttl_ms: int = _int(120_000, 1, 3_600_000, "A worker believes in a name for this long; a stale one is mild.")
    role_ttl_ms: int = _int(
        60_000, 1, 3_600_000, "A worker believes in a role for this long; one removed reads no longer than this."
    )
    count_ttl_ms: int = _int(
        30_000, 1, 3_600_000, "A worker believes in a number of members for this long; it decides who hears of typing."
    )
    tail_ttl_ms: int = _int(
        60_000, 1, 3_600_000, "A worker keeps last entries for this long; a deletion it missed ends with it."
    )
    l2_session_ttl_ms: int = _int(300_000, 1, 86_400_000, "The same for sessions in Redis; adds to the worker's.")
    l2_profile_ttl_ms: int = _int(900_000, 1, 86_400_000, "The same for names in Redis; adds to the worker's.")
    l2_role_ttl_ms: int = _int(300_000, 1, 86_400_000, "The same for roles in Redis; adds to the worker's.")
    l2_tail_ttl_ms: int = _int(
        1_800_000, 1, 86_400_000, "The same for last entries in Redis; long, as they do not change until deleted."
    )
    negative_ttl_ms: int = _int(
        2_000, 1, 60_000, "What does not exist is believed for this long; enough to blunt a client that repeats."
    )
    unheard_ttl_ms: int = _int(
        2_000, 1, 60_000, "Longest life in a worker while the bus is away, and with it news of changes."
    )
    refresh: bool = _bool(True, "Read much used values again before they end, so that nobody waits for them.")
    warm_conversations: int = _int(
        500, 0, 100_000, "Most active conversations that a worker loads when it starts; 0 switches it off."
    )
    warm_budget_ms: int = _int(5_000, 0, 600_000, "Longest time for that; it runs beside the first clients.")
    prefetch_conversations: int = _int(
        5, 0, 100, "Newest conversations of a user loaded at log-in; the first screen of an app. 0 switches it off."
    )


@dataclass(frozen=True, slots=True)
class Queue:
    """Work in the background, such as notifications."""

    max_length: int = _int(100_000, 1, 100_000_000, "Messages of a topic that wait; beyond it a put is refused.")
    payload_bytes: int = _int(65_536, 1, 1_048_576, "Largest payload of a message; as an HTTP body.")
    concurrency: int = _int(16, 1, 10_000, "Messages of a topic handled at once in a worker; most wait for others.")
    deliveries: int = _int(5, 1, 100, "Deliveries after which a message becomes a dead letter; over a minute of tries.")
    retry_ms: int = _int(5_000, 1, 3_600_000, "Wait after the first failure, doubled each time; a short outage.")
    retry_max_ms: int = _int(600_000, 1, 86_400_000, "Longest wait between two deliveries of a message.")
    lease_ms: int = _int(
        15_000, 1_000, 600_000, "A worker silent for this long loses what it handles; well above any hiccup."
    )
    handler_timeout_ms: int = _int(
        60_000, 10, 86_400_000, "A handler has this long for a message; others of its key wait meanwhile."
    )
    dedupe_ms: int = _int(
        86_400_000, 1_000, 2_592_000_000, "How long a dedupe id is known: a day, longer than anybody repeats a put."
    )
    dead_max: int = _int(
        10_000, 1, 1_000_000, "Dead letters kept for a topic; beyond it the oldest go, counted, so that others get in."
    )
    poll_ms: int = _int(
        250, 1, 60_000, "How often the embedded queue looks for what other workers put; one small query."
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting, in groups. Made by :func:`chatcore.config.load`."""

    server: Server = field(default_factory=Server)
    limits: Limits = field(default_factory=Limits)
    rates: Rates = field(default_factory=Rates)
    timeouts: Timeouts = field(default_factory=Timeouts)
    accounts: Accounts = field(default_factory=Accounts)
    store: Store = field(default_factory=Store)
    bus: Bus = field(default_factory=Bus)
    redis: Redis = field(default_factory=Redis)
    cache: Cache = field(default_factory=Cache)
    queue: Queue = field(default_factory=Queue)

    @classmethod
    def default(cls) -> Settings:
        """All defaults, whatever the environment says."""
        return cls()

    def worker_count(self) -> int:
        """How many workers to run: as set, or one per core that this process may use."""
        return self.server.workers or max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0))))

    def registration_open(self) -> bool:
        """Whether strangers may make accounts (`registration`, with auto decided by the host)."""
        if self.server.registration != "auto":
            return self.server.registration == "open"
        return is_loopback(self.server.host)


#: What has to hold between settings: (lower, upper, what is wrong otherwise).
ORDERED: tuple[tuple[str, str], ...] = (
    ("limits.password_chars_min", "limits.password_chars_max"),
    ("limits.body_bytes", "limits.frame_bytes"),
    ("limits.outbox_low_water_bytes", "limits.outbox_bytes"),
    ("timeouts.ping_min_ms", "timeouts.ping_ms"),
    ("timeouts.ping_ms", "timeouts.ping_max_ms"),
    ("queue.retry_ms", "queue.retry_max_ms"),
    ("store.pool_min", "store.pool_max"),
)

#: Settings that go together: both are set, or neither.
TOGETHER: tuple[tuple[str, str], ...] = (("store.mongodb_url", "redis.url"),)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
