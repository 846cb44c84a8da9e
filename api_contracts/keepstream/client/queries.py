"""The questions and statements the client puts to the database; the only SQL outside the worker.

In: a connection inside a transaction, a job or its id.  Out: stored results, and the rows of new and
cancelled jobs, to the client and in part (``queued_values``, ``end_from_outside``) to the worker's
store.  Exists so that a producer and a worker write one and the same row for a job.

Nothing here commits: the caller's transaction decides what belongs together.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Row, Table, and_, delete, func, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from keepstream import names, tables
from keepstream.errors import ErrorCode, ErrorInfo, IdempotencyConflictError, JobNotFoundError
from keepstream.jobs import Job
from keepstream.results import (
    TERMINAL_STATUSES,
    AttemptResult,
    Choice,
    CompletionResult,
    JobStatus,
    JobSummary,
    ToolCall,
    Usage,
    UsageSource,
    output_sha256,
)
from keepstream.tables import attempts, choices, jobs, rejected_messages, tool_calls

CANCELLED_MESSAGE: Final = "the job was cancelled"
_SUMMARY_COLUMNS: Final = (
    jobs.c.id,
    jobs.c.tenant,
    jobs.c.status,
    jobs.c.model,
    jobs.c.provider,
    jobs.c.metadata,
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


# -- writing --------------------------------------------------------------------------------------


def queued_values(job: Job, queue: str = names.QUEUE) -> dict[str, Any]:
    """Return the column values of a new ``queued`` row; its times are the database's own clock."""
    return {
        "tenant": job.tenant,
        "id": job.id,
        "status": JobStatus.QUEUED.value,
        "model": job.model,
        "provider": job.provider,
        "job": job.to_json(),
        "request_hash": job.request_hash(),
        "metadata": job.metadata,
        "created_at": tables.now(),
        "due_at": tables.now(),
        # The message is on its way; if no worker has claimed the job by then, it was lost.
        "resend_at": tables.seconds_from_now(names.RESEND_AFTER),
        "sends": 1,
        "queue": queue,
        "expires_at": job.expires_at,
        "attempt": 0,
        "tries": 0,
        "max_attempts": job.max_attempts,
        "next_reason": "first",
        "partial": False,
        "announced": False,
    }


def enqueue(connection: Connection, job: Job, queue: str = names.QUEUE) -> bool:
    """Write the ``queued`` row of a job whose message is about to be sent; tell whether it is new.

    Raises:
        IdempotencyConflictError: the id belongs to a different request.
    """
    insert = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(jobs)
    statement = insert.values(queued_values(job, queue)).on_conflict_do_nothing().returning(jobs.c.id)
    if connection.execute(statement).one_or_none() is not None:
        return True
    stored = connection.scalar(select(jobs.c.request_hash).where(_is(job.tenant, job.id)))
    if stored != job.request_hash():
        raise IdempotencyConflictError(f"job {job.id} already exists with a different request; use a new key or id")
    return False


def send_again(connection: Connection, tenant: str, job_id: str) -> None:
    """Have a worker's sweeper send the job's message at its next round, because it could not be sent."""
    connection.execute(
        update(jobs)
        .where(_is(tenant, job_id), jobs.c.status == JobStatus.QUEUED)
        .values(resend_at=tables.now(), sends=0)
    )


def cancel(connection: Connection, tenant: str, job_id: str) -> JobStatus | None:
    """Cancel a job and return its status after that, or None if there is no such job.

    A waiting job ends at once.  A running one is told to stop and stays ``running`` until its worker
    has done so.  Repeating the call changes nothing.
    """
    # The first statement is the write that locks the row, so that no claim comes between it and the rest.
    row = connection.execute(
        update(jobs)
        .where(_is(tenant, job_id), jobs.c.status.not_in(TERMINAL_STATUSES))
        .values(cancel_requested_at=func.coalesce(jobs.c.cancel_requested_at, tables.now()))
        .returning(jobs.c.status, jobs.c.attempt)
    ).one_or_none()
    if row is None:
        status = connection.scalar(select(jobs.c.status).where(_is(tenant, job_id)))
        return None if status is None else JobStatus(status)
    if row.status == JobStatus.RUNNING:
        return JobStatus.RUNNING
    end_from_outside(
        connection, tenant, job_id, row.attempt, JobStatus.CANCELLED, ErrorCode.CANCELLED, CANCELLED_MESSAGE
    )
    return JobStatus.CANCELLED


