"""A publication: the events of one attempt, in order, until Redis has them.

In: events, from the engine or the announcer; Redis' answers, from the publisher.  Out: packed calls of the
log script, to the publisher; what Redis says of the attempt, to two callbacks.

Where Redis lost a part of the log, one ``snapshot`` stands in for what is missing: it takes the id of the
last lost event, so that ids still have no gap.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, Final, Protocol

import orjson

from keepstream.names import job_keys
from keepstream_worker.events import log_script
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.values import Delta

log = get_logger()

#: Events of one job in one script call, so that no call holds Redis up.
_MAX_CALL: Final = 256
_MAX_CALL_BYTES: Final = 1024 * 1024  #: Of more than one event.
_TEXTS: Final = frozenset({"content", "reasoning", "refusal"})  #: Fields of a delta that are texts.


class PublishError(Exception):
    """Redis answered a call with an error, out of memory for instance."""


class FlushResult(StrEnum):
    """What became of a publication's events."""

    SENT = "sent"
    FENCED = "fenced"  #: A newer attempt has written.
    PENDING = "pending"  #: Redis is away; they will be sent when it is back.


class Outbox(Protocol):
    """What a publication needs of the publisher."""

    prefix: str  #: Of the names in Redis.
    epoch: int  #: Counts connections; a publication that last wrote in another one verifies the log.
    merge_above: int  #: Pending events above which neighbouring deltas are merged.

    def mark_dirty(self, publication: "Publication") -> None:
        """Remember that ``publication`` has something to send."""

    def discard(self, publication: "Publication") -> None:
        """Forget that ``publication`` had something to send."""


