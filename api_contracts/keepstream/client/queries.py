"""The client's statements: a job is enqueued, cancelled, read, repeated or deleted.

In: a connection inside a transaction, and a job or its id, from ``keepstream.client.base``.  Out: rows of new and
cancelled jobs, fewer rows; stored results.  Listings are in ``listing``.

Nothing here commits: the caller's transaction decides what belongs together.  The worker uses the rows of a new job,
``cancel`` and ``get`` as well, so that producers and workers write and read the same.
"""

import json
from collections.abc import Collection
from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Connection, Table, and_, bindparam, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from keepstream import estimates, names, tables
from keepstream.client.endings import CANCELLED_MESSAGE, end_unclaimed, stop_waiting
from keepstream.client.follower import Progress
from keepstream.client.lanes import lane_id, pool_id
from keepstream.client.results_from_rows import SUMMARY_COLUMNS, completion_result, job_summary
from keepstream.client.waiting import COLUMNS, reasons
from keepstream.errors import ErrorCode, IdempotencyConflictError
from keepstream.jobs import Chain, Job, parse_job
from keepstream.results import TERMINAL_STATUSES, CompletionResult, JobStatus, JobSummary
from keepstream.tables import (
    announcements,
    arrivals,
    attempts,
    choices,
    jobs,
    pools,
    requests,
    running,
    tool_calls,
    waiting,
)

# -- writing --------------------------------------------------------------------------------------


def new_rows(job: Job, queue: str = names.QUEUE, retry_of: str | None = None) -> dict[Table, dict[str, Any]]:
    """Return, by table, the column values of a new job.

    What the database itself gives is missing: ``created_at`` of the job, and the ``seq`` by which it waits.

    Raises:
        InvalidJobError: the job cannot be written as JSON.
    """
    pool = pool_values(queue, job.job_class, job.chain)
    return {
        jobs: {
            "tenant": job.tenant,
            "id": job.id,
            "status": JobStatus.QUEUED.value,
            "model": job.model,
            "provider": job.provider,
            "class": job.job_class,
            "request_hash": job.request_hash(),
            "prompt_start": job.prompt_start(),
            "metadata": job.metadata,
            "retry_of": retry_of,
            "queue": queue,
            "expires_at": job.expires_at,
            "attempt": 0,
            "tries": 0,
            "max_attempts": job.max_attempts,
            "total_timeout": job.total_timeout,
            "next_reason": "first",
            "partial": False,
        },
        requests: {"tenant": job.tenant, "job_id": job.id, "job": job.to_json()},
        pools: pool,
        waiting: {
            "tenant": job.tenant,
            "job_id": job.id,
            "lane": lane_id(job.tenant, job.job_class, queue),
            "pool": pool["id"],
            "attempt": 0,
            "prompt_tokens": estimates.prompt_tokens(job.request),
            "max_tokens": estimates.most_answer_tokens(job.request),
            "expires_at": job.expires_at,
        },
    }


def pool_values(queue: str, job_class: str, chain: Chain) -> dict[str, Any]:
    """Return the column values of a pool. If there is a row of this id, it has the same."""
    return {
        "id": pool_id(queue, job_class, chain),
        "queue": queue,
        "class": job_class,
        "chain": [list(target) for target in chain],
    }


def enqueue(connection: Connection, job: Job, queue: str = names.QUEUE, retry_of: str | None = None) -> bool:
    """Write a new job, which then waits for a worker of the queue; return whether the job is new.

    ``retry_of`` is the id of the job that this one repeats.

    Raises:
        IdempotencyConflictError: the id belongs to a different request.
    """
    if _insert(connection, new_rows(job, queue, retry_of)):
        return True
    stored = connection.scalar(select(jobs.c.request_hash).where(_is(job.tenant, job.id)))
    if stored != job.request_hash():
        raise IdempotencyConflictError(f"job {job.id} already exists with a different request; use a new key or id")
    return False


