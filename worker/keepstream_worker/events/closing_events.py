"""Closing events: what followers receive when an attempt or a job ends, as JSON-ready values.

In: output, endings and summed usage, from the engine.  Out: types and fields of events, to the publisher.
The shapes are those of ``keepstream.events``; building those models for each job would cost too much.
Pure.
"""

from collections.abc import Sequence
from typing import Any

from keepstream.extras import LIVE_BYTES, abridged_fields
from keepstream.results import Choice, JobStatus, Usage, output_sha256
from keepstream_worker.values import Ended, Ending


def closing_events(ending: Ending, *, announced: bool) -> list[tuple[str, dict[str, Any]]]:
    """Return the events (type and fields) that close an attempt, all but the terminal one.

    After them followers hold what the row holds.

    Args:
        ending: How the attempt ended.
        announced: Whether followers have heard of the attempt.
    """
    events = []
    if ending.status is JobStatus.RETRYING:
        return [("attempt.failed", failed_fields(ending))]
    is_void = ending.status is JobStatus.FAILED  # followers drop the output of a failed attempt
    if is_void and announced:
        events.append(("attempt.failed", failed_fields(ending)))
    if ending.choices and (is_void or not announced):
        events.append(("snapshot", snapshot_fields(ending.choices, ending.usage, finished=False)))
    return events


def snapshot_fields(
    choices: Sequence[Choice],
    spent: Usage,
    *,
    finished: bool,
    details: dict[str, Any] | None = None,
    live_bytes: int = LIVE_BYTES,
) -> dict[str, Any]:
    """Return the fields of a ``snapshot``, in which extras of more than ``live_bytes`` are omitted."""
    return {
        "choices": [
            choice.model_dump(mode="json", exclude={"extra"}) | {"extra": abridged_fields(choice.extra, live_bytes)}
            for choice in choices
        ],
        "finished": finished,
        "usage": spent.model_dump(mode="json"),
        "provider_details": abridged_fields(details) if finished else None,
    }


def finished_fields(choices: Sequence[Choice], spent: Usage, details: dict[str, Any] | None) -> dict[str, Any]:
    """Return the fields of an ``attempt.finished``."""
    return {
        "finish_reasons": finish_reasons(choices),
        "usage": spent.model_dump(mode="json"),
        "provider_details": abridged_fields(details),
    }


def failed_fields(ending: Ending) -> dict[str, Any]:
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