class Publication:
    """The events of one attempt, in order. Made by ``Publisher.open`` and ``Publisher.resume``."""

    __slots__ = (
        "_abandoned",
        "_attempt",
        "_delta_head",
        "_epoch",
        "_head",
        "_on_cancel",
        "_on_fenced",
        "_outbox",
        "_pending",
        "_pending_bytes",
        "_snapshot",
        "_terminal",
        "_waiters",
        "fenced",
        "keys",
        "last_n",
        "needs_snapshot",
        "refused",
    )

    def __init__(
        self,
        outbox: Outbox,
        tenant: str,
        job_id: str,
        attempt: int,
        snapshot: Callable[[], dict[str, Any]],
        on_fenced: Callable[[], None],
        on_cancel: Callable[[], None],
    ) -> None:
        keys = job_keys(tenant, job_id, outbox.prefix)
        self.keys = (keys.log.encode(), keys.channel.encode(), keys.cancel.encode())
        self.last_n = 0  #: n of the last event handed over.
        self.fenced = False
        self.needs_snapshot = False
        self.refused = False  #: Whether Redis refused the last call, while it took others.
        self._abandoned = False
        self._outbox = outbox
        self._attempt = attempt
        self._epoch = outbox.epoch
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
        """Hand over one event; return its id."""
        self.last_n += 1
        event_id = f"{self._attempt}-{self.last_n}"
        self._terminal = self._terminal or type_.startswith("job.")
        self._enqueue(self._encode(type_, event_id, fields))
        return event_id

    def send_deltas(self, deltas: Sequence[Delta]) -> None:
        """Hand over one ``delta`` event for each of ``deltas``."""
        if self._abandoned:
            self.last_n += len(deltas)
            return
        ts = int(time.time() * 1000)
        if len(self._pending) + len(deltas) > self._outbox.merge_above:
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
        self._outbox.mark_dirty(self)

    def discard(self) -> None:
        """Send nothing more: a sweeper will publish the end of the job from the stored row."""
        self._pending = []
        self._pending_bytes = 0
        self._outbox.discard(self)

    def fall_back(self) -> bool:
        """Send a snapshot next, because a defect was met; return whether there is anything left to send.

        If it was met by the snapshot, nothing more is sent: a sweeper will publish the end of the job.
        """
        if self.needs_snapshot:
            self._abandoned = True
            self.discard()
            self._wake_waiters()
        self.needs_snapshot = True
        return not self._abandoned

    def verify_before_next(self) -> None:
        """Verify the log's end before the next event."""
        self._epoch = -1

    def next_id(self, ahead: int = 1) -> str:
        """Return the id that the next event will have, or the one ``ahead`` events from now."""
        return f"{self._attempt}-{self.last_n + ahead}"

    async def wait_flushed(self, timeout: float) -> FlushResult:
        """Wait until all events are in the log, at most ``timeout`` seconds."""
        if self._pending and not self.fenced and not self._abandoned:
            loop = asyncio.get_running_loop()
            waiter = loop.create_future()
            self._waiters.append(waiter)
            timer = loop.call_later(timeout, _wake, waiter)
            await waiter
            timer.cancel()
        if self.fenced:
            return FlushResult.FENCED
        return FlushResult.PENDING if self._pending or self._abandoned else FlushResult.SENT

    def _encode(self, type_: str, event_id: str, fields: dict[str, Any]) -> bytes:
        event = {**self._head, "type": type_, "id": event_id, "ts": int(time.time() * 1000), **fields}
        return orjson.dumps(event, option=orjson.OPT_NON_STR_KEYS)

    def _enqueue(self, event: bytes) -> None:
        if self._abandoned:
            return
        self._pending.append(event)
        self._pending_bytes += len(event)
        self._outbox.mark_dirty(self)

    # -- for the publisher --

    @property
    def has_pending(self) -> bool:
        """Whether there is anything to send."""
        return bool(self._pending)

    def next_call(self, epoch: int, ttl_ms: bytes) -> tuple[bytes, int]:
        """Return the script call for what is pending, and how many of the pending events it covers."""
        if self.needs_snapshot:
            return self._heal(ttl_ms)
        events = self._next_events()
        first_n = self.last_n - len(self._pending) + 1
        mode = log_script.APPEND if self._epoch == epoch else log_script.VERIFY
        return log_script.pack_call(self.keys, self._attempt, first_n, ttl_ms, mode, events), len(events)

    def _next_events(self) -> list[bytes]:
        """Return as many pending events as one call may carry, at least one."""
        events = self._pending[:_MAX_CALL]
        if self._pending_bytes > _MAX_CALL_BYTES:
            size = 0
            for position, event in enumerate(events):
                size += len(event)
                if position and size > _MAX_CALL_BYTES:
                    return events[:position]
        return events

    def _heal(self, ttl_ms: bytes) -> tuple[bytes, int]:
        """Send one snapshot in place of all pending events but the terminal one."""
        tail = self._pending[-1:] if self._terminal else []
        n = self.last_n - len(tail)
        if n == 0:  # nothing but the terminal event was ever handed over
            n, events = self.last_n, tail
        else:
            events = [self._encode("snapshot", f"{self._attempt}-{n}", self._snapshot()), *tail]
        call = log_script.pack_call(self.keys, self._attempt, n, ttl_ms, log_script.HEAL, events)
        return call, len(self._pending)

    def handle_answer(self, answer: object, covered: int, epoch: int) -> bool:
        """Take Redis' answer to a call that covered so many events; return whether anything is still pending.

        Raises:
            PublishError: Redis refused the call.
        """
        if answer in (log_script.OK, log_script.CANCEL):
            if answer == log_script.CANCEL:
                self._tell(self._on_cancel)
            self._epoch = epoch
            self.needs_snapshot = self.refused = False
            if covered == len(self._pending):
                self._pending = []
                self._pending_bytes = 0
            else:
                self._pending_bytes -= sum(map(len, self._pending[:covered]))
                del self._pending[:covered]
        elif answer == log_script.FENCED:
            self._pending = []
            self._pending_bytes = 0
            if not self.fenced:
                self.fenced = True
                self._tell(self._on_fenced)
        elif answer == log_script.HOLE:
            self.needs_snapshot = True
        else:
            raise PublishError(str(answer)[:120])
        if not self._pending:
            self._wake_waiters()
        return bool(self._pending)

    def _tell(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:  # what it is told of is the job's business; the events of all jobs go on
            log.exception("events_defect", log_key=self.keys[0].decode())

    def _wake_waiters(self) -> None:
        for waiter in self._waiters:
            _wake(waiter)
        self._waiters.clear()

    def shed_buffer(self, limit: int) -> None:
        """Redis is away: keep no more than ``limit`` bytes of events; a snapshot can stand in for the rest."""
        if self._pending_bytes > limit:
            self.needs_snapshot = True
            tail = self._pending[-1:] if self._terminal else []
            # Placeholders keep the count, from which ids are derived, at no cost.
            self._pending = [b""] * (len(self._pending) - len(tail)) + tail
            self._pending_bytes = sum(map(len, tail))


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


def merge(deltas: Sequence[Delta]) -> list[Delta]:
    """Join neighbours that add text of one kind to one choice; the text that results is the same."""
    merged: list[Delta] = []
    kind: tuple[int, str] | None = None
    pieces: list[str] = []
    for choice, fields in deltas:
        if len(fields) == 1 and fields.keys() <= _TEXTS:
            ((name, piece),) = fields.items()
            if (choice, name) == kind:
                pieces.append(str(piece))
                continue
            _append_merged(merged, kind, pieces)
            kind, pieces = (choice, name), [str(piece)]
        else:
            _append_merged(merged, kind, pieces)
            kind, pieces = None, []
            merged.append(Delta(choice, fields))
    _append_merged(merged, kind, pieces)
    return merged


def _append_merged(merged: list[Delta], kind: tuple[int, str] | None, pieces: list[str]) -> None:
    if kind is not None:
        merged.append(Delta(kind[0], {kind[1]: "".join(pieces)}))
