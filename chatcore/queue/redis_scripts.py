"""The data of the queue on Redis: the names of its keys, and the Lua scripts. Every change is one script, so it
happens as a whole or not at all.

All keys of a topic share one hash tag, so in a Cluster they are in one slot and one script reaches them:

    {P:q:T}:s:<n>       stream of partition n: i id, k key, p payload, c created (Unix ms)
    {P:q:T}:lease:<n>   the holder of partition n: "<consumer>:<fence>", expires
    {P:q:T}:wake:<n>    a list with one element while there are new messages for the holder
    {P:q:T}:consumers   sorted set of consumers by the time at which they count as gone (Unix ms)
    {P:q:T}:fence       the last fencing number
    {P:q:T}:delayed     sorted set of delayed messages by due time, member "<n-th>:<id>"; :later their contents
    {P:q:T}:dead        stream of dead letters: as above, n deliveries, e error, t when (Unix ms)
    {P:q:T}:counts      hash: retries, dead_lost, delayed (the n-th)
    {P:q:T}:once:<h>    id of the message that was put with a dedupe id, expires

The count of a message's deliveries is the delivery count of the group's pending entries: 0 after the read, set
by BEGIN when a handler begins. The group has a single consumer name, which the holder of the partition uses: the
lease decides who may touch the partition, and every script that does so checks the lease first. So entries need
not be claimed from other consumers, and a consumer that died leaves no name behind.

Every script is idempotent: FETCH continues after the last entry that the holder knows, BEGIN sets a number,
DONE and DEAD_LETTER change only an entry that is still there. The exception is PUT without a dedupe id.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, field
from typing import Final

GROUP: Final = "workers"
#: Reply to a consumer that no longer holds the partition.
LOST: Final = b"lost"
#: Delayed messages made ready in one call: Redis has one thread.
DUE_BATCH: Final = 100


class TopicKeys:
    """The names of a topic's keys."""

    def __init__(self, prefix: str, topic: str, partitions: int) -> None:
        self.base = base = f"{{{prefix}:q:{topic}}}:"
        self.partitions = partitions
        self.streams = [f"{base}s:{n}" for n in range(partitions)]
        self.leases = [f"{base}lease:{n}" for n in range(partitions)]
        self.wakes = [f"{base}wake:{n}" for n in range(partitions)]
        self.consumers, self.fence, self.delayed, self.later, self.dead, self.counts = (
            base + name for name in ("consumers", "fence", "delayed", "later", "dead", "counts")
        )

    def partition(self, key: str) -> int:
        """The partition of a message's key."""
        return zlib.crc32(key.encode()) % self.partitions

    def once(self, key: str, dedupe_id: str) -> str:
        """The key that remembers a dedupe id. Hashed, since both may be long; the length keeps them apart."""
        text = f"{len(key)}:{key}{dedupe_id}".encode()
        return f"{self.base}once:{hashlib.blake2b(text, digest_size=16).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Script:
    """A script and the digest that Redis knows it by."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", hashlib.sha1(self.text.encode()).hexdigest())


_NOW: Final = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
"""
_WAKE: Final = """
local function wake(key) if redis.call('EXISTS', key) == 0 then redis.call('RPUSH', key, '1') end end
"""
_FENCED: Final = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'lost' end\n"

# KEYS once, delayed, later, counts, wake, stream, all streams
# ARGV id, key, payload, delay ms, dedupe ms (0: none), most messages, partition
# -> {0, id}, {1, id of the first put}, {2, length: full}
PUT: Final = Script(
    _NOW
    + _WAKE
    + """
local dedupe_ms = tonumber(ARGV[5])
if dedupe_ms > 0 then
  local first = redis.call('GET', KEYS[1])
  if first then return {1, first} end
end
local length = redis.call('ZCARD', KEYS[2])
for i = 7, #KEYS do length = length + redis.call('XLEN', KEYS[i]) end
if length >= tonumber(ARGV[6]) then return {2, length} end
local created = string.format('%.0f', now)
if tonumber(ARGV[4]) > 0 then
  local nth = redis.call('HINCRBY', KEYS[4], 'delayed', 1)
  local member = string.format('%016.0f:%s', nth, ARGV[1])
  redis.call('ZADD', KEYS[2], now + ARGV[4], member)
  redis.call('HSET', KEYS[3], member, cmsgpack.pack({ARGV[1], ARGV[2], ARGV[3], created, ARGV[7]}))
else
  redis.call('XADD', KEYS[6], '*', 'i', ARGV[1], 'k', ARGV[2], 'p', ARGV[3], 'c', created)
end
wake(KEYS[5])
if dedupe_ms > 0 then redis.call('SET', KEYS[1], ARGV[1], 'PX', dedupe_ms) end
return {0, ARGV[1]}
"""
)