def end_from_outside(
    connection: Connection, tenant: str, job_id: str, attempt: int, status: JobStatus, code: ErrorCode, message: str
) -> bool:
    """End a job that no worker runs, under the next attempt number, so that its last event is fenced like any other.

    The output that an earlier attempt stored stays.  Returns False if somebody else was faster.
    """
    contents = list(
        connection.scalars(select(choices.c.content).where(_of(choices, tenant, job_id)).order_by(choices.c.index))
    )
    usage = sum_usage(connection.execute(select(attempts).where(_of(attempts, tenant, job_id))).all())
    changed = connection.execute(
        update(jobs)
        .where(_is(tenant, job_id), jobs.c.attempt == attempt, jobs.c.status.not_in(TERMINAL_STATUSES))
        .values(
            status=status,
            attempt=attempt + 1,
            worker_id=None,
            finished_at=tables.now(),
            error_code=code,
            error_message=message,
            partial=bool(contents),
            output_sha256=output_sha256(contents),
            # A snapshot of the stored output goes first, so that followers hold what the row holds.
            terminal_event_id=f"{attempt + 1}-{2 if contents else 1}",
            announced=False,
            prompt_tokens=usage.prompt_tokens if usage else None,
            completion_tokens=usage.completion_tokens if usage else None,
            total_tokens=usage.total_tokens if usage else None,
            usage_source=usage.source if usage else None,
        )
    ).rowcount
    return bool(changed)


def sum_usage(rows: Sequence[Any]) -> Usage | None:
    """Return the sum over a job's attempts, with the weakest of their sources; None if no attempt cost anything.

    A figure that no attempt reported is null.
    """
    # Attempts that were refused before the model saw them, or carried over another's output, cost nothing.
    paid = [row for row in rows if (row.http_status or 200) < 400 and row.outcome != "recovered"]
    if not paid:
        return None

    def total(column: str) -> int | None:
        known = [getattr(row, column) for row in paid if getattr(row, column) is not None]
        return sum(known) if known else None

    sources = {row.usage_source or UsageSource.UNKNOWN for row in paid}
    weakest = next(
        source for source in (UsageSource.UNKNOWN, UsageSource.ESTIMATED, UsageSource.PROVIDER) if source in sources
    )
    return Usage(
        prompt_tokens=total("prompt_tokens"),
        completion_tokens=total("completion_tokens"),
        total_tokens=total("total_tokens"),
        source=weakest,
    )


