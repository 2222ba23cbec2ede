"""Which settings there are: name, type, default, allowed values, and why that default.

One line adds a setting; ``config.py`` reads, checks, prints and documents all settings that are declared here. The
unit is in the name (``_ms``, ``_bytes``, ``_per_s``, ``_kib``; plain counts have none). All groups are frozen
dataclasses, so that no part can change a setting that others rely on.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

#: Worker slots of the stats page, and so the largest number of workers of one server.
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
    """A URL of one of the schemes. The default is empty: the server does without that service."""

    def check(text: str) -> bool:
        return not text or (text.isprintable() and text.partition("://")[0] in schemes)

    value: str = _setting("", "empty, or a URL that begins with " + ", ".join(f"{s}://" for s in schemes), check, doc)
    return value


def _bool(default: bool, doc: str) -> bool:
    value: bool = _setting(default, "true or false", lambda v: True, doc)
    return value


def _choice(choices: tuple[str, ...], doc: str) -> str:
    """One of a few words; the first one is the default."""
    value: str = _setting(choices[0], "one of " + ", ".join(choices), lambda v: v in choices, doc)
    return value


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The server process: where it listens, where its data is, how it stops."""

    host: str = _text("127.0.0.1", "Address or name to listen on; loopback, so that nothing is exposed by accident.")
    port: int = _int(8080, 0, 65535, "TCP port; 0 lets the system choose a free one; 8080 needs no privileges.")
    workers: int = _int(0, 0, MAX_WORKERS, "Worker processes; 0 starts one per core that this process may use.")
    data: str = _text("./data", "Directory for everything durable; a relative path starts at the current directory.")
    drain_timeout_ms: int = _int(
        20_000, 0, 600_000, "Time for a stopping worker to send its clients away one by one and to finish its work."
    )
    reconnect_spread_ms: int = _int(
        5_000,
        0,
        600_000,
        "Clients of a stopping worker reconnect at random within 10 ms each, and this in all.",
    )
    registration: str = _choice(
        ("auto", "open", "closed"), "Who may register an account; auto means open on a loopback host, else closed."
    )
    io_uring: bool = _bool(
        True, "Send to many clients with one system call if the kernel can; a sixth less CPU per delivery."
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes and counts that bound the resources of one client, user or worker."""

    frame_bytes: int = _int(
        65_536, 1_024, 262_144, "Largest WebSocket message from a client; it holds a `body`, its `data` and some more."
    )
    body_bytes: int = _int(
        8_192, 1, 16_384, "Largest text of a message; some pages, while 100 of them still fit one push."
    )
    data_bytes: int = _int(8_192, 0, 16_384, "Largest `data` of a message, for bots and games; as large as a text.")
    have: int = _int(1_000, 1, 10_000, "Conversations that a client may name in `have`; as many as a user can be in.")
    only: int = _int(100, 1, 10_000, "Conversations that a client may name in `only`; more than any screen shows.")
    history: int = _int(100, 1, 1_000, "Entries on one page of history; stays below the largest server message.")
    backlog: int = _int(500, 0, 10_000, "Missed entries that the server replays; beyond that, paging is cheaper.")
    small: int = _int(100, 0, 10_000, "Members up to which typing and read marks are sent; costs members squared.")
    watch: int = _int(500, 0, 10_000, "Users whose presence one session may watch; bounds a storm of presence.")
    users: int = _int(100, 1, 1_000, "Users that one request may look up; one query of the store.")
    members: int = _int(100, 1, 1_000, "Members on one page; one query of the store.")
    channels: int = _int(100, 1, 1_000, "Channels on one page of the directory; one query of the store.")
    conversations: int = _int(100, 1, 1_000, "Conversations on one page over HTTP; each may contain a whole message.")
    open_members: int = _int(100, 1, 1_000, "Members named when a conversation is opened; each becomes an entry.")
    title_chars: int = _int(100, 1, 1_000, "Longest title of a conversation; fits on one line of a list.")
    name_chars: int = _int(32, 1, 64, "Longest name of a user; fits beside each message.")
    password_chars_min: int = _int(8, 1, 64, "Shortest password; the minimum of NIST SP 800-63B.")
    password_chars_max: int = _int(256, 64, 4_096, "Longest password; longer ones only take more time to hash.")
    conversations_per_user: int = _int(1_000, 1, 10_000, "Conversations that a user can be in; a log-in reads all.")
    connections_per_user: int = _int(20, 1, 10_000, "Sessions of one user on one worker; some devices and open tabs.")
    connections_per_worker: int = _int(
        15_000, 1, 1_000_000, "Client sockets of one worker; below a usual limit of 20,000 files."
    )
    outstanding: int = _int(64, 1, 10_000, "Unanswered requests of one session; more would only queue in the store.")
    outbox_bytes: int = _int(
        1_048_576, 65_536, 67_108_864, "Unsent bytes for one client; a slower client is disconnected, and can resume."
    )
    outbox_low_water_bytes: int = _int(
        65_536, 1, 16_777_216, "Unsent bytes below which a replay goes on; small, so that live messages wait little."
    )
    http_body_bytes: int = _int(65_536, 1_024, 1_048_576, "Largest body of an HTTP request; as a WebSocket message.")
    http_connections_per_worker: int = _int(
        1_000, 1, 100_000, "Plain HTTP connections of one worker; each needs Python objects, so fewer are allowed."
    )
    append_queue: int = _int(
        10_000, 1, 1_000_000, "Entries waiting for the store in one worker; some seconds of its work."
    )
    ring: int = _int(64, 1, 4_096, "Recent entries kept for each attached conversation; a short gap costs no query.")
    ring_bytes: int = _int(262_144, 4_096, 16_777_216, "Bytes of those entries; others are read from the store.")


@dataclass(frozen=True, slots=True)
class Rates:
    """How often one client may send."""

    messages_per_s: float = _float(50.0, 0.1, 100_000.0, "Frames per second of one connection; far above any typist.")
    messages_burst: int = _int(200, 1, 100_000, "Frames at once; an app that reconnects sends many together.")
    messages_refused: int = _int(
        10_000,
        1,
        1_000_000,
        "Refused frames of one connection that have not come back; more are a flood. A large outbox, sent at once.",
    )
    typing_interval_ms: int = _int(3_000, 0, 60_000, "Shortest time between typing signals; clients show each for 6 s.")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long an operation may take, on the monotonic clock."""

    handshake_ms: int = _int(
        10_000, 100, 600_000, "Total time from accept to upgrade, so that a client that sends slowly cannot extend it."
    )
    auth_ms: int = _int(
        10_000, 100, 600_000, "Time from upgrade to `auth`; strangers do not hold connections for long."
    )
    close_ms: int = _int(
        2_000, 0, 60_000, "Wait for the client's end of stream after a close; the last replies arrive."
    )
    slow_ms: int = _int(
        10_000, 0, 600_000, "The same for a client that was too slow, to read why; the kernel holds megabytes for it."
    )
    ping_ms: int = _int(
        25_000, 1_000, 600_000, "Interval of pings; below the 30 s after which mobile carriers drop idle connections."
    )
    ping_min_ms: int = _int(5_000, 100, 600_000, "Shortest ping interval a client may choose; each ping costs a write.")
    ping_max_ms: int = _int(600_000, 1_000, 3_600_000, "Longest ping interval a client may choose, to save battery.")
    replay_stall_ms: int = _int(30_000, 100, 600_000, "A replay whose client reads nothing for this long ends.")
    store_ms: int = _int(5_000, 10, 600_000, "Longest wait for the store; after it the server answers `unavailable`.")
    still_worker_ms: int = _int(
        1_000, 200, 3_600_000, "A worker whose loop has not ticked for this long gets no new connections until it does."
    )
    stuck_worker_ms: int = _int(
        15_000, 200, 3_600_000, "A worker whose loop has not ticked for this long is killed; well above any pause."
    )
    stuck_writer_ms: int = _int(
        1_000,
        200,
        3_600_000,
        "The same for the embedded store's writer, unless it waits for the disk; all writes wait.",
    )
    worker_start_ms: int = _int(
        30_000, 100, 3_600_000, "Time that a worker has to get ready; its database may need to recover first."
    )


@dataclass(frozen=True, slots=True)
class AccountSettings:
    """Passwords and tokens."""

    token_ttl_ms: int = _int(2_592_000_000, 1_000, 31_536_000_000, "A token unused for this long expires; 30 days.")
    password_hash_memory_kib: int = _int(19_456, 8, 4_194_304, "Memory for argon2id; the minimum that OWASP accepts.")
    password_hash_time: int = _int(2, 1, 100, "Passes of argon2id; the minimum that OWASP accepts with this memory.")
    password_hash_parallel: int = _int(1, 1, 64, "Lanes of argon2id; one, because a worker has one core.")
    password_hash_queue: int = _int(100, 1, 10_000, "Passwords waiting for hashing in one worker; about two seconds.")


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Where durable data is kept: the embedded database, or MongoDB for several hosts."""

    mongodb_url: str = _url(
        ("mongodb", "mongodb+srv"),
        "MongoDB; if empty, the embedded database in the data directory. Needs redis.url, too.",
    )
    mongodb_database: str = _text("chatcore", "Name of the database in MongoDB; all hosts of one server use the same.")
    pool_max: int = _int(25, 1, 1_000, "Connections of one worker to MongoDB; more would only queue inside it.")
    pool_min: int = _int(4, 0, 1_000, "Connections kept open; a burst then does not begin with handshakes.")
    pool_wait_ms: int = _int(500, 1, 60_000, "Longest wait for a connection; then the answer is `unavailable`.")
    server_selection_ms: int = _int(3_000, 100, 60_000, "Longest wait for a primary, an election included.")
    operation_ms: int = _int(4_000, 100, 60_000, "Longest operation of MongoDB; timeouts.store_ms if that is shorter.")
    history_from_secondaries: bool = _bool(
        False, "Read pages of history from secondaries, which may be 90 s behind; a replay never does."
    )

    check_interval_ms: int = _int(
        1_000, 10, 60_000, "Interval of checks for new entries; bounds the delay of an entry that the bus lost."
    )
    batch_entries: int = _int(500, 1, 10_000, "Entries in one commit; a larger batch gains little and delays others.")
    checkpoint_pages: int = _int(
        4_000,
        1,
        1_000_000,
        "Pages in the write-ahead log before a checkpoint, 16 MiB; appended pages change only once.",
    )
    portion_entries: int = _int(
        65_536,
        16,
        1_000_000,
        "Entries that the index of the embedded store takes up at once; so many may be found in memory only.",
    )
    tail_entries: int = _int(
        200_000,
        1_000,
        10_000_000,
        "Entries not indexed yet, at most; beyond, messages are refused until the index has caught up.",
    )


@dataclass(frozen=True, slots=True)
class BusSettings:
    """Messages between the workers of this host."""

    queue_bytes: int = _int(
        8_388_608,
        65_536,
        1_073_741_824,
        "Unsent bytes for one peer; beyond, messages are dropped and the peer checks the store.",
    )
    confirm_timeout_ms: int = _int(
        1_000, 10, 60_000, "Longest wait for a peer to confirm a subscription; after it the peer counts as gone."
    )
    heartbeat_ms: int = _int(1_000, 10, 60_000, "Interval of heartbeats between workers; a missing one causes a check.")


@dataclass(frozen=True, slots=True)
class RedisSettings:
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
        "Redis; if empty, there is one host. Needs store.mongodb_url: hosts share only these.",
    )


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Values of the store kept in memory: in each worker (level 1), and for all workers in Redis (level 2)."""

    enabled: bool = _bool(True, "Keep values of the store in memory; without it every read asks the store.")
    l2: bool = _bool(True, "Cache in Redis, too, if there is one, so that all workers share what one of them read.")
    l2_timeout_ms: int = _int(
        250, 5, 10_000, "Longest wait for Redis before the store is asked; a healthy Redis answers in a millisecond."
    )
    l1_entries: int = _int(
        50_000, 16, 10_000_000, "Sessions, profiles and roles that a worker caches, of each kind; about 300 bytes each."
    )
    recent_entries: int = _int(50, 1, 500, "Recent entries cached for a conversation; what an app shows at first.")
    recent_conversations: int = _int(5_000, 16, 1_000_000, "Conversations whose recent entries a worker caches.")
    recent_bytes: int = _int(67_108_864, 1_048_576, 17_179_869_184, "Bytes of all recent entries that a worker caches.")
    session_ttl_ms: int = _int(
        60_000, 1, 3_600_000, "Life of a session in a worker; bounds the effect of a lost revocation."
    )
    profile_ttl_ms: int = _int(
        120_000, 1, 3_600_000, "Life of a user's name in a worker; an old name does little harm."
    )
    role_ttl_ms: int = _int(60_000, 1, 3_600_000, "Life of a role in a worker; bounds what a removed member can read.")
    count_ttl_ms: int = _int(
        30_000, 1, 3_600_000, "Life of a member count in a worker; typing signals are sent or not according to it."
    )
    recent_ttl_ms: int = _int(
        60_000, 1, 3_600_000, "Life of recent entries in a worker; bounds how long a missed deletion stays visible."
    )
    l2_session_ttl_ms: int = _int(300_000, 1, 86_400_000, "Life of a session in Redis; adds to the life in a worker.")
    l2_profile_ttl_ms: int = _int(900_000, 1, 86_400_000, "Life of a name in Redis; adds to the life in a worker.")
    l2_role_ttl_ms: int = _int(300_000, 1, 86_400_000, "Life of a role in Redis; adds to the life in a worker.")
    l2_recent_ttl_ms: int = _int(
        1_800_000, 1, 86_400_000, "Life of recent entries in Redis; long, as only deletion changes them."
    )
    negative_ttl_ms: int = _int(
        2_000, 1, 60_000, "Life of the fact that something does not exist; enough to blunt a client that repeats."
    )
    unheard_ttl_ms: int = _int(
        2_000, 1, 60_000, "Longest life in a worker while no invalidation can arrive by the bus."
    )
    refresh: bool = _bool(True, "Read values in frequent use again before they expire; no request waits then.")
    warm_conversations: int = _int(500, 0, 100_000, "Most active conversations a worker loads at its start; 0: none.")
    warm_budget_ms: int = _int(5_000, 0, 600_000, "Longest time for that; the worker serves clients meanwhile.")
    prefetch_conversations: int = _int(
        5, 0, 100, "Newest conversations that a log-in loads, for an app's first screen; 0 switches it off."
    )


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """The queue of background work, such as notifications."""

    max_length: int = _int(100_000, 1, 100_000_000, "Messages of one topic that may wait; beyond, a put is refused.")
    payload_bytes: int = _int(65_536, 1, 1_048_576, "Largest payload of a message; the same as an HTTP body.")
    concurrency: int = _int(
        16, 1, 10_000, "Messages of one topic that a worker handles at once; most handlers wait for another service."
    )
    deliveries: int = _int(5, 1, 100, "Deliveries before a message is a dead letter; over a minute of tries.")
    retry_ms: int = _int(
        5_000, 1, 3_600_000, "Wait after the first failure, doubled each time; bridges a short outage."
    )
    retry_max_ms: int = _int(600_000, 1, 86_400_000, "Longest wait between two deliveries of a message.")
    lease_ms: int = _int(
        15_000, 1_000, 600_000, "A worker silent for this long loses what it handles; well above any pause."
    )
    handler_timeout_ms: int = _int(
        60_000, 10, 86_400_000, "Longest run of a handler; others of the same key wait meanwhile."
    )
    dedupe_ms: int = _int(
        86_400_000, 1_000, 2_592_000_000, "How long a dedupe id is known; a day, longer than a put is repeated."
    )
    dead_max: int = _int(
        10_000, 1, 1_000_000, "Dead letters kept for one topic; beyond, the oldest are dropped and counted."
    )
    poll_ms: int = _int(250, 1, 60_000, "Interval of the embedded queue's look for other workers' messages; one query.")


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting, in groups. Made by :func:`chatcore.config.load`."""

    server: ServerSettings = field(default_factory=ServerSettings)
    limits: Limits = field(default_factory=Limits)
    rates: Rates = field(default_factory=Rates)
    timeouts: Timeouts = field(default_factory=Timeouts)
    accounts: AccountSettings = field(default_factory=AccountSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    bus: BusSettings = field(default_factory=BusSettings)
    redis: RedisSettings = field(default_factory=RedisSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    queue: QueueSettings = field(default_factory=QueueSettings)

    @classmethod
    def default(cls) -> Settings:
        """All defaults, independent of the environment."""
        return cls()

    def worker_count(self) -> int:
        """The number of workers to run: the setting, or one per core that this process may use."""
        return self.server.workers or max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0))))

    def registration_open(self) -> bool:
        """Whether anyone may register an account; with `registration` "auto" the host decides."""
        if self.server.registration != "auto":
            return self.server.registration == "open"
        return is_loopback(self.server.host)


#: Pairs of settings, the first of which must not be larger than the second.
ORDERED: tuple[tuple[str, str], ...] = (
    ("limits.password_chars_min", "limits.password_chars_max"),
    ("limits.body_bytes", "limits.frame_bytes"),
    ("limits.outbox_low_water_bytes", "limits.outbox_bytes"),
    ("timeouts.ping_min_ms", "timeouts.ping_ms"),
    ("timeouts.ping_ms", "timeouts.ping_max_ms"),
    ("queue.retry_ms", "queue.retry_max_ms"),
    ("store.pool_min", "store.pool_max"),
    ("store.portion_entries", "store.tail_entries"),
)

#: Pairs of settings that need each other: both are set, or neither.
TOGETHER: tuple[tuple[str, str], ...] = (("store.mongodb_url", "redis.url"),)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost counts as reachable from outside."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
