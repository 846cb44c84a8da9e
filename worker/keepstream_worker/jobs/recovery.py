"""Recovery: what the log still knows of an attempt whose worker died.

In: a job and an attempt number, from the engine.  Out: the attempt's output as the log holds it.
Exists so that a stream that had ended before its worker died is stored and not paid for again, and
that one that had not is at least estimated in the books.
"""

from dataclasses import dataclass
from typing import Any, Final

import redis.asyncio
from redis.exceptions import RedisError

from keepstream.events import AttemptFinished, Snapshot, parse_event
from keepstream.names import job_keys
from keepstream.results import Choice, Usage
from keepstream.transcript import Transcript
from keepstream_worker.telemetry.logs import get_logger

log = get_logger()

#: Entries read at once; a delta has some 200 bytes.
_PAGE: Final = 1000


@dataclass(frozen=True, slots=True)
class PartialOutput:
    """What is left of an attempt."""

    choices: list[Choice]
    usage: Usage | None
    finished: bool  #: Whether the provider's stream had ended well; then ``choices`` are whole.


class LogReader:
    """Reads logs for the engine."""

    def __init__(self, client: redis.asyncio.Redis, prefix: str) -> None:
        self._client = client
        self._prefix = prefix

    async def read(self, tenant: str, job_id: str, attempt: int) -> PartialOutput | None:
        """Return what the log holds of ``attempt``; None if it is gone, has a hole, or Redis is away."""
        key = job_keys(tenant, job_id, self._prefix).log
        transcript = Transcript()
        usage: Usage | None = None
        start, end = f"{attempt}-0", f"({attempt + 1}-0"
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
            log.warning("log_unreadable", tenant=tenant, job_id=job_id, attempt=attempt, reason=type(error).__name__)
            return None
        if transcript.last is None or transcript.behind:
            return None
        choices = [
            Choice(
                index=choice.index,
                content=choice.content,
                reasoning=choice.reasoning,
                refusal=choice.refusal,
                finish_reason=choice.finish_reason,
                tool_calls=choice.tool_calls,
            )
            for choice in transcript.choices
        ]
        return PartialOutput(choices, usage, transcript.finished)