def _insert(connection: Connection, rows: dict[Table, dict[str, Any]]) -> bool:
    """Insert a new job, if there is none of its name; return whether there was none."""
    if connection.dialect.name == "postgresql":
        statement = _insert_at_once(tuple((table, tuple(row)) for table, row in rows.items()))
        values = {_name(table.c[column]): value for table, row in rows.items() for column, value in row.items()}
        return connection.scalar(statement, values) is not None
    if connection.execute(_NEW_JOB, rows[jobs]).one_or_none() is None:
        return False
    connection.execute(_REQUEST, rows[requests])
    connection.execute(_POOL, rows[pools])
    place = connection.execute(_PLACE, rows[waiting]).one()
    connection.execute(_ARRIVAL, place._asdict())
    return True


#: What an arrival says of the row that waits.
_NOTED: Final = (waiting.c.seq, waiting.c.lane, waiting.c.pool, waiting.c.tenant)

# On SQLite, where a statement costs no round trip. They are made once, which takes longer than to execute them.
_NEW_JOB: Final = sqlite.insert(jobs).values(created_at=tables.now()).on_conflict_do_nothing().returning(jobs.c.id)
_REQUEST: Final = requests.insert()
_POOL: Final = sqlite.insert(pools).on_conflict_do_nothing()
_PLACE: Final = waiting.insert().returning(*_NOTED)
_ARRIVAL: Final = arrivals.insert()


@cache
def _insert_at_once(rows: tuple[tuple[Table, tuple[str, ...]], ...]) -> Any:
    """Return the statement that does it in one round trip. Its parameters are called as ``_name`` says."""
    bound = {
        table: {name: bindparam(_name(table.c[name]), type_=table.c[name].type) for name in columns}
        for table, columns in rows
    }
    new = (
        postgresql.insert(jobs)
        .values(created_at=tables.now(), **bound[jobs])
        .on_conflict_do_nothing()
        .returning(jobs.c.id)
        .cte("new")
    )

    def insert_if_new(table: Table) -> Any:
        return table.insert().from_select(list(bound[table]), select(*bound[table].values()).select_from(new))

    place = insert_if_new(waiting).returning(*_NOTED).cte("place")
    further = {
        "request": insert_if_new(requests),
        "pool": postgresql.insert(pools).values(bound[pools]).on_conflict_do_nothing(),
        "arrival": arrivals.insert().from_select([column.name for column in _NOTED], select(*place.c)),
    }
    return select(new.c.id).add_cte(*(statement.cte(name) for name, statement in further.items()))


def _name(column: Any) -> str:
    return f"{column.table.name}_{column.name}"


def cancel(connection: Connection, tenant: str, job_id: str) -> JobStatus | None:
    """Cancel a job and return its status after that, or None if there is no such job.

    A waiting job ends at once.  A running one stays ``running`` until its worker, which finds the request in the
    row, has stopped it.  Repeating the call changes nothing.
    """
    # The first statement is the write that locks the row: from here on nothing but a turn moves the job.
    attempt = connection.scalar(
        update(jobs)
        .where(_is(tenant, job_id), jobs.c.status.not_in(TERMINAL_STATUSES))
        .values(cancel_requested_at=func.coalesce(jobs.c.cancel_requested_at, tables.now()))
        .returning(jobs.c.attempt)
    )
    if attempt is None:
        status = connection.scalar(select(jobs.c.status).where(_is(tenant, job_id)))
        return None if status is None else JobStatus(status)
    # Those that wait first: a turn takes a job from there to those that run, never the other way.
    if not stop_waiting(connection, tenant, job_id):
        mark = update(running).where(_of(running, tenant, job_id)).values(cancel_requested=True)
        if connection.execute(mark).rowcount:
            return JobStatus.RUNNING
    end_unclaimed(connection, tenant, job_id, attempt, JobStatus.CANCELLED, ErrorCode.CANCELLED, CANCELLED_MESSAGE)
    return JobStatus.CANCELLED


def delete_ended(connection: Connection, tenant: str, job_id: str) -> bool:
    """Delete a job that has ended, with all that belongs to it; return whether there was such a job."""
    mine = and_(_is(tenant, job_id), jobs.c.status.in_(TERMINAL_STATUSES))
    if not connection.execute(delete(jobs).where(mine)).rowcount:  # and, by the foreign keys, what belongs to it
        return False
    connection.execute(delete(announcements).where(_of(announcements, tenant, job_id)))
    return True


