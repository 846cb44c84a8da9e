"""The publisher: a job's events on their way to followers.

In: events of running attempts, from the engine.  Out: each event into the job's log and onto its
channel, in one atomic step, to Redis.  Exists so that watching is never in the way: the engine hands
events over and goes on reading; what arrives while a flush is under way goes out together in the
next one, for all jobs of the process in one pipeline.

An event's id, ``<attempt>-<n>``, is its id in the log too.  Redis refuses an id that is not greater
than the last one, which makes every step safe to repeat and keeps out an attempt that a newer one
has superseded.  Where Redis lost a part of the log, one ``snapshot`` stands in for what is missing:
it takes the id of the last lost event, so that ids still have no gap.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from hashlib import sha1
from typing import Any, Final

import orjson

from keepstream.names import job_keys
from keepstream_worker.events.redis_link import LinkError, RedisLink, pack
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.values import Delta

log = get_logger()

# KEYS: log, channel, cancel request.  ARGV: attempt, n of the first event, time to live in ms, mode, events …
# Modes: 'a' append; 'v' append after verifying the log's end, since the connection is new;
# 'h' heal, the first event is a snapshot and may leave a gap before it.
_SCRIPT: Final = b"""
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
_SCRIPT_SHA: Final = sha1(_SCRIPT, usedforsecurity=False).hexdigest().encode()

#: Events of one job in one script call, so that no call holds Redis up.
_MAX_CALL: Final = 256
_CALL_TIMEOUT: Final = 5.0
#: Seconds after which events that Redis refused, while it took others, are sent again.
_REFUSED_PAUSE: Final = 1.0


class Flushed(StrEnum):
    """What became of a publication's events."""

    SENT = "sent"
    FENCED = "fenced"  #: A newer attempt has written.
    WAITING = "waiting"  #: Redis is away; they will be sent when it is back.


