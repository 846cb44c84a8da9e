"""Payloads: what the worker's events say, as JSON-ready values.

In: output, endings and sums, from the engine.  Out: the fields of events, to the publisher.  Exists so
that the shapes of ``keepstream.events`` are written in one place; there they are models, which would
cost too much to build for each job.
"""

from collections.abc import Sequence
from typing import Any

from keepstream.results import Choice, JobStatus, Usage, output_sha256
from keepstream_worker.values import Ended, Ending


def snapshot_fields(choices: Sequence[Choice], spent: Usage, *, finished: bool) -> dict[str, Any]:
    """Return the fields of a ``snapshot``."""
    return {
        "choices": [choice.model_dump(mode="json", exclude={"extra"}) for choice in choices],
        "finished": finished,
        "usage": spent.model_dump(mode="json"),
    }


def failure_fields(ending: Ending) -> dict[str, Any]:
    """Return the fields of an ``attempt.failed``."""
    assert ending.failure is not None
    return {
        "error": {"code": ending.failure.code, "message": ending.failure.message},
        "retryable": bool(ending.retryable),
        "retry_in": ending.retry_in if ending.status is JobStatus.RETRYING else None,
        "usage": ending.usage.model_dump(mode="json"),
    }


def terminal_fields(ending: Ending, ended: Ended) -> dict[str, Any]:
    """Return the fields of a terminal event."""
    failure = ending.failure
    return {
        "status": ending.status,
        "finish_reasons": finish_reasons(ending.choices),
        "tool_call_ids": [call.id for choice in ending.choices for call in choice.tool_calls],
        "usage": ended.usage.model_dump(mode="json") if ended.usage else None,
        "attempts": ended.attempts,
        "error": {"code": failure.code, "message": failure.message} if failure else None,
        "output_sha256": output_sha256(choice.content for choice in ending.choices),
    }


def finish_reasons(choices: Sequence[Choice]) -> dict[str, str | None]:
    """Return the finish reasons by choice index; JSON's keys are text."""
    return {str(choice.index): choice.finish_reason for choice in choices}