# KEYS consumers, fence, leases, streams
# ARGV consumer, lease ms, partitions, group, first partition to try, 1: it stops, and takes no more
# -> {share, {partition, lease, fence}, ...}: all partitions that this consumer holds now
HOLD: Final = Script(
    _NOW
    + """
local me, lease_ms, n = ARGV[1] .. ':', tonumber(ARGV[2]), tonumber(ARGV[3])
local share = 0
if ARGV[6] == '1' then redis.call('ZREM', KEYS[1], ARGV[1])
else
  redis.call('ZADD', KEYS[1], now + lease_ms, ARGV[1])
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
  share = math.ceil(n / redis.call('ZCARD', KEYS[1]))
end
local held, free = {}, {}
for i = 0, n - 1 do
  local p = (i + ARGV[5]) % n
  local lease = redis.call('GET', KEYS[3 + p])
  if not lease then free[#free + 1] = p
  elseif string.sub(lease, 1, #me) == me then
    redis.call('PEXPIRE', KEYS[3 + p], lease_ms)
    held[#held + 1] = {p, lease, string.sub(lease, #me + 1)}
  end
end
for _, p in ipairs(free) do
  if #held >= share then break end
  -- Higher than any before, also when Redis has lost them: by its clock in microseconds.
  local last = tonumber(redis.call('GET', KEYS[2]) or '0')
  local fence = string.format('%.0f', math.max(last + 1, t[1] * 1000000 + t[2]))
  redis.call('SET', KEYS[2], fence)
  redis.call('SET', KEYS[3 + p], me .. fence, 'PX', lease_ms)
  local made = redis.pcall('XGROUP', 'CREATE', KEYS[3 + n + p], ARGV[4], '0', 'MKSTREAM')
  if made.err and not string.find(made.err, 'BUSYGROUP') then return made end
  held[#held + 1] = {p, me .. fence, fence}
end
table.insert(held, 1, share)
return held
"""
)

# KEYS lease   ARGV lease
RELEASE: Final = Script(_FENCED + "redis.call('DEL', KEYS[1]) return 'ok'\n")

# KEYS consumers, leases   ARGV consumer
LEAVE: Final = Script("""
redis.call('ZREM', KEYS[1], ARGV[1])
local me = ARGV[1] .. ':'
for i = 2, #KEYS do
  local lease = redis.call('GET', KEYS[i])
  if lease and string.sub(lease, 1, #me) == me then redis.call('DEL', KEYS[i]) end
end
return 'ok'
""")

# KEYS lease, stream   ARGV lease, group, last entry known, most
# -> {1 if there may be more, {entry, key, deliveries}, ...}, or 'lost'
# First the entries that an earlier holder had read: they are older than those that are unread.
FETCH: Final = Script(
    _FENCED
    + """
local stream, group, most = KEYS[2], ARGV[2], tonumber(ARGV[4])
local found = {}
local pending = redis.call('XPENDING', stream, group, '(' .. ARGV[3], '+', most)
for _, one in ipairs(pending) do
  local entry = redis.call('XRANGE', stream, one[1], one[1])[1]
  if entry then found[#found + 1] = {one[1], entry[2][4], one[4]}
  else redis.call('XACK', stream, group, one[1]) end
end
local left = most - #pending
if left > 0 then
  local read = redis.call('XREADGROUP', 'GROUP', group, 'holder', 'COUNT', left, 'STREAMS', stream, '>')
  local entries = read and read[1][2] or {}
  for _, entry in ipairs(entries) do
    redis.call('XCLAIM', stream, group, 'holder', 0, entry[1], 'RETRYCOUNT', 0, 'JUSTID')
    found[#found + 1] = {entry[1], entry[2][4], 0}
  end
  left = left - #entries
end
table.insert(found, 1, left == 0 and 1 or 0)
return found
"""
)

