"""The client's statements: a job is enqueued, cancelled, read or repeated.

In: a connection inside a transaction, and a job or its id, from ``keepstream.client.base``.  Out: rows of new and
cancelled jobs; stored results.  Listings are in ``listing``.

Nothing here commits: the caller's transaction decides what belongs together.  The worker uses ``queued_values``,
``cancel`` and ``get`` as well, so that producers and workers write and read the same rows.
"""

import json
from collections.abc import Collection
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Connection, Table, and_, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from keepstream import names, tables
from keepstream.client import waiting
from keepstream.client.endings import CANCELLED_MESSAGE, end_unclaimed
from keepstream.client.results_from_rows import SUMMARY_COLUMNS, StoredRow, completion_result, job_summary
from keepstream.errors import ErrorCode, IdempotencyConflictError
from keepstream.jobs import Job, parse_job
from keepstream.results import TERMINAL_STATUSES, CompletionResult, JobStatus, JobSummary, WaitingFor
from keepstream.tables import attempts, choices, jobs, tool_calls

# -- writing --------------------------------------------------------------------------------------


def queued_values(job: Job, queue: str = names.QUEUE, retry_of: str | None = None) -> dict[str, Any]:
    """Return the column values of a new ``queued`` row; its times are the database's own clock."""
    return {
        "tenant": job.tenant,
        "id": job.id,
        "status": JobStatus.QUEUED.value,
        "model": job.model,
        "provider": job.provider,
        "job": job.to_json(),
        "request_hash": job.request_hash(),
        "prompt_start": job.prompt_start(),
        "metadata": job.metadata,
        "retry_of": retry_of,
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


def enqueue(connection: Connection, job: Job, queue: str = names.QUEUE, retry_of: str | None = None) -> bool:
    """Write the ``queued`` row of a job whose message is about to be sent; return whether the job is new.

    ``retry_of`` is the id of the job that this one repeats.

    Raises:
        IdempotencyConflictError: the id belongs to a different request.
    """
    insert = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(jobs)
    statement = insert.values(queued_values(job, queue, retry_of)).on_conflict_do_nothing().returning(jobs.c.id)
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

    A waiting job ends at once.  A running one stays ``running`` until its worker, which finds the request in the
    row, has stopped it.  Repeating the call changes nothing.
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
    end_unclaimed(connection, tenant, job_id, row.attempt, JobStatus.CANCELLED, ErrorCode.CANCELLED, CANCELLED_MESSAGE)
    return JobStatus.CANCELLED


# -- reading --------------------------------------------------------------------------------------


#: Everything but the job as it was enqueued, which may have megabytes.
_RESULT_COLUMNS: Final = (
    *(column for column in jobs.columns if column is not jobs.c.job),
    waiting.SECONDS_UNTIL_DUE,
)


def get(connection: Connection, tenant: str, job_id: str, *, whole: bool = False) -> CompletionResult | None:
    """Return a job and everything stored about its answer, or None.

    With ``whole`` also its request, and what it waits for.
    """
    # The job is read first: if it is terminal, what is read after it will not change any more.
    columns = (*_RESULT_COLUMNS, jobs.c.job) if whole else _RESULT_COLUMNS
    row = connection.execute(select(*columns).where(_is(tenant, job_id))).one_or_none()
    if row is None:
        return None
    return completion_result(
        row,
        request=json.loads(row.job).get("request") if whole else None,
        waiting_for=_waiting_for(connection, row) if whole else None,
        tool_calls=connection.execute(
            select(tool_calls).where(_of(tool_calls, tenant, job_id)).order_by(tool_calls.c.position)
        ),
        choices=connection.execute(
            select(choices, choices.c.index.label("choice_index"))
            .where(_of(choices, tenant, job_id))
            .order_by(choices.c.index)
        ),
        attempts=connection.execute(select(attempts).where(_of(attempts, tenant, job_id)).order_by(attempts.c.number)),
    )


def get_summary(connection: Connection, tenant: str, job_id: str) -> JobSummary | None:
    """Return a job without its output and attempts, and what it waits for, or None; the cost is that of a few rows."""
    row = connection.execute(select(*SUMMARY_COLUMNS, *waiting.COLUMNS).where(_is(tenant, job_id))).one_or_none()
    return None if row is None else job_summary(row, _waiting_for(connection, row))


def get_summaries(connection: Connection, tenant: str, job_ids: Collection[str]) -> dict[str, JobSummary]:
    """Return the same for those of some jobs that there are."""
    columns = (*SUMMARY_COLUMNS, *waiting.COLUMNS)
    rows = connection.execute(select(*columns).where(jobs.c.tenant == tenant, jobs.c.id.in_(job_ids))).all()
    around = waiting.look_around(connection) if any(waiting.waits(row.status) for row in rows) else None
    return {
        row.id: job_summary(row, waiting.waiting_for(row, around) if around and waiting.waits(row.status) else None)
        for row in rows
    }


def _waiting_for(connection: Connection, row: StoredRow) -> WaitingFor | None:
    return waiting.waiting_for(row, waiting.look_around(connection)) if waiting.waits(row.status) else None


class Repeatable(NamedTuple):
    """What is needed of a job to run it again."""

    status: JobStatus
    job: Job
    queue: str
    error_code: str | None


def get_for_retry(connection: Connection, tenant: str, job_id: str) -> Repeatable | None:
    """Return a job as it was enqueued, or None."""
    columns = (jobs.c.status, jobs.c.job, jobs.c.queue, jobs.c.error_code)
    row = connection.execute(select(*columns).where(_is(tenant, job_id))).one_or_none()
    if row is None:
        return None
    return Repeatable(JobStatus(row.status), parse_job(json.loads(row.job)), row.queue, row.error_code)


def _is(tenant: str, job_id: str) -> ColumnElement[bool]:
    return and_(jobs.c.tenant == tenant, jobs.c.id == job_id)


def _of(table: Table, tenant: str, job_id: str) -> ColumnElement[bool]:
    return and_(table.c.tenant == tenant, table.c.job_id == job_id)
