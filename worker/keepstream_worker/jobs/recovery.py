"""Recovery: what the log still knows of an attempt whose worker died, and what it cost.

In: the attempt that follows, from the engine; events, from the job's log.  Out: the lost attempt's usage
to the store, and its output to the engine: whole, it is stored and not paid for again.
"""

from dataclasses import dataclass
from typing import Any, Final

import redis.asyncio
from redis.exceptions import RedisError

from keepstream.events import AttemptFinished, Snapshot, parse_event
from keepstream.names import job_keys
from keepstream.results import Choice, Usage
from keepstream.transcript import Transcript
from keepstream_worker import store
from keepstream_worker.jobs.attempt import Attempt
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.telemetry.logs import get_logger

log = get_logger()

#: Entries read at once; a delta has some 200 bytes.
_PAGE: Final = 1000
#: Earlier attempts that are looked at: a recovery may itself have died.
_LOOK_BACK: Final = 3


@dataclass(frozen=True, slots=True)
class PartialOutput:
    """What is left of an attempt whose worker died."""

    attempt: int
    choices: list[Choice]
    usage: Usage  #: As the provider reported it, else estimated.
    finished: bool  #: Whether the provider's stream had ended well; then ``choices`` are whole.


class Recovery:
    """Recovers output of lost attempts for the engine. Used on the event loop."""

    def __init__(self, client: redis.asyncio.Redis, prefix: str, database: WorkerDatabase) -> None:
        self._client = client
        self._prefix = prefix
        self._database = database

    async def look_back(self, attempt: Attempt) -> PartialOutput | None:
        """Return what the newest readable attempt before ``attempt`` left, after its usage is stored."""
        number = attempt.claim.attempt
        for earlier in range(number - 1, max(number - 1 - _LOOK_BACK, 0), -1):
            partial = await self._read_log(attempt, earlier)
            if partial is not None:
                late_usage = store.LateUsage(attempt.key, earlier, partial.usage)
                await self._database.persist(store.record_usage, late_usage, "usage")
                return partial
        return None

    async def _read_log(self, attempt: Attempt, earlier: int) -> PartialOutput | None:
        """Return what the log holds of attempt ``earlier``; None if it is gone, has a hole, or Redis is away."""
        tenant, job_id = attempt.key
        key = job_keys(tenant, job_id, self._prefix).log
        transcript = Transcript()
        usage: Usage | None = None
        start, end = f"{earlier}-0", f"({earlier + 1}-0"
        try:
            while True:
                entries: list[Any] = await self._client.xrange(key, start, end, count=_PAGE)  # type: ignore[assignment]
                for entry_id, fields in entries:
                    event = parse_event(fields[b"event"])
                    if isinstance(event, AttemptFinished | Snapshot):
                        usage = event.usage
                    transcript.apply(event)
                    start = f"({entry_id.decode()}"
                if len(entries) < _PAGE:
                    break
        except (RedisError, OSError, ValueError, KeyError) as error:
            log.warning("log_unreadable", tenant=tenant, job_id=job_id, attempt=earlier, reason=type(error).__name__)
            return None
        if transcript.last is None or transcript.behind:
            return None
        choices = [choice.to_choice() for choice in transcript.choices]
        spent = usage or attempt.estimated_usage(choices)
        return PartialOutput(earlier, choices, spent, transcript.finished)