# KEYS lease, stream, counts   ARGV lease, group, then entry, delivery for each
# -> for each {id, payload, created} or {} (it was deleted by hand), or 'lost'
BEGIN: Final = Script(
    _FENCED
    + """
local begun = {}
for i = 3, #ARGV, 2 do
  local entry = redis.call('XRANGE', KEYS[2], ARGV[i], ARGV[i])[1]
  if entry then
    redis.call('XCLAIM', KEYS[2], ARGV[2], 'holder', 0, ARGV[i], 'RETRYCOUNT', ARGV[i + 1], 'JUSTID')
    if ARGV[i + 1] ~= '1' then redis.call('HINCRBY', KEYS[3], 'retries', 1) end
    begun[#begun + 1] = {entry[2][2], entry[2][6], entry[2][8]}
  else
    redis.call('XACK', KEYS[2], ARGV[2], ARGV[i])
    begun[#begun + 1] = {}
  end
end
return begun
"""
)

# KEYS lease, stream   ARGV lease, group, entry   -> 'ok' or 'lost'
DONE: Final = Script(
    _FENCED
    + """
redis.call('XACK', KEYS[2], ARGV[2], ARGV[3])
redis.call('XDEL', KEYS[2], ARGV[3])
return 'ok'
"""
)

# KEYS lease, stream   ARGV lease, group, entry, deliveries to set   -> 'ok' or 'lost'
GIVE_BACK: Final = Script(
    _FENCED
    + """
redis.call('XCLAIM', KEYS[2], ARGV[2], 'holder', 0, ARGV[3], 'RETRYCOUNT', ARGV[4], 'JUSTID')
return 'ok'
"""
)

# KEYS lease, stream, dead, counts   ARGV lease, group, entry, deliveries, error, most dead letters
# -> 'ok' or 'lost'.  The dead letter is written before the entry is acknowledged: a script that fails in the middle
# is not rolled back, and may then leave the message twice but never nowhere.
DEAD_LETTER: Final = Script(
    _FENCED
    + _NOW
    + """
local entry = redis.call('XRANGE', KEYS[2], ARGV[3], ARGV[3])[1]
if entry and #redis.call('XPENDING', KEYS[2], ARGV[2], ARGV[3], ARGV[3], 1) > 0 then
  local f = entry[2]
  redis.call('XADD', KEYS[3], '*', 'i', f[2], 'k', f[4], 'p', f[6], 'c', f[8],
    'n', ARGV[4], 'e', ARGV[5], 't', string.format('%.0f', now))
  local lost = redis.call('XTRIM', KEYS[3], 'MAXLEN', ARGV[6])
  if lost > 0 then redis.call('HINCRBY', KEYS[4], 'dead_lost', lost) end
end
redis.call('XACK', KEYS[2], ARGV[2], ARGV[3])
redis.call('XDEL', KEYS[2], ARGV[3])
return 'ok'
"""
)

# KEYS delayed, later, wakes, streams   ARGV partitions, most   -> ms until the next is due; -1: there is none
DUE: Final = Script(
    _NOW
    + _WAKE
    + """
local n = tonumber(ARGV[1])
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[2])) do
  local packed = redis.call('HGET', KEYS[2], member)
  if packed then
    local m = cmsgpack.unpack(packed)
    redis.call('XADD', KEYS[3 + n + m[5]], '*', 'i', m[1], 'k', m[2], 'p', m[3], 'c', m[4])
    wake(KEYS[3 + m[5]])
  end
  redis.call('ZREM', KEYS[1], member)
  redis.call('HDEL', KEYS[2], member)
end
local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if #first == 0 then return -1 end
return math.max(0, first[2] - now)
"""
)

# KEYS dead, stream, wake   ARGV dead entry   -> 1, or 0: it is gone
RETRY: Final = Script(
    _WAKE
    + """
local entry = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not entry then return 0 end
local f = entry[2]
redis.call('XADD', KEYS[2], '*', 'i', f[2], 'k', f[4], 'p', f[6], 'c', f[8])
wake(KEYS[3])
redis.call('XDEL', KEYS[1], ARGV[1])
return 1
"""
)

# KEYS delayed, dead, counts, streams   -> depth, delayed, age in ms of the oldest ready, retries, dead, dead_lost
STATS: Final = Script(
    _NOW
    + """
local delayed = redis.call('ZCARD', KEYS[1])
local depth, oldest = delayed, now
for i = 4, #KEYS do
  depth = depth + redis.call('XLEN', KEYS[i])
  local first = redis.call('XRANGE', KEYS[i], '-', '+', 'COUNT', 1)[1]
  if first then oldest = math.min(oldest, tonumber(string.match(first[1], '^%d+'))) end
end
local counts = redis.call('HMGET', KEYS[3], 'retries', 'dead_lost')
return {depth, delayed, now - oldest, tonumber(counts[1] or '0'), redis.call('XLEN', KEYS[2]),
  tonumber(counts[2] or '0')}
"""
)
