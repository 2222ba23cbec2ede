"""How values and entries lie in Redis: their kinds and keys, their bytes, and the scripts that write them.

Each script touches keys of one hash slot, so that it runs in a cluster, too.

A *value* is ``generation (8) epoch (8) state (1) data``. The generation is random and made anew with each write, so
that nothing read before a change, or before Redis lost its data, matches what is there afterwards. The epoch is that
of the kind: changing it makes all values of the kind unknown at once, without searching for them. The state is
``V`` (there is such a value), ``N`` (there is none) or ``L`` (leased: a reader has the right to write it).

The *recent entries* of a conversation are a sorted set of packed entries, scored by seq, and a generation
(epoch and random) in a key of its own.
"""

from __future__ import annotations

import struct
from typing import Final

from ..store.base import Entry

#: Kinds: session tokens by hash (hex), profiles by user, roles by conversation:user, entries by conversation.
TOKEN: Final = "t"
PROFILE: Final = "u"
ROLE: Final = "r"
ENTRIES: Final = "e"
KINDS: Final = (TOKEN, PROFILE, ROLE, ENTRIES)
#: Stands for every key of a kind.
ALL: Final = "*"

#: A kind and a key.
Key = tuple[str, str]

GENERATION_BYTES: Final = 8
HEAD_BYTES: Final = 2 * GENERATION_BYTES + 1


def role_key(user: str, conv: str) -> str:
    """The key of a role (ids have no colon)."""
    return f"{conv}:{user}"


# seq, msgs, last_msg, length of t, length of sender
_ENTRY: Final = struct.Struct("<QQQBB")


def pack_entry(e: Entry) -> bytes:
    """An entry, without its conversation."""
    t, sender = e.t.encode(), e.sender.encode()
    return b"%b%b%b%b" % (_ENTRY.pack(e.seq, e.msgs, e.last_msg, len(t), len(sender)), t, sender, e.wire)


def unpack_entry(conv: str, data: bytes) -> Entry:
    """The inverse of :func:`pack_entry`.

    :raises ValueError: not an entry.
    """
    try:
        seq, msgs, last_msg, n_t, n_sender = _ENTRY.unpack_from(data)
    except struct.error as exc:
        raise ValueError(f"not an entry: {exc}") from None
    at = _ENTRY.size + n_t
    t = data[_ENTRY.size : at].decode()
    sender = data[at : at + n_sender].decode()
    return Entry(conv, seq, t, sender, msgs, last_msg, data[at + n_sender :])


#: The epoch of a kind. A new one is made if there is none, or if the server is not the one that it was made on
#: (restarted, restored, failed over): such a server may have lost deletions, so its data must not be used. Read
#: with every other read, as a client may reconnect without noticing; INFO takes some 10 us.
#: KEYS: epoch. ARGV: a random one.
EPOCH: Final = """
local server = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)') or ''
local e = redis.call('GET', KEYS[1])
if e and string.sub(e, 1, -9) == server then return string.sub(e, -8) end
redis.call('SET', KEYS[1], server .. ARGV[1])
return ARGV[1]
"""

#: Read a value; or, in the same step, lease the right to write it. A deletion ends the lease.
#: KEYS: value. ARGV: the lease (a value of state L), its life in ms.
READ_OR_LEASE: Final = """
local v = redis.call('GET', KEYS[1])
if v then return v end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return false
"""

#: Write a value over the one of the generation that was seen, and over no other.
#: KEYS: value. ARGV: that generation, the new value, its life in ms.
FILL: Final = """
local v = redis.call('GET', KEYS[1])
if not v or string.sub(v, 1, 8) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""

_INSERT: Final = """
for i = at, #ARGV, 2 do
  if redis.call('ZCOUNT', KEYS[1], ARGV[i], ARGV[i]) == 0 then redis.call('ZADD', KEYS[1], ARGV[i], ARGV[i + 1]) end
end
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -1 - keep)
redis.call('PEXPIRE', KEYS[1], life)
return 1
"""

#: Add entries that were just committed. An entry that is there stays: it may have been overwritten since.
#: KEYS: entries, their generation. ARGV: a generation to begin with if there is none, life in ms, entries kept,
#: then seq and entry of each.
ADD_COMMITTED: Final = (
    """
local life, keep, at = tonumber(ARGV[2]), tonumber(ARGV[3]), 4
if redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', life) then redis.call('DEL', KEYS[1]) end
"""
    + _INSERT
)

#: Add entries that were read from the store, unless the generation is no longer the one that was seen before.
#: KEYS: as ADD_COMMITTED. ARGV: the generation seen ('' for none), the new one, then as ADD_COMMITTED from the life on.
FILL_ENTRIES: Final = (
    """
local life, keep, at = tonumber(ARGV[3]), tonumber(ARGV[4]), 5
local seen = redis.call('GET', KEYS[2]) or ''
if seen ~= ARGV[1] then return 0 end
if seen ~= ARGV[2] then
  redis.call('DEL', KEYS[1])
  redis.call('SET', KEYS[2], ARGV[2], 'PX', life)
end
"""
    + _INSERT
)

#: Replace an entry; a reader that has read the old one can no longer fill it in.
#: KEYS: as ADD_COMMITTED. ARGV: a new generation, life in ms, entries kept, seq, entry.
OVERWRITE: Final = (
    """
local life, keep, at = tonumber(ARGV[2]), tonumber(ARGV[3]), 4
redis.call('SET', KEYS[2], ARGV[1], 'PX', life)
redis.call('ZREMRANGEBYSCORE', KEYS[1], ARGV[4], ARGV[4])
"""
    + _INSERT
)
