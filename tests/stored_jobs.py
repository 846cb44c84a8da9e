"""Stored jobs go on, for tests that need no worker: rows are changed as a worker's statements change them.

In: a connection inside a transaction, and the name of a job that waits or runs.  Out: its rows in another state.
"""

import json
from typing import Any

from sqlalchemy import Connection, and_, delete, insert, select, update

from keepstream import tables
from keepstream.client.endings import JobEnd, end_jobs, stop_waiting
from keepstream.client.queries import new_rows
from keepstream.jobs import Job, parse_job
from keepstream.names import DEFAULT_TENANT
from keepstream.results import JobStatus, Usage
from keepstream.tables import arrivals, jobs, requests, running, waiting


def row(connection: Connection, job_id: str, tenant: str = DEFAULT_TENANT) -> Any:
    """Return a job's row."""
    return connection.execute(select(jobs).where(jobs.c.tenant == tenant, jobs.c.id == job_id)).one()


def change(connection: Connection, job_id: str, tenant: str = DEFAULT_TENANT, **values: Any) -> None:
    """Set columns of a job's row."""
    connection.execute(update(jobs).where(jobs.c.tenant == tenant, jobs.c.id == job_id).values(values))


def stored_job(connection: Connection, job_id: str, tenant: str = DEFAULT_TENANT) -> Job:
    """Return a job as it was enqueued."""
    mine = and_(requests.c.tenant == tenant, requests.c.job_id == job_id)
    text = connection.execute(select(requests.c.job).where(mine)).scalar_one()
    return parse_job(json.loads(text))


def take(connection: Connection, job_id: str, tenant: str = DEFAULT_TENANT, *, worker_id: str = "w") -> int:
    """Let a turn give a waiting job to a worker; return the number of the attempt that is to begin."""
    mine = and_(waiting.c.tenant == tenant, waiting.c.job_id == job_id)
    place = connection.execute(delete(waiting).where(mine).returning(*waiting.c)).one()
    connection.execute(delete(arrivals).where(arrivals.c.seq == place.seq))
    job = stored_job(connection, job_id, tenant)
    connection.execute(
        insert(running).values(
            tenant=tenant,
            job_id=job_id,
            attempt=place.attempt + 1,
            worker_id=worker_id,
            provider=job.provider,
            model=job.model,
            lane=place.lane,
            pool=place.pool,
            tokens=place.prompt_tokens,
            prompt_tokens=place.prompt_tokens,
            max_tokens=place.max_tokens,
            started_at=tables.now(),
            cancel_requested=False,
        )
    )
    return int(place.attempt) + 1


def start(connection: Connection, job_id: str, tenant: str = DEFAULT_TENANT, *, worker_id: str = "w") -> None:
    """Let a waiting job run."""
    attempt = take(connection, job_id, tenant, worker_id=worker_id)
    change(connection, job_id, tenant, status=JobStatus.RUNNING.value, attempt=attempt, tries=attempt)


def pause(connection: Connection, job_id: str, tenant: str = DEFAULT_TENANT, *, seconds: float = 0.0) -> None:
    """Let a running job wait for its next attempt."""
    mine = and_(running.c.tenant == tenant, running.c.job_id == job_id)
    run = connection.execute(delete(running).where(mine).returning(*running.c)).one()
    change(connection, job_id, tenant, status=JobStatus.RETRYING.value)
    values = new_rows(stored_job(connection, job_id, tenant))[waiting] | {"attempt": run.attempt, "expires_at": None}
    due = tables.seconds_from_now(seconds)
    seq = connection.scalar(insert(waiting).values(restarted_due=due, **values).returning(waiting.c.seq))
    arrival = {"seq": seq, "lane": run.lane, "pool": run.pool, "tenant": tenant}
    connection.execute(insert(arrivals).values(restarted_due=due, **arrival))


def finish(
    connection: Connection,
    job_id: str,
    status: JobStatus = JobStatus.COMPLETED,
    tenant: str = DEFAULT_TENANT,
    *,
    usage: Usage | None = None,
    announced: bool = True,
) -> None:
    """End a job, whatever it does."""
    stop_waiting(connection, tenant, job_id)
    connection.execute(delete(running).where(running.c.tenant == tenant, running.c.job_id == job_id))
    held = row(connection, job_id, tenant).attempt
    end_jobs(
        connection,
        [
            JobEnd(
                tenant,
                job_id,
                held_attempt=held,
                attempt=max(held, 1),
                status=status,
                contents=[],
                usage=usage,
                terminal_event_id=f"{max(held, 1)}-1",
            )
        ],
    )
    if announced:
        announcements = tables.announcements
        mine = and_(announcements.c.tenant == tenant, announcements.c.job_id == job_id)
        connection.execute(delete(announcements).where(mine))