def purge(connection: Connection, older_than_seconds: float, tenant: str | None = None, limit: int = 500) -> int:
    """Delete jobs that ended and were announced that long ago, oldest first; return how many were deleted.

    Rejected messages of that age, which may hold prompts, go with them.
    """
    rejected = delete(rejected_messages).where(
        rejected_messages.c.rejected_at < tables.seconds_from_now(-older_than_seconds)
    )
    if tenant is not None:
        rejected = rejected.where(rejected_messages.c.tenant == tenant)
    connection.execute(rejected)
    ended = (
        select(jobs.c.tenant, jobs.c.id)
        .where(
            jobs.c.status.in_(TERMINAL_STATUSES),
            jobs.c.announced,
            jobs.c.finished_at < tables.seconds_from_now(-older_than_seconds),
        )
        .order_by(jobs.c.finished_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    if tenant is not None:
        ended = ended.where(jobs.c.tenant == tenant)
    # One statement, because on SQLite a transaction that reads first may find that it cannot write; what belongs
    # to a job goes with it, by its foreign key.
    return connection.execute(delete(jobs).where(tuple_(jobs.c.tenant, jobs.c.id).in_(ended))).rowcount


# -- reading --------------------------------------------------------------------------------------


def get(connection: Connection, tenant: str, job_id: str) -> CompletionResult | None:
    """Return a job and everything stored about it, or None."""
    # The job is read first: if it is terminal, what is read after it will not change any more.
    row = connection.execute(select(jobs).where(_is(tenant, job_id))).one_or_none()
    if row is None:
        return None
    calls: dict[int, list[ToolCall]] = defaultdict(list)
    for call in connection.execute(
        select(tool_calls).where(_of(tool_calls, tenant, job_id)).order_by(tool_calls.c.position)
    ):
        calls[call.choice_index].append(
            ToolCall(
                id=call.call_id,
                type=call.type,
                name=call.name,
                arguments=call.arguments,
                arguments_valid=call.arguments_valid,
                extra=call.extra,
            )
        )
    # Labelled, because a row is a tuple and has a method of the name "index".
    stored = connection.execute(
        select(choices, choices.c.index.label("choice_index"))
        .where(_of(choices, tenant, job_id))
        .order_by(choices.c.index)
    )
    tries = connection.execute(select(attempts).where(_of(attempts, tenant, job_id)).order_by(attempts.c.number))
    return CompletionResult(
        **_summary_values(row),
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
            for choice in stored
        ],
        output_sha256=row.output_sha256,
        terminal_event_id=row.terminal_event_id,
        provider_details=row.provider_details,
        attempts=[_attempt(attempt) for attempt in tries],
    )


def get_summary(connection: Connection, tenant: str, job_id: str) -> JobSummary | None:
    """Return a job without its output and attempts, or None; one look-up by primary key."""
    row = connection.execute(select(*_SUMMARY_COLUMNS).where(_is(tenant, job_id))).one_or_none()
    return None if row is None else JobSummary(**_summary_values(row))


def list_jobs(
    connection: Connection,
    tenant: str,
    *,
    status: JobStatus | None = None,
    model: str | None = None,
    provider: str | None = None,
    before: str | None = None,
    limit: int = 50,
) -> list[JobSummary]:
    """Return a tenant's jobs, newest first; for the next page, ``before`` is the id of the last one seen.

    Raises:
        JobNotFoundError: there is no job ``before``.
    """
    statement = select(*_SUMMARY_COLUMNS).where(jobs.c.tenant == tenant)
    if status is not None:
        statement = statement.where(jobs.c.status == status)
    if model is not None:
        statement = statement.where(jobs.c.model == model)
    if provider is not None:
        statement = statement.where(jobs.c.provider == provider)
    if before is not None:
        # The page begins at a place, not at a number of rows: new jobs do not shift it.
        place = select(jobs.c.created_at, jobs.c.id).where(_is(tenant, before))
        if connection.execute(place).one_or_none() is None:
            raise JobNotFoundError(f"there is no job {before} to continue after")
        statement = statement.where(tuple_(jobs.c.created_at, jobs.c.id) < place.scalar_subquery())
    statement = statement.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)
    return [JobSummary(**_summary_values(row)) for row in connection.execute(statement)]


def _summary_values(row: Row[*tuple[Any, ...]]) -> dict[str, Any]:
    return {
        "id": row.id,
        "tenant": row.tenant,
        "status": row.status,
        "model": row.model,
        "provider": row.provider,
        "metadata": row.metadata,
        "created_at": row.created_at,
        "started_at": row.started_at,
        "finished_at": row.finished_at,
        "attempt": row.attempt,
        "usage": _usage(row, None),
        "error": _error(row),
    }


def _attempt(row: Row[*tuple[Any, ...]]) -> AttemptResult:
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
        usage=_usage(row, row.usage),
    )


def _usage(row: Row[*tuple[Any, ...]], details: dict[str, Any] | None) -> Usage | None:
    if row.usage_source is None:
        return None
    return Usage(
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        total_tokens=row.total_tokens,
        source=row.usage_source,
        details=details,
    )


def _error(row: Row[*tuple[Any, ...]]) -> ErrorInfo | None:
    return None if row.error_code is None else ErrorInfo(code=row.error_code, message=row.error_message or "")


def _is(tenant: str, job_id: str) -> ColumnElement[bool]:
    return and_(jobs.c.tenant == tenant, jobs.c.id == job_id)


def _of(table: Table, tenant: str, job_id: str) -> ColumnElement[bool]:
    return and_(table.c.tenant == tenant, table.c.job_id == job_id)
