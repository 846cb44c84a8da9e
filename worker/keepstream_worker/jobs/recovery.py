"""Recovery: what the log still knows of an attempt whose worker died, and what it cost.

In: the attempt that follows, from the engine; events, from the job's log.  Out: the lost attempt's usage
to the store, and its output to the engine: whole, it is stored and not paid for again.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Final

import redis.asyncio
from redis.exceptions import RedisError

from keepstream.events import AttemptFinished, ChoiceSnapshot, Snapshot, parse_event
from keepstream.extras import LEFT_OUT, omissions
from keepstream.names import job_keys
from keepstream.results import Choice, Usage
from keepstream.transcript import Transcript
from keepstream_worker import store
from keepstream_worker.jobs.attempt import Attempt
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.telemetry.outages import Outage, Server, redis_reason

log = get_logger()

#: Entries read at once: a delta has some 200 bytes, one with extras up to a few hundred thousand.
_PAGE: Final = 250
#: Earlier attempts that are looked at: a recovery may itself have died.
_LOOK_BACK: Final = 3
#: Seconds to wait for a Redis that cannot be read: as long as a fail-over takes.
_PATIENCE: Final = 10.0
_PAUSE: Final = 1.0  #: Seconds between two tries.
#: What Redis says that waiting does not change soon.
_STAYING: Final = frozenset({"WRONGTYPE", "NOPERM"})


@dataclass(frozen=True, slots=True)
class PartialOutput:
    """What is left of an attempt whose worker died."""

    attempt: int
    choices: list[Choice]
    usage: Usage  #: As the provider reported it, else estimated.
    finished: bool  #: Whether the provider's stream had ended well; then ``choices`` are whole.
    provider_details: dict[str, Any] | None  #: What the provider said of itself, if it had ended well.


class Recovery:
    """Recovers output of lost attempts for the engine. Used on the event loop."""

    def __init__(self, client: redis.asyncio.Redis, prefix: str, database: WorkerDatabase) -> None:
        self._client = client
        self._prefix = prefix
        self._database = database
        self._outage = Outage(Server.REDIS, "read the log of a lost attempt")

    async def look_back(self, attempt: Attempt) -> PartialOutput | None:
        """Return what the newest readable attempt before ``attempt`` left, after its usage is stored."""
        number = attempt.claim.attempt
        give_up_at = time.monotonic() + _PATIENCE
        for earlier in range(number - 1, max(number - 1 - _LOOK_BACK, 0), -1):
            partial = await self._read_log(attempt, earlier, give_up_at)
            if partial is not None:
                late_usage = store.LateUsage(attempt.key, earlier, partial.usage)
                await self._database.persist(store.record_usage, late_usage)
                return partial
        return None

    async def _read_log(self, attempt: Attempt, earlier: int, give_up_at: float) -> PartialOutput | None:
        """Return what the log holds of attempt ``earlier``; None if it is gone, has a hole, or cannot be read."""
        tenant, job_id = attempt.key
        key = job_keys(tenant, job_id, self._prefix).log
        transcript = Transcript()
        usage: Usage | None = None
        start, end = f"{earlier}-0", f"({earlier + 1}-0"
        try:
            while True:
                entries = await self._read_page(key, start, end, give_up_at)
                for entry_id, fields in entries:
                    event = parse_event(fields[b"event"])
                    if isinstance(event, AttemptFinished | Snapshot):
                        usage = event.usage
                    transcript.apply(event)
                    start = f"({entry_id.decode()}"
                if len(entries) < _PAGE:
                    break
        except Exception as error:  # noqa: BLE001  # whatever is wrong with the log, the attempt can be repeated
            log.warning("log_unreadable", tenant=tenant, job_id=job_id, attempt=earlier, reason=redis_reason(error))
            return None
        if transcript.last is None or transcript.behind:
            return None
        choices = [_recovered(choice) for choice in transcript.choices]
        spent = usage or attempt.estimated_usage(choices)
        return PartialOutput(earlier, choices, spent, transcript.finished, transcript.provider_details)

    async def _read_page(self, key: str, start: str, end: str, give_up_at: float) -> list[Any]:
        """Wait for Redis for a while: repeating an attempt is paid for."""
        while True:
            try:
                entries: list[Any] = await self._client.xrange(key, start, end, count=_PAGE)  # type: ignore[assignment]
            except (RedisError, OSError) as error:
                self._outage.redis_failed(error)
                if redis_reason(error) in _STAYING or time.monotonic() > give_up_at:
                    raise
                await asyncio.sleep(_PAUSE)
            else:
                self._outage.worked()
                return entries


def _recovered(snapshot: ChoiceSnapshot) -> Choice:
    """Return a choice as the log has it; what events omit is missing, and the choice says so."""
    choice = snapshot.to_choice()
    missing = omissions(choice.extra)
    if not missing or choice.extra is None:
        return choice
    left_out = {
        name: f"not whole: {size} bytes are lost, since the worker died before they were stored, and events omit what"
        " is larger than KEEPSTREAM_LIVE_EXTRA_BYTES"
        for name, size in missing.items()
    }
    known = choice.extra.get(LEFT_OUT)
    extra = {**choice.extra, LEFT_OUT: {**left_out, **(known if isinstance(known, dict) else {})}}
    return choice.model_copy(update={"extra": extra})
