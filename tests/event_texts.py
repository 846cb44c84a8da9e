"""Events as JSON texts, as a worker publishes them.

In: ids and texts.
Out: events, to the tests of whatever reads them.
"""

import json
from typing import Any

from keepstream.results import output_sha256

JOB_ID = "job-1"


def event(event_id: str, kind: str, **fields: Any) -> str:
    """Return one event."""
    attempt = int(event_id.partition("-")[0])
    head = {"v": 1, "type": kind, "id": event_id, "job_id": JOB_ID, "attempt": attempt, "ts": 1_767_225_600_000}
    return json.dumps({**head, **fields})


def started(event_id: str, reason: str = "first") -> str:
    """Return an ``attempt.started``."""
    return event(event_id, "attempt.started", model="m", provider="p", reason=reason)


def delta(event_id: str, content: str | None, choice: int = 0, **fields: Any) -> str:
    """Return a ``delta``."""
    given = {"content": content} if content is not None else {}
    return event(event_id, "delta", choice=choice, delta={**given, **fields})


def snapshot(event_id: str, content: str, *, finished: bool = False, **fields: Any) -> str:
    """Return a ``snapshot`` of one choice."""
    return event(event_id, "snapshot", choices=[{"index": 0, "content": content, **fields}], finished=finished)


def attempt_failed(event_id: str) -> str:
    """Return an ``attempt.failed``."""
    error = {"code": "connection", "message": "the connection was cut"}
    return event(event_id, "attempt.failed", error=error, retryable=True, retry_in=0.5)


def attempt_finished(event_id: str) -> str:
    """Return an ``attempt.finished``."""
    return event(event_id, "attempt.finished", finish_reasons={"0": "stop"})


def ended(event_id: str, status: str, content: str) -> str:
    """Return the terminal event of a job with a single choice, ``content``."""
    return event(
        event_id,
        f"job.{status}",
        status=status,
        finish_reasons={"0": "stop"},
        attempts=1,
        output_sha256=output_sha256([content]),
    )
