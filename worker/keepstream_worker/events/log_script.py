"""The log script: appends a job's events to its log and publishes them, in one atomic step in Redis.

In: events of one attempt and the number of the first one, from a publication.  Out: one packed command; its
answer is ``OK``, ``CANCEL``, ``FENCED`` or ``HOLE``.

An event's id, ``<attempt>-<n>``, is its id in the log too.  Redis refuses an id that is not greater
than the last one, which makes every step safe to repeat and keeps out an attempt that a newer one
has superseded.
"""

from collections.abc import Sequence
from hashlib import sha1
from typing import Final

from keepstream_worker.events.redis_link import pack

APPEND: Final = b"a"
VERIFY: Final = b"v"  #: Append after verifying the log's end, because the connection is new.
HEAL: Final = b"h"  #: The first event is a snapshot and may leave a gap before it.

OK: Final = b"OK"
CANCEL: Final = b"CANCEL"  #: The events are in the log, and there is a cancel request for the job.
FENCED: Final = b"FENCED"  #: A newer attempt has written.
HOLE: Final = b"HOLE"  #: The log lacks what came before: a snapshot is needed.

# KEYS: log, channel, cancel request.  ARGV: attempt, n of the first event, time to live in ms, mode, events …
SCRIPT: Final = b"""
local log, channel = KEYS[1], KEYS[2]
local attempt, n, ttl, mode = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local function last()
  local entry = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
  if not entry then return 0, 0 end
  local dash = string.find(entry[1], '-', 1, true)
  return tonumber(string.sub(entry[1], 1, dash - 1)), tonumber(string.sub(entry[1], dash + 1))
end
if n > 1 and mode ~= 'h' then
  if redis.call('PEXPIRE', log, ttl) == 0 then return 'HOLE' end
  if mode == 'v' then
    local last_attempt, last_n = last()
    if last_attempt > tonumber(attempt) then return 'FENCED' end
    if last_attempt < tonumber(attempt) or last_n < n - 1 then return 'HOLE' end
  end
end
for i = 5, #ARGV do
  local added = redis.pcall('XADD', log, attempt .. '-' .. n, 'event', ARGV[i])
  if type(added) == 'table' and added.err then
    local last_attempt, last_n = last()
    if last_attempt > tonumber(attempt) then return 'FENCED' end
    if last_attempt ~= tonumber(attempt) or last_n < n then return added end
  else
    redis.call('PUBLISH', channel, ARGV[i])
  end
  n = n + 1
end
if mode == 'h' or ARGV[2] == '1' then redis.call('PEXPIRE', log, ttl) end
if (mode ~= 'a' or ARGV[2] == '1') and redis.call('EXISTS', KEYS[3]) == 1 then return 'CANCEL' end
return 'OK'
"""
SCRIPT_SHA: Final = sha1(SCRIPT, usedforsecurity=False).hexdigest().encode()


def pack_call(
    keys: tuple[bytes, bytes, bytes], attempt: int, first_n: int, ttl_ms: bytes, mode: bytes, events: Sequence[bytes]
) -> bytes:
    """Return the command that runs the script.

    Args:
        keys: The job's log, channel and cancel request.
        attempt: The attempt's number.
        first_n: Number of the first event within the attempt, from 1.
        ttl_ms: Milliseconds that the log outlives its last event.
        mode: ``APPEND``, ``VERIFY`` or ``HEAL``.
        events: The events, encoded.
    """
    return pack(b"EVALSHA", SCRIPT_SHA, 3, *keys, attempt, first_n, ttl_ms, mode, *events)
