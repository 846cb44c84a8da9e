"""Rejections: messages that are no jobs.

In: what the message filter, the service and the engine could not take.  Out: rows for people, and a failed job where
the message named one.
"""

from dataclasses import dataclass

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite

from keepstream.client import queries
from keepstream.client.endings import end_unclaimed
from keepstream.errors import ErrorCode
from keepstream.jobs import Job
from keepstream.results import JobStatus
from keepstream.tables import jobs, now, rejected_messages, requests, waiting
from keepstream_worker.store.conditions import WAITING, is_job, of_job
from keepstream_worker.values import JobKey


@dataclass(frozen=True, slots=True)
class Rejection:
    """A message that could not be run, and why."""

    id: str
    reason: str
    size: int  #: Bytes; 0 if it was not measured.
    payload: str | None = None  #: The message, base64, cut to a limit.
    tenant: str | None = None  #: If the message named one.
    job_id: str | None = None  #: If the message named one.


def reject(connection: Connection, rejections: list[Rejection]) -> list[None]:
    """Record messages that are no valid jobs; recording one twice changes nothing."""
    insert = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(rejected_messages)
    connection.execute(
        insert.values(rejected_at=now()).on_conflict_do_nothing(),
        [
            {
                "id": rejection.id,
                "reason": rejection.reason,
                "size": rejection.size,
                "payload": rejection.payload,
                "tenant": rejection.tenant,
                "job_id": rejection.job_id,
            }
            for rejection in rejections
        ],
    )
    return [None] * len(rejections)


@dataclass(frozen=True, slots=True)
class Refused:
    """A job that ends before it began."""

    job: Job  #: One that only lends its names, if the message held no valid job.
    queue: str  #: Where it came from.
    code: ErrorCode
    message: str
    request_hash: str | None = None  #: What a row that waits must have to be ended as well.


def refuse(connection: Connection, refusals: list[Refused]) -> list[None]:
    """Store jobs that cannot be run as failed, so that whoever waits for them learns of it.

    A job that has a row is left alone, unless it waits and is the very one that was refused.
    """
    insert = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(jobs)
    for refused in sorted(refusals, key=lambda refused: (refused.job.tenant, refused.job.id)):
        job = refused.job
        rows = queries.new_rows(job, refused.queue)
        new = insert.values(created_at=now(), **rows[jobs]).on_conflict_do_nothing().returning(jobs.c.attempt)
        attempt = connection.scalar(new)
        if attempt is not None:
            connection.execute(requests.insert().values(rows[requests]))
        else:
            attempt = _waiting_attempt(connection, refused)
        if attempt is not None:
            end_unclaimed(connection, job.tenant, job.id, attempt, JobStatus.FAILED, refused.code, refused.message)
    return [None] * len(refusals)


def _waiting_attempt(connection: Connection, refused: Refused) -> int | None:
    """Return the newest attempt of a job that waits and is the one that was refused; its row is locked then."""
    key = JobKey(refused.job.tenant, refused.job.id)
    attempt: int | None = connection.scalar(
        select(jobs.c.attempt)
        .where(is_job(key), jobs.c.status.in_(WAITING), jobs.c.request_hash == refused.request_hash)
        .with_for_update(key_share=True)
    )
    if attempt is None or connection.scalar(select(waiting.c.seq).where(of_job(waiting, key))) is None:
        return None  # a turn may have taken it, and its worker will write so in a moment
    return attempt
