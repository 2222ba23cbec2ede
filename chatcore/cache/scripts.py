"""What runs inside Redis. Each script touches keys of one slot, so that a cluster takes it too.

A *record* is ``generation (8) epoch (8) state (1) value``. The generation is random and made anew
with each write, so nothing that was read before a change, or before Redis lost its data, can match
what is there afterwards. The epoch is that of its kind: changing it makes all records of the kind
unknown at once, without looking for them.
"""

from __future__ import annotations

from typing import Final

GENERATION_BYTES: Final = 8
HEAD_BYTES: Final = 2 * GENERATION_BYTES + 1

#: The epoch of a kind: made anew if there is none, or if the server is another one than it was made on
#: (restarted, restored, failed over). Such a server may have lost deletions, so what it has is not
#: believed. Asked with every read, as a client that reconnects need not notice; INFO takes some 10 us.
#: KEYS: epoch. ARGV: a random one.
EPOCH: Final = """
local server = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)') or ''
local e = redis.call('GET', KEYS[1])
if e and string.sub(e, 1, -9) == server then return string.sub(e, -8) end
redis.call('SET', KEYS[1], server .. ARGV[1])
return ARGV[1]
"""

#: A record; or, in the same step, the right to write it (a lease, which a deletion takes away).
#: KEYS: record. ARGV: the lease (a record of state L), its life in ms.
LOOK: Final = """
local v = redis.call('GET', KEYS[1])
if v then return v end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return false
"""

#: Write a record over the one of a generation that was seen, and over no other.
#: KEYS: record. ARGV: that generation, the record, its life in ms.
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

#: Entries that were just committed. An entry that is there stays: it may have been overwritten since.
#: KEYS: tail, its generation. ARGV: a generation (epoch and random) for a new tail, life in ms, entries kept,
#: then seq and entry of each.
ADD: Final = (
    """
local life, keep, at = tonumber(ARGV[2]), tonumber(ARGV[3]), 4
if redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', life) then redis.call('DEL', KEYS[1]) end
"""
    + _INSERT
)

#: Entries that were read from the store, unless the tail is not of the generation that was seen before.
#: KEYS: as ADD. ARGV: the generation seen ('' for none), the one to be, then as ADD.
GROW: Final = (
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

#: Another body for an entry: whoever has read the old one can no longer write it.
#: KEYS: as ADD. ARGV: a new generation, life in ms, entries kept, seq, entry.
OVERWRITE: Final = (
    """
local life, keep, at = tonumber(ARGV[2]), tonumber(ARGV[3]), 4
redis.call('SET', KEYS[2], ARGV[1], 'PX', life)
redis.call('ZREMRANGEBYSCORE', KEYS[1], ARGV[4], ARGV[4])
"""
    + _INSERT
)