class Publication:
    """The events of one attempt, in order. Made by ``Publisher.open``."""

    __slots__ = (
        "_attempt",
        "_delta_head",
        "_epoch",
        "_head",
        "_on_cancel",
        "_on_fenced",
        "_pending",
        "_pending_bytes",
        "_publisher",
        "_snapshot",
        "_terminal",
        "_waiters",
        "fenced",
        "keys",
        "last_n",
        "needs_snapshot",
    )

    def __init__(
        self,
        publisher: "Publisher",
        tenant: str,
        job_id: str,
        attempt: int,
        snapshot: Callable[[], dict[str, Any]],
        on_fenced: Callable[[], None],
        on_cancel: Callable[[], None],
    ) -> None:
        keys = job_keys(tenant, job_id, publisher.prefix)
        self.keys = (keys.log.encode(), keys.channel.encode(), keys.cancel.encode())
        self.last_n = 0  #: n of the last event handed over.
        self.fenced = False
        self.needs_snapshot = False
        self._publisher = publisher
        self._attempt = attempt
        self._epoch = publisher.epoch
        self._head = {"v": 1, "job_id": job_id, "attempt": attempt}
        self._delta_head = b'{"v":1,"job_id":%b,"attempt":%d,"type":"delta","id":"%d-' % (
            orjson.dumps(job_id),
            attempt,
            attempt,
        )
        self._snapshot = snapshot
        self._on_fenced = on_fenced
        self._on_cancel = on_cancel
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._terminal = False
        self._waiters: list[asyncio.Future[None]] = []

    def send(self, type_: str, fields: dict[str, Any]) -> str:
        """Hand over one event; returns its id."""
        self.last_n += 1
        event_id = f"{self._attempt}-{self.last_n}"
        self._terminal = self._terminal or type_.startswith("job.")
        self._enqueue(self._encode(type_, event_id, fields))
        return event_id

    def send_deltas(self, deltas: Sequence[Delta]) -> None:
        """Hand over one ``delta`` event for each of ``deltas``."""
        ts = int(time.time() * 1000)
        if len(self._pending) + len(deltas) > self._publisher.merge_above:
            deltas = merge(deltas)
        n = self.last_n
        head = self._delta_head
        dumps = orjson.dumps
        pending = self._pending
        size = 0
        for choice, fields in deltas:
            n += 1
            event = b'%b%d","ts":%d,"choice":%d,"delta":%b}' % (head, n, ts, choice, dumps(fields))
            size += len(event)
            pending.append(event)
        self.last_n = n
        self._pending_bytes += size
        self._publisher.mark_dirty(self)

    def forget(self) -> None:
        """Send nothing more of this: somebody else will tell what it told, from the stored row."""
        self._pending = []
        self._pending_bytes = 0
        self._publisher.forget(self)

    def verify_before_next(self) -> None:
        """Verify the log's end before the next event."""
        self._epoch = -1

    def next_id(self, ahead: int = 1) -> str:
        """Return the id that the next event (or the one ``ahead``) will have."""
        return f"{self._attempt}-{self.last_n + ahead}"

    async def flushed(self, timeout: float) -> Flushed:
        """Wait until all events are in the log, at most ``timeout`` seconds."""
        if self._pending and not self.fenced:
            loop = asyncio.get_running_loop()
            waiter = loop.create_future()
            self._waiters.append(waiter)
            timer = loop.call_later(timeout, _wake, waiter)
            await waiter
            timer.cancel()
        if self.fenced:
            return Flushed.FENCED
        return Flushed.WAITING if self._pending else Flushed.SENT

    def _encode(self, type_: str, event_id: str, fields: dict[str, Any]) -> bytes:
        event = {**self._head, "type": type_, "id": event_id, "ts": int(time.time() * 1000), **fields}
        return orjson.dumps(event, option=orjson.OPT_NON_STR_KEYS)

    def _enqueue(self, event: bytes) -> None:
        self._pending.append(event)
        self._pending_bytes += len(event)
        self._publisher.mark_dirty(self)

    # -- for the publisher --

    @property
    def waiting(self) -> bool:
        """Whether there is anything to send."""
        return bool(self._pending)

    def command(self, epoch: int, ttl_ms: bytes) -> tuple[bytes, int]:
        """Return the script call for what is pending, and how many of the pending events it covers."""
        if self.needs_snapshot:
            return self._heal(ttl_ms)
        events = self._pending[:_MAX_CALL]
        first_n = self.last_n - len(self._pending) + 1
        mode = b"a" if self._epoch == epoch else b"v"
        return self._call(first_n, ttl_ms, mode, events), len(events)

    def _heal(self, ttl_ms: bytes) -> tuple[bytes, int]:
        """One snapshot instead of all pending events but a last one that is more than output."""
        tail = self._pending[-1:] if self._terminal else []
        n = self.last_n - len(tail)
        if n == 0:  # nothing but the last event was ever handed over
            return self._call(self.last_n, ttl_ms, b"h", tail), len(self._pending)
        snapshot = self._encode("snapshot", f"{self._attempt}-{n}", self._snapshot())
        return self._call(n, ttl_ms, b"h", [snapshot, *tail]), len(self._pending)

    def _call(self, first_n: int, ttl_ms: bytes, mode: bytes, events: list[bytes]) -> bytes:
        return pack(b"EVALSHA", _SCRIPT_SHA, 3, *self.keys, self._attempt, first_n, ttl_ms, mode, *events)

    def settle(self, answer: object, covered: int, epoch: int) -> bool:
        """Take Redis' answer to a call; returns whether anything is still pending."""
        if answer in (b"OK", b"CANCEL"):
            if answer == b"CANCEL":
                self._on_cancel()
            self._epoch = epoch
            self.needs_snapshot = False
            if covered == len(self._pending):
                self._pending = []
                self._pending_bytes = 0
            else:
                self._pending_bytes -= sum(map(len, self._pending[:covered]))
                del self._pending[:covered]
        elif answer == b"FENCED":
            self._pending = []
            self._pending_bytes = 0
            if not self.fenced:
                self.fenced = True
                self._on_fenced()
        elif answer == b"HOLE":
            self.needs_snapshot = True
        else:
            raise PublishError(str(answer)[:120])
        if not self._pending:
            for waiter in self._waiters:
                _wake(waiter)
            self._waiters.clear()
        return bool(self._pending)

    def shed_buffer(self, limit: int) -> None:
        """Redis is away: keep no more than ``limit`` bytes; a snapshot can stand in for the rest."""
        if self._pending_bytes > limit:
            self.needs_snapshot = True
            tail = self._pending[-1:] if self._terminal else []
            # Placeholders keep the count, from which ids are derived, at no cost.
            self._pending = [b""] * (len(self._pending) - len(tail)) + tail
            self._pending_bytes = sum(map(len, tail))


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


class PublishError(Exception):
    """Redis answered a call with an error, out of memory for instance."""