# -- reading --------------------------------------------------------------------------------------


def get(connection: Connection, tenant: str, job_id: str, *, whole: bool = False) -> CompletionResult | None:
    """Return a job and everything stored about its answer, or None.

    With ``whole`` also its request and fallbacks, and what it waits for.
    """
    # The job is read first: if it is terminal, what is read after it will not change any more.
    row = connection.execute(select(jobs).where(_is(tenant, job_id))).one_or_none()
    if row is None:
        return None
    job = None
    if whole:
        job = connection.scalar(select(requests.c.job).where(_of(requests, tenant, job_id)))
    return completion_result(
        row,
        job=None if job is None else json.loads(job),
        waiting_for=reasons(connection, tenant, [row]).get(job_id) if whole else None,
        tool_calls=connection.execute(
            select(tool_calls)
            .where(_of(tool_calls, tenant, job_id))
            .order_by(tool_calls.c.choice_index, tool_calls.c.position)
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
    return get_summaries(connection, tenant, [job_id]).get(job_id)


def get_summaries(connection: Connection, tenant: str, job_ids: Collection[str]) -> dict[str, JobSummary]:
    """Return the same for those of some jobs that there are."""
    columns = (*SUMMARY_COLUMNS, *COLUMNS)
    rows = connection.execute(select(*columns).where(jobs.c.tenant == tenant, jobs.c.id.in_(job_ids))).all()
    found = reasons(connection, tenant, rows)
    return {row.id: job_summary(row, found.get(row.id)) for row in rows}


def get_last_numbered(connection: Connection, tenant: str, prefix: str) -> JobSummary | None:
    """Return, of the jobs whose ids are ``prefix`` and a number, the one with the highest number, or None.

    The cost is that of a few rows: the primary key has them in order.  Other ids may stand between them, by the rules
    that some languages have for sorting; they are left out.
    """
    lowest, highest = names.numbered_id(prefix, 0), prefix + "9" * names.NUMBER_DIGITS
    wanted = select(jobs.c.id).where(jobs.c.tenant == tenant, jobs.c.id >= lowest, jobs.c.id <= highest)
    job_id = connection.scalar(
        wanted.where(func.substr(jobs.c.id, 1, len(prefix)) == prefix, func.length(jobs.c.id) == len(lowest))
        .order_by(jobs.c.id.desc())
        .limit(1)
    )
    return None if job_id is None else get_summary(connection, tenant, job_id)


def get_progress(connection: Connection, tenant: str, job_id: str) -> Progress | None:
    """Return how far a job has come, or None; the cost is that of one row."""
    columns = (jobs.c.status, jobs.c.attempt, jobs.c.terminal_event_id)
    row = connection.execute(select(*columns).where(_is(tenant, job_id))).one_or_none()
    return None if row is None else Progress(JobStatus(row.status), row.attempt, row.terminal_event_id)


class Repeatable(NamedTuple):
    """What is needed of a job to run it again."""

    status: JobStatus
    job: Job
    queue: str
    error_code: str | None


def get_for_retry(connection: Connection, tenant: str, job_id: str) -> Repeatable | None:
    """Return a job as it was enqueued, or None."""
    columns = (jobs.c.status, requests.c.job, jobs.c.queue, jobs.c.error_code)
    row = connection.execute(select(*columns).join(requests).where(_is(tenant, job_id))).one_or_none()
    if row is None:
        return None
    return Repeatable(JobStatus(row.status), parse_job(json.loads(row.job)), row.queue, row.error_code)


def _is(tenant: str, job_id: str) -> ColumnElement[bool]:
    return and_(jobs.c.tenant == tenant, jobs.c.id == job_id)


def _of(table: Table, tenant: str, job_id: str) -> ColumnElement[bool]:
    return and_(table.c.tenant == tenant, table.c.job_id == job_id)
