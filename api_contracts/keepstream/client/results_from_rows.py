"""Results from rows: how what is stored of a job becomes a result.

In: rows, from ``queries``.  Out: the typed results of ``keepstream.results``.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

from sqlalchemy import Row

from keepstream.errors import ErrorInfo
from keepstream.results import AttemptResult, Choice, CompletionResult, JobSummary, ToolCall, Usage, WaitingFor
from keepstream.tables import jobs

StoredRow: TypeAlias = Row[*tuple[Any, ...]]

#: What ``job_summary`` needs of a job's row.
SUMMARY_COLUMNS: Final = (
    jobs.c.id,
    jobs.c.tenant,
    jobs.c.status,
    jobs.c.model,
    jobs.c.provider,
    jobs.c["class"],
    jobs.c.prompt_start,
    jobs.c.metadata,
    jobs.c.retry_of,
    jobs.c.created_at,
    jobs.c.started_at,
    jobs.c.finished_at,
    jobs.c.attempt,
    jobs.c.prompt_tokens,
    jobs.c.completion_tokens,
    jobs.c.total_tokens,
    jobs.c.usage_source,
    jobs.c.error_code,
    jobs.c.error_message,
)


def job_summary(row: StoredRow, waiting_for: WaitingFor | None = None) -> JobSummary:
    """Return a job without its output and attempts."""
    return JobSummary(
        **_summary_values(row), usage=_usage(row, None), prompt_start=row.prompt_start, waiting_for=waiting_for
    )


def completion_result(
    row: StoredRow,
    choices: Iterable[StoredRow],
    tool_calls: Iterable[StoredRow],
    attempts: Iterable[StoredRow],
    *,
    job: Mapping[str, Any] | None,
    waiting_for: WaitingFor | None,
) -> CompletionResult:
    """Return a job with everything stored about it.

    Args:
        row: The job's.
        choices: In the order of their index, which the rows hold as ``choice_index``: a row, being a tuple, has a
            method of the name ``index``.
        tool_calls: Of all choices, in the order of their position.
        attempts: In the order of their number.
        job: As it was enqueued, if that was read.
        waiting_for: What the job waits for, if that was asked.
    """
    calls: dict[int, list[ToolCall]] = defaultdict(list)
    for call in tool_calls:
        calls[call.choice_index].append(_tool_call(call))
    return CompletionResult(
        **_summary_values(row),
        usage=_usage(row, row.usage),
        request=None if job is None else job.get("request"),
        fallbacks=[] if job is None else job.get("fallbacks", []),
        waiting_for=waiting_for,
        partial=row.partial,
        choices=[
            Choice(
                index=choice.choice_index,
                content=choice.content,
                reasoning=choice.reasoning,
                refusal=choice.refusal,
                finish_reason=choice.finish_reason,
                tool_calls=calls[choice.choice_index],
                extra=choice.extra,
            )
            for choice in choices
        ],
        output_sha256=row.output_sha256,
        terminal_event_id=row.terminal_event_id,
        provider_details=row.provider_details,
        attempts=[_attempt(attempt) for attempt in attempts],
    )


def _summary_values(row: StoredRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "tenant": row.tenant,
        "status": row.status,
        "model": row.model,
        "provider": row.provider,
        "job_class": row._mapping["class"],  # noqa: SLF001  # SQLAlchemy's public way to a column of any name
        "metadata": row.metadata,
        "retry_of": row.retry_of,
        "created_at": row.created_at,
        "started_at": row.started_at,
        "finished_at": row.finished_at,
        "attempt": row.attempt,
        "error": _error(row),
    }


def _tool_call(row: StoredRow) -> ToolCall:
    return ToolCall(
        id=row.call_id,
        type=row.type,
        name=row.name,
        arguments=row.arguments,
        arguments_valid=row.arguments_valid,
        extra=row.extra,
    )


def _attempt(row: StoredRow) -> AttemptResult:
    return AttemptResult(
        number=row.number,
        reason=row.reason,
        outcome=row.outcome,
        worker=row.worker_id,
        provider=row.provider,
        model=row.model,
        started_at=row.started_at,
        finished_at=row.finished_at,
        first_token_ms=row.first_token_ms,
        error=_error(row),
        http_status=row.http_status,
        retryable=row.retryable,
        provider_request_id=row.provider_request_id,
        provider_error=row.provider_error,
        usage=_usage(row, row.usage),
    )


def _usage(row: StoredRow, details: dict[str, Any] | None) -> Usage | None:
    if row.usage_source is None:
        return None
    return Usage(
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        total_tokens=row.total_tokens,
        source=row.usage_source,
        details=details,
    )


def _error(row: StoredRow) -> ErrorInfo | None:
    return None if row.error_code is None else ErrorInfo(code=row.error_code, message=row.error_message or "")