class Publisher:
    """Sends the events of all running attempts over one connection. Made on the event loop."""

    def __init__(self, url: str, *, prefix: str, log_ttl: float, buffer_bytes: int, merge_above: int) -> None:
        self.prefix = prefix
        self.merge_above = merge_above
        self.epoch = 0  #: Counts connections; a publication that last wrote in another one verifies the log.
        self._url = url
        self._ttl_ms = b"%d" % int(log_ttl * 1000)
        self._buffer_bytes = buffer_bytes
        self._link: RedisLink | None = None
        self._dirty: dict[Publication, None] = {}
        self._in_flight = False  #: Whether Redis has not answered the last flush yet.
        self._wake: asyncio.Future[None] | None = None
        self._task = asyncio.get_running_loop().create_task(self._run(), name="publisher")

    def open(
        self,
        tenant: str,
        job_id: str,
        attempt: int,
        snapshot: Callable[[], dict[str, Any]],
        on_fenced: Callable[[], None] = lambda: None,
        on_cancel: Callable[[], None] = lambda: None,
    ) -> Publication:
        """Begin the events of one attempt.

        Args:
            tenant: Whose job it is.
            job_id: The job.
            attempt: The attempt's number, which fences its events.
            snapshot: gives the fields of a ``snapshot`` event of the output so far; called when the
                log has a hole.
            on_fenced: called once, when Redis says that a newer attempt has written.
            on_cancel: called when Redis holds a cancel request for the job.
        """
        return Publication(self, tenant, job_id, attempt, snapshot, on_fenced, on_cancel)

    def resume(
        self, tenant: str, job_id: str, attempt: int, last_n: int, snapshot: Callable[[], dict[str, Any]]
    ) -> Publication:
        """Go on with an attempt whose first ``last_n`` events somebody else may have sent, or not."""
        publication = self.open(tenant, job_id, attempt, snapshot)
        publication.last_n = last_n
        publication.verify_before_next()
        return publication

    def mark_dirty(self, publication: Publication) -> None:
        """Remember that ``publication`` has something to send."""
        self._dirty[publication] = None
        if self._wake is not None:
            _wake(self._wake)

    def forget(self, publication: Publication) -> None:
        """Forget what ``publication`` had to send."""
        self._dirty.pop(publication, None)

    @property
    def connected(self) -> bool:
        """Whether the last flush found Redis."""
        return self._link is not None and self._link.alive

    async def close(self, timeout: float) -> None:
        """Send what is pending, at most ``timeout`` seconds, and close the connection."""
        deadline = time.monotonic() + timeout
        while (self._dirty or self._in_flight) and time.monotonic() < deadline:  # noqa: ASYNC110  # the end of the process is no hot path
            await asyncio.sleep(0.02)
        self._task.cancel()
        await asyncio.wait((self._task,), timeout=2.0)
        if self._link is not None:
            self._link.close()

    async def _run(self) -> None:
        delay = 0.05
        while True:
            if not self._dirty:
                self._wake = asyncio.get_running_loop().create_future()
                await self._wake
                self._wake = None
            try:
                if self._link is None or not self._link.alive:
                    self._link = await self._connect()
                await self._flush(self._link)
                delay = 0.05
            except (LinkError, TimeoutError, PublishError) as error:
                if self._link is not None:
                    self._link.close()
                    self._link = None
                for publication in self._dirty:
                    publication.shed_buffer(self._buffer_bytes)
                log.warning("redis_unavailable", waiting=len(self._dirty), retry_in=delay, reason=str(error))
                await asyncio.sleep(delay)
                delay = min(delay * 2, 1.0)
                for publication in self._dirty:
                    publication.shed_buffer(self._buffer_bytes)

    async def _connect(self) -> RedisLink:
        link = await RedisLink.connect(self._url, timeout=2.0)
        async with asyncio.timeout(_CALL_TIMEOUT):
            (reply,) = await link.call([pack(b"SCRIPT", b"LOAD", _SCRIPT)], 1)
        if isinstance(reply, Exception):
            link.close()
            raise PublishError(str(reply)[:120])
        self.epoch += 1
        return link

    async def _flush(self, link: RedisLink) -> None:
        """Send one call for each publication that has something, in one pipeline."""
        batch = [publication for publication in self._dirty if publication.waiting]  # some were forgotten
        self._dirty = {}
        if not batch:
            return
        self._in_flight = True
        try:
            calls = [publication.command(self.epoch, self._ttl_ms) for publication in batch]
            # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the answer.
            async with asyncio.timeout(_CALL_TIMEOUT):
                answers = await link.call([command for command, _ in calls], len(calls))
        except BaseException:
            self._dirty = dict.fromkeys(batch) | self._dirty
            raise
        finally:
            self._in_flight = False
        refused: dict[Publication, PublishError] = {}
        for publication, (_, covered), answer in zip(batch, calls, answers, strict=True):
            try:
                if publication.settle(answer, covered, self.epoch):
                    self._dirty[publication] = None
            except PublishError as error:
                refused[publication] = error
        if len(refused) == len(batch):  # as far as we can see, it is nobody's own fault
            self._dirty = dict.fromkeys(refused) | self._dirty
            raise refused[batch[0]]
        for publication, refusal in refused.items():
            log.warning("events_refused", log_key=publication.keys[0].decode(), reason=str(refusal))
            publication.shed_buffer(self._buffer_bytes)
            asyncio.get_running_loop().call_later(_REFUSED_PAUSE, self.mark_dirty, publication)


def merge(deltas: Sequence[Delta]) -> list[Delta]:
    """Join neighbours that add text of one kind to one choice; the text that results is the same."""
    merged: list[Delta] = []
    kind: tuple[int, str] | None = None
    pieces: list[str] = []
    for choice, fields in deltas:
        if len(fields) == 1 and "tool_calls" not in fields:
            ((name, piece),) = fields.items()
            if (choice, name) == kind:
                pieces.append(str(piece))
                continue
            _close_run(merged, kind, pieces)
            kind, pieces = (choice, name), [str(piece)]
        else:
            _close_run(merged, kind, pieces)
            kind, pieces = None, []
            merged.append(Delta(choice, fields))
    _close_run(merged, kind, pieces)
    return merged


def _close_run(merged: list[Delta], kind: tuple[int, str] | None, pieces: list[str]) -> None:
    if kind is not None:
        merged.append(Delta(kind[0], {kind[1]: "".join(pieces)}))
